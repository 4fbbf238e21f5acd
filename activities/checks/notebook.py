"""A program that runs code blocks in the sandbox like a notebook: in order, in one namespace.

The blocks run as `__main__`. Standard input is a marshalled list of (name, source, file), because
importing json would take as long as starting Python. A block with a file is written under that
name; a Python file is a module that all other blocks can import, also earlier ones. Data files have
an empty name and only a file. An error ends the run with its traceback and exit code 1. Only the
standard library is available here.

The verdict is this process's exit code, and the code runs in a child process. The child has only
the three standard descriptors, and this process cannot be traced or read. So nothing that the code
prints, writes to a descriptor or exits with can pass for a report, and killing this process fails
the run. The child reports through a page of memory that both share. Code written against this
program can find that page, because it runs in the process that writes to it. It only gains what
code without assertions gets anyway: a dry run that passes, or one that counts as not checked.
"""

import io
import marshal
import mmap
import os
import select
import sys

Module = type(sys)
ModuleSpec = type(sys.__spec__)

EARLY, MISSING, WAITS = 70, 71, 72
"""Exit codes: clean exit before the end; a package is missing; the code waits for someone."""

_RESERVED = (EARLY, MISSING, WAITS)

_PERSON, _ARGUMENT, _CLIENT = "a person's input", "an argument", "a client"
_TERMINAL = (0, "/dev/stdin", "/dev/tty", "/dev/fd/0", "/proc/self/fd/0")
_READING = (None, "r", "rb", "r+", "rb+", "r+b")  # modes of `open`; os.open has None

_REST_S, _LOOK_S = 4, 0.5
"""Seconds without activity after which a server waits for a client, and the polling interval."""


def main() -> None:
    blocks = marshal.loads(sys.stdin.buffer.read())  # noqa: S302  written by the worker
    page = mmap.mmap(-1, 4096)
    set_dumpable(False)
    child = os.fork()
    if child == 0:
        set_dumpable(True)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        run(blocks, page)
        return
    at_rest = until_end_or_rest(child)
    try:
        os.kill(-1, 9)  # every process but this one: nothing writes after the report
    except ProcessLookupError:
        pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kind, _, detail = page[:].rstrip(b"\0").partition(b" ")
    if at_rest:
        kind, detail = b"waits", _CLIENT.encode()
    if kind in (b"missing", b"waits"):
        print(f"\n{detail.decode(errors='replace')}", flush=True)
        os._exit(MISSING if kind == b"missing" else WAITS)
    if code == 0 and kind != b"end":
        os._exit(EARLY)
    os._exit(128 - code if code < 0 else 1 if code in _RESERVED else code)


# --- the process that holds the verdict -----------------------------------------------------------


def set_dumpable(dumpable: bool) -> None:
    """Set whether processes of the same user may trace this one, and open its memory and files.

    Does not use `ctypes`, which takes longer to import than Python takes to start.
    """
    import _ctypes

    prctl = _ctypes.dlsym(_ctypes.dlopen(None, 0), "prctl")  # type: ignore[arg-type]
    if _ctypes.call_function(prctl, (4, int(dumpable), 0, 0, 0)):  # PR_SET_DUMPABLE
        raise OSError("prctl(PR_SET_DUMPABLE) failed")


def until_end_or_rest(child: int) -> bool:
    """Wait until the child ends, and return False; return True once it only waits for clients."""
    ended, looks, before = os.pidfd_open(child), 0, 0
    while not select.select([ended], [], [], _LOOK_S)[0]:
        running, ticks = activity()
        looks = 0 if running or ticks > before + 1 or not listens() else looks + 1
        before = ticks
        if looks * _LOOK_S >= _REST_S:
            return True
    return False


def activity() -> tuple[bool, int]:
    """Return whether the code's processes run, and how many CPU ticks they have used."""
    running, ticks = False, 0
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or int(pid) in (1, os.getpid()):
            continue
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                running |= fields[0] in "RD"
                ticks += int(fields[11]) + int(fields[12])
        except OSError:
            continue  # it has ended
    return running, ticks


def listens() -> bool:
    """Return whether a socket of the sandbox waits for connections or datagrams."""
    for table, column, state in (
        ("tcp", 3, "0A"),
        ("tcp6", 3, "0A"),
        ("udp", 3, "07"),
        ("udp6", 3, "07"),
        ("unix", 3, "00010000"),
    ):
        try:
            with open(f"/proc/net/{table}") as lines:
                # A listener of multiprocessing serves the code's own processes only.
                if any(line.split()[column] == state and "/pymp-" not in line for line in lines):
                    return True
        except OSError:
            continue  # a kernel without IPv6
    return False


# --- the process that runs the code ---------------------------------------------------------------


def run(blocks: list[tuple[str, str, str]], page: mmap.mmap) -> None:
    """Run the blocks; only the process that started them reports, not its forks."""
    pid = os.getpid()

    def report(text: str) -> None:
        if os.getpid() == pid:
            page.seek(0)
            page.write(text.encode()[:1000].ljust(len(page), b"\0"))

    def wait_for(person: str) -> None:
        """End the run when it would wait, however the code handles the end of its input."""
        if os.getpid() == pid:
            report(f"waits {person}")
            show_stack(blocks)
            os._exit(1)

    prepare(wait_for)
    write_files(blocks)
    codes = [block for block in blocks if block[0]]
    notebook = Notebook(codes)
    sys.meta_path.insert(0, notebook)  # type: ignore[arg-type]
    for number, block in enumerate(codes, start=1):
        try:
            notebook.run(*block)
        except SystemExit as error:
            if needs_argument(error, codes):
                report(f"waits {_ARGUMENT}")
            elif at_the_end(error, *block[:2]):
                if number == len(codes):
                    report("end")
                elif module_of(block[2]) and not error.code:
                    continue  # a separate program that has finished
            raise
        except BaseException as error:  # any exception fails the block  # noqa: BLE001
            if root := missing(error):
                report(f"missing {root}")
            elif lacks_argument(error):
                report(f"waits {_ARGUMENT}")
            show(error, blocks)
            sys.exit(1)
    report("end")


def prepare(wait_for) -> None:  # type: ignore[no-untyped-def]
    """Set up the environment, the arguments and the standard input of the code."""
    os.environ.clear()
    sys.argv = Arguments([""])
    sys.stdin = io.TextIOWrapper(io.BufferedReader(Terminal(wait_for)), encoding="utf-8")
    sys.__stdin__ = sys.stdin  # type: ignore[misc]

    def on_audit(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and arguments[0] in _TERMINAL and arguments[1] in _READING:
            wait_for(_PERSON)

    sys.addaudithook(on_audit)


class Arguments(list):  # type: ignore[type-arg]
    """A replacement of sys.argv that remembers the error of a missing argument."""

    lacking: "list[IndexError]" = []  # shared, because a slice has the same arguments

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        try:
            found = list.__getitem__(self, index)
        except IndexError as error:
            self.lacking.append(error)
            raise
        return Arguments(found) if isinstance(index, slice) else found


class Terminal(io.RawIOBase):
    """A replacement of standard input: reading it counts as waiting for a person."""

    def __init__(self, wait_for) -> None:  # type: ignore[no-untyped-def]
        self._wait_for = wait_for

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 0

    def readinto(self, _) -> int:  # type: ignore[no-untyped-def]
        self._wait_for(_PERSON)
        return 0  # a process that the code forked: the end of its input


# --- blocks and files -----------------------------------------------------------------------------


def write_files(blocks: list[tuple[str, str, str]]) -> None:
    for _, source, file in blocks:
        try:
            if file:
                os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
                with open(file, "a", encoding="utf-8") as written:
                    written.write(source)
        except OSError as error:
            print(f"{file} could not be written: {error.strerror}", file=sys.stderr)


def module_of(file: str) -> str:
    """Return `shop.cart` for `src/shop/cart.py`; empty if the file is not an importable module.

    A file with the name of a standard module, or `__main__.py`, runs as a block without a name.
    """
    parts = file.removesuffix(".py").removeprefix("src/").split("/")
    if parts[-1] == "__init__":
        del parts[-1]
    if not file.endswith(".py") or not parts or parts[0] in {*sys.stdlib_module_names, "__main__"}:
        return ""
    return ".".join(parts) if all(part.isidentifier() for part in parts) else ""


class Notebook:
    """A runner of blocks in one namespace, and an importer for blocks that are Python files."""

    def __init__(self, blocks: list[tuple[str, str, str]]) -> None:
        module = sys.modules["__main__"] = Module("__main__")
        self._namespace = module.__dict__
        self._files: dict[str, list[tuple[str, str]]] = {}
        self._packages: set[str] = set()
        for name, source, file in blocks:
            if known := module_of(file):
                self._files.setdefault(known, []).append((name, source))
                folder = known if file.endswith("__init__.py") else known.rpartition(".")[0]
                while folder:
                    self._packages.add(folder)
                    folder = folder.rpartition(".")[0]

    def run(self, name: str, source: str, file: str) -> None:
        """Run a block; a file is imported first, then run like a program."""
        if not (known := module_of(file)):
            exec(self._compiled(source, name), self._namespace)  # noqa: S102
            return
        __import__(known)
        module = sys.modules[known].__dict__
        self._namespace.update(public(module))
        if "__main__" not in source:
            return
        import ast

        for node in ast.parse(source).body:
            match node:
                case ast.If(test=ast.Compare(left=ast.Name("__name__"))):
                    code = compile(ast.Module(node.body, []), name, "exec", dont_inherit=True)
                    exec(code, module)  # noqa: S102

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        known = name.removeprefix("src.")
        if known in self._files:
            return ModuleSpec(name, self, is_package=known in self._packages)  # type: ignore[arg-type]
        if known in self._packages or name == "src":
            loader = None if known == name else self
            return ModuleSpec(name, loader, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        """Return the module `shop` for `src.shop`; leave all others to the import system."""
        if known := spec.name.startswith("src.") and spec.name.removeprefix("src."):
            __import__(known)
            return sys.modules[known]
        return None

    def exec_module(self, module) -> None:  # type: ignore[no-untyped-def]
        if module.__name__ != module.__spec__.name:
            return  # already imported without the prefix `src.`
        # As in a notebook, a block may use definitions of earlier ones.
        module.__dict__.update(public(self._namespace))
        for name, source in self._files[module.__name__]:
            exec(self._compiled(source, name, module.__package__), module.__dict__)  # noqa: S102

    def _compiled(self, source: str, name: str, package: str = ""):  # type: ignore[no-untyped-def]
        """Compile a block; at the top level, relative imports of other blocks become absolute."""
        if package or "from ." not in source:
            return compile(source, name, "exec", dont_inherit=True)
        import ast

        tree = ast.parse(source, name)
        for node in ast.walk(tree):
            for field, value in ast.iter_fields(node):
                if isinstance(value, list):
                    setattr(node, field, list(map(self._absolute, value)))
        return compile(tree, name, "exec", dont_inherit=True)

    def _absolute(self, node):  # type: ignore[no-untyped-def]
        import ast

        if isinstance(node, ast.ImportFrom) and node.level == 1:
            if node.module and self.find_spec(node.module):
                node.level = 0
            elif not node.module and all(self.find_spec(each.name) for each in node.names):
                return ast.copy_location(ast.Import(node.names), node)
        return node


def public(names: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in names.items() if not name.startswith("__")}


# --- how the code ended ---------------------------------------------------------------------------


def traces(error: BaseException):  # type: ignore[no-untyped-def]
    trace = error.__traceback__
    while trace:
        yield trace
        trace = trace.tb_next


def at_the_end(error: SystemExit, name: str, source: str) -> bool:
    """Return whether a clean exit comes from the last statement, after everything was run."""
    import ast

    last = ast.parse(source).body[-1].lineno
    lines = [trace.tb_lineno for trace in traces(error) if in_block(trace, name)]
    return bool(lines) and lines[-1] >= last


def in_block(trace, name: str) -> bool:  # type: ignore[no-untyped-def]
    code = trace.tb_frame.f_code
    return bool(code.co_filename == name and code.co_name == "<module>")


def needs_argument(error: SystemExit, blocks: list[tuple[str, str, str]]) -> bool:
    """Return whether the program exited because required arguments are missing.

    The code exits when an argument is missing or after a check of sys.argv, or argparse exits.
    """
    if lacks_argument(error) or exits_for_arguments(error, blocks):
        return True
    given = False
    for trace in traces(error):
        frame = trace.tb_frame
        if error.code != 2 or frame.f_globals.get("__name__") != "argparse":
            continue
        if frame.f_code.co_name == "parse_args":
            given = frame.f_locals.get("args") is not None
        elif frame.f_code.co_name == "error":
            return not given and " required" in str(frame.f_locals.get("message"))
    return False


def exits_for_arguments(error: SystemExit, blocks: list[tuple[str, str, str]]) -> bool:
    """Return whether the exit is in an `if` on sys.argv: `if len(sys.argv) != 2: sys.exit(1)`."""
    import ast

    trace = [*traces(error)][-1]
    return any(
        isinstance(node, ast.If)
        and ".argv" in ast.unparse(node.test)
        and node.body[0].lineno <= trace.tb_lineno <= (node.body[-1].end_lineno or 0)
        for name, source, _ in blocks
        if name == trace.tb_frame.f_code.co_filename
        for node in ast.walk(ast.parse(source))
    )


def lacks_argument(error: BaseException) -> bool:
    """Return whether the error is that of a missing argument, or was raised while handling it."""
    cause: BaseException | None = error
    while cause:
        if any(cause is each for each in Arguments.lacking):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def missing(error: BaseException) -> str:
    """Return the package that an import statement did not find; ignore errors raised by hand."""
    trace = [None, *traces(error)][-1]
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


def show(error: BaseException, blocks: list[tuple[str, str, str]]) -> None:
    """Print the traceback, starting in the block, with source lines."""
    import traceback

    cache_lines(blocks)
    shown = traceback.TracebackException.from_exception(error)
    shown.stack = traceback.StackSummary.from_list(
        [frame for frame in shown.stack if not of_the_runner(frame.filename)]
    )
    print("".join(shown.format()), end="", file=sys.stderr)


def show_stack(blocks: list[tuple[str, str, str]]) -> None:
    """Print the position where the code reads its input, as if the input had ended there."""
    import traceback

    cache_lines(blocks)
    frames = [each for each in traceback.extract_stack() if not of_the_runner(each.filename)]
    lines = "".join(traceback.format_list(frames))
    print(f"Traceback (most recent call last):\n{lines}", end="", file=sys.stderr)
    print("EOFError: EOF when reading a line", file=sys.stderr, flush=True)
    sys.stdout.flush()


def of_the_runner(filename: str) -> bool:
    return filename == "<string>" or filename.startswith("<frozen importlib")


def cache_lines(blocks: list[tuple[str, str, str]]) -> None:
    import linecache

    for name, source, _ in blocks:
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)


if __name__ == "__main__":
    main()
