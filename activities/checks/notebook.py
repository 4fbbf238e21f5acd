"""Runs code blocks in the sandbox as a notebook does: in order, in one namespace, as `__main__`.

Standard input is JSON: a list of [name, source]. An error ends the run with its traceback and
exit code 1. Only the standard library is at hand here.
"""

import json
import linecache
import os
import sys
import traceback
import types


def main() -> None:
    blocks = json.loads(sys.stdin.buffer.read())
    os.environ.clear()
    sys.argv = [""]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    for name, source in blocks:
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        try:
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        except SystemExit:
            raise
        except BaseException as error:
            trace = error.__traceback__
            traceback.print_exception(error.with_traceback(trace.tb_next if trace else None))
            sys.exit(1)


if __name__ == "__main__":
    main()
