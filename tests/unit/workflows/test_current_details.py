"""What the Web UI renders of texts that models, failures and other people write, by attacks."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from markdown_it import MarkdownIt

from workflows.current_details import (
    deliberation_details,
    plan_details,
    story_details,
    stuck_details,
)
from workflows.models.acceptance import Acceptance, AcceptanceTest, Criterion
from workflows.models.agents import PlannedTask
from workflows.models.branches import BranchView
from workflows.models.deliberation import DeliberationInput, FailedAgent, Progress
from workflows.models.outbox import OutboxStuck
from workflows.models.readiness import Finding
from workflows.models.report import ReportScore
from workflows.models.story import Move, StoryView

NOW = "b" * 40
BRANCH = BranchView(
    repository="sample", branch="story/US-1", base="a" * 40, base_branch="main", base_now=NOW
)

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\n\n<b>bold</b>\n\n",
    "![pixel](https://evil.example/pixel.png)",
    "[approve](javascript:alert(1))",
    "<https://evil.example>",
    "https://evil.example",
    "` <i>x</i> `",
    "``` \n# Gate `qa_passed` is open",
    "````\n<i>x</i>",
    "~~~\n<i>x</i>",
    "\n```\n\n# heading\n\n```sh\nrm -rf /\n",
    "a\r\n\r\n<i>x</i>",
    "a\u2028```\u2028<i>x</i>",
    "| a | b |\n|---|---|\n| <i>x</i> | y |",
    "'; rm -rf / #",
    "\\` <i>x</i>",
    "**", "x" * 600 + "`<i>x</i>",
    "",
    " ",
]  # fmt: skip

OWN_TAGS = {"p", "pre", "code", "strong", "ul", "li", "br"}


def a_test(name: str) -> AcceptanceTest:
    return AcceptanceTest(name=name, criteria=[1], before="failed", after="passed", why=name)


def story(text: str) -> str:
    view = StoryView(
        story_id="US-7",
        title=text,
        state=text,
        pending_gate=text,
        gate_role=text,
        revision=text,
        rigor=text,
        findings=[Finding(code=text, message=text, weight=1)],
        working_on=text,
        acceptance=Acceptance(
            base="b" * 40,
            commit="c" * 40,
            criteria=[Criterion(number=1, text=text, why=text, tests=[a_test(text)])],
            changed_tests=[text],
            not_run=[text],
        ),
        report=ReportScore(score=1, rigor="L1", gating_decision="block", notes=[text]),
    )
    move = Move(event=text, to=text, kind="gate", roles=[text, text], blocked_by=[text])
    return story_details(view, [move])


def budget(text: str) -> str:
    view = StoryView(
        story_id="US-7",
        title=text,
        state=text,
        rigor=text,
        pending_gate="budget",
        gate_role=text,
        token_budget=1,
    )
    return story_details(view, [])


def stuck(text: str) -> str:
    entry = OutboxStuck(entry_id=text, kind=text, step="record", error_type=text, error=text)
    return stuck_details("story-US-7", [entry, entry])


def deliberation(text: str) -> str:
    task = DeliberationInput(task_id="T-1", role="DEV", description=text or "x")
    progress = Progress.model_validate(
        {
            "status": "running",
            "wave": text,
            "answered": [text],
            "waiting": [text],
            "failed": [FailedAgent(agent_id=text, act="propose", cause=text)],
        }
    )
    return deliberation_details(task, progress)


def plan(text: str) -> str:
    tasks = [PlannedTask(task_id=text, role=text, title=text, description=text, depends_on=[text])]
    return plan_details(tasks, {text: text})


BUILDERS: list[Callable[[str], str]] = [story, budget, stuck, deliberation, plan]


def rendered(details: str) -> str:
    """Render as GitHub does, with HTML and links of bare URLs."""
    markdown = MarkdownIt("gfm-like", {"html": True, "linkify": False})
    return str(markdown.render(details))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_no_text_from_outside_becomes_markup(build: Callable[[str], str], attack: str) -> None:
    html = rendered(build(attack))

    assert set(re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)", html)) <= OWN_TAGS
    assert "href" not in re.sub(r"<(pre|code).*?</\1>", "", html, flags=re.DOTALL)
    outside = re.sub(r"<(pre|code).*?</\1>", "", html, flags=re.DOTALL)
    assert "evil.example" not in outside
    assert "rm -rf" not in outside


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_a_shown_command_holds_no_second_command(attack: str) -> None:
    details: Any = stuck(attack)

    for command in re.findall(r"--input '(.*)'\n```", details):
        assert "'" not in command
        assert "`" not in command


def test_what_is_harmless_is_shown_as_it_is() -> None:
    shown = story("Undo a deletion")

    assert "```\nUndo a deletion\n```" in shown
    assert "- `Undo a deletion`: `Undo a deletion` (-1)" in shown


def test_a_criterion_is_shown_with_its_tests_before_and_after() -> None:
    shown = story("test_ac1")

    assert "**0 of 1 criteria proved**" in shown
    assert "- `AC-1: test_ac1`: not proved: `test_ac1`" in shown
    assert "  - `test_ac1`: failed on the base, passed on the branch" in shown
    assert "- changes the test `test_ac1`" in shown


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"base_now": ""}, ""),
        ({"base_now": "a" * 40}, ""),
        ({"base_commits": 1}, "main has moved by 1 commit since aaaaaaaaaaaa; `fleet rebase US-1`"),
        ({"base_commits": 3}, "main has moved by 3 commits since aaaaaaaaaaaa; `fleet rebase"),
        ({}, "main is at bbbbbbbbbbbb, which is older than aaaaaaaaaaaa; `fleet rebase"),
        ({"base_now": "", "base_unknown": "no route"}, "main has moved is unknown: no route"),
    ],
)
def test_a_gate_shows_what_became_of_the_base(changes: dict[str, Any], note: str) -> None:
    branch = BRANCH.model_copy(update=changes)
    view = StoryView(story_id="US-1", title="t", state="DESIGN", rigor="L1", branch=branch)
    at_gate = view.model_copy(update={"pending_gate": "approve_design"})

    assert note in branch.base_note("US-1")
    assert bool(branch.base_note("US-1")) == bool(note)
    assert ("The base" in story_details(at_gate, [])) == bool(note)
    assert "The base" not in story_details(view, [])
