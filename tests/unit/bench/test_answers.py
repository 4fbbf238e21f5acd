"""The benchmark of answers without a fleet: what is asked, and how answers are counted."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from openai import AsyncOpenAI
from rich.console import Console

from activities.checks.sandbox import Sandbox
from tests.bench.answers import Options, Progress, ask_plainly, read_options, source_of
from tests.bench.calls import Recorder
from tests.bench.judges import load_tasks
from tests.bench.results import Answer, figures_of, paired, row, tables
from tests.support.llm_server import LlmServer

WAYS = ("plain", "one agent", "best of three", "council")


def an_answer(task: str = "code-lru", way: str = "one agent", **fields: Any) -> Answer:
    given: dict[str, Any] = {
        "task": task,
        "kind": "code",
        "way": way,
        "agents": 3 if way == "council" else 1,
        "rounds": 0,
        "number": 1,
        "model": "test-model",
        "seeds": [7],
        "max_tokens": 100,
        "temperature": 0.5,
        "text": "x",
        "tokens_in": 10,
        "tokens_out": 20,
        "cached_tokens": 5,
        "seconds": 2,
        "criteria": {"length": "", "tests": "AssertionError"},
    }
    return Answer.model_validate(given | fields)


# --- what is asked --------------------------------------------------------------------------------


def test_a_number_of_tasks_is_spread_over_the_kinds() -> None:
    every = load_tasks()

    chosen = Options(tasks="8").chosen(every)

    assert len(chosen) == 8
    assert len({task.kind for task in chosen}) >= 6
    assert Options(tasks="").chosen(every) == every


def test_tasks_are_chosen_by_kind_or_by_a_part_of_their_ids() -> None:
    chosen = Options(tasks="plan, lru").chosen(load_tasks())

    assert [task.id for task in chosen if task.kind != "plan"] == [
        "code-lru",
        *(task.id for task in load_tasks() if task.id.startswith("test-plan")),
    ]
    assert sum(task.kind == "plan" for task in chosen) == 3


@pytest.mark.parametrize("tasks", ["0", "31", "nothing"])
def test_a_choice_without_tasks_is_refused(tasks: str) -> None:
    with pytest.raises(ValueError, match=r"TASKS: .* give a number from 1 to 30"):
        Options(tasks=tasks).chosen(load_tasks())


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("AGENTS", "0", "AGENTS: Input should be greater than or equal to 1"),
        ("AGENTS", "4", "AGENTS: 4 is more than the 3 agents of a council"),
        ("SEEDS", "0", "SEEDS: "),
    ],
)
def test_a_wrong_option_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ValueError, match=problem):
        read_options()


# --- what an answer should not repeat -------------------------------------------------------------


def test_the_source_has_the_first_prompt_and_all_personas_system_messages_and_schemas() -> None:
    first = {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}],
        "response_format": {"name": "s1"},
    }
    later = {
        "messages": [{"role": "system", "content": "c"}, {"role": "user", "content": "my draft"}],
        "response_format": {"name": "s2"},
    }

    source = source_of([first, later], ["You test."])

    assert source.split("\n\n") == ["a", "b", "You test.", '{"name": "s1"}', "c", '{"name": "s2"}']


# --- plain calls ----------------------------------------------------------------------------------


async def plainly(llm: LlmServer) -> Answer:
    task = next(task for task in load_tasks() if task.id == "critique-sql")
    like = an_answer(task.id, text="a critique", error="none", tokens_in=900)
    async with AsyncOpenAI(base_url=llm.url, api_key="none", max_retries=0) as engine:
        return await ask_plainly(engine, Sandbox(), task, like)


async def test_a_plain_call_sends_the_task_and_its_proposal_as_the_fleet_asked(
    llm: LlmServer,
) -> None:
    answer = await plainly(llm)

    (call,) = llm.calls
    assert [message["role"] for message in call.messages] == ["user"]
    assert "Review this proposal" in call.prompt
    assert "SELECT id, name, email" in call.prompt
    assert (call.model, call.seed, call.max_tokens, call.temperature) == ("test-model", 7, 100, 0.5)
    assert (answer.way, answer.error, answer.tokens_out) == ("plain", "", call.tokens)
    assert 0 < answer.tokens_in < 900
    assert answer.text not in ("", "a critique")


async def test_a_plain_call_that_fails_is_an_answer_without_text(llm: LlmServer) -> None:
    llm.fail("status", status=500)

    answer = await plainly(llm)

    assert (answer.text, answer.tokens_out, answer.is_met) == ("", 0, False)
    assert "the engine is set to fail" in answer.error


async def test_the_recorder_passes_the_key_and_the_path_on_to_the_endpoint() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response([request.path, request.headers.get("Authorization")])

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/api/v2"
    try:
        async with Recorder(endpoint) as recorder, ClientSession() as http:
            url, key = f"{recorder.url}/chat/completions", {"Authorization": "Bearer secret"}
            async with http.post(url, json={"seed": 7}, headers=key) as response:
                assert await response.json() == ["/api/v2/chat/completions", "Bearer secret"]
            assert recorder.bodies == [{"seed": 7}]
    finally:
        await runner.cleanup()


# --- how answers are counted ----------------------------------------------------------------------


def test_a_row_counts_the_answers_of_a_way() -> None:
    met = an_answer(criteria={"length": ""}, is_met=True, basic=True)
    copy = an_answer(task="code-bug", is_copy=True, tokens_out=40, seconds=4)
    failed = an_answer(
        task="code-slug", text="", error="LlmRefused", tokens_in=0, tokens_out=0, cached_tokens=0
    )

    found = row("one agent", [met, copy, failed])

    assert (found.answers, found.met, found.basic, found.copies, found.unanswered) == (
        3,
        1,
        1,
        1,
        1,
    )
    assert found.criteria == 3 / 5
    assert (found.tokens, found.written, found.seconds) == (40, 30, 3)
    assert found.cached == 10 / 20


def test_only_tasks_with_an_answer_in_every_way_are_compared_with_a_council() -> None:
    every = [an_answer(way=way) for way in WAYS]
    plan = [an_answer("plan-health", way) for way in WAYS[:2]]
    other_seed = [an_answer(way=way, number=2) for way in WAYS[:3]]

    assert paired([*every, *plan, *other_seed]) == every
    assert paired(plan) == []


def test_the_figures_compare_the_fleet_with_plain_calls_and_count_its_copies() -> None:
    given = [an_answer(way=way, basic=way == "plain", is_copy=way == "council") for way in WAYS]

    figures = {figure.what: figure for figure in figures_of(given)}

    basic, copies = figures["basic answers through the fleet"], figures["copies through the fleet"]
    assert (basic.value, basic.met) == (0, False)
    assert (copies.value, copies.met) == (1, False)
    assert figures["council of 3, 0 rounds, asked in every way: criteria met"].value == 50


def test_there_is_a_table_of_the_answers_so_far_and_none_without_answers() -> None:
    assert [table.title for table in tables([an_answer()])] == ["All tasks"]
    assert list(tables([])) == []


# --- answers that are kept ------------------------------------------------------------------------


def test_kept_answers_are_used_again_only_if_the_run_is_resumed(tmp_path: Path) -> None:
    file, out = tmp_path / "answers.jsonl", io.StringIO()
    first = Progress(file, resume=False, expected=2, out=Console(file=out, width=200))
    answer = first.add(an_answer())

    resumed = Progress(file, resume=True, expected=2, out=Console(file=out, width=200))
    assert resumed.again(answer.key) == answer
    assert resumed.again(an_answer("code-bug").key) is None
    assert resumed.answers == [answer]
    assert "[1/2] kept: code-lru, one agent: 1 of 2 criteria (not tests)" in out.getvalue()

    again = Progress(file, resume=False, expected=2, out=Console(file=out, width=200))
    assert again.again(answer.key) is None
    assert file.read_text() == ""
