"""A story in a repository after its plan: tests of the criteria, then documentation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from temporalio.client import Client

from tests.support.branches import FIX, README, committing_councils
from tests.support.repositories import in_store
from tests.unit.conftest import RunningStory, StartStory, World
from tests.unit.workflows.test_story import refused
from tests.unit.workflows.test_story_branch import Repo, branch_of, done, lines, to_gate
from workflows.models.acceptance import Acceptance, AcceptanceTest
from workflows.models.deliberation import DeliberationInput

CRITERIA = ["2 and 3 are 5", "0 and 0 are 0"]
TESTS = {"tests/test_sum.py": "from adder import add\n\n\ndef test_ac1():\n    assert add(2, 3)\n"}
PROOF = AcceptanceTest(
    name="tests.test_sum::test_ac1", criteria=[1], before="failed", after="passed"
)


@pytest.fixture
def repo(world: World, tmp_path: Path) -> Repo:
    repo = Repo(world, tmp_path)
    world.edits = {"Build it": FIX, "TEST": TESTS, "DOCS": README}
    world.acceptance_tests = [PROOF]
    return repo


@pytest.fixture
async def start(fleet: Client, world: World, repo: Repo) -> AsyncIterator[StartStory]:
    async with committing_councils(fleet, world) as queue:
        yield StartStory(fleet, world, queue)


async def begin(start: StartStory, **fields: Any) -> RunningStory:
    fields = {"repository": "sample", "acceptance_criteria": CRITERIA} | fields
    return await start(**fields)


async def council(story: RunningStory, phase: str) -> DeliberationInput:
    """Return the input of a phase's council."""
    client = story.handle._client
    handle = client.get_workflow_handle(f"deliberation-{story.story_id}-{phase.lower()}-1")
    history = await handle.fetch_history()
    began = history.events[0].workflow_execution_started_event_attributes.input
    (found,) = await client.data_converter.decode(began.payloads, [DeliberationInput])
    return found  # type: ignore[no-any-return]


async def test_the_councils_of_test_and_docs_work_on_the_branch_in_their_paths_only(
    start: StartStory, repo: Repo
) -> None:
    story = await begin(start, paths=["adder/**", "tests/**", "README.md"])
    result = await done(story)

    tests, docs = await council(story, "TEST"), await council(story, "DOCS")

    assert result.branch is not None
    assert tests.work is not None
    assert docs.work is not None
    assert "tests/**" in tests.work.paths
    assert "README.md" not in tests.work.paths
    assert "README.md" in docs.work.paths
    assert "tests/**" not in docs.work.paths
    build, test, doc = (await branch_of(story)).merged[-3:]
    assert (build.commit, test.commit) == (tests.work.base, docs.work.base)
    assert doc.commit == result.branch.head
    reported = await lines(story, "WORKSPACE_REPORT")
    heads = [build.commit, test.commit, doc.commit]
    assert [line.split("commit ")[1] for line in reported] == heads
    names = in_store(repo.store, "diff", "--name-only", build.commit, doc.commit).splitlines()
    assert names == ["README.md", "tests/test_sum.py"]


async def test_tests_bear_the_numbers_of_criteria_and_the_gate_shows_which_are_proved(
    start: StartStory, repo: Repo
) -> None:
    story = await begin(start)
    await to_gate(story, "qa_passed")

    asked, view = await council(story, "TEST"), await story.state()

    assert "AC-1: 2 and 3 are 5\nAC-2: 0 and 0 are 0" in asked.description
    assert "test_ac1_" in asked.description
    assert "weakened" in asked.rubric
    assert asked.subject == view.title
    assert view.branch is not None
    assert view.acceptance is not None
    assert (view.acceptance.base, view.acceptance.commit) == (repo.base, view.branch.head)
    assert [(each.proved, each.why) for each in view.acceptance.criteria] == [
        (True, ""),
        (False, "no test names it"),
    ]
    assert view.acceptance.criteria[0].tests == [PROOF]
    (line,) = await lines(story, "planning.criteria.tested")
    assert line == f"1 of 2 criteria are proved at {view.branch.head[:12]}"


async def test_other_evidence_makes_an_approval_stale(
    start: StartStory, repo: Repo, world: World
) -> None:
    story = await begin(start)
    await to_gate(story, "qa_passed")
    shown = await story.state()
    await story.reject("reject_test", role="QA")
    world.acceptance_tests = []
    await story.until(gate="qa_passed", state="TEST")

    with refused("StaleRevision", "0 of 2 criteria were proved"):
        await story.approve("qa_passed", "QA", revision=shown.revision)


async def test_a_story_of_one_page_has_no_tests_to_write(start: StartStory, repo: Repo) -> None:
    story = await begin(start, paths=["README.md"])
    await to_gate(story, "qa_passed")

    branch, asked = await branch_of(story), await council(story, "TEST")

    assert (branch.tests, branch.docs) == ([], ["README.md"])
    assert asked.work is None
    assert "recommendation" in asked.description
    assert branch.merged[-1].task_id.endswith("-t2")


async def test_tests_that_cannot_be_run_leave_every_criterion_unproved(
    start: StartStory, repo: Repo, world: World
) -> None:
    world.failing["test_criteria"] = "set-up: no network"
    story = await begin(start)
    await to_gate(story, "qa_passed")

    found = (await story.state()).acceptance

    assert isinstance(found, Acceptance)
    assert [each.proved for each in found.criteria] == [False, False]
    assert "set-up: no network" in found.criteria[0].why


async def test_a_story_without_criteria_has_nothing_to_prove(start: StartStory, repo: Repo) -> None:
    story = await begin(start, acceptance_criteria=[])
    await to_gate(story, "qa_passed")

    assert (await story.state()).acceptance is None
