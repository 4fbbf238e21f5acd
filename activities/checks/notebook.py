"""Runs code blocks in the sandbox as a notebook does: in order, in one namespace, as `__main__`.

Standard input is a marshalled list of (name, source): json would take as long to import as Python
to start. An error ends the run with its traceback and exit code 1. Only the standard library is at
hand here.
"""

import marshal
import os
import sys

Module = type(sys)


def main() -> None:
    blocks = marshal.loads(sys.stdin.buffer.read())  # noqa: S302  written by the worker
    os.environ.clear()
    sys.argv = [""]
    module = Module("__main__")
    sys.modules["__main__"] = module
    for name, source in blocks:
        try:
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        except SystemExit:
            raise
        except BaseException as error:
            show(error, blocks)
            sys.exit(1)


def show(error: BaseException, blocks: list[tuple[str, str]]) -> None:
    """Print the traceback from the block on, with its lines."""
    import linecache
    import traceback

    for name, source in blocks:
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    trace = error.__traceback__
    traceback.print_exception(error.with_traceback(trace.tb_next if trace else None))


if __name__ == "__main__":
    main()
