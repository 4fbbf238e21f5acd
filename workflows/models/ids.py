"""Ids from outside, and their encoded form in workflow ids, NATS subjects and Valkey keys. Pure.

Models, the graph and event bodies contain an id as it was given. Only the builders of workflow ids
(`workflows.models`), subjects (`bridge`) and keys (`activities.cache`) encode it: everything but
letters, digits, `-` and `_` is percent-encoded, so that `US-101` stays as it is and `Story 12.3:a`
becomes `Story%2012%2E3%3Aa`. An encoded id is at most three times as long: a plan's workflow id has
at most 906 characters, and Temporal's limit is 1,000; NATS allows 4,096 in a subject.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated
from urllib.parse import unquote

from pydantic import StringConstraints

ID_PATTERN = r"^[A-Za-z0-9](?: ?[A-Za-z0-9_.:-])*$"
ID_CHARACTERS = 100
LONG_ID_CHARACTERS = 200
ID_RULE = (
    "1 to 100 letters, digits, '-', '_', '.', ':' or single inner spaces, beginning with a letter "
    "or digit (a plan's, task's or decision's: up to 200)"
)

Id = Annotated[str, StringConstraints(pattern=ID_PATTERN, max_length=ID_CHARACTERS)]
"""A story's id: see ID_RULE."""

LongId = Annotated[str, StringConstraints(pattern=ID_PATTERN, max_length=LONG_ID_CHARACTERS)]
"""The id of a plan, a task or a decision: it may start with a story's."""

WORKFLOW_ID_CHARACTERS = 1_000
WorkflowId = Annotated[str, StringConstraints(min_length=1, max_length=WORKFLOW_ID_CHARACTERS)]
"""A workflow's id that a signal names. Temporal refuses a command with one that is empty or longer,
and a workflow that sends it does not go on."""

ROLE_PATTERN = r"^[A-Z][A-Z0-9_-]{0,31}$"

Role = Annotated[str, StringConstraints(pattern=ROLE_PATTERN)]
"""A council's role (DEV, QA, ARCHITECT, DEVOPS, DATA) or a person's (PO, QA)."""

UpperWord = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, to_upper=True, pattern=r"^[A-Za-z][A-Za-z0-9_]{0,31}$"
    ),
]
"""A phase, a status or a type that others send: known or unknown, in any case."""

_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")


def encode_id(text: str) -> str:
    """Encode an id as one token of a subject, a workflow id or a key; `decode_id` reverses it."""
    return _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], text.encode()).decode("ascii")


def decode_id(token: str) -> str:
    """Return the id that `encode_id` encoded as `token`."""
    return unquote(token, errors="strict")


# --- refs of git ---

_REF_CHARACTERS = 200
"""A part of a ref is a file's name, of at most 255 bytes with `.lock`."""


def ref_part(text: str) -> str:
    """Encode an id as one part of a ref.

    One that is too long for a file's name is cut and gets a hash after a dot, which no encoded id
    contains.
    """
    token = encode_id(text)
    if len(token) <= _REF_CHARACTERS:
        return token
    return f"{token[:120]}.{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def story_branch(story_id: str) -> str:
    """Return the name of a story's branch, without `refs/heads/`."""
    return f"story/{ref_part(story_id)}"


def agent_ref(story_id: str, task_id: str, agent_id: str) -> str:
    """Return the ref of an agent's work on a task."""
    return f"refs/fleet/{ref_part(story_id)}/{ref_part(task_id)}/{ref_part(agent_id)}"


# --- ids of councils and plans ---


def council_id(role: str) -> str:
    return f"council-{role.lower()}"


def numbered_plan_id(story_id: str, number: int) -> str:
    """Return the id of a story's plan; its numbers begin at 1."""
    return f"{story_id}-plan-{number}"


# --- ids of workflows and events ---


def story_workflow_id(story_id: str) -> str:
    return f"story-{encode_id(story_id)}"


def story_of(workflow_id: str) -> str:
    """Return the story id that a story's workflow id contains."""
    return decode_id(workflow_id.removeprefix("story-"))


def plan_workflow_id(story_id: str, plan_id: str) -> str:
    return f"plan-{encode_id(story_id)}-{encode_id(plan_id)}"


def coach_workflow_id(request_id: str) -> str:
    return f"coach-{encode_id(request_id)}"


def deliberation_workflow_id(task_id: str) -> str:
    return f"deliberation-{encode_id(task_id)}"


def called_deliberation_workflow_id(task_id: str) -> str:
    """Return the workflow id of a deliberation that a caller of gRPC named.

    The dot, which no encoded id contains, keeps it apart from every council of a story: a caller
    cannot take the id of a story's next council.
    """
    return f"deliberation-call.{encode_id(task_id)}"


def task_of(workflow_id: str) -> str:
    """Return the task id that a deliberation's workflow id contains."""
    return decode_id(workflow_id.removeprefix("deliberation-").removeprefix("call."))


def implementation_workflow_id(task_id: str, agent_id: str) -> str:
    return f"implementation-{encode_id(task_id)}-{encode_id(agent_id)}"


def evaluation_workflow_id(task_id: str) -> str:
    return f"evaluation-{encode_id(task_id)}"


def derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """Return the workflow id of a derivation.

    The dot, which no encoded id contains, keeps the plans of two stories apart.
    """
    return f"derivation-{encode_id(story_id)}.{encode_id(plan_id)}"


def former_derivation_workflow_id(story_id: str, plan_id: str) -> str:
    """Return a derivation's workflow id in the form that older histories and clients use."""
    return f"derivation-{encode_id(story_id)}-{encode_id(plan_id)}"


def context_workflow_id(story_id: str, request_id: str) -> str:
    return f"context-{encode_id(story_id)}-{encode_id(request_id)}"


def closure_workflow_id(story_id: str, run_id: str) -> str:
    return f"closure-{encode_id(story_id)}-{encode_id(run_id)}"


def event_id(workflow_id: str, run_id: str, sequence: int) -> str:
    """Return the CloudEvents id: a pure function of workflow id, run and sequence number."""
    return f"{workflow_id}/{run_id}/{sequence}"


def run_after_reset(run_id: str, seed: int) -> str:
    """Return the name that a run has in ids from the point where it was reset.

    Args:
        run_id: the first run.
        seed: the random seed of the run that starts at the reset, which Temporal derives from that
            run's id. Unlike the id, it is known to every later run that continues from here.
    """
    return f"{run_id}-{seed:016x}"
