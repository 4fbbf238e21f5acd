"""Temporal keeps what it was told through a crash."""

import uuid

from temporalio.client import Client

from tests.conftest import RunningServer


async def test_a_started_workflow_survives_a_crash(temporal: RunningServer) -> None:
    client = await Client.connect(temporal.address)
    started = await client.start_workflow(
        "NobodyRunsThis", id=f"crash-{uuid.uuid4()}", task_queue="nobody"
    )

    await temporal.kill()
    await temporal.start()

    again = await Client.connect(temporal.address)
    description = await again.get_workflow_handle(started.id).describe()
    assert description.run_id == started.result_run_id
    await again.get_workflow_handle(started.id).terminate()
