"""repositories.yaml: the repositories that stories name, and whether they can be reached."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import structlog
from pydantic import BeforeValidator, Field, field_validator, model_validator

from activities.config import InvalidConfig, read_config
from activities.workspace.errors import REMOTE, store_errors
from activities.workspace.git import git
from activities.workspace.transports import transport
from workflows.models.base import Section
from workflows.models.errors import ErrorType, application_error
from workflows.models.workspace import Command, Glob, Limits, Repository, RepositoryKey
from workflows.rules.paths import glob_problem
from workflows.rules.repository_urls import url_problem

log = structlog.stdlib.get_logger(__name__)

IMPORTED = "local-"
"""The start of the keys of repositories that `fleet eval` imports into the store from a folder."""

_VARIABLE = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")
"""A variable in a URL."""

_SIZE = re.compile(r"([0-9]+) ?(KiB|MiB|GiB|TiB)?")
_UNITS = {"": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}

_BRANCH = re.compile(
    r"(?!-)(?!.*(\.\.|//|@\{|/\.|\.lock(/|$)))[^\x00-\x20\x7f~^:?*\[\\./][^\x00-\x20\x7f~^:?*\[\\]*"
)
"""git check-ref-format, and no leading dot, slash or hyphen."""


def _bytes(value: Any) -> Any:
    """Read a size such as `2GiB`."""
    found = _SIZE.fullmatch(str(value)) if not isinstance(value, bool) else None
    if not found:
        raise ValueError(f"{value!r} is not a size; write a number and KiB, MiB or GiB: 2GiB")
    return int(found[1]) * _UNITS[found[2] or ""]


class ConfiguredLimits(Section):
    """The limits of an entry, as the file has them; see workflows.models.workspace.Limits."""

    steps: int = Limits().steps
    seconds: int = Limits().seconds
    memory: Annotated[int, BeforeValidator(_bytes)] = Limits().memory_bytes
    processes: int = Limits().processes

    @model_validator(mode="after")
    def _within(self) -> ConfiguredLimits:
        self.limits()
        return self

    def limits(self) -> Limits:
        """Return them as a story's history holds them."""
        return Limits(
            steps=self.steps,
            seconds=self.seconds,
            memory_bytes=self.memory,
            processes=self.processes,
        )


class ConfiguredRepository(Section):
    """An entry of repositories.yaml; see workflows.models.workspace.Repository."""

    url: str
    base: str = "main"
    push: bool = Field(default=False, strict=True)
    image: str = "python"
    setup: Command = ""
    build: Command = ""
    unit: Command = ""
    e2e: Command = ""
    lint: Command = ""
    open_paths: list[Glob] | None = None
    test_paths: list[Glob] | None = None
    docs_paths: list[Glob] | None = None
    limits: ConfiguredLimits = ConfiguredLimits()

    @field_validator("url")
    @classmethod
    def _url(cls, url: str) -> str:
        problem = "" if _VARIABLE.search(url) else url_problem(url)
        if problem:
            raise ValueError(problem)
        return url

    @field_validator("base")
    @classmethod
    def _branch(cls, base: str) -> str:
        if not _BRANCH.fullmatch(base) or base.endswith((".", "/")):
            raise ValueError(f"{base!r} is not the name of a branch; write it without refs/heads/")
        if base.startswith(("story/", "refs/")):
            raise ValueError(f"{base!r} is a name that the fleet uses; name the project's branch")
        return base

    @field_validator("open_paths", "test_paths", "docs_paths")
    @classmethod
    def _globs(cls, globs: list[str] | None) -> list[str] | None:
        for pattern in globs or []:
            if problem := glob_problem(pattern):
                raise ValueError(f"{pattern!r}: {problem}")
        return globs

    def repository(self, key: str) -> Repository:
        """Return the entry as a story's history holds it."""
        fields = self.model_dump(exclude={"limits"}, exclude_none=True)
        return Repository(key=key, limits=self.limits.limits(), **fields)


class ConfiguredRepositories(Section):
    """repositories.yaml."""

    repositories: dict[RepositoryKey, ConfiguredRepository]

    @field_validator("repositories")
    @classmethod
    def _keys(cls, found: dict[str, ConfiguredRepository]) -> dict[str, ConfiguredRepository]:
        for key in found:
            if is_imported(key):
                raise ValueError(
                    f"{key}: {IMPORTED} begins the keys that `fleet eval` makes; rename it"
                )
        return found


def is_imported(key: str) -> bool:
    """Return whether a repository is in the store because `fleet eval` imported it."""
    return key.startswith(IMPORTED)


def load_repositories(
    file: Path, variables: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Repository]:
    """Read and check repositories.yaml.

    An entry whose URL names a variable that is unset is left out.

    Args:
        file: repositories.yaml.
        variables: what `${NAME}` in a URL stands for.

    Raises:
        ApplicationError: `InvalidConfig` with the file, the field and the rule.
    """
    try:
        found = read_config(file, ConfiguredRepositories).repositories
        used = {key: _in_use(file, key, entry, variables) for key, entry in found.items()}
    except InvalidConfig as error:
        raise error.final() from error
    return {key: entry.repository(key) for key, entry in used.items() if entry}


def repository_keys(file: Path) -> frozenset[str]:
    """Return the keys of all entries in repositories.yaml, whether they are in use or not.

    Raises:
        ApplicationError: `InvalidConfig` with the file, the field and the rule.
    """
    try:
        return frozenset(read_config(file, ConfiguredRepositories).repositories)
    except InvalidConfig as error:
        raise error.final() from error


def _in_use(
    file: Path, key: str, entry: ConfiguredRepository, variables: Mapping[str, str]
) -> ConfiguredRepository | None:
    """Put the variables into the URL of an entry; return None if one of them is unset."""
    unset = [name for name in _VARIABLE.findall(entry.url) if not variables.get(name)]
    if unset:
        log.info("repository is not in use", key=key, unset=unset)
        return None
    url = _VARIABLE.sub(lambda found: variables[found[1]], entry.url)
    if problem := url_problem(url):
        raise InvalidConfig(file, [f"repositories.{key}.url: {problem}"])
    return entry.model_copy(update={"url": url})


def find_repository(repositories: Mapping[str, Repository], key: str) -> Repository:
    """Return the entry that a story names.

    Raises:
        ApplicationError: `UnknownRepository`, with the keys that exist.
    """
    require_known(repositories, key)
    return repositories[key]


def require_known(keys: Collection[str], key: str) -> None:
    """Refuse a repository that has no entry.

    Raises:
        ApplicationError: `UnknownRepository`, with the keys that exist.
    """
    if key not in keys:
        known = ", ".join(sorted(keys)) or "none; add one"
        raise application_error(
            ErrorType.UNKNOWN_REPOSITORY,
            f"repository: not found: repositories.yaml has no {key!r}; it has: {known}",
        )


async def verify(repository: Repository, credentials: Path | None = None) -> None:
    """Check that a repository answers and has its base.

    Args:
        repository: the entry.
        credentials: the folder of the repositories' credentials; see transports.py.

    Raises:
        ApplicationError: `RepositoryAway`, which is retried; `BaseMissing`.
    """
    what = f"repository {repository.key}"
    with store_errors(REMOTE, what):
        way = transport(repository.url, repository.key, credentials)
        found = await git(
            "ls-remote",
            "--quiet",
            *way.fetch,
            "--",
            repository.url,
            f"refs/heads/{repository.base}",
            env=way.env,
            config=way.config,
            protocol=way.protocol,
            seconds=60,
        )
    if not found:
        message = f"{what}: base: it has no branch {repository.base!r}; correct `base`, or create"
        raise application_error(ErrorType.BASE_MISSING, f"{message} the branch")
