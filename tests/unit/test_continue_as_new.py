"""A story that lives long continues as new, and loses nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter

from deploy.local.process import ServerProcess, free_ports
from deploy.local.servers import Command, Temporal
from tests.unit.conftest import StartStory, World, instant_workers
from workers.search_attributes import register


@dataclasses.dataclass(frozen=True)
class Impatient(Temporal):
    """A server that suggests to continue as new after 60 events."""

    def prepare(self) -> Command:
        command = super().prepare()
        early = ("--dynamic-config-value", "limit.historyCount.suggestContinueAsNew=60")
        return dataclasses.replace(command, argv=(*command.argv, *early))


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Client]:
    port, ui_port = free_ports(2)
    server = Impatient(tmp_path / "temporal", port, ui_port)
    process = ServerProcess(server, tmp_path / "log", timedelta(seconds=60))
    await process.start()
    try:
        client = await Client.connect(server.address, data_converter=pydantic_data_converter)
        await register(client)
        async with instant_workers(client):
            yield client
    finally:
        await process.kill()


async def test_a_story_continues_as_new_and_loses_nothing(impatient: Client, world: World) -> None:
    story = await StartStory(impatient, world)()
    first = (await story.handle.describe()).run_id

    await story.to("DONE")
    result = await story.handle.result()

    last = await impatient.get_workflow_handle(story.handle.id).describe()
    assert last.run_id != first
    assert result.state == "DONE"
    assert len(result.decisions) == 5
    assert [event for _, event, _ in world.transitions()] == [
        "create_story",
        "approve_scope",
        "approve_design",
        "build_done",
        "qa_passed",
        "docs_ready",
    ]
    ids = [entry.id for entry in world.published]
    assert len(set(ids)) == len(ids)
    assert ids == [entry.id for entry in world.recorded if entry.subject]
    timeline = await impatient.get_workflow_handle(story.handle.id).query("timeline")
    assert [line["event"] for line in timeline if line["event"] == "planning.story.created"]
