"""The tasks of `fleet eval`: rows of SWE-bench, and the repositories that they name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError
from temporalio.exceptions import ApplicationError

from activities.workspace.repositories import IMPORTED
from activities.workspace.stores import Stores
from workers.cli.session import CommandError
from workflows.models.base import Model, content_hash
from workflows.models.errors import invalid_input
from workflows.models.evaluation import (
    TEST_PATCH_CHARACTERS,
    EvaluationTask,
    InstanceId,
    TestName,
)
from workflows.models.workspace import Commit, Repository

PROBLEMS_SHOWN = 10

_NOT_WORD = re.compile(r"[^a-z0-9]+")


def _names(value: Any) -> Any:
    """Read a list of tests, which SWE-bench writes as JSON in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError('must be a list of tests, or one in a string: ["tests/..."]') from None


TestNames = Annotated[list[TestName], BeforeValidator(_names)]


class TaskRow(Model):
    """A row of SWE-bench; its other columns are not read."""

    instance_id: InstanceId
    repo: str = Field(min_length=1, max_length=4_000)
    base_commit: Commit
    problem_statement: str = Field(min_length=1)
    fail_to_pass: TestNames = Field(alias="FAIL_TO_PASS", min_length=1)
    pass_to_pass: TestNames = Field([], alias="PASS_TO_PASS")
    test_patch: str = Field("", max_length=TEST_PATCH_CHARACTERS)

    def task(self) -> EvaluationTask:
        """Return what is evaluated.

        Raises:
            ValidationError: a field is over its limit.
        """
        names = ("instance_id", "problem_statement", "fail_to_pass", "pass_to_pass", "test_patch")
        return EvaluationTask(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class LocatedTask:
    """A task, and where its row is. `place`: the file with the line, for messages."""

    place: str
    row: TaskRow
    task: EvaluationTask


def read_tasks(file: Path) -> list[LocatedTask]:
    """Read a file of tasks.

    Raises:
        CommandError: the file or rows of it cannot be used: line, field, rule and remedy of each.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"FILE: {error}; give a file of tasks in UTF-8") from None
    tasks: dict[str, LocatedTask] = {}
    problems: list[str] = []
    for place, value in _rows(file, text):
        try:
            row = TaskRow.model_validate(value)
            found = LocatedTask(place, row, row.task())
        except ValidationError as error:
            problems += [f"{place}: {field}: {_rule(field, rule)}" for field, rule in _each(error)]
            continue
        if other := tasks.get(row.instance_id):
            problems.append(
                f"{place}: instance_id: {row.instance_id} is also in {other.place}; give each "
                "task another one"
            )
        tasks.setdefault(row.instance_id, found)
    _refuse(problems)
    if not tasks:
        raise CommandError(f"FILE: {file} has no tasks; give one JSON object in each line")
    return list(tasks.values())


def _rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place: of a JSON list its number, else its line."""
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise CommandError(f"{file}: is not JSON ({error}); correct it") from None
        yield from ((f"{file.name}, task {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{file.name}:{number}", json.loads(line)
            except ValueError as error:
                raise CommandError(
                    f"{file.name}:{number}: is not JSON ({error}); write one object in a line"
                ) from None


def _each(error: ValidationError) -> list[tuple[str, str]]:
    return invalid_input("task", error).problems


def _rule(field: str, rule: str) -> str:
    if field == "base_commit":
        return "must be the id of a commit, in full: 40 hex digits"
    return rule.removeprefix("Value error, ")


def _refuse(problems: list[str]) -> None:
    if problems:
        more = len(problems) - PROBLEMS_SHOWN
        shown = [*problems[:PROBLEMS_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise CommandError("\n".join(shown))


# --- repositories ---------------------------------------------------------------------------------


def find_repositories(
    tasks: list[LocatedTask], known: Mapping[str, Repository], folder: Path
) -> dict[str, Repository]:
    """Return the repository that each `repo` names: an entry, or a git repository of this machine.

    Args:
        tasks: with `repo` as a key, as SWE-bench's owner/name, or as a path.
        known: key -> entry of repositories.yaml.
        folder: what relative paths begin at.

    Raises:
        CommandError: the repository does not exist.
    """
    found: dict[str, Repository] = {}
    problems: list[str] = []
    for each in tasks:
        repo = each.row.repo
        if repo in found:
            continue
        entry = known.get(repo) or known.get(entry_key(repo)) or _local(folder / repo)
        if entry:
            found[repo] = entry
        else:
            names = ", ".join(sorted(known)) or "none"
            problems.append(
                f"{each.place}: repo: {repo[:200]!r} is not in repositories.yaml (it has: {names}) "
                f"and not a folder with a git repository; add the entry {entry_key(repo)}, or give "
                "a path"
            )
    _refuse(problems)
    return found


def entry_key(repo: str) -> str:
    """Return the key of the entry for a `repo` such as owner/name: owner__name."""
    parts = [_NOT_WORD.sub("-", part.lower()).strip("-") for part in repo.strip("/").split("/")]
    return "__".join(filter(None, parts))[:63]


def _local(path: Path) -> Repository | None:
    """Return the entry of a git repository on this machine; None if it is not one."""
    place = path.resolve()
    if not any((place / name).exists() for name in (".git", "HEAD")):
        return None
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    name = _NOT_WORD.sub("-", place.name.removesuffix(".git").lower()).strip("-")[:30]
    return Repository(key=f"{IMPORTED}{name}-{digest}".replace("--", "-"), url=place.as_uri())


async def import_repositories(
    tasks: list[LocatedTask], repositories: Mapping[str, Repository], stores: Stores
) -> None:
    """Put the base commits of repositories on this machine into the store, for the workers.

    Raises:
        CommandError: a commit is missing.
        ApplicationError: the store cannot be used.
    """
    for repo, entry in repositories.items():
        if not entry.key.startswith(IMPORTED):
            continue
        commits = sorted({each.row.base_commit for each in tasks if each.row.repo == repo})
        try:
            await stores.import_commits(entry, commits)
        except ApplicationError as error:
            raise CommandError(
                f"repo: the base commits of {repo} cannot be put into the store: {error.message}"
            ) from None


def default_run(file: Path, tasks: list[LocatedTask], *limits: object) -> str:
    """Return the name of a run: the same for the same tasks with the same limits."""
    stem = _NOT_WORD.sub("-", file.stem.lower()).strip("-")[:40] or "tasks"
    content = [each.row.model_dump(mode="json") for each in tasks]
    return f"{stem}-{content_hash([content, [str(each) for each in limits]])[:8]}"
