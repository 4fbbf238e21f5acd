"""The quality of answers: the same tasks asked plainly and through the fleet, judged by programs.

`make bench PART=answers` asks each task of `tests/bench/tasks` in these ways, at the same
endpoint, with the same model, tokens and temperature:

- plain: one chat completion with the task's words only;
- one agent: through the fleet, without a review;
- best of three: three agents, without a review; the checks choose;
- council: AGENTS agents and ROUNDS rounds of review.

A critique and a plan are one call of an agent, so they are asked in the first two ways only. Every
answer is kept in `.fleet/answers.jsonl` as soon as it is judged.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openai import AsyncOpenAI, OpenAIError
from openai.types import CompletionUsage
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from rich.console import Console
from temporalio.client import Client, WorkflowFailureError
from temporalio.worker import Worker

from activities.checks.sandbox import Sandbox
from activities.graph.councils import Councils, load_councils
from deploy.local.server import ROOT
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from tests.bench import judges
from tests.bench.acts import QUEUE, ActAnswer, ActInput, ActWorkflow
from tests.bench.calls import Recorder
from tests.bench.figures import Figure
from tests.bench.replay import Body
from tests.bench.results import BEST, COUNCIL, ONE, PLAIN, Answer, figures_of, tables
from tests.support.site import Site
from workflows.models import agents
from workflows.models.agents import MAX_AGENTS, MAX_ROUNDS, CallUsage
from workflows.models.deliberation import DeliberationInput, DeliberationResult

KEPT = ROOT / ".fleet" / "answers.jsonl"
COUNCILS = ROOT / "deploy" / "config" / "councils.yaml"

TIMEOUT_S = 3_600
"""Of one deliberation: a small machine takes minutes for a council's answer."""


class Options(BaseSettings):
    """What is asked, from the environment.

    Attributes:
        agents: how many agents the council has.
        rounds: how many rounds of review the council has.
        tasks: a number of tasks, or parts of ids or kinds, separated by commas; empty: all.
        seeds: how often each task is asked, each time with other seeds.
        resume: whether answers that an earlier run kept are used again.
    """

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    agents: int = Field(3, ge=1, le=MAX_AGENTS)
    rounds: int = Field(1, ge=0, le=MAX_ROUNDS)
    tasks: str = ""
    seeds: int = Field(1, ge=1)
    resume: bool = False

    def chosen(self, every: Sequence[judges.Task]) -> list[judges.Task]:
        """Return the chosen tasks; a number spreads them over all kinds.

        Raises:
            ValueError: no task is chosen.
        """
        if self.tasks.isdigit() and 0 < int(self.tasks) <= len(every):
            count = int(self.tasks)
            return [every[number * len(every) // count] for number in range(count)]
        parts = [part.strip() for part in self.tasks.split(",") if part.strip()]
        found = [
            task
            for task in every
            if not parts or any(part == task.kind or part in task.id for part in parts)
        ]
        if self.tasks.isdigit() or not found:
            kinds = ", ".join(sorted({task.kind for task in every}))
            raise ValueError(
                f"TASKS: {self.tasks!r} chooses no task; give a number from 1 to {len(every)}, "
                f"or parts of ids or kinds ({kinds})"
            )
        return found


def read_options() -> Options:
    """Read the options.

    Raises:
        ValueError: an option is wrong, or a council has fewer agents than it is to have.
    """
    try:
        options = Options()
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{str(first['loc'][0]).upper()}: {first['msg']}") from None
    most = min(map(len, councils().councils.values()))
    if options.agents > most:
        raise ValueError(
            f"AGENTS: {options.agents} is more than the {most} agents of a council; add agents to "
            "councils.yaml in the folder FLEET_CONFIG"
        )
    return options


def councils() -> Councils:
    """Read the councils that the fleet is started with."""
    folder = os.environ.get("FLEET_CONFIG")
    return load_councils(Path(folder) / COUNCILS.name if folder else COUNCILS)


@dataclass(frozen=True)
class Way:
    """A way of asking through the fleet."""

    name: str
    agents: int
    rounds: int
    judged: bool = True


def ways(options: Options) -> list[Way]:
    return [
        Way(ONE, 1, 0),
        Way(BEST, 3, 0, judged=False),
        Way(COUNCIL, options.agents, options.rounds),
    ]


# --- asking ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """A fleet whose calls are recorded, the endpoint behind it, and the judges' sandbox."""

    client: Client
    recorder: Recorder
    sandbox: Sandbox


async def ask_fleet(fleet: Fleet, task: judges.Task, way: Way, number: int) -> Answer:
    """Ask the task through the fleet.

    Args:
        fleet: the fleet.
        task: the task.
        way: how it is asked.
        number: the repetition; other numbers get other seeds.
    """
    fleet.recorder.bodies.clear()
    task_id = f"answers-{task.id}-{way.name.replace(' ', '-')}-{number}"
    began, text, error = time.perf_counter(), "", ""
    usage: list[CallUsage] = []
    try:
        if task.material:
            text, usage = await act(fleet.client, task, task_id)
        else:
            text, usage = await deliberate(fleet.client, task, task_id, way)
    except WorkflowFailureError as failure:
        error = cause_of(failure)
    seconds = time.perf_counter() - began
    bodies = list(fleet.recorder.bodies)
    if not bodies:
        raise RuntimeError(f"{task.id}: the fleet called no model: {error}")
    answer = Answer(
        task=task.id,
        kind=task.kind,
        way=way.name,
        agents=way.agents,
        rounds=way.rounds,
        number=number,
        model=bodies[0]["model"],
        seeds=[body["seed"] for body in bodies],
        max_tokens=bodies[0]["max_tokens"],
        temperature=bodies[0]["temperature"],
        text=text,
        error=error,
        tokens_in=sum(each.tokens_in for each in usage),
        tokens_out=sum(each.tokens_out for each in usage),
        cached_tokens=sum(each.cached_tokens for each in usage),
        seconds=seconds,
    )
    personas = [seat.persona for seat in councils().councils[task.role]]
    return await judged(answer, task, source_of(bodies, personas), fleet.sandbox)


async def deliberate(
    client: Client, task: judges.Task, task_id: str, way: Way
) -> tuple[str, list[CallUsage]]:
    handle = await client.start_workflow(
        "DeliberationWorkflow",
        DeliberationInput(
            task_id=task_id,
            role=task.role,
            description=task.ask,
            agents=way.agents,
            rounds=way.rounds,
            judged=way.judged,
            timeout=TIMEOUT_S,
        ),
        id=f"deliberation-{task_id}",
        task_queue="story",
        result_type=DeliberationResult,
    )
    result = await handle.result()
    winner = result.winner
    return (f"{winner.approach}\n\n{winner.content}" if winner else ""), result.usage


async def act(client: Client, task: judges.Task, task_id: str) -> tuple[str, list[CallUsage]]:
    assert task.material
    answer: ActAnswer = await client.execute_workflow(
        ActWorkflow.run,
        ActInput(
            act="criticise" if task.kind == "critique" else "derive_plan",
            task=agents.Task(task_id=task_id, role=task.role, phase="BUILD", description=task.ask),
            material=task.material,
        ),
        id=task_id,
        task_queue=QUEUE,
    )
    return answer.text, [answer.usage]


def cause_of(failure: WorkflowFailureError) -> str:
    cause: BaseException = failure
    while cause.__cause__:
        cause = cause.__cause__
    return str(cause)[:300]


def source_of(bodies: Sequence[Body], personas: Sequence[str]) -> str:
    """Return the texts that an answer should not repeat: prompt, personas and schemas.

    Later prompts quote the agents' own proposals, so only their system messages count.
    """
    texts = [message["content"] for message in bodies[0]["messages"]] + list(personas)
    for body in bodies:
        texts += [each["content"] for each in body["messages"] if each["role"] == "system"]
        texts.append(json.dumps(body.get("response_format", "")))
    return "\n\n".join(dict.fromkeys(texts))


async def ask_plainly(
    engine: AsyncOpenAI, sandbox: Sandbox, task: judges.Task, like: Answer
) -> Answer:
    """Send the task's words only.

    Args:
        engine: the endpoint's client.
        sandbox: the judges' sandbox.
        task: the task.
        like: the fleet's answer, whose model, tokens, temperature and first seed are used.
    """
    began, text, error = time.perf_counter(), "", ""
    usage = CompletionUsage(prompt_tokens=0, completion_tokens=0, total_tokens=0)
    try:
        stream = await engine.chat.completions.create(
            model=like.model,
            messages=[{"role": "user", "content": task.plain}],
            max_tokens=like.max_tokens,
            temperature=like.temperature,
            seed=like.seeds[0],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    except OpenAIError as failure:
        text, error = "", str(failure)[:300]
    details = usage.prompt_tokens_details
    answer = like.model_copy(
        update={
            "way": PLAIN,
            "seeds": like.seeds[:1],
            "text": text,
            "error": error,
            "tokens_in": usage.prompt_tokens,
            "tokens_out": usage.completion_tokens,
            "cached_tokens": (details.cached_tokens or 0) if details else 0,
            "seconds": time.perf_counter() - began,
        }
    )
    return await judged(answer, task, task.plain, sandbox)


async def judged(answer: Answer, task: judges.Task, source: str, sandbox: Sandbox) -> Answer:
    found = await judges.judge(task, answer.text, source, sandbox)
    return answer.model_copy(
        update={
            "criteria": dict(found.criteria),
            "basic": found.basic,
            "copied": found.copied,
            "is_copy": found.is_copy,
            "is_met": found.is_met,
        }
    )


# --- all tasks, in all ways -----------------------------------------------------------------------


class Progress:
    """The answers so far: shown, and kept in a file, a line each."""

    def __init__(self, file: Path, resume: bool, expected: int, out: Console) -> None:
        """Start with no answers.

        Args:
            file: keeps the answers; what an earlier run kept is removed, unless it is resumed.
            resume: whether answers in the file are used again.
            expected: how many answers there will be.
            out: shows them.
        """
        self.answers: list[Answer] = []
        self.file, self.expected, self.out = file, expected, out
        lines = file.read_text().splitlines() if resume and file.exists() else []
        kept = [Answer.model_validate_json(line) for line in lines]
        self.kept = {answer.key: answer for answer in kept}
        file.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            file.write_text("")

    def again(self, key: tuple[str, str, int, int, int]) -> Answer | None:
        """Return the answer that an earlier run kept, if there is one."""
        if answer := self.kept.get(key):
            self._show(answer, "kept: ")
        return answer

    def add(self, answer: Answer) -> Answer:
        with self.file.open("a") as file:
            file.write(answer.model_dump_json() + "\n")
        self._show(answer)
        return answer

    def _show(self, answer: Answer, how: str = "") -> None:
        self.answers.append(answer)
        count = f"[{len(self.answers)}/{self.expected}]"
        self.out.print(
            f"  {count} {how}{answer.line()}", soft_wrap=True, highlight=False, markup=False
        )


async def ask_all(
    fleet: Fleet,
    engine: AsyncOpenAI,
    todo: Sequence[judges.Task],
    options: Options,
    so_far: Progress,
) -> None:
    """Ask every task in every way.

    Args:
        fleet: the fleet.
        engine: the client of the endpoint behind it.
        todo: the tasks.
        options: the council's size and rounds, and the number of repetitions.
        so_far: takes the answers, and has those that are not asked again.
    """
    for number in range(1, options.seeds + 1):
        for task in todo:
            for way in ways_of(task, options):
                key = (task.id, way.name, way.agents, way.rounds, number)
                answer = so_far.again(key)
                if not answer:
                    answer = so_far.add(await ask_fleet(fleet, task, way, number))
                if way.name == ONE and not so_far.again((task.id, PLAIN, 1, 0, number)):
                    so_far.add(await ask_plainly(engine, fleet.sandbox, task, answer))


def ways_of(task: judges.Task, options: Options) -> list[Way]:
    return ways(options)[:1] if task.material else ways(options)


async def measure(
    folder: Path, url: str, todo: Sequence[judges.Task], options: Options, so_far: Progress
) -> None:
    """Start a fleet before the endpoint, and ask every task in every way.

    Args:
        folder: of the fleet.
        url: of the endpoint.
        todo: the tasks.
        options: as in `ask_all`.
        so_far: as in `ask_all`.
    """
    sandbox = Sandbox()
    await sandbox.probe()
    key = os.environ.get("VLLM_API_KEY") or "none"
    async with (
        Recorder(url) as recorder,
        AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=TIMEOUT_S) as engine,
        Site(folder, recorder.url) as site,
        Worker(site.client, task_queue=QUEUE, workflows=[ActWorkflow]),
    ):
        await ask_all(Fleet(site.client, recorder, sandbox), engine, todo, options, so_far)


async def answers(folder: Path) -> list[Figure]:
    """Ask the tasks plainly and through the fleet, and judge the answers."""
    options = read_options()
    todo = options.chosen(judges.load_tasks())
    expected = options.seeds * sum(len(ways_of(task, options)) + 1 for task in todo)
    out = Console(width=None if sys.stdout.isatty() else 140)
    so_far = Progress(KEPT, options.resume, expected, out)
    others = ("temporal", "nats", "neo4j", "valkey", "workers")
    settings = StackSettings.load(home=folder, pick_free_ports=True)
    stack = Stack(settings, without=others)
    try:
        await stack.up()
        url = settings.vllm_url or stack.parts.env["VLLM_URL"]
        await measure(folder / "site", url, todo, options, so_far)
    finally:
        for shown in tables(so_far.answers):
            out.print(shown)
        out.print(f"{len(so_far.answers)} of {expected} answers, in {KEPT}")
        await stack.down()
    return figures_of(so_far.answers)
