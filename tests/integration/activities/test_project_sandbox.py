"""What a command can do to the worker and to its project's tree, by attacks inside the limits."""

import asyncio
import os
import re
import shutil
import stat
import textwrap
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from activities.checks import disk
from activities.checks.sandbox import CannotRun, Mount, Sandbox
from activities.checks.sandbox import Limits as SandboxLimits
from activities.workspace import sandbox as project_sandbox
from activities.workspace.sandbox import OUTPUT_BYTES, run_in_project
from activities.workspace.toolchains import MissingToolchain, toolchain
from tests.support.ordinary_user import run_as_ordinary_user
from tests.support.polling import until
from workflows.models.workspace import CommandRun, Limits

MIB = 1024 * 1024

LIMITS = Limits(seconds=60, memory_bytes=400 * MIB, processes=32)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    folder.mkdir(mode=0o700)
    (folder / "README.md").write_text("# Sample\n")
    return folder


async def run(command: str, tree: Path, limits: Limits = LIMITS) -> CommandRun:
    return await run_in_project(
        textwrap.dedent(command).strip(), tree, limits=limits, toolchain=toolchain("python")
    )


def python(program: str) -> str:
    return f"python - <<'END'\n{textwrap.dedent(program).strip()}\nEND"


def limit(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Make a limit that is the same for all repositories small enough for a test."""
    limits = project_sandbox.sandbox_limits

    def smaller(given: Limits) -> SandboxLimits:
        return replace(limits(given), **values)

    monkeypatch.setattr(project_sandbox, "sandbox_limits", smaller)


def processes_with(word: str) -> list[int]:
    running = psutil.process_iter(["cmdline"])
    return [process.pid for process in running if word in (process.info["cmdline"] or [])]


def bytes_in(folder: Path) -> int:
    return disk.measure_folders([folder]).bytes


# --- what a command sees --------------------------------------------------------------------------


async def test_a_command_changes_its_tree_and_the_worker_can_change_it_after(tree: Path) -> None:
    first = await run("pwd; cat README.md; echo more >> README.md; mkdir new; date > new/x", tree)
    (tree / "README.md").write_text("by the worker\n")
    (tree / "new/y").write_text("by the worker\n")
    second = await run("cat README.md; echo more >> README.md; rm new/y; ls new; exit 3", tree)

    assert (first.exit_code, first.output) == (0, "/project\n# Sample\n")
    assert (second.exit_code, second.output) == (3, "by the worker\nx\n")
    assert (tree / "README.md").read_text() == "by the worker\nmore\n"
    assert not second.ok


async def test_the_environment_has_no_credential_of_the_worker(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEO4J_PASSWORD", "s3cr3t")
    secret = tree.parent / "secret"
    secret.write_text("s3cr3t")
    secret.chmod(0o644)

    done = await run(
        f"""
        env; cat /proc/*/environ; cat {secret} {tree}/README.md; cat ../secret
        ls -a ~ {Path.home()}/.ssh {Path(__file__).parents[3]}/pyproject.toml /etc/passwd
        """,
        tree,
    )

    assert "HOME=/tmp/home" in done.output
    assert "s3cr3t" not in done.output
    assert done.output.count("No such file") == 6


async def test_a_command_that_asks_for_input_gets_its_end(tree: Path) -> None:
    done = await run("read answer; echo $?; python -c 'input()'", tree)

    assert done.output.startswith("1\n")
    assert "EOFError" in done.output


async def test_a_program_is_started_the_same_by_a_shell_and_by_python(tree: Path) -> None:
    seen = """
        cat /proc/self/limits /proc/self/oom_score_adj; ls /proc/self/fd; pwd; umask
        grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|SigIgn|SigBlk)' /proc/self/status
    """
    argv = ["/usr/bin/env", "-i", "/bin/sh", "-c", f"{seen}\nexit 3"]

    by_python, by_shell = [
        await Sandbox().run(
            argv,
            b"",
            toolchain("python").folders,
            project_sandbox.sandbox_limits(LIMITS),
            mounts=[Mount(tree, "/project", writable=True)],  # then its user stays the same
            by_shell=by_shell,
        )
        for by_shell in (False, True)
    ]

    assert by_shell == by_python
    assert by_shell.exit_code == 3
    assert re.search(rb"Max processes +32 +32 ", by_shell.output)
    assert b"\n1000\n" in by_shell.output


async def test_what_the_shell_that_starts_a_command_writes_is_not_its_output(tree: Path) -> None:
    assert (await run("printf ready", tree)).output == "ready"
    assert (await run("exit 127", tree)).output == ""
    with pytest.raises(CannotRun, match="could not be set up: bwrap: execvp /bin/sh"):
        await Sandbox().run(["/bin/true"], b"", by_shell=True)


async def test_there_is_no_network(tree: Path) -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]

        done = await run(
            python(
                f"""
                import socket
                for address in (("127.0.0.1", {port}), ("192.0.2.1", 443), ("example.com", 443)):
                    try:
                        socket.create_connection(address, 5)
                        print("connected", address)
                    except OSError:
                        print("refused")
                """
            ),
            tree,
        )

    assert done.output == "refused\n" * 3


async def test_links_lead_nowhere_but_into_the_tree(tree: Path) -> None:
    outside = tree.parent / "outside"
    outside.mkdir(mode=0o777)
    outside.chmod(0o777)
    kept = outside / "kept"
    kept.write_text("as it was")
    kept.chmod(0o600)
    (tree / "before").symlink_to(outside)

    done = await run(
        f"""
        cat before/kept; echo x > before/written; rm -rf before/
        ln -s {outside} after; echo x > after/written; chmod 777 after/kept
        ln -s / root; echo x > root/written; cat root{kept}
        ln {kept} hard; ln /etc/hostname hard
        """,
        tree,
    )

    assert "as it was" not in done.output
    assert [each.name for each in outside.iterdir()] == ["kept"]
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert (kept.stat().st_uid, outside.stat().st_uid) == (os.geteuid(), os.geteuid())
    assert (tree / "after").is_symlink()


async def test_only_the_tree_and_the_reports_are_writable(tree: Path, tmp_path: Path) -> None:
    prepared, reports = tmp_path / "prepared", tmp_path / "reports"
    for folder in (prepared / "tree/.venv", prepared / "packages", reports):
        folder.mkdir(parents=True)
    (prepared / "tree/.venv/marker").write_text("prepared")

    done = await run_in_project(
        "for place in / /usr/bin /etc $PREPARED $PACKAGES .venv; do touch $place/x && echo $place;"
        " done; cat .venv/marker; echo '<testsuite/>' > $REPORTS/unit.xml",
        tree,
        limits=LIMITS,
        toolchain=toolchain("python"),
        prepared=prepared,
        reports=reports,
    )

    assert done.output.endswith("\nprepared")
    assert done.output.count("Read-only file system") == 6
    assert (reports / "unit.xml").read_text() == "<testsuite/>\n"
    assert not (prepared / "tree/.venv/x").exists()


async def test_a_link_in_place_of_dependencies_is_not_mounted_through(
    tree: Path, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    (prepared / "tree/node_modules").mkdir(parents=True)
    (tree / "node_modules").symlink_to("/etc")

    done = await run_in_project(
        "ls node_modules/", tree, limits=LIMITS, toolchain=toolchain("python"), prepared=prepared
    )

    assert (done.exit_code, "alternatives" in done.output) == (0, True)


# --- attacks --------------------------------------------------------------------------------------


async def test_a_fork_bomb_ends_at_its_limits(tree: Path) -> None:
    bomb = "f() { f | f & }; f; sleep 600"

    done = await run(bomb, tree, Limits(seconds=3, memory_bytes=400 * MIB, processes=32))

    assert not done.ok
    assert processes_with(bomb) == []
    assert (await run("echo alive", tree)).output == "alive\n"


async def test_the_memory_of_the_whole_sandbox_is_limited(tree: Path) -> None:
    done = await run(
        python(
            """
            import os, time
            for _ in range(8):
                if os.fork() == 0:
                    kept = bytearray(os.urandom(2**20) * 80)
                    time.sleep(600)
            time.sleep(600)
            """
        ),
        tree,
    )

    assert done.exit_code is None
    assert "of memory in all its processes" in done.stopped


@pytest.mark.parametrize("folder", ["/tmp", "/dev/shm"])
async def test_files_in_memory_count_as_memory(tree: Path, folder: str) -> None:
    done = await run(
        f"head -c 150M /dev/urandom > {folder}/x\n"
        + python("import time\nkept = bytearray(b'x') * (300 * 2**20)\ntime.sleep(30)"),
        tree,
    )

    assert "of memory in all its processes" in done.stopped


async def test_a_full_disk_is_prevented_while_it_fills(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, written_bytes=50 * MIB)

    done = await run("n=0; while true; do head -c 10M /dev/urandom > $n; n=$((n+1)); done", tree)

    assert (done.exit_code, "bytes or" in done.stopped) == (None, True)
    assert bytes_in(tree) < 3000 * MIB


async def test_files_that_are_deleted_and_open_count_too(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, written_bytes=50 * MIB)

    done = await run(
        python(
            """
            import os, time
            for number in range(10):
                file = open(f"deleted{number}", "wb")
                os.unlink(file.name)
                file.write(os.urandom(2**20) * 10)
                file.flush()
                globals()[file.name] = file
            time.sleep(600)
            """
        ),
        tree,
    )

    assert "bytes or" in done.stopped


async def test_what_is_written_just_before_the_end_counts_too(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, written_bytes=5 * MIB)

    done = await run("head -c 6M /dev/urandom > big", tree)

    assert (done.exit_code, "bytes or" in done.stopped) == (None, True)


async def test_a_huge_file_is_not_written(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, file_bytes=MIB)

    done = await run("head -c 2M /dev/zero > big; truncate -s 1T sparse", tree)

    assert done.output.count("File too large") == 2
    assert not done.ok
    assert (tree / "big").stat().st_size == MIB
    assert (tree / "sparse").stat().st_size == 0


async def test_a_hundred_thousand_files_are_not_made(tree: Path) -> None:
    done = await run(
        python(
            """
            import os
            for folder in range(100):
                os.mkdir(str(folder))
                for number in range(1000):
                    os.mknod(f"{folder}/{number}")
            """
        ),
        tree,
    )

    assert (done.exit_code, "50000 files" in done.stopped) == (None, True)
    shutil.rmtree(tree)


async def test_folders_without_end_are_not_kept(tree: Path) -> None:
    """Their paths are too long for any program that walks the tree by paths."""
    done = await run(
        python(
            """
            import os
            for _ in range(3000):
                os.mkdir("deep")
                os.chdir("deep")
            """
        ),
        tree,
    )

    assert "folders deeper than 100" in done.stopped
    # shutil.rmtree recurses, and would fail in pytest's own clean-up.
    removing = await asyncio.create_subprocess_exec("rm", "-rf", tree)
    assert await removing.wait() == 0


async def test_modes_that_would_lock_the_worker_out_are_repaired(tree: Path) -> None:
    done = await run(
        "mkdir -p a/b; echo x > a/b/c; chmod 000 a/b/c a/b a; "
        "cp /bin/true risen; chmod 6755 risen; chmod 000 .",
        tree,
    )

    assert done.ok
    assert [stat.S_IMODE((tree / name).stat().st_mode) for name in ("a", "a/b", "a/b/c")] == [
        0o700, 0o700, 0o400,
    ]  # fmt: skip
    assert stat.S_IMODE((tree / "risen").stat().st_mode) == 0o755


async def test_a_test_that_kills_its_parent_ends_only_its_own_run(tree: Path) -> None:
    (tree / "test_kill.py").write_text(
        "import os, signal\n\n\ndef test_it():\n"
        "    os.kill(os.getppid(), signal.SIGKILL)\n    os.kill(-1, signal.SIGKILL)\n"
    )

    done = await run("python -m pytest -q -p no:valkey test_kill.py; echo survived", tree)

    assert "passed" not in done.output
    assert (await run("echo alive", tree)).output == "alive\n"


async def test_a_process_in_the_background_does_not_stay(tree: Path) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12}"

    done = await run(f"setsid nohup sleep {mark} > /dev/null 2>&1 & echo started", tree)

    assert (done.exit_code, done.output) == (0, "started\n")
    await until(lambda: not processes_with(mark))


async def test_of_a_flood_the_start_and_the_end_are_kept(tree: Path) -> None:
    parts: list[int] = []

    done = await run_in_project(
        "echo first; seq 1000000; echo last",
        tree,
        limits=LIMITS,
        toolchain=toolchain("python"),
        on_output=lambda part: parts.append(len(part)),
    )

    assert done.ok
    assert done.output.startswith("first\n1\n2\n")
    assert done.output.endswith("\n1000000\nlast\n")
    assert "bytes left out ..." in done.output
    assert OUTPUT_BYTES < len(done.output) < OUTPUT_BYTES + 100
    assert sum(parts) > 6_000_000


async def test_a_flood_without_end_is_stopped(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, output_bytes=20 * MIB)

    done = await run("yes", tree)

    assert (done.exit_code, done.stopped) == (None, f"wrote more than {20 * MIB} bytes")


async def test_a_command_that_hangs_is_stopped_with_all_that_it_started(tree: Path) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12}"

    done = await run(
        f"echo before; sleep {mark} & wait", tree, LIMITS.model_copy(update={"seconds": 10})
    )

    assert (done.exit_code, done.stopped, done.output) == (
        None,
        "ran for more than 10 s",
        "before\n",
    )
    assert processes_with(mark) == []


async def test_cancelling_kills_everything(tree: Path) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12}"
    running = asyncio.create_task(run(f"setsid sleep {mark} & chmod 000 .; sleep {mark}", tree))
    await until(lambda: len(processes_with(mark)) == 2)

    running.cancel()

    await asyncio.wait([running], timeout=60)
    assert running.cancelled()
    assert processes_with(mark) == []
    assert (tree / "README.md").exists()


async def test_control_characters_do_not_reach_a_terminal(tree: Path) -> None:
    done = await run(r"printf 'red \033[31m and \377\000 tab\t\n'", tree)

    assert done.output == "red [31m and \ufffd tab\t\n"


@pytest.mark.timeout(300)
@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user already")
async def test_all_of_it_holds_for_an_ordinary_user_too() -> None:
    output = await run_as_ordinary_user(__file__)

    assert re.search(r"\d\d passed, 1 skipped", output)


# --- what is missing ------------------------------------------------------------------------------


async def test_without_a_sandbox_nothing_runs(tree: Path) -> None:
    with pytest.raises(CannotRun, match="install it"):
        await run_in_project(
            "touch ran",
            tree,
            limits=LIMITS,
            toolchain=toolchain("python"),
            sandbox=Sandbox("/nowhere/bwrap"),
        )

    assert not (tree / "ran").exists()


def test_an_unknown_tool_chain_is_refused_with_those_there_are() -> None:
    with pytest.raises(MissingToolchain, match=r"image: cobol .* use python, node, go"):
        toolchain("cobol")


def test_a_tool_chain_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(MissingToolchain, match=r"node is not installed .* install Node.js"):
        toolchain("node")
