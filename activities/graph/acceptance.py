"""Acceptance criteria in the graph, and the tests of them that were run."""

from __future__ import annotations

from collections.abc import Iterator

from activities.graph.changes import OF_STORY, Change, Write, key
from workflows.models.acceptance import AcceptanceTest, Criterion
from workflows.models.base import content_hash
from workflows.models.events import CriteriaTested

CRITERION = (
    "MERGE (n:Criterion {id: row.id})"
    + OF_STORY
    + """
WITH n, row WHERE row.order > coalesce(n.order, '')
SET n += row.node, n.order = row.order
"""
)

# A test that proves nothing is stored, and has no relationship PROVES.
ACCEPTANCE_TEST = (
    "MERGE (n:AcceptanceTest {id: row.id}) ON CREATE SET n += row.node"
    + OF_STORY
    + """
WITH n, row WHERE row.proves
MATCH (c:Criterion {id: row.criterion_id})
MERGE (n)-[:PROVES]->(c)
"""
)


def acceptance(change: Change, body: CriteriaTested) -> list[Write]:
    """Return what an event of tested criteria writes: the criteria, then their tests."""
    story = key("story_id", change.story_id)
    found: list[Write] = []
    for criterion in body.criteria:
        found.append(_criterion(change, story, body, criterion))
        found += _tests(story, body, criterion)
    return found


def _criterion(change: Change, story: str, body: CriteriaTested, criterion: Criterion) -> Write:
    node = criterion.model_dump(include={"number", "text", "proved", "why"})
    node |= {"story_id": story, "commit": body.commit}
    row = {"id": _id(story, criterion), "story_id": story, "node": node, "order": change.order}
    return Write(CRITERION, row)


def _tests(story: str, body: CriteriaTested, criterion: Criterion) -> Iterator[Write]:
    for test in criterion.tests:
        yield Write(
            ACCEPTANCE_TEST,
            {
                "id": _test_id(story, body, criterion, test),
                "story_id": story,
                "criterion_id": _id(story, criterion),
                "proves": test.proves,
                "node": test.model_dump(
                    include={"name", "suite", "before", "after", "why", "flaky"}
                )
                | {
                    "story_id": story,
                    "criterion": criterion.number,
                    "commit": body.commit,
                    "base": body.base,
                },
            },
        )


def _id(story: str, criterion: Criterion) -> str:
    return f"{story}/criterion/{criterion.number}"


def _test_id(story: str, body: CriteriaTested, criterion: Criterion, test: AcceptanceTest) -> str:
    """Return the id of a test at one commit: what was measured later is another node."""
    what = content_hash([body.commit, body.base, test.suite, test.name, test.before, test.after])
    return f"{_id(story, criterion)}/test/{what}"
