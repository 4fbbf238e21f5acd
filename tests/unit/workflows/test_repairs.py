"""Repair tasks: what they are, and how a story runs them when its branch fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from tests.support.branches import committing_councils
from tests.support.polling import until
from tests.support.repositories import in_store
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_changes import measurement
from tests.unit.workflows.test_story_branch import Repo, branch_of, lines, to_gate
from workflows.models.agents import PlannedTask
from workflows.models.measurement import FailedTest, Step, SuiteResult
from workflows.models.plan import Plan
from workflows.rules.repairs import passes, repair_task

FIXED = {"fixed.txt": "yes\n"}


def plan(*tasks: PlannedTask) -> Plan:
    return Plan(plan_id="US-1-plan-1", story_id="US-1", tasks=list(tasks))


def task(number: int, role: str, *depends_on: int) -> PlannedTask:
    return PlannedTask(
        task_id=f"US-1-plan-1-t{number}",
        role=role,
        title="Do it",
        description="Do it.",
        depends_on=[f"US-1-plan-1-t{earlier}" for earlier in depends_on],
    )


# --- the task -------------------------------------------------------------------------------------


def test_a_repair_comes_after_every_task_of_the_plan() -> None:
    failed = measurement(build=Step(command="make", exit_code=2))

    made = repair_task(plan(task(1, "DEV"), task(2, "QA", 1), task(3, "DATA")), failed)

    assert made.task_id == "US-1-plan-1-t4"
    assert made.depends_on == ["US-1-plan-1-t2", "US-1-plan-1-t3"]
    assert (made.role, made.title) == ("DEV", "Repair the build")


def test_a_plan_without_developers_is_repaired_by_the_role_of_its_last_task() -> None:
    failed = measurement(unit=SuiteResult(command="test", exit_code=1, failed=1))

    made = repair_task(plan(task(1, "DATA"), task(2, "DEVOPS", 1)), failed)

    assert (made.role, made.title) == ("DEVOPS", "Repair the unit tests")


def test_a_repair_names_command_tests_and_output_of_what_failed_and_nothing_else() -> None:
    failed = measurement(
        unit=SuiteResult(
            command="pytest -q",
            exit_code=1,
            passed=2,
            failed=1,
            tests=3,
            failures=[FailedTest(name="test_adds", message="assert 1 == 5")],
            broken=["test_adds"],
            tail="E  assert 1 == 5 ```",
        )
    )

    text = repair_task(plan(task(1, "DEV")), failed, before="every proposal is barred").description

    assert "c" * 40 in text
    assert "Unit tests: exit code 1\n```\npytest -q\n```" in text
    assert "1 of 3 tests fail:\n- test_adds: assert 1 == 5" in text
    assert "passed on the base: test_adds" in text
    assert "````\nE  assert 1 == 5 ```\n````" in text
    assert "Build" not in text
    assert text.endswith("The repair before this one failed: every proposal is barred")


@pytest.mark.parametrize(
    ("fields", "passed"),
    [
        ({}, True),
        ({"build": Step(command="make", exit_code=1)}, False),
        ({"build": Step(not_measured="no command")}, False),
        ({"unit": SuiteResult(command="test", exit_code=1, passed=3, failed=1)}, False),
        ({"unit": SuiteResult(not_measured="no tests")}, False),
        ({"e2e": SuiteResult(command="test", exit_code=1, failed=1)}, True),
    ],
)
def test_build_and_unit_tests_decide(fields: dict[str, Any], passed: bool) -> None:
    assert passes(measurement(**fields)) == passed


# --- in a story -----------------------------------------------------------------------------------


@pytest.fixture
def repo(world: World, tmp_path: Path) -> Repo:
    return Repo(world, tmp_path)


@pytest.fixture
async def start(fleet: Client, world: World, repo: Repo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


async def to_build(story: RunningStory) -> None:
    await to_gate(story, "approve_design")
    await story.approve("approve_design")


def dispatched(world: World) -> list[str]:
    """Return the numbers of the tasks that were dispatched, in order."""
    events = [e.body for e in world.recorded if e.kind == "TaskDispatched"]
    return [body["task_id"].rpartition("-")[2] for body in events]


async def test_a_branch_that_fails_once_is_repaired_and_goes_on(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing_builds, world.edits["Repair the build"] = 1, FIXED
    story = await start(repository="sample")
    await to_build(story)
    await story.until(state="TEST")

    branch, plan = await branch_of(story), await story.handle.query("plan")
    assert dispatched(world) == ["t1", "t2", "t3"]
    repair = plan["tasks"][-1]
    assert (repair["title"], repair["depends_on"]) == (
        "Repair the build",
        [plan["tasks"][1]["task_id"]],
    )
    assert "make" in repair["description"]
    assert "no rule" in repair["description"]
    assert in_store(repo.store, "show", f"{branch.head}:fixed.txt") == "yes"
    assert [each.commit for each in world.measured_commits] == [
        branch.merged[1].commit,
        branch.head,
    ]
    created = [e.body for e in world.published if e.subject == "planning.task.created"]
    assert created[-1]["task_id"] == repair["task_id"]
    assert len(await lines(story, "REPAIR_ADDED")) == 1


async def test_a_branch_that_fails_three_times_waits_for_a_person(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing_builds, world.edits["Repair the build"] = 3, FIXED
    story = await start(repository="sample")
    await to_build(story)

    await until(lambda: lines(story, "WORKSPACE_REPORT"), lambda found: len(found) == 3)
    assert (await story.until(working_on="")).state == "BUILD"
    assert dispatched(world) == ["t1", "t2", "t3", "t4"]
    assert "after 2 repair tasks" in str(await story.handle.query("transitions"))
    await story.report(commit=(await branch_of(story)).head)

    assert (await story.until(state="TEST")).state == "TEST"


async def test_a_repair_that_fails_is_one_of_the_two(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing_builds, world.edits["Repair the build"] = 2, FIXED
    story = await start(repository="sample")
    await to_gate(story, "approve_design")
    world.failing[f"{(await story.state()).plan_id}-t3"] = "every proposal is barred"
    await story.approve("approve_design")
    await story.until(state="TEST")

    plan = await story.handle.query("plan")
    assert "one failed: AllBarred: every proposal is barred" in plan["tasks"][3]["description"]
    (line,) = await lines(story, "REPAIR_FAILED")
    assert line.endswith("every proposal is barred")


async def test_a_story_that_is_sent_back_makes_new_repairs_only(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing_builds, world.edits["Repair the build"] = 1, FIXED
    story = await start(repository="sample")
    await to_gate(story, "qa_passed")
    world.failing_builds, world.edits["Repair the build"] = 1, {"fixed.txt": "again\n"}
    await story.reject("reject_test", role="QA")
    await story.until(state="TEST")

    assert dispatched(world) == ["t1", "t2", "t3", "t1", "t2", "t4"]
    head = (await branch_of(story)).head
    assert in_store(repo.store, "show", f"{head}:fixed.txt") == "again"
