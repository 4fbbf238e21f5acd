"""The benchmark of answers on a whole fleet, with an LLM behind real HTTP."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.bench import answers as bench
from tests.bench.answers import answers
from tests.bench.judges import load_tasks
from tests.bench.results import Answer
from tests.support.llm_server import LlmServer
from tests.support.polling import until

PROPOSAL = {
    "approach": "Count the requests of each client, and refuse what is over its limit.",
    "content": "A client has a bucket of tokens; a request takes one, and an empty bucket answers "
    "429. Buckets are filled at a constant rate, and one that stays full is forgotten in an hour.",
    "decisions": [{"title": "Buckets", "rationale": "They allow bursts.", "affects": []}],
}

WAYS = ["one agent", "plain", "best of three", "council"]


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of the answers; two tasks are chosen, for a council of two."""
    file = tmp_path / "answers.jsonl"
    monkeypatch.setattr(bench, "KEPT", file)
    monkeypatch.setenv("TASKS", "design-rate-limit, plan-health")
    monkeypatch.setenv("AGENTS", "2")
    return file


def has_lines(file: Path, count: int) -> bool:
    return file.exists() and len(file.read_text().splitlines()) >= count


def answers_in(file: Path) -> list[Answer]:
    return [Answer.model_validate_json(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
async def test_two_tasks_are_asked_in_every_way_and_resumed_after_an_interruption(
    tmp_path: Path,
    kept: Path,
    llm: LlmServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_URL", llm.url.removesuffix("/v1"))
    llm.documents["propose"] = llm.documents["revise"] = lambda _: PROPOSAL  # no copy of the task
    first = asyncio.create_task(answers(tmp_path / "first"))
    await until(lambda: first.done() or has_lines(kept, 3))
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    before, out = answers_in(kept), capsys.readouterr().out
    assert "tasks met" in out
    assert f"{len(before)} of 6 answers" in out

    monkeypatch.setenv("RESUME", "1")
    figures = await answers(tmp_path / "second")

    found = answers_in(kept)
    assert found[: len(before)] == before
    assert [(each.task, each.way) for each in found] == [
        *(("design-rate-limit", way) for way in WAYS),
        *(("plan-health", way) for way in WAYS[:2]),
    ]
    assert [each.error for each in found] == [""] * 6
    assert all(each.text and each.seeds and each.tokens_out for each in found)
    # One call; the same words plainly; three proposals; and two of each wave of a council of two,
    # with a judge's call if the checks did not decide.
    assert [len(each.seeds) for each in found[:3]] == [1, 1, 3]
    assert len(found[3].seeds) in (6, 7)
    figure = {each.what: each for each in figures}
    assert figure["copies through the fleet"].value == 0
    assert {f"{way}, all tasks: tasks met" for way in WAYS[:2]} <= figure.keys()
    assert "council of 2, 1 rounds, asked in every way: tokens" in figure

    one, plainly = found[:2]
    asked = next(call for call in llm.calls if call.act == "text")
    task = next(task for task in load_tasks() if task.id == one.task)
    assert asked.messages == [{"role": "user", "content": task.ask}]
    assert (asked.seed, asked.max_tokens, asked.temperature) == (
        one.seeds[0],
        one.max_tokens,
        one.temperature,
    )
    assert plainly.model == one.model == "test-model"
    shown = capsys.readouterr().out
    assert "[6/6] plan-health, plain" in shown
    assert "kept: design-rate-limit, one agent" in shown
