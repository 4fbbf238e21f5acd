"""The agents' language model: vLLM on Ray Serve, called with the OpenAI client as agents do."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError
from openai.types import CompletionUsage

from tests.e2e.conftest import Fleet
from tests.support.listeners import addresses_of, is_loopback
from tests.support.polling import until

pytestmark = pytest.mark.timeout(5400)

SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"type": "string", "enum": ["accept", "revise"]},
        "points": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {"type": "string", "minLength": 1, "maxLength": 40},
        },
    },
    "required": ["verdict", "points"],
    "additionalProperties": False,
}
SHARED = "You are on a council that reviews how a service limits requests. " * 40


@pytest.fixture
async def llm(fleet: Fleet) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=fleet.env["VLLM_URL"], api_key="none", max_retries=0, timeout=900
    ) as client:
        yield client


@pytest.mark.parametrize(
    "headers", [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_a_web_page_of_another_site_is_refused(
    fleet: Fleet, method: str, headers: dict[str, str]
) -> None:
    preflight = {"Access-Control-Request-Method": "POST"} if method == "OPTIONS" else {}
    async with httpx.AsyncClient(base_url=fleet.env["VLLM_URL"], trust_env=False) as http:
        answer = await http.request(method, "/models", headers=headers | preflight)

    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def prompt(text: str) -> list[Any]:
    return [{"role": "system", "content": SHARED}, {"role": "user", "content": text}]


async def ask(
    llm: AsyncOpenAI, fleet: Fleet, messages: list[Any], **options: Any
) -> tuple[str, str, CompletionUsage]:
    """Stream one answer; return its text, its finish reason and its usage."""
    text, reason, usage = "", "", None
    stream = await llm.chat.completions.create(
        model=fleet.env["VLLM_MODEL"],
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    assert usage is not None
    return text, reason, usage


async def test_an_answer_holds_to_its_schema_without_padding(
    llm: AsyncOpenAI, fleet: Fleet
) -> None:
    text, reason, usage = await ask(
        llm,
        fleet,
        prompt("Review it."),
        max_tokens=200,
        seed=7,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "critique", "schema": SCHEMA, "strict": True},
        },
    )

    answer = json.loads(text)
    assert reason == "stop"
    assert answer["verdict"] in ("accept", "revise")
    assert all(1 <= len(point) <= 40 for point in answer["points"])
    assert len(answer["points"]) <= 2
    assert "\n" not in text
    assert usage.completion_tokens > 0


async def test_a_council_shares_one_prefill(llm: AsyncOpenAI, fleet: Fleet) -> None:
    await ask(llm, fleet, prompt("First."), max_tokens=1)

    *_, usage = await ask(llm, fleet, prompt("Second."), max_tokens=1)

    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert cached > 0.8 * usage.prompt_tokens


async def test_seeded_calls_with_long_prompts_at_once_are_all_answered(
    llm: AsyncOpenAI, fleet: Fleet
) -> None:
    """The prompts together do not fit into one step of the engine."""
    long = [f"Story {number}: " + "this part limits requests. " * 200 for number in range(4)]

    answers = await asyncio.gather(
        *(ask(llm, fleet, prompt(text), max_tokens=4, seed=3, temperature=0.8) for text in long)
    )

    assert [usage.completion_tokens > 0 for *_, usage in answers] == [True] * 4
    assert all(usage.prompt_tokens > 1200 for *_, usage in answers)


async def test_the_same_seed_gives_the_same_answer(llm: AsyncOpenAI, fleet: Fleet) -> None:
    first, *_ = await ask(llm, fleet, prompt("Name a limit."), max_tokens=16, seed=11)

    again, *_ = await ask(llm, fleet, prompt("Name a limit."), max_tokens=16, seed=11)

    assert again == first


async def test_a_call_that_is_given_up_stops_the_engine(llm: AsyncOpenAI, fleet: Fleet) -> None:
    log = fleet.stack.supervisor.log("ray")
    before = log.stat().st_size
    endless = llm.chat.completions.create(
        model=fleet.env["VLLM_MODEL"],
        messages=prompt("Count for ever."),
        max_tokens=1000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    stream = await endless
    await anext(aiter(stream))

    await stream.close()

    await until(lambda: "CALL chat CANCELLED" in log.read_text(errors="replace")[before:])
    text, *_ = await ask(llm, fleet, prompt("Still there?"), max_tokens=4)
    assert text


async def test_a_prompt_that_is_too_long_is_refused_as_a_bad_request(
    llm: AsyncOpenAI, fleet: Fleet
) -> None:
    with pytest.raises(BadRequestError, match="maximum context length"):
        await ask(llm, fleet, prompt("word " * 20_000), max_tokens=10)


async def test_nothing_of_the_fleet_listens_beyond_loopback(fleet: Fleet) -> None:
    addresses = addresses_of(fleet.stack.supervisor.stray_pids())

    assert len(addresses) >= 10  # the servers, the workers, and Ray's own
    assert [address for address in addresses if not is_loopback(address[0])] == []
