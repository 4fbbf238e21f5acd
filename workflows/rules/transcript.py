"""The transcript of an agent's steps: its text, what is elided to fit a window, and loops. Pure.

What is elided depends on the steps alone, and it is done in large parts: when the text outgrows its
limit, the oldest steps lose their texts until half of the limit is used. So the text of one step's
prompt is the start of the next one's, except after such a cut, and an engine's prefix cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from workflows.models.base import content_hash
from workflows.models.implementation import (
    Action,
    Finish,
    ReplaceText,
    RunCommand,
    StepRecord,
    WriteFile,
)

REPEATS = 3
"""The work ends if this many steps in a row have the same action and the same effect."""

SHORT_CHARACTERS = 200
"""Of an action's line in an elided step."""

EARLIER = "[earlier steps are left out]\n\n"


def headline(action: Action, limit: int = SHORT_CHARACTERS) -> str:
    """Return an action as one line of at most `limit` characters."""
    match action:
        case RunCommand():
            line = f"run: {action.command}"
        case WriteFile():
            line = f"write {action.path} ({len(action.content)} characters)"
        case ReplaceText():
            line = f"replace in {action.path}: {action.old} -> {action.new}"
        case Finish():
            line = f"finish: {action.summary}"
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def fingerprint(
    action: Action, exit_code: int | None, stopped: str, observation: str, changed: bool
) -> str:
    """Return a hash that is equal for two steps with the same action and the same effect.

    Args:
        action: of the step.
        exit_code: of a command.
        stopped: the limit that stopped it.
        observation: what the agent sees.
        changed: whether it made a commit.
    """
    return content_hash([action.model_dump(), exit_code, stopped, observation, changed])


def digest(before: str, step: StepRecord) -> str:
    """Return the hash of a transcript that had the hash `before`, with one more step."""
    return content_hash([before, step.fingerprint])


def loops(steps: Sequence[StepRecord]) -> bool:
    """Return whether the last steps repeat one another."""
    last = steps[-REPEATS:]
    return len(last) == REPEATS and len({step.fingerprint for step in last}) == 1


def render(steps: Sequence[StepRecord], limit: int) -> str:
    """Return the transcript in at most `limit` bytes of UTF-8; the newest step stays longest.

    Args:
        steps: oldest first.
        limit: in bytes.
    """
    room = max(limit - len(EARLIER), 0)
    kept = elided(steps, room)
    text = "".join(_cut(text_of(step), room // 2) for step in kept).rstrip("\n")
    if steps and kept[0].step > 1:
        text = EARLIER + text
    return _cut(text, limit)


def elided(steps: Sequence[StepRecord], limit: int) -> list[StepRecord]:
    """Return the steps whose text fits `limit`: the oldest shortened, then left out.

    A step counts at most half of the limit. The last one is returned whole.
    """
    whole = [min(_size(step), limit // 2) for step in steps]
    short = [min(_size(shortened(step)), limit // 2) for step in steps]
    gone = brief = size = 0  # the steps before `gone` are left out, those before `brief` shortened
    for place, more in enumerate(whole):
        size += more
        if size <= limit:
            continue
        while size > limit // 2 and brief < place:
            size += short[brief] - whole[brief]
            brief += 1
        while size > limit and gone < brief:
            size -= short[gone]
            gone += 1
    return [
        shortened(step) if place < brief else step
        for place, step in enumerate(steps)
        if place >= gone
    ]


def shortened(step: StepRecord) -> StepRecord:
    """Return a step without its long texts."""
    if step.elided:
        return step
    seen = "" if isinstance(step.action, RunCommand) else _line(step.observation)
    return step.model_copy(
        update={"action": _short_action(step.action), "observation": seen, "elided": True}
    )


def text_of(step: StepRecord) -> str:
    """Return a step as the agent reads it."""
    lines = [f"## Step {step.step}", _action_text(step)]
    if isinstance(step.action, RunCommand):
        lines.append(f"stopped: {step.stopped}" if step.stopped else f"exit code: {step.exit_code}")
        if step.elided:
            lines.append("[its output is left out]")
    if step.observation:
        lines.append(step.observation.rstrip("\n"))
    return "\n".join(lines) + "\n\n"


def _action_text(step: StepRecord) -> str:
    match step.action:
        case RunCommand(command=command):
            return f"run: {command}"
        case WriteFile(path=path) if step.elided:
            return f"write {path} [its content is left out]"
        case WriteFile(path=path, content=content):
            return f"write {path}:\n{content}"
        case ReplaceText(path=path) if step.elided:
            return f"replace in {path} [its texts are left out]"
        case ReplaceText(path=path, old=old, new=new):
            return f"replace in {path}\nold:\n{old}\nnew:\n{new}"
        case Finish(summary=summary):
            return f"finish: {summary}"


def _short_action(action: Action) -> Action:
    match action:
        case RunCommand():
            return action.model_copy(update={"command": _line(action.command)})
        case WriteFile():
            return action.model_copy(update={"content": ""})
        case ReplaceText():
            return action.model_copy(update={"old": "[left out]", "new": ""})
        case Finish():
            return action.model_copy(update={"summary": _line(action.summary)})


def _line(text: str) -> str:
    return text if len(text) <= SHORT_CHARACTERS else f"{text[: SHORT_CHARACTERS - 1]}…"


def _size(step: StepRecord) -> int:
    return len(text_of(step).encode())


def _cut(text: str, limit: int) -> str:
    """Cut a text in its middle, so that the end of the last step stays."""
    data = text.encode()
    if len(data) <= limit:
        return text
    marker = b"\n[... left out ...]\n"
    room = max(limit - len(marker), 0)
    head, tail = room // 2, room - room // 2
    parts = (data[:head], marker[:limit], data[len(data) - tail :])
    return "".join(part.decode(errors="ignore") for part in parts)
