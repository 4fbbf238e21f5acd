"""The sandbox: programs that read or run what others wrote run in bubblewrap or not at all.

In the sandbox, a program sees the system's libraries and a Python interpreter with its standard
library, all read-only, and its own small /tmp. It has no network and no environment, sees no other
processes, and has limits on CPU, memory, files, processes, output and wall time. All its processes
are killed at a limit, on cancellation, and when the worker dies. Limits of the kernel are per
process; the worker watches the memory and the files of the whole sandbox (usage.py). A folder of
this machine that is mounted for writing has no limit: the worker also watches how much it
grows (disk.py). See docs/design/0006-sandbox.md.

Namespaces need privileges. An ordinary user gets them from a user namespace. Root creates the
namespaces itself, and the program runs as an otherwise unused user, because the limit on processes
does not apply to root, nor to users that a namespace maps to root.
"""

from __future__ import annotations

import asyncio
import marshal
import os
import random
import resource
import signal
import sys
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal

from activities.checks import cgroups, entry, seccomp, shell_entry, usage
from activities.checks.disk import MAX_DEPTH, Growth, take_over
from activities.checks.output import Output

_MIB = 1024 * 1024
UNUSED_UIDS = range(0x70000000, 0x7F000000)
"""The users of programs that root starts: above the ids of users and containers."""

_PYTHON = str(Path(sys.executable).resolve())
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_LINKED = ("/lib", "/lib64")
_WRITABLE = ("/tmp", "/dev/shm")  # noqa: S108  the sandbox's own
_NETWORK = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf"),
    *("/etc/ssl/certs", "/usr/share/ca-certificates"),
)

_BWRAP_PROCESSES = 3  # bubblewrap outside and inside, and what starts it

WATCHED_EVERY_S = 0.1
"""How often the use of the whole sandbox is measured."""

_ENTRY = Path(entry.__file__).read_text(encoding="utf-8")
_ALONE = ("-s", "-S", "-P", "-u")
"""Options of Python: the standard library only, and output that is written at once."""


class CannotRun(Exception):
    """A program that was not run; the message has the reason."""


@dataclass(frozen=True)
class Limits:
    """The resources that a program may use. CPU and `memory_bytes` are per process.

    Wall time is far above CPU time, so that a busy machine does not change a result.
    `total_memory_bytes` and `files` are for all processes together.

    Attributes:
        memory_bytes: the address space; None: no limit, for programs that reserve much more than
            they use.
        written_bytes: how much all writable mounts together may grow, as are `written_files`.
        kept_bytes: how much of the output is kept, half of it from its start and half from its
            end; None: all.
    """

    cpu_s: int = 5
    wall_s: float = 20.0
    memory_bytes: int | None = 512 * _MIB
    total_memory_bytes: int = 1024 * _MIB
    file_bytes: int = 16 * _MIB
    tmp_bytes: int = 32 * _MIB
    files: int = 10_000
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 1 * _MIB
    written_bytes: int = 0
    written_files: int = 0
    kept_bytes: int | None = None


@dataclass(frozen=True)
class Mount:
    """A folder of this machine that the sandbox shows at the path `inside`."""

    outside: Path
    inside: str
    writable: bool = False


Ended = Literal["exit", "wall_time", "output", "memory", "files", "disk"]


@dataclass(frozen=True)
class Run:
    """The result of a program.

    Attributes:
        ended: how it ended.
        exit_code: negative or 128 + signal if a signal ended it; None if it was killed for its wall
            time, its output, or what the whole sandbox used.
        output: stdout and stderr.
        seconds: how long it ran, without the time that it waited for a core.
    """

    ended: Ended
    exit_code: int | None
    output: bytes
    seconds: float = field(default=0.0, compare=False)


def exceeded(run: Run, limits: Limits) -> str:
    """Return which limit ended a run, in words; empty if none did."""
    return {
        "exit": "",
        "wall_time": f"ran for more than {limits.wall_s:g} s",
        "output": f"wrote more than {limits.output_bytes} bytes",
        "memory": f"used more than {limits.total_memory_bytes} bytes of memory in all its "
        "processes",
        "files": f"made more than {limits.files} files",
        "disk": f"added more than {limits.written_bytes} bytes or {limits.written_files} files to "
        f"the project, or folders deeper than {MAX_DEPTH}",
    }[run.ended]


def python_program(source: Path) -> list[str]:
    """Return the command that runs a Python file in the sandbox, with the standard library only.

    It is a command for `Sandbox.run` alone: entry.py runs the code itself.
    """
    return [entry.HERE, _compiled(source)]


@cache
def _compiled(source: Path) -> str:
    code = compile(source.read_text(encoding="utf-8"), "<string>", "exec", dont_inherit=True)
    return marshal.dumps(code).hex()


class Sandbox:
    """A sandbox that runs at most one program per core. `bwrap`: bubblewrap's name or path."""

    def __init__(self, bwrap: str = "bwrap", limits: Limits | None = None) -> None:
        self._bwrap = bwrap
        self.limits = limits or Limits()
        self._free = asyncio.Semaphore(os.cpu_count() or 1)
        self._groups: Path | None = None
        self.no_groups = ""
        """Why runs have no control group; empty if they have one."""
        try:
            self._groups = cgroups.find_home()
        except cgroups.NoGroup as error:
            self.no_groups = f"no control group, so the worker measures its runs: {error}"

    async def run(
        self,
        argv: Sequence[str],
        stdin: bytes,
        visible: Sequence[str] = (),
        limits: Limits | None = None,
        network: bool = False,
        *,
        mounts: Sequence[Mount] = (),
        on_output: Callable[[bytes], None] | None = None,
        by_shell: bool = False,
    ) -> Run:
        """Run a program in the sandbox.

        Args:
            argv: the program's absolute path and its arguments, or a `python_program` and its own.
            stdin: its input.
            visible: additional files and folders that it can read.
            limits: other limits than the sandbox's.
            network: whether it has this machine's network, with the servers on this machine.
            mounts: additional folders, in the order in which they are mounted. Those that are
                writable belong to the program's user from then on.
            on_output: called with each part of the output as it is written.
            by_shell: whether a shell may start the program, which takes less time than Python:
                `visible` has the system's programs, argv[0] exists, and it needs no environment.

        Raises:
            CannotRun: bubblewrap is missing or could not set up the sandbox.
        """
        if not seccomp.supported():
            raise CannotRun("the sandbox's system call filter is for Linux on x86-64 only")
        limits = limits or self.limits
        written = [mount.outside for mount in mounts if mount.writable]
        uid = _choose_uid(written) if os.geteuid() == 0 else None
        filter_fd = os.memfd_create("seccomp")
        try:
            os.write(filter_fd, seccomp.program())
            os.lseek(filter_fd, 0, os.SEEK_SET)
            view = [*self._view((*visible, *_NETWORK) if network else visible, limits, mounts)]
            view += ["--chdir", "/tmp"]  # noqa: S108  the sandbox's own
            prefix = self._prefix(view, filter_fd, uid is not None, network)
            program = _Program(argv, stdin, uid, on_output)
            run_by = _run_by_shell if by_shell and shell_entry.installed() else _run_by_python
            async with self._free:
                before = await asyncio.to_thread(take_over, written, uid)
                growth = Growth(written, before, limits.written_bytes, limits.written_files)
                try:
                    run = await run_by(prefix, program, limits, growth, filter_fd, self._groups)
                finally:
                    after = await asyncio.to_thread(take_over, written, uid)
                if growth.is_too_much(after):
                    run = replace(run, ended="disk", exit_code=None)
                return run
        finally:
            os.close(filter_fd)

    async def probe(self) -> None:
        """Run a program that does nothing.

        Raises:
            CannotRun: no program can be run in the sandbox on this machine.
        """
        run = await self.run([_PYTHON, "-I", "-S", "-c", ""], b"")
        if run.exit_code != 0:
            raise CannotRun(f"a program that does nothing fails in the sandbox: {run}")

    async def problem(self) -> str:
        """Return why no program can be run in the sandbox here, or an empty text."""
        try:
            await self.probe()
        except CannotRun as error:
            return str(error)
        return ""

    def _prefix(self, view: Sequence[str], filter_fd: int, root: bool, network: bool) -> list[str]:
        as_root = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        # As process 1: bubblewrap's process 1 would have the same user, who could rewrite it.
        as_user = ("--unshare-user", "--uid", "65534", "--gid", "65534", "--as-pid-1")
        return [
            self._bwrap,
            *(as_root if root else as_user),
            *("--unshare-ipc", "--unshare-pid", "--unshare-uts"),
            *(() if network else ("--unshare-net",)),
            *("--unshare-cgroup-try", "--die-with-parent", "--new-session"),
            *("--seccomp", str(filter_fd)),
            # Sets and dicts iterate in the same order in every run, so the output is the same.
            *("--unsetenv", "PATH", "--setenv", "PYTHONHASHSEED", "0"),
            *view,
            "--",
        ]

    def _view(self, visible: Sequence[str], limits: Limits, mounts: Sequence[Mount]) -> list[str]:
        """Return the options for the file system: a new, read-only, minimal root."""
        view = ["--proc", "/proc", "--dev", "/dev"]
        for writable in _WRITABLE:  # before the rest, of which parts may be in /tmp
            size = str(limits.tmp_bytes)
            view += ["--size", size, "--perms", "1777", "--tmpfs", writable]
        for link in _LINKED:
            if Path(link).is_symlink():
                view += ["--symlink", str(Path(link).readlink()), link]
            else:
                view += ["--ro-bind-try", link, link]
        library = str(Path(sys.base_prefix) / "lib")
        paths = dict.fromkeys((*_SYSTEM, library, _PYTHON, *visible))
        # bwrap would create them for their owner only; `--dir` creates them for all.
        for folder in dict.fromkeys(p for path in paths for p in reversed(Path(path).parents)):
            view += ["--dir", str(folder)]
        for path in paths:
            view += ["--ro-bind-try", path, path]
        # Hide installed packages, which are not the standard library; this product may be one.
        packages = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
        if packages not in visible and packages.startswith(library) and Path(packages).is_dir():
            view += ["--tmpfs", packages, "--remount-ro", packages]
        for mount in mounts:
            for parent in reversed(Path(mount.inside).parents):
                view += ["--dir", str(parent)]
            view += ["--bind" if mount.writable else "--ro-bind", str(mount.outside), mount.inside]
        return [*view, "--remount-ro", "/dev", "--remount-ro", "/"]


def _choose_uid(folders: Sequence[Path]) -> int:
    """Return the user that owns the folders since an earlier run, or an unused one."""
    owners = [folder.stat().st_uid for folder in folders[:1]]
    return owners[0] if owners and owners[0] in UNUSED_UIDS else random.choice(UNUSED_UIDS)


@dataclass(frozen=True)
class _Program:
    """What runs in the sandbox: its arguments, its input, its user if root starts it."""

    argv: Sequence[str]
    stdin: bytes
    uid: int | None
    on_output: Callable[[bytes], None] | None


async def _run_by_python(
    prefix: Sequence[str],
    program: _Program,
    limits: Limits,
    growth: Growth,
    filter_fd: int,
    groups: Path | None,
) -> Run:
    """Run `prefix`, which runs activities/checks/entry.py, which executes the program."""
    words = " ".join(f"{name}:{soft}:{hard}" for name, (soft, hard) in _resources(limits).items())
    ready, entered = os.pipe()
    try:
        uid = "" if program.uid is None else str(program.uid)
        arguments = [str(entered), uid, words, *program.argv]
        command = [*prefix, _PYTHON, *_ALONE, "-c", _ENTRY, *arguments]
        async with _contained(command, (filter_fd, entered), limits, groups) as (process, group):
            run = _within(group, await _watched(process, program, limits, growth))
        os.set_blocking(ready, False)
        with suppress(BlockingIOError):
            answer = os.read(ready, 4096)
            if answer == entry.READY:
                return run
            reason = answer[len(entry.READY) :].decode()
            raise CannotRun(f"{program.argv[0]} cannot be run{reason}")
        raise _not_set_up(run.output or run.ended.encode())
    finally:
        os.close(ready)
        os.close(entered)


async def _run_by_shell(
    prefix: Sequence[str],
    program: _Program,
    limits: Limits,
    growth: Growth,
    filter_fd: int,
    groups: Path | None,
) -> Run:
    """Run `prefix`, which runs the programs of shell_entry.py, which execute the program."""
    command = [*prefix, *shell_entry.command(program.argv, program.uid, _resources(limits))]
    async with _contained(command, (filter_fd,), limits, groups) as (process, group):
        await _entered(process, limits)
        return _within(group, await _watched(process, program, limits, growth))


async def _entered(process: asyncio.subprocess.Process, limits: Limits) -> None:
    """Wait until the program is executed.

    Raises:
        CannotRun: it is not.
    """
    try:
        async with asyncio.timeout(limits.wall_s):
            start = await _output(process).readexactly(len(shell_entry.READY))
            if start != shell_entry.READY:
                raise _not_set_up(start + await _output(process).read())
    except asyncio.IncompleteReadError as error:
        raise _not_set_up(error.partial) from error
    except TimeoutError as error:
        raise _not_set_up(b"its time is up") from error


def _not_set_up(output: bytes) -> CannotRun:
    why = output.decode(errors="replace").strip()[-500:]
    return CannotRun(f"the sandbox could not be set up: {why}")


@asynccontextmanager
async def _contained(
    command: Sequence[str], pass_fds: tuple[int, ...], limits: Limits, groups: Path | None
) -> AsyncIterator[tuple[asyncio.subprocess.Process, cgroups.Group | None]]:
    """Yield a running program, and its control group if groups can be made."""
    async with AsyncExitStack() as stack:
        group = None
        if groups:
            most = limits.processes + _BWRAP_PROCESSES
            group = await stack.enter_async_context(
                cgroups.group(groups, limits.total_memory_bytes, most)
            )
            command = group.entering(command)
        yield await stack.enter_async_context(_started(command, pass_fds)), group


def _within(group: cgroups.Group | None, run: Run) -> Run:
    """Return the run as it ended, which may have been by its control group."""
    if group and group.exceeded():
        return replace(run, ended="memory", exit_code=None)
    return run


def _resources(limits: Limits) -> dict[str, tuple[int, int]]:
    """Return (soft, hard) by resource name.

    Exceeding the soft CPU time raises SIGXCPU, the hard one SIGKILL.
    """
    memory = resource.RLIM_INFINITY if limits.memory_bytes is None else limits.memory_bytes
    return {
        "RLIMIT_CPU": (limits.cpu_s, limits.cpu_s + 1),
        "RLIMIT_AS": (memory, memory),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_NPROC": (limits.processes, limits.processes),
    }


@asynccontextmanager
async def _started(
    command: Sequence[str], pass_fds: tuple[int, ...]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Yield the running program; on exit, kill it with its child processes, and reap it."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
            env={"PATH": os.defpath},
        )
    except OSError as error:
        raise CannotRun(f"{command[0]} cannot be started ({error.strerror}); install it") from error
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with bwrap, also its process 1 and children
        while await _output(process).read(65_536):
            pass  # a full pipe would hide that the program has ended
        await process.wait()


async def _watched(
    process: asyncio.subprocess.Process, program: _Program, limits: Limits, growth: Growth
) -> Run:
    output = Output(limits.output_bytes, limits.kept_bytes)
    began = time.monotonic()

    def ended(how: Ended, exit_code: int | None = None) -> Run:
        return Run(how, exit_code, output.kept(), time.monotonic() - began)

    excess: list[Ended] = []
    writing = asyncio.create_task(_write(process, program.stdin))
    watching = asyncio.create_task(_watch(process.pid, limits, growth, excess))
    try:
        async with asyncio.timeout(limits.wall_s):
            while chunk := await _output(process).read(65_536):
                output.add(chunk)
                if program.on_output:
                    program.on_output(chunk)
                if output.exceeded:
                    return ended("output")
            exit_code = await process.wait()
            return ended(excess[0]) if excess else ended("exit", exit_code)
    except TimeoutError:
        return ended("wall_time")
    finally:
        writing.cancel()
        watching.cancel()


async def _watch(pid: int, limits: Limits, growth: Growth, excess: list[Ended]) -> None:
    """Kill the sandbox if its processes together use more than they may; note what of."""
    while True:
        await asyncio.sleep(WATCHED_EVERY_S)
        found = await asyncio.to_thread(_excess, pid, limits, growth)
        if found:
            excess.append(found)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            return


def _excess(pid: int, limits: Limits, growth: Growth) -> Ended | None:
    used = usage.excess(pid, limits.total_memory_bytes, limits.files, _WRITABLE)
    if used is None and growth.exceeded(usage.deleted_bytes(pid) if growth.folders else 0):
        return "disk"
    return used


async def _write(process: asyncio.subprocess.Process, data: bytes) -> None:
    if process.stdin is None:
        raise RuntimeError("the program was started without a pipe for its input")
    with suppress(ConnectionError):  # the program does not have to read its input
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise RuntimeError("the program was started without a pipe for its output")
    return process.stdout
