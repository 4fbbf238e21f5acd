"""`python -m tests.evaluation DIR`: make the ten tasks for `fleet eval DIR/tasks.jsonl`."""

import argparse
from pathlib import Path

from tests.evaluation.make import make

parser = argparse.ArgumentParser(prog="python -m tests.evaluation", description=__doc__)
parser.add_argument("directory", type=Path, metavar="DIR", help="made if missing")
directory = parser.parse_args().directory
directory.mkdir(parents=True, exist_ok=True)
print(make(directory.resolve()))
