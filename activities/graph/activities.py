"""The context graph in Neo4j: writing and reading it, and the schema that others query.

Everything that belongs to a story is one step away from it::

    (:Case:Story {id, case_id, title, description, acceptance_criteria[], rigor, revision, status,
                  created_at, created_by, context_version, context_by})
           context_by: workflow id of the update that created that version
    (:ContextUpdate {id, story_id, version, hash, warnings[], changes[], applied[], request, actor,
                role, task_id, at, after, changed[]})-[:OF]->(Story)
           an update, as `updates` stored it; after: the update with the previous version; changed:
           what the story itself changed
    (Story)-[:HAS_PLAN]->(:PlanVersion {id, case_id, version, status})
           status: DRAFT, APPROVED, then COMPLETED, PARTIAL, FAILED, CANCELLED, NOTHING_TO_RUN
    (PlanVersion)-[:HAS_SUBTASK]->(:Subtask {id, case_id, title, description, role, status,
                  priority, assignee})-[:DEPENDS_ON]->(Subtask)
           status: PENDING, IN_PROGRESS, DONE, FAILED, NOT_RUN, CANCELLED
           a subtask stored before any plan is -[:OF]->(Story) until there is a plan
    (PlanVersion)-[:CONTAINS_DECISION]->(Decision)
    (:Decision {id, case_id, title, rationale, type, status, role, decided_by, recorded_by,
                decided_at, affects[]})-[:OF]->(Story)
           status: ACCEPTED; SUPERSEDED: its council has decided again
           recorded_by: owner of the update's token, next to the name in its payload; events too
    (Decision)-[:AFFECTS]->(Subtask), (Decision)-[:DEPENDS_ON]->(Decision): by the ids and titles
           that `affects` names, ignoring case, whichever of the two came first
    (Decision)-[:FROM]->(:Proposal {id, story_id, deliberation_id, run_id, task_id, phase, agent_id,
                role, score, rank, barred, revision, prompt_hash, model, approach, content,
                drafts[], judged, failed_agents[], recorded_at})-[:BY]->(:Agent),
           (Proposal)-[:OF]->(Story)
           revision: how often its author revised it; rank 1 won
    (:Critique {id, critic, round, verdict, points[], suggestion})-[:OF]->(Proposal)
    (:Check {id, name, outcome, score, blocking, findings[], errors, warnings, output, exit_code,
                  position})
           -[:OF]->(Proposal)
    (:Change {id, story_id, commit, base, files[], insertions, deletions})-[:FROM]->(Proposal),
           -[:OF]->(Story): what a proposal changes in a repository
    (:Report {id, commit, base, measured_by, score, rigor, gating_decision, reasons[], broken[],
                  seconds, dimensions[]})-[:OF]->(Change)
           score: 0 to 100; dimensions: each in JSON, with command, exit code and seconds
    (:Event {id, case_id, event_type, description, actor, timestamp_ms, entry_id})-[:OF]->(Story)
    (:PhaseTransition {id, story_id, from_phase, to_phase, event, actor, reason, timestamp})
           -[:OF]->(Story)
    (:GateApproval {id, story_id, gate, actor, role, revision, comment, at})-[:OF]->(Story)
    (:PlanApproval {id, story_id, plan_id, approved_by, roles[], timestamp})-[:OF]->(Story),
           -[:APPROVES]->(PlanVersion)
    (:Received {id, content, story_id, at, received_ms}): an id that a sender gave a message on the
           bus, and the hash of the message's fields; no other message may use the id. Removed when
           no stream holds the message any longer
    (:TaskDispatch {id, story_id, task_id, agent_id, role, timestamp, status})-[:OF]->(Story)
    (:Deliberation {id, story_id, task_id, role, status, error, error_type, winner_id, score,
                decisions, duration_ms, ended_at, failed_agents[]})-[:OF]->(Story)
           status FAILED: id of its workflow, error, failed_agents (each in JSON); COMPLETED:
           completed outside, according to the bus: id of its event, winner_id, score, decisions
           (how many it made)
    (:Council {role, id, rounds})-[:HAS_AGENT]->(:Agent {id, role, agent_type, model,
                persona, endpoint, supported_tasks[], languages[], max_concurrent_tasks, metadata})
           rounds 0: the default; metadata: JSON; an agent belongs to one council
    (:Migration {version, name, applied_at})

Keys: people and other systems name PlanVersion, Subtask, Decision and Event within their story, so
these are unique by (case_id, id). Every other id is globally unique; a node without an id has the
id of its entry. case_id and story_id are '' if there is no story. Nodes of a story that is not
known yet are attached to a Story with its id and status UNKNOWN until the story arrives.
Properties that begin with `x_` are unknown fields of updates, as they were sent.
`status_order` and `text_order` are the keys by which a newer status or text wins.
Deletes are soft: status DELETED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import groupby
from operator import attrgetter
from typing import Any, LiteralString, TypeVar

from neo4j import AsyncDriver, AsyncManagedTransaction, unit_of_work
from neo4j.exceptions import ConstraintError
from temporalio import activity

from activities.cache import (
    Cache,
    Document,
    TimelineRow,
    draft_key,
    pack_key,
    pack_variant,
    session_key,
    spec_key,
)
from activities.graph.changes import CLAIM, FORGET, Change, Claim, Write, changes
from activities.graph.context_packs import assemble, with_summary
from activities.graph.context_update.payloads import NOT_LIVE
from activities.graph.context_update.transaction import judge_update, unknown_story
from activities.graph.councils import choose_council, read_councils, seed_councils
from activities.graph.earlier_runs import NUMBERED, numbered
from activities.graph.errors import store_errors
from activities.graph.events import summary, writes
from activities.graph.proposals import deliberation_writes
from activities.graph.pruning import ended_before, prune, prune_without_story
from activities.graph.relationships import Neighbourhood, read_neighbourhood
from activities.graph.scope_reads import Reading, read_sections
from activities.graph.scopes import Scopes, has_scopes
from activities.graph.sessions import Session, read_session, redacted
from activities.graph.stories import adopt, adopt_all
from activities.graph.tracing import open_session
from activities.graph.values import Number, Row, Text, Texts, text
from activities.redaction import Redaction, load_redaction
from workflows.models.access import require_person
from workflows.models.agents import Council, CouncilQuery, PlannedTask
from workflows.models.base import content_hash
from workflows.models.context import ContextAnswer, ContextPack, ContextWrite, PackQuery
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import OutcomeBatch, RecordBatch
from workflows.models.errors import ErrorType, application_error
from workflows.models.events import PlanDerived, StorySpec
from workflows.models.gathering import Gathered, GatherInput
from workflows.models.plan import PlanQuery, StoredPlan
from workflows.models.readiness import StoryText
from workflows.models.story import StoryRuns
from workflows.stubs import GraphStub
from workflows.timestamps import format_timestamp

__all__ = ["Graph", "seed_councils", "store_errors"]

T = TypeVar("T")

TRANSACTION_S = 20.0
"""Shorter than the time-out of the activity that runs the transaction (stubs.STORE)."""

FORGET_AT_ONCE = 10_000
"""Nodes deleted in one transaction, so that it holds its locks for less than a second."""

PLAN_TASKS = """
MATCH (p:PlanVersion {case_id: $story_id, id: $plan_id})-[:HAS_SUBTASK]->(t:Subtask)
WHERE coalesce(p.status, '') <> 'DELETED' AND coalesce(t.status, '') <> 'DELETED'
RETURN t.id AS task_id, t.role AS role, coalesce(t.title, t.id) AS title,
       t.description AS description, coalesce(t.priority, 1) AS priority,
       COLLECT {
         MATCH (t)-[:DEPENDS_ON]->(d:Subtask)<-[:HAS_SUBTASK]-(p)
         WHERE coalesce(d.status, '') <> 'DELETED' RETURN d.id ORDER BY d.id
       } AS depends_on
ORDER BY priority, size(toStringOrNull(task_id)), task_id
"""

STORY_TEXT = """
MATCH (s:Case {id: $story_id}) WHERE coalesce(s.status, '') <> 'DELETED' AND s.title IS NOT NULL
RETURN s.title AS title, s.description AS brief,
       s.acceptance_criteria AS acceptance_criteria
"""

TASK_STATUS = """
MATCH (t:Subtask {case_id: $story_id, id: $task_id}) RETURN t.status AS status
"""

STORY_STATUS = "MATCH (s:Case {id: $story_id}) RETURN s.status AS status"

HAS_BEGUN = "MATCH (s:Case {id: $story_id}) WHERE s.title IS NOT NULL RETURN s.id AS id"
"""A story's first entry writes its title; later entries create a missing node without a title."""


OVER = ("DONE", "CANCELLED", "FAILED")
"""Statuses of a story that has ended."""

_OVER_OR_DELETED = (*OVER, "DELETED")

LIVE_STORIES: LiteralString = """
MATCH (s:Case) WHERE s.id IN $ids AND NOT coalesce(s.status, 'UNKNOWN') IN $over
RETURN s.id AS id
"""


class _TaskRow(Row):
    task_id: Text
    role: Text
    title: Text
    description: Text
    priority: Number
    depends_on: Texts


class _StoryRow(Row):
    title: Text
    brief: Text
    acceptance_criteria: Texts


class Graph(GraphStub):
    """Neo4j and Valkey. Every write is idempotent and returns after its commit.

    The driver's `max_transaction_retry_time` and `connection_acquisition_timeout`, and the cache
    client's `socket_timeout`, must be shorter than the activity's 30 s.

    Raises:
        ApplicationError: in every method, by `errors.TABLE` if a store fails. Invalid input is
            refused as described in `changes.changes` and `councils.seat`.
    """

    def __init__(
        self,
        driver: AsyncDriver,
        cache: Cache,
        scopes: Scopes,
        redaction: Redaction | None = None,
    ) -> None:
        """Create the graph.

        Args:
            driver: Neo4j.
            cache: Valkey.
            scopes: the configuration that packs are built with.
            redaction: removes secrets from packs and sessions; None: by the default policy.
        """
        self._driver = driver
        self._cache = cache
        self._scopes = scopes
        self._redact = redaction or load_redaction()
        self._pack_config = content_hash([scopes.version, self._redact.version])

    @activity.defn
    async def record(self, batch: RecordBatch) -> None:
        """Store a batch: the graph in one transaction, then the cache."""
        await self.store(changes(batch))

    async def record_outcome(self, batch: OutcomeBatch) -> None:
        """Store a batch and its deliberation: the graph in one transaction, then the cache."""
        await self._store(changes(batch), deliberation_writes(batch.deliberation))

    async def store(self, changes: Sequence[Change]) -> None:
        """Store parsed changes: the graph in one transaction, then the cache.

        Raises:
            ApplicationError: as in every method; it is safe to store the same changes again.
        """
        await self._store(changes, [])

    async def _store(self, changes: Sequence[Change], before: list[Write]) -> None:
        with store_errors():
            await self._write([*before, *_in_statements(changes)])
            stories = {each.story_id for each in changes if each.story_id}
            await self._cache.store(_lines(changes), _documents(changes), stories)

    async def claim(self, claims: Sequence[Claim]) -> list[Claim]:
        """Record the ids of messages; return the claims whose id belongs to other content."""
        if not claims:
            return []
        # Sorted by id, so that two replicas take their locks in the same order.
        rows = sorted((claim._asdict() for claim in claims), key=lambda row: row["id"])
        with store_errors():
            async with open_session(self._driver) as session:
                found = await session.execute_write(_rows, CLAIM, {"rows": rows})
        return [Claim(**row["claim"]) for row in found]

    async def forget_received(self, age: timedelta) -> int:
        """Remove the ids of messages that are older than `age`; return how many were removed."""
        parameters = {"age_ms": int(age.total_seconds() * 1000), "limit": FORGET_AT_ONCE}
        gone, last = 0, FORGET_AT_ONCE
        with store_errors():
            async with open_session(self._driver) as session:
                while last == FORGET_AT_ONCE:
                    [row] = await session.execute_write(_rows, FORGET, parameters)
                    last = int(row["count"])
                    gone += last
        return gone

    async def ended_before(self, before: datetime) -> list[str]:
        """Return the stories that have ended, and whose last event is before `before`."""
        return await ended_before(self._driver, _OVER_OR_DELETED, before)

    async def prune(self, story_id: str, before: datetime) -> int:
        """Remove what graph and cache have of such a story; return how many nodes were removed."""
        gone = await prune(self._driver, story_id, _OVER_OR_DELETED, before)
        if gone:
            with store_errors():
                await self._cache.forget(story_id)
        return gone

    async def prune_without_story(self, before: datetime) -> int:
        """Remove deliberations of no story from before `before`; return how many nodes."""
        return await prune_without_story(self._driver, before)

    async def live_stories(self, story_ids: Sequence[str]) -> set[str]:
        """Return the stories that the graph knows and that have not ended."""
        with store_errors():
            rows = await self._read(LIVE_STORIES, ids=list(story_ids), over=[*NOT_LIVE, *OVER])
        return {row["id"] for row in rows}

    async def drop_packs(self, stories: Iterable[str]) -> None:
        """Drop the stories' context packs, because their sources have changed."""
        with store_errors():
            await self._cache.drop_packs(stories)

    @activity.defn
    async def record_deliberation(self, record: DeliberationRecord) -> None:
        """Store a deliberation with its provenance, and drop its story's context packs."""
        found = deliberation_writes(record)
        with store_errors():
            await self._write(found)
            await self._cache.drop_packs([record.story_id] if record.story_id else [])

    @activity.defn
    async def load_council(self, query: CouncilQuery) -> Council:
        """Read the councils and return the requested one."""
        with store_errors():
            async with open_session(self._driver) as session:
                return choose_council(await session.execute_read(read_councils), query)

    @activity.defn
    async def gather(self, request: GatherInput) -> Gathered:
        """Return the requested council, and its context pack without its blocks.

        Raises:
            ApplicationError: as in `load_council` and `keep_pack`.
        """
        council, pack = await asyncio.gather(
            self.load_council(request.council), self.keep_pack(request.pack)
        )
        return Gathered(council=council, pack=pack)

    @activity.defn
    async def load_plan(self, query: PlanQuery) -> StoredPlan:
        """Return a plan's tasks; if it has none, its story's text, if present."""
        with store_errors():
            await adopt(self._driver, [query.story_id])
            tasks = await self._read(PLAN_TASKS, story_id=query.story_id, plan_id=query.plan_id)
            if tasks:
                return StoredPlan(
                    tasks=[
                        PlannedTask(**_TaskRow.model_validate(task).model_dump()) for task in tasks
                    ]
                )
            story = await self._read(STORY_TEXT, story_id=query.story_id)
        if not story:
            return StoredPlan()
        return StoredPlan(story=StoryText(**_StoryRow.model_validate(story[0]).model_dump()))

    @activity.defn
    async def story_runs(self, story_id: str) -> StoryRuns:
        """Return the highest numbers of the story's plans and councils."""
        with store_errors():
            await adopt(self._driver, [story_id])
            return numbered(story_id, await self._read(NUMBERED, story_id=story_id))

    @activity.defn
    async def build_pack(self, query: PackQuery) -> ContextPack:
        """Return a context pack; a stored one is reused until the story changes.

        Raises:
            ApplicationError: `GraphLost`, not retryable: the story was recorded, according to
                `query.known`, but the graph does not have it.
        """
        if query.known:
            with store_errors():
                await self._require_begun(query.story_id)
        return (await self._pack(query))[0]

    @activity.defn
    async def keep_pack(self, query: PackQuery) -> ContextPack:
        """Build a context pack and keep it in Valkey; return it without its blocks.

        Raises:
            ApplicationError: as in `build_pack`.
        """
        pack = await self.build_pack(query)
        context = "\n\n".join(filter(None, (pack.context, query.background)))
        with store_errors():
            key = await self._cache.keep_blocks(
                query.story_id, pack.model_copy(update={"context": context})
            )
        blocks = {"system": "", "context": "", "tools": ""}
        return pack.model_copy(update={**blocks, "kept_at": key})

    async def known_pack(self, query: PackQuery) -> ContextPack:
        """Return the context pack of a story that the graph must know.

        Raises:
            ApplicationError: `UnknownStory`, not retryable.
        """
        pack, known = await self._pack(query)
        if not known:
            raise unknown_story(query.story_id)
        return pack

    @activity.defn
    async def update_context(self, write: ContextWrite) -> ContextAnswer:
        """Store an update from outside in one transaction, and drop its story's context packs.

        Raises:
            ApplicationError: not retryable: `UnknownStory`, `Permission` if the actor is a policy,
                or `RequestReused` if another update was stored under its id. Nothing is stored in
                these cases.
        """
        require_person(write.update.actor)
        with store_errors():
            await adopt(self._driver, [write.update.story_id])
            answer = await self._in_write([write.update.story_id], _update, write, self._scopes)
            await self._cache.drop_packs([write.update.story_id])
        return answer

    async def read_session(self, story_id: str, events: int, summary: bool) -> Session:
        """Return what a story's agents get when they resume it.

        Args:
            story_id: the story.
            events: the maximum number of milestones.
            summary: whether to include the last summary.

        Raises:
            ApplicationError: `UnknownStory`, not retryable.
        """
        with store_errors():
            await adopt(self._driver, [story_id])
            async with open_session(self._driver) as session:
                found = await session.execute_read(_read_session, story_id, events, summary)
            given = await self._cache.find_summary(story_id) if summary else ""
        if found is None:
            raise unknown_story(story_id)
        return redacted(found._replace(summary=given or found.summary), self._redact)

    async def keep_session(self, story_id: str, content: str, text: str, seconds: int) -> None:
        """Keep a session's text in Valkey for `seconds`. `content`: the hash of its content."""
        with store_errors():
            await self._cache.keep(session_key(story_id, content), text, seconds)

    async def story_status(self, story_id: str) -> str | None:
        """Return a story's status, empty if it has none; None if the graph does not know it."""
        with store_errors():
            rows = await self._read(STORY_STATUS, story_id=story_id)
        if not rows or rows[0]["status"] in NOT_LIVE:
            return None
        return text(rows[0]["status"])

    async def task_status(self, story_id: str, task_id: str) -> str:
        """Return the status of a story's subtask, or an empty text."""
        with store_errors():
            rows = await self._read(TASK_STATUS, story_id=story_id, task_id=task_id)
        return text(rows[0]["status"]) if rows else ""

    async def neighbourhood(self, node_type: str, node_id: str, depth: int) -> Neighbourhood | None:
        """Return a node and the nodes near it; see `relationships.read_neighbourhood`."""
        with store_errors():
            async with open_session(self._driver) as session:
                return await session.execute_read(
                    _read_neighbourhood, node_type, node_id, depth, self._redact
                )

    @property
    def scopes(self) -> Scopes:
        """The configuration that packs are built with."""
        return self._scopes

    async def _pack(self, query: PackQuery) -> tuple[ContextPack, bool]:
        """Return the pack, and whether its story is known.

        Packs are cached for known stories, and roles and phases of the scopes file. Others have
        headers only, and callers could make up any number of names.
        """
        role = self._scopes.role(query.role)
        budget = query.token_budget or self._scopes.token_budget
        if not query.story_id:
            return assemble(self._scopes, query, budget, []), False
        variant = pack_variant(query.subtask_id, query.token_budget)
        key = pack_key(query.story_id, role, query.phase, variant)
        lasting = has_scopes(self._scopes, query.role, query.phase)
        with store_errors():
            kept = await self._cache.find_pack(query.story_id, key, self._pack_config)
            if kept.pack is not None:
                return kept.pack, True
            found = await self._sections(query)
            sections = with_summary(found.sections, kept.summary)
            pack = assemble(self._scopes, query, budget, sections, self._redact)
            if found.known and lasting:
                await self._cache.keep_pack(query.story_id, key, kept, pack)
        return pack, found.known

    async def _sections(self, query: PackQuery) -> Reading:
        """Read a pack's sections; adopt first what others wrote."""
        read = unit_of_work(timeout=TRANSACTION_S)(read_sections)
        async with open_session(self._driver) as session:
            found = await session.execute_read(read, self._scopes, query)
            if not found.adopted:
                await session.execute_write(adopt_all, [query.story_id])
                found = await session.execute_read(read, self._scopes, query)
        return found

    async def _require_begun(self, story_id: str) -> None:
        if not await self._read(HAS_BEGUN, story_id=story_id):
            raise application_error(
                ErrorType.GRAPH_LOST,
                f"the graph has lost story {story_id}, which was recorded there; write it again "
                f"with `fleet graph rebuild {story_id}`",
            )

    async def _write(self, found: list[Write]) -> None:
        if found:
            stories = {write.row["story_id"] for write in found if write.row.get("story_id")}
            await self._in_write(stories, _apply, found)

    async def _in_write(
        self,
        stories: Collection[str],
        work: Callable[..., Awaitable[T]],
        *arguments: Any,
    ) -> T:
        """Run a transaction; if nodes of others violate a constraint, adopt them and run it again.

        Raises:
            ConstraintError: the graph refuses it after the adoption, too.
        """
        async with open_session(self._driver) as session:
            try:
                return await session.execute_write(work, *arguments)
            except ConstraintError:
                await adopt(self._driver, stories)
                return await session.execute_write(work, *arguments)

    async def _read(self, cypher: LiteralString, **parameters: Any) -> list[dict[str, Any]]:
        async with open_session(self._driver) as session:
            return await session.execute_read(_rows, cypher, parameters)


@unit_of_work(timeout=TRANSACTION_S)
async def _apply(tx: AsyncManagedTransaction, found: list[Write]) -> None:
    """Run the writes in order; adjacent writes with the same statement are sent as one."""
    for (cypher, together), same in groupby(found, key=attrgetter("cypher", "together")):
        each_row = cypher if together else f"CALL (row) {{ {cypher} }}"
        statement = f"UNWIND $rows AS row {each_row}"  # built from constants only
        # Results are not awaited one by one: the commit waits for all, and fails if one failed.
        await tx.run(statement, rows=[write.row for write in same])


@unit_of_work(timeout=TRANSACTION_S)
async def _rows(
    tx: AsyncManagedTransaction, cypher: LiteralString, parameters: dict[str, Any]
) -> list[dict[str, Any]]:
    return await (await tx.run(cypher, parameters)).data()


@unit_of_work(timeout=TRANSACTION_S)
async def _update(
    tx: AsyncManagedTransaction, write: ContextWrite, scopes: Scopes
) -> ContextAnswer:
    update = await judge_update(tx, write, scopes.role)
    await _apply(tx, update.writes)
    return update.answer


@unit_of_work(timeout=TRANSACTION_S)
async def _read_neighbourhood(
    tx: AsyncManagedTransaction,
    node_type: str,
    node_id: str,
    depth: int,
    redact: Callable[[str], str],
) -> Neighbourhood | None:
    return await read_neighbourhood(tx, node_type, node_id, depth, redact)


@unit_of_work(timeout=TRANSACTION_S)
async def _read_session(
    tx: AsyncManagedTransaction, story_id: str, events: int, summary: bool
) -> Session | None:
    return await read_session(tx, story_id, events, summary)


def _in_statements(known: Sequence[Change]) -> list[Write]:
    """Return the writes of the changes, grouped by statement if all changes are of one kind.

    Changes of one kind write the same statements in the same order, and each write can be repeated
    and delayed. So the first statement of all changes runs first, then the second.
    """
    found = [write for change in known for write in writes(change)]
    if len({type(change.body) for change in known}) != 1:
        return found
    first = {write.cypher: place for place, write in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda write: first[write.cypher])


def _lines(known: Iterable[Change]) -> Iterator[TimelineRow]:
    for change in known:
        if not change.story_id:
            continue
        entry, body = change.entry, change.body
        values = (
            *(entry.id, entry.kind, body.label, summary(body), body.by()),
            *(format_timestamp(change.at), entry.source),
        )
        yield TimelineRow(change.story_id, change.line, values)


def _documents(known: Iterable[Change]) -> Iterator[Document]:
    for change in known:
        match change.body:
            case StorySpec():
                key = spec_key(change.story_id)
            case PlanDerived():
                key = draft_key(change.story_id)
            case _:
                continue
        yield Document(key, change.order, change.body.model_dump(mode="json"))
