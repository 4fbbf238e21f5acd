"""What a project's code can do while `fleet report` measures it, by attacks."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from activities.checks.sandbox import Sandbox
from activities.workspace.sandbox import REPORTS
from tests.support.polling import until
from workers.cli import workspace_report
from workers.cli.workspace_report import CannotMeasure, measure
from workflows.models.report import WorkspaceReport

MIB = 1024 * 1024


def quietly(line: str) -> None:
    pass


def project(folder: Path, *, test: str, **files: str) -> Path:
    """Write a project whose only test is the text of a function."""
    for name in ("shop.py", "tests/test_shop.py", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "shop.py").write_text("ONE = 1\n")
    body = textwrap.indent(textwrap.dedent(test).strip(), "    ")
    (folder / "tests/test_shop.py").write_text(f"def test_it():\n{body}\n")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def passed(report: WorkspaceReport) -> bool:
    """Return whether the project's test passed: the attack that it makes failed."""
    assert report.unit.ok, report.unit.why
    return report.unit.passed == 1


def processes_with(word: str) -> list[int]:
    """Return the ids of this machine's processes whose command line has the word."""
    running = psutil.process_iter(["cmdline"])
    return [process.pid for process in running if word in (process.info["cmdline"] or [])]


@pytest.fixture
def server() -> Iterator[int]:
    """Serve `served` on a port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"WORD = 'served'\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.server_port
        running.shutdown()


def test_credentials_of_the_stack_and_of_the_user_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEET_PASSWORD", "s3cr3t")
    places = [Path.home() / f"secret-{uuid.uuid4().hex}", tmp_path / ".fleet/env"]
    places[1].parent.mkdir()
    for place in places:
        place.write_text("s3cr3t")
        place.chmod(0o644)
    folder = tmp_path / "project"
    project(
        folder,
        test=f"""
        import os, pathlib
        for place in {[*map(str, places), str(folder), "/etc/shadow", str(Path.home() / ".ssh")]}:
            assert not os.path.exists(place), place
        assert not pathlib.Path(__file__, "../../stolen").resolve().exists()
        for process in pathlib.Path("/proc").glob("[0-9]*/environ"):
            try:
                assert b"s3cr3t" not in process.read_bytes()
            except PermissionError:
                pass
        """,
    )
    (folder / "stolen").symlink_to(tmp_path / ".fleet/env")

    try:
        assert passed(measure(folder, quietly))
    finally:
        places[0].unlink()


def test_settings_that_link_to_a_file_of_the_user_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cr3t")
    folder = project(tmp_path / "project", test="pass")
    (folder / "ruff.toml").symlink_to(tmp_path / "secret")

    with pytest.raises(CannotMeasure, match=r"ruff.toml: it links to a file outside the project"):
        measure(folder, quietly)


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12}"
    project(
        tmp_path,
        test=f"""
        import os, subprocess
        if os.fork() == 0:
            os.setsid()
            subprocess.Popen(["sleep", "{mark}"], start_new_session=True, stdout=subprocess.DEVNULL)
            os._exit(0)
        """,
    )

    assert passed(measure(tmp_path, quietly))

    assert processes_with(mark) == []


def test_tests_reach_no_server_but_their_own(tmp_path: Path, server: int) -> None:
    project(
        tmp_path,
        test=f"""
        import http.server, socket, threading, urllib.request
        import pytest
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", {server}), 5)
        with pytest.raises(OSError):
            socket.getaddrinfo("example.com", 80)
        own = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        threading.Thread(target=own.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://127.0.0.1:{{own.server_port}}/") as answer:
            assert answer.status == 200
        own.shutdown()
        """,
    )

    assert passed(measure(tmp_path, quietly))


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    folder = tmp_path / "project"
    project(
        folder,
        test=f"""
        import os, sysconfig
        for place in {[str(open_to_all), str(folder), "/", "/usr", "/etc", str(Path.home())]} + [
            sysconfig.get_path("purelib")
        ]:
            try:
                open(os.path.join(place, "written"), "w")
            except OSError:
                continue
            raise AssertionError(place)
        open("own", "w").write("x")
        """,
    )
    before = sorted(folder.rglob("*"))

    assert passed(measure(folder, quietly))

    assert sorted(folder.rglob("*")) == before
    assert list(open_to_all.iterdir()) == []


def test_a_build_has_the_same_limits_as_a_test(tmp_path: Path, server: int) -> None:
    """The build back end is the project's own code too."""
    written = tmp_path / "open"
    written.mkdir()
    written.chmod(0o777)
    attacks = f"""
        import socket, setuptools
        for attack in (
            lambda: open("{written}/x", "w"),
            lambda: open("/etc/passwd"),
            lambda: socket.create_connection(("127.0.0.1", {server}), 5),
        ):
            try:
                attack()
            except OSError:
                continue
            raise SystemExit("an attack worked")
        open("/tmp/built", "w")
        setuptools.setup(py_modules=["shop"])
        """
    settings = "[build-system]\nrequires = ['setuptools']\n[project]\nname='shop'\nversion='1'\n"
    folder = project(
        tmp_path / "project",
        test="pass",
        **{"pyproject.toml": settings, "setup.py": textwrap.dedent(attacks)},
    )

    report = measure(folder, quietly)

    assert report.build.ok, report.build.why
    assert not Path("/tmp/built").exists()


def test_results_that_the_code_forges_are_refused(tmp_path: Path) -> None:
    project(
        tmp_path,
        test="pass",
        **{
            "conftest.py": (
                "import atexit, os\n\n\n"
                "def forge():\n"
                f"    with open('{REPORTS}/coverage.xml', 'w') as results:\n"
                "        results.write('[]')\n\n\n"
                "atexit.register(forge)\n"
            )
        },
    )

    with pytest.raises(CannotMeasure, match=r"unit tests: coverage\.xml: is not XML"):
        measure(tmp_path, quietly)


def test_results_are_read_after_the_last_process_has_ended(tmp_path: Path) -> None:
    """A process that the tests leave behind cannot change them."""
    project(
        tmp_path,
        test=f"""
        import os, subprocess, sys
        program = "import time\\nwhile True: open('{REPORTS}/tests.xml', 'w').write('[]')"
        waiting = f"while kill -0 {{os.getpid()}}; do sleep 0.01; done; exec {{sys.executable}} -c"
        subprocess.Popen(["/bin/sh", "-c", waiting + ' "$0"', program], start_new_session=True)
        """,
    )

    assert passed(measure(tmp_path, quietly))


def test_code_that_kills_what_runs_it_is_not_measured(tmp_path: Path) -> None:
    project(tmp_path, test="import os\nos.kill(os.getppid(), 9)\nos.kill(os.getpid(), 9)")

    with pytest.raises(CannotMeasure, match=r"unit tests: exit code 137: no JUnit XML file"):
        measure(tmp_path, quietly)


def test_memory_of_all_processes_together_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = workspace_report.LIMITS.model_copy(update={"memory_bytes": 400 * MIB})
    monkeypatch.setattr(workspace_report, "LIMITS", limits)
    project(
        tmp_path,
        test="""
        import os, time
        for _ in range(10):
            if os.fork() == 0:
                kept = bytearray(os.urandom(2**20) * 100)
                time.sleep(100)
        time.sleep(100)
        """,
    )

    with pytest.raises(CannotMeasure, match=r"unit tests: used more than .* bytes of memory"):
        measure(tmp_path, quietly)


def test_without_a_sandbox_nothing_of_the_project_runs(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    folder = project(tmp_path / "project", test=f"open({str(trace)!r}, 'w')")

    with pytest.raises(CannotMeasure, match=r"in the sandbox only, and .*bwrap cannot be started"):
        measure(folder, quietly, sandbox=Sandbox("/nowhere/bwrap"))

    assert not trace.exists()


# --- the set-up command ---------------------------------------------------------------------------


def test_only_the_set_up_command_has_the_network_and_only_its_packages_stay(
    tmp_path: Path, server: int
) -> None:
    folder = project(
        tmp_path / "project",
        test="import served, os\nassert served.WORD == 'served'\nassert not os.path.exists('left')",
    )
    fetch = (
        "import os, urllib.request as r; "
        f"text = r.urlopen('http://127.0.0.1:{server}/').read(); "
        "open(os.environ['PACKAGES'] + '/served.py', 'wb').write(text); open('left', 'w')"
    )
    steps: list[str] = []

    report = measure(folder, steps.append, setup=f'python3 -c "{fetch}"')

    assert passed(report)
    assert steps[:2] == ["set-up", "build"]
    assert not (folder / "left").exists()


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo not to be had; exit 3", "set-up: it ended with exit code 3: not to be had"),
        ("ln -s /etc/passwd $PACKAGES/x", "set-up: what it installed cannot be kept"),
        ("cat /etc/shadow", "exit code 1: cat: /etc/shadow: No such file"),
        (f"ls {Path.home()}/.ssh", "No such file"),
    ],
)
def test_a_set_up_command_that_fails_or_attacks_ends_the_measurement(
    tmp_path: Path, command: str, reason: str
) -> None:
    folder = project(tmp_path / "project", test="pass")

    with pytest.raises(CannotMeasure, match=reason):
        measure(folder, quietly, setup=command)


# --- the repository -------------------------------------------------------------------------------


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_programs_that_a_repository_names_are_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    trace.mkdir()
    folder = project(tmp_path / "project", test="pass", **{".gitattributes": "*.py filter=evil\n"})
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "All")
    for name, value in {
        "core.fsmonitor": f"touch {trace}/fsmonitor; true",
        "filter.evil.clean": f"touch {trace}/clean; cat",
        "filter.evil.process": f"touch {trace}/process",
        "core.hooksPath": str(folder / "hooks"),
    }.items():
        git(folder, "config", name, value)
    (folder / "hooks").mkdir()
    hook = folder / "hooks/post-index-change"
    hook.write_text(f"#!/bin/sh\ntouch {trace}/hook\n")
    hook.chmod(0o755)
    head = git(folder, "rev-parse", "HEAD")
    os.utime(folder / "shop.py")  # git has to read it again

    report = measure(folder, quietly)

    assert list(trace.iterdir()) == []
    assert report.commit == f"{head}-dirty"  # the hooks are not in the commit


def test_a_file_that_only_its_owner_can_read_is_measured(tmp_path: Path) -> None:
    folder = project(tmp_path / "project", test="assert open('data').read() == 'x'", data="x")
    (folder / "data").chmod(0o600)

    assert passed(measure(folder, quietly))


async def test_a_measurement_that_is_killed_takes_the_code_along(tmp_path: Path) -> None:
    mark = f"600.{uuid.uuid4().int % 10**12}"
    folder = project(tmp_path, test=f"import subprocess\nsubprocess.run(['sleep', '{mark}'])")
    code = (
        "import pathlib, sys; from workers.cli.workspace_report import measure; "
        "measure(pathlib.Path(sys.argv[1]), print)"
    )
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, str(folder)), cwd=Path(__file__).parents[3]
    )
    await until(lambda: processes_with(mark))

    running.kill()

    await running.wait()
    await until(lambda: not processes_with(mark))
