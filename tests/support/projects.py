"""Projects in git for the tests of workspaces, made with plain git."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workflows.models.workspace import Repository

FILES = {
    "README.md": "# Sample\n\nA project.\n",
    "src/app.py": "def answer() -> int:\n    return 42\n",
    "tests/test_app.py": "def test_answer() -> None:\n    assert True\n",
}


def plain_git(*args: str, cwd: Path, stdin: bytes = b"") -> str:
    """Run git as a person would and return what it prints."""
    env = {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "Ada",
        "GIT_AUTHOR_EMAIL": "ada@example.org",
        "GIT_COMMITTER_NAME": "Ada",
        "GIT_COMMITTER_EMAIL": "ada@example.org",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "protocol.file.allow",
        "GIT_CONFIG_VALUE_0": "always",
    }
    done = subprocess.run(
        ["git", *args], cwd=cwd, env=env, input=stdin, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace").strip()


@dataclass(frozen=True)
class Project:
    """A project's repository: a bare one, and a person's clone of it."""

    url: str
    bare: Path
    clone: Path

    def entry(self, **fields: object) -> Repository:
        return Repository.model_validate({"key": "sample", "url": self.url} | fields)

    def commit(self, files: Mapping[str, str | bytes | None], message: str = "Change") -> str:
        """Commit files (None: delete) on the base as a person, push, and return the commit."""
        for name, content in files.items():
            file = self.clone / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        plain_git("add", "--all", "--force", cwd=self.clone)
        plain_git("commit", "--quiet", "--allow-empty", "-m", message, cwd=self.clone)
        plain_git("push", "--quiet", "origin", "HEAD:main", cwd=self.clone)
        return plain_git("rev-parse", "HEAD", cwd=self.clone)


def make_project(folder: Path) -> Project:
    """Make a project with one commit of FILES."""
    bare, clone = folder / "project.git", folder / "clone"
    plain_git("init", "--quiet", "--bare", "-b", "main", str(bare), cwd=folder)
    plain_git("clone", "--quiet", str(bare), str(clone), cwd=folder)
    plain_git("checkout", "--quiet", "-B", "main", cwd=clone)
    project = Project(bare.as_uri(), bare, clone)
    project.commit(FILES, "Begin")
    return project


def copy_project(project: Project, folder: Path) -> Project:
    """Copy a project with both its repositories, which is faster than making one."""
    bare = Path(shutil.copytree(project.bare, folder / project.bare.name))
    clone = Path(shutil.copytree(project.clone, folder / project.clone.name))
    config = clone / ".git" / "config"
    config.write_text(config.read_text().replace(str(project.bare), str(bare)))
    return Project(bare.as_uri(), bare, clone)
