"""An OpenAI-compatible endpoint for mini-swe-agent: it answers with the commands of a script."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from deploy.local.server import LOOPBACK

SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


class PeerEndpoint:
    """Answers each call with the next command as a tool call, and then with SUBMIT."""

    def __init__(self, commands: Sequence[str]) -> None:
        self.commands = [*commands, SUBMIT]
        self.url = ""
        self.seconds = 0.0
        """What it took to answer, for all calls."""

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes([web.post("/v1/chat/completions", self._chat)])
        self._runner = web.AppRunner(app)
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

    async def _chat(self, request: web.Request) -> web.Response:
        began = time.perf_counter()
        messages: list[dict[str, Any]] = (await request.json())["messages"]
        taken = sum(message["role"] == "tool" for message in messages)
        arguments = json.dumps({"command": self.commands[taken]})
        call = {
            "id": f"call-{taken}",
            "type": "function",
            "function": {"name": "bash", "arguments": arguments},
        }
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {
            "id": "chat-1",
            "object": "chat.completion",
            "created": 0,
            "model": "test-model",
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
            "usage": usage,
        }
        self.seconds += time.perf_counter() - began
        return web.json_response(answer)
