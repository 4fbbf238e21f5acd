"""The output of the CLI: text from outside is never markup or a terminal command."""

import io
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from activities.graph.line_provenance import ChangedBy, Decided, LineReason
from activities.graph.provenance import Objection, Passed, Why
from bridge.jetstream.dead_letters import DeadLetter
from workers.cli import render
from workers.cli.provenance import line_reason
from workers.cli.snapshot import AgentWork, Council, Snapshot
from workflows.models.acceptance import Acceptance, AcceptanceTest, Criterion
from workflows.models.agents import PlannedTask, UsageLine
from workflows.models.branches import BranchView
from workflows.models.deliberation import FailedAgent, Progress
from workflows.models.implementation import ImplementationProgress
from workflows.models.outbox import OutboxStuck
from workflows.models.plan import Plan
from workflows.models.readiness import Finding
from workflows.models.story import Move, StoryView, TimelineEntry
from workflows.models.workspace import BlamedLine, Change, ChangedFile, LoggedCommit

OUTSIDE = st.text(max_size=40) | st.sampled_from(
    [
        "[bold red]x[/bold red]",
        "[/]",
        "\x1b[2J\x1b]0;owned\x07",
        "\u202egnp.exe",
        "a\nb\tc",
        "[link=x]",
    ]
)
"""Texts that people and models may write."""


def printed(shown: RenderableType, width: int = 500) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def a_view(text: str) -> StoryView:
    return StoryView(
        story_id="US-1",
        title=text,
        state="DRAFT",
        pending_gate="approve_scope",
        gate_role="PO",
        revision="0123456789abcdef",
        rigor="L1",
        findings=[Finding(code="SMALL", message=text, weight=10)],
        working_on=text,
        acceptance=Acceptance(
            base="b" * 40,
            commit="c" * 40,
            criteria=[
                Criterion(
                    number=1,
                    text=text,
                    proved=True,
                    tests=[
                        AcceptanceTest(
                            name="tests.test_limit::test_ac1",
                            criteria=[1],
                            before="error",
                            after="passed",
                            why=text,
                        )
                    ],
                ),
                Criterion(number=2, text=text, why=text),
            ],
            changed_tests=[text],
        ),
    )


def everything(text: str) -> list[RenderableType]:
    story = a_view(text)
    council = Council(
        task_id=text,
        progress=Progress(
            status="running",
            wave=text,
            answered=[text],
            waiting=[text],
            failed=[FailedAgent(agent_id=text, act="propose", cause=text)],
        ),
    )
    work = AgentWork(
        agent=text,
        progress=ImplementationProgress(status="acting", last=text, last_command=text, exit_code=1),
    )
    changed = ChangedFile(path=text, old_path=text, status="renamed")
    task = PlannedTask(task_id="t1", role="DEV", title=text, description=text)
    return [
        render.snapshot(
            Snapshot(status="RUNNING", story=story, councils=[council], implementations=[work])
        ),
        render.diff_stat(Change(commit="b", base="a", files=[changed])),
        render.page(
            render.StoryPage(
                story=story,
                moves=[Move(event=text, to="DESIGN", kind="gate", blocked_by=[text])],
                plan=Plan(plan_id=text, story_id="US-1", tasks=[task]),
                timeline=[TimelineEntry(at=text, event=text, actor=text, text=text)],
                usage=[UsageLine(phase="DESIGN", role="DEV", model=text)],
            )
        ),
        render.reasons(
            [
                Why(
                    decision_id="d1",
                    title=text,
                    rationale=text,
                    decided_at=text,
                    critiques=[Objection(critic=text, points=[text], suggestion=text)],
                    passed_by=[Passed(gate="approve_scope", actor=text, role="PO", comment=text)],
                )
            ]
        ),
        line_reason(
            LineReason(
                story_id="US-1",
                line=BlamedLine(
                    line=1,
                    text=text,
                    path=text,
                    origin=LoggedCommit(
                        commit="c" * 40,
                        author=text,
                        at=datetime(2026, 3, 1, tzinfo=UTC),
                        subject=text,
                        trailers={"Agent": text, "Model": text},
                    ),
                ),
                change=ChangedBy(approach=text, judged=text, decisions=[Decided(id="d1")]),
            )
        ),
        render.stories(
            [render.StoryRow(story_id=text, state=text, status="RUNNING", started=text)]
        ),
    ]


@given(text=OUTSIDE)
@settings(max_examples=30, deadline=None)
def test_any_text_is_printed_and_commands_no_terminal(text: str) -> None:
    for shown in everything(text):
        text = printed(shown)

        assert text
        assert all(character.isprintable() or character == "\n" for character in text)


def test_markup_is_shown_as_it_was_written() -> None:
    for shown in everything("[bold red]stop[/bold red]"):
        assert "[bold red]stop[/bold red]" in printed(shown)


@given(text=OUTSIDE)
@settings(max_examples=30, deadline=None)
def test_a_log_line_is_one_printable_line(text: str) -> None:
    line = render.line(
        Snapshot(status="RUNNING", story=a_view(text).model_copy(update={"pending_gate": ""}))
    )

    assert line.isprintable()


def test_a_waiting_gate_comes_with_the_command_that_opens_it() -> None:
    story = a_view("Undo")

    assert "fleet approve US-1 approve_scope --role PO" in printed(render.story(story))
    budget = story.model_copy(update={"pending_gate": "budget"})
    assert "fleet raise-budget US-1 TOKENS --role PO" in printed(render.story(budget))


def test_a_gate_shows_that_the_base_has_moved() -> None:
    branch = BranchView(
        repository="sample",
        branch="story/US-1",
        base="a" * 40,
        base_branch="main",
        base_now="b" * 40,
        base_commits=2,
    )
    at_gate = a_view("t").model_copy(update={"branch": branch})
    between = at_gate.model_copy(update={"pending_gate": ""})

    note = "main has moved by 2 commits since aaaaaaaaaaaa; `fleet rebase US-1` merges it"
    assert note in printed(render.story(at_gate))
    assert note not in printed(render.story(between))


def test_a_snapshot_on_one_line_shows_state_wave_and_tokens() -> None:
    story = a_view("Undo").model_copy(update={"pending_gate": "", "tokens_used": 12_345})
    council = Council(
        task_id="US-1-DESIGN-1",
        progress=Progress(
            status="running", wave="criticise 1", answered=["a"], waiting=["b", "c"], tokens=1_234
        ),
    )

    line = render.line(Snapshot(status="RUNNING", story=story, councils=[council]))

    assert line == (
        "US-1  DRAFT  |  Undo  |  US-1-DESIGN-1 criticise 1 1/3 1,234 tokens  |  12,345 in all"
    )


def test_a_snapshot_on_one_line_shows_the_step_under_way() -> None:
    story = a_view("Undo").model_copy(update={"pending_gate": "", "tokens_used": 12_345})
    tests = ImplementationProgress(
        status="asking", step=3, steps=40, last="run: pytest -q", last_command="pytest -q",
        exit_code=1, tokens=900,
    )  # fmt: skip
    first = ImplementationProgress(status="starting")
    stopped = tests.model_copy(update={"exit_code": None})

    def line(progress: ImplementationProgress) -> str:
        work = AgentWork(agent="US-1-plan-1-t1-agent-dev-1", progress=progress)
        shown = render.line(Snapshot(status="RUNNING", story=story, implementations=[work]))
        return shown.split("  |  ")[2]

    assert line(tests) == ("US-1-plan-1-t1-agent-dev-1 step 3/40 asking: run: pytest -q exit 1")
    assert line(first) == "US-1-plan-1-t1-agent-dev-1 starting"
    assert line(stopped).endswith("run: pytest -q exit stopped")


def test_the_stat_of_a_diff_has_each_file_and_the_sum() -> None:
    files = [
        ChangedFile(path="README.md", status="modified", insertions=5, deletions=1),
        ChangedFile(path="a.png", status="added", binary=True),
        ChangedFile(path="new.py", old_path="old.py", status="renamed"),
    ]
    change = Change(commit="b", base="a", files=files, insertions=5, deletions=1)

    shown = " ".join(printed(render.diff_stat(change)).split())
    assert shown == (
        "README.md | +5 -1 a.png | binary old.py => new.py | +0 -0 "
        "3 files changed, 5 insertions(+), 1 deletion(-)"
    )


def test_an_empty_list_shows_how_to_begin() -> None:
    assert "fleet start STORY.json" in printed(render.stories([]))


HINT = {"hidden", "see"}
TIMES = {"at": "2026-11-28T03:03:49Z"}


def full() -> list[RenderableType]:
    """Return the views of a team's story, with ids and texts of their usual length."""
    rows = [
        render.StoryRow(
            story_id=f"US-{n}",
            state="DESIGN",
            pending_gate="approve_design",
            gate_role="PO",
            rigor="L1",
            dor_score=100,
            status="RUNNING",
            started=TIMES["at"],
        )
        for n in (7, 101)
    ]
    stuck = render.StoryRow(
        story_id="PAYMENTS-2026-refund-flow-17",
        state="DESIGN",
        pending_gate="approve_design",
        gate_role="ARCHITECT",
        status="CONTINUED_AS_NEW",
        stuck="StoryTransitioned (publish)",
        started=TIMES["at"],
    )
    page = render.StoryPage(
        story=a_view("Limit requests"),
        moves=[
            Move(
                event="approve_design",
                to="BUILD",
                kind="gate",
                roles=["PO"],
                blocked_by=["design_complete: the ARCHITECT council deliberates"],
            )
        ],
        plan=Plan(
            plan_id="US-101-plan-1",
            story_id="US-101",
            tasks=[
                PlannedTask(
                    task_id="US-101-plan-1-t2",
                    role="DEV",
                    title="Answer 429 with a Retry-After header to clients over their limit",
                    description="",
                    depends_on=["US-101-plan-1-t1"],
                )
            ],
        ),
        timeline=[
            TimelineEntry(
                event="orchestration.deliberation.completed",
                actor="agent-architect-3",
                text="task_id=US-101-design-1, role=ARCHITECT, winner_id=agent-architect-3",
                via="token",
                at=TIMES["at"],
            )
        ],
        usage=[
            UsageLine(
                phase="DESIGN",
                role="ARCHITECT",
                model="smollm2-135m-instruct",
                calls=12,
                tokens_in=123_456,
                tokens_out=12_345,
                cached_tokens=1_234,
                seconds=123.4,
            )
        ],
    )
    why = Why(
        decision_id="US-101-design-1-348e9a30-d1",
        title="Count requests in a window of one second",
        rationale="A window needs one counter for each client.",
        decided_at=TIMES["at"],
        critiques=[
            Objection(
                critic="agent-architect-2",
                points=["A client may send twice its limit around the edge of two windows"],
                suggestion="Use a sliding window",
            )
        ],
        passed_by=[Passed(gate="approve_design", actor="ana", role="PO", comment="small", **TIMES)],
    )
    letter = DeadLetter(
        number=1,
        subject="planning.plan.approved",
        stream="PLANNING_EVENTS",
        sequence=7,
        consumer="context-planning-plan-approved",
        reason="story_id: Field required",
        error="",
        deliveries=1,
        received=TIMES["at"],
        stored=TIMES["at"],
        size=2,
        headers={},
        body=b"{}",
    )
    entry = OutboxStuck(
        story_id="US-101",
        entry_id="story-US-101/01a22283-04c5-7ad3-ace0-49245c51206a/12",
        kind="StoryTransitioned",
        step="publish",
        error="EventIdTaken: another message has this id",
    )
    return [
        render.stories(rows),
        render.stories([*rows, stuck]),
        render.page(page),
        render.reasons([why]),
        render.letters([letter]),
        render.stuck([entry]),
    ]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_no_word_is_broken_in_a_terminal(width: int) -> None:
    words = {word for shown in full() for word in printed(shown, width=1_000).split()}

    for shown in full():
        text = printed(shown, width)

        assert max(len(line) for line in text.splitlines()) <= width
        broken = {word for word in text.split() if word not in words}
        assert {word for word in broken if re.fullmatch(r"[\w-]+", word)} <= HINT


def test_columns_that_do_not_fit_are_named_and_wide_shows_them() -> None:
    narrow, wide = printed(full()[0], 80), printed(full()[0], 1_000)

    assert "hidden: rigor" in narrow
    assert "hidden" not in wide
    assert "L1" in wide
    assert "L1" not in narrow


def test_a_word_that_is_wider_than_the_terminal_leaves_its_neighbors_whole() -> None:
    row = render.StoryRow(story_id="x" * 100, state="DESIGN", status="RUNNING", started="")

    table = printed(render.stories([row]), 80)

    assert "DESIGN" in table
    assert max(map(len, table.splitlines())) <= 80
