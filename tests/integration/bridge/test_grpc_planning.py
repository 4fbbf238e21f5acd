"""The Planning service over a real channel, with stories on the real stack."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowFailureError

from bridge.grpc.planning import PlanningServicer
from bridge.grpc.requests import Requests
from bridge.grpc.server import Served
from bridge.grpc.wire import planning_pb2 as pb
from bridge.grpc.wire import planning_pb2_grpc
from tests.support.fleet import (
    a_namespace,
    connect,
    new_environment,
    whole_fleet,
)
from tests.support.grpc_service import bearer, problem, serving
from tests.support.llm_server import LlmServer
from tests.support.messages import messages
from tests.support.polling import until
from tests.support.projects import plain_git
from tests.support.repositories import config_with, make_repository
from tests.support.servers import Servers
from tests.support.stories import rows
from workflows.models.ids import story_of
from workflows.models.story import StoryInput
from workflows.story import StoryWorkflow

PROCESSES = ("story", "context", "agents", "bridge")

ANA = bearer("ana", "PO")
BO = bearer("bo", "QA")

READY: dict[str, Any] = {
    "title": "Undo the deletion of a note",
    "brief": "As a writer I want to undo a deletion so that a slip costs me nothing.",
    "ac": [
        "Given a note that was deleted, when I press undo, then it is back with its text.",
        "Given no deletion, when I press undo, then nothing changes.",
    ],
}

# The generated stubs are typed for synchronous channels only.
Stub: Any = planning_pb2_grpc.PlanningServiceStub


def served(client: Client, driver: AsyncDriver) -> Served:
    return planning_of(PlanningServicer(client, driver))


def planning_of(servicer: PlanningServicer) -> Served:
    return Served(
        "fleet.planning.v1.PlanningService",
        servicer,
        planning_pb2_grpc.add_PlanningServiceServicer_to_server,
    )


@pytest.fixture(scope="module")
async def stories(servers: Servers) -> AsyncIterator[Client]:
    """Run a fleet and yield a client of it."""
    async with (
        LlmServer() as llm,
        whole_fleet(await new_environment(servers, llm), *PROCESSES) as client,
    ):
        yield client


@pytest.fixture(scope="module")
async def planning(stories: Client, driver: AsyncDriver, client: Redis) -> AsyncIterator[Any]:
    async with serving(served(stories, driver), requests=Requests(client)) as channel:
        yield Stub(channel)


async def created(planning: Any, **changed: Any) -> pb.CreateStoryResponse:
    answer: pb.CreateStoryResponse = await planning.CreateStory(
        pb.CreateStoryRequest(**(READY | changed)), metadata=ANA
    )
    return answer


async def shown(planning: Any, story_id: str) -> tuple[pb.GetStoryResponse, dict[str, Any]]:
    """Return a story and its parsed plan_json."""
    story = await planning.GetStory(pb.GetStoryRequest(story_id=story_id), metadata=ANA)
    return story, json.loads(story.plan_json)


async def transition(
    planning: Any, story_id: str, event: str, metadata: Any = ANA, actor: str = ""
) -> pb.TransitionResponse:
    answer: pb.TransitionResponse = await planning.Transition(
        pb.TransitionRequest(story_id=story_id, event=event, actor=actor), metadata=metadata
    )
    return answer


async def at_gate(planning: Any, story_id: str, gate: str) -> None:
    async def waits() -> bool:
        _, now = await shown(planning, story_id)
        return bool(now["pending_gate"] == gate)

    await until(waits)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def violations(call: Any) -> dict[str, str]:
    """Return field -> rule of a call that must be refused as INVALID_ARGUMENT."""
    error = await refusal(call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    _, details = problem(error)
    (bad,) = (detail for detail in details if isinstance(detail, BadRequest))
    return {each.field: each.description for each in bad.field_violations}


async def listed(planning: Any, **keys: str) -> tuple[dict[str, pb.Story], str]:
    """Return one page of ListStories by story id, and the next page's token."""
    metadata = [(f"x-{key.replace('_', '-')}", value) for key, value in keys.items()]
    call = planning.ListStories(pb.ListStoriesRequest(), metadata=(*ANA, *metadata))
    page = await call
    trailers = dict(await call.trailing_metadata() or ())
    return {story.story_id: story for story in page.stories}, trailers.get("x-next-page-token", "")


# --- CreateStory ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "field"),
    [({"brief": "x" * 65_537}, "brief"), ({"ac": ["x" * 4_000] * 17}, "ac")],
)
async def test_a_text_that_is_too_long_starts_nothing(
    planning: Any, text: dict[str, Any], field: str
) -> None:
    before = await planning.ListStories(pb.ListStoriesRequest(), metadata=ANA)

    with pytest.raises(grpc.aio.AioRpcError, match=f"{field}: has 6") as refused:
        await created(planning, **text)

    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await planning.ListStories(pb.ListStoriesRequest(), metadata=ANA) == before


async def test_a_created_story_runs_and_is_scored(planning: Any, stories: Client) -> None:
    story = await created(planning)

    assert story.state == "DRAFT"
    assert story.dor_score >= 75
    handle = stories.get_workflow_handle(f"story-{story.story_id}")
    described = await handle.describe()
    assert await described.static_summary() == READY["title"]
    timeline = await handle.query(StoryWorkflow.timeline)
    assert any(line.actor == "ana" for line in timeline)


async def test_a_story_may_name_a_repository_and_what_it_may_change(
    servers: Servers, driver: AsyncDriver, client: Redis, tmp_path: Path
) -> None:
    config = config_with(tmp_path / "config", adder={"url": make_repository(tmp_path / "adder")})
    async with LlmServer() as llm:
        environment = await new_environment(
            servers, llm, FLEET_CONFIG=str(config), FLEET_HOME=str(tmp_path)
        )
        async with whole_fleet(environment) as fleet:
            servicer = PlanningServicer(fleet, driver, repositories=["adder"])
            async with serving(planning_of(servicer), requests=Requests(client)) as channel:
                stub = Stub(channel)
                where = (("x-repository", "adder"), ("x-paths", "adder/**, README.md"))
                once = (("x-request-id", uuid.uuid4().hex),)
                story = await stub.CreateStory(
                    pb.CreateStoryRequest(**READY), metadata=ANA + where + once
                )
                handle = fleet.get_workflow_handle(f"story-{story.story_id}")
                branch = await handle.query(StoryWorkflow.branch)
                elsewhere = (("x-repository", "adder"), ("x-paths", "docs/**"))
                reused = await refusal(
                    stub.CreateStory(
                        pb.CreateStoryRequest(**READY), metadata=ANA + elsewhere + once
                    )
                )
                plain_git("branch", "-m", "main", "trunk", cwd=tmp_path / "adder")
                gone = await refusal(
                    stub.CreateStory(pb.CreateStoryRequest(**READY), metadata=ANA + where)
                )

                async def failed() -> list[str]:
                    found = fleet.list_workflows("ExecutionStatus = 'Failed'")
                    return [story_of(each.id) async for each in found]

                (name,) = await until(failed)
                looked = await refusal(
                    stub.GetStory(pb.GetStoryRequest(story_id=name), metadata=ANA)
                )

    assert story.state == "DRAFT"
    assert branch is not None
    assert (branch.repository.key, branch.paths) == ("adder", ["adder/**", "README.md"])
    assert reused.code() == grpc.StatusCode.ALREADY_EXISTS
    assert "base: the repository has no such branch" in str(gone.details())
    assert (looked.code(), looked.details()) == (gone.code(), gone.details())


@pytest.mark.parametrize(
    ("metadata", "code", "words"),
    [
        ({"x-repository": "nope"}, grpc.StatusCode.NOT_FOUND, "has no 'nope'; it has: none"),
        ({"x-repository": "No Key"}, grpc.StatusCode.INVALID_ARGUMENT, "x-repository"),
        ({"x-paths": "src/**"}, grpc.StatusCode.INVALID_ARGUMENT, "x-paths: is for stories with a"),
        (
            {"x-repository": "a", "x-paths": "/etc/**"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "x-paths: '/etc/**': a pattern neither begins nor ends with '/'",
        ),
        (
            {"x-repository": "a", "x-paths": "a,,b"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "x-paths: '': is empty",
        ),
        (
            {"x-repository": "a", "x-steps": "0"},
            grpc.StatusCode.INVALID_ARGUMENT,
            "x-steps",
        ),
    ],
)
async def test_a_wrong_repository_is_refused_and_starts_nothing(
    planning: Any, metadata: dict[str, str], code: grpc.StatusCode, words: str
) -> None:
    before, _ = await listed(planning, page_size="1000")

    refused = await refusal(
        planning.CreateStory(pb.CreateStoryRequest(**READY), metadata=ANA + tuple(metadata.items()))
    )

    assert refused.code() == code
    assert words in str(refused.details())
    after, _ = await listed(planning, page_size="1000")
    assert set(after) == set(before)


async def test_a_request_id_makes_one_story_however_often_it_is_sent(planning: Any) -> None:
    request = pb.CreateStoryRequest(**READY)
    key = (("x-request-id", uuid.uuid4().hex),)

    first, second = await asyncio.gather(
        *(planning.CreateStory(request, metadata=ANA + key) for _ in range(2))
    )
    again = await planning.CreateStory(request, metadata=ANA + key)
    anothers = await planning.CreateStory(request, metadata=bearer("bo", "DEV") + key)
    without = await planning.CreateStory(request, metadata=ANA)
    other = pb.CreateStoryRequest(**READY | {"title": "Redo it"})
    reused = await refusal(planning.CreateStory(other, metadata=ANA + key))

    assert reused.code() == grpc.StatusCode.ALREADY_EXISTS
    assert first.story_id == second.story_id == again.story_id
    assert len({first.story_id, anothers.story_id, without.story_id}) == 3


async def test_an_invalid_story_is_refused_by_the_contracts_fields(planning: Any) -> None:
    before, _ = await listed(planning, page_size="1000")

    found = await violations(
        planning.CreateStory(pb.CreateStoryRequest(title=" ", ac=["Given", "\n"]), metadata=ANA)
    )

    assert set(found) == {"title", "ac.1"}
    after, _ = await listed(planning, page_size="1000")
    assert set(after) == set(before)


async def test_a_story_is_started_though_no_worker_runs(
    servers: Servers, driver: AsyncDriver
) -> None:
    alone = await connect(servers.temporal.address, await a_namespace(servers))
    async with serving(served(alone, driver)) as channel:
        story = await Stub(channel).CreateStory(
            pb.CreateStoryRequest(**READY), metadata=ANA, timeout=60
        )
        request = pb.GetStoryRequest(story_id=story.story_id)
        unanswered = await refusal(Stub(channel).GetStory(request, metadata=ANA, timeout=2))

    assert (story.state, story.dor_score) == ("BACKLOG", 0)
    started = await alone.get_workflow_handle(f"story-{story.story_id}").describe()
    assert started.close_time is None
    assert unanswered.code() in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
    )


# --- GetStory, GetPlan ----------------------------------------------------------------------------


async def test_a_story_is_shown_with_its_text_and_what_may_happen_next(planning: Any) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")

    story, plan = await shown(planning, story_id)

    assert (story.story.story_id, story.story.state) == (story_id, "DRAFT")
    assert (story.story.title, story.story.brief) == (READY["title"], READY["brief"])
    assert list(story.ac) == READY["ac"]
    assert (plan["state"], plan["pending_gate"], plan["gate_role"]) == (
        "DRAFT",
        "approve_scope",
        "PO",
    )
    assert plan["revision"]
    assert [move["event"] for move in plan["next"]] == ["approve_scope"]


@pytest.mark.parametrize("method", ["GetStory", "GetPlan", "Transition"])
async def test_a_story_that_is_not_there_is_not_found(planning: Any, method: str) -> None:
    kind = getattr(pb, f"{method}Request")
    more = {"event": "approve_scope"} if method == "Transition" else {}

    error = await refusal(getattr(planning, method)(kind(story_id="US-none", **more), metadata=ANA))
    wrong = await violations(
        getattr(planning, method)(kind(story_id="no/such", **more), metadata=ANA)
    )

    assert error.code() == grpc.StatusCode.NOT_FOUND
    assert error.details() == "story US-none not found"
    assert "1 to 100 letters" in wrong["story_id"]


async def test_a_plan_is_empty_until_the_design_is_done_and_then_has_its_tasks(
    planning: Any, stories: Client, driver: AsyncDriver
) -> None:
    story_id = (await created(planning)).story_id
    request = pb.GetPlanRequest(story_id=story_id)
    await at_gate(planning, story_id, "approve_scope")
    before = await planning.GetPlan(request, metadata=ANA)

    await transition(planning, story_id, "approve_scope")
    await at_gate(planning, story_id, "approve_design")
    live = (await planning.GetPlan(request, metadata=ANA)).json
    plan = json.loads(live)
    handle = stories.get_workflow_handle(f"story-{story_id}")
    await handle.cancel()
    with pytest.raises(WorkflowFailureError):
        await handle.result()
    ended = (await planning.GetPlan(request, metadata=ANA)).json
    await rows(driver, "MATCH (t:Subtask {case_id: $id}) SET t.title = 'graph'", id=story_id)
    read = json.loads((await planning.GetPlan(request, metadata=ANA)).json)

    assert ended == live
    assert {task["title"] for task in read["tasks"]} == {"graph"}, "it is read in the graph"
    assert before.json == "{}"
    assert plan["story_id"] == story_id
    assert plan["tasks"][0]["task_id"] == f"{plan['plan_id']}-t1"


# --- Transition -----------------------------------------------------------------------------------


async def test_a_gate_is_opened_by_the_tokens_actor(planning: Any, stories: Client) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")

    answer = await transition(planning, story_id, "approve_scope", actor="mallory")

    assert (answer.story_id, answer.state, answer.blocked) == (story_id, "DESIGN", False)
    handle = stories.get_workflow_handle(f"story-{story_id}")
    moved = [
        line
        for line in await handle.query(StoryWorkflow.timeline)
        if line.event == "planning.story.transitioned"
    ]
    assert moved[-1].actor == "ana"


async def test_a_gate_stays_shut_for_a_token_without_its_role(planning: Any) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")

    errors = [
        await refusal(transition(planning, story_id, "approve_scope", metadata))
        for metadata in (BO, bearer("eve"))
    ]

    assert {error.code() for error in errors} == {grpc.StatusCode.PERMISSION_DENIED}
    assert all("needs the role PO" in str(error.details()) for error in errors)
    assert (await shown(planning, story_id))[1]["state"] == "DRAFT"


async def test_a_guard_that_blocks_is_named_with_the_reason(planning: Any) -> None:
    story_id = (await created(planning, ac=[])).story_id

    answer = await transition(planning, story_id, "approve_scope")

    assert (answer.state, answer.blocked) == ("DRAFT", True)
    assert "dor_ok: readiness" in answer.reason
    assert "amend the story" in answer.reason
    assert (await shown(planning, story_id))[1]["state"] == "DRAFT"


async def test_a_rejection_goes_back_with_its_reason(planning: Any, stories: Client) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")
    await transition(planning, story_id, "approve_scope")

    reason = (("x-reason", "no undo after a restart"),)
    answer = await transition(planning, story_id, "reject_design", ANA + reason)

    assert (answer.state, answer.blocked) == ("DRAFT", False)
    handle = stories.get_workflow_handle(f"story-{story_id}")
    texts = [line.text for line in await handle.query(StoryWorkflow.timeline)]
    assert any("no undo after a restart" in text for text in texts)


async def test_a_move_that_is_asked_for_again_by_its_request_id_is_made_once(
    planning: Any, stories: Client
) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")
    mine = (*ANA, ("x-request-id", uuid.uuid4().hex))

    first = await transition(planning, story_id, "approve_scope", mine)
    again = await transition(planning, story_id, "approve_scope", mine)

    assert first == again
    handle = stories.get_workflow_handle(f"story-{story_id}")
    lines = [line.event for line in await handle.query(StoryWorkflow.timeline)]
    assert lines.count("planning.gate.approved") == 1


@pytest.mark.parametrize("event", ["approve_design", "reject_docs", "sing"])
async def test_what_is_not_legal_now_is_refused_with_what_is(planning: Any, event: str) -> None:
    story_id = (await created(planning)).story_id

    error = await refusal(transition(planning, story_id, event))

    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert problem(error)[0] == "IllegalMove"
    assert f"event: '{event}'" in str(error.details())
    assert "legal now: approve_scope" in str(error.details())


async def test_the_fleets_own_moves_are_not_taken_by_hand(planning: Any) -> None:
    story_id = (await created(planning)).story_id
    for gate in ("approve_scope", "approve_design"):
        await at_gate(planning, story_id, gate)
        await transition(planning, story_id, gate)

    error = await refusal(transition(planning, story_id, "build_done"))

    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "the fleet's own to take" in str(error.details())
    assert "no workspace report yet" in str(error.details())
    assert "legal now: reject_build" in str(error.details())


async def test_a_stale_revision_is_refused(planning: Any) -> None:
    story_id = (await created(planning)).story_id
    await at_gate(planning, story_id, "approve_scope")

    stale = (("x-revision", "0000000000000000"),)
    error = await refusal(transition(planning, story_id, "approve_scope", ANA + stale))

    assert problem(error)[0] == "StaleRevision"
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_story_that_has_ended_is_shown_and_moves_no_more(
    planning: Any, stories: Client
) -> None:
    story_id = (await created(planning)).story_id
    handle = stories.get_workflow_handle(f"story-{story_id}")
    await handle.cancel()
    await until(lambda: closed(stories, story_id))

    error = await refusal(transition(planning, story_id, "approve_scope"))

    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert error.details() == f"story {story_id} has ended; legal now: none"
    assert (await shown(planning, story_id))[0].story.title == READY["title"]


async def closed(stories: Client, story_id: str) -> bool:
    described = await stories.get_workflow_handle(f"story-{story_id}").describe()
    return described.close_time is not None


# --- ListStories ----------------------------------------------------------------------------------


async def test_stories_are_listed_with_title_state_and_score(planning: Any) -> None:
    title = f"List the story {uuid.uuid4().hex}"
    story_id = (await created(planning, title=title)).story_id
    await at_gate(planning, story_id, "approve_scope")

    async def is_listed() -> bool:
        stories, _ = await listed(planning, state="DRAFT", role="PO", waiting="true")
        return story_id in stories

    await until(is_listed)
    stories, _ = await listed(planning, state="DRAFT", role="PO")
    others, _ = await listed(planning, state="DOCS")
    anothers, _ = await listed(planning, role="QA")

    story = stories[story_id]
    assert (story.title, story.state, story.brief) == (title, "DRAFT", "")
    assert story.dor_score >= 75
    assert story_id not in others
    assert story_id not in anothers


async def test_a_list_has_the_title_of_any_story_as_it_was_amended(
    planning: Any, stories: Client
) -> None:
    story_id = f"US-{uuid.uuid4().hex[:10]}"
    handle = await stories.start_workflow(
        StoryWorkflow.run,
        StoryInput(story_id=story_id, title="Undo a deletion"),
        id=f"story-{story_id}",
        task_queue="story",
    )

    async def is_listed_as(title: str) -> bool:
        stories, _ = await listed(planning, page_size="1000")
        return story_id in stories and stories[story_id].title == title

    await until(lambda: is_listed_as("Undo a deletion"))
    await handle.execute_update("amend", {"title": "Undo every deletion", "actor": "ana"})
    await until(lambda: is_listed_as("Undo every deletion"))


async def test_a_story_that_has_ended_waits_for_no_one_and_is_listed_with_its_newest_run_only(
    planning: Any, stories: Client
) -> None:
    story_id = f"US-{uuid.uuid4().hex[:10]}"
    for title in ("The first run", "The second run"):
        handle = await stories.start_workflow(
            StoryWorkflow.run,
            StoryInput(
                story_id=story_id,
                title=title,
                brief=READY["brief"],
                acceptance_criteria=READY["ac"],
            ),
            id=f"story-{story_id}",
            task_queue="story",
        )

        async def waits() -> bool:
            return story_id in (await listed(planning, waiting="true", page_size="1000"))[0]

        await until(waits)
        await handle.terminate()
        await until(waits, lambda waiting: not waiting)

    titles: list[str] = []
    token = ""
    while True:
        call = planning.ListStories(
            pb.ListStoriesRequest(), metadata=(*ANA, ("x-page-size", "2"), ("x-page-token", token))
        )
        titles += [each.title for each in (await call).stories if each.story_id == story_id]
        token = dict(await call.trailing_metadata() or ()).get("x-next-page-token", "")
        if not token:
            break

    assert titles == ["The second run"]


async def test_pages_follow_one_another_without_a_gap(planning: Any) -> None:
    made = {(await created(planning)).story_id for _ in range(3)}

    async def all_listed() -> bool:
        return made <= set((await listed(planning, page_size="1000"))[0])

    await until(all_listed)

    pages: list[set[str]] = []
    token = ""
    while token or not pages:
        stories, token = await listed(planning, page_size="2", page_token=token)
        pages.append(set(stories))

    assert made <= set().union(*pages)
    assert all(len(page) <= 2 for page in pages)
    assert sum(len(page) for page in pages) == len(set().union(*pages))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("state", "DRAFT' OR '1'='1"),
        ("role", "PO'"),
        ("waiting", "perhaps"),
        ("page_size", "0"),
        ("page_size", "1001"),
        ("page_size", "many"),
        ("page_token", "!"),
        ("page_token", "bm8gcGFnZQ=="),
    ],
)
async def test_a_list_refuses_invalid_metadata_by_key(planning: Any, key: str, value: str) -> None:
    found = await violations(listed(planning, **{key: value}))

    assert set(found) == {f"x-{key.replace('_', '-')}"}


async def test_a_page_token_is_valid_only_with_its_filters(planning: Any) -> None:
    made = [(await created(planning)).story_id for _ in range(2)]

    async def more_than_one() -> bool:
        return len(set(made) & set((await listed(planning, state="DRAFT"))[0])) == 2

    await until(more_than_one)
    _, token = await listed(planning, state="DRAFT", page_size="1")

    assert token
    assert set(await violations(listed(planning, page_token=token))) == {"x-page-token"}


# --- arbitrary requests ---------------------------------------------------------------------------

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
}
REQUESTS = {
    "GetStory": pb.GetStoryRequest,
    "Transition": pb.TransitionRequest,
    "GetPlan": pb.GetPlanRequest,
}


@settings(max_examples=100)
@given(data=st.data(), method=st.sampled_from(sorted(REQUESTS)))
async def test_any_message_is_answered_or_refused(
    planning: Any, data: st.DataObject, method: str
) -> None:
    request = data.draw(messages(REQUESTS[method]))

    call = getattr(planning, method)(request, metadata=ANA)

    assert await call.code() in EXPECTED, await call.details()


@settings(max_examples=25)
@given(request=messages(pb.CreateStoryRequest))
async def test_any_story_is_started_as_it_was_given_or_not_at_all(
    planning: Any, stories: Client, request: pb.CreateStoryRequest
) -> None:
    call = planning.CreateStory(request, metadata=ANA, timeout=30)

    if await call.code() != grpc.StatusCode.OK:
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT, await call.details()
        return
    story = await call
    wanted = StoryInput(
        story_id="US-1",
        title=request.title,
        brief=request.brief,
        acceptance_criteria=list(request.ac),
    )
    view, _ = await shown(planning, story.story_id)
    assert (view.story.title, view.story.brief) == (wanted.title, wanted.brief)
    assert list(view.ac) == wanted.acceptance_criteria
    await stories.get_workflow_handle(f"story-{story.story_id}").cancel()
