"""The mirror in failure cases: NATS unavailable, streams lost, stories terminated or reset."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowExecutionStatus, WorkflowHandle
from temporalio.contrib.pydantic import pydantic_data_converter

from tests.chaos.conftest import TIME_LIMIT
from tests.support.checker import Published, read_graph, read_streams
from tests.support.contract import described, everything, faults
from tests.support.llm_server import LlmServer
from tests.support.polling import WITHIN_S, until
from tests.support.site import GOOD_REPORT, Site
from workers.environment import ROOT
from workflows.models.story import Approve, StoryView
from workflows.search_attributes import PENDING_GATE, STORY_STATE

pytestmark = TIME_LIMIT


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with (
        LlmServer() as engine,
        Site(tmp_path_factory.mktemp("site"), engine.url) as site,
    ):
        yield site


async def fleet(site: Site, *arguments: str) -> tuple[int, str, str]:
    """Run the CLI; return its exit code, stdout and stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "workers.cli", *arguments,
        env=site.env | {"FLEET_HOME": str(site.home), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), WITHIN_S)
    return process.returncode or 0, out.decode(), err.decode()


async def replayed(site: Site, story_id: str, *options: str) -> dict[str, Any]:
    code, out, err = await fleet(site, "mirror", "replay", story_id, "--json", *options)
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


def count(answer: dict[str, Any], what: str) -> int:
    return sum(stream[what] for stream in answer["streams"])


async def story_at(site: Site, story_id: str, state: str = "", gate: str = "") -> None:
    key, value = (STORY_STATE, state) if state else (PENDING_GATE, gate)
    await until(lambda: site.attribute(story_id, key), lambda found: found == value)


async def on_streams(site: Site, story_id: str) -> list[Published]:
    async with site.clients() as (connection, _):
        return [each for each in await read_streams(connection) if each.story_id == story_id]


async def lacking_in_the_graph(site: Site, story_id: str, messages: Iterable[Published]) -> Any:
    """Return the ids of the events that were published but are not in the graph."""
    async with site.clients() as (_, driver):
        nodes = (await read_graph(driver, story_id)).nodes
    return [each.event.id for each in messages if each.event.node not in nodes]


async def without_streams(site: Site, *names: str) -> None:
    async with site.clients() as (connection, _):
        for name in names:
            await connection.jetstream().delete_stream(name)


async def given_to(site: Site, handle: WorkflowHandle[Any, Any], name: str) -> list[dict[str, Any]]:
    """Return the entries that a run's history passed to an activity or `announce`, each id once."""
    history = await handle.fetch_history()
    entries: dict[str, dict[str, Any]] = {}
    for event in history.events:
        scheduled = event.activity_task_scheduled_event_attributes
        if scheduled.activity_type.name in (name, "announce"):
            (batch,) = await pydantic_data_converter.decode(scheduled.input.payloads)
            entries |= {entry["id"]: entry for entry in batch["entries"]}
    return list(entries.values())


# --- NATS unavailable -----------------------------------------------------------------------------


async def test_nats_may_be_away_for_a_whole_story(site: Site) -> None:
    await site.stop("nats")
    handle = await site.begin("US-away")
    await story_at(site, "US-away", state="BUILD")
    await handle.execute_update("report", GOOD_REPORT, id="report", result_type=StoryView)
    await story_at(site, "US-away", state="DONE")
    description = await handle.describe()

    # All its work is done; it keeps running because its outbox is not empty.
    assert description.status is WorkflowExecutionStatus.RUNNING
    await site.start("nats")
    result = await site.patient(handle.result)

    assert result["state"] == "DONE"
    assert await site.differences("US-away") == []


# --- lost streams ---------------------------------------------------------------------------------


async def test_streams_that_were_deleted_are_rebuilt_with_the_same_events(site: Site) -> None:
    await site.begin("US-lost")
    assert await site.finish("US-lost") == "DONE"
    before = await on_streams(site, "US-lost")
    assert await site.differences("US-lost") == []

    nothing = await replayed(site, "US-lost")
    all_again = await replayed(site, "US-lost", "--all")
    await without_streams(site, "PLANNING_EVENTS", "CONTEXT")
    rebuilt = await replayed(site, "US-lost")
    again = await replayed(site, "US-lost")
    after = await on_streams(site, "US-lost")

    assert [each.event for each in after] == [each.event for each in before]
    assert await site.differences("US-lost") == []
    assert (count(nothing, "published"), count(nothing, "known")) == (0, len(before))
    assert (count(all_again, "published"), count(all_again, "known")) == (0, len(before))
    assert (count(again, "published"), count(again, "known")) == (0, len(before))
    assert {each["stream"]: each["known"] for each in rebuilt["streams"]} == {
        "CONTEXT": 0,
        "ORCHESTRATOR_EVENTS": sum(each.stream == "ORCHESTRATOR_EVENTS" for each in before),
        "PLANNING_EVENTS": 0,
    }
    assert count(rebuilt, "published") + count(rebuilt, "known") == count(rebuilt, "events")
    assert (rebuilt["recorded"], rebuilt["unanswered"]) == (0, [])


async def test_a_plan_that_no_story_started_and_its_deliberations_are_replayed_too(
    site: Site,
) -> None:
    tasks = [
        {"task_id": f"US-bus-t{n}", "role": "DEV", "title": "Undo", "description": "Undo it."}
        for n in (1, 2)
    ]
    await site.client.execute_workflow(
        "PlanWorkflow",
        {"story_id": "US-bus", "plan_id": "p1", "tasks": tasks},
        id="plan-US-bus-p1",
        task_queue="story",
    )
    before = await on_streams(site, "US-bus")

    await without_streams(site, "ORCHESTRATOR_EVENTS", "CONTEXT")
    answer = await replayed(site, "US-bus")
    after = await on_streams(site, "US-bus")

    assert answer["runs"] == 3
    assert subjects(after)["orchestration.deliberation.completed"] == 2
    assert sorted(map(by_id, after)) == sorted(map(by_id, before))


def by_id(message: Published) -> tuple[str, str, str]:
    return message.event.id, message.event.subject, json.dumps(message.event.body, sort_keys=True)


async def test_an_event_that_was_deleted_is_put_back_once_its_stream_has_forgotten_it(
    site: Site,
) -> None:
    await site.begin("US-window")
    assert await site.finish("US-window") == "DONE"
    async with site.clients() as (connection, _):
        jetstream = connection.jetstream()
        lost = next(
            each
            for each in await on_streams(site, "US-window")
            if each.event.subject == "planning.story.transitioned"
        )
        await jetstream.delete_msg(lost.stream, lost.sequence)

        suppressed_by_dedup = await replayed(site, "US-window")
        _, output, _ = await fleet(site, "mirror", "replay", "US-window")
        info = await jetstream.stream_info(lost.stream)
        await jetstream.update_stream(info.config.evolve(duplicate_window=0.1))
        await asyncio.sleep(1)
        # The command restores the duplicate window.
        put_back = await replayed(site, "US-window")
        restored = (await jetstream.stream_info(lost.stream)).config.duplicate_window

    assert (
        count(suppressed_by_dedup, "published"),
        count(suppressed_by_dedup, "suppressed_by_dedup"),
    ) == (0, 1)
    assert "still knows their ids" in output
    assert (count(put_back, "published"), count(put_back, "suppressed_by_dedup")) == (1, 0)
    assert restored == 3600
    ids = Counter(each.event.id for each in await on_streams(site, "US-window"))
    assert ids[lost.event.id] == 1
    assert set(ids.values()) == {1}


async def test_a_story_that_is_unknown_is_refused_with_the_remedy(site: Site) -> None:
    unknown = await fleet(site, "mirror", "replay", "US-nobody")
    malformed = await fleet(site, "mirror", "replay", "US *")

    assert (unknown[0], unknown[1], malformed[0]) == (1, "", 1)
    assert "There is no story US-nobody" in unknown[2]
    assert "`fleet list --all` lists those there are" in unknown[2]
    assert "is not a story id" in malformed[2]


# --- a lost graph ---------------------------------------------------------------------------------

GRAPH = """
MATCH (n) WHERE NOT n:Migration
RETURN labels(n) AS labels, n {.*} AS node,
  COLLECT { MATCH (n)-[r]->(m) RETURN [type(r), labels(m), m.id, m.case_id, r {.*}] } AS links
"""


async def whole_graph(site: Site) -> list[str]:
    """Return every node with its properties and relationships, each as a text."""
    async with site.clients() as (_, driver):
        rows, _, _ = await driver.execute_query(GRAPH)
    nodes = [
        {"labels": sorted(row["labels"]), "node": row["node"]}
        | {"links": sorted(row["links"], key=lambda link: json.dumps(link, sort_keys=True))}
        for row in rows
    ]
    return sorted(json.dumps(node, sort_keys=True, default=str) for node in nodes)


async def timelines(site: Site) -> dict[str, list[str]]:
    """Map each story's timeline key to the ids of its events, in order."""
    async with site.valkey_client() as valkey:
        keys = [key async for key in valkey.scan_iter("swe:case:*:planning:stream")]
        found: dict[str, Any] = {key: await valkey.xrange(key) for key in sorted(keys)}
    return {key: [line["id"] for _, line in lines] for key, lines in found.items()}


async def rebuilt(site: Site, *arguments: str) -> dict[str, Any]:
    code, out, err = await fleet(site, "graph", "rebuild", "--json", *arguments)
    assert (code, err) == (0, ""), f"{out} {err}"
    return {each["story_id"]: each for each in json.loads(out)}


async def other_workflows_of(site: Site, story_id: str) -> None:
    """Run a context update, a plan derivation, and councils that are not named after the story."""
    change = {
        "operation": "CREATE",
        "entity_type": "DECISION",
        "entity_id": "D-7",
        "payload": json.dumps({"title": "No cookies", "rationale": "the law"}),
    }
    update = {"story_id": story_id, "actor": "ana", "changes": [change]}
    plan = {"story_id": story_id, "plan_id": f"{story_id}-other", "announce": True}
    council = {"story_id": story_id, "task_id": "t-elsewhere", "role": "QA", "description": "Look."}
    alone = {"task_id": "t-alone", "role": "QA", "description": "Look."}
    for kind, workflow_id, request in (
        ("ContextUpdateWorkflow", f"context-{story_id}-1", update),
        ("DerivationWorkflow", f"derivation-{story_id}-{story_id}-other", plan),
        ("DeliberationWorkflow", "deliberation-t-elsewhere", council),
        ("DeliberationWorkflow", "deliberation-t-alone", alone),
    ):
        await site.client.execute_workflow(kind, request, id=workflow_id, task_queue="story")


async def test_a_graph_and_timelines_that_were_lost_are_rebuilt_from_the_histories(
    site: Site,
) -> None:
    await site.begin("US-graph")
    assert await site.finish("US-graph") == "DONE"
    await other_workflows_of(site, "US-graph")
    open_story = await site.begin("US-open", approvals="human")
    await story_at(site, "US-open", gate="approve_scope")
    await settled(site, open_story)
    graph, lines = await whole_graph(site), await timelines(site)
    on_bus = await on_streams(site, "US-graph")
    replay = await replayed(site, "US-graph")

    async with site.clients() as (_, driver):
        await driver.execute_query(
            "MATCH (n) WHERE n.story_id = 'US-graph' OR n.case_id = 'US-graph' "
            "OPTIONAL MATCH (part:Critique|Check)-[:OF]->(n) DETACH DELETE part, n"
        )
        assert len(await whole_graph(site)) < len(graph)
        one = await rebuilt(site, "US-graph")
        assert await whole_graph(site) == graph
        await driver.execute_query(
            "MATCH (n) WHERE NOT n:Migration AND NOT n:Council AND NOT n:Agent DETACH DELETE n"
        )
    async with site.valkey_client() as valkey:
        for key in lines:
            await valkey.delete(key)
    everything_again = await rebuilt(site)
    after = await whole_graph(site), await timelines(site)
    await rebuilt(site)
    repeated = await whole_graph(site), await timelines(site)

    assert one["US-graph"]["writes"] == everything_again["US-graph"]["writes"] > 0
    assert {"", "US-graph", "US-open"} <= set(everything_again)
    assert sorted({*after[0]} ^ {*graph}) == []  # only the differences are shown
    assert after == (graph, lines)
    assert (count(replay, "events"), count(replay, "published")) == (len(on_bus), 0)
    assert sorted({*repeated[0]} ^ {*after[0]}) == []
    assert repeated == after
    code, _, err = await fleet(site, "graph", "rebuild", "US-nobody")
    assert (code, "There is no story US-nobody" in err) == (1, True)
    await open_story.terminate("enough")


# --- stories that end before their outbox is empty ------------------------------------------------


async def test_what_a_terminated_story_had_recorded_and_not_published_is_published(
    site: Site,
) -> None:
    await site.stop("nats")
    handle = await site.begin("US-ended", approvals="human")
    await story_at(site, "US-ended", gate="approve_scope")

    async def recorded() -> list[dict[str, Any]]:
        return [e for e in await given_to(site, handle, "record") if e["subject"]]

    entries = await until(recorded, lambda entries: len(entries) >= 3)
    await handle.terminate("a test")
    await site.start("nats")

    first = await replayed(site, "US-ended")
    again = await replayed(site, "US-ended")
    there = await on_streams(site, "US-ended")

    assert {each.event.id for each in there} >= {entry["id"] for entry in entries}
    assert {each.event.subject for each in there} >= {
        "planning.story.created",
        "planning.gate.opened",
    }
    assert set(Counter(each.event.id for each in there).values()) == {1}
    assert await lacking_in_the_graph(site, "US-ended", there) == []
    assert count(first, "published") + count(first, "known") == len(there)
    assert (count(again, "published"), again["recorded"]) == (0, first["recorded"])


async def test_what_a_terminated_story_had_not_even_recorded_is_recorded_and_then_published(
    site: Site,
) -> None:
    await site.stop("nats", "neo4j")
    handle = await site.begin("US-unrecorded", approvals="human")
    await story_at(site, "US-unrecorded", gate="approve_scope")
    await handle.terminate("a test")
    await site.start("neo4j", "nats")
    recorded = [e["id"] for e in await given_to(site, handle, "record") if e["subject"]]

    answer = await replayed(site, "US-unrecorded")
    there = await on_streams(site, "US-unrecorded")

    # Also the entries behind the first batch, which was under way.
    assert len(there) > len(recorded) > 0
    assert answer["recorded"] >= len(there)
    assert answer["unanswered"] == []
    assert "planning.gate.opened" in {each.event.subject for each in there}
    assert set(Counter(each.event.id for each in there).values()) == {1}
    assert await lacking_in_the_graph(site, "US-unrecorded", there) == []


# --- stories that are reset -----------------------------------------------------------------------


async def reset(site: Site, handle: WorkflowHandle[Any, Any], event_id: int) -> Any:
    """Reset to a workflow task; return the handle of the new run."""
    description = await handle.describe()
    answer = await site.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace="default",
            workflow_execution=WorkflowExecution(workflow_id=handle.id, run_id=description.run_id),
            reason="a test",
            workflow_task_finish_event_id=event_id,
            request_id=f"{handle.id}-{event_id}-{description.run_id}",
        )
    )
    return site.client.get_workflow_handle(handle.id, run_id=answer.run_id)


async def tasks_of(handle: WorkflowHandle[Any, Any]) -> list[int]:
    """Return the event ids of a run's completed workflow tasks, to which it can be reset."""
    return [
        event.event_id
        for event in (await handle.fetch_history()).events
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]


async def each_once_and_as_recorded(
    site: Site, story_id: str, *runs: WorkflowHandle[Any, Any]
) -> list[Published]:
    """Check that what the runs passed to `publish` is on the streams once, with the same body."""
    there = await on_streams(site, story_id)
    bodies = {each.event.id: each.event.body for each in there}
    assert set(Counter(each.event.id for each in there).values()) == {1}
    for run in runs:
        for entry in await given_to(site, run, "publish"):
            if not entry["subject"]:
                continue
            assert bodies[entry["id"]] == entry["body"], entry
    assert await lacking_in_the_graph(site, story_id, there) == []
    return there


async def settled(site: Site, run: WorkflowHandle[Any, Any]) -> None:
    """Wait until the run's outbox is empty."""
    await until(lambda: run.query("outbox"), lambda outbox: not outbox["entries"])


async def settled_at_gate(site: Site, run: WorkflowHandle[Any, Any]) -> None:
    """Wait until the run itself waits at its first gate and its outbox is empty."""
    await until(lambda: run.query("state"), lambda state: state["pending_gate"] == "approve_scope")
    await settled(site, run)


def subjects(messages: Iterable[Published]) -> Counter[str]:
    return Counter(each.event.subject for each in messages)


async def test_what_was_not_published_yet_when_a_story_was_reset_is_published_once(
    site: Site,
) -> None:
    handle = await site.begin("US-flight", approvals="human")
    first = site.client.get_workflow_handle(handle.id, run_id=handle.result_run_id)
    await story_at(site, "US-flight", gate="approve_scope")
    await site.stop("nats")  # the other entries from before the reset wait in the outbox
    await handle.execute_update(
        "amend", {"title": "Undo any deletion", "actor": "ana"}, result_type=StoryView
    )
    await story_at(site, "US-flight", gate="approve_scope")
    await until(
        lambda: first.query("outbox"),
        lambda outbox: len(outbox["entries"]) == outbox["recorded"] - outbox["published"] > 0,
    )

    second = await reset(site, first, (await tasks_of(first))[-1])
    await site.start("nats")
    await story_at(site, "US-flight", gate="approve_scope")
    await until(lambda: on_streams(site, "US-flight"), lambda found: len(found) >= 4)
    answer = await replayed(site, "US-flight")
    there = await each_once_and_as_recorded(site, "US-flight", first, second)

    assert subjects(there)["planning.story.created"] == 1
    assert subjects(there)["planning.story.transitioned"] == 1
    assert answer["unanswered"] == []
    await handle.terminate("enough")


async def test_what_happens_again_after_a_reset_has_new_ids_and_nothing_is_lost(
    site: Site,
) -> None:
    handle = await site.begin("US-reset", approvals="human")
    first = site.client.get_workflow_handle(handle.id, run_id=handle.result_run_id)
    await story_at(site, "US-reset", gate="approve_scope")
    await settled(site, first)
    point = (await tasks_of(first))[-1]  # the gate is open and its event published
    await handle.signal("approve", Approve(gate="approve_scope", actor="ana", role="PO"))
    await story_at(site, "US-reset", gate="approve_design")
    await settled(site, first)
    before = await on_streams(site, "US-reset")

    # The approval came after this point, so the reset gives it to the second run immediately.
    second = await reset(site, first, point)
    await story_at(site, "US-reset", gate="approve_design")
    await settled(site, second)
    await replayed(site, "US-reset")
    there = await each_once_and_as_recorded(site, "US-reset", first, second)

    ids = {each.event.id for each in before}
    new_ids = {each.event.id for each in there} - ids
    assert ids < {each.event.id for each in there}
    assert not [each for each in new_ids if each.startswith(f"{handle.id}/{first.run_id}/")]
    counts = subjects(there)
    assert (counts["planning.story.created"], counts["planning.gate.opened"]) == (1, 3)
    moves = [
        (each.event.body["from_phase"], each.event.body["to_phase"])
        for each in there
        if each.event.subject == "planning.story.transitioned"
    ]
    assert moves == [("BACKLOG", "DRAFT"), ("DRAFT", "DESIGN"), ("DRAFT", "DESIGN")]
    await handle.terminate("enough")


async def test_a_story_that_is_reset_to_its_beginning_starts_again(site: Site) -> None:
    handle = await site.begin("US-again", approvals="human")
    first = site.client.get_workflow_handle(handle.id, run_id=handle.result_run_id)
    await story_at(site, "US-again", gate="approve_scope")

    second = await reset(site, first, (await tasks_of(first))[0])
    await settled_at_gate(site, second)
    third = await reset(site, second, (await tasks_of(second))[0])
    await settled_at_gate(site, third)
    await replayed(site, "US-again")
    there = await each_once_and_as_recorded(site, "US-again", first, second, third)

    assert subjects(there)["planning.story.created"] == 3
    await handle.terminate("enough")


# --- the contract ---------------------------------------------------------------------------------


async def test_all_that_these_stories_published_matches_the_document(site: Site) -> None:
    await site.begin("US-contract")
    assert await site.finish("US-contract") == "DONE"

    async with site.clients() as (connection, _):
        messages = await everything(connection)

    assert faults(described(), messages) == []
    assert len({each.subject for each in messages}) >= 12
