"""The servers themselves: written data survives a crash, and strangers are refused."""

import nats
import neo4j
import pytest
import redis.asyncio as redis
from nats.js.api import StorageType, StreamConfig
from neo4j.exceptions import AuthError

from tests.support.polling import until
from tests.support.servers import RunningServer


async def test_what_nats_acked_survives_a_crash(nats_server: RunningServer) -> None:
    client = await nats.connect(
        nats_server.address, user=nats_server.user, password=nats_server.password
    )
    jetstream = client.jetstream()
    await jetstream.add_stream(
        StreamConfig(name="CRASH", subjects=["crash.>"], storage=StorageType.FILE)
    )
    await jetstream.publish("crash.one", b"kept")

    await nats_server.kill()
    await nats_server.start()
    await until(lambda: client.is_connected)

    kept = await jetstream.get_last_msg("CRASH", "crash.one")
    assert kept.data == b"kept"
    await jetstream.delete_stream("CRASH")
    await client.close()


async def test_nats_refuses_a_client_without_credentials(nats_server: RunningServer) -> None:
    async def quiet(_: Exception) -> None: ...

    with pytest.raises(Exception, match=r"(?i)authorization"):
        await nats.connect(nats_server.address, allow_reconnect=False, error_cb=quiet)


async def test_what_valkey_answered_survives_a_crash(valkey: RunningServer) -> None:
    client = redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password)
    await client.set("crash", "kept")

    await valkey.kill()
    await valkey.start()

    assert await client.get("crash") == b"kept"
    assert (await client.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"
    await client.delete("crash")
    await client.aclose()


async def test_valkey_refuses_a_client_without_credentials(valkey: RunningServer) -> None:
    client = redis.Redis(host=valkey.host, port=valkey.port)

    with pytest.raises(redis.AuthenticationError):
        await client.get("anything")

    await client.aclose()


async def test_what_neo4j_committed_survives_a_crash(neo4j_server: RunningServer) -> None:
    auth = (neo4j_server.user or "", neo4j_server.password or "")
    async with neo4j.AsyncGraphDatabase.driver(neo4j_server.address, auth=auth) as driver:
        await driver.execute_query("CREATE (:Crash {kept: true})")

    await neo4j_server.kill()
    await neo4j_server.start()

    async with neo4j.AsyncGraphDatabase.driver(neo4j_server.address, auth=auth) as driver:
        found = await driver.execute_query("MATCH (c:Crash) DELETE c RETURN true AS kept")
    assert [record["kept"] for record in found.records] == [True]


async def test_neo4j_refuses_the_well_known_password(neo4j_server: RunningServer) -> None:
    async with neo4j.AsyncGraphDatabase.driver(
        neo4j_server.address, auth=("neo4j", "neo4j")
    ) as driver:
        with pytest.raises(AuthError):
            await driver.verify_connectivity()
