"""An upgrade with worker versioning: open stories move to the new build, and none waits."""

import asyncio
import sys
import uuid
from pathlib import Path

from temporalio.client import WorkflowHandle

from tests.support.fleet import Environment, connect, new_environment, whole_fleet
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import Servers
from tests.support.site import SAMPLE_STORY
from workers.processes.process import DEPLOYMENT
from workflows.models.ids import story_workflow_id
from workflows.models.story import Approve, StoryInput, StoryResult
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

TEMPORAL = Path(sys.executable).with_name("temporal")


async def made_current(environment: Environment, build_id: str) -> None:
    """Route work to a build, as docs/operations.md says; repeat until its workers are known."""

    async def done() -> bool:
        process = await asyncio.create_subprocess_exec(
            *(TEMPORAL, "worker", "deployment", "set-current-version", "--yes"),
            *("--deployment-name", DEPLOYMENT, "--build-id", build_id),
            *("--address", environment["TEMPORAL_ADDRESS"]),
            *("--namespace", environment["TEMPORAL_NAMESPACE"]),
        )
        return await process.wait() == 0

    await until(done)


async def build_of(story: WorkflowHandle[StoryWorkflow, StoryResult]) -> str:
    """Return the build whose worker has completed the story's last workflow task."""
    description = (await story.describe()).raw_description
    return description.workflow_execution_info.versioning_info.deployment_version.build_id


async def test_an_open_story_goes_on_with_the_build_that_becomes_current(
    servers: Servers, llm: LlmServer
) -> None:
    old = await new_environment(servers, llm, WORKER_BUILD_ID="1")
    new = old | {"WORKER_BUILD_ID": "2"}
    client = await connect(old["TEMPORAL_ADDRESS"], old["TEMPORAL_NAMESPACE"])
    story_id = f"US-{uuid.uuid4().hex[:8]}"
    sample = StoryInput.model_validate_json(SAMPLE_STORY.read_text())

    async with whole_fleet(old, "story", "agents", "context", "bridge"):
        await made_current(old, "1")
        story = await client.start_workflow(
            StoryWorkflow.run,
            sample.model_copy(update={"story_id": story_id}),
            id=story_workflow_id(story_id),
            task_queue=STORY_QUEUE,
        )
        view = await until(lambda: story.query(StoryWorkflow.state), lambda it: it.pending_gate)
        assert await build_of(story) == "1"
        async with whole_fleet(new, "story", "agents", "context", "bridge"):
            await made_current(new, "2")
            await story.execute_update(
                StoryWorkflow.approve,
                Approve(gate=view.pending_gate, actor="ana", role=view.gate_role),
            )
            await until(
                lambda: story.query(StoryWorkflow.state),
                lambda it: it.pending_gate == "approve_design",
            )

            assert await build_of(story) == "2"
