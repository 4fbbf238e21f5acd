"""An update in one transaction: read, lock, compare, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from neo4j import AsyncManagedTransaction
from temporalio.exceptions import ApplicationError

from activities.graph.changes import Row, Write, parse_timestamp
from activities.graph.context_update.cypher import FOUND, KEPT
from activities.graph.context_update.payloads import (
    ENTITY_TYPES,
    NOT_LIVE,
    DecisionPayload,
    Entity,
    MilestonePayload,
    SubtaskPayload,
)
from activities.graph.context_update.rules import (
    EntityState,
    ParsedChange,
    ParsedChanges,
    RejectedChange,
    StorySnapshot,
    judge,
    read_changes,
    titled,
)
from workflows.models.base import content_hash
from workflows.models.context import (
    ContextAnswer,
    ContextWrite,
    DecisionAdded,
    MilestoneReached,
    request_hash,
)
from workflows.models.errors import ErrorType, application_error
from workflows.timestamps import format_timestamp

# --- in one transaction ---------------------------------------------------------------------------


class Update(NamedTuple):
    """The result of an update: the answer and its writes (none if it was stored before)."""

    answer: ContextAnswer
    writes: list[Write]


async def judge_update(
    tx: AsyncManagedTransaction, write: ContextWrite, role_of: Callable[[str], str]
) -> Update:
    """Validate an update under its story's lock, which the caller's transaction keeps.

    Raises:
        ApplicationError: not retryable: `UnknownStory`; `RequestReused` if another update was
            stored under its id; `InvalidInput` if a `whole` one has no change that can be stored.
    """
    update = write.update
    read = read_changes(write)
    linked = any(
        isinstance(parsed, ParsedChange)
        and isinstance(parsed.payload, SubtaskPayload)
        and bool(parsed.payload.depends_on)
        for parsed in read
    )
    looked = await tx.run(
        FOUND,
        story_id=update.story_id,
        update_id=write.update_id,
        ids=_looked_for(read),
        linked=linked,
    )
    row = await looked.single(strict=True)
    request = request_hash(update)
    if row["kept"]:
        return Update(_as_kept(row["kept"][0], request, read), [])
    found = _found(row.data(), update.story_id)
    if update.if_absent and found.story_live:
        return Update(ContextAnswer(version=found.version, hash=""), [])
    known = found.story_live or (bool(found.plans) and not found.story_deleted)
    judged = judge(write, read, found, role_of)
    makers = read if update.whole else judged.applied
    if (
        not known
        and not update.changed
        and not any(_makes_story(parsed, found) for parsed in makers)
    ):
        raise unknown_story(update.story_id, judged.warnings)
    if update.whole and not judged.applied:
        rules = (warning.partition("): ")[2] for warning in judged.warnings)
        raise application_error(ErrorType.INVALID_INPUT, "; ".join(rules))
    version = found.version + 1
    applied = [parsed.number for parsed in judged.applied]
    node = {
        "story_id": update.story_id,
        "version": version,
        "hash": content_hash([update.story_id, version, judged.warnings, _content(judged.applied)]),
        "warnings": judged.warnings,
        "applied": applied,
        "changes": [f"{parsed}: {parsed.reason}".rstrip(": ") for parsed in judged.applied],
        "request": request,
        "actor": update.actor,
        "role": update.role,
        "task_id": update.task_id or "",
        "after": found.version_by,
        "changed": update.changed,
        "at": format_timestamp(parse_timestamp(write.at, "timestamp")),
    }
    kept = Write(KEPT, {"story_id": update.story_id, "id": write.update_id, "node": node})
    return Update(_as_kept(node, request, read), [*judged.writes, kept])


def _makes_story(parsed: ParsedChange | RejectedChange, found: StorySnapshot) -> bool:
    """Return whether the change creates an unknown story: plans and subtasks do."""
    if isinstance(parsed, RejectedChange):
        return False
    if parsed.entity_type == "CASE":
        return parsed.operation == "CREATE"
    return parsed.entity_type in ("PLAN", "SUBTASK") and not found.story_deleted


def unknown_story(story_id: str, warnings: Sequence[str] = ()) -> ApplicationError:
    """Return the error for a story that the graph does not have."""
    why = f"; {'; '.join(warnings)}" if warnings else ""
    return application_error(ErrorType.UNKNOWN_STORY, f"case not found: {story_id}{why}")


def _looked_for(read: ParsedChanges) -> dict[str, list[str]]:
    """Return the ids to look up, by type; includes plans that payloads name."""
    ids: dict[str, set[str]] = {entity_type: set() for entity_type in ENTITY_TYPES}
    for parsed in read:
        if isinstance(parsed, ParsedChange):
            ids[parsed.entity_type].add(parsed.entity_id)
            if isinstance(parsed.payload, SubtaskPayload) and parsed.payload.plan_id:
                ids["PLAN"].add(parsed.payload.plan_id)
    return {entity_type: sorted(found) for entity_type, found in ids.items()}


def _found(row: Row, story_id: str) -> StorySnapshot:
    story = row["story"]
    case = _known(story)
    entities: dict[Entity, EntityState] = {("CASE", story_id): case}
    for entity_type in ("PLAN", "SUBTASK", "DECISION", "MILESTONE"):
        for node in row[entity_type.lower()]:
            entities[entity_type, node["id"]] = _known(node)
    return StorySnapshot(
        story_live=case.live,
        story_deleted=story["status"] == "DELETED",
        version=story["context_version"] or 0,
        version_by=story["context_by"] or "",
        plans={plan["id"]: plan["version"] for plan in row["plans"]},
        entities=entities,
        needs={each["id"]: each["needed"] for each in row["needs"]},
        created={name: story[name] for name in ("created_at", "created_by") if story[name]}
        if case.live
        else {},
    )


def _known(node: Row) -> EntityState:
    return EntityState(
        live=node["status"] not in NOT_LIVE,
        status_order=node["status_order"] or "",
        text_order=node["text_order"] or "",
        extras=node["extras"],
        status=str(node["status"] or ""),
        name=str(node.get("name") or ""),
    )


def _content(applied: Sequence[ParsedChange]) -> list[Any]:
    return [
        [
            str(parsed),
            (parsed.payload.model_dump(exclude_none=True) | parsed.extras)
            if parsed.payload
            else None,
        ]
        for parsed in applied
    ]


def _as_news(parsed: ParsedChange, actor: str) -> DecisionAdded | None:
    """Return the decision as running agents receive it; None for a new one without a title.

    A correction without a title carries the id instead, so that the known title stays.
    """
    if parsed.operation == "DELETE":
        return DecisionAdded(
            decision_id=parsed.entity_id, title=parsed.entity_id, decided_by=actor, withdrawn=True
        )
    if not isinstance(parsed.payload, DecisionPayload):
        return None
    title = parsed.payload.title
    if parsed.operation == "CREATE":
        title = titled(parsed, parsed.payload.model_dump(exclude_none=True)).get("title")
        if not title:
            return None
    return DecisionAdded(
        decision_id=parsed.entity_id,
        title=title or parsed.entity_id,
        rationale=parsed.payload.rationale or "",
        decided_by=parsed.payload.decided_by or actor,
    )


def _as_kept(node: Row, request: str, read: ParsedChanges) -> ContextAnswer:
    if node["request"] != request:
        raise application_error(
            ErrorType.REQUEST_REUSED,
            "another update was sent with this x-request-id; send this one with its own",
        )
    applied = [
        parsed for number in node["applied"] if isinstance(parsed := read[number], ParsedChange)
    ]
    made = [parsed for parsed in applied if parsed.operation == "CREATE"]
    return ContextAnswer(
        version=node["version"],
        hash=node["hash"],
        warnings=node["warnings"],
        changed=list(
            dict.fromkeys((*(parsed.entity_type for parsed in applied), *node.get("changed", [])))
        ),
        after=node.get("after", ""),
        decisions=[
            decision
            for parsed in applied
            if parsed.entity_type == "DECISION" and (decision := _as_news(parsed, node["actor"]))
        ],
        milestones=[
            MilestoneReached(
                milestone_id=parsed.entity_id,
                event_type=parsed.payload.event_type,
                description=parsed.payload.description or "",
            )
            for parsed in made
            if isinstance(parsed.payload, MilestonePayload) and parsed.payload.event_type
        ],
    )
