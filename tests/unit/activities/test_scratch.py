"""Folders of measurements: what a killed process leaves behind is removed, and nothing else."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from activities.workspace.scratch import NEW_S, PREFIX, remove_left, scratch
from deploy.local.server import ROOT


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def aged(folder: Path) -> Path:
    """Make a folder look as if it was made long ago."""
    long_ago = time.time() - 2 * NEW_S
    os.utime(folder, (long_ago, long_ago))
    return folder


def test_the_folder_of_a_killed_process_is_removed(temporary: Path) -> None:
    held = "from activities.workspace.scratch import scratch; s = scratch(); "
    held += "f = s.__enter__(); (f / 'tree').mkdir(); print(f, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", held],
        env={**os.environ, "TMPDIR": str(temporary)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())

        assert remove_left() == []
        aged(folder)
        assert remove_left() == [], "its process runs"
        process.kill()
    assert folder.exists()

    assert remove_left() == [folder]
    assert not folder.exists()


def test_folders_that_are_used_new_or_not_of_a_measurement_stay(temporary: Path) -> None:
    (temporary / f"{PREFIX}new").mkdir()
    aged_other = temporary / "other"
    aged_other.mkdir()
    aged(aged_other)
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / f"{PREFIX}link").symlink_to(elsewhere)
    with scratch() as used:
        aged(used)

        assert remove_left() == []

        left = {path.name for path in temporary.iterdir()}
        assert left == {f"{PREFIX}new", "other", "elsewhere", f"{PREFIX}link", used.name}
    assert not used.exists()
