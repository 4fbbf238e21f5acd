"""The cache on a real Valkey: each line is stored once, and no stale pack remains."""

import asyncio
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from activities.cache import (
    TIMELINE_LINES,
    Cache,
    Document,
    TimelineRow,
    pack_key,
    pack_variant,
    timeline_key,
)
from tests.support.stories import new_story
from workflows.models.context import ContextPack
from workflows.models.ids import encode_id


def line(story: str, number: int, started_ms: int = 1000) -> TimelineRow:
    values = (f"{started_ms}/{number}", "Kind", "type", "said", "ana", "time", "source")
    return TimelineRow(story, f"{started_ms}-{number}", values)


async def timeline_ids(client: Redis, story: str) -> list[str]:
    found: Any = await client.xrange(timeline_key(story))
    return [fields[b"id"].decode() for _, fields in found]


async def test_lines_have_the_ids_of_their_outbox_and_are_there_once(client: Redis) -> None:
    story, cache = new_story(), Cache(client)
    lines = [line(story, number) for number in range(1, 5)]

    await cache.store(lines[:3], [])
    await cache.store(lines[1:], [])
    await cache.store(lines[:1], [])

    found: Any = await client.xrange(timeline_key(story))
    assert [stream_id for stream_id, _ in found] == [b"1000-1", b"1000-2", b"1000-3", b"1000-4"]
    assert found[0][1] == {
        b"id": b"1000/1",
        b"kind": b"Kind",
        b"event_type": b"type",
        b"description": b"said",
        b"actor": b"ana",
        b"timestamp": b"time",
        b"source": b"source",
    }


async def keep(cache: Cache, story: str, key: str, pack: ContextPack) -> bool:
    return await cache.keep_pack(story, key, await cache.find_pack(story, key, "c1"), pack)


async def test_lines_of_several_stories_go_to_the_timeline_of_each(client: Redis) -> None:
    one, two, cache = new_story(), new_story(), Cache(client)
    mixed = [line(one, 1), line(two, 1), line(one, 2), line(two, 2), line(two, 3)]
    for story in (one, two):
        key = pack_key(story, "DEV", "BUILD")
        assert await keep(cache, story, key, ContextPack(system="old"))

    for _ in range(2):
        await cache.store(mixed, [], {one, two})

    assert await timeline_ids(client, one) == ["1000/1", "1000/2"]
    assert await timeline_ids(client, two) == ["1000/1", "1000/2", "1000/3"]
    for story in (one, two):
        key = pack_key(story, "DEV", "BUILD")
        left = await cache.find_pack(story, key, "c1")
        assert (left.pack, left.generation) == (None, "2")


async def test_a_late_timeline_line_is_appended_once(client: Redis) -> None:
    story, cache = new_story(), Cache(client)
    await cache.store([line(story, 0, started_ms=1000), line(story, 0, started_ms=2000)], [])

    for _ in range(3):
        await cache.store([line(story, 1, started_ms=1000)], [])
        await cache.store([line(story, 2, started_ms=1000)], [])

    assert await timeline_ids(client, story) == ["1000/0", "2000/0", "1000/1", "1000/2"]


async def test_a_timeline_keeps_its_newest_lines_and_takes_no_old_one_again(client: Redis) -> None:
    story, cache = new_story(), Cache(client)

    def timed(number: int, started_ms: int = 1000) -> TimelineRow:
        row = line(story, number, started_ms)
        return row._replace(values=(*row.values[:5], f"{number:08}", row.values[6]))

    lines = [timed(number) for number in range(1, TIMELINE_LINES + 301)]
    for first in range(0, len(lines), 500):
        await cache.store(lines[first : first + 500], [])
    kept = await timeline_ids(client, story)
    for repeated in (lines[:100], lines[250:350], lines[-100:]):
        await cache.store(repeated, [])

    assert kept == [f"1000/{number}" for number in range(301, TIMELINE_LINES + 301)]
    assert await timeline_ids(client, story) == kept

    late = [timed(TIMELINE_LINES + 300 + number, 500) for number in range(200)]
    for _ in range(2):
        await cache.store(late, [])
    later = [timed(TIMELINE_LINES + 600 + number, 500) for number in range(TIMELINE_LINES)]
    for first in range(0, len(later), 500):
        await cache.store(later[first : first + 500], [])
    await cache.store(late, [])

    assert await timeline_ids(client, story) == [row.values[0] for row in later]
    remembered = f"swe:case:{encode_id(story)}:planning:late"
    assert await client.scard(remembered) == TIMELINE_LINES


async def test_outboxes_of_one_instant_lose_no_line_to_each_other(client: Redis) -> None:
    story, cache = new_story(), Cache(client)
    mine = line(story, 0)
    theirs = mine._replace(values=("theirs", *mine.values[1:]))

    for _ in range(2):
        await cache.store([mine, theirs], [])

    assert await timeline_ids(client, story) == ["1000/0", "theirs"]


async def test_a_line_whose_id_no_stream_takes_is_kept(client: Redis) -> None:
    story, cache = new_story(), Cache(client)

    for _ in range(2):
        await cache.store([line(story, 0, started_ms=0)], [])

    assert await timeline_ids(client, story) == ["0/0"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1000, 2000])), min_size=1))
async def test_each_line_is_there_once_in_whatever_order_outboxes_write(
    client: Redis, steps: list[tuple[int, int]]
) -> None:
    story, cache = new_story(), Cache(client)

    for number, started_ms in steps:
        await cache.store([line(story, number, started_ms)], [])

    found = await timeline_ids(client, story)
    assert sorted(found) == sorted({f"{started}/{number}" for number, started in steps})


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(orders=st.lists(st.text("0123456789-", max_size=5), min_size=1))
async def test_the_newest_document_stays_in_whatever_order_they_come(
    client: Redis, orders: list[str]
) -> None:
    key, cache = f"swe:case:{new_story()}:spec", Cache(client)

    for order in orders:
        await cache.store([], [Document(key, order, {"title": f'"{order}'})])

    kept = json.loads(await client.get(key) or b"")
    assert kept == {"order": max(orders), "title": f'"{max(orders)}'}


async def test_a_pack_begun_before_a_change_is_not_kept(client: Redis) -> None:
    story, cache = new_story(), Cache(client)
    key = pack_key(story, "DEV", "BUILD")
    begun = await cache.find_pack(story, key, "c1")

    await cache.drop_packs([story])

    assert not await cache.keep_pack(story, key, begun, ContextPack(system="old"))
    left = await cache.find_pack(story, key, "c1")
    assert (left.pack, left.generation) == (None, "1")


async def test_a_change_drops_every_pack_of_its_story_and_of_no_other(client: Redis) -> None:
    story, other, cache = new_story(), new_story(), Cache(client)
    pack = ContextPack(system="s", scopes=["CASE_HEADER"], token_count=1, version="v")
    mine = [pack_key(story, "DEV", "BUILD"), pack_key(story, "QA", "TEST", pack_variant("t1", 9))]
    for key in mine:
        assert await keep(cache, story, key, pack)
    theirs = pack_key(other, "DEV", "BUILD")
    assert await keep(cache, other, theirs, pack)

    await cache.drop_packs([story, story])

    assert await client.exists(*mine) == 0
    left = await cache.find_pack(other, theirs, "c1")
    assert (left.pack, left.generation) == (pack, "0")


async def test_a_pack_lives_an_hour_and_only_for_the_configuration_it_was_built_with(
    client: Redis,
) -> None:
    story, cache = new_story(), Cache(client)
    key = pack_key(story, "DEV", "BUILD")

    await keep(cache, story, key, ContextPack(system="s"))

    assert 3590 < await client.ttl(key) <= 3600
    assert key == f"context:{story}:DEV:BUILD"
    assert (await cache.find_pack(story, key, "c1")).pack == ContextPack(system="s")
    assert (await cache.find_pack(story, key, "c2")).pack is None


async def test_builders_and_changes_at_once_leave_no_stale_pack(client: Redis) -> None:
    """A number stands for the graph: a change writes it first, and a builder reads it second."""
    story, cache, graph = new_story(), Cache(client), {"version": 0}
    key = pack_key(story, "DEV", "BUILD")

    async def change() -> None:
        for _ in range(30):
            graph["version"] += 1
            await asyncio.sleep(0)
            await cache.drop_packs([story])

    async def build() -> None:
        for _ in range(30):
            begun = await cache.find_pack(story, key, "c")
            seen = ContextPack(system=str(graph["version"]))
            await asyncio.sleep(0)
            await cache.keep_pack(story, key, begun, seen)

    await asyncio.gather(change(), *(build() for _ in range(4)))

    pack = (await cache.find_pack(story, key, "c")).pack
    assert pack is None or pack.system == str(graph["version"])


PARTS = st.tuples(*[st.text(":%a", max_size=3)] * 3)


@settings(max_examples=500)
@given(one=PARTS, two=PARTS)
def test_two_packs_never_share_a_key(one: tuple[str, str, str], two: tuple[str, str, str]) -> None:
    assert (pack_key(*one) == pack_key(*two)) == (one == two)


async def test_a_pack_is_kept_as_long_as_the_setting_requires(client: Redis) -> None:
    story, cache = new_story(), Cache(client, pack_ttl_s=90)
    key = pack_key(story, "DEV", "BUILD")

    assert await keep(cache, story, key, ContextPack(context="x"))

    assert 80 < await client.ttl(key) <= 90
