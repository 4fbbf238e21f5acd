"""`python -m workers story|agents|context|bridge|inbox|grpc|workspace|codec|all`.

It runs until a signal. `python -m workers grpc SERVICE` serves one of the five services alone.
`python -m workers settings` prints every setting as Markdown tables. With `--prepare`, a process
updates what it owns (schema, councils, streams, consumers, search attributes) and exits.
"""

import argparse
import asyncio
import logging
import sys
from typing import NoReturn

from workers.data_frames import leave_out_data_frames
from workers.environment import SERVICES, InvalidSettings
from workers.exit import leave
from workers.serve_settings import ServeSettings
from workers.settings import MockRefused, load, table

NAMES = ("story", "agents", "context", "bridge", "inbox", "grpc", "workspace", "codec", "all")


def main() -> NoReturn:
    """Run; exit with 0 after a signal and a drain, with 1 if it cannot start or a worker failed."""
    parser = argparse.ArgumentParser(
        prog="python -m workers",
        description="Run the fleet's workers until SIGTERM or SIGINT, then drain them.",
    )
    parser.add_argument(
        "name",
        choices=[*NAMES, "settings"],
        help="a process, `all` of them in one, or `settings`: print every setting in Markdown",
    )
    parser.add_argument(
        "service", nargs="?", default="", choices=["", *SERVICES], help="of `grpc`: only this one"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="update schema, councils, streams, consumers and search attributes, then exit",
    )
    arguments = parser.parse_args()
    name = arguments.name
    if arguments.service and name != "grpc":
        parser.error(f"{arguments.service}: only `grpc` takes a service")
    if name == "settings":
        print(table())
        print("\n`python -m workers.serve`, which serves the LLM, reads only the environment:\n")
        print(table(ServeSettings))
        leave(0)
    try:
        settings = load()
    except (InvalidSettings, MockRefused) as error:
        print(error, file=sys.stderr)
        leave(1)

    leave_out_data_frames()
    from workers.clients.connection import StartError  # the imports below are slow
    from workers.run import prepare, run

    try:
        if arguments.prepare:
            asyncio.run(prepare(name, settings))
        else:
            asyncio.run(run(name, settings, arguments.service))
    except StartError as error:
        print(error, file=sys.stderr)
        leave(1)
    except Exception:  # logged, and the exit code is not 0
        logging.getLogger("workers").exception("a worker failed: all stop")
        leave(1)
    leave(0)


if __name__ == "__main__":
    main()
