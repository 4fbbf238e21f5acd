"""A whole story on the encrypted local stack: where its texts can be read, and where not."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dotenv import dotenv_values
from google.protobuf.message import Message
from neo4j import AsyncGraphDatabase
from redis.asyncio import Redis
from temporalio.client import Client, WorkflowHandle
from temporalio.common import SearchAttributeKey

from deploy.local.server import script
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from tests.support import llm_server
from tests.support.fleet import connect
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.site import GOOD_REPORT, SAMPLE_STORY
from workers.payload_codec import payloads_of
from workflows.search_attributes import STORY_STATE

pytestmark = pytest.mark.timeout(1800)

STORY = "US-900"
WRITTEN = f"canary{uuid.uuid4().hex}"
"""A word in the story's title and brief."""
ANSWERED = f"canary{uuid.uuid4().hex}"
"""A word in the answers of the model."""
LONG = {"within_s": 600.0, "every_s": 0.5}
"""For several councils, on a machine that is busy with other work."""
BY_CONTRACT = (b"swe:case:", b"context:")
"""Prefixes of the keys in Valkey that other systems read, in plain text."""


@pytest.fixture(scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEMPORAL_ADDRESS", "NATS_URL", "NEO4J_URI", "REDIS_HOST", "PAYLOAD_KEYS"):
            patch.delenv(name, raising=False)
        patch.setattr(llm_server, "_WORDS", [*llm_server.WORDS.split(), *[ANSWERED] * 20])
        async with LlmServer() as llm:
            patch.setenv("VLLM_URL", llm.url)
            home = tmp_path_factory.mktemp("stack")
            settings = StackSettings.load(home=home, pick_free_ports=True)
            stack = Stack(settings, without=("ray",))  # its probe asks for text without a schema
            try:
                await stack.up()
                yield stack
            finally:
                await stack.down()


def env(stack: Stack) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(stack.env_file).items()}


async def temporal(stack: Stack, *arguments: str, story: str = STORY, code: int = 0) -> str:
    """Run the `temporal` CLI on the story as a person does who has loaded `.fleet/env`."""
    process = await asyncio.create_subprocess_exec(
        *(str(script("temporal")), "workflow", *arguments, "--workflow-id", f"story-{story}"),
        env=os.environ | env(stack),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    assert process.returncode == code, out.decode()
    return out.decode()


async def run_story(stack: Stack, client: Client, folder: Path) -> str:
    """Take the story to its end with the CLI, and return what the CLI prints of its state."""
    story = json.loads(SAMPLE_STORY.read_text()) | {"story_id": STORY, "approvals": "auto"}
    story |= {"title": f"{story['title']} {WRITTEN}", "brief": f"{story['brief']} {WRITTEN}"}
    (folder / "story.json").write_text(json.dumps(story))
    (folder / "report.json").write_text(GOOD_REPORT.model_dump_json(by_alias=True))
    start = ("start", "--type", "StoryWorkflow", "--task-queue", "story")
    await temporal(stack, *start, "--input-file", str(folder / "story.json"))
    handle = client.get_workflow_handle(f"story-{STORY}")
    await until(lambda: attribute(handle, STORY_STATE), lambda state: state == "BUILD", **LONG)
    report = ("update", "execute", "--name", "report")
    await temporal(stack, *report, "--input-file", str(folder / "report.json"))
    await until(handle.describe, lambda described: described.close_time, **LONG)
    return await temporal(stack, "query", "--type", "state")


async def refused_story(stack: Stack, folder: Path) -> str:
    """Start a story that is too long, and return what the CLI prints of its result."""
    story = {"story_id": "US-901", "title": WRITTEN, "brief": WRITTEN * 2_000}
    (folder / "long.json").write_text(json.dumps(story))
    start = ("start", "--type", "StoryWorkflow", "--task-queue", "story")
    await temporal(stack, *start, "--input-file", str(folder / "long.json"), story="US-901")
    return await temporal(stack, "result", story="US-901", code=1)


async def attribute(handle: WorkflowHandle[Any, Any], key: SearchAttributeKey[str]) -> str | None:
    return (await handle.describe()).typed_search_attributes.get(key)


async def graph_texts(stack: Stack) -> str:
    """Return the story's title and its proposals, from the graph."""
    at = env(stack)
    auth = (at["NEO4J_USER"], at["NEO4J_PASSWORD"])
    async with AsyncGraphDatabase.driver(at["NEO4J_URI"], auth=auth) as graph:
        rows, _, _ = await graph.execute_query(
            "MATCH (s:Story {id: $id}) OPTIONAL MATCH (p:Proposal)-[:OF]->(s) "
            "RETURN s.title AS title, collect(p.content) AS proposals",
            id=STORY,
        )
    return json.dumps([row.data() for row in rows])


async def web_ui_text(stack: Stack, client: Client) -> str:
    """Return the story's input as a page of the Web UI gets it."""
    history = await client.get_workflow_handle(f"story-{STORY}").fetch_history()
    payload = next(payloads_of(history.events[0]))
    sent = {
        "metadata": {k: base64.b64encode(v).decode() for k, v in payload.metadata.items()},
        "data": base64.b64encode(payload.data).decode(),
    }
    address = f"http://127.0.0.1:{stack.settings.temporal_ui_port}"
    async with httpx.AsyncClient(base_url=address, trust_env=False) as browser:
        settings = (await browser.get("/api/v1/settings")).json()
        decode = f"{settings['Codec']['Endpoint']}/decode"
        answer = await browser.post(decode, json={"payloads": [sent]}, headers={"Origin": address})
    return base64.b64decode(answer.json()["payloads"][0]["data"]).decode()


async def stored_in_temporal(client: Client) -> dict[str, bytes]:
    """Return what Temporal answers about each workflow: descriptions with memos, and histories."""
    found: dict[str, bytes] = {}
    async for each in client.list_workflows():
        handle = client.get_workflow_handle(each.id, run_id=each.run_id)
        history = await handle.fetch_history()
        messages: list[Message] = [(await handle.describe()).raw_description, *history.events]
        found[each.id] = b"".join(message.SerializeToString() for message in messages)
    return found


async def stored_in_valkey(stack: Stack) -> dict[Any, str]:
    """Return every key with its value."""
    at = env(stack)
    valkey = Redis(host=at["REDIS_HOST"], port=int(at["REDIS_PORT"]), password=at["REDIS_PASSWORD"])
    read: dict[Any, Any] = {
        b"string": valkey.get,
        b"hash": valkey.hgetall,
        b"list": lambda key: valkey.lrange(key, 0, -1),
        b"set": valkey.smembers,
        b"zset": lambda key: valkey.zrange(key, 0, -1),
        b"stream": valkey.xrange,
    }
    async with valkey:
        return {
            key: str(await read[await valkey.type(key)](key)) async for key in valkey.scan_iter()
        }


async def test_the_texts_of_a_story_are_read_by_people_and_stored_as_cipher_text(
    stack: Stack, tmp_path: Path
) -> None:
    client = await connect(env(stack)["TEMPORAL_ADDRESS"])
    state = await run_story(stack, client, tmp_path)
    refusal = await refused_story(stack, tmp_path)

    # People read them with the CLI, in the Web UI and in the graph.
    assert "DONE" in state
    assert WRITTEN in state
    assert "brief: has 76,000 bytes, and may have 65,536" in refusal
    assert WRITTEN in await web_ui_text(stack, client)
    texts = await until(lambda: graph_texts(stack), lambda found: ANSWERED in found)
    assert WRITTEN in texts

    # Temporal's answers and files, the logs, and the fleet's keys in Valkey do not have them.
    answered = await stored_in_temporal(client)
    kept = await stored_in_valkey(stack)
    await stack.down()
    files = [*(stack.home / "data" / "temporal").iterdir(), *(stack.home / "logs").rglob("*.log")]
    read = {str(path): path.read_bytes() for path in files}
    assert f"story-{STORY}" in answered
    assert any(f"story-{STORY}".encode() in content for content in read.values())
    assert any(key.startswith(BY_CONTRACT) and WRITTEN in kept[key] for key in kept)
    for word in (WRITTEN, ANSWERED):
        assert [name for name, content in answered.items() if word.encode() in content] == []
        assert [name for name, content in read.items() if word.encode() in content] == []
        assert [
            key for key, value in kept.items() if word in value and not key.startswith(BY_CONTRACT)
        ] == []
