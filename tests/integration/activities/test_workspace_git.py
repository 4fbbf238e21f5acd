"""git executes nothing that a repository, a URL or a user's configuration says.

Each trap is first sprung with plain git, so that a trap that no longer works is noticed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from activities.workspace.git import GitFailed, OutputTooLong, git


def plain(*args: str, cwd: Path, home: Path | None = None, **more: str) -> str:
    """Run git as a person would; its exit status does not matter."""
    identity = {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@example.org"}
    identity |= {"GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@example.org"}
    env = {"PATH": os.environ["PATH"], "HOME": str(home or cwd)} | identity | more
    return subprocess.run(
        ["git", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=30, check=False
    ).stdout.strip()


@dataclass
class Trap:
    """A repository with two commits whose `program` leaves `marker` if it is executed."""

    repository: Path
    program: Path
    marker: Path

    def config(self, key: str, value: str) -> None:
        plain("config", key, value, cwd=self.repository)

    @property
    def sprung(self) -> bool:
        found = self.marker.exists()
        self.marker.unlink(missing_ok=True)
        return found


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    repository = tmp_path / "repository"
    repository.mkdir()
    marker = tmp_path / "marker"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    program.chmod(0o755)
    plain("init", "-q", "-b", "main", cwd=repository)
    for text in ("one\n", "two\n"):
        (repository / "a.txt").write_text(text)
        plain("add", "-A", cwd=repository)
        plain("commit", "-q", "-m", text, cwd=repository)
    return Trap(repository, program, marker)


def hook(trap: Trap) -> list[str]:
    hooks = trap.repository / ".git" / "hooks" / "reference-transaction"
    hooks.parent.mkdir(exist_ok=True)
    hooks.symlink_to(trap.program)
    return ["update-ref", "refs/heads/other", "HEAD"]


def hooks_path(trap: Trap) -> list[str]:
    folder = trap.repository / "my-hooks"
    folder.mkdir()
    (folder / "reference-transaction").symlink_to(trap.program)
    trap.config("core.hooksPath", str(folder))
    return ["update-ref", "refs/heads/other", "HEAD"]


def included(trap: Trap) -> list[str]:
    words = hooks_path(trap)
    trap.config("core.hooksPath", "/dev/null")
    more = trap.repository / "more.config"
    more.write_text(f"[core]\n\thooksPath = {trap.repository / 'my-hooks'}\n")
    trap.config("include.path", str(more))
    return words


def monitor(trap: Trap) -> list[str]:
    trap.config("core.fsmonitor", str(trap.program))
    return ["status"]


def external_diff(trap: Trap) -> list[str]:
    trap.config("diff.external", str(trap.program))
    return ["diff", "HEAD~1", "HEAD"]


def ssh_command(trap: Trap) -> list[str]:
    trap.config("core.sshCommand", str(trap.program))
    return ["ls-remote", "ssh://localhost:1/x"]


def helper_url(trap: Trap) -> list[str]:
    return ["-c", "protocol.ext.allow=always", "ls-remote", f"ext::{trap.program}"]


def rewritten_url(trap: Trap) -> list[str]:
    trap.config("protocol.ext.allow", "always")
    trap.config(f"url.ext::{trap.program} .insteadOf", "https://example.org/")
    return ["ls-remote", "https://example.org/x"]


def alternates(trap: Trap) -> list[str]:
    other = trap.repository.parent / "other.git"
    plain("clone", "-q", "--bare", str(trap.repository), str(other), cwd=trap.repository)
    info = trap.repository / ".git" / "objects" / "info" / "alternates"
    info.write_text(f"{other / 'objects'}\n")
    trap.config("core.alternateRefsCommand", str(trap.program))
    (trap.repository / "b.txt").write_text("new")
    plain("add", "-A", cwd=other.parent)
    plain("commit", "-q", "--allow-empty", "-m", "three", cwd=trap.repository)
    return ["fetch", "-q", "--refetch", str(other), "main:refs/heads/copy"]


def signature(trap: Trap) -> list[str]:
    trap.config("gpg.program", str(trap.program))
    trap.config("commit.gpgSign", "true")
    return ["commit", "--allow-empty", "-m", "x"]


TRAPS: list[Callable[[Trap], list[str]]] = [
    hook,
    hooks_path,
    included,
    monitor,
    external_diff,
    ssh_command,
    helper_url,
    rewritten_url,
    alternates,
    signature,
]


@pytest.mark.parametrize("spring", TRAPS, ids=lambda each: each.__name__)
async def test_a_trap_in_a_repository_is_not_sprung(
    spring: Callable[[Trap], list[str]], trap: Trap
) -> None:
    words = spring(trap)
    plain(*words, cwd=trap.repository)
    assert trap.sprung, "the trap does not work with plain git"

    for protocol in ("", "file", "https", "ssh"):
        with suppress(GitFailed):  # what it names is not executed, which may be an error
            await git(
                *words,
                git_dir=trap.repository / ".git",
                work_tree=trap.repository,
                protocol=protocol,
                seconds=20,
            )

    assert not trap.sprung


async def test_the_configuration_of_the_user_is_not_read(
    trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(f"[core]\n\tfsmonitor = {trap.program}\n")
    plain("status", cwd=trap.repository, home=home)
    assert trap.sprung
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(home / ".gitconfig"))
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", str(trap.program))
    monkeypatch.setenv("GIT_EXEC_PATH", str(tmp_path))

    await git("status", git_dir=trap.repository / ".git", work_tree=trap.repository)
    await git("diff", "--no-ext-diff", "HEAD~1", "HEAD", git_dir=trap.repository / ".git")

    assert not trap.sprung


async def test_a_long_answer_is_cut_and_git_is_ended(trap: Trap) -> None:
    endless = "\n".join(["HEAD:a.txt"] * 200_000).encode()

    with pytest.raises(OutputTooLong) as cut:
        await git(
            "cat-file", "--batch", git_dir=trap.repository / ".git", stdin=endless, limit_bytes=10
        )

    assert len(cut.value.output) == 10


async def test_a_command_that_waits_is_ended_at_its_time(trap: Trap, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    with pytest.raises(GitFailed) as late:
        await git("hash-object", str(pipe), git_dir=trap.repository / ".git", seconds=0.2)

    assert late.value.code == -signal.SIGKILL


async def test_a_failure_names_the_command_and_the_reason(trap: Trap) -> None:
    with pytest.raises(GitFailed, match=r"git cat-file failed \(128\)") as failure:
        await git("cat-file", "-p", "nothing", git_dir=trap.repository / ".git")

    assert "Not a valid object name" in failure.value.reason
