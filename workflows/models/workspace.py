"""Repositories that stories name, and what happens in a workspace made from one."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from workflows.models.base import Model, Rigor, Section
from workflows.models.ids import Id, LongId
from workflows.models.process import RigorLevel

Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
"""The id of a commit, in full."""

REPOSITORY_KEY = r"^[a-z0-9][a-z0-9_-]{0,62}$"
RepositoryKey = Annotated[str, StringConstraints(pattern=REPOSITORY_KEY)]
"""The name of an entry in repositories.yaml."""

Glob = Annotated[str, StringConstraints(min_length=1, max_length=400)]
"""A pattern of paths relative to the repository's root; `*` within a name, `**` across names."""

Command = Annotated[str, StringConstraints(max_length=4_000)]
"""A shell command of a repository; empty: not given."""


class Limits(Section):
    """The limits of an agent's work in a repository.

    Attributes:
        seconds: of one command, and of each measurement.
        memory_bytes: of a whole sandbox.
        processes: of a whole sandbox.
    """

    steps: int = Field(default=40, ge=1, le=1_000)
    seconds: int = Field(default=900, ge=1, le=86_400)
    memory_bytes: int = Field(default=2 * 1024**3, ge=64 * 1024**2)
    processes: int = Field(default=256, ge=8, le=32_768)


class Repository(Section):
    """An entry of repositories.yaml, as a story's history holds it.

    Attributes:
        image: the tool chain's name.
        open_paths: CI and git configuration that stories may change.
    """

    key: RepositoryKey
    url: str
    base: str = "main"
    push: bool = False
    image: str = "python"
    setup: Command = ""
    build: Command = ""
    unit: Command = ""
    e2e: Command = ""
    lint: Command = ""
    open_paths: list[Glob] = []
    test_paths: list[Glob] = [
        *("tests/**", "test/**", "**/test_*.py", "**/*_test.*", "**/*.test.*", "**/*.spec.*")
    ]
    docs_paths: list[Glob] = ["docs/**", "*.md", "**/*.md", "**/*.rst"]
    limits: Limits = Limits()


class Trailers(Model):
    """The trailers of an agent's commit. `step`: counts from 1."""

    story: Id
    task: LongId
    agent: str
    model: str = ""
    prompt_hash: str = ""
    step: int = Field(ge=1)


class ChangedFile(Model):
    """A file that a change touches.

    Attributes:
        path: bytes that are not UTF-8 are escaped, such as `caf\\xe9.txt`.
        old_path: the path before, of a renamed file.
        insertions: 0 for binary files, as are deletions.
        link: whether it is a symbolic link, or a submodule.
    """

    path: str
    old_path: str = ""
    status: Literal["added", "modified", "deleted", "renamed"]
    insertions: int = 0
    deletions: int = 0
    binary: bool = False
    link: bool = False


class Change(Model):
    """What a commit changes since its base."""

    commit: str
    base: str
    files: list[ChangedFile] = []
    insertions: int = 0
    deletions: int = 0


class RepositoryWork(Model):
    """What a council works on in a repository.

    Attributes:
        base: the commit that every agent starts from.
        paths: globs that may change; empty: everything but CI and git configuration.
        steps: of each agent; None for those of the repository.
        rigor: the level by which measurements are scored.
        level: its thresholds and weights, pinned; None: those that rigor.yaml has now.
        goal: the story's title, then its acceptance criteria.
    """

    repository: Repository
    story_id: Id
    base: Commit
    paths: list[Glob] = []
    steps: int | None = Field(default=None, ge=1, le=1_000)
    rigor: Rigor = "L1"
    level: RigorLevel | None = None
    goal: list[str] = []


class TreeFile(Model):
    """A file of a commit. `size`: in bytes; 0 for a submodule."""

    path: str
    size: int
    kind: Literal["file", "link", "submodule"] = "file"


class LoggedCommit(Model):
    """A commit of a branch, with the trailers that the fleet wrote into it."""

    commit: Commit
    author: str
    at: datetime
    subject: str
    trailers: dict[str, str] = {}


class BlamedLine(Model):
    """A line of a file, and the commit that it comes from."""

    line: int
    text: str
    path: str
    origin: LoggedCommit


class Merged(Model):
    """A merge that took place. `commit`: the head of the story's branch."""

    commit: Commit


class Conflict(Model):
    """A merge that needs its author. `head`: of the story's branch, which stays as it is."""

    head: Commit
    files: list[str]


class CommandRun(Model):
    """A command that ran in a sandbox.

    Attributes:
        exit_code: None if it was stopped at a limit, which `stopped` then names.
        output: the start and end of stdout and stderr together, at most 8 KiB.
    """

    command: str
    exit_code: int | None = None
    stopped: str = ""
    seconds: float = 0.0
    output: str = ""

    @property
    def ok(self) -> bool:
        return self.exit_code == 0
