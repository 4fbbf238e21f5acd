"""Measuring a project: the report matches the project."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from activities.planning import load_config
from workers.cli import workspace_report as measuring
from workers.cli.workspace_report import CannotMeasure, measure
from workflows.models.report import WorkspaceReport
from workflows.rules.rigor import score_report

pytestmark = pytest.mark.slow

SAMPLE = Path(__file__).parents[3] / "deploy" / "examples" / "ratelimit"


def quietly(line: str) -> None:
    pass


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def everything_in(root: Path) -> dict[str, bytes]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Return a copy of the sample project that a test can break."""
    return shutil.copytree(
        SAMPLE, tmp_path / "sample", ignore=shutil.ignore_patterns("__pycache__", ".*")
    )


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


# --- the sample -----------------------------------------------------------------------------------


def test_the_sample_is_measured_and_passes_at_every_rigor(sample: Path) -> None:
    steps: list[str] = []
    git(sample, "init", "-q")
    git(sample, "add", ".")
    git(sample, "commit", "-qm", "The sample")
    before = everything_in(sample)

    report = measure(sample, steps.append)

    assert steps == ["build", "unit tests", "end-to-end tests", "lint and static analysis"]
    assert report.build.ok
    assert (report.unit.ok, report.unit.passed, report.unit.failed) == (True, 13, 0)
    assert report.unit.coverage > 95
    assert (report.e2e.ok, report.e2e.passed, report.e2e.failed) == (True, 2, 0)
    assert report.static.sonar.model_dump() == {
        "project_key": "ratelimit-sample",
        "quality_gate": "OK",
        "new_critical": 0,
        "new_major": 0,
    }
    assert report.static.lint_errors == 0
    assert report.commit == git(sample, "rev-parse", "HEAD")
    assert report.timings.total_ms > 0
    for name, level in load_config().rigor.items():
        assert score_report(level, name, report).score == 100
    assert everything_in(sample) == before


def test_a_syntax_error_fails_the_build_the_units_and_the_gate(sample: Path) -> None:
    steps: list[str] = []
    bucket = sample / "src/ratelimit/bucket.py"
    bucket.write_text(bucket.read_text().replace("class TokenBucket:", "class TokenBucket"))

    report = measure(sample, steps.append)

    assert not report.build.ok
    assert any(step.startswith("build failed: ") and "SyntaxError" in step for step in steps)
    assert not report.unit.ok
    assert report.unit.failed > 0
    assert not report.e2e.ok
    assert report.static.sonar.quality_gate == "ERROR"
    assert score_report(load_config().rigor["L0"], "L0", report).score == 0


def test_a_bug_fails_the_tests_that_see_it_and_no_others(sample: Path) -> None:
    bucket = sample / "src/ratelimit/bucket.py"
    bucket.write_text(bucket.read_text().replace("self._tokens -= 1", "self._tokens -= 0.5"))

    report = measure(sample, quietly)

    assert report.build.ok
    assert not report.unit.ok
    assert not report.e2e.ok
    assert 0 < report.unit.failed < 13
    assert report.unit.passed + report.unit.failed == 13
    assert report.e2e.passed + report.e2e.failed == 2


# --- projects of other kinds ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rough(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WorkspaceReport]:
    """Return a flat project with an example of everything that costs points, and its report."""
    root = write(
        tmp_path_factory.mktemp("rough"),
        {
            "shop/__init__.py": "",
            "shop/price.py": (
                "import os, subprocess\n\n\n"
                "def plus_one(a: int) -> int:\n    return a + 1\n\n\n"
                "def order(command: str, seen=[]) -> None:\n"
                "    seen.append(command)\n"
                "    subprocess.run(command, shell=True)\n"
                "    print(undefined)\n"
            ),
            "test/test_price.py": (
                "import os\n\nimport pytest\n\nfrom shop.price import plus_one\n\n\n"
                "def test_it() -> None:\n    assert plus_one(1) == 2\n\n\n"
                "@pytest.mark.skip\ndef test_later() -> None:\n    assert False\n\n\n"
                "def test_it_sees_no_credentials() -> None:\n"
                "    assert not [n for n in os.environ if 'FLEET' in n]\n"
            ),
        },
    )
    return root, measure(root, quietly)


@pytest.fixture(scope="module", autouse=True)
def credentials() -> Iterator[None]:
    """Set a credential in this process's environment, which no measured project may see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEET_PASSWORD", "secret")
        yield


def test_skipped_tests_have_neither_passed_nor_failed(
    rough: tuple[Path, WorkspaceReport],
) -> None:
    unit = rough[1].unit

    assert (unit.ok, unit.passed, unit.failed) == (True, 2, 0)


def test_coverage_is_of_the_code_and_not_of_its_tests(
    rough: tuple[Path, WorkspaceReport],
) -> None:
    # Statements in price.py: an import, two defs, a return; and three that no test reaches.
    assert rough[1].unit.coverage == pytest.approx(100 * 4 / 7, abs=0.01)


def test_findings_are_distinguished_by_their_weight(rough: tuple[Path, WorkspaceReport]) -> None:
    static = rough[1].static

    # Critical: shell=True, an undefined name. Major: an unused import, a mutable default.
    assert (static.sonar.new_critical, static.sonar.new_major) == (2, 2)
    assert static.sonar.quality_gate == "ERROR"
    assert not static.ok
    assert static.lint_errors is not None
    assert static.lint_errors >= 2


def test_without_end_to_end_tests_none_has_passed(rough: tuple[Path, WorkspaceReport]) -> None:
    e2e = rough[1].e2e

    assert (e2e.ok, e2e.passed, e2e.failed) == (False, 0, 0)
    reasons = score_report(load_config().rigor["L1"], "L1", rough[1]).reasons
    assert "e2e: none, no tests ran: 0 of 100 points" in reasons


def test_outside_git_there_is_no_commit(rough: tuple[Path, WorkspaceReport]) -> None:
    assert rough[1].commit == ""


@pytest.mark.parametrize(
    ("requires", "builds"),
    [
        ("'setuptools>=61'", True),
        ("'setuptools>=61', 'no-such-package>=1; python_version<\"3\"'", True),
        ("'setuptools>=61', 'no-such-package[extra]>=1'", False),
        ("'setuptools>=61,<61.1'", False),
        ("'not a requirement'", False),
    ],
)
def test_a_wheel_is_made_if_the_packages_for_it_are_installed(
    requires: str, builds: bool, tmp_path: Path
) -> None:
    """The wheel cannot be made: a build that succeeds has made none."""
    project = write(
        tmp_path,
        {
            "shop.py": "ONE = 1\n",
            "tests/test_shop.py": "def test_one():\n    assert 1\n",
            "pyproject.toml": (
                "[project]\nname = 'shop'\nversion = 'not a version'\n"
                f"[build-system]\nrequires = [{requires}]\n"
                "build-backend = 'setuptools.build_meta'\n"
            ),
        },
    )

    assert measure(project, print).build.ok is not builds


def test_a_wheel_that_cannot_be_made_fails_the_build(tmp_path: Path) -> None:
    steps: list[str] = []
    project = write(
        tmp_path,
        {
            "shop.py": "ONE = 1\n",
            "tests/test_shop.py": "import shop\n\n\ndef test_one():\n    assert shop.ONE == 1\n",
            "pyproject.toml": (
                "[project]\nname = 'shop'\nversion = 'not a version'\n"
                "[build-system]\nrequires = ['setuptools>=61']\n"
                "build-backend = 'setuptools.build_meta'\n"
            ),
        },
    )
    git(project, "init", "-q")
    git(project, "add", "shop.py")
    git(project, "commit", "-qm", "Only a part of it")

    report = measure(project, steps.append)

    assert not report.build.ok
    assert any("build failed: " in step for step in steps)
    assert report.unit.ok
    assert report.unit.coverage == 100
    assert report.commit == git(project, "rev-parse", "HEAD") + "-dirty"


# --- settings and files that must not change the result -------------------------------------------


TESTED = {
    "shop.py": "ONE = 1\n",
    "tests/test_shop.py": "import shop\n\n\ndef test_one():\n    assert shop.ONE == 1\n",
}


@pytest.mark.parametrize(
    "settings",
    [
        "[tool.pytest.ini_options]\naddopts = '--no-such-option -k nothing'\n",
        "[tool.pytest.ini_options]\naddopts = '--cov-fail-under=101'\n",
        "[tool.pytest.ini_options]\naddopts = '-n auto'\n",
        "[tool.coverage.report]\nfail_under = 101\n[tool.coverage.run]\nomit = ['shop.py']\n",
        "[tool.ruff]\nrequired-version = '==0.0.1'\n",
        "[tool.ruff.lint]\nselect = ['NOSUCHRULE']\n",
        "\ufeff[project]\nname = 'shop'\n",
    ],
)
def test_a_project_s_settings_neither_prevent_nor_distort_its_measurement(
    tmp_path: Path, settings: str
) -> None:
    write(tmp_path, TESTED | {"pyproject.toml": settings})

    report = measure(tmp_path, quietly)

    assert (report.unit.ok, report.unit.passed, report.unit.coverage) == (True, 1, 100)
    assert report.static.lint_errors == 0
    assert (tmp_path / "pyproject.toml").read_text("utf-8") == settings


@pytest.mark.parametrize(
    "options", ["'-n auto --import-mode=importlib'", "['--import-mode=importlib']"]
)
def test_tests_of_one_name_are_found_where_the_project_imports_them_apart(
    tmp_path: Path, options: str
) -> None:
    test = TESTED["tests/test_shop.py"]
    settings = f"[tool.pytest.ini_options]\naddopts = {options}\n"
    write(tmp_path, TESTED | {"tests/more/test_shop.py": test, "pyproject.toml": settings})

    unit = measure(tmp_path, quietly).unit

    assert (unit.ok, unit.passed) == (True, 2)


def test_a_project_s_rules_hold_whatever_ruff_it_requires(tmp_path: Path) -> None:
    settings = "[tool.ruff]\nrequired-version = '==0.0.1'\nlint.select = ['T20']\n"
    write(tmp_path, TESTED | {"shop.py": "ONE = 1\nprint(ONE)\n", "pyproject.toml": settings})

    assert measure(tmp_path, quietly).static.lint_errors == 1


def test_settings_behind_a_link_stay_as_they_are(tmp_path: Path) -> None:
    settings = "\ufeff[tool.ruff]\nrequired-version = '==0.0.1'\n"
    shared = write(tmp_path, TESTED | {"shared.toml": settings}) / "shared.toml"
    (tmp_path / "ruff.toml").symlink_to("shared.toml")

    assert measure(tmp_path, quietly).unit.ok
    assert shared.read_text("utf-8") == settings


def test_packages_named_as_builds_are_code_and_are_linted(tmp_path: Path) -> None:
    """Only at the top level, build and dist hold build output and are left out."""
    unsafe = "import subprocess\n\nsubprocess.run('ls', shell=True)\n"
    write(
        tmp_path,
        {
            ".gitignore": "build/\n",
            "build/left.py": unsafe,
            "dist/left.py": unsafe,
            "src/shop/__init__.py": "",
            "src/shop/build/__init__.py": "ONE = 1\n",
            "src/shop/dist/__init__.py": unsafe,
            "tests/test_shop.py": (
                "from shop.build import ONE\n\n\ndef test_one():\n    assert ONE == 1\n"
            ),
        },
    )

    report = measure(tmp_path, quietly)

    assert (report.unit.ok, report.unit.passed) == (True, 1)
    assert report.static.sonar.new_critical == 1


def test_sockets_and_fifos_are_not_copied(tmp_path: Path) -> None:
    write(tmp_path, TESTED)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(tmp_path, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/socket")  # a short path, within the limit for sockets
        os.close(folder)

        assert measure(tmp_path, quietly).unit.ok


# --- reasons for failures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "why"),
    [
        (
            "def test_a():\n    pass\n\n\ndef test_b():\n    assert 1 == 2, 'not one'\n",
            "tests.test_shop::test_b: AssertionError: not one",
        ),
        ("import nothing_here\n", "No module named 'nothing_here'"),
        ("def test_a(:\n", "SyntaxError: invalid syntax"),
    ],
)
def test_a_failed_unit_run_gives_the_reason(tmp_path: Path, test: str, why: str) -> None:
    steps: list[str] = []
    write(tmp_path, TESTED | {"tests/test_shop.py": test})

    report = measure(tmp_path, steps.append)

    assert not report.unit.ok
    assert why in report.unit.why
    assert f"unit tests failed: {report.unit.why}" in steps
    [reason] = score_report(load_config().rigor["L0"], "L0", report).reasons
    assert reason.startswith(f"unit: failed ({report.unit.why})")


# --- projects that cannot be measured -------------------------------------------------------------


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CannotMeasure, match="nowhere: no such directory"):
        measure(tmp_path / "nowhere", quietly)


def test_a_directory_without_code_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"README.md": "# Nothing", "tests/test_it.py": "def test_it(): pass\n"})

    with pytest.raises(CannotMeasure, match="no Python code; put it in src/"):
        measure(tmp_path, quietly)


def test_a_project_without_unit_tests_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"shop.py": "ONE = 1\n", "e2e/test_it.py": "def test_it(): pass\n"})

    with pytest.raises(CannotMeasure, match="no unit tests; put them in tests/"):
        measure(tmp_path, quietly)


def test_a_pyproject_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"shop.py": "ONE = 1\n", "pyproject.toml": "[project\n"})

    with pytest.raises(CannotMeasure, match=r"pyproject\.toml: .*line 1"):
        measure(tmp_path, quietly)


def test_a_run_that_pytest_refuses_gives_the_reason(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "shop.py": "ONE = 1\n",
            "tests/test_shop.py": "def test_it(): pass\n",
            "pytest.ini": "[pytest]\nrequired_plugins = no-such-option\n",
        },
    )

    with pytest.raises(CannotMeasure, match=r"unit tests: exit code .*no-such-option"):
        measure(tmp_path, quietly)


def test_tests_that_hang_are_ended_with_what_they_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = f"600.{os.getpid()}"
    write(
        tmp_path,
        {
            "shop.py": "ONE = 1\n",
            "tests/test_shop.py": (
                "import subprocess\n\n\n"
                "def test_it():\n"
                f"    subprocess.run(['sleep', '{seconds}'])\n"
            ),
        },
    )
    # Longer than pytest needs to start on a busy machine; the test would run for ten minutes.
    limits = measuring.LIMITS.model_copy(update={"seconds": 15})
    monkeypatch.setattr(measuring, "LIMITS", limits)

    with pytest.raises(CannotMeasure, match="unit tests: ran for more than 15 s"):
        measure(tmp_path, quietly)

    running = psutil.process_iter(["cmdline"])
    assert not [process for process in running if seconds in (process.info["cmdline"] or [])]


def test_a_folder_with_the_temporary_files_in_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of it would contain itself, without an end."""
    within = tmp_path / "tmp"
    within.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(within))

    with pytest.raises(CannotMeasure, match="has the folder for temporary files in it"):
        measure(tmp_path, quietly)

    assert list(within.iterdir()) == []


def test_of_files_that_cannot_be_copied_the_first_is_named(tmp_path: Path) -> None:
    for number in range(3):
        folder = os.open(tmp_path, os.O_RDONLY)
        for name in (f"{number}", *["x" * 250] * 17):  # one at a time: a whole path has a limit
            os.mkdir(name, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = inner
        os.close(folder)

    with pytest.raises(CannotMeasure) as raised:
        measure(tmp_path, quietly)

    subprocess.run(["rm", "-r", *(f"{tmp_path}/{number}" for number in range(3))], check=True)
    assert "cannot be copied: " in str(raised.value)
    assert "and 2 more files" in str(raised.value)
    assert len(str(raised.value)) < 1_000
