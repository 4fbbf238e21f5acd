"""The validation of deploy/config/agile.fsm.yaml: it becomes a machine, or a list of problems."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workflows.models.ids import ROLE_PATTERN
from workflows.models.process import (
    GuardSpec,
    Machine,
    RepositoryTask,
    StateSpec,
    Transition,
)
from workflows.rules.machine import BUDGET_GATE, COMPUTED_GUARDS

_WORK_KINDS: tuple[str, ...] = get_args(StateSpec.model_fields["work"].annotation)
_DELIBERATING = ("design", "deliberation")
"""The kinds of work for which a council is asked: they need a role and a task."""

_CHANGES: tuple[str, ...] = get_args(RepositoryTask.model_fields["changes"].annotation)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_NAME_RULE = "a name is 1 to 64 letters, digits or '_', beginning with a letter"
_ROLE_RULE = "a role is 1 to 32 capitals, digits, '_' or '-', beginning with a capital"


class InvalidMachine(ValueError):
    """The document is not a usable machine. `problems`: each names the place and the remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class _Part(BaseModel):
    """A part of the document. Unknown keys are kept, to report them with every other problem."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def unknown_keys(self, place: str) -> Iterator[str]:
        known = ", ".join(field.alias or name for name, field in type(self).model_fields.items())
        for key in self.model_extra or {}:
            yield f"{place}: unknown key {key!r}; remove it, or use one of {known}"


class _RepositoryTask(_Part):
    changes: str = ""
    task: str = ""
    rubric: str = ""


class _State(_Part):
    work: str = "none"
    role: str = ""
    task: str = ""
    rubric: str = ""
    in_repository: _RepositoryTask | None = None


class _Guard(_Part):
    role: str = ""


class _Transition(_Part):
    source: str = Field(alias="from")
    event: str
    target: str = Field(alias="to")
    guards: list[str] = []
    roles: list[str] = []

    @property
    def place(self) -> str:
        return f"transition {self.event!r} from {self.source!r}"


class _Document(_Part):
    initial: str = ""
    final: str = ""
    states: dict[str, _State | None] = {}
    guards: dict[str, _Guard | None] = {}
    gates: list[str] = []
    transitions: list[_Transition] = []

    def role(self, guard: str) -> str:
        spec = self.guards.get(guard)
        return spec.role if spec else ""


def parse_machine(document: dict[str, Any]) -> Machine:
    """Parse the content of an agile.fsm.yaml.

    Raises:
        InvalidMachine: names every problem, its place and its remedy. If the shape itself is wrong
            (a list for a mapping, a missing key), only the problems of the shape.
    """
    try:
        content = _Document.model_validate(document)
    except ValidationError as error:
        raise InvalidMachine(
            [
                f"{'.'.join(str(part) for part in problem['loc']) or 'the document'}: "
                f"{'required; add it' if problem['type'] == 'missing' else problem['msg']}"
                for problem in error.errors(include_url=False, include_input=False)
            ]
        ) from None
    problems = [
        *_key_problems(content),
        *_name_problems(content),
        *_state_problems(content),
        *_repository_problems(content),
        *_guard_problems(content),
        *_transition_problems(content),
        *_gate_problems(content),
        *_path_problems(content),
        *_work_problems(content),
    ]
    if problems:
        raise InvalidMachine(problems)
    return Machine(
        initial=content.initial,
        final=content.final,
        states=[
            StateSpec.model_validate({"name": name, **(state or _State()).model_dump()})
            for name, state in content.states.items()
        ],
        guards=[GuardSpec(name=name, role=content.role(name)) for name in content.guards],
        gates=content.gates,
        transitions=[Transition(**transition.model_dump()) for transition in content.transitions],
    )


def _key_problems(content: _Document) -> Iterator[str]:
    yield from content.unknown_keys("the document")
    for name, state in content.states.items():
        if state:
            yield from state.unknown_keys(f"state {name!r}")
            if state.in_repository:
                yield from state.in_repository.unknown_keys(f"state {name!r}: in_repository")
    for name, guard in content.guards.items():
        if guard:
            yield from guard.unknown_keys(f"guard {name!r}")
    for transition in content.transitions:
        yield from transition.unknown_keys(transition.place)


def _name_problems(content: _Document) -> Iterator[str]:
    names = [("state", name) for name in content.states]
    names += [("guard", name) for name in content.guards]
    names += [("gate", name) for name in dict.fromkeys(content.gates)]
    names += [("event", name) for name in dict.fromkeys(t.event for t in content.transitions)]
    for what, name in names:
        if not _NAME.fullmatch(name):
            yield f"{what} {name!r}: {_NAME_RULE}"
    roles = [(f"state {name!r}", state.role) for name, state in content.states.items() if state]
    roles += [(f"guard {name!r}", guard.role) for name, guard in content.guards.items() if guard]
    roles += [(t.place, role) for t in content.transitions for role in t.roles]
    for place, role in roles:
        if role and not re.fullmatch(ROLE_PATTERN, role):
            yield f"{place}: role {role!r}: {_ROLE_RULE}"
    yield from _repeated("gates", "gate", content.gates)
    for transition in content.transitions:
        yield from _repeated(transition.place, "guard", transition.guards)
        yield from _repeated(transition.place, "role", transition.roles)


def _repeated(place: str, what: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{place}: {what} {name!r} is there {times} times; keep one"


def _state_problems(content: _Document) -> Iterator[str]:
    for end in ("initial", "final"):
        name = getattr(content, end)
        if not name:
            yield f"{end}: required; name the {end} state"
        elif name not in content.states:
            yield f"{end}: unknown state {name!r}; add it to states, or correct the name"
    if content.initial and content.initial == content.final:
        yield f"final: {content.final!r} is the initial state too; name another"
    for names in _alike(content.states):
        yield f"states {', '.join(names)}: differ in letter case only; give each another name"
    for name, state in content.states.items():
        if state is None:
            continue
        if state.work not in _WORK_KINDS:
            known = ", ".join(_WORK_KINDS)
            yield f"state {name!r}: unknown work {state.work!r}; use one of {known}"
        elif state.work in _DELIBERATING:
            for key, remedy in (("role", "the council's role"), ("task", "what it is asked")):
                if not getattr(state, key).strip():
                    yield (
                        f"state {name!r}: work {state.work} is deliberated and has no {key}; "
                        f"add {remedy}"
                    )
        elif given := [key for key in ("role", "task", "rubric") if getattr(state, key)]:
            yield (
                f"state {name!r}: work {state.work} asks no council; remove {', '.join(given)}, "
                f"or set work to one of {', '.join(_DELIBERATING)}"
            )
        if name == content.final and state.work != "none":
            yield f"state {name!r}: the final state does no work; remove work {state.work!r}"


def _repository_problems(content: _Document) -> Iterator[str]:
    for name, state in content.states.items():
        if state is None or state.in_repository is None:
            continue
        place = f"state {name!r}: in_repository"
        if state.work != "deliberation":
            yield f"{place}: is for work deliberation; remove it, or set work to deliberation"
        if state.in_repository.changes not in _CHANGES:
            known = ", ".join(_CHANGES)
            yield f"{place}: unknown changes {state.in_repository.changes!r}; use one of {known}"
        if not state.in_repository.task.strip():
            yield f"{place}: task: required; add what the council is asked"


def _guard_problems(content: _Document) -> Iterator[str]:
    for name in content.guards:
        if name in COMPUTED_GUARDS:
            if content.role(name):
                yield f"guard {name!r}: the engine computes it; remove its role"
        elif not content.role(name):
            yield (
                f"guard {name!r}: a human guard without a role; add the role, "
                f"or use one that the engine computes: {', '.join(COMPUTED_GUARDS)}"
            )
    for transition in content.transitions:
        for guard in dict.fromkeys(transition.guards):
            if guard not in content.guards:
                yield (
                    f"{transition.place}: unknown guard {guard!r}; "
                    "declare it under guards, or correct the name"
                )


def _transition_problems(content: _Document) -> Iterator[str]:
    for transition in content.transitions:
        place = transition.place
        for state in dict.fromkeys((transition.source, transition.target)):
            if state not in content.states:
                yield f"{place}: unknown state {state!r}; add it to states, or correct the name"
        if transition.source == content.final:
            yield f"{place}: {content.final!r} is final and has no exits; remove the transition"
        human = [guard for guard in transition.guards if content.role(guard)]
        is_gate = transition.event in content.gates
        if transition.roles:
            if is_gate:
                yield f"{place}: a rejection (it has roles) and a gate; make it one of the two"
            if transition.guards:
                yield f"{place}: a rejection (it has roles) takes no guards; remove them"
        elif is_gate and not human:
            yield f"{place}: a gate without a human guard; add one, or take it out of gates"
        elif human and not is_gate:
            yield (
                f"{place}: human guard {human[0]!r} on a transition that is not a gate; "
                f"add {transition.event!r} to gates, or remove the guard"
            )
    pairs = Counter((t.source, t.event) for t in content.transitions)
    for (source, event), times in pairs.items():
        if times > 1:
            yield f"transition {event!r} from {source!r}: there {times} times; keep one"


def _gate_problems(content: _Document) -> Iterator[str]:
    by_state: dict[str, list[str]] = {}
    for gate in dict.fromkeys(content.gates):
        if gate == BUDGET_GATE:
            yield f"gate {gate!r}: is the name of the token budget's gate; choose another"
        sources = list(dict.fromkeys(t.source for t in content.transitions if t.event == gate))
        if not sources:
            yield f"gate {gate!r}: no transition has this event; add one, or remove the gate"
        elif len(sources) > 1:
            yield f"gate {gate!r}: leaves {', '.join(sources)}; name a separate gate for each"
        for source in sources:
            by_state.setdefault(source, []).append(gate)
    for state, gates in by_state.items():
        if len(gates) > 1:
            yield f"state {state!r}: has gates {', '.join(gates)}; one state has one gate at most"


def _path_problems(content: _Document) -> Iterator[str]:
    steps = [(t.source, t.target) for t in content.transitions]
    if content.initial in content.states:
        reached = _reached(content.initial, steps)
        for state in content.states:
            if state not in reached:
                what = "the final state" if state == content.final else "state"
                yield (
                    f"{what} {state!r}: unreachable from {content.initial!r}; "
                    "add a transition to it, or remove it"
                )
    if content.final in content.states:
        leads_there = _reached(content.final, [(target, source) for source, target in steps])
        for state in content.states:
            if state not in leads_there:
                yield (
                    f"state {state!r}: a dead end, {content.final!r} cannot be reached from it; "
                    "add a transition"
                )
    unattended: dict[str, list[str]] = {}
    for transition in content.transitions:
        if not transition.roles and transition.event not in content.gates:
            unattended.setdefault(transition.source, []).append(transition.target)
    try:
        TopologicalSorter(unattended).prepare()
    except CycleError as error:
        around = " -> ".join(error.args[1][::-1])
        yield (
            f"states {around}: automatic transitions go round without end; "
            "make one of them a gate or a rejection"
        )


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that are equal in lower case, which deliberation ids use."""
    by_lower: dict[str, list[str]] = {}
    for name in names:
        by_lower.setdefault(name.lower(), []).append(name)
    return [names for names in by_lower.values() if len(names) > 1]


_MADE_BY: dict[str, tuple[str, ...]] = {
    "dor_ok": ("readiness",),
    "all_subtasks_done": ("plan",),
    "design_complete": ("design",),
    "docs_complete": _DELIBERATING,
}
"""Computed guard -> the work that makes it hold. The others read reports from outside."""

_MADE_HERE = ("design_complete", "docs_complete")
"""Guards on the current state's own work; the others keep holding in later states."""


def _work_problems(content: _Document) -> Iterator[str]:
    """Yield guards that no work can satisfy, and plans that run before one exists."""
    works = {name: state.work if state else "none" for name, state in content.states.items()}
    before = _works_before(content, works)
    for transition in content.transitions:
        work = works.get(transition.source)
        if work is None:
            continue
        for guard in transition.guards:
            makers = _MADE_BY.get(guard)
            if makers is None or work in makers:
                continue
            if guard in _MADE_HERE:
                yield (
                    f"{transition.place}: guard {guard!r} is never true in a state of work "
                    f"{work!r}; set the state's work to {' or '.join(makers)}, or remove the guard"
                )
            elif not before.get(transition.source, set()) & set(makers):
                yield (
                    f"{transition.place}: guard {guard!r} is never true: no state of work "
                    f"{' or '.join(makers)} comes before {transition.source!r}; add one, "
                    "or remove the guard"
                )
    for state in _without_a_plan(content, works):
        yield (
            f"state {state!r}: runs a plan, and can be entered before there is one; "
            "let every way to it leave a state of work design, by a gate or automatically"
        )


def _works_before(content: _Document, works: dict[str, str]) -> dict[str, set[str]]:
    """Return for each state the kinds of work of the states from which it can be reached."""
    steps = [(t.source, t.target) for t in content.transitions]
    before: dict[str, set[str]] = {}
    for name in works:
        for reached in _reached(name, steps):
            before.setdefault(reached, set()).add(works[name])
    return before


def _without_a_plan(content: _Document, works: dict[str, str]) -> list[str]:
    """Return the states that run a plan and can be entered without one.

    A design makes a plan when it is done. A rejection leaves it earlier, and a new visit drops it.
    """
    start = (content.initial, False)
    seen, waiting = {start}, [start]
    while waiting:
        here, planned = waiting.pop()
        for transition in content.transitions:
            if transition.source != here or transition.target not in works:
                continue
            made = not transition.roles if works.get(here) == "design" else planned
            step = (transition.target, made and works[transition.target] != "design")
            if step not in seen:
                seen.add(step)
                waiting.append(step)
    return [name for name in works if works[name] == "plan" and (name, False) in seen]


def _reached(start: str, steps: list[tuple[str, str]]) -> set[str]:
    reached = {start}
    waiting = [start]
    while waiting:
        here = waiting.pop()
        for source, target in steps:
            if source == here and target not in reached:
                reached.add(target)
                waiting.append(target)
    return reached
