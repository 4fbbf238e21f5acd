"""Messages as the predecessor's clients send them, and their expected effects, on real servers.

`tests/cases/inbound.json` holds the contract's own cases, in their order. MORE has others of the
same kinds, in the same form.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from nats.aio.client import Client as Nats
from nats.js import JetStreamContext
from neo4j import AsyncDriver
from temporalio.client import Client

from activities.cache import pack_key
from activities.graph.activities import Graph
from tests.integration.bridge.test_inbox import bus, consuming, dead, rows, settled, temporal_client
from workflows.models.context import PackQuery
from workflows.models.ids import plan_workflow_id

__all__ = ["bus", "temporal_client"]

FOLDER = Path(__file__).parents[2] / "cases"
CASES = json.loads((FOLDER / "inbound.json").read_text())["cases"]
MORE = json.loads((FOLDER / "inbound_more.json").read_text())["cases"]

MANY_DECISIONS = {
    "subject": "orchestration.deliberation.completed",
    "headers": {},
    "body": {
        "story_id": "US-5",
        "task_id": "T-9",
        "decisions": [{"id": f"d{number}"} for number in range(10_000)],
    },
    "expect": {"dead_letter": "decisions: 10000 in one message"},
}

KEYS = {"stored", "identity", "runs", "acknowledged", "dead_letter", "dropped_packs"}


async def test_every_message_becomes_what_the_contract_defines(
    bus: JetStreamContext,
    nats_client: Nats,
    graph: Graph,
    driver: AsyncDriver,
    temporal_client: Client,
) -> None:
    sent: list[tuple[str, str, int, dict[str, Any]]] = []
    for story in ("US-1", "US-5"):
        await rows(driver, "MERGE (s:Case {id: $id}) SET s:Story, s.title = 'x'", id=story)
        await graph.build_pack(PackQuery(story_id=story, role="DEV", phase="BUILD"))
    async with consuming(nats_client, graph, temporal_client):
        for case in [*CASES, *MORE, MANY_DECISIONS]:
            story = case["expect"].get("dropped_packs")
            if story:
                await settled(bus)
                await graph.build_pack(PackQuery(story_id=story, role="DEV", phase="BUILD"))
                assert await has_pack(graph, story)
            ack = await bus.publish(case["subject"], data(case), headers=case["headers"] or None)
            sent.append((str(case)[:300], ack.stream, ack.seq, case["expect"]))
            if story:
                await settled(bus)
                assert not await has_pack(graph, story), case
            if "ce-id" in str(case).lower() or "idempotency" in str(case):
                await settled(bus)  # so that the order of two messages is certain
        await settled(bus)

    letters = await dead(nats_client)
    wrong = []
    for message, stream, sequence, expect in sent:
        reasons = {
            f"{letter.reason}"
            for letter in letters
            if (letter.stream, letter.sequence) == (stream, sequence)
        }
        if field := expect.get("dead_letter"):
            if not reasons or not all(reason.startswith(field) for reason in reasons):
                wrong.append((message, expect, reasons))
            continue
        if reasons or (
            (label := expect.get("stored"))
            and not await found(driver, label, expect, stream, sequence)
        ):
            wrong.append((message, expect, reasons))
    assert wrong == []
    handle = temporal_client.get_workflow_handle(plan_workflow_id("US-2", "plan-2"))
    assert (await handle.describe()).workflow_type == "PlanWorkflow"
    assert len({letter.reason for letter in letters if "k-1" in letter.reason}) == 1


def data(case: dict[str, Any]) -> bytes:
    return str(case.get("raw") or json.dumps(case["body"])).encode()


async def has_pack(graph: Graph, story_id: str) -> bool:
    return bool(await graph._cache.client.exists(pack_key(story_id, "DEV", "BUILD")))


async def found(
    driver: AsyncDriver, label: str, expect: dict[str, Any], stream: str, sequence: int
) -> bool:
    """Return whether the node exists with the expected properties and belongs to its story."""
    identity = expect.get("identity", expect.get("id", f"{stream}/{sequence}/"))
    nodes = await rows(
        driver,
        f"MATCH (n:{label})-[:OF]->(s:Case:Story) WHERE n.id STARTS WITH $id "
        "OR n.entry_id STARTS WITH $id RETURN properties(n) AS n, s.id AS story",
        id=identity,
    )
    if label == "Decision" and not nodes:
        return bool(
            await rows(
                driver, "MATCH (n:Decision {decided_by: $by}) RETURN n", by=expect["decided_by"]
            )
        )
    wanted = {key: value for key, value in expect.items() if key not in KEYS}
    return any(
        all(same(node["n"].get(key), value) for key, value in wanted.items())
        and node["story"] == node["n"].get("story_id", node["story"])
        for node in nodes
    )


def same(value: Any, wanted: Any) -> bool:
    """Return whether two values are equal; times are compared as instants."""
    if isinstance(wanted, str) and wanted[:2] == "20" and isinstance(value, str):
        at = datetime.fromisoformat
        return at(value) == at(wanted)
    return bool(value == wanted)
