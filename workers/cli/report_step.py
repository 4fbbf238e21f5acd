"""A program in the sandbox that runs one step of `fleet report` on a copy of the project.

Standard input is JSON: `inputs` (a folder that is copied to WORK), `command`, `environment`,
`within_s`, and `kept` (a folder in WORK, or empty). Standard output is a line of JSON: `exit_code`
(null after `within_s`), the end of the `output`, and `results`, the content of each file in RESULTS
by name. It is followed by a tar of the kept folder.

The project's code runs as a child process, with the same user. It cannot write this report: this
process cannot be traced, its descriptors cannot be opened, and every other process is killed before
the report is written.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path

WORK = "/tmp/work"  # noqa: S108  the sandbox's own
PROJECT, PACKAGES, CONFIG = f"{WORK}/project", f"{WORK}/packages", f"{WORK}/config"
HOME, RESULTS = f"{WORK}/home", f"{WORK}/results"
LOG = "/tmp/output.txt"  # noqa: S108  the sandbox's own

OUTPUT_BYTES = 65_536
"""How much of a step's output is kept, from its end."""


def main() -> None:
    if ctypes.CDLL(None).prctl(4, 0, 0, 0, 0):  # PR_SET_DUMPABLE
        raise OSError("prctl(PR_SET_DUMPABLE) failed")
    step = json.load(sys.stdin)
    shutil.copytree(step["inputs"], WORK, symlinks=True)
    for folder in (PACKAGES, HOME, RESULTS):
        Path(folder).mkdir(exist_ok=True)
    with Path(LOG).open("wb") as log:
        process = subprocess.Popen(
            step["command"],
            cwd=PROJECT,
            env=step["environment"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(step["within_s"])
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.kill(-1, 9)  # all but this one, and the sandbox's own
    results = {
        file.name: file.read_text(errors="replace")
        for file in Path(RESULTS).iterdir()
        if file.is_file() and not file.is_symlink()
    }
    output = Path(LOG).read_bytes()[-OUTPUT_BYTES:].decode(errors="replace")
    print(json.dumps({"exit_code": code, "output": output, "results": results}), flush=True)
    if step["kept"]:
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
            tar.add(step["kept"], ".")


if __name__ == "__main__":
    main()
