"""The Story coach over a real channel: its workflow on the real stack, an LLM over real HTTP."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from hypothesis import given, settings
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowExecutionStatus

from activities.quota import TokenQuota
from bridge.grpc.limits import Limits
from bridge.grpc.server import Served
from bridge.grpc.storycoach import StoryCoachServicer
from bridge.grpc.wire import storycoach_pb2 as pb
from bridge.grpc.wire import storycoach_pb2_grpc
from tests.support.fleet import new_environment, whole_fleet
from tests.support.grpc_service import bearer, problem, serving
from tests.support.llm_server import LlmServer
from tests.support.messages import messages
from tests.support.polling import until, until_early_in_the_hour
from tests.support.servers import Servers
from workflows.models.readiness import StoryText
from workflows.rules.readiness import score_story

PROCESSES = ("story", "context", "agents")
ANA = bearer("ana", "DEV")

PERFECT: dict[str, Any] = {
    "title": "Undo the deletion of a note",
    "description": "As a writer I want to undo a deletion so that a slip costs me nothing.",
    "ac": [
        "Given a note that was deleted, when I press undo, then it is back with its text.",
        "Given no deletion, when I press undo, then nothing changes.",
    ],
}
POOR = {"title": "Fix it", "description": "Make everything better and fast."}

# The generated stubs are typed for synchronous channels only.
Stub: Any = storycoach_pb2_grpc.StoryCoachServiceStub


@dataclass(frozen=True)
class Fleet:
    """A running fleet and its language model."""

    temporal: Client
    llm: LlmServer
    coach: Any

    async def status(self) -> dict[str, WorkflowExecutionStatus | None]:
        """Return workflow id -> status of all coach workflows, by visibility."""
        found = self.temporal.list_workflows("WorkflowType = 'CoachWorkflow'")
        return {each.id: each.status async for each in found}


@pytest.fixture(scope="module")
async def running_fleet(servers: Servers) -> AsyncIterator[Fleet]:
    async with (
        LlmServer() as llm,
        whole_fleet(await new_environment(servers, llm), *PROCESSES) as client,
    ):
        served = Served(
            "fleet.storycoach.v1.StoryCoachService",
            StoryCoachServicer(client),
            storycoach_pb2_grpc.add_StoryCoachServiceServicer_to_server,
        )
        async with serving(served) as channel:
            yield Fleet(client, llm, Stub(channel))


@pytest.fixture
def fleet(running_fleet: Fleet) -> Fleet:
    """Return the shared fleet, with a model without faults and without recorded calls."""
    running_fleet.llm.faults.clear()
    running_fleet.llm.calls.clear()
    return running_fleet


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value


async def violations(call: Any) -> dict[str, str]:
    """Return field -> rule of a call that must be refused as INVALID_ARGUMENT."""
    error = await refusal(call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error.details()
    (bad,) = (each for each in problem(error)[1] if isinstance(each, BadRequest))
    return {each.field: each.description for each in bad.field_violations}


def total(story: Any) -> int:
    """Return the Definition of Ready score of a message that has a story's fields."""
    return score_story(
        StoryText(title=story.title, brief=story.description, acceptance_criteria=list(story.ac))
    ).total


# --- ScoreStory -----------------------------------------------------------------------------------


async def test_a_story_is_scored_with_what_costs_it_points(fleet: Fleet) -> None:
    poor = await fleet.coach.ScoreStory(pb.ScoreStoryRequest(**POOR), metadata=ANA)
    perfect = await fleet.coach.ScoreStory(pb.ScoreStoryRequest(**PERFECT), metadata=ANA)

    expected = score_story(StoryText(title=POOR["title"], brief=POOR["description"]))
    assert poor.total == expected.total < 50
    assert [(f.code, f.message, f.weight) for f in poor.findings] == [
        (f.code, f.message, f.weight) for f in expected.findings
    ]
    assert {"AC_MISSING", "TITLE_VALUE", "SMALL", "AMBIGUOUS"} <= {f.code for f in poor.findings}
    assert (perfect.total, list(perfect.findings)) == (100, [])
    assert fleet.llm.calls == []


@settings(max_examples=200)
@given(message=messages(pb.ScoreStoryRequest))
async def test_any_text_has_a_score(running_fleet: Fleet, message: pb.ScoreStoryRequest) -> None:
    answer = await running_fleet.coach.ScoreStory(message, metadata=ANA)

    assert answer.total == max(0, 100 - sum(finding.weight for finding in answer.findings))


# --- RefineStory ----------------------------------------------------------------------------------


async def test_a_poor_story_is_written_better_by_an_agent(fleet: Fleet) -> None:
    call = fleet.coach.RefineStory(pb.RefineStoryRequest(**POOR), metadata=ANA)

    refined = await call

    assert total(refined) > total(pb.RefineStoryRequest(**POOR))
    assert "x-reason" not in dict(await call.trailing_metadata())
    assert [each.act for each in fleet.llm.calls] == ["write_story"]
    assert "Fix it" in fleet.llm.calls[0].prompt
    assert "no acceptance criteria; add at least two" in fleet.llm.calls[0].prompt


async def test_a_story_that_only_gets_worse_comes_back_with_the_reason(fleet: Fleet) -> None:
    call = fleet.coach.RefineStory(pb.RefineStoryRequest(**PERFECT), metadata=ANA)

    refined = await call

    assert (refined.title, refined.description) == (PERFECT["title"], PERFECT["description"])
    assert list(refined.ac) == PERFECT["ac"]
    reason = dict(await call.trailing_metadata())["x-reason"]
    assert reason.startswith("the original comes back: it scores 100, and the best of 2")
    assert "TITLE_VALUE" in reason
    assert len(fleet.llm.calls) == 2


async def test_an_empty_story_cannot_be_refined(fleet: Fleet) -> None:
    nothing = fleet.coach.RefineStory(pb.RefineStoryRequest(title=" "), metadata=ANA)
    blank = fleet.coach.RefineStory(pb.RefineStoryRequest(title="T", ac=[""]), metadata=ANA)

    assert set(await violations(nothing)) == {"title"}
    assert set(await violations(blank)) == {"ac.0"}
    assert fleet.llm.calls == []


# --- the quota ------------------------------------------------------------------------------------


async def test_an_actor_without_tokens_is_not_coached(fleet: Fleet, client: Redis) -> None:
    await until_early_in_the_hour()
    eve = bearer(f"eve-{uuid.uuid4().hex}", "DEV")
    mine = (*eve, ("x-request-id", uuid.uuid4().hex))
    goal = pb.SuggestStoryRequest(goal=f"Undo {uuid.uuid4().hex}")
    served = Served(
        "fleet.storycoach.v1.StoryCoachService",
        StoryCoachServicer(fleet.temporal, Limits(TokenQuota(client, 10))),
        storycoach_pb2_grpc.add_StoryCoachServiceServicer_to_server,
    )

    async with serving(served) as channel:
        first = await Stub(channel).SuggestStory(goal, metadata=mine)
        calls = len(fleet.llm.calls)
        suggestion = await refusal(Stub(channel).SuggestStory(goal, metadata=eve))
        refinement = await refusal(
            Stub(channel).RefineStory(pb.RefineStoryRequest(title="Undo"), metadata=eve)
        )
        again = await Stub(channel).SuggestStory(goal, metadata=mine)

    for error in (suggestion, refinement):
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of 10 tokens in this hour, 0 are left" in (error.details() or "")
    assert again == first
    assert len(fleet.llm.calls) == calls


# --- SuggestStory ---------------------------------------------------------------------------------


async def test_a_goal_becomes_a_story_that_is_corrected_once(fleet: Fleet) -> None:
    goal = "Nobody loses a note by a slip of the finger"

    story = await fleet.coach.SuggestStory(pb.SuggestStoryRequest(goal=goal), metadata=ANA)

    assert story.title
    assert story.description
    assert 2 <= len(story.ac) <= 6
    first, second = fleet.llm.calls
    assert goal in first.prompt
    assert "What is wrong with it" not in first.prompt
    assert goal in second.prompt
    assert "the story does not say for whom" in second.prompt


async def test_a_suggestion_needs_a_goal(fleet: Fleet) -> None:
    found = await violations(fleet.coach.SuggestStory(pb.SuggestStoryRequest(), metadata=ANA))

    assert set(found) == {"goal"}


# --- calls that are ended early -------------------------------------------------------------------


@pytest.mark.parametrize("ends_by", ["cancel", "deadline"])
async def test_a_call_that_ends_cancels_its_workflow(fleet: Fleet, ends_by: str) -> None:
    fleet.llm.fail("hang")
    before = set(await fleet.status())
    timeout = 15 if ends_by == "deadline" else None

    call = fleet.coach.SuggestStory(
        pb.SuggestStoryRequest(goal="Undo"), metadata=ANA, timeout=timeout
    )
    await until(lambda: is_called(fleet))
    if ends_by == "cancel":
        call.cancel()

    assert await call.code() == (
        grpc.StatusCode.CANCELLED if ends_by == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED
    )

    async def stopped() -> bool:
        now = {each: s for each, s in (await fleet.status()).items() if each not in before}
        return list(now.values()) == [WorkflowExecutionStatus.CANCELED]

    await until(stopped)
    assert fleet.llm.calls[0].end == "aborted"


async def test_a_call_with_a_request_id_is_asked_once_and_can_be_repeated(fleet: Fleet) -> None:
    fleet.llm.fail("slow", times=2, ms=3)
    metadata = (*ANA, ("x-request-id", uuid.uuid4().hex))
    goal = pb.SuggestStoryRequest(goal="Undo")

    first = fleet.coach.SuggestStory(goal, metadata=metadata)
    await until(lambda: is_called(fleet))
    first.cancel()
    story = await fleet.coach.SuggestStory(goal, metadata=metadata)
    again = await fleet.coach.SuggestStory(goal, metadata=metadata)

    assert story == again
    assert [call.end for call in fleet.llm.calls] == ["answered", "answered"]


async def is_called(fleet: Fleet) -> bool:
    return bool(fleet.llm.calls)


async def test_a_refusal_by_the_engine_is_an_error(fleet: Fleet) -> None:
    fleet.llm.fail("status", status=401)

    error = await refusal(
        fleet.coach.SuggestStory(pb.SuggestStoryRequest(goal="Undo"), metadata=ANA)
    )

    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert problem(error)[0] == "LlmRefused"


async def test_a_model_that_never_gives_a_valid_answer_is_an_error(fleet: Fleet) -> None:
    fleet.llm.fail("wrong", times=3)

    error = await refusal(fleet.coach.RefineStory(pb.RefineStoryRequest(**POOR), metadata=ANA))

    assert error.code() == grpc.StatusCode.ABORTED
    assert problem(error)[0] == "BadAnswer"


# --- arbitrary requests ---------------------------------------------------------------------------


@settings(max_examples=25)
@given(message=messages(pb.RefineStoryRequest))
async def test_any_story_comes_back_no_worse_or_is_refused(
    running_fleet: Fleet, message: pb.RefineStoryRequest
) -> None:
    call = running_fleet.coach.RefineStory(message, metadata=ANA)

    if await call.code() == grpc.StatusCode.OK:
        assert total(await call) >= total(message)
    else:
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT, await call.details()


@settings(max_examples=15)
@given(message=messages(pb.SuggestStoryRequest))
async def test_any_goal_becomes_a_story_or_is_refused(
    running_fleet: Fleet, message: pb.SuggestStoryRequest
) -> None:
    call = running_fleet.coach.SuggestStory(message, metadata=ANA)

    if await call.code() == grpc.StatusCode.OK:
        story = await call
        assert story.title
        assert story.ac
    else:
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT, await call.details()
