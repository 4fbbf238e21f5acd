"""The context graph on a real Neo4j: no duplicates, no losses, outside text stays data."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import neo4j
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from temporalio.exceptions import ApplicationError

from activities.cache import Cache, draft_key, spec_key, timeline_key
from activities.graph.activities import Graph, seed_councils
from activities.graph.changes import Claim
from activities.graph.scopes import load_scopes
from bridge.mirror.story_sweep import RECEIVED_FOR
from tests.support.servers import RunningServer
from tests.support.stories import (
    at,
    batch,
    deliberation,
    moved,
    new_story,
    one_of_each,
    plan,
    refused,
    rows,
    spec,
)
from workflows.models.acceptance import AcceptanceTest, Criterion
from workflows.models.agents import CouncilQuery
from workflows.models.context import PackQuery
from workflows.models.deliberation import DeliberationRecord
from workflows.models.entries import Entry, OutcomeBatch, RecordBatch
from workflows.models.events import (
    BODIES,
    ContextDecisionAdded,
    CriteriaTested,
    DeliberationStarted,
    PlanApproved,
    TaskDispatched,
)
from workflows.models.gathering import GatherInput
from workflows.models.plan import PlanQuery
from workflows.models.readiness import StoryText

CONFIG = Path(__file__).parents[3] / "deploy" / "config"

AGAINST_A_SERVER: Any = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    # Shrinking would repeat the failure for minutes.
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}


@pytest.fixture
def story() -> str:
    return new_story()


async def dump(driver: neo4j.AsyncDriver, story: str) -> list[str]:
    """Return a story's nodes with labels, properties and relationships, by any of its id fields."""
    mine = "n.case_id = $story OR n.story_id = $story OR n.id STARTS WITH $story"
    nodes = await rows(
        driver, f"MATCH (n) WHERE {mine} RETURN labels(n), properties(n)", story=story
    )
    links = await rows(
        driver,
        f"MATCH (n)-[r]->(m) WHERE {mine} "
        "RETURN labels(n), n.id, type(r), labels(m), m.id, properties(r)",
        story=story,
    )
    texts = [json.dumps(found, sort_keys=True).replace(story, "STORY") for found in nodes + links]
    return sorted(texts)


# --- entries --------------------------------------------------------------------------------------


async def test_of_a_tasks_dispatches_in_one_batch_the_latest_decides_who_has_it(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    await graph.record(batch(story, plan(story)))
    [[task]] = await rows(
        driver, "MATCH (t:Subtask {case_id: $story}) RETURN t.id ORDER BY t.id LIMIT 1", story=story
    )
    dispatches = [
        TaskDispatched(
            story_id=story, timestamp=at(second), task_id=task, agent_id=agent, role="DEV"
        )
        for second, agent in ((40, "latest"), (20, "first"), (30, "second"))
    ]

    await graph.record(batch(story, *dispatches))

    assert await rows(
        driver,
        "MATCH (t:Subtask {case_id: $story, id: $task}) RETURN t.status, t.assignee",
        story=story,
        task=task,
    ) == [["IN_PROGRESS", "latest"]]


async def test_every_kind_of_entry_is_stored_and_hangs_on_its_story(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    life = one_of_each(story)
    assert {type(body).__name__ for body in life} == set(BODIES)

    await graph.record(batch(story, *life))

    labels = await rows(
        driver,
        "MATCH (s:Case:Story {id: $story})-[:OF|HAS_PLAN|HAS_SUBTASK*1..2]-(n) "
        "RETURN DISTINCT head(labels(n)), count(DISTINCT n)",
        story=story,
    )
    assert dict(labels) == {
        "Decision": 2,
        "Deliberation": 1,
        "AcceptanceTest": 1,
        "Criterion": 1,
        "Event": 14,
        "GateApproval": 1,
        "PhaseTransition": 2,
        "PlanApproval": 1,
        "PlanVersion": 1,
        "Subtask": 2,
        "TaskDispatch": 1,
    }
    [[properties]] = await rows(
        driver, "MATCH (s:Story {id: $story}) RETURN properties(s)", story=story
    )
    assert properties["title"] == "Log in"
    assert properties["description"] == "With a password"
    assert properties["created_at"] == at(0)
    assert properties["created_by"] == "ana"
    assert properties["case_id"] == story
    assert properties["status"] == "CANCELLED"


async def test_a_test_that_is_red_then_green_proves_its_criterion(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    proof = AcceptanceTest(name="t::ac1", criteria=[1], before="error", after="passed")
    other = proof.model_copy(update={"name": "t::ac1_more", "before": "passed"})
    now = Criterion(number=1, text="A wrong password is refused", proved=True, tests=[proof, other])
    earlier = now.model_copy(update={"proved": False, "why": "no test names it", "tests": []})
    fields = {"story_id": story, "repository": "sample", "base": "b" * 40}
    bodies = [
        CriteriaTested(**fields, commit="c" * 40, criteria=[now], timestamp=at(9)),
        CriteriaTested(**fields, commit="d" * 40, criteria=[earlier], timestamp=at(8)),
    ]

    await graph.record(batch(story, *bodies))
    await graph.record(batch(story, *bodies))

    found = await rows(
        driver,
        "MATCH (c:Criterion {story_id: $story}) MATCH (t:AcceptanceTest {story_id: $story}) "
        "RETURN t.name, t.before, t.after, t.commit, t.base, t.criterion, c.proved, c.text, "
        "EXISTS { (t)-[:PROVES]->(c) } ORDER BY t.name",
        story=story,
    )
    same = ["c" * 40, "b" * 40, 1, True, "A wrong password is refused"]
    assert found == [
        ["t::ac1", "error", "passed", *same, True],
        ["t::ac1_more", "passed", "passed", *same, False],
    ]


async def test_statuses_follow_what_happened(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    await graph.record(batch(story, *one_of_each(story)))

    statuses = await rows(
        driver,
        "MATCH (p:PlanVersion {case_id: $story})-[:HAS_SUBTASK]->(t) "
        "RETURN p.status, p.version, t.id, t.status, t.assignee ORDER BY t.id",
        story=story,
    )
    assert statuses == [
        ["COMPLETED", 1, f"{story}-t1", "DONE", "agent-data-2"],
        ["COMPLETED", 1, f"{story}-t2", "DONE", "agent-data-1"],
    ]


async def test_a_batch_stored_again_changes_nothing(
    graph: Graph, driver: neo4j.AsyncDriver, client: Redis, story: str
) -> None:
    life = one_of_each(story)
    await graph.record(batch(story, *life))
    await graph.record_deliberation(deliberation(story))
    before, timeline = await dump(driver, story), await client.xrange(timeline_key(story))

    for first, last in [(0, len(life)), (0, 3), (2, 9), (8, len(life)), (0, len(life))]:
        await graph.record(batch(story, *life[first:last], first=first))
    await graph.record_deliberation(deliberation(story))

    assert await dump(driver, story) == before
    assert await client.xrange(timeline_key(story)) == timeline
    assert await client.xlen(timeline_key(story)) == len(life)


async def test_a_batch_with_a_deliberation_stores_what_both_store_apart(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    apart, together = new_story(), new_story()
    await graph.record_deliberation(deliberation(apart))
    await graph.record(batch(apart, *one_of_each(apart)))
    both = OutcomeBatch.of(batch(together, *one_of_each(together)), deliberation(together))

    await graph.record_outcome(both)
    await graph.record_outcome(both)

    assert await dump(driver, together) == await dump(driver, apart)


async def test_nothing_of_a_batch_is_stored_if_its_deliberation_is_refused(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    record = deliberation(story).model_copy(update={"timestamp": "noon"})
    refused = OutcomeBatch.of(batch(story, *one_of_each(story)), record)

    with pytest.raises(ApplicationError, match="timestamp"):
        await graph.record_outcome(refused)

    assert await rows(driver, "MATCH (s:Story {id: $story}) RETURN s", story=story) == []


@settings(max_examples=5, **AGAINST_A_SERVER)
@given(data=st.data())
async def test_in_any_order_and_cut_the_graph_is_the_same(
    graph: Graph, driver: neo4j.AsyncDriver, data: st.DataObject
) -> None:
    story, other = new_story(), new_story()
    await graph.record(batch(story, *one_of_each(story)))
    await graph.record_deliberation(deliberation(story))
    expected = await dump(driver, story)
    life = list(enumerate(one_of_each(other)))
    steps: list[Any] = [
        *data.draw(st.permutations(life)),
        *data.draw(st.lists(st.sampled_from(life), max_size=6)),
    ]
    steps.insert(data.draw(st.integers(0, len(steps))), None)

    for step in steps:
        if step is None:
            await graph.record_deliberation(deliberation(other))
        else:
            await graph.record(batch(other, step[1], first=step[0]))

    assert await dump(driver, other) == expected


async def test_a_transition_that_comes_late_does_not_overwrite_the_newer_one(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    early = batch(story, moved(story, "DRAFT", "DESIGN", 5), first=0)
    later = batch(story, moved(story, "DESIGN", "BUILD", 6), first=1)

    await graph.record(later)
    await graph.record(early)

    found = await rows(
        driver,
        "MATCH (t:PhaseTransition)-[:OF]->(s:Story {id: $story}) "
        "RETURN s.status, t.to_phase ORDER BY t.timestamp",
        story=story,
    )
    assert found == [["BUILD", "DESIGN"], ["BUILD", "BUILD"]]


async def test_transitions_of_one_instant_keep_the_order_of_their_outbox(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    instant = [moved(story, "DRAFT", "DESIGN", 5), moved(story, "DESIGN", "BUILD", 5)]
    await graph.record(batch(story, *instant))

    await graph.record(batch(story, instant[0]))

    assert await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.status", story=story) == [
        ["BUILD"]
    ]


async def test_times_are_compared_as_times_whatever_their_offset(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    later = moved(story, "DESIGN", "BUILD", 0).model_copy(
        update={"timestamp": "2026-01-01T01:00:00+00:00"}
    )
    early = moved(story, "DRAFT", "DESIGN", 0).model_copy(
        update={"timestamp": "2026-01-01T02:30:00+02:00"}
    )

    await graph.record(batch(story, later))
    await graph.record(batch(story, early, first=1))

    assert await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.status", story=story) == [
        ["BUILD"]
    ]


async def test_writers_at_once_on_one_story_lose_nothing(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    moves = [moved(story, f"P{n}", f"P{n + 1}", n) for n in range(40)]

    await asyncio.gather(
        *(graph.record(batch(story, move, first=n)) for n, move in reversed([*enumerate(moves)])),
        *(graph.record(batch(story, *moves[n : n + 7], first=n)) for n in range(0, 40, 5)),
        *(graph.record_deliberation(deliberation(story)) for _ in range(3)),
    )

    found = await rows(
        driver,
        "MATCH (t:PhaseTransition)-[:OF]->(s:Story {id: $story}) RETURN s.status, count(t)",
        story=story,
    )
    assert found == [["P40", 40]]


@settings(max_examples=25, **AGAINST_A_SERVER)
@given(
    name=st.one_of(
        st.text(min_size=1, max_size=40),
        st.sampled_from(
            [
                "'}) DETACH DELETE n //",
                '"}) MATCH (n) DETACH DELETE n //',
                "`:Admin {x: 1}`",
                "$rows",
                "\\u0027) //",
                "context:*:>",
            ]
        ),
    )
)
async def test_text_from_outside_stays_data(
    graph: Graph, driver: neo4j.AsyncDriver, client: Redis, name: str
) -> None:
    story = f"{new_story()}{name}"
    labels = await rows(driver, "CALL db.labels() YIELD label RETURN label ORDER BY label")
    added = ContextDecisionAdded(
        story_id=story,
        decision_id=name,
        title=name,
        rationale=name,
        decided_by=name,
        timestamp=at(1),
    )

    await graph.record(batch(story, spec(story, title=name), added))

    found = await rows(
        driver,
        "MATCH (d:Decision {id: $name})-[:OF]->(s:Story {id: $story}) RETURN s.title, d.title",
        name=name,
        story=story,
    )
    assert found == [[name, name]]
    now = await rows(driver, "CALL db.labels() YIELD label RETURN label ORDER BY label")
    assert set(map(str, labels)) <= set(map(str, now))
    assert not {"Admin"} & {label for [label] in now}
    assert await client.xlen(timeline_key(story)) == 2


async def test_a_message_before_its_story_waits_for_it(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    await graph.record(
        batch(story, PlanApproved(story_id=story, plan_id="p", approved_by="bo", timestamp=at(1)))
    )
    statement = (
        "MATCH (a:PlanApproval)-[:OF]->(s:Case:Story {id: $story}) "
        "RETURN a.approved_by, s.status, s.title"
    )
    assert await rows(driver, statement, story=story) == [["bo", "UNKNOWN", None]]

    await graph.record(batch(story, spec(story), first=1))

    assert await rows(driver, statement, story=story) == [["bo", "DRAFT", "Log in"]]


async def test_two_stories_may_have_a_plan_of_one_name(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    one, two = new_story(), new_story()
    await graph.record(batch(one, plan(one)))

    await graph.record(
        batch(two, PlanApproved(story_id=two, plan_id="plan-1", approved_by="b", timestamp=at(1)))
    )

    statuses = await rows(
        driver,
        "MATCH (p:PlanVersion {id: 'plan-1'}) WHERE p.case_id IN $stories "
        "RETURN p.case_id, p.status",
        stories=[one, two],
    )
    assert dict(statuses) == {one: "DRAFT", two: "APPROVED"}


async def test_an_amended_text_is_not_undone_by_the_older_one(
    graph: Graph, driver: neo4j.AsyncDriver, client: Redis, story: str
) -> None:
    await graph.record(batch(story, spec(story, "New", second=9), first=4))

    await graph.record(batch(story, spec(story, "Old", second=1)))
    await graph.record(batch(story, spec(story, "New", second=9), first=4))

    found = await rows(
        driver, "MATCH (s:Story {id: $story}) RETURN s.title, s.created_at", story=story
    )
    assert found == [["New", at(1)]]
    kept = yaml.safe_load(await client.get(spec_key(story)) or b"")
    assert (kept["title"], kept["acceptance_criteria"]) == ("New", ["A wrong password is refused"])


async def test_a_draft_plan_is_in_the_cache(graph: Graph, client: Redis, story: str) -> None:
    await graph.record(batch(story, plan(story)))

    kept = yaml.safe_load(await client.get(draft_key(story)) or b"")

    assert [task["title"] for task in kept["tasks"]] == ["The schema", "The form"]


async def test_entries_without_a_story_are_kept(graph: Graph, driver: neo4j.AsyncDriver) -> None:
    task_id = new_story()
    started = DeliberationStarted(task_id=task_id, role="DEV", timestamp=at(1))

    await graph.record(
        RecordBatch(
            owner=task_id,
            owner_started_ms=1,
            first=0,
            entries=[
                Entry(
                    id=f"{task_id}/0",
                    kind="DeliberationStarted",
                    source=task_id,
                    time=at(1),
                    body=started.model_dump(),
                )
            ],
        )
    )

    found = await rows(
        driver, "MATCH (e:Event {id: $id}) RETURN e.case_id, COUNT { (e)--() }", id=f"{task_id}/0"
    )
    assert found == [["", 0]]


async def test_an_empty_batch_writes_nothing(graph: Graph) -> None:
    await graph.record(RecordBatch(owner="o", owner_started_ms=1, first=0, entries=[]))


# --- refusals -------------------------------------------------------------------------------------


async def test_an_invalid_request_is_refused_with_the_field_and_nothing_is_half_stored(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    good = moved(story, "DRAFT", "DESIGN", 1)
    wrong = batch(story, good, good)
    entries: dict[str, Any] = {
        "from_phase": {"kind": "StoryTransitioned", "body": {"timestamp": at(1)}},
        "timestamp": {"body": good.model_dump() | {"timestamp": "yesterday"}},
        "timestamp: '0001": {
            "body": good.model_dump() | {"timestamp": "0001-01-01T00:00:00+05:00"}
        },
        "story_id": {"story_id": "", "kind": "StorySpec", "body": spec("").model_dump()},
        "id": {"id": "i" * 3000},
    }

    for field, changes in entries.items():
        entry = wrong.entries[1].model_copy(update=changes)
        with refused("InvalidEntry", retryable=False) as caught:
            await graph.record(wrong.model_copy(update={"entries": [wrong.entries[0], entry]}))
        assert field in caught.value.message

    assert await dump(driver, story) == []


async def test_an_unknown_kind_of_entry_waits_for_a_newer_worker(graph: Graph, story: str) -> None:
    newer = batch(story, moved(story, "DRAFT", "DESIGN", 1))
    entry = newer.entries[0].model_copy(update={"kind": "StoryPainted"})

    with refused("UnknownKind", retryable=True):
        await graph.record(newer.model_copy(update={"entries": [entry]}))


async def test_an_unavailable_store_is_distinguished_from_failed_authentication(
    graph: Graph, client: Redis, neo4j_server: RunningServer, story: str
) -> None:
    scopes = load_scopes(CONFIG / "scopes.yaml")
    events = batch(story, moved(story, "DRAFT", "DESIGN", 1))
    unreachable = neo4j.AsyncGraphDatabase.driver(
        "bolt://127.0.0.1:1", max_transaction_retry_time=0
    )
    stranger = neo4j.AsyncGraphDatabase.driver(neo4j_server.address, auth=("neo4j", "wrong"))

    async with unreachable, stranger:
        with refused("GraphUnavailable", retryable=True):
            await Graph(unreachable, Cache(client), scopes).record(events)
        with refused("GraphCredentials", retryable=True) as caught:
            await Graph(stranger, Cache(client), scopes).record(events)

    assert "NEO4J_PASSWORD" in caught.value.message
    assert "wrong" not in caught.value.message


async def test_a_cache_that_is_away_fails_the_activity_until_it_is_back(
    graph: Graph, driver: neo4j.AsyncDriver, client: Redis, story: str
) -> None:
    events = batch(story, moved(story, "DRAFT", "DESIGN", 1))
    unreachable = Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))

    with refused("CacheUnavailable", retryable=True):
        await Graph(driver, Cache(unreachable), load_scopes(CONFIG / "scopes.yaml")).record(events)
    await graph.record(events)

    assert await client.xlen(timeline_key(story)) == 1
    await unreachable.aclose()


# --- deliberations --------------------------------------------------------------------------------


async def test_a_decision_shows_its_proposer_its_critiques_and_its_checks(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    await graph.record(batch(story, spec(story), plan(story)))
    await graph.record_deliberation(deliberation(story))

    [[decision, proposal, agent, critiques, checks]] = await rows(
        driver,
        """
        MATCH (:PlanVersion {id: 'plan-1', case_id: $story})-[:CONTAINS_DECISION]->(d:Decision),
              (s:Story {id: $story})<-[:OF]-(d)-[:FROM]->(p:Proposal)-[:BY]->(a:Agent),
              (p)-[:OF]->(s)
        WHERE d.title = 'One table'
        RETURN properties(d), properties(p), a.id,
               COLLECT {
                 MATCH (c:Critique)-[:OF]->(p) RETURN c.verdict + ' ' + c.id ORDER BY c.id
               },
               COLLECT { MATCH (c:Check)-[:OF]->(p) RETURN c.name + ' ' + c.outcome }
        """,
        story=story,
    )
    assert decision["rationale"] == "Enough"
    assert (decision["decided_by"], decision["decided_at"]) == ("agent-data-1", at(6))
    assert decision["status"] == "ACCEPTED"
    assert (proposal["model"], proposal["prompt_hash"]) == ("smol", "f00d")
    assert (proposal["rank"], proposal["revision"], proposal["judged"]) == (1, 1, "clearer")
    assert agent == "agent-data-1"
    assert critiques == [
        f"revise {story}-p1/critique/agent-data-3",
        f"accept {story}-p1/critique/agent-data-3/2",
    ]
    assert checks == ["lint passed"]


@pytest.mark.parametrize("plan_first", [True, False])
async def test_a_decision_is_linked_to_named_entities_in_any_order_of_arrival(
    graph: Graph, driver: neo4j.AsyncDriver, story: str, plan_first: bool
) -> None:
    if plan_first:
        await graph.record(batch(story, plan(story)))
    await graph.record_deliberation(deliberation(story, plan_id=""))
    if not plan_first:
        await graph.record(batch(story, plan(story)))

    links = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story})-[r:AFFECTS|DEPENDS_ON]->(n) "
        "RETURN d.title, type(r), n.title ORDER BY d.title, n.title",
        story=story,
    )
    assert links == [
        ["An index", "DEPENDS_ON", "One table"],
        ["One table", "AFFECTS", "The form"],
        ["One table", "AFFECTS", "The schema"],
    ]


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
async def test_decisions_of_two_deliberations_are_linked_whichever_came_first(
    graph: Graph, driver: neo4j.AsyncDriver, story: str, order: list[int]
) -> None:
    whole = deliberation(story, plan_id="")

    for number in order:
        await graph.record_deliberation(
            whole.model_copy(update={"decisions": [whole.decisions[number]]})
        )

    links = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story})-[:DEPENDS_ON]->(o) RETURN d.title, o.title",
        story=story,
    )
    assert links == [["An index", "One table"]]


def council(story: str, task: str, number: int, **changes: Any) -> DeliberationRecord:
    """Return the record of a run of a task's council, with one decision."""
    record = deliberation(story)
    ranked = [
        each.model_copy(update={"proposal_id": f"{task}-{number}-p{each.rank}"})
        for each in record.ranked
    ]
    decision = record.decisions[0].model_copy(
        update={"id": f"{task}-{number}-d1", "title": f"{task} {number}", "affects": []}
    )
    return record.model_copy(
        update={
            "task_id": task,
            "deliberation_id": f"deliberation-{task}",
            "run_id": f"run-{number}",
            "ranked": ranked,
            "decisions": [decision],
            "timestamp": at(10 + number),
        }
        | changes
    )


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [0, 1, 0]])
async def test_decisions_of_a_council_that_was_tried_again_are_superseded(
    graph: Graph, driver: neo4j.AsyncDriver, story: str, order: list[int]
) -> None:
    design = {"phase": "DESIGN", "plan_id": ""}
    tries = [
        [council(story, f"{story}-plan-1-t1", n, plan_id="plan-1") for n in (1, 2)],
        [council(story, f"{story}-design-{n}", n, **design) for n in (1, 2)],
    ]
    others = [
        council(story, f"{story}-plan-1-t10", 1, plan_id="plan-1"),
        council(story, f"{story}-docs-1", 1, phase="DOCS", plan_id=""),
        council(story, f"{story}-asked", 1, **design),
    ]
    for record in others:
        await graph.record_deliberation(record)
    for number in order:
        for records in tries:
            await graph.record_deliberation(records[number])

    found = await rows(
        driver, "MATCH (d:Decision {case_id: $story}) RETURN d.title, d.status", story=story
    )
    statuses = {title.removeprefix(f"{story}-"): status for title, status in found}
    assert statuses == {
        "plan-1-t1 1": "SUPERSEDED",
        "plan-1-t1 2": "ACCEPTED",
        "design-1 1": "SUPERSEDED",
        "design-2 2": "ACCEPTED",
        "plan-1-t10 1": "ACCEPTED",
        "docs-1 1": "ACCEPTED",
        "asked 1": "ACCEPTED",
    }
    await graph.record(batch(story, spec(story)))
    query = PackQuery(story_id=story, role="ARCHITECT", phase="DOCS", subtask_id="")
    pack = str(await graph.build_pack(query))
    assert "design-2 2" in pack
    assert "design-1 1" not in pack
    assert "plan-1-t1 1" not in pack


async def test_a_decision_that_a_person_has_taken_over_is_not_superseded(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    first, second = (
        council(story, f"{story}-design-{n}", n, phase="DESIGN", plan_id="") for n in (1, 2)
    )
    await graph.record_deliberation(first)
    await rows(
        driver,
        "MATCH (d:Decision {case_id: $story}) SET d.recorded_by = 'ana' RETURN d.id",
        story=story,
    )

    await graph.record_deliberation(second)

    found = await rows(
        driver, "MATCH (d:Decision {case_id: $story}) RETURN DISTINCT d.status", story=story
    )
    assert found == [["ACCEPTED"]]


async def test_a_deliberation_without_a_story_keeps_its_decisions(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    name = new_story()
    record = deliberation(name, plan_id="").model_copy(update={"story_id": ""})

    await graph.record_deliberation(record)

    found = await rows(
        driver,
        "MATCH (d:Decision)-[:FROM]->(p:Proposal) WHERE d.id STARTS WITH $name "
        "RETURN d.case_id, COUNT { (p)-[:OF]->(:Story) } ORDER BY d.id",
        name=name,
    )
    assert found == [["", 0], ["", 0]]


# --- plans ----------------------------------------------------------------------------------------


async def test_a_plan_is_read_back_as_it_was_derived(graph: Graph, story: str) -> None:
    await graph.record(batch(story, spec(story), plan(story)))

    stored = await graph.load_plan(PlanQuery(story_id=story, plan_id="plan-1"))

    assert stored.tasks == plan(story).tasks
    assert stored.story is None


async def test_a_plan_without_tasks_gives_its_storys_text_and_an_unknown_story_nothing(
    graph: Graph, story: str
) -> None:
    approved = PlanApproved(story_id=story, plan_id="plan-1", approved_by="bo", timestamp=at(1))
    await graph.record(batch(story, approved))
    query = PlanQuery(story_id=story, plan_id="plan-1")
    before = await graph.load_plan(query)

    await graph.record(batch(story, spec(story), first=1))

    assert (before.tasks, before.story) == ([], None)
    assert (await graph.load_plan(query)).story == StoryText(
        title="Log in",
        brief="With a password",
        acceptance_criteria=["A wrong password is refused"],
    )


# --- councils -------------------------------------------------------------------------------------


@pytest.fixture
async def councils(driver: neo4j.AsyncDriver) -> AsyncIterator[None]:
    """Seed the councils of deploy/config as at a first start, before and after the test."""

    async def begin() -> None:
        await rows(driver, "MATCH (c:Council) DETACH DELETE c")
        await asyncio.gather(*(seed_councils(driver, CONFIG / "councils.yaml") for _ in range(4)))

    await begin()
    yield
    await begin()


@pytest.mark.usefixtures("councils")
async def test_a_council_is_gathered_with_its_context_pack(graph: Graph) -> None:
    council, pack = CouncilQuery(role="DEV"), PackQuery(story_id="", role="DEV", phase="BUILD")

    gathered = await graph.gather(GatherInput(council=council, pack=pack))

    assert gathered.council == await graph.load_council(council)
    assert gathered.pack == await graph.keep_pack(pack)
    unknown = council.model_copy(update={"role": "COOK"})
    with refused("UnknownCouncil", retryable=False):
        await graph.gather(GatherInput(council=unknown, pack=pack))


@pytest.mark.usefixtures("councils")
async def test_a_council_has_its_first_agents_and_a_judge_from_outside(graph: Graph) -> None:
    council = await graph.load_council(CouncilQuery(role="DEV", size=2))

    assert [agent.agent_id for agent in council.agents] == ["agent-dev-1", "agent-dev-2"]
    assert {agent.agent_type for agent in council.agents} == {"RAY_VLLM"}
    assert len({agent.persona for agent in council.agents}) == 2
    assert council.judge is not None
    assert council.judge.agent_id == "agent-architect-1"
    assert council.roles == ["ARCHITECT", "DATA", "DEV", "DEVOPS", "QA"]


@pytest.mark.usefixtures("councils")
async def test_architects_are_judged_by_an_agent_outside_the_council(graph: Graph) -> None:
    two = await graph.load_council(CouncilQuery(role="ARCHITECT", size=2))
    all_of_them = await graph.load_council(CouncilQuery(role="ARCHITECT"))

    assert two.judge is not None
    assert two.judge.agent_id == "agent-architect-3"
    assert len(all_of_them.agents) == 3
    assert all_of_them.judge == all_of_them.agents[0]


@pytest.mark.usefixtures("councils")
async def test_an_unknown_or_too_small_council_is_refused(graph: Graph) -> None:
    with refused("UnknownCouncil", retryable=False) as unknown:
        await graph.load_council(CouncilQuery(role="COOK"))
    with refused("CouncilTooSmall", retryable=False) as small:
        await graph.load_council(CouncilQuery(role="QA", size=4))

    assert "ARCHITECT, DATA, DEV, DEVOPS, QA" in unknown.value.message
    assert "3 agents, 4 were asked for" in small.value.message


@pytest.mark.usefixtures("councils")
async def test_a_start_never_undoes_what_operators_changed(
    graph: Graph, driver: neo4j.AsyncDriver
) -> None:
    await rows(
        driver,
        "MATCH (:Council {role: 'DEV'})-[r:HAS_AGENT]->(a:Agent {id: 'agent-dev-1'}) DELETE r "
        "WITH 1 AS done MATCH (a:Agent {id: 'agent-dev-2'}) SET a.model = 'tuned'",
    )

    await seed_councils(driver, CONFIG / "councils.yaml")

    council = await graph.load_council(CouncilQuery(role="DEV"))
    assert [(agent.agent_id, agent.model) for agent in council.agents] == [
        ("agent-dev-2", "tuned"),
        ("agent-dev-3", ""),
    ]


@pytest.mark.usefixtures("councils")
@pytest.mark.parametrize("agent_type", ["MOCK", "mock", " Mock "])
async def test_a_mock_agent_in_the_graph_is_refused(
    graph: Graph, driver: neo4j.AsyncDriver, agent_type: str
) -> None:
    await rows(
        driver, "MATCH (a:Agent {id: 'agent-qa-2'}) SET a.agent_type = $type", type=agent_type
    )

    with refused("MockAgent", retryable=False) as caught:
        await graph.load_council(CouncilQuery(role="QA"))

    assert caught.value.message == "Mock agents not allowed in production"


async def test_agents_without_a_type_are_of_the_fleet(
    driver: neo4j.AsyncDriver, tmp_path: Path
) -> None:
    file = tmp_path / "councils.yaml"
    agents = [
        {"agent_id": "agent-type-1", "persona": "p"},
        {"agent_id": "agent-type-2", "persona": "p", "agent_type": "RAY_VLLM"},
    ]
    file.write_text(yaml.safe_dump({"councils": {"TYPED": agents}}))

    await seed_councils(driver, file, "VLLM")

    found = await rows(
        driver,
        "MATCH (:Council {role: 'TYPED'})-[:HAS_AGENT]->(a) RETURN a.agent_type ORDER BY a.id",
    )
    await rows(driver, "MATCH (c:Council {role: 'TYPED'}) DETACH DELETE c")
    assert found == [["VLLM"], ["RAY_VLLM"]]


@pytest.mark.parametrize(
    ("seat", "kind", "message"),
    [
        ({"agent_type": "mock"}, "MockAgent", "Mock agents not allowed in production"),
        ({"agent_type": "GPT"}, "InvalidConfig", "councils.DEV.0.agent_type"),
        ({"colour": "red"}, "InvalidConfig", "councils.DEV.0.colour: unknown field"),
        ({"agent_id": "a  b"}, "InvalidConfig", "councils.DEV.0.agent_id: must match"),
        ({"persona": ""}, "InvalidConfig", "councils.DEV.0.persona"),
    ],
)
async def test_a_wrong_councils_file_is_refused_with_its_field(
    driver: neo4j.AsyncDriver, tmp_path: Path, seat: dict[str, str], kind: str, message: str
) -> None:
    file = tmp_path / "councils.yaml"
    agent = {"agent_id": "a", "persona": "p"} | seat
    file.write_text(yaml.safe_dump({"councils": {"DEV": [agent]}}))

    with refused(kind, retryable=False) as caught:
        await seed_councils(driver, file)

    assert message in caught.value.message


async def test_an_agent_of_two_councils_a_wrong_role_and_no_file_are_refused(
    driver: neo4j.AsyncDriver, tmp_path: Path
) -> None:
    file = tmp_path / "councils.yaml"
    agent = {"agent_id": "a", "persona": "p"}

    for councils, message in [
        ({"DEV": [agent], "QA": [agent]}, "an agent may be listed once"),
        ({"dev": [agent]}, "must match"),
    ]:
        file.write_text(yaml.safe_dump({"councils": councils}))
        with refused("InvalidConfig", retryable=False) as caught:
            await seed_councils(driver, file)
        assert message in caught.value.message
    with refused("InvalidConfig", retryable=False) as caught:
        await seed_councils(driver, tmp_path / "none.yaml")
    assert "none.yaml" in caught.value.message


# --- schema ---------------------------------------------------------------------------------------


async def test_every_id_is_unique(driver: neo4j.AsyncDriver) -> None:
    constraints = await rows(
        driver, "SHOW CONSTRAINTS YIELD labelsOrTypes, properties, type RETURN *"
    )

    unique = {labels[0]: properties for labels, properties, _ in constraints}
    alone = ["Case", "Story", "PhaseTransition", "PlanApproval", "GateApproval", "TaskDispatch"]
    alone += ["Proposal", "Critique", "Check", "Agent", "ContextUpdate", "Deliberation", "Received"]
    alone += ["Change", "Report", "Criterion", "AcceptanceTest"]
    assert unique == (
        {label: ["id"] for label in alone}
        | {label: ["case_id", "id"] for label in ("PlanVersion", "Subtask", "Decision", "Event")}
        | {"Council": ["role"], "Migration": ["version"]}
        | {"DecisionRevision": ["case_id", "decision_id", "order"]}
    )
    assert {kind for *_, kind in constraints} == {"UNIQUENESS"}


# --- ids of messages ------------------------------------------------------------------------------


async def test_the_identities_of_messages_are_kept_while_a_stream_may_hold_them(
    graph: Graph, driver: neo4j.AsyncDriver, story: str
) -> None:
    claims = [Claim(f"{story}-{number}", "content", story, at(0)) for number in range(5)]
    assert await graph.claim(claims) == []
    day_ms = 86_400_000
    await rows(
        driver,
        "MATCH (n:Received {story_id: $story}) WITH n, toInteger(right(n.id, 1)) AS number "
        "SET n.received_ms = timestamp() - (58 + number) * $day",
        story=story,
        day=day_ms,
    )

    gone = await graph.forget_received(RECEIVED_FOR)

    assert gone == 3
    left = await rows(
        driver, "MATCH (n:Received {story_id: $story}) RETURN n.id ORDER BY n.id", story=story
    )
    assert left == [[f"{story}-0"], [f"{story}-1"]]
    again = [claim._replace(content="another") for claim in claims]
    assert [each.id for each in await graph.claim(again)] == [f"{story}-0", f"{story}-1"]
    assert await graph.forget_received(RECEIVED_FOR) == 0
