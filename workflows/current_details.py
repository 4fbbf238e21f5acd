"""Details of workflows for the Web UI: Markdown, one builder for each.

Every text that comes from outside, from models or failures too, is in a code block or a code span.
The Web UI renders the rest: links, images and HTML in it would be live.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from workflows.models.acceptance import Acceptance
from workflows.models.agents import PlannedTask, Task
from workflows.models.branches import BranchView
from workflows.models.deliberation import DeliberationInput, Progress
from workflows.models.evaluation import EvaluationInput, EvaluationResult
from workflows.models.ids import story_workflow_id
from workflows.models.implementation import ImplementationProgress
from workflows.models.outbox import OutboxStuck
from workflows.models.story import Move, StoryView

MOVES_SHOWN = 8
FILES_SHOWN = 20
CRITERIA_SHOWN = 20


def fenced(text: str, limit: int = 600) -> str:
    """Return outside text as a code block that it cannot break out of."""
    cut = text if len(text) <= limit else f"{text[:limit]}…"
    return "```\n" + cut.replace("`", "'") + "\n```"


def code(text: object, limit: int = 300) -> str:
    """Return outside text as a code span of one line that it cannot break out of."""
    line = " ".join(str(text).split()).replace("`", "'")
    return f"`{line if len(line) <= limit else f'{line[:limit]}…'}`" if line else ""


def story_details(view: StoryView, moves: Sequence[Move]) -> str:
    """Render the state, the gate, who may open it, and the command for that."""
    lines = [
        f"**{code(view.state)}** · rigor {code(view.rigor)} · readiness {view.dor_score} · "
        f"{view.tokens_used} tokens",
        fenced(view.title),
    ]
    lines += branch_lines(view.branch)
    lines += acceptance_lines(view.acceptance)
    if view.pending_gate and view.branch and (note := view.branch.base_note(view.story_id)):
        lines += ["The base", fenced(note)]
    if view.report:
        lines += [f"Report {view.report.score}: {code(view.report.gating_decision)}"]
        lines += [f"- look at {code(note)}" for note in view.report.notes]
    if view.working_on:
        lines += ["Working on", fenced(view.working_on)]
    if view.pending_gate == "budget":
        lines += [
            f"**Gate `budget`** waits for {code(view.gate_role)}: "
            f"{view.tokens_used} of {view.token_budget} tokens are used.",
            _command(view, "raise_budget", {"tokens": 10000, "actor": "you", "role": "PO"}),
        ]
    elif view.pending_gate:
        request = {
            "gate": view.pending_gate,
            "actor": "you",
            "role": view.gate_role,
            "comment": "",
            "revision": view.revision,
        }
        lines += [
            f"**Gate {code(view.pending_gate)}** waits for {code(view.gate_role)}, revision "
            f"{code(view.revision)}.",
            _command(view, "approve", request),
        ]
    for finding in view.findings[:MOVES_SHOWN]:
        lines.append(f"- {code(finding.code)}: {code(finding.message)} (-{finding.weight})")
    if moves:
        lines += ["", "**What may happen now**"]
        lines += [
            f"- {code(move.event)} to {code(move.to)}, by {_listed(move.roles) or 'the fleet'}"
            + (f"; waits for {_listed(move.blocked_by)}" if move.blocked_by else "")
            for move in moves[:MOVES_SHOWN]
        ]
    return "\n".join(lines)


def branch_lines(branch: BranchView | None) -> list[str]:
    """Render the repository, the branch and its commits; nothing without a repository."""
    if branch is None:
        return []
    head = f"at {code(branch.head)}" if branch.head else "once the scope is approved"
    return [
        f"Repository {code(branch.repository)} · branch {code(branch.branch)} {head} · base "
        f"{code(branch.base)}",
        *(f"- no file matches {code(glob)}" for glob in branch.unmatched[:MOVES_SHOWN]),
    ]


def acceptance_lines(acceptance: Acceptance | None) -> list[str]:
    """Render each criterion with its tests, their outcome before and after, and the verdict."""
    if acceptance is None:
        return []
    lines = [
        f"**{acceptance.proved} of {len(acceptance.criteria)} criteria proved** at "
        f"{code(acceptance.commit)}"
    ]
    for criterion in acceptance.criteria[:CRITERIA_SHOWN]:
        verdict = "**proved**" if criterion.proved else f"not proved: {code(criterion.why)}"
        lines += [f"- {code(f'AC-{criterion.number}: {criterion.text}')}: {verdict}"]
        lines += [
            f"  - {code(test.name)}: {test.before} on the base, {test.after} on the branch"
            f"{' when run once more' if test.flaky else ''}"
            for test in criterion.tests
        ]
    lines += [f"- changes the test {code(path)}" for path in acceptance.changed_tests[:FILES_SHOWN]]
    return [*lines, *(f"- not run: {code(why)}" for why in acceptance.not_run)]


def stuck_details(workflow_id: str, stuck: Sequence[OutboxStuck]) -> str:
    """Render the entries on which an outbox is stuck, and the command that skips each."""
    lines = []
    for each in stuck:
        request = {"entry_id": each.entry_id, "actor": "you", "reason": "why"}
        lines += [
            "",
            f"**OutboxStuck**: {code(each.kind)} cannot be {each.step}ed; "
            "tried again every minute:",
            fenced(f"{each.error_type}: {each.error}"),
            "If it can never succeed, leave it out:",
            _update(workflow_id, "skip_entry", request),
        ]
    return "\n".join(lines)


def _command(view: StoryView, update: str, request: Mapping[str, object]) -> str:
    return _update(story_workflow_id(view.story_id), update, request)


def _update(workflow_id: str, update: str, request: Mapping[str, object]) -> str:
    # JSON can spell the characters that end a code block or a shell's quotes.
    text = json.dumps(request).replace("`", "\\u0060").replace("'", "\\u0027")
    return (
        f"```\ntemporal workflow update execute --name {update} \\\n"
        f"  --workflow-id {workflow_id} \\\n"
        f"  --input '{text}'\n```"
    )


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(code(text) for text in texts)


def deliberation_details(task: DeliberationInput, progress: Progress) -> str:
    """Render the wave, who has answered, and who has failed."""
    lines = [
        f"**{code(task.role)}** deliberates · {progress.status} · wave {code(progress.wave)}"
        + (f" · round {progress.round}" if progress.round else "")
        + f" · {progress.tokens} tokens",
        fenced(task.description, 400),
    ]
    lines += [f"- {code(agent)}: answered" for agent in progress.answered]
    if progress.status != "complete":
        lines += [f"- {code(agent)}: waiting" for agent in progress.waiting]
    for failure in progress.failed:
        lines += [f"- {code(failure.agent_id)}: failed to {code(failure.act)}"]
        lines += [fenced(failure.cause, 300)]
    return "\n".join(lines)


def implementation_details(task: Task, progress: ImplementationProgress) -> str:
    """Render the step, the last action and its exit code, the changed files, and the tokens."""
    step = f" · step {progress.step} of {progress.steps}" if progress.steps else ""
    lines = [
        f"**{code(task.role)}** implements · {progress.status}"
        + (f" by {progress.ended_by}" if progress.ended_by else "")
        + f"{step} · {progress.tokens} tokens",
        fenced(task.description, 400),
    ]
    if progress.last:
        lines += ["Last action", fenced(progress.last)]
    if progress.last_command:
        ended = "stopped at a limit" if progress.exit_code is None else f"exit {progress.exit_code}"
        lines += [f"Last command: {code(progress.last_command)} · {ended}"]
    if progress.commit:
        lines += [f"Commit {code(progress.commit)}"]
    lines += [
        f"- {code(file.path)} {file.status} +{file.insertions} -{file.deletions}"
        for file in progress.changed[:FILES_SHOWN]
    ]
    if len(progress.changed) > FILES_SHOWN:
        lines += [f"- and {len(progress.changed) - FILES_SHOWN} more files"]
    lines += [f"- not understood: {code(reason)}" for reason in progress.refused]
    return "\n".join(lines)


def evaluation_details(input: EvaluationInput, result: EvaluationResult, status: str) -> str:
    """Render the task, its configuration, and what its tests say so far."""
    lines = [
        f"{code(input.task.instance_id)} · {code(input.configuration.name)} · {status}"
        f" · {result.tokens} tokens",
        fenced(input.task.problem_statement, 400),
    ]
    if result.commit:
        lines += [f"Commit {code(result.commit)}"]
    if found := result.evaluated:
        to_pass, passing = found.fail_to_pass, found.pass_to_pass
        lines += [
            f"**{'resolved' if result.resolved else 'not resolved'}** · "
            f"{to_pass.passed} of {to_pass.tests} tests pass now, "
            f"{passing.passed} of {passing.tests} still pass"
        ]
    if result.error:
        lines += ["Not evaluated", fenced(result.error)]
    return "\n".join(lines)


def plan_details(tasks: Sequence[PlannedTask], status: dict[str, str]) -> str:
    """Render each task with its status and its open dependencies. `status`: task id -> status."""
    return "\n".join(
        f"- {code(task.task_id)} {code(task.role)}: {code(status.get(task.task_id, 'waiting'))}"
        + (f", after {_listed(task.depends_on)}" if task.depends_on else "")
        for task in tasks
    )
