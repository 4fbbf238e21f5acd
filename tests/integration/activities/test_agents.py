"""The agents' activities against a real HTTP server and the real Valkey."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.agents import openai_client as llm_client
from activities.agents.activities import Agents, VllmAgents
from activities.agents.answer_cache import ANSWER_TTL, answer_key
from activities.agents.kept_packs import KeptPacks
from activities.agents.llm_errors import retry_after, status_failure
from activities.agents.profiles import ModelProfile, Profiles
from activities.agents.prompts import Prompts
from activities.cache import Cache
from activities.checks.activities import Checks
from activities.quota import TokenQuota
from tests.support.llm_server import LlmServer
from tests.support.polling import until, until_early_in_the_hour
from tests.support.servers import RunningServer
from workflows.models.agents import (
    Agent,
    Contender,
    CriticiseInput,
    Critique,
    DerivePlanInput,
    JudgeInput,
    Proposal,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
    Task,
)
from workflows.models.context import ContextPack
from workflows.models.deliberation import CheckInput
from workflows.models.implementation import (
    EDITS,
    FileText,
    NextActionInput,
    Outline,
    ReplaceText,
)
from workflows.rules.ranking import barred

PROMPTS = Prompts.load(Path(__file__).parents[3] / "deploy" / "config" / "prompts")
PROPOSAL = Proposal(approach="an outbox", content="Append, then publish.")
IDLE_SECONDS = 2.0


def call_fields(agent_id: str = "dev-1", **agent: Any) -> dict[str, Any]:
    """Return the fields that every call is given."""
    return {
        "task": Task(task_id="t1", role="DEV", description="Store every event."),
        "agent": Agent(agent_id=agent_id, role="DEV", persona=f"You are {agent_id}.", **agent),
        "pack": ContextPack(context="Decided: JetStream."),
        "wave": 1,
    }


def proposing(agent_id: str = "dev-1", **agent: Any) -> ProposeInput:
    return ProposeInput(**call_fields(agent_id, **agent))


@pytest.fixture
async def store(valkey: RunningServer) -> AsyncIterator[Redis]:
    once = Retry(NoBackoff(), 0)
    client = Redis(host=valkey.host, port=valkey.port, password=valkey.password, retry=once)
    yield client
    await client.aclose()


@pytest.fixture
async def client(llm: LlmServer) -> AsyncIterator[httpx.AsyncClient]:
    async with llm_client.connect(llm.url, "none", IDLE_SECONDS) as client:
        yield client


@pytest.fixture
def agents(client: httpx.AsyncClient, llm: LlmServer, store: Redis) -> Agents:
    llms = VllmAgents(client, store, llm.model, PROMPTS)
    return Agents({"RAY_VLLM": llms, "VLLM": llms}, KeptPacks(store))


@pytest.fixture
def environment() -> ActivityEnvironment:
    """Return the environment of a call in a new run, which finds no answers of other tests."""
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(
        environment.info,
        workflow_id="deliberation-t1",
        workflow_run_id=str(uuid.uuid4()),
        heartbeat_timeout=timedelta(milliseconds=60),
    )
    return environment


async def refusal(call: Awaitable[Any]) -> ApplicationError:
    """Return the ApplicationError that the call ends with."""
    with pytest.raises(ApplicationError) as raised:
        await call
    return raised.value


# --- answers --------------------------------------------------------------------------------------


async def test_every_act_brings_its_structured_answer(
    agents: Agents, environment: ActivityEnvironment
) -> None:
    critique = Critique(verdict="revise", suggestion="name the stream")
    contenders = [
        Contender(agent_id=name, score=0.9, proposal=PROPOSAL) for name in ("qa-1", "qa-2")
    ]

    proposal = await environment.run(agents.propose, proposing())
    criticism = await environment.run(
        agents.criticise, CriticiseInput(**call_fields(), author_id="dev-2", proposal=PROPOSAL)
    )
    revision = await environment.run(
        agents.revise, ReviseInput(**call_fields(), proposal=PROPOSAL, critiques=[critique])
    )
    judgement = await environment.run(
        agents.judge, JudgeInput(**call_fields(), contenders=contenders)
    )
    plan = await environment.run(
        agents.derive_plan, DerivePlanInput(**call_fields(), design=PROPOSAL, roles=["DEV", "QA"])
    )

    assert proposal.proposal.content
    assert 1 <= len(revision.proposal.decisions) <= 3
    assert criticism.critique.points
    assert judgement.verdict.winner_id in ("qa-1", "qa-2")
    assert {task.role for task in plan.tasks} <= {"DEV", "QA"}


async def test_a_call_reports_its_cost(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    first = (await environment.run(agents.propose, proposing("dev-1"))).usage
    second = (await environment.run(agents.propose, proposing("dev-2"))).usage

    assert (first.act, first.agent_id, first.role) == ("propose", "dev-1", "DEV")
    assert (first.model, first.asks, first.seed) == (llm.model, 1, llm.calls[0].seed)
    assert first.tokens_in > 0
    assert first.tokens_out == llm.calls[0].tokens
    assert first.prompt_hash != second.prompt_hash
    assert first.seed != second.seed
    assert second.cached_tokens > second.tokens_in * 0.9


def asked_by(actor: str) -> ProposeInput:
    request = proposing()
    return request.model_copy(update={"task": request.task.model_copy(update={"actor": actor})})


async def used(store: Redis, actor: str) -> int:
    """Return the tokens that are counted for the actor, in this hour and the last."""
    keys = [key async for key in store.scan_iter(f"swe:tokens:{actor}:*")]
    return sum([int(await store.get(key) or 0) for key in keys])


async def test_every_ask_counts_for_its_caller_and_a_kept_answer_does_not(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    actor = f"eve-{uuid.uuid4().hex}"
    llm.fail("wrong")

    usage = (await environment.run(agents.propose, asked_by(actor))).usage
    again = (await environment.run(agents.propose, asked_by(actor))).usage

    assert (usage.asks, again) == (2, usage)
    assert await used(store, actor) == usage.tokens


async def test_an_agent_is_not_asked_for_a_caller_without_tokens(
    client: httpx.AsyncClient, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    await until_early_in_the_hour()
    actor = f"eve-{uuid.uuid4().hex}"
    llms = VllmAgents(client, store, llm.model, PROMPTS, tokens_per_hour=100)
    agents = Agents({"RAY_VLLM": llms}, KeptPacks(store))
    await TokenQuota(store).count(actor, 60)
    await TokenQuota(store).count(actor, 60)

    error = await refusal(environment.run(agents.propose, asked_by(actor)))
    of_another = await environment.run(agents.propose, asked_by(f"{actor}-2"))

    assert (error.type, error.non_retryable) == ("QuotaUsed", True)
    assert "has used 120 of 100 tokens in this hour, 0 are left" in error.message
    assert error.next_retry_delay is not None
    assert timedelta() < error.next_retry_delay <= timedelta(hours=1)
    assert of_another.proposal.content
    assert len(llm.calls) == 1


async def test_a_run_that_is_repeated_asks_the_same_and_gets_the_same(
    agents: Agents, environment: ActivityEnvironment, store: Redis
) -> None:
    once = await environment.run(agents.propose, proposing())
    await store.delete(key(environment))

    again = await environment.run(agents.propose, proposing())

    assert again.proposal == once.proposal
    assert again.usage.seed == once.usage.seed


async def test_an_agent_may_have_a_different_model(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.models = (llm.model, "large-model")

    await environment.run(agents.propose, proposing("dev-1", model="large-model"))
    await environment.run(agents.propose, proposing("dev-2"))

    assert [call.model for call in llm.calls] == ["large-model", llm.model]


# --- answers that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("empty", "it was empty"),
        ("wrong", "approach: Field required"),
        ("long", "cut off"),
        ("loops", "repeat itself"),
        ("copy", "repeats the instructions"),
    ],
)
async def test_an_answer_that_cannot_be_used_is_asked_again_with_what_was_wrong(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, kind: str, problem: str
) -> None:
    llm.fail(kind)

    answer = await environment.run(agents.propose, proposing())

    first, second = llm.calls
    assert answer.usage.asks == 2
    assert kind == "loops" or answer.usage.tokens_out == first.tokens + second.tokens
    system, asked = first.messages
    assert second.messages[0] == system
    assert second.messages[1]["content"].endswith(asked["content"])
    assert problem in second.messages[1]["content"]
    assert second.seed != first.seed
    assert second.temperature > first.temperature


async def test_three_answers_that_cannot_be_used_are_the_end(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("wrong", times=3)

    error = await refusal(environment.run(agents.propose, proposing()))

    assert (error.type, error.non_retryable) == ("BadAnswer", True)
    assert "approach: Field required" in error.message
    assert len(llm.calls) == 3


async def test_an_answer_that_says_nothing_three_times_is_left_to_the_checks(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("loops", times=3)

    answer = await environment.run(agents.propose, proposing())
    report = await environment.run(
        Checks().check_proposal,
        CheckInput(agent_id="dev-1", proposal=answer.proposal, task="Store every event."),
    )

    assert (answer.usage.asks, len(llm.calls)) == (3, 3)
    assert barred(report)


async def test_a_revision_that_says_nothing_three_times_says_why(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("loops", times=3)

    answer = await environment.run(
        agents.revise, ReviseInput(**call_fields(), proposal=PROPOSAL, critiques=[])
    )

    assert answer.problem == "it repeats itself; say each thing once"
    assert answer.usage.asks == 3


SHED = Task(task_id="t1", role="DEV", description="Paint the garden shed with green colour.")
OFF_TOPIC = """\
An outbox keeps events in their order, and a job publishes each one after it is stored.

## Decisions
- **Outbox**: it survives a crash
"""


async def test_of_answers_that_say_nothing_the_one_that_is_most_about_its_task_is_used(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("text", text="The garden shed is green.\n\n## Decisions\n- **Paint**: it lasts")
    llm.fail("text", times=2, text=OFF_TOPIC)

    answer = await environment.run(agents.propose, ProposeInput(**call_fields() | {"task": SHED}))

    assert "garden shed" in answer.proposal.content


async def test_a_revision_that_is_less_about_its_task_does_not_replace_the_proposal(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    proposal = Proposal(approach="paint", content="Paint the garden shed in green, a nice colour.")
    llm.fail("text", times=3, text=f"Paint the shed.\n\n{OFF_TOPIC}")
    request = ReviseInput(**call_fields() | {"task": SHED}, proposal=proposal, critiques=[])

    answer = await environment.run(agents.revise, request)

    assert answer.proposal == proposal
    assert answer.problem == "it is less about the task than your proposal; write about the task"


async def test_of_a_revision_that_cannot_be_read_the_proposal_is_returned(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("wrong", times=3)

    answer = await environment.run(
        agents.revise, ReviseInput(**call_fields(), proposal=PROPOSAL, critiques=[])
    )

    assert answer.proposal == PROPOSAL
    assert "approach: Field required" in answer.problem


async def test_a_loop_without_a_sentence_is_left_to_the_checks_too(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("drones", times=3)

    answer = await environment.run(agents.propose, proposing())

    assert answer.proposal.content.startswith("and on it goes")
    assert answer.usage.asks == 3


async def test_a_text_that_loops_is_stopped_in_the_engine(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.token_ms = 1
    llm.fail("loops")

    answer = await environment.run(agents.propose, proposing())

    first, second = llm.calls
    assert (first.end, second.end) == ("aborted", "answered")
    assert first.tokens < first.max_tokens / 2
    assert answer.usage.asks == 2


async def test_decisions_that_a_text_lacks_are_chosen_from_its_sentences(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("bare")

    answer = await environment.run(agents.propose, proposing())

    first, second = llm.calls
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[2]["role"] == "assistant"
    assert second.tokens < first.tokens
    assert answer.usage.asks == 2
    assert answer.proposal.decisions
    for decision in answer.proposal.decisions:
        assert decision.title in answer.proposal.content
        assert decision.title in second.messages[2]["content"]


async def test_severities_and_verdict_that_a_critique_lacks_are_asked_for(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("bare")
    fields = call_fields("dev-1")
    proposal = Proposal(approach="An outbox.", content="Append each event, then publish it.")

    answer = await environment.run(
        agents.criticise, CriticiseInput(**fields, author_id="dev-2", proposal=proposal)
    )

    first, second = llm.calls[:2]
    assert second.messages[: len(first.messages)] == first.messages
    assert "severities" in second.messages[-1]["content"]
    severities = [point.severity for point in answer.critique.points]
    assert severities
    assert answer.critique.verdict != "accept" or "high" not in severities


async def test_of_a_text_that_is_cut_off_twice_the_complete_part_is_used(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.fail("long", times=2)

    answer = await environment.run(agents.propose, proposing())

    assert len(llm.calls) in (2, 3)  # a third for the decisions, if they were cut off
    assert answer.proposal.content.endswith((".", "```"))


async def test_the_profile_of_a_model_decides_how_it_is_asked(
    client: httpx.AsyncClient, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    profile = ModelProfile(
        models=["test-*"],
        temperature={"propose": 0.1},
        min_p=0.05,
        thinking=False,
        max_tokens={"propose": 300},
        brief=True,
    )
    llms = VllmAgents(client, store, llm.model, PROMPTS, Profiles([profile]))

    await environment.run(Agents({"RAY_VLLM": llms}, KeptPacks(store)).propose, proposing())

    (call,) = llm.calls
    assert (call.temperature, call.max_tokens) == (0.1, 300)
    assert call.body["min_p"] == 0.05
    assert call.body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "You are dev-1." not in call.prompt
    assert "<example>" not in call.prompt


async def test_a_small_model_with_one_file_writes_text_that_is_added_to_it(
    client: httpx.AsyncClient, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    profile = ModelProfile(models=["test-*"], brief=True)
    llms = VllmAgents(client, store, llm.model, PROMPTS, Profiles([profile]))
    readme = FileText(path="README.md", text="# Events\n\nEvents are stored.\n")
    request = NextActionInput(
        **call_fields(),
        outline=Outline(text="README.md", editable=["README.md"], files=[readme]),
        paths=["README.md"],
        editable=["README.md"],
        allowed=[*EDITS],
        goal=["Say in the README how every event is stored"],
    )
    said = (
        "Every event is stored in the order of its story's changes, and published after that, so "
        "that what a subscriber reads in the README of events is already in the store."
    )
    llm.fail("text", text="1128")
    llm.fail("text", text=said)

    agents = Agents({"RAY_VLLM": llms}, KeptPacks(store))
    answer = await environment.run(agents.next_action, request)

    end = "Events are stored."
    assert answer.action == ReplaceText(path="README.md", old=end, new=f"{end}\n\n{said}")
    assert answer.usage.asks == 2
    assert "response_format" not in llm.calls[0].body


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "the engine is set to fail " * 1_000])
async def test_the_servers_message_is_shown_but_cut(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, text: str
) -> None:
    llm.fail("status", status=422, text=text)

    error = await refusal(environment.run(agents.propose, proposing()))

    assert "the engine is set to fail" in error.message
    assert len(error.message) < 700


@pytest.mark.parametrize(
    ("fault", "type_", "retried"),
    [
        ({"kind": "status", "status": 500}, "LlmServerError", True),
        ({"kind": "status", "status": 503}, "LlmServerError", True),
        ({"kind": "status", "status": 408}, "LlmTimeout", True),
        ({"kind": "status", "status": 409}, "LlmOverloaded", True),
        ({"kind": "status", "status": 429}, "LlmOverloaded", True),
        ({"kind": "status", "status": 400}, "LlmRefused", False),
        ({"kind": "status", "status": 401}, "LlmRefused", False),
        ({"kind": "status", "status": 404}, "LlmRefused", False),
        ({"kind": "status", "status": 404, "text": "no such path yet"}, "LlmUnreachable", True),
        ({"kind": "html"}, "LlmProtocol", True),
        ({"kind": "hang"}, "LlmTimeout", True),
        ({"kind": "stall"}, "LlmTimeout", True),
        ({"kind": "drop"}, "LlmUnreachable", True),
        ({"kind": "ends"}, "LlmUnreachable", True),
        ({"kind": "error"}, "LlmServerError", True),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
async def test_a_failing_engine_is_retried_if_a_retry_can_help(
    agents: Agents,
    llm: LlmServer,
    environment: ActivityEnvironment,
    fault: dict[str, Any],
    type_: str,
    retried: bool,
) -> None:
    llm.fail(**fault)

    error = await refusal(environment.run(agents.propose, proposing()))

    assert (error.type, not error.non_retryable) == (type_, retried), error.message
    assert "127.0.0.1" in error.message
    assert len(llm.calls) == 1  # Temporal retries, the client does not


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        *(("7", 7), ("0.5", 0.5), ("3600", 60), ("1e400", 60), ("inf", 60)),
        *(("soon", None), ("-1", None), ("-inf", None), ("nan", None), ("9" * 400, 60)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 60),
        ("Fri, 31 Dec 99999 23:59:59 +9999", None),
    ],
)
async def test_retry_after_is_the_next_attempts_delay(
    agents: Agents,
    llm: LlmServer,
    environment: ActivityEnvironment,
    header: str,
    seconds: float | None,
) -> None:
    llm.fail("status", status=429, retry_after=header)

    error = await refusal(environment.run(agents.propose, proposing()))

    assert error.next_retry_delay == (None if seconds is None else timedelta(seconds=seconds))


def test_retry_after_may_be_a_date() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)

    assert retry_after(format_datetime(now + timedelta(seconds=9)), now) == timedelta(seconds=9)
    assert retry_after(format_datetime(now - timedelta(seconds=9)), now) is None
    assert retry_after("1e400", now) == timedelta(seconds=60)


def test_every_status_has_its_place_in_the_table() -> None:
    body = b'{"error": {"message": "no", "type": "Error"}}'
    errors = {
        status: status_failure("The LLM", httpx.Response(status), body)
        for status in range(300, 600)
    }

    retried = {status for status, error in errors.items() if not error.non_retryable}
    assert retried == {408, 409, 429, *range(500, 600)}


async def test_an_engine_that_is_away_is_retried(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    await llm.stop()

    error = await refusal(environment.run(agents.propose, proposing()))

    assert (error.type, error.non_retryable) == ("LlmUnreachable", False)


async def test_a_model_that_is_not_served_is_refused_with_those_that_are(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    error = await refusal(environment.run(agents.propose, proposing(model="gpt-none")))

    assert (error.type, error.non_retryable) == ("LlmRefused", True)
    assert "gpt-none" in error.message
    assert llm.model in error.message
    assert not llm.calls


@pytest.mark.parametrize("kind", ["MOCK", "mock", "MOCK_LLM"])
async def test_a_mock_agent_is_refused(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, kind: str
) -> None:
    mock = Agent(agent_id="dev-1", role="DEV").model_copy(update={"agent_type": kind})
    request = proposing().model_copy(update={"agent": mock})

    error = await refusal(environment.run(agents.propose, request))

    assert (error.message, error.non_retryable) == ("Mock agents not allowed in production", True)
    assert not llm.calls


async def test_an_agent_of_an_unknown_type_is_refused_with_what_to_use(
    agents: Agents, environment: ActivityEnvironment
) -> None:
    error = await refusal(environment.run(agents.propose, proposing(agent_type="NATS")))

    assert (error.type, error.non_retryable) == ("AgentTypeNotSupported", True)
    assert "use one of RAY_VLLM, VLLM" in error.message


# --- no answer is paid for twice ------------------------------------------------------------------


def key(environment: ActivityEnvironment, act: str = "propose", agent_id: str = "dev-1") -> str:
    return answer_key(environment.info, 1, act, agent_id)


async def kept(store: Redis, environment: ActivityEnvironment) -> ProposalAnswer:
    answer = await store.get(key(environment))
    assert answer is not None
    return ProposalAnswer.model_validate_json(answer)


async def test_a_finished_answer_is_not_asked_for_again(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    once = await environment.run(agents.propose, proposing())

    again = await environment.run(agents.propose, proposing())

    assert again == once
    assert len(llm.calls) == 1
    assert await kept(store, environment) == once
    assert 0 < await store.ttl(key(environment)) <= ANSWER_TTL.total_seconds()


async def test_another_agent_wave_act_or_run_is_another_call(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    request = proposing()
    await environment.run(agents.propose, request)

    await environment.run(agents.propose, proposing("dev-2"))
    await environment.run(agents.propose, request.model_copy(update={"wave": 2}))
    await environment.run(
        agents.revise, ReviseInput(**call_fields(), proposal=PROPOSAL, critiques=[])
    )
    environment.info = dataclasses.replace(environment.info, workflow_run_id=str(uuid.uuid4()))
    await environment.run(agents.propose, request)

    assert len(llm.calls) == 5


async def test_a_call_reads_the_pack_that_it_refers_to(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, store: Redis
) -> None:
    pack = ContextPack(system="You are a DEV.", context="The story of the day.", version="v")
    key = await Cache(store).keep_blocks("US-1", pack)
    reference = ContextPack(version="v", kept_at=key)
    call = proposing().model_copy(update={"pack": reference})

    await environment.run(agents.propose, call)

    assert "The story of the day." in str(llm.calls[0].messages)
    assert await store.ttl(key) > 3_500


async def test_a_call_whose_pack_is_gone_asks_for_it(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    reference = ContextPack(version="v", kept_at="swe:pack:US-1:gone")

    error = await refusal(
        environment.run(agents.propose, proposing().model_copy(update={"pack": reference}))
    )

    assert (error.type, error.non_retryable) == ("PackMissing", True)
    assert not llm.calls


async def test_an_answer_waits_for_a_valkey_that_is_away(
    agents: Agents,
    llm: LlmServer,
    environment: ActivityEnvironment,
    store: Redis,
    valkey: RunningServer,
) -> None:
    heartbeats = recorded(environment)
    llm.answering.clear()
    call = asyncio.ensure_future(environment.run(agents.propose, proposing()))
    await until(lambda: bool(llm.calls))

    await valkey.kill()
    llm.answering.set()
    await until(lambda: bool(heartbeats) and "waiting for Valkey" in heartbeats[-1]["state"])
    await valkey.start()

    answer = await call
    assert await kept(store, environment) == answer
    assert len(llm.calls) == 1


async def test_without_valkey_nothing_is_asked(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, valkey: RunningServer
) -> None:
    await valkey.kill()

    error = await refusal(environment.run(agents.propose, proposing()))
    await valkey.start()

    assert (error.type, error.non_retryable) == ("StoreUnreachable", False)
    assert not llm.calls


# --- running calls --------------------------------------------------------------------------------


def recorded(environment: ActivityEnvironment) -> list[dict[str, Any]]:
    heartbeats: list[dict[str, Any]] = []
    environment.on_heartbeat = heartbeats.append
    return heartbeats


def received(heartbeats: list[dict[str, Any]]) -> bool:
    return any(beat["tokens"] for beat in heartbeats)


async def test_heartbeats_carry_the_tokens_so_far(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    heartbeats = recorded(environment)
    llm.fail("slow", ms=4)

    answer = await environment.run(agents.propose, proposing())

    counts = [beat["tokens"] for beat in heartbeats]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert 0 < counts[-1] <= answer.usage.tokens_out
    assert {(beat["act"], beat["agent_id"]) for beat in heartbeats} == {("propose", "dev-1")}


@pytest.mark.parametrize("kind", ["slow", "hang"])
async def test_cancelling_stops_the_generation_in_the_engine(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment, kind: str
) -> None:
    heartbeats = recorded(environment)
    llm.fail(kind, ms=20)
    call = asyncio.ensure_future(environment.run(agents.propose, proposing()))
    # Not only sent by the engine: a cancelled call reports what the agent has received.
    await until(lambda: bool(llm.calls and (kind == "hang" or received(heartbeats))))

    environment.cancel()

    # A call that has cost something reports it: Temporal's own cancellation has no details.
    with pytest.raises(ApplicationError if kind == "slow" else asyncio.CancelledError):
        await call
    await until(lambda: llm.calls[0].end == "aborted")
    beats = len(heartbeats)
    await asyncio.sleep(0.05)
    assert len(heartbeats) == beats


# --- the model's context window -------------------------------------------------------------------


def huge() -> ProposeInput:
    request = proposing()
    task = request.task.model_copy(update={"description": "Store every event. " * 50_000})
    return request.model_copy(update={"task": task})


async def test_a_brief_of_a_megabyte_fits_a_small_model(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.window = 2_048

    answer = await environment.run(agents.propose, huge())

    assert answer.usage.tokens_in < 2_048
    assert [call.end for call in llm.calls] == ["answered"]


async def test_a_prompt_that_the_engine_finds_too_long_is_cut_further(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.window, llm.bytes_per_token = 4_096, 0.6

    answer = await environment.run(agents.propose, huge())

    assert answer.proposal.content
    assert [call.end for call in llm.calls] == ["refused", "refused", "answered"]


async def test_an_engine_that_comes_back_with_a_shorter_window_is_noticed(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    await environment.run(agents.propose, huge())
    llm.window = 2_048

    await environment.run(agents.propose, huge().model_copy(update={"wave": 2}))

    assert [call.end for call in llm.calls] == ["answered", "refused", "answered"]


async def test_a_window_that_holds_no_prompt_at_all_is_refused(
    agents: Agents, llm: LlmServer, environment: ActivityEnvironment
) -> None:
    llm.window = 128

    error = await refusal(environment.run(agents.propose, proposing()))

    assert (error.type, error.non_retryable) == ("PromptTooLong", True)
    assert "longer window" in error.message
