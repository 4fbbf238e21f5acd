"""The sandbox's limits, each tested by a program that tries to break it."""

import asyncio
import marshal
import os
import re
import signal
import sys
import sysconfig
import tempfile
import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from activities.checks import notebook
from activities.checks.fences import code_blocks
from activities.checks.lint import lint_code
from activities.checks.sandbox import CannotRun, Limits, Run, Sandbox, python_program
from tests.support.ordinary_user import run_as_ordinary_user
from tests.support.polling import until

NOTEBOOK = Path(notebook.__file__)
REPOSITORY = Path(__file__).parents[3]
MIB = 1024 * 1024


async def run(program: str, limits: Limits | None = None, bwrap: str = "bwrap") -> Run:
    cells = [("<code>", textwrap.dedent(program), "")]
    return await Sandbox(bwrap, limits).run(python_program(NOTEBOOK), marshal.dumps(cells))


def last(run: Run) -> str:
    return run.output.decode().strip().split("\n")[-1]


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def processes_with(mark: str) -> list[int]:
    """Return the ids of this machine's processes whose command line contains the mark."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(mark in word for word in process.info["cmdline"] or [])
    ]


async def until_gone(mark: str) -> None:
    await until(lambda: not processes_with(mark))


async def test_a_program_runs_and_its_output_is_returned() -> None:
    done = await run("import sys; print(1); print(2, file=sys.stderr); sys.exit(3)")

    assert done == Run("exit", 3, b"1\n2\n")


async def test_the_standard_library_is_there_and_nothing_else() -> None:
    done = await run(
        """
        import asyncio, hashlib, sqlite3, ssl, sys, zoneinfo
        from concurrent.futures import ProcessPoolExecutor
        print(zoneinfo.ZoneInfo("Europe/Madrid"), asyncio.run(asyncio.to_thread(abs, -1)))
        print([p for p in sys.path if "packages" in p], sys.modules.get("site"))
        import pydantic
        """
    )

    assert done.output.startswith(b"Europe/Madrid 1\n[] None\n")
    assert b"ModuleNotFoundError: No module named 'pydantic'\n" in done.output
    assert (done.exit_code, last(done)) == (notebook.MISSING, "pydantic")


async def test_the_installed_packages_cannot_be_seen() -> None:
    base = sysconfig.get_path("purelib", vars={"base": sys.base_prefix})
    folders = [base, *(path for path in sys.path if path.endswith("-packages"))]

    done = await run(
        f"import os\nprint([p for p in {folders!r} if os.path.isdir(p) and os.listdir(p)])"
    )

    assert names_in(Path(base))
    assert last(done) == "[]"


async def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEET_SECRET", "s3cr3t-in-the-environment")

    done = await run(
        """
        import os, pathlib
        print(dict(os.environ))
        for process in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                print((process / "environ").read_bytes(), (process / "cmdline").read_bytes()[:40])
            except PermissionError:
                pass
        """
    )

    assert done.exit_code == 0
    assert done.output.startswith(b"{}\n")
    assert b"s3cr3t" not in done.output


@pytest.mark.parametrize(
    "call",
    [
        'socket.create_connection(("127.0.0.1", {port}), 1)',
        'socket.create_connection(("192.0.2.1", 80), 1)',
        'socket.create_connection(("::1", {port}), 1)',
        'socket.getaddrinfo("example.com", 80)',
        'socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53))',
        "socket.socket(socket.AF_VSOCK)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    ],
)
async def test_there_is_no_network(call: str) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]

        done = await run(f"import socket\n{call.format(port=port)}")

    assert done.exit_code == 1
    assert re.match(r"[\w.]*(Error|gaierror)", last(done))


@pytest.fixture
def secret_files(tmp_path: Path) -> Iterator[list[Path]]:
    """Create secrets in the home, in the repository's data folder, and in the machine's /tmp."""
    name = f"secret-{uuid.uuid4().hex}"
    data = REPOSITORY / ".fleet"
    created = os.access(REPOSITORY, os.W_OK) and not data.exists()
    if created:
        data.mkdir()
    files = [f / name for f in (Path.home(), data, tmp_path) if os.access(f, os.W_OK)]
    for file in files:
        file.write_text("s3cr3t")
        file.chmod(0o644)
    yield files
    for file in files:
        file.unlink()
    if created:
        data.rmdir()


async def test_the_home_the_repository_and_the_machine_s_files_cannot_be_read(
    secret_files: list[Path],
) -> None:
    paths = [
        *map(str, secret_files),
        str(REPOSITORY / "pyproject.toml"),
        str(REPOSITORY / ".git"),
        __file__,
        "/etc/passwd",
        "/etc/shadow",
        "/var",
        "/sys",
        "/proc/1/root/etc/passwd",
        "/proc/1/cwd/pyproject.toml",
    ]

    done = await run(
        f"""
        import os
        for path in {paths!r}:
            try:
                print(path, os.listdir(path) if os.path.isdir(path) else open(path).read(1))
            except OSError:
                pass
        for folder, _, files in os.walk("/"):
            if not folder.startswith(("/proc", "/usr", "/dev")):
                print(*(f for f in files if f.startswith("secret-")), end="")
        """
    )

    assert done == Run("exit", 0, b"")


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """Return a folder of the machine that anyone may write to."""
    tmp_path.chmod(0o777)
    return tmp_path


async def test_nothing_can_be_written_outside_tmp(open_folder: Path) -> None:
    folders = ["/", "/usr/lib", "/dev", "/etc", "/proc", "/proc/sys/kernel", str(open_folder)]
    folders += [sys.base_prefix, f"{sys.base_prefix}/lib", str(REPOSITORY), str(Path.home())]

    done = await run(
        f"""
        import os
        open("/tmp/mine", "w").write("x")
        for folder in {folders!r}:
            try:
                open(folder + "/written", "w").write("x")
                print("written in", folder)
            except OSError:
                pass
        """
    )

    assert done == Run("exit", 0, b"")
    assert names_in(open_folder) == []
    assert "mine" not in names_in(Path("/tmp"))


async def test_only_its_own_tmp_is_mounted_for_writing() -> None:
    done = await run(
        """
        for line in open("/proc/self/mounts"):
            _, place, kind, options, *_ = line.split()
            if "rw" in options.split(",") and kind not in ("proc", "devpts", "devtmpfs"):
                print(place)
        """
    )

    assert done.output.decode().split() == ["/tmp", "/dev/shm"]


@pytest.fixture
def folder_in_tmp() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


async def test_what_is_made_visible_in_tmp_can_be_read_there_and_not_written(
    folder_in_tmp: Path,
) -> None:
    visible, hidden = folder_in_tmp / "visible", folder_in_tmp / "hidden"
    visible.write_text("seen")
    hidden.write_text("hidden")
    program = textwrap.dedent(
        f"""
        import os
        print(open({str(visible)!r}).read(), os.path.exists({str(hidden)!r}))
        open({str(visible)!r}, "a")
        """
    )

    done = await Sandbox().run(
        python_program(NOTEBOOK), marshal.dumps([("<code>", program, "")]), [str(visible)]
    )

    assert done.output.startswith(b"seen False\n")
    assert (visible.read_text(), done.exit_code) == ("seen", 1)


async def test_tmp_is_new_in_every_run() -> None:
    sandbox = Sandbox()
    program = marshal.dumps([("<code>", 'open("/tmp/mine", "x")', "")])

    for _ in range(2):
        assert (await sandbox.run(python_program(NOTEBOOK), program)).exit_code == 0


async def test_other_processes_cannot_be_seen_or_touched() -> None:
    done = await run(
        f"""
        import os, signal
        print(len([p for p in os.listdir("/proc") if p.isdigit()]))
        for pid in (os.getppid(), {os.getpid()}, -1):
            try:
                os.kill(pid, signal.SIGKILL)
                print("killed", pid)
            except OSError:
                pass
        """
    )

    assert int(done.output.split()[0]) <= 3
    assert b"killed %d" % os.getpid() not in done.output


async def test_memory_is_limited() -> None:
    done = await run("x = bytearray(2**30)")

    assert (done.exit_code, last(done)) == (1, "MemoryError")


async def test_memory_that_is_allocated_in_small_steps_is_limited() -> None:
    done = await run(
        "x = []\nwhile True:\n    x.append(bytearray(2**20))", Limits(memory_bytes=100 * MIB)
    )

    assert (done.exit_code, last(done)) == (1, "MemoryError")


DANGEROUS = {
    "shmget": (29, 0, 100, 0o1600),
    "shmat": (30, 0, 0, 0),
    "semget": (64, 0, 1, 0o1600),
    "msgget": (68, 0, 0o1600),
    "mq_open": (240, "x", 0o102, 0o600, 0),
    "memfd_create": (319, "x", 0),
    "memfd_secret": (447, 0),
    "clone with a user namespace": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "unshare": (272, 0x10000000),
    "setns": (308, 0, 0),
    "mount": (165, "/tmp", "/tmp", 0, 4096, 0),
    "umount2": (166, "/tmp", 2),
    "pivot_root": (155, "/tmp", "/tmp"),
    "chroot": (161, "/tmp"),
    "open_tree": (428, -100, "/tmp", 1),
    "move_mount": (429, -100, "/tmp", -100, "/tmp", 0),
    "fsopen": (430, "tmpfs", 0),
    "fsmount": (432, 0, 0, 0),
    "fspick": (433, -100, "/tmp", 0),
    "mount_setattr": (442, -100, "/tmp", 0, 0, 0),
    "ptrace": (101, 16, 1, 0, 0),
    "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
    "process_vm_writev": (311, 1, 0, 0, 0, 0, 0),
    "pidfd_getfd": (438, 0, 0, 0),
    "perf_event_open": (298, 0, 0, -1, -1, 0),
    "bpf": (321, 0, 0, 0),
    "io_uring_setup": (425, 1, 0),
    "userfaultfd": (323, 1),
    "fanotify_init": (300, 0, 0),
    "open_by_handle_at": (304, 0, 0, 0),
    "add_key": (248, "user", "x", "x", 1, -3),
    "request_key": (249, "user", "x", "x", -3),
    "keyctl": (250, 0, 0),
    "syslog": (103, 10, 0, 0),
    "init_module": (175, 0, 0, 0),
    "finit_module": (313, 0, 0, 0),
    "delete_module": (176, "x", 0),
    "kexec_load": (246, 0, 0, 0, 0),
    "reboot": (169, 0xFEE1DEAD, 672274793, 0x89ABCDEF, 0),
    "swapon": (167, "/tmp/x", 0),
    "acct": (163, 0),
    "settimeofday": (164, 0, 0),
    "sethostname": (170, "x", 1),
    "iopl": (172, 3),
    "a device node": (133, "/tmp/mem", 0o020666, 257),
}
"""System calls on x86-64 with arguments, each of which gets round a limit or out of a namespace."""


async def test_dangerous_system_calls_are_refused() -> None:
    done = await run(
        f"""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        for name, (number, *arguments) in {DANGEROUS!r}.items():
            values = [a.encode() if isinstance(a, str) else ctypes.c_long(a) for a in arguments]
            result = libc.syscall(number, *values)
            if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
                print(name, result, ctypes.get_errno())
        print("clone3", libc.syscall(435, 0, 0), errno.errorcode[ctypes.get_errno()])
        """
    )

    assert len(DANGEROUS) > 25
    assert done == Run("exit", 0, b"clone3 -1 ENOSYS\n")


async def test_system_calls_of_the_x32_interface_end_the_program() -> None:
    done = await run("import ctypes\nctypes.CDLL(None).syscall(0x40000000 | 39)")

    assert done.exit_code == 128 + signal.SIGSYS


async def test_there_are_no_devices_but_harmless_ones() -> None:
    done = await run(
        """
        import ctypes, os
        print(*sorted(os.listdir("/dev")))
        print(ctypes.CDLL(None).open(b"/dev/tty", os.O_RDWR))  # the worker's terminal
        """
    )

    names = "core fd full null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert done == Run("exit", 0, f"{names}\n-1\n".encode())


async def test_proc_shows_and_changes_nothing_of_the_kernel() -> None:
    done = await run(
        """
        import os
        for path in ("kmsg", "kcore", "1/environ", "1/maps", "1/fd/0", "1/root/etc/passwd"):
            try:
                os.read(os.open(f"/proc/{path}", os.O_RDONLY | os.O_NONBLOCK), 1)
                print("read", path)
            except OSError:
                pass
        for path in ("sysrq-trigger", "sys/kernel/core_pattern", "sys/vm/drop_caches", "1/mem"):
            try:
                os.open(f"/proc/{path}", os.O_WRONLY)
                print("opened", path)
            except OSError:
                pass
        """
    )

    assert done == Run("exit", 0, b"")


async def test_limits_cannot_be_thrown_off_through_process_1() -> None:
    """Process 1 of bubblewrap has no limits: who can write to its memory has none either."""
    done = await run(
        """
        import os
        try:
            open("/proc/1/mem", "r+b")
            print("opened")
        except OSError:
            pass
        try:
            kept = bytearray(700 * 2**20)
            print("700 MiB")
        except MemoryError:
            pass
        forks = 0
        try:
            while forks < 40:
                if os.fork() == 0:
                    os.read(os.pipe()[0], 1)
                forks += 1
            print("40 forks")
        except BlockingIOError:
            pass
        os._exit(7)
        """
    )

    assert done == Run("exit", 7, b"")


async def test_no_other_process_can_be_read_or_rewritten() -> None:
    done = await run(
        """
        import os
        for process in os.listdir("/proc"):
            if process.isdigit() and int(process) != os.getpid():
                try:
                    open(f"/proc/{process}/mem", "r+b").close()
                    print("opened", process)
                except OSError:
                    pass
        """
    )

    assert done == Run("exit", 0, b"")


async def test_a_fork_bomb_is_limited_to_a_few_processes() -> None:
    done = await run(
        """
        import os
        forks = 0
        try:
            while forks < 1000:
                if os.fork() == 0:
                    os.read(os.pipe()[0], 1)
                forks += 1
        except BlockingIOError:
            print("forked", forks)
        os._exit(7)
        """,
        Limits(wall_s=15),
    )

    assert b"forked" in done.output
    assert int(done.output.split()[-1]) < Limits().processes


async def test_the_memory_of_all_processes_together_is_limited() -> None:
    done = await run(
        """
        import os, time
        for _ in range(10):
            if os.fork() == 0:
                kept = bytearray(os.urandom(2**20) * 100)
                time.sleep(100)
        time.sleep(100)
        """,
        Limits(total_memory_bytes=300 * MIB, wall_s=60),
    )

    assert (done.ended, done.exit_code) == ("memory", None)


async def test_memory_that_processes_share_counts_once() -> None:
    done = await run(
        """
        import os
        kept = bytearray(os.urandom(2**20) * 100)
        ends = []
        for _ in range(8):
            read, write = os.pipe()
            if os.fork() == 0:
                os.read(read, 1)
                os._exit(0)
            ends.append(write)
        import time
        time.sleep(1)
        """,
        Limits(total_memory_bytes=300 * MIB),
    )

    assert (done.ended, done.exit_code) == ("exit", 0)


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
async def test_empty_files_do_not_fill_the_machine(folder: str) -> None:
    """A file without content takes kernel memory that no other limit counts."""
    done = await run(
        f"import os\nn = 0\nwhile True:\n    os.mknod(f'{folder}/{{n}}')\n    n += 1",
        Limits(files=1_000, cpu_s=60, wall_s=60),
    )

    assert (done.ended, done.exit_code) == ("files", None)


async def test_threads_are_limited() -> None:
    done = await run(
        """
        import threading
        for _ in range(100):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        """
    )

    assert (done.exit_code, last(done)) == (1, "RuntimeError: can't start new thread")


async def test_an_endless_loop_uses_up_its_cpu_time() -> None:
    done = await run("while True: pass", Limits(cpu_s=1, wall_s=60))

    assert (done.ended, done.exit_code) == ("exit", 128 + signal.SIGXCPU)


async def test_a_loop_that_ignores_the_request_is_killed() -> None:
    done = await run(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        Limits(cpu_s=1, wall_s=60),
    )

    assert (done.ended, done.exit_code) == ("exit", 128 + signal.SIGKILL)


async def test_a_program_that_sleeps_forever_is_killed() -> None:
    done = await run("import time\nprint('zzz')\ntime.sleep(1000)", Limits(wall_s=15))

    assert done == Run("wall_time", None, b"zzz\n")


async def test_what_a_program_leaves_running_is_killed() -> None:
    mark = f"mark-{uuid.uuid4().hex}"

    done = await run(
        f"""
        import subprocess, sys
        left = [sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(1000)"]
        p = subprocess.Popen([*left, {mark!r}], stdout=subprocess.PIPE, start_new_session=True)
        p.stdout.read(1)
        """,
        Limits(wall_s=15),
    )

    assert done.exit_code in (0, None)
    await until_gone(mark)


async def test_a_gigabyte_of_output_is_not_taken() -> None:
    done = await run("while True: print('x' * 10_000)")

    assert (done.ended, done.exit_code) == ("output", None)
    assert len(done.output) == Limits().output_bytes


async def test_a_big_file_is_not_written() -> None:
    done = await run("open('/tmp/big', 'wb').write(bytes(20_000_000))")

    assert (done.exit_code, last(done)) == (1, "OSError: [Errno 27] File too large")


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
async def test_many_files_do_not_fill_the_machine(folder: str) -> None:
    done = await run(
        f"for n in range(1000): open(f'{folder}/{{n}}', 'wb').write(bytes(2**20))",
        Limits(tmp_bytes=8 * MIB),
    )

    assert (done.exit_code, last(done)) == (1, "OSError: [Errno 28] No space left on device")


async def test_limits_cannot_be_raised() -> None:
    done = await run(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        """
    )

    assert last(done) == "ValueError: not allowed to raise maximum limit"


async def test_nothing_in_it_is_root() -> None:
    done = await run(
        """
        import os, pathlib
        status = pathlib.Path("/proc/self/status").read_text()
        print(os.getuid() > 0, os.geteuid() > 0, "CapEff:\\t0000000000000000" in status)
        print("NoNewPrivs:\\t1" in status, "Seccomp:\\t2" in status)
        os.setuid(0)
        """
    )

    assert done.output.startswith(b"True True True\nTrue True\n")
    assert done.exit_code == 1


async def test_standard_input_is_empty() -> None:
    done = await run("input()")

    assert b"EOFError: EOF when reading a line\n" in done.output
    assert (done.exit_code, last(done)) == (notebook.WAITS, "a person's input")


async def test_a_crash_is_an_exit_code() -> None:
    done = await run("import ctypes\nctypes.string_at(0)")

    assert done.exit_code == 128 + signal.SIGSEGV


async def test_the_same_program_writes_the_same_each_time() -> None:
    program = "print({str(n) for n in range(20)}, hash('a'))"

    assert (await run(program)).output == (await run(program)).output


async def test_cancelling_kills_the_program() -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    program = python_program(NOTEBOOK)
    cells = marshal.dumps([("<code>", "while True: pass", "")])
    sandbox = Sandbox(limits=Limits(cpu_s=1000, wall_s=1000))
    running = asyncio.create_task(sandbox.run([*program, mark], cells))
    await until(lambda: processes_with(mark))

    running.cancel()

    await asyncio.wait([running], timeout=60)
    assert running.cancelled()
    await until_gone(mark)


async def test_a_worker_that_is_killed_takes_the_program_along() -> None:
    mark = f"mark-{uuid.uuid4().hex}"
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(
            f"""
            import asyncio, marshal
            from pathlib import Path
            from activities.checks import notebook
            from activities.checks.sandbox import Limits, Sandbox, python_program
            cells = marshal.dumps([("<code>", "while True: pass", "")])
            program = [*python_program(Path(notebook.__file__)), "{mark[:8]}" + "{mark[8:]}"]
            asyncio.run(Sandbox(limits=Limits(cpu_s=60, wall_s=60)).run(program, cells))
            """
        ),
        cwd=REPOSITORY,
    )
    await until(lambda: processes_with(mark))

    worker.kill()

    await worker.wait()
    await until_gone(mark)


async def test_no_more_programs_run_at_once_than_there_are_cores() -> None:
    sandbox = Sandbox()
    code = "import time\nprint(time.time())\ntime.sleep(1)\nprint(time.time())"
    cells = marshal.dumps([("<code>", code, "")])
    cores = os.cpu_count() or 1

    runs = await asyncio.gather(
        *(sandbox.run(python_program(NOTEBOOK), cells) for _ in range(2 * cores))
    )

    spans = [tuple(map(float, run.output.split())) for run in runs]
    for moment, _ in spans:
        assert sum(start <= moment <= end for start, end in spans) <= cores


async def test_parsers_and_ruff_run_in_the_sandbox_and_count_for_its_limit() -> None:
    sandbox = Sandbox()
    cores = os.cpu_count() or 1
    blocks = code_blocks("```python\nprint(1)\n```\n```shell\necho\n```\n")
    seen: list[int] = []
    running = asyncio.gather(*(lint_code(blocks, sandbox) for _ in range(2 * cores)))

    def ended() -> bool:
        found = [each.info for each in psutil.process_iter(["ppid", "name"])]
        seen.append(found.count({"ppid": os.getpid(), "name": "bwrap"}))
        return running.done()

    await until(ended)

    assert all(lint.score == 1 for lint in running.result())
    assert 0 < max(seen) <= cores


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user already")
async def test_all_of_it_holds_for_an_ordinary_user_too() -> None:
    output = await run_as_ordinary_user(__file__)

    assert re.search(r"\d\d passed, 1 skipped", output)


async def test_without_bubblewrap_nothing_runs(tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    with pytest.raises(CannotRun, match=r"/nowhere/bwrap cannot be started .* install it"):
        await run(f"open({str(trace)!r}, 'w')", bwrap="/nowhere/bwrap")

    assert not trace.exists()


@pytest.mark.parametrize("exit_code", [0, 1])
async def test_where_namespaces_are_not_allowed_nothing_runs(
    tmp_path: Path, exit_code: int
) -> None:
    refusing = tmp_path / "bwrap"
    refusing.write_text(
        f"#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit {exit_code}\n"
    )
    refusing.chmod(0o755)

    with pytest.raises(CannotRun, match="No permissions to create new namespace"):
        await run("print(1)", bwrap=str(refusing))


async def test_a_program_cannot_fake_a_missing_sandbox() -> None:
    done = await run(
        """
        import os
        print("bwrap: No permissions to create new namespace")
        for fd in range(3, 64):
            try:
                os.write(fd, b"no")
            except OSError:
                pass
        os._exit(1)
        """
    )

    assert (done.ended, done.exit_code) == ("exit", 1)


async def test_a_missing_program_counts_as_not_run() -> None:
    with pytest.raises(CannotRun, match="/usr/bin/nothing cannot be run"):
        await Sandbox().run(["/usr/bin/nothing"], b"")


async def test_a_missing_sandbox_is_a_warning_of_the_process_that_needs_it() -> None:
    assert await Sandbox().problem() == ""
    assert "install it" in await Sandbox("/nowhere/bwrap").problem()
