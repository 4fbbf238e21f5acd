"""Runs programs within limits: untrusted ones in bubblewrap, or says why it cannot.

In the sandbox a program sees the system's libraries and a Python interpreter with its standard
library, all read-only, and a small /tmp of its own. It has no network, no environment, no other
process to look at, and limits on CPU, memory, files, processes, output and wall time. It is
killed as a whole: at a limit, on cancellation, and when the worker dies (design section 3).

Namespaces need rights. An ordinary user gets them from a user namespace. Root makes them itself
and the program becomes a user that no one else is: the limit on processes does not hold for root,
nor for the users that a namespace maps onto root.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import sys
import sysconfig
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from activities.checks import entry, seccomp

_MIB = 1024 * 1024
_UNUSED_UIDS = range(0x70000000, 0x7F000000)  # above what users and containers are given

_PYTHON = str(Path(sys.executable).resolve())
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
_LINKED = ("/lib", "/lib64")
_ENTRY = Path(entry.__file__).read_text(encoding="utf-8")


class CannotRun(Exception):
    """Nothing was run; the message says why."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. CPU and memory count for each of its processes.

    Wall time is far above CPU time, so that a busy machine does not change a result.
    processes: only in the sandbox; outside, the limit would count the worker's own.
    """

    cpu_s: int = 5
    wall_s: float = 20.0
    memory_bytes: int = 512 * _MIB
    file_bytes: int = 16 * _MIB
    tmp_bytes: int = 32 * _MIB
    processes: int = 16
    open_files: int = 64
    output_bytes: int = 1 * _MIB


@dataclass(frozen=True)
class Run:
    """How a program ended. exit_code: negative or 128 + signal where a signal ended it.

    It is None where it was killed for its wall time or its output. output: stdout and stderr.
    """

    ended: Literal["exit", "wall_time", "output"]
    exit_code: int | None
    output: bytes


def python_program(source: Path) -> list[str]:
    """The command that runs a Python file's text in the sandbox, with the standard library only."""
    return [_PYTHON, "-s", "-S", "-P", "-u", "-c", source.read_text(encoding="utf-8")]


async def run_limited(argv: Sequence[str], stdin: bytes, limits: Limits) -> Run:
    """Run a program of our own, absolute path first, on untrusted input: limits only.

    It has the limits before it has its input.

    Raises:
        CannotRun: the program could not be started.
    """
    async with _started(argv, ()) as process:
        _limit(process.pid, limits)
        return await _watched(process, stdin, limits)


class Sandbox:
    """Runs at most one program for each core at a time. bwrap: bubblewrap's name or path."""

    def __init__(self, bwrap: str = "bwrap", limits: Limits | None = None) -> None:
        self._bwrap = bwrap
        self.limits = limits or Limits()
        self._free = asyncio.Semaphore(os.cpu_count() or 1)

    async def run(self, argv: Sequence[str], stdin: bytes, visible: Sequence[str] = ()) -> Run:
        """Run a program, absolute path first; `visible`: files to see besides the system's.

        Raises:
            CannotRun: bubblewrap is missing or could not set the sandbox up.
        """
        if not seccomp.supported():
            raise CannotRun("the sandbox's system call filter is for Linux on x86-64 only")
        uid = random.choice(_UNUSED_UIDS) if os.geteuid() == 0 else None
        filter_fd = os.memfd_create("seccomp")
        try:
            os.write(filter_fd, seccomp.program())
            os.lseek(filter_fd, 0, os.SEEK_SET)
            prefix = self._prefix(visible, filter_fd, root=uid is not None)
            async with self._free:
                return await _run(prefix, argv, stdin, self.limits, uid, filter_fd)
        finally:
            os.close(filter_fd)

    def _prefix(self, visible: Sequence[str], filter_fd: int, root: bool) -> list[str]:
        as_root = ("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        # As process 1: a process 1 of bubblewrap's would be the same user's, who could rewrite it.
        as_user = ("--unshare-user", "--uid", "65534", "--gid", "65534", "--as-pid-1")
        return [
            self._bwrap,
            *(as_root if root else as_user),
            *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
            *("--unshare-cgroup-try", "--die-with-parent", "--new-session"),
            *("--seccomp", str(filter_fd)),
            *self._view(visible),
            *("--chdir", "/tmp", "--"),  # noqa: S108  the sandbox's own
        ]

    def _view(self, visible: Sequence[str]) -> list[str]:
        """The file system inside: a fresh, read-only root, and little in it."""
        view: list[str] = []
        for link in _LINKED:
            if Path(link).is_symlink():
                view += ["--symlink", str(Path(link).readlink()), link]
            else:
                view += ["--ro-bind-try", link, link]
        library = str(Path(sys.base_prefix) / "lib")
        paths = dict.fromkeys((*_SYSTEM, library, _PYTHON, *visible))
        # bwrap would make them for their owner alone; `--dir` makes them for all.
        for folder in dict.fromkeys(p for path in paths for p in reversed(Path(path).parents)):
            view += ["--dir", str(folder)]
        for path in paths:
            view += ["--ro-bind-try", path, path]
        # Installed packages are not the standard library; this product may be among them.
        packages = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
        if packages.startswith(library) and Path(packages).is_dir():
            view += ["--tmpfs", packages, "--remount-ro", packages]
        view += ["--proc", "/proc", "--dev", "/dev"]
        for folder in (Path("/tmp"), Path("/dev/shm")):  # noqa: S108
            size = str(self.limits.tmp_bytes)
            view += ["--size", size, "--perms", "1777", "--tmpfs", str(folder)]
        return [*view, "--remount-ro", "/dev", "--remount-ro", "/"]


async def _run(
    prefix: Sequence[str],
    argv: Sequence[str],
    stdin: bytes,
    limits: Limits,
    uid: int | None,
    filter_fd: int,
) -> Run:
    """Run `prefix`, in it the entry (activities/checks/entry.py), and in its place `argv`."""
    resources = _resources(limits) | {"RLIMIT_NPROC": (limits.processes, limits.processes)}
    words = " ".join(f"{name}:{soft}:{hard}" for name, (soft, hard) in resources.items())
    ready, entered = os.pipe()
    try:
        arguments = [str(entered), "" if uid is None else str(uid), words, *argv]
        command = [*prefix, _PYTHON, "-I", "-S", "-c", _ENTRY, *arguments]
        async with _started(command, (filter_fd, entered)) as process:
            run = await _watched(process, stdin, limits)
        os.set_blocking(ready, False)
        with suppress(BlockingIOError):
            answer = os.read(ready, 4096)
            if answer == entry.READY:
                return run
            raise CannotRun(f"{argv[0]} cannot be run{answer[len(entry.READY) :].decode()}")
        why = run.output.decode(errors="replace").strip()[-500:]
        raise CannotRun(f"the sandbox could not be set up: {why or run.ended}")
    finally:
        os.close(ready)
        os.close(entered)


def _limit(pid: int, limits: Limits) -> None:
    """Lay the limits on a program that has just been started."""
    with suppress(ProcessLookupError, FileNotFoundError):  # it has ended, and read nothing
        Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
        for name, limit in _resources(limits).items():
            resource.prlimit(pid, getattr(resource, name), limit)


def _resources(limits: Limits) -> dict[str, tuple[int, int]]:
    """(soft, hard) by the resource's name. Over soft CPU time comes SIGXCPU, over hard, SIGKILL."""
    return {
        "RLIMIT_CPU": (limits.cpu_s, limits.cpu_s + 1),
        "RLIMIT_AS": (limits.memory_bytes, limits.memory_bytes),
        "RLIMIT_FSIZE": (limits.file_bytes, limits.file_bytes),
        "RLIMIT_NOFILE": (limits.open_files, limits.open_files),
        "RLIMIT_CORE": (0, 0),
    }


@asynccontextmanager
async def _started(
    command: Sequence[str], pass_fds: tuple[int, ...]
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The running program; killed with all it started, and reaped, on leaving."""
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
            os.killpg(process.pid, signal.SIGKILL)  # and with bwrap, its process 1 and all below
        while await _output(process).read(65_536):
            pass  # a full pipe would hide that it has ended
        await process.wait()


async def _watched(process: asyncio.subprocess.Process, stdin: bytes, limits: Limits) -> Run:
    output = bytearray()
    writing = asyncio.create_task(_write(process, stdin))
    try:
        async with asyncio.timeout(limits.wall_s):
            while chunk := await _output(process).read(65_536):
                output += chunk
                if len(output) > limits.output_bytes:
                    return Run("output", None, bytes(output[: limits.output_bytes]))
            return Run("exit", await process.wait(), bytes(output))
    except TimeoutError:
        return Run("wall_time", None, bytes(output))
    finally:
        writing.cancel()


async def _write(process: asyncio.subprocess.Process, data: bytes) -> None:
    if process.stdin is None:
        raise RuntimeError("the program was started without a pipe for its input")
    with suppress(ConnectionError):  # it need not read what it is given
        process.stdin.write(data)
        await process.stdin.drain()
    process.stdin.close()


def _output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    if process.stdout is None:
        raise RuntimeError("the program was started without a pipe for its output")
    return process.stdout
