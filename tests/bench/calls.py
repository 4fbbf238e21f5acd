"""The calls of a council, recorded on their way to the endpoint and repeated without the fleet."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from aiohttp import ClientSession, ClientTimeout, web
from openai import AsyncOpenAI

from deploy.local.server import LOOPBACK
from tests.bench.replay import Body, repeat
from tests.support.llm_server import act_of

WAVES = ("propose", "criticise", "revise")
"""Acts of the nine calls of a council of three, without a judge's call after the checks."""


class Recorder:
    """A proxy for an OpenAI-compatible endpoint that keeps the body of each chat call."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.bodies: list[Body] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        self._http = ClientSession(timeout=ClientTimeout(total=None))
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app, handler_cancellation=True)  # the engine sees a disconnect
        await self._runner.setup()
        await web.TCPSite(self._runner, LOOPBACK, 0).start()
        self.url = f"http://{LOOPBACK}:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._runner.cleanup()
        await self._http.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        if request.path.endswith("/chat/completions"):
            self.bodies.append(json.loads(data))
        headers = {"Content-Type": request.headers.get("Content-Type", "application/json")}
        if key := request.headers.get("Authorization"):
            headers["Authorization"] = key
        async with self._http.request(
            request.method,
            self.endpoint + request.path.removeprefix("/v1"),
            data=data,
            headers=headers,
        ) as answer:
            response = web.StreamResponse(
                status=answer.status, headers={"Content-Type": answer.content_type}
            )
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    def take(self) -> list[list[Body]]:
        """Return the bodies recorded since the last `take`, by wave."""
        bodies, self.bodies = self.bodies, []
        return waves_of(bodies)


def waves_of(bodies: Sequence[Body]) -> list[list[Body]]:
    """Return the bodies of a council's calls by wave, without a judge's."""
    return [wave for act in WAVES if (wave := [body for body in bodies if act_in(body) == act])]


def act_in(body: Body) -> str:
    """Return the act of a request, whether its answer is text or a document."""
    form = body.get("response_format", {}).get("json_schema", {})
    return str(form.get("name") or act_of(body["messages"]))


@dataclass(frozen=True)
class Answered:
    """The duration and tokens of some calls; the endpoint counts the tokens."""

    seconds: float
    tokens_in: int
    tokens_out: int
    cached_tokens: int


async def ask(url: str, waves: Sequence[Sequence[Body]]) -> Answered:
    """Make the calls in plain asyncio: all calls of a wave at once, wave after wave."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        began = time.perf_counter()
        replies = [
            reply
            for wave in waves
            for reply in await asyncio.gather(*(repeat(client, body) for body in wave))
        ]
        seconds = time.perf_counter() - began
    used = [reply.usage for reply in replies]
    details = [usage.prompt_tokens_details for usage in used]
    return Answered(
        seconds,
        sum(usage.prompt_tokens for usage in used),
        sum(usage.completion_tokens for usage in used),
        sum((each.cached_tokens or 0) if each else 0 for each in details),
    )


def apart(wave: Sequence[Body], names: Sequence[str]) -> list[Body]:
    """Return the wave's calls, each starting with its name; different names share no prefill."""
    unlike = copy.deepcopy(list(wave))
    for body, name in zip(unlike, names, strict=True):
        body["messages"][0]["content"] = name + body["messages"][0]["content"][len(name) :]
    return unlike
