"""The fleet's keys in Valkey: a story's spec, draft plan and timeline, and built context packs.

    swe:case:{id}:spec             JSON: a StorySpec, with `order` first
    swe:case:{id}:planning:draft   JSON: a PlanDerived, with `order` first
    swe:case:{id}:planning:stream  stream: one line for each entry, fields by LINE;
                                   the newest TIMELINE_LINES
    context:{story}:{role}:{phase} JSON: a ContextPack, with `config`; kept for CONTEXT_CACHE_TTL
                                   seconds. For a subtask or another budget, the key ends in
                                   `:{subtask}:{budget}`
    context:{story}:packs          set: the keys of the story's packs, so that they can be dropped
    context:{story}:generation     counter: grows with every change of the story
    swe:pack:{story}:{hash}        JSON: a ContextPack that calls refer to, encrypted if there are
                                   keys; kept for an hour after the last call
    swe:case:{id}:planning:late    set: ids of timeline lines that arrived late (see TIMELINE)
    swe:case:{id}:summaries:last   text: the story so far, written by other systems, shown in packs
    swe:case:{id}:session:{hash}   JSON: what agents got when they resumed the story; kept for as
                                   long as they requested

Parts of a key that come from outside are encoded (`workflows.models.ids`), so that none can form
another key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple

from redis.asyncio import Redis

from activities.kept_text import NOT_ENCRYPTED, TextCipher
from workflows.models.base import content_hash
from workflows.models.context import ContextPack
from workflows.models.ids import encode_id

BLOCKS_TTL = timedelta(hours=1)
"""How long the blocks of a pack are kept after the last call; then they are built again."""

PACK_TTL_S = 3600
"""Default time, in seconds, for which a context pack is kept."""

LINE = ("id", "kind", "event_type", "description", "actor", "timestamp", "source")
"""The fields of a line of the timeline."""

TIMELINE_LINES = 10_000
"""Most lines of a timeline; the oldest ones go first."""

_NAMES = ", ".join(f"'{name}'" for name in LINE)

TIMELINE = f"""
-- KEYS, for each story: stream, late. ARGV, for each story: how many lines; for each of them: its
-- stream id, then its field values, id first.
-- A line has its own stream id, so it is there once. Where a line of another outbox has passed that
-- id, it goes to the end instead, and the set of late ones knows it. A stream that was lost is
-- written again, its late lines too. When the timeline is full, its oldest lines go, and a line
-- that is older than the oldest one is not added, because it has been there.
local most, time = {TIMELINE_LINES}, {2 * (LINE.index("timestamp") + 1)}
local names = {{{_NAMES}}}
local function store(stream, late, begin, lines)
  if redis.call('EXISTS', stream) == 0 then
    redis.call('DEL', late)
  end
  for first = begin, begin + (lines - 1) * (#names + 1), #names + 1 do
    local at, id, line = ARGV[first], ARGV[first + 1], {{}}
    for place, name in ipairs(names) do
      line[#line + 1] = name
      line[#line + 1] = ARGV[first + place]
    end
    local there = redis.call('XRANGE', stream, at, at)
    local gone = false
    if redis.call('XLEN', stream) >= most then
      local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)
      gone = ARGV[first + time / 2] < oldest[1][2][time]
    end
    if not gone and not (there[1] and there[1][2][2] == id) then
      local added = redis.pcall('XADD', stream, at, unpack(line))
      if type(added) == 'table' and added.err then
        if not (string.find(added.err, 'equal or smaller') or string.find(added.err, '0-0')) then
          return added
        end
        if redis.call('SISMEMBER', late, id) == 0 then
          redis.call('XADD', stream, '*', unpack(line))
          redis.call('SADD', late, id)
        end
      end
    end
  end
  local surplus = redis.call('XLEN', stream) - most
  if surplus > 0 then
    for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+', 'COUNT', surplus)) do
      redis.call('SREM', late, entry[2][2])
    end
    redis.call('XTRIM', stream, 'MAXLEN', most)
  end
end
local begin = 1
for first = 1, #KEYS, 2 do
  local lines = tonumber(ARGV[begin])
  local failed = store(KEYS[first], KEYS[first + 1], begin + 1, lines)
  if failed then
    return failed
  end
  begin = begin + 1 + lines * (#names + 1)
end
"""

NEWEST = """
-- KEYS: a JSON text that begins with its order. ARGV: order, text. An older one changes nothing.
local held = redis.call('GET', KEYS[1])
local order = held and string.match(held, '^{"order": "([^"]*)"')
if not order or order <= ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
end
"""

DROP_PACKS = """
-- KEYS, for each story: generation, packs.
for first = 1, #KEYS, 2 do
  redis.call('INCR', KEYS[first])
  for _, pack in ipairs(redis.call('SMEMBERS', KEYS[first + 1])) do
    redis.call('DEL', pack)
  end
  redis.call('DEL', KEYS[first + 1])
end
"""

KEEP_PACK = """
-- KEYS: generation, packs, pack. ARGV: generation when the pack was begun, text, seconds to live.
-- A pack that was built from a graph which has changed since is not kept.
if (redis.call('GET', KEYS[1]) or '0') ~= ARGV[1] then
  return 0
end
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
redis.call('SADD', KEYS[2], KEYS[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""


class TimelineRow(NamedTuple):
    """A line of a story's timeline.

    `stream_id`: `{owner's start in ms}-{position in its outbox}`.
    """

    story_id: str
    stream_id: str
    values: tuple[str, ...]
    """The values of the fields in LINE."""


class Document(NamedTuple):
    """A JSON document under `key`; the one with the greatest `order` is kept."""

    key: str
    order: str
    content: dict[str, Any]


class KeptPack(NamedTuple):
    """A story's pack as it is stored, and what a new one depends on.

    Attributes:
        pack: None if none is stored, or it was built with another configuration or summary.
        generation: grows with every change of the story.
        config: the hash of the configuration and the summary.
        summary: the story so far, written by other systems; its writer drops no packs.
    """

    pack: ContextPack | None
    generation: str
    config: str
    summary: str


def spec_key(story_id: str) -> str:
    """Return the key of the story's text."""
    return f"swe:case:{encode_id(story_id)}:spec"


def draft_key(story_id: str) -> str:
    """Return the key of the story's last derived plan."""
    return f"swe:case:{encode_id(story_id)}:planning:draft"


def timeline_key(story_id: str) -> str:
    """Return the key of the story's timeline, which is a stream."""
    return f"swe:case:{encode_id(story_id)}:planning:stream"


def summary_key(story_id: str) -> str:
    """Return the key under which other systems keep the story's last summary."""
    return f"swe:case:{encode_id(story_id)}:summaries:last"


def session_key(story_id: str, content: str) -> str:
    """Return the key of a session. `content`: the hash of its content."""
    return f"swe:case:{encode_id(story_id)}:session:{encode_id(content)}"


def pack_key(story_id: str, role: str, phase: str, variant: str = "") -> str:
    """Return the key of a context pack. `variant`: see `pack_variant`; may be empty."""
    key = ":".join(encode_id(part) for part in (story_id, role, phase))
    return f"context:{key}:{variant}" if variant else f"context:{key}"


def pack_variant(subtask_id: str, token_budget: int) -> str:
    """Return the key's suffix for a pack other than the default; `token_budget` 0: the default."""
    return f"{encode_id(subtask_id)}:{token_budget}" if subtask_id or token_budget else ""


class Cache:
    """Valkey, through a client that returns bytes (decode_responses off).

    Raises:
        redis.exceptions.RedisError: in every method, if Valkey fails.
    """

    def __init__(
        self, client: Redis, pack_ttl_s: int = PACK_TTL_S, cipher: TextCipher = NOT_ENCRYPTED
    ) -> None:
        """Create the cache.

        Args:
            client: Valkey.
            pack_ttl_s: how long a context pack is kept, in seconds.
            cipher: of the packs that calls refer to, as histories would encrypt them.
        """
        self.client = client
        self._cipher = cipher
        self._pack_ttl_s = pack_ttl_s
        self._timeline = client.register_script(TIMELINE)
        self._newest = client.register_script(NEWEST)
        self._drop_packs = client.register_script(DROP_PACKS)
        self._keep_pack = client.register_script(KEEP_PACK)

    async def store(
        self,
        lines: Iterable[TimelineRow],
        documents: Iterable[Document],
        changed: Iterable[str] = (),
    ) -> None:
        """Store what changed in one round trip, in one call of each script.

        Args:
            lines: appended in their order; lines already stored are skipped.
            documents: kept under their keys.
            changed: the stories whose context packs are dropped, as by `drop_packs`.
        """
        async with self.client.pipeline(transaction=False) as pipe:
            await self._append(lines, pipe)
            for document in documents:
                text = json.dumps({"order": document.order} | document.content, ensure_ascii=False)
                await self._newest([document.key], [document.order, text], client=pipe)
            await self._drop(changed, pipe)
            await pipe.execute()

    async def drop_packs(self, stories: Iterable[str]) -> None:
        """Drop the stories' context packs, and those that are still being built from old data."""
        await self._drop(stories, self.client)

    async def _append(self, lines: Iterable[TimelineRow], client: Redis) -> None:
        by_story: dict[str, list[TimelineRow]] = {}
        for line in lines:
            by_story.setdefault(line.story_id, []).append(line)
        keys: list[str] = []
        values: list[str | int] = []
        for story_id, mine in by_story.items():
            keys += timeline_key(story_id), _late_key(story_id)
            values.append(len(mine))
            for line in mine:
                values += line.stream_id, *line.values
        if keys:
            await self._timeline(keys, values, client=client)

    async def _drop(self, stories: Iterable[str], client: Redis) -> None:
        keys: list[str] = []
        for story_id in sorted(set(stories)):
            keys += _generation_key(story_id), _packs_key(story_id)
        if keys:
            await self._drop_packs(keys, client=client)

    async def forget(self, story_id: str) -> None:
        """Remove what is kept of a story, context packs included."""
        await self.drop_packs([story_id])
        names = (spec_key(story_id), draft_key(story_id), timeline_key(story_id))
        others = (_late_key(story_id), summary_key(story_id), _generation_key(story_id))
        await self.client.delete(*names, *others)

    async def find_pack(self, story_id: str, key: str, config: str) -> KeptPack:
        """Return the pack, if one with this config is stored, and what a new one depends on."""
        keys = key, _generation_key(story_id), summary_key(story_id)
        text, generation, given = await self.client.mget(keys)
        summary = _text(given)
        kept = KeptPack(None, str(int(generation or 0)), content_hash([config, summary]), summary)
        if text is None or json.loads(text).get("config") != kept.config:
            return kept
        return kept._replace(pack=ContextPack.model_validate_json(text))

    async def keep_pack(
        self, story_id: str, key: str, built_from: KeptPack, pack: ContextPack
    ) -> bool:
        """Keep a pack and return True, unless the story has changed since `find_pack`."""
        text = json.dumps(pack.model_dump() | {"config": built_from.config}, ensure_ascii=False)
        keys = [_generation_key(story_id), _packs_key(story_id), key]
        return bool(await self._keep_pack(keys, [built_from.generation, text, self._pack_ttl_s]))

    async def keep_blocks(self, story_id: str, pack: ContextPack) -> str:
        """Keep a pack for the calls of a deliberation, under its content; return the key."""
        text = pack.model_dump_json()
        digest = hashlib.sha256(text.encode()).hexdigest()
        key = f"swe:pack:{encode_id(story_id)}:{digest}"
        await self.client.set(key, self._cipher.encrypt(text), ex=BLOCKS_TTL)
        return key

    async def find_summary(self, story_id: str) -> str:
        """Return the story's last summary; empty if there is none, or it is not a text."""
        (found,) = await self.client.mget(summary_key(story_id))
        return _text(found)

    async def keep(self, key: str, text: str, seconds: int) -> None:
        """Keep a text under `key` for `seconds`."""
        await self.client.set(key, text, ex=seconds)


def _text(value: Any) -> str:
    """Decode what MGET returns for a key: bytes, or None, also for a value that is not a text."""
    return (value or b"").decode(errors="replace").strip()


def _late_key(story_id: str) -> str:
    return f"swe:case:{encode_id(story_id)}:planning:late"


def _packs_key(story_id: str) -> str:
    return f"context:{encode_id(story_id)}:packs"


def _generation_key(story_id: str) -> str:
    return f"context:{encode_id(story_id)}:generation"
