"""Each judge of the benchmark of answers, with answers that it accepts and rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from activities.checks.sandbox import Sandbox
from activities.config import InvalidConfig
from tests.bench.judges import (
    Task,
    code_criteria,
    copied_share,
    judge,
    load_tasks,
    no_section,
    off_topic,
    plan_criteria,
    too_short,
    unnamed,
)
from workflows.models.agents import Proposal

ABOUT_LIMITS = (
    "Each client has a bucket of tokens in the store, and every replica takes one for a request. "
    "An empty bucket means that the limit is reached, so the answer is 429 and says when to try "
    "again. When the store is down, the replicas let requests pass and raise an alert, because a "
    "short time without limits costs less than a service that refuses every client.\n"
)
SLUG = """Use a regular expression:

```python
import re

def slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
```
"""
SLUG_TESTS = 'assert slug("Hello, World!") == "hello-world"\nassert slug("") == ""'


@pytest.fixture
def sandbox() -> Sandbox:
    return Sandbox()


def a_task(**fields: Any) -> Task:
    given: dict[str, Any] = {
        "id": "design-limit",
        "kind": "design",
        "role": "ARCHITECT",
        "ask": "Design a limit of requests for each client of four replicas.",
        "words": ["limit", "client", "replica"],
        "mentions": ["bucket|window"],
    }
    return Task.model_validate(given | fields)


# --- the tasks ------------------------------------------------------------------------------------


def test_there_are_thirty_tasks_of_eight_kinds_with_different_ids() -> None:
    tasks = load_tasks()

    assert len({task.id for task in tasks}) == len(tasks) == 30
    assert len({task.kind for task in tasks}) == 8


@pytest.mark.parametrize("task", load_tasks(), ids=lambda task: task.id)
def test_the_words_and_sections_of_a_task_are_words_that_a_plain_call_is_given(task: Task) -> None:
    assert off_topic(task.plain, task.words) == ""
    assert [name for name in task.sections if name not in task.plain] == []
    assert [role for role in task.roles if role not in task.ask] == []


@pytest.mark.parametrize("task", [t for t in load_tasks() if t.proposal], ids=lambda task: task.id)
def test_a_proposal_does_not_name_its_own_defect(task: Task) -> None:
    assert unnamed(task.plain, task.defect)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "code"},
        {"kind": "critique", "defect": "injection"},
        {"kind": "plan", "roles": ["DEV"], "tasks": 3},
        {"mentions": []},
        {"words": ["limit"]},
        {"rubric": "x"},
    ],
)
def test_a_task_without_its_rubric_or_with_an_unknown_field_is_refused(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    task = {**a_task().model_dump(by_alias=True), **fields}
    (tmp_path / "design.yaml").write_text(str([task]).replace("None", "null"))

    with pytest.raises(InvalidConfig, match=r"design\.yaml"):
        load_tasks(tmp_path)


# --- text -----------------------------------------------------------------------------------------


def test_three_hundred_characters_are_long_enough() -> None:
    assert too_short("x" * 300) == ""
    assert too_short("x" * 299 + "  \n") == "299 of 300 characters"


def test_a_text_with_two_of_the_tasks_words_is_about_it() -> None:
    words = ["limit", "client", "replica"]

    assert off_topic("Clients have limits.", words) == ""
    assert off_topic("A limit of a limitless limit.", words)


@pytest.mark.parametrize(
    ("text", "alternatives", "is_named"),
    [
        ("It takes tokens from a Bucket.", "window|bucket", True),
        ("It retries.", "retry|retries", True),
        ("Requests are idempotent.", "idempoten*", True),
        ("During the night", "df|du", False),
        ("The address is redesigned.", "sign", False),
        ("copy --dry-run", "--dry-run", True),
        ("a dry run", "--dry-run", False),
        ("up to 100 %", "percent|%", True),
    ],
)
def test_a_text_names_a_word_only_as_a_whole(text: str, alternatives: str, is_named: bool) -> None:
    assert (unnamed(text, alternatives) == "") is is_named


@pytest.mark.parametrize(
    "text",
    ["## Failures", "# 3. Failures and retries", "**Failures**", "Failures: none", "- Failures:"],
)
def test_a_heading_or_a_label_is_a_section(text: str) -> None:
    assert no_section(f"An introduction.\n\n{text}\nmore", "Failures") == ""


@pytest.mark.parametrize("text", ["There are failures.", "Failures happen often.", "## No failure"])
def test_a_word_in_a_sentence_is_not_a_section(text: str) -> None:
    assert no_section(text, "Failures") == "has no section Failures"


def test_the_share_of_copied_words_is_none_of_a_new_text_and_all_of_a_repeated_one() -> None:
    source = "Design a limit of requests for each client of four replicas."

    assert copied_share(ABOUT_LIMITS, source) == 0
    assert copied_share(f"{source} " * 5, f"{source} {source}") == 1
    assert copied_share("four replicas", source) == 1
    assert copied_share("four servers", source) == 0
    assert copied_share("", source) == 0


async def test_a_good_answer_is_basic_and_meets_its_rubric(sandbox: Sandbox) -> None:
    found = await judge(a_task(), ABOUT_LIMITS, a_task().ask, sandbox)

    assert found.criteria == dict.fromkeys(("length", "task words", "names bucket"), "")
    assert (found.basic, found.is_copy, found.is_met) == (True, False, True)


async def test_a_copy_of_the_prompt_is_neither_basic_nor_met(sandbox: Sandbox) -> None:
    found = await judge(a_task(), ABOUT_LIMITS, f"Answer like this: {ABOUT_LIMITS}", sandbox)

    assert (found.basic, found.is_copy, found.is_met) == (False, True, False)


async def test_a_basic_answer_may_miss_its_rubric(sandbox: Sandbox) -> None:
    found = await judge(a_task(mentions=["webhook"]), ABOUT_LIMITS, "", sandbox)

    assert (found.basic, found.is_met) == (True, False)
    assert found.criteria["names webhook"] == "names none of webhook"


# --- code -----------------------------------------------------------------------------------------


async def test_code_that_passes_the_tests_meets_both_criteria(sandbox: Sandbox) -> None:
    assert await code_criteria(SLUG, SLUG_TESTS, sandbox) == {"parses": "", "tests": ""}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (SLUG.replace('.strip("-")', ""), "AssertionError"),
        ("```python\nimport sys\nsys.exit(0)\n```", "exit code 0"),
        ("```python\nwhile True: pass\n```", "exit code"),
    ],
    ids=["wrong", "ends early", "never ends"],
)
async def test_code_that_fails_the_tests_or_does_not_reach_their_end_is_rejected(
    sandbox: Sandbox, answer: str, why: str
) -> None:
    found = await code_criteria(answer, SLUG_TESTS, sandbox)

    assert found["parses"] == ""
    assert why in found["tests"]


@pytest.mark.parametrize("answer", ["```python\ndef slug(:\n```", "Use a regular expression."])
async def test_text_that_is_not_python_is_not_run(sandbox: Sandbox, answer: str) -> None:
    found = await code_criteria(answer, "assert True", sandbox)

    assert found["parses"].startswith("cannot be parsed")
    assert found["tests"].startswith("not run")


async def test_an_answer_without_python_passes_no_tests(sandbox: Sandbox) -> None:
    found = await code_criteria("```sql\nSELECT 1;\n```", "assert True", sandbox)

    assert found == {"parses": "has no Python", "tests": "not run, there is no Python"}


async def test_the_main_part_of_a_program_is_not_run(sandbox: Sandbox) -> None:
    answer = SLUG.replace("import re", 'import re\n\nif __name__ == "__main__":\n    input()')

    assert (await code_criteria(answer, SLUG_TESTS, sandbox))["tests"] == ""


# --- critiques and plans --------------------------------------------------------------------------


async def test_a_critique_names_the_planted_defect(sandbox: Sandbox) -> None:
    proposal = Proposal(approach="Look it up.", content="Put the name into the query.")
    task = a_task(kind="critique", proposal=proposal, defect="injection|parameter")

    good = await judge(task, "The query allows SQL injection.", "", sandbox)
    bad = await judge(task, "The query is slow without an index.", "", sandbox)

    assert good.criteria["planted defect"] == ""
    assert bad.criteria["planted defect"] == "names none of injection|parameter"


def test_a_plan_has_a_task_for_each_role_and_half_of_the_expected_tasks() -> None:
    plan = "1. DEV: Write the handler\n   It asks the database.\n2. QA: Test it"

    assert plan_criteria(plan, ["DEV", "QA"], 3) == {"role DEV": "", "role QA": "", "tasks": ""}


@pytest.mark.parametrize(
    "plan", ["### DEV\n- Write it\n### QA\n- Test it", "| DEV | a |\n| QA | b |"]
)
def test_tasks_may_be_written_under_headings_or_in_a_table(plan: str) -> None:
    assert not any(plan_criteria(plan, ["DEV", "QA"], 3).values())


def test_a_role_outside_of_a_task_and_too_few_tasks_are_named() -> None:
    plan = "DEV and QA work together.\n- DEV: write it\n- developers of QAX: test it"

    found = plan_criteria(plan, ["DEV", "QA"], 12)

    assert found == {
        "role DEV": "",
        "role QA": "no task is for QA",
        "tasks": "has 2 tasks, fewer than 6",
    }


def test_no_more_tasks_are_asked_for_than_half_of_what_a_plan_of_the_fleet_may_have() -> None:
    plan = "\n".join(f"{number}. DEV: Part {number}" for number in range(1, 7))

    assert plan_criteria(plan, ["DEV"], 50)["tasks"] == ""
