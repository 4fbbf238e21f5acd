"""The recording of a story whose councils write tests and documentation in a repository."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from temporalio.client import Client

from tests.support.branches import FIX, README, committing_councils
from tests.support.repositories import make_repository
from tests.unit.conftest import StartStory, World
from workflows.models.acceptance import AcceptanceTest
from workflows.models.workspace import Repository


async def criteria_tested(client: Client, world: World) -> dict[str, str]:
    """Bring a story to its delivery, with a criterion that its tests prove, and documentation."""
    with TemporaryDirectory(prefix="fleet-") as folder:
        world.folder = Path(folder)
        origin = world.folder / "origin"
        origin.mkdir()
        entry = Repository(key="sample", url=make_repository(origin))
        world.repositories = {entry.key: entry}
        world.edits = {"Build it": FIX, "TEST": {"tests/test_undo.py": "x = 1\n"}, "DOCS": README}
        world.acceptance_tests = [
            AcceptanceTest(
                name="tests.test_undo::test_ac1_an_undo_restores_the_note",
                criteria=[1],
                before="failed",
                after="passed",
                why="AttributeError: 'Notes' object has no attribute 'undo'",
            )
        ]
        async with committing_councils(client, world) as queue:
            start = StartStory(client, world, queue)
            criterion = "Given a deleted note, when I undo, then it is back"
            story = await start(repository=entry.key, acceptance_criteria=[criterion])
            await story.finish()
    return {"story": story.handle.id}
