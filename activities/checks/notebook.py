"""Runs code blocks in the sandbox as a notebook does: in order, in one namespace, as `__main__`.

Standard input is a marshalled list of (name, source): json would take as long to import as Python
to start. An error ends the run with its traceback and exit code 1. Only the standard library is at
hand here.

The code runs in a child process. How it ended is reported over a pipe, with a secret that lies in
another pipe until the last block is done; this process turns that into the exit code. So nothing
that the code prints, and no exit code of its choice, passes for a report.
"""

import marshal
import os
import sys

Module = type(sys)

EARLY, MISSING, WAITS = 70, 71, 72
"""Exit codes: ended cleanly before the end; a package is missing; it waits for someone."""

_RESERVED = (EARLY, MISSING, WAITS)


def main() -> None:
    blocks = marshal.loads(sys.stdin.buffer.read())  # noqa: S302  written by the worker
    secret_out, secret_in = os.pipe()
    report_out, report_in = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(secret_in)
        os.close(report_out)
        run(blocks, secret_out, report_in)
        return
    os.close(secret_out)
    os.close(report_in)
    secret = os.urandom(16)
    os.write(secret_in, secret)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.set_blocking(report_out, False)
    try:
        report = os.read(report_out, 4096)
    except BlockingIOError:
        report = b""
    kind, _, detail = report[16:].partition(b" ") if report[:16] == secret else (b"", b"", b"")
    if kind in (b"missing", b"waits"):
        print(f"\n{detail.decode(errors='replace')}", flush=True)
        os._exit(MISSING if kind == b"missing" else WAITS)
    if code == 0 and kind != b"end":
        os._exit(EARLY)
    os._exit(128 - code if code < 0 else 1 if code in _RESERVED else code)


def run(blocks: list[tuple[str, str]], secret: int, report: int) -> None:
    """Run the blocks, in the child; its report is sent by the process that began them only."""
    pid = os.getpid()

    def send(text: str) -> None:
        if os.getpid() == pid:
            os.write(report, os.read(secret, 16) + text.encode()[:1000])

    os.environ.clear()
    sys.argv = [""]
    module = Module("__main__")
    sys.modules["__main__"] = module
    for number, (name, source) in enumerate(blocks, start=1):
        try:
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        except SystemExit as error:
            if needs_argument(error):
                send("waits an argument")
            elif number == len(blocks) and at_the_end(error, source):
                send("end")
            raise
        except BaseException as error:
            if root := missing(error):
                send(f"missing {root}")
            elif waits_for_input(error):
                send("waits a person's input")
            show(error, blocks)
            sys.exit(1)
    send("end")


def at_the_end(error: SystemExit, source: str) -> bool:
    """Whether a clean exit comes from the last statement: then everything was run."""
    import ast

    frame = error.__traceback__.tb_next if error.__traceback__ else None
    return frame is not None and frame.tb_lineno >= ast.parse(source).body[-1].lineno


def innermost(error: BaseException):  # type: ignore[no-untyped-def]
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace


def needs_argument(error: SystemExit) -> bool:
    """Whether argparse ended the program because it was started without arguments."""
    trace = error.__traceback__
    while trace and error.code == 2:
        frame = trace.tb_frame
        if frame.f_globals.get("__name__") == "argparse" and frame.f_code.co_name == "error":
            return " required" in str(frame.f_locals.get("message"))
        trace = trace.tb_next
    return False


def missing(error: BaseException) -> str:
    """The package that an import statement did not find; one that is raised by hand is none."""
    trace = innermost(error)
    if not isinstance(error, ImportError) or trace is None:
        return ""
    import opcode

    operation = trace.tb_frame.f_code.co_code[trace.tb_lasti]
    if operation not in (opcode.opmap["IMPORT_NAME"], opcode.opmap["IMPORT_FROM"]):
        return (
            ""
            if trace.tb_frame.f_globals.get("__name__") != "importlib._bootstrap"
            else root_of(error)
        )
    if "relative import" in str(error):
        return "another of its modules"
    return root_of(error)


def root_of(error: ImportError) -> str:
    root = (error.name or "").partition(".")[0]
    found = isinstance(error, ModuleNotFoundError) and root not in sys.stdlib_module_names
    return root if found else ""


def waits_for_input(error: BaseException) -> bool:
    return isinstance(error, EOFError) and "reading a line" in str(error)


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
