"""`fleet eval`: tasks whose solution is known by their tests, in several configurations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from activities.workspace.repositories import load_repositories
from workers.cli import eval_report, render
from workers.cli.eval_runs import FAILED, evaluate_all
from workers.cli.eval_tasks import (
    LocatedTask,
    default_run,
    find_repositories,
    import_repositories,
    read_tasks,
)
from workers.cli.session import CommandError, err, out, progress_bar, run, temporal
from workers.clients.stores import stores_of
from workers.settings import load, variables
from workflows.models.evaluation import (
    RUN_CHARACTERS,
    Configuration,
    EvaluationInput,
    EvaluationResult,
    parse_configuration,
)
from workflows.models.workspace import Repository

app = typer.Typer(add_completion=False)


@app.command(
    "eval",
    epilog="Examples:  fleet eval tasks.jsonl  ·  fleet eval tasks.jsonl --config one "
    "--config best-of:3 --config council:3x2 --json results.json",
)
def evaluate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Tasks as SWE-bench has them: JSONL or JSON.")
    ],
    config: Annotated[
        list[str] | None,
        typer.Option(
            "--config",
            "-c",
            metavar="CONFIG",
            help="one, best-of:N, or council:NxR for N agents and R rounds; repeat it.",
            show_default="one",
        ),
    ] = None,
    run_name: Annotated[
        str,
        typer.Option(
            "--run",
            metavar="NAME",
            help="A run goes on under its name; another name evaluates again.",
            show_default="made from the tasks and limits",
        ),
    ] = "",
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="How many run at once.")] = 2,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many tasks, from the first on.")
    ] = None,
    role: Annotated[str, typer.Option(help="Whose council works.")] = "DEV",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1_000, help="Of each agent.", show_default="the repository's"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=86_400, help="That the agents have for a task.")
    ] = 3_600,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Where all that repeats the run is written."),
    ] = None,
) -> None:
    """Let agents solve tasks, and print how many each configuration resolves.

    Each task runs as a workflow. The same command again goes on where it was stopped. Ctrl-C
    cancels what it started. Exit code 1 if an evaluation failed.
    """

    async def work() -> None:
        settings = load()
        configurations = _configurations(config or ["one"])
        _require_place(json_file)
        tasks = read_tasks(file)[:limit]
        known = load_repositories(settings.fleet_config / "repositories.yaml", variables())
        repositories = find_repositories(tasks, known, file.resolve().parent)
        name = run_name or default_run(file, tasks, role, steps, seconds)
        inputs = [
            _input(name, each, configuration, repositories[each.row.repo], role, seconds, steps)
            for configuration in configurations
            for each in tasks
        ]
        await import_repositories(tasks, repositories, stores_of(settings))
        err.print(render.text(f"run {name}: {len(inputs)} evaluations"), soft_wrap=True)
        async with temporal(settings) as client:
            with progress_bar() as progress:
                bar = progress.add_task("evaluating", total=len(inputs))

                def show(result: EvaluationResult) -> None:
                    err.print(render.text(eval_report.line(result)), soft_wrap=True)
                    progress.advance(bar)

                results = await evaluate_all(client, inputs, jobs, show)
        made = eval_report.document(name, file, settings.fleet_config, inputs, results)
        if json_file:
            try:
                json_file.write_text(made.model_dump_json(indent=1) + "\n")
            except OSError as error:
                raise CommandError(f"--json: {error}; the same command writes it again") from None
        out.print(eval_report.table(made.summary))
        _require_evaluated(results)

    run(work())


def _require_place(file: Path | None) -> None:
    """Refuse a file that cannot be written before the evaluations, which take hours."""
    if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise CommandError(f"--json: {file} cannot be written; name a file in a folder that exists")


def _configurations(names: list[str]) -> list[Configuration]:
    try:
        return [parse_configuration(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise CommandError(f"--config: {error}") from None


def _input(
    name: str,
    task: LocatedTask,
    configuration: Configuration,
    repository: Repository,
    role: str,
    seconds: float,
    steps: int | None,
) -> EvaluationInput:
    if len(name) > RUN_CHARACTERS:
        raise CommandError(f"--run: {name[:80]} is longer than {RUN_CHARACTERS} characters; cut it")
    return EvaluationInput(
        run=name,
        task=task.task,
        configuration=configuration,
        repository=repository,
        base=task.row.base_commit,
        role=role,
        seconds=seconds,
        steps=steps,
    )


def _require_evaluated(results: list[EvaluationResult]) -> None:
    """Refuse a run with tasks of which it is not known what the agents make of them."""
    failed = [each for each in results if each.ended_by == FAILED]
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(results)} evaluations failed, the first: "
            f"{failed[0].instance_id}, {failed[0].configuration}: {failed[0].error}. The same "
            "command evaluates them again"
        )
