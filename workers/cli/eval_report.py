"""The results of `fleet eval`: a table for people, and a document to repeat the run with."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from workers.cli import render
from workflows.models.base import Model
from workflows.models.evaluation import EvaluationInput, EvaluationResult

SEEDS = (
    "A call's seed is the first 31 bits of SHA-256 of `task_id/agent_id/wave/ask`: wave is the "
    "step of an implementation, ask counts from 1. Each line of `usage` has its last call's seed."
)

PACKAGES = ("swe-ai-fleet", "temporalio", "pydantic", "pytest", "ruff")


class Summary(Model):
    """The results of a configuration.

    Attributes:
        failed: tasks that no commit was evaluated for.
        seconds: of all tasks together, as are tokens and calls.
    """

    configuration: str
    tasks: int
    resolved: int
    failed: int
    tokens: int
    calls: int
    seconds: float


class EvaluationDocument(Model):
    """All that is needed to repeat a run.

    Attributes:
        versions: of the packages and Python of the command.
        configuration_files: each file of FLEET_CONFIG with the start of its SHA-256.
        models: that answered.
        prompt_hashes: of the last call of each act and agent.
        seeds: how the seeds of calls are made.
        inputs: of the workflows: tasks, base commits, repositories, configurations, limits.
    """

    run: str
    file: str
    file_sha256: str
    versions: dict[str, str]
    configuration_files: dict[str, str]
    models: list[str]
    prompt_hashes: list[str]
    seeds: str = SEEDS
    summary: list[Summary]
    results: list[EvaluationResult]
    inputs: list[EvaluationInput]


def summarised(results: Sequence[EvaluationResult]) -> list[Summary]:
    """Return a summary of each configuration, in the order of the results."""
    names = dict.fromkeys(each.configuration for each in results)
    return [
        _summary(name, [each for each in results if each.configuration == name]) for name in names
    ]


def _summary(name: str, results: Sequence[EvaluationResult]) -> Summary:
    return Summary(
        configuration=name,
        tasks=len(results),
        resolved=sum(each.resolved for each in results),
        failed=sum(each.evaluated is None for each in results),
        tokens=sum(each.tokens for each in results),
        calls=sum(each.calls for each in results),
        seconds=round(sum(each.seconds for each in results), 1),
    )


def table(summaries: Iterable[Summary]) -> Table:
    """Return the table of the configurations."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("configuration")
    for heading in ("resolved", "no change", "tokens", "calls", "seconds"):
        shown.add_column(heading, justify="right")
    for each in summaries:
        shown.add_row(
            each.configuration,
            f"{each.resolved} of {each.tasks}",
            str(each.failed),
            f"{each.tokens:,}",
            str(each.calls),
            f"{each.seconds:,.1f}",
        )
    return shown


def line(result: EvaluationResult) -> str:
    """Return what the progress shows of a result."""
    found = result.evaluated
    if found:
        to_pass, passing = found.fail_to_pass, found.pass_to_pass
        what = (
            f"{'resolved' if result.resolved else 'not resolved'}: {to_pass.passed} of "
            f"{to_pass.tests} to pass, {passing.passed} of {passing.tests} still pass"
        )
    else:
        what = f"not resolved: {render.plain(result.error[:300])}"
    return (
        f"{result.configuration}  {result.instance_id}  {what}  "
        f"({result.tokens:,} tokens, {result.calls} calls, {result.seconds:.1f} s)"
    )


def document(
    run: str,
    file: Path,
    config: Path,
    inputs: list[EvaluationInput],
    results: list[EvaluationResult],
) -> EvaluationDocument:
    """Return the document of a run.

    Args:
        run: its name.
        file: the tasks.
        config: the folder FLEET_CONFIG.
        inputs: of the workflows.
        results: in the same order.
    """
    calls = [call for each in results for call in each.usage]
    return EvaluationDocument(
        run=run,
        file=file.name,
        file_sha256=_sha256(file),
        versions=versions(),
        configuration_files={
            str(each.relative_to(config)): _sha256(each)[:16]
            for each in sorted(config.rglob("*"))
            if each.is_file()
        },
        models=sorted({call.model for call in calls if call.model}),
        prompt_hashes=sorted({call.prompt_hash for call in calls if call.prompt_hash}),
        summary=summarised(results),
        results=results,
        inputs=inputs,
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and PACKAGES, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
