"""The calls of a recorded council, made again; needs only openai, so that peers can use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI, AsyncStream
from openai.types import CompletionUsage

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The text of an answer and the endpoint's count of its tokens."""

    text: str
    usage: CompletionUsage


async def repeat(client: AsyncOpenAI, body: Any) -> Reply:
    """Make the call; its events are read as the fleet reads them, at the same cost."""
    events: AsyncStream[Any] = await client.post(
        "/chat/completions",
        body=body,
        cast_to=object,
        stream=True,
        stream_cls=AsyncStream[object],
    )
    parts: list[str] = []
    usage: Any = None
    async for event in events:
        parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
        usage = event.get("usage") or usage
    return Reply("".join(parts), CompletionUsage.model_validate(usage))


def reworded(waves: Sequence[Sequence[Body]], old: str, new: str) -> list[list[Body]]:
    """Return the same calls about another topic of the same length, which no cache holds."""
    assert len(old) == len(new)
    text = json.dumps(list(map(list, waves)))
    assert old in text
    renamed: list[list[Body]] = json.loads(text.replace(old, new))
    return renamed
