"""A wheel built from a clean checkout works in an empty environment, without any extra."""

import os
import shutil
import subprocess
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

from deploy.local import setup
from workers.environment import ROOT

UV = str(setup.INSTALLED / "uv" / "bin" / "uv")
LOCK = ROOT / "deploy" / "local" / "requirements" / "none.lock"

CONTRACTS = ("context", "orchestrator", "planning", "storycoach", "workspace")
PROCESSES = ("agents", "bridge", "context", "grpc", "inbox", "story", "workspace")

DATA = (
    "bridge/grpc/protos/context.proto",
    "bridge/py.typed",
    "deploy/config/agile.fsm.yaml",
    "deploy/config/prompts",
    "deploy/local/neo4j/FleetNeo4j.java",
    "deploy/local/neo4j/pom.xml",
    "deploy/local/requirements/cpu.lock",
    "deploy/examples/ratelimit/pyproject.toml",
    "deploy/examples/ratelimit/story.json",
    "deploy/examples/stories/readme.json",
    "deploy/examples/ratelimit/tests/unit/test_bucket.py",
)


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command without this checkout's modules; return its stdout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=inherited | setup._as_pip_would(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel, by way of an sdist, from the files that git knows or would add."""
    clean = tmp_path_factory.mktemp("clean")
    files = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clean / name)
    run([UV, "build", "-q", "--out-dir", "wheel", "."], clean)
    (built,) = (clean / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment; return the folder of its programs."""
    folder = tmp_path_factory.mktemp("empty")
    run([UV, "venv", "-q", "--python", setup.VENV / "bin" / "python", "venv"], folder)
    install = [UV, "pip", "install", "-q", "--python", "venv/bin/python", "-c", str(LOCK)]
    run([*install, wheel], folder)
    return folder / "venv" / "bin"


def test_the_wheel_has_the_data_that_the_code_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()

    missing = [data for data in DATA if not any(name.startswith(data) for name in names)]
    assert missing == []
    assert [name for name in names if name.startswith(("tests/", "docs/"))] == []


def test_the_command_line_runs_without_the_extras(installed: Path, tmp_path: Path) -> None:
    assert run([installed / "fleet", "--version"], tmp_path) == f"{version('swe-ai-fleet')}\n"
    assert "TEMPORAL_ADDRESS" in run([installed / "python", "-m", "workers", "settings"], tmp_path)


def refused(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a command that must fail; return the last line of its stderr."""
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended
    return ended.stderr.strip().splitlines()[-1]


def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    installed: Path, tmp_path: Path
) -> None:
    python = installed / "python"
    measure = (
        "import pathlib; from workers.cli.workspace_report import *; measure(pathlib.Path(), print)"
    )

    output = refused([python, "-m", "deploy.local", "status"], tmp_path)
    assert output.endswith("install the extra `local`: pip install 'swe-ai-fleet[local]'")
    output = refused([python, "-c", measure], tmp_path)
    assert output.endswith("install the extra `report`: pip install 'swe-ai-fleet[report]'")
    assert "pytest and pytest_cov not installed" in output


def test_the_contracts_the_processes_and_the_configuration_can_be_loaded(
    installed: Path, tmp_path: Path
) -> None:
    modules = [f"bridge.grpc.wire.{name}_pb2_grpc" for name in CONTRACTS]
    modules += [f"workers.processes.{name}" for name in PROCESSES]
    code = "\n".join(f"import {name}" for name in modules)
    code += "\nfrom activities.planning import CONFIG, load_config\nload_config(CONFIG)"

    run([installed / "python", "-c", code], tmp_path)
