"""What the comparison with other systems counts, and what their calls are."""

from __future__ import annotations

import json
from dataclasses import asdict

from openai import AsyncOpenAI

from tests.bench.calls import waves_of
from tests.bench.peers.comparison import FLEET, PEERS, figures_of
from tests.bench.peers.rounds import ALONE, ROUNDS, Calls, Speed, speed
from tests.bench.replay import Body, repeat
from tests.support.llm_server import TEXT_ACTS, LlmServer

TOPIC = "0123456789abcdef0123456789abcdef"
SPEEDS = {name: Speed(alone_s=0.1, round_s=2.0) for name in (FLEET, *(p.name for p in PEERS))}


def body_of(act: str) -> Body:
    return {
        "model": "test-model",
        "messages": [{"role": "user", "content": f"{TEXT_ACTS[act]}\n\nLimit {TOPIC}"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "max_tokens": 500,
        "seed": 7,
    }


def test_a_judges_call_is_in_no_wave() -> None:
    judge = body_of("propose") | {"response_format": {"json_schema": {"name": "judge"}}}
    sent = [body_of("propose"), body_of("propose"), body_of("criticise"), body_of("revise"), judge]

    assert waves_of(sent) == [sent[:2], sent[2:3], sent[3:4]]


def test_each_deliberation_makes_the_same_calls_about_another_topic() -> None:
    calls = Calls(TOPIC, [[body_of("propose")] * 3, [body_of("revise")]])

    first, second = calls.again(), calls.again()

    assert calls.count == 4
    assert [len(wave) for wave in first] == [3, 1]
    assert TOPIC not in json.dumps([first, second])
    assert first != second
    assert len(json.dumps(first)) == len(json.dumps(calls.waves))


def test_a_program_reads_the_calls_that_it_is_given() -> None:
    calls = Calls(TOPIC, [[body_of("propose")]])

    assert Calls(**json.loads(json.dumps(asdict(calls)))) == calls


async def test_a_round_runs_all_deliberations_after_one_that_warms_up() -> None:
    done = []

    async def once() -> None:
        done.append(1)

    measured = await speed(once, 4)

    assert len(done) == 4 * (1 + ROUNDS) + ALONE
    assert measured.round_s > 0 < measured.alone_s


def test_the_fleet_is_compared_with_the_faster_system_on_temporal() -> None:
    slower = {"pydantic-ai on Temporal": Speed(alone_s=1.0, round_s=8.0)}

    figures = {each.what: each for each in figures_of(SPEEDS | slower, 9, 9.5)}

    rate = figures["calls a second, 20 deliberations at once: the fleet"]
    assert (rate.value, rate.met) == (90.0, True)
    ratio = figures[
        "calls a second, 20 deliberations at once: the fleet / the best peer on Temporal"
    ]
    assert ratio.value == 1.0
    alone = figures["one deliberation alone: the fleet"]
    assert (alone.value, alone.met) == (100.0, True)


def test_peers_that_cannot_be_installed_have_no_figures() -> None:
    installed = {peer.name for peer in PEERS if not peer.in_extra} | {FLEET}
    speeds = {name: each for name, each in SPEEDS.items() if name in installed}

    figures = figures_of(speeds, 9, 9.5)

    assert len(figures) == 2 * len(installed) + 1
    assert not any("LangGraph" in each.what for each in figures)


async def test_an_answer_is_the_same_whether_it_is_streamed_or_not() -> None:
    async with LlmServer() as engine, AsyncOpenAI(base_url=engine.url, api_key="none") as client:
        body = body_of("propose")
        streamed = await repeat(client, body)
        whole = await client.chat.completions.create(
            model=body["model"],
            messages=body["messages"],
            temperature=body["temperature"],
            max_tokens=body["max_tokens"],
            seed=body["seed"],
        )

    assert whole.choices[0].message.content == streamed.text
    assert whole.usage
    assert whole.usage.completion_tokens == streamed.usage.completion_tokens
    assert [call.end for call in engine.calls] == ["answered", "answered"]
