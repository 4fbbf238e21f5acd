"""The rules of the story's state machine. Pure: takes a machine, a state and facts; returns moves.

A transition is one of three kinds: a gate (a person opens it), a rejection (a person sends the
story back) or automatic (it is taken as soon as its guards hold).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from workflows.models.base import Model
from workflows.models.process import Machine, Transition
from workflows.models.story import Move

COMPUTED_GUARDS = (
    "dor_ok",
    "design_complete",
    "all_subtasks_done",
    "builds_passing",
    "tests_passing",
    "docs_complete",
)
"""The guards that the engine computes; every other guard is passed by a person in its role."""

BUDGET_GATE = "budget"
"""The gate of a story that has used up its token budget; no machine defines it."""


class Facts(Model):
    """The known facts of a story.

    Attributes:
        guards: computed guard -> whether it holds.
        approved: human guards that were passed.
    """

    guards: dict[str, bool] = Field(default={})
    approved: list[str] = Field(default=[])


# --- moving -------------------------------------------------------------------------------------


def moves(machine: Machine, state: str, facts: Facts) -> list[Move]:
    """Return the transitions that leave `state`, in the machine's order, and what blocks each."""
    return [
        Move(
            event=transition.event,
            to=transition.target,
            kind=_kind(machine, transition),
            roles=transition.roles or gate_roles(machine, transition.event),
            blocked_by=[
                f"{guard} (role {role})" if (role := _role(machine, guard)) else guard
                for guard in transition.guards
                if not _holds(machine, guard, facts)
            ],
        )
        for transition in _leaving(machine, state)
    ]


def open_gate(machine: Machine, state: str, facts: Facts) -> Transition | None:
    """Return the gate of `state` that waits only for people: its computed guards all hold."""
    for transition in _leaving(machine, state):
        if _kind(machine, transition) == "gate" and all(
            _role(machine, guard) or _holds(machine, guard, facts) for guard in transition.guards
        ):
            return transition
    return None


def automatic_transition(machine: Machine, state: str, facts: Facts) -> Transition | None:
    """Return the first transition of `state` that needs no person and whose guards all hold."""
    for transition in _leaving(machine, state):
        if _kind(machine, transition) == "automatic" and all(
            _holds(machine, guard, facts) for guard in transition.guards
        ):
            return transition
    return None


def gate_transition(machine: Machine, gate: str) -> Transition | None:
    """Return the one transition that `gate` guards; None if the machine has no such gate."""
    if gate not in machine.gates:
        return None
    return next(t for t in machine.transitions if t.event == gate)


def gate_roles(machine: Machine, gate: str) -> list[str]:
    """Return the roles whose approval `gate` needs, each of them once; [] if it is not a gate."""
    transition = gate_transition(machine, gate)
    if transition is None:
        return []
    roles = (_role(machine, guard) for guard in transition.guards)
    return list(dict.fromkeys(role for role in roles if role))


def rejection(machine: Machine, state: str, event: str) -> Transition | None:
    """Return the rejection `event` of `state`; None if there is none of that name."""
    for transition in _leaving(machine, state):
        if transition.event == event and transition.roles:
            return transition
    return None


def rejection_path(machine: Machine, state: str, target: str) -> list[Transition] | None:
    """Return the shortest chain of rejections from `state` to `target`; [] if they are the same.

    None if no chain leads there. Of equally short chains, the first one in the machine's order.
    """
    predecessors: dict[str, Transition | None] = {state: None}
    waiting = deque([state])
    while waiting and target not in predecessors:
        for transition in _leaving(machine, waiting.popleft()):
            if transition.roles and transition.target not in predecessors:
                predecessors[transition.target] = transition
                waiting.append(transition.target)
    if target not in predecessors:
        return None
    chain: list[Transition] = []
    step = predecessors[target]
    while step is not None:
        chain.append(step)
        step = predecessors[step.source]
    return chain[::-1]


def legal_events(machine: Machine, state: str) -> list[str]:
    """Return the events that leave `state`, in the machine's order, for an error message."""
    return [transition.event for transition in _leaving(machine, state)]


def apply(machine: Machine, state: str, event: str) -> str:
    """Return the state that `event` leads to; guards are not checked.

    Raises:
        ValueError: `state` has no such event; the message names those that it has.
    """
    for transition in _leaving(machine, state):
        if transition.event == event:
            return transition.target
    known = ", ".join(legal_events(machine, state)) or "none"
    raise ValueError(f"{event!r} does not leave state {state!r}; legal events: {known}")


def _leaving(machine: Machine, state: str) -> Iterator[Transition]:
    return (t for t in machine.transitions if t.source == state)


def _kind(machine: Machine, transition: Transition) -> Literal["gate", "rejection", "automatic"]:
    if transition.roles:
        return "rejection"
    return "gate" if transition.event in machine.gates else "automatic"


def _role(machine: Machine, guard: str) -> str:
    """Return the role of a human guard; empty for a computed one."""
    return next(spec.role for spec in machine.guards if spec.name == guard)


def _holds(machine: Machine, guard: str, facts: Facts) -> bool:
    if _role(machine, guard):
        return guard in facts.approved
    return facts.guards.get(guard, False)
