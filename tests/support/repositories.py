"""A git repository of a small project, and a configuration folder that names it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import yaml

from workers.environment import ROOT

PROJECT = {
    "README.md": "# Adder\n\nAdds numbers.\n",
    ".gitignore": "__pycache__/\n.pytest_cache/\n",
    "adder/__init__.py": "def add(left: int, right: int) -> int:\n    return left - right\n",
    "tests/test_adder.py": (
        "from adder import add\n\n\ndef test_it_adds() -> None:\n    assert add(2, 3) == 5\n"
    ),
}
"""The files of a project whose only test fails."""


def make_repository(folder: Path, files: dict[str, str] | None = None) -> str:
    """Make a repository with one commit on `main`, always the same one; return its URL."""
    for path, text in (files or PROJECT).items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    at = "2026-03-01T10:00:00+00:00"
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "ana"), ("EMAIL", "ana@example.org"), ("DATE", at))
    }
    for arguments in (
        ["init", "--quiet", "--initial-branch", "main"],
        ["add", "--all"],
        ["commit", "--quiet", "--message", "Add the adder"],
    ):
        subprocess.run(
            ["git", *arguments],
            cwd=folder,
            check=True,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **identity},
        )
    return f"file://{folder}"


def config_with(folder: Path, **entries: Mapping[str, object]) -> Path:
    """Copy deploy/config, with these entries as its repositories; return the copy."""
    shutil.copytree(ROOT / "deploy" / "config", folder)
    (folder / "repositories.yaml").write_text(yaml.safe_dump({"repositories": {**entries}}))
    return folder


def in_store(store: Path, *arguments: str) -> str:
    """Return what git says about a bare repository."""
    done = subprocess.run(
        ["git", "--git-dir", str(store), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"},
    )
    return done.stdout.strip()
