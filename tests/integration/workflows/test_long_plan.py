"""A story with a plan of 55 tasks, on real servers that suggest continue-as-new early."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from nats.aio.client import Client as Nats
from neo4j import AsyncDriver
from temporalio.client import Client

from activities.config import CONFIG
from deploy.local.ports import free_ports
from tests.support.checker import check
from tests.support.fleet import new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import EarlyTemporal, Servers, started
from tests.support.site import GOOD_REPORT, SAMPLE_STORY
from workflows.models.ids import plan_workflow_id, story_workflow_id
from workflows.models.plan import Plan
from workflows.models.story import StoryView

STORY = "US-long-plan"
ROLE = "CLERK"
"""The role of every task: its council has one agent."""

TASKS, AT_ONCE = 55, 11
PROPOSAL = {
    "approach": "directly",
    "content": "Write it as one small module, with a test that reads back what it has stored.",
    "decisions": [{"title": "Keep it small", "rationale": "It is enough.", "affects": []}],
}


def tasks() -> list[dict[str, Any]]:
    """Return five waves of tasks, each of which needs one of the wave before."""
    return [
        {
            "title": f"Part {number}",
            "description": f"Do part {number}.",
            "role": ROLE,
            "depends_on": [number - AT_ONCE] if number > AT_ONCE else [],
            "priority": 1,
        }
        for number in range(1, TASKS + 1)
    ]


def config_with_clerk(folder: Path) -> Path:
    """Copy deploy/config, with one more council."""
    shutil.copytree(CONFIG, folder)
    councils = yaml.safe_load((folder / "councils.yaml").read_text())
    councils["councils"][ROLE] = [{"agent_id": "agent-clerk-1", "persona": "What is asked?"}]
    (folder / "councils.yaml").write_text(yaml.safe_dump(councils))
    return folder


async def events_of_runs(client: Client, workflow_id: str) -> list[int]:
    """Return the number of events of each run of a workflow, oldest first."""
    run_id, lengths = "", list[int]()
    while run_id or not lengths:
        handle = client.get_workflow_handle(workflow_id, run_id=run_id or None)
        events = (await handle.fetch_history()).events
        lengths.insert(0, len(events))
        began = events[0].workflow_execution_started_event_attributes
        run_id = began.continued_execution_run_id
    return lengths


async def test_a_plan_of_55_tasks_is_derived_run_over_several_runs_and_published_in_order(
    servers: Servers, driver: AsyncDriver, nats_client: Nats, tmp_path: Path
) -> None:
    port, ui_port = free_ports(2)
    early = EarlyTemporal(tmp_path / "temporal", port, ui_port, events=500)
    config = config_with_clerk(tmp_path / "config")
    async with LlmServer(window=100_000) as llm, started(early, early.address, port=port) as own:
        llm.documents["derive_plan"] = lambda _: {"tasks": tasks()}
        llm.documents["propose"] = llm.documents["revise"] = lambda _: PROPOSAL
        environment = await new_environment(
            dataclasses.replace(servers, temporal=own), llm, FLEET_CONFIG=str(config)
        )
        async with whole_fleet(environment) as client:
            story = await client.start_workflow(
                "StoryWorkflow",
                json.loads(SAMPLE_STORY.read_text()) | {"story_id": STORY, "approvals": "auto"},
                id=story_workflow_id(STORY),
                task_queue="story",
            )

            async def view() -> StoryView:
                found: StoryView = await story.query("state", result_type=StoryView)
                return found

            # 55 councils on two cores, beside other tests.
            await until(view, lambda now: now.state == "BUILD" and not now.working_on, within_s=300)
            await story.execute_update("report", GOOD_REPORT)
            plan: Plan = await story.query("plan", result_type=Plan)
            await story.result()
            of_story = await events_of_runs(client, story.id)
            of_plan = await events_of_runs(client, plan_workflow_id(STORY, plan.plan_id))
            faults = await check(client, nats_client, driver, [STORY])

    assert len(plan.tasks) == TASKS
    assert len(of_plan) > 1
    assert len(of_story) > 1
    assert faults == []
    found, _, _ = await driver.execute_query(
        "MATCH (t:Subtask {case_id: $story}) RETURN t.status AS status, count(*) AS tasks",
        story=STORY,
    )
    assert [dict(row) for row in found] == [{"status": "DONE", "tasks": TASKS}]
