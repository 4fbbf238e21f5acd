"""The sample project in git: `python3 -m deploy.local.sample`, which needs only Python and git.

Its repository always has the same commit for the same files: identity and dates are fixed, and
this machine's configuration of git is not read.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "deploy" / "examples" / "ratelimit"
REPOSITORY = ROOT / ".fleet" / "setup" / "sample.git"
PARTS = ("README.md", "pyproject.toml", "src", "tests")
"""What the repository has of the project's folder."""

BASE = "main"
AUTHOR = "The sample's team"
EMAIL = "team@sample.example"
AT = "2026-03-01T10:00:00+00:00"

IGNORED = "__pycache__/\n*.py[cod]\n.coverage\n.pytest_cache/\n.ruff_cache/\n*.egg-info/\nbuild/\n"


def files() -> Iterator[Path]:
    """Yield the files that the repository has, in order."""
    for part in (PROJECT / name for name in PARTS):
        found = sorted(part.rglob("*")) if part.is_dir() else [part]
        yield from (
            file
            for file in found
            if file.is_file() and not {"__pycache__", ".pytest_cache"} & {*file.parts}
        )


def fingerprint() -> str:
    """Return the text that changes with what the repository has."""
    return "\n".join(f"{file.relative_to(PROJECT)}\n{file.read_text()}" for file in files())


def make_repository(repository: Path = REPOSITORY) -> str:
    """Make the bare repository again, in one step; return the commit of its base.

    Raises:
        subprocess.CalledProcessError: git failed.
    """
    repository.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=repository.parent) as scratch:
        tree, made = Path(scratch, "tree"), Path(scratch, "made")
        for file in files():
            copy = tree / file.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        (tree / ".gitignore").write_text(IGNORED)
        _git(tree, "init", "--quiet", "--template=", f"--initial-branch={BASE}")
        _git(tree, "add", "--all")
        _git(tree, "commit", "--quiet", "--no-verify", "-m", "Limit each client's requests")
        _git(tree, "clone", "--quiet", "--bare", "--template=", str(tree), str(made))
        _git(made, "remote", "remove", "origin")
        commit = _git(made, "rev-parse", BASE).strip()
        shutil.rmtree(repository, ignore_errors=True)
        made.rename(repository)
    return commit


def _git(folder: Path, *arguments: str) -> str:
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", AUTHOR), ("EMAIL", EMAIL), ("DATE", AT))
    }
    return subprocess.run(
        ["git", "-c", "commit.gpgSign=false", *arguments],
        cwd=folder,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            **identity,
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    try:
        print(f"{BASE} is at {make_repository()}")
    except (OSError, subprocess.CalledProcessError) as failure:
        sys.exit(f"the sample's repository cannot be made: {failure}")
