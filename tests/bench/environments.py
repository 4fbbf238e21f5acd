"""Environments for what the benchmark compares with, beside the fleet's own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.local.server import ROOT

UV = ROOT / ".fleet" / "setup" / "uv" / "bin" / "uv"
MADE = ROOT / ".fleet" / "bench"


def python_with(extra: str) -> Path | None:
    """Return the Python of an environment with only that extra, made once.

    Returns:
        None if it cannot be installed; uv's message is then printed.
    """
    place = MADE / extra.removeprefix("bench-")
    python = place / "bin" / "python"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = settings["project"]["optional-dependencies"][extra]
    marker = place / "installed"
    if marker.exists() and marker.read_text() == repr(wanted):
        return python
    making = [str(UV), "venv", "--quiet", "--clear", "--python", sys.executable, str(place)]
    installing = [str(UV), "pip", "install", "--quiet", "--python", str(python), *wanted]
    for command in (making, installing):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"  {done.stderr.strip()[-500:]}")
            return None
    marker.write_text(repr(wanted))
    return python
