"""The codec server: what the Web UI and the `temporal` CLI read, and attacks on it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from temporalio.api.common.v1 import Payload
from temporalio.client import Client
from temporalio.worker import Worker

from activities.revoked import RevokedTokens
from activities.tokens import Caller, create_token, read_token
from deploy.local.ports import free_ports
from deploy.local.server import script
from tests.support.authority import Authority
from tests.support.board import Board, refuse, shout
from tests.support.fleet import (
    TOKEN_KEY,
    Environment,
    connect,
    launch,
    new_environment,
    running,
)
from tests.support.llm_server import LlmServer
from tests.support.polling import until
from tests.support.servers import Servers
from workers.external_storage import data_converter, payload_key
from workers.payload_codec import EncryptionCodec, encrypting_converter
from workers.processes.codec import DECODED_BYTES, REQUEST_BYTES
from workers.workflow_runner import Runner

KEY, OTHER = os.urandom(32), os.urandom(32)
ORIGIN = "https://temporal.example"


def token(key: str = TOKEN_KEY, valid_for: timedelta = timedelta(hours=1)) -> str:
    return create_token(key, Caller(actor="ana", roles=frozenset({"PO"})), valid_for)


@pytest.fixture(scope="module")
async def environment(servers: Servers) -> AsyncIterator[Environment]:
    """Return the variables of a fleet that encrypts."""
    async with LlmServer() as llm:
        yield await new_environment(servers, llm, PAYLOAD_KEYS=KEY.hex(), CODEC_ORIGINS=ORIGIN)


@asynccontextmanager
async def http(url: str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        base_url=url,
        trust_env=False,
        timeout=60,
        headers={"Authorization": f"Bearer {token()}"},
        **options,
    ) as client:
        yield client


@pytest.fixture(scope="module")
async def codec(environment: Environment) -> AsyncIterator[httpx.AsyncClient]:
    """Run the process; yield a client of it with a token."""
    url = f"http://127.0.0.1:{environment['CODEC_PORT']}"
    async with running("codec", environment), http(url) as client:
        yield client


def body(*payloads: Payload) -> dict[str, Any]:
    return {
        "payloads": [
            {
                "metadata": {
                    name: base64.b64encode(value).decode()
                    for name, value in payload.metadata.items()
                },
                "data": base64.b64encode(payload.data).decode(),
                "externalPayloads": [
                    {"sizeBytes": str(each.size_bytes)} for each in payload.external_payloads
                ],
            }
            for payload in payloads
        ]
    }


def texts(answer: httpx.Response) -> list[Any]:
    assert answer.status_code == 200, answer.text
    return [json.loads(base64.b64decode(each["data"])) for each in answer.json()["payloads"]]


async def encrypted(*values: Any) -> list[Payload]:
    return await encrypting_converter([KEY]).encode(values)


async def test_payloads_are_encrypted_and_decrypted(codec: httpx.AsyncClient) -> None:
    plain = Payload(metadata={"encoding": b"json/plain"}, data=b'"brief"')

    sent = await codec.post("/encode", json=body(plain, plain))
    answer = await codec.post("/default/decode", json=sent.json())

    assert b"brief" not in base64.b64decode(sent.json()["payloads"][0]["data"])
    assert texts(answer) == ["brief", "brief"]
    assert answer.headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in answer.headers
    assert texts(await codec.post("/decode", json=body(plain))) == ["brief"]


async def test_a_large_payload_is_read_from_valkey_unless_the_web_ui_asks_otherwise(
    codec: httpx.AsyncClient, client: Redis
) -> None:
    value = os.urandom(100_000).hex()
    (claim,) = await data_converter(client, keys=[KEY]).encode([value])
    assert claim.external_payloads
    key = payload_key(json.loads(claim.data)["claimData"]["sha256"])

    assert texts(await codec.post("/decode", json=body(claim))) == [value]
    assert texts(await codec.post("/download?preserveStorageRefs=false", json=body(claim))) == [
        value
    ]
    kept = await codec.post("/decode?preserveStorageRefs=true", json=body(claim))
    assert texts(kept)[0]["claimData"] == json.loads(claim.data)["claimData"]

    await client.delete(key)
    lost = await codec.post("/decode", json=body(claim))
    assert lost.status_code == 422
    assert key in lost.text


@pytest.mark.parametrize("path", ["/encode", "/decode", "/download", "/default/decode"])
async def test_without_a_valid_token_nothing_is_answered(
    codec: httpx.AsyncClient, path: str
) -> None:
    (payload,) = await encrypted("brief")
    headers = {
        "none": "",
        "basic": "Basic YW5hOmFuYQ==",
        "forged": f"Bearer {token('another key, of 32 bytes or more')}",
        "expired": f"Bearer {token(valid_for=timedelta(hours=-1))}",
        "not a token": "Bearer x",
    }

    for name, value in headers.items():
        answer = await codec.post(path, json=body(payload), headers={"Authorization": value})
        assert answer.status_code == 401, name
        assert "brief" not in answer.text
        assert "payloads" not in answer.text


async def test_a_revoked_token_is_refused(codec: httpx.AsyncClient, client: Redis) -> None:
    revoked = token()
    headers = {"Authorization": f"Bearer {revoked}"}
    assert (await codec.post("/decode", json=body(), headers=headers)).status_code == 200

    caller = read_token([TOKEN_KEY], revoked)
    assert caller.token_id
    await RevokedTokens(client).revoke(caller.token_id, timedelta(hours=1))

    async def status() -> int:
        return (await codec.post("/decode", json=body(), headers=headers)).status_code

    await until(status, lambda code: code == 401)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8081"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": f"{ORIGIN}.evil.example"},
        {"Origin": "http://temporal.example"},
        {"Host": "evil.example", "Origin": ORIGIN},
    ],
    ids=str,
)
async def test_pages_of_other_sites_are_refused(
    codec: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    preflight = {"Access-Control-Request-Method": "POST"}
    for method in ("POST", "OPTIONS"):
        answer = await codec.request(method, "/decode", json=body(), headers=headers | preflight)

        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_pages_of_the_web_ui_are_served(codec: httpx.AsyncClient) -> None:
    (payload,) = await encrypted("brief")
    asked = "authorization,content-type,x-namespace"
    preflight = await codec.options(
        "/decode",
        headers={
            "Origin": ORIGIN,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked,
            "Authorization": "",
        },
    )
    answer = await codec.post("/decode", json=body(payload), headers={"Origin": ORIGIN})

    assert preflight.status_code == 200
    for response in (preflight, answer):
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert response.headers["access-control-allow-credentials"] == "true"
    assert set(asked.split(",")) <= set(
        preflight.headers["access-control-allow-headers"].lower().split(", ")
    )
    assert texts(answer) == ["brief"]


async def test_too_much_is_refused(codec: httpx.AsyncClient) -> None:
    """A request that is too large, with and without its length; and small ones that are not."""
    large = b"x" * (REQUEST_BYTES + 1)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(large), 65_536):
            yield large[start : start + 65_536]

    for content in (large, chunks()):
        assert (await codec.post("/decode", content=content)).status_code == 413

    (bomb,) = await encrypted("0" * (DECODED_BYTES // 4))
    assert bomb.ByteSize() < 100_000
    assert (await codec.post("/decode", json=body(bomb))).status_code == 200
    answer = await codec.post("/decode", json=body(*[bomb] * 5))
    assert (answer.status_code, "ask for fewer" in answer.text) == (413, True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"payloads": 1}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:20]),
)
async def test_a_malformed_request_is_refused(codec: httpx.AsyncClient, content: bytes) -> None:
    answer = await codec.post("/decode", content=content)

    assert answer.status_code == 400
    assert "payloads" in answer.text


async def test_other_paths_and_methods_are_refused(codec: httpx.AsyncClient) -> None:
    assert (await codec.get("/decode")).status_code == 405
    assert (await codec.post("/")).status_code == 404
    assert (await codec.post("/a/b/decode")).status_code == 404


async def test_what_cannot_be_decrypted_is_named(codec: httpx.AsyncClient) -> None:
    (payload,) = await encrypted("brief")
    altered = Payload(metadata=payload.metadata, data=payload.data[:-1])
    (unknown,) = await EncryptionCodec([OTHER]).encode([payload])

    for each, why in ((altered, "altered after it was encrypted"), (unknown, "PAYLOAD_KEYS")):
        answer = await codec.post("/decode", json=body(payload, each))
        assert answer.status_code == 422
        assert why in answer.text


async def test_without_keys_it_does_not_start(environment: Environment) -> None:
    process = await launch("codec", environment | {"PAYLOAD_KEYS": ""})
    _, errors = await process.communicate()

    assert process.returncode == 1
    assert b"PAYLOAD_KEYS" in errors


async def test_beyond_loopback_it_needs_tls(environment: Environment, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    everywhere = environment | {"CODEC_HOST": "0.0.0.0", "CODEC_PORT": str(port)}
    process = await launch("codec", everywhere)
    _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"CODEC_TLS_CERT" in errors

    authority = Authority(tmp_path)
    pair = authority.issue()
    secured = everywhere | {"CODEC_TLS_CERT": str(pair.cert), "CODEC_TLS_KEY": str(pair.key)}
    (payload,) = await encrypted("brief")
    trusting = ssl.create_default_context(cafile=authority.ca)
    async with (
        running("codec", secured),
        http(f"https://localhost:{port}", verify=trusting) as client,
        http(f"https://localhost:{port}") as distrusting,
    ):
        assert texts(await client.post("/decode", json=body(payload))) == ["brief"]
        with pytest.raises(httpx.ConnectError, match="certificate"):
            await distrusting.post("/decode", json=body(payload))


# --- the temporal CLI -----------------------------------------------------------------------------


@pytest.fixture
async def worker(environment: Environment, client: Redis) -> AsyncIterator[tuple[Client, str]]:
    here = await connect(
        environment["TEMPORAL_ADDRESS"],
        environment["TEMPORAL_NAMESPACE"],
        data_converter(client, keys=[KEY]),
    )
    queue = f"board-{uuid.uuid4().hex}"
    async with Worker(
        here,
        task_queue=queue,
        workflows=[Board],
        activities=[shout, refuse],
        workflow_runner=Runner(),
    ):
        yield here, queue


async def test_the_temporal_cli_sends_and_shows_through_it(
    codec: httpx.AsyncClient, environment: Environment, worker: tuple[Client, str]
) -> None:
    client, queue = worker
    where = {
        "TEMPORAL_ADDRESS": environment["TEMPORAL_ADDRESS"],
        "TEMPORAL_NAMESPACE": environment["TEMPORAL_NAMESPACE"],
    }
    codec_of = where | {
        "TEMPORAL_CODEC_ENDPOINT": str(codec.base_url),
        "TEMPORAL_CODEC_AUTH": f"Bearer {token()}",
    }
    on = ("--workflow-id", queue)

    async def cli(env: dict[str, str], *arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            script("temporal"),
            "workflow",
            *arguments,
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | env,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, out.decode()
        return out.decode()

    start = ("start", "--type", "Board", "--task-queue", queue, *on, "--input", '"canary brief"')
    await cli(codec_of, *start)
    await cli(codec_of, "signal", *on, "--name", "note", "--input", '"canary note"')
    query = await cli(codec_of, "query", *on, "--type", "all")
    update = ("update", "execute", *on, "--name", "end", "--input", '"canary end"')
    updated = await cli(codec_of, *update)
    result = await cli(codec_of, "result", *on)
    shown = await cli(codec_of, "show", *on, "--output", "json")
    without = await cli(where, "show", *on, "--output", "json")

    history = (await client.get_workflow_handle(queue).fetch_history()).to_json()
    assert "canary" not in history
    assert "canary" not in without
    assert "canary note" in query
    assert "canary end" in updated
    assert "CANARY BRIEF" in result
    assert "canary brief" in base64_decoded(shown)
    assert "refused: canary brief" in base64_decoded(shown)


def base64_decoded(shown: str) -> str:
    """Return the JSON with its payloads in plain text."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, str):
            try:
                return base64.b64decode(value, validate=True).decode()
            except ValueError:
                return value
        return value

    return json.dumps(plain(json.loads(shown)))
