"""An OpenAI-compatible HTTP server for tests: real HTTP and SSE, deterministic answers.

It serves `/v1/models` and `/v1/chat/completions` as vLLM does: it writes a document that is valid
for the given `json_schema`, or else the Markdown that the prompt asks for, and always the same one
for the same model, messages and seed. An answer is streamed if the call asks for it; faults in
mid-stream are for streams only. It can be made to misbehave for the next calls, and records each
call and whether the client aborted it. As a separate process:
`python -m tests.support.llm_server --port 8000`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Literal, Self

from aiohttp import web
from pydantic import BaseModel, Field

WORDS = """
outbox ledger queue story plan gate council review schema index retry stream cache token worker
signal update event graph proposal decision boundary contract invariant test build keeps stores
checks sends reads joins splits bounds names guards orders the a each every one small clear plain
safe durable ordered idempotent atomic bounded before after because without within when while until
"""
CODE = "```python\ndef add(left: int, right: int) -> int:\n    return left + right\n```"
_WORDS = WORDS.split()
BYTES_PER_TOKEN = 4
"""Bytes of text in one token of this engine's tokenizer."""


class Fault(BaseModel):
    """A fault that the next `times` chat calls have.

    empty: an answer without text. half: one that ends in the middle, as if finished. long: an
    answer cut off at max_tokens. wrong: JSON that does not match the schema. loops: a text that
    repeats itself without end. bare: a text without decisions, severities or verdict. copy: the
    prompt's own words. text: `text`. status: an HTTP error with
    `retry_after`. html: an HTML page with status 200. hang: no byte of an answer. stall:
    silence in mid-stream. drop: the connection breaks in mid-stream. ends: the stream ends
    gracefully, but too early. error: an error event in mid-stream. slow: `ms` before each token.
    """

    # fmt: off
    kind: Literal[
        "empty", "half", "long", "wrong", "status", "html", "hang", "stall", "drop", "ends",
        "error", "slow", "loops", "drones", "bare", "copy", "text",
    ]
    # fmt: on
    times: int = 1
    status: int = 500
    text: str = ""
    """The answer of `text`. The body for `status`, as plain text; if empty, an OpenAI error."""
    retry_after: str = ""
    ms: float = 20


class Call(BaseModel):
    """A chat call that the server received.

    `end` is how it ended, or `open`. `body`: the whole request.
    """

    act: str
    model: str
    seed: int
    messages: list[dict[str, str]]
    temperature: float
    max_tokens: int
    tokens: int = 0
    end: Literal["open", "answered", "aborted", "refused"] = "open"
    body: dict[str, Any] = Field({}, exclude=True)

    @property
    def prompt(self) -> str:
        return "\n".join(message["content"] for message in self.messages)


class LlmServer:
    """A deterministic LLM server on the loopback interface; `url` ends in `/v1`."""

    def __init__(
        self,
        *,
        models: Iterable[str] = ("test-model",),
        window: int = 8_192,
        delay_ms: float = 0,
        token_ms: float = 0,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> None:
        self.models = tuple(models)
        self.window = window
        self.delay_ms = delay_ms
        self.token_ms = token_ms
        self.bytes_per_token = bytes_per_token
        self.calls: list[Call] = []
        self.faults: deque[Fault] = deque()
        self.documents: dict[str, Callable[[Call], Any]] = {}
        """Act -> what is answered to its calls, instead of a document made from the schema."""
        self.answering = asyncio.Event()
        """While it is cleared, calls wait for their answers."""
        self.answering.set()
        self.url = ""
        self._prompts: deque[str] = deque(maxlen=50)
        self._runner: web.AppRunner | None = None

    @property
    def model(self) -> str:
        return self.models[0]

    def fail(self, kind: str, times: int = 1, **details: Any) -> None:
        """Misbehave for the next `times` calls, after the faults that are already queued."""
        fault = Fault.model_validate({"kind": kind, "times": times, **details})
        self.faults.extend([fault] * fault.times)

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.get("/calls", self._calls),
                web.post("/faults", self._faults),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    # --- the endpoints ----------------------------------------------------------------------------

    async def _health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, _: web.Request) -> web.Response:
        cards = [
            {"id": name, "object": "model", "owned_by": "tests", "max_model_len": self.window}
            for name in self.models
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _calls(self, _: web.Request) -> web.Response:
        return web.json_response([call.model_dump() for call in self.calls])

    async def _faults(self, request: web.Request) -> web.Response:
        fault = Fault.model_validate(await request.json())
        self.faults.extend([fault] * fault.times)
        return web.Response(status=204)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        form = body.get("response_format", {}).get("json_schema", {})
        call = Call(
            act=form.get("name") or act_of(body["messages"]),
            body=body,
            **{key: body[key] for key in Call.model_fields if key in body},
        )
        self.calls.append(call)
        try:
            response = await self._reply(request, call, form.get("schema"))
        except (asyncio.CancelledError, ConnectionError):
            call.end = "aborted"
            raise
        if call.end == "open":
            call.end = "answered"
        return response

    async def _reply(
        self, request: web.Request, call: Call, schema: dict[str, Any] | None
    ) -> web.StreamResponse:
        fault = self.faults.popleft() if self.faults else None
        kind = fault.kind if fault else ""
        if kind == "hang":
            await asyncio.Event().wait()
        if fault and kind == "status":
            call.end = "refused"
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            if fault.text:
                return web.Response(text=fault.text, status=fault.status, headers=headers)
            return _refusal(fault.status, "the engine is set to fail", headers)
        if kind == "html":
            call.end = "refused"
            return web.Response(text="<html>Please log in</html>", content_type="text/html")
        if call.model not in self.models:
            call.end = "refused"
            return _refusal(404, f"The model `{call.model}` does not exist.")
        prompt_tokens = int(len(call.prompt.encode()) / self.bytes_per_token)
        if prompt_tokens + call.max_tokens > self.window:
            call.end = "refused"
            return _refusal(
                400,
                f"This model's maximum context length is {self.window} tokens. However, you "
                f"requested {call.max_tokens} output tokens and your prompt contains "
                f"{prompt_tokens} input tokens.",
            )

        await asyncio.sleep(self.delay_ms / 1000)
        await self.answering.wait()
        document = self.documents.get(call.act)
        if fault and kind == "text":
            text = fault.text
        else:
            text = json.dumps(document(call)) if document else _written(call, schema, kind)
        tokens = [] if kind == "empty" else list(_tokens(text))
        finish = "stop" if len(tokens) <= call.max_tokens else "length"
        tokens = tokens[: call.max_tokens]
        if kind in ("half", "stall", "drop", "ends", "error"):
            tokens = tokens[: len(tokens) // 2]
        if not call.body.get("stream"):
            call.tokens = len(tokens)
            usage = self._usage(call, prompt_tokens)
            return web.json_response(_completion(call, "".join(tokens), finish, usage))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        token_ms = fault.ms if fault and kind == "slow" else self.token_ms
        await self._stream(response, call, tokens, token_ms)
        match kind:
            case "stall":
                await asyncio.Event().wait()
            case "drop":
                call.end = "refused"
                assert request.transport
                request.transport.abort()
                return response
            case "ends":
                call.end = "refused"
                return response
            case "error":
                call.end = "refused"
                error = {"message": "the engine died", "type": "InternalServerError", "code": 500}
                await response.write(_event({"error": error}))
                return response
        usage = self._usage(call, prompt_tokens)
        await response.write(_event(_chunk(call, {}, finish)))
        await response.write(_event({**_chunk(call, {}, None), "choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _usage(self, call: Call, prompt_tokens: int) -> dict[str, Any]:
        cached = max((_shared_prefix(old, call.prompt) for old in self._prompts), default=0)
        self._prompts.append(call.prompt)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": call.tokens,
            "total_tokens": prompt_tokens + call.tokens,
            "prompt_tokens_details": {"cached_tokens": cached // BYTES_PER_TOKEN},
        }

    async def _stream(
        self, response: web.StreamResponse, call: Call, tokens: list[str], token_ms: float
    ) -> None:
        size = 1 if token_ms else 64
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            events = (_event(_chunk(call, {"content": token}, None)) for token in part)
            await response.write(b"".join(events))
            call.tokens += len(part)
            if token_ms:
                await asyncio.sleep(token_ms / 1000)


def _shared_prefix(left: str, right: str) -> int:
    """Count the leading characters that both share, by bisection, because prompts are long."""
    same, longest = 0, min(len(left), len(right))
    while same < longest:
        middle = (same + longest + 1) // 2
        if left[:middle] == right[:middle]:
            same = middle
        else:
            longest = middle - 1
    return same


def _chunk(call: Call, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{call.seed}",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": call.model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
    }


def _completion(call: Call, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{call.seed}",
        "object": "chat.completion",
        "created": 0,
        "model": call.model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    error = {"message": message, "type": "Error", "param": None, "code": status}
    return web.json_response({"error": error}, status=status, headers=headers)


def _tokens(text: str) -> Iterator[str]:
    return (text[start : start + BYTES_PER_TOKEN] for start in range(0, len(text), BYTES_PER_TOKEN))


# --- documents ------------------------------------------------------------------------------------


TEXT_ACTS = {
    "revise": "You proposed:",
    "criticise": "A colleague proposes:",
    "propose": "Write the whole solution",
}
"""Act -> words of its prompt, for the acts whose answers are text."""


def act_of(messages: list[dict[str, str]]) -> str:
    """Return the act of a prompt that asks for text; `text` if it is not one of the fleet's."""
    asked = first_prompt(messages)
    return next((act for act, words in TEXT_ACTS.items() if words in asked), "text")


def first_prompt(messages: list[dict[str, str]]) -> str:
    """Return the prompt before any answer; its end is the task."""
    return "\n\n".join(message["content"] for message in messages[:2])


def _written(call: Call, schema: dict[str, Any] | None, kind: str) -> str:
    if kind == "wrong":
        return '{"answer": 42}'
    if kind == "drones":  # a loop without the end of any sentence
        return "and on it goes " * 4_000
    if kind == "copy":
        return call.messages[-1]["content"]
    seed = hashlib.sha256(f"{call.model}/{call.prompt}/{call.seed}".encode()).digest()
    choose = random.Random(seed)
    if schema is None:
        document = markdown_of(call.act, first_prompt(call.messages), choose, bare=kind == "bare")
    else:
        document = json.dumps(document_of(schema, choose))
    if kind == "loops":
        return document + " It goes on and on and on." * 4_000
    if kind == "long":  # cut off in the middle of the document
        return " " * (call.max_tokens * BYTES_PER_TOKEN - len(document) // 2) + document
    return document


def markdown_of(act: str, asked: str, choose: random.Random, *, bare: bool = False) -> str:
    """Return the text of an act; `choose` makes every free choice.

    Args:
        act: one of TEXT_ACTS.
        asked: the prompt, which ends with the task.
        choose: the source of choices.
        bare: leave out decisions, severities and verdict.
    """
    if act == "criticise":
        verdict = choose.choice(["accept", "revise", "reject"])
        severities = ["low", "medium"] if verdict == "accept" else ["low", "medium", "high"]
        points = [
            ("" if bare else f"{choose.choice(severities)}: ") + _sentence(choose)
            for _ in range(choose.randint(1, 3))
        ]
        parts = ["\n".join(f"- {point}" for point in points), f"Suggestion: {_sentence(choose)}"]
        return "\n\n".join(parts if bare else [*parts, f"Verdict: {verdict}"])
    words = asked.rpartition("\n\n")[2].split()[:30] + _required(asked).split()[:30]
    parts = [f"{_sentence(choose)} This is for: {' '.join(words)}.", _sentence(choose), CODE]
    decisions = [
        f"- **{_sentence(choose)[:40].rstrip(' .')}**: {_sentence(choose)} (affects {word})"
        for word in choose.sample(_WORDS, choose.randint(1, 3))
    ]
    return "\n\n".join(parts if bare else [*parts, "## Decisions", "\n".join(decisions)])


def _required(asked: str) -> str:
    """Return the requirements of a prompt, which have no paragraphs."""
    _, found, after = asked.partition("# Requirements\n<data>\n")
    return after.partition("</data>")[0] if found else ""


def _sentence(choose: random.Random) -> str:
    words = choose.sample(_WORDS, choose.randint(6, 16))
    return f"{' '.join(words).capitalize()}."


def document_of(schema: dict[str, Any], choose: random.Random) -> Any:
    """Return a document that is valid for the schema; `choose` makes every free choice."""
    return _value(schema, schema, choose, "")


def _value(schema: dict[str, Any], root: dict[str, Any], choose: random.Random, name: str) -> Any:
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return _value(target, root, choose, name)
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return _value(choose.choice(schema[choice]), root, choose, name)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return choose.choice(schema["enum"])
    match schema["type"]:
        case "object":
            return {
                key: _value(part, root, choose, key) for key, part in schema["properties"].items()
            }
        case "array":
            return _items(schema, root, choose, name)
        case "string":
            return _text(schema.get("minLength", 0), schema.get("maxLength", 200), choose, name)
        case "integer":
            return choose.randint(schema.get("minimum", 1), schema.get("maximum", 5))
        case "number":
            return round(choose.uniform(schema.get("minimum", 0), schema.get("maximum", 1)), 2)
        case "boolean":
            return choose.random() < 0.5
        case "null":
            return None
        case other:
            raise ValueError(f"no document for a schema of type {other}")


def _items(
    schema: dict[str, Any], root: dict[str, Any], choose: random.Random, name: str
) -> list[Any]:
    first = schema.get("prefixItems", [])
    rest = schema.get("items")
    fewest = schema.get("minItems", 0)
    most = schema.get("maxItems", max(fewest, len(first)) + (3 if rest else 0))
    length = choose.randint(fewest, max(fewest, min(most, max(fewest, 1) + 2)))
    values: list[Any] = []
    for place in range(length):
        part = first[place] if place < len(first) else rest
        if not isinstance(part, dict):
            break
        value = _value(part, root, choose, name)
        if schema.get("uniqueItems") and value in values:
            continue
        values.append(value)
    return values


def _text(shortest: int, longest: int, choose: random.Random, name: str) -> str:
    """Return words, followed by some code if a `content` field has room for it."""
    wanted = min(longest, max(shortest, choose.randint(20, 240)))
    text = choose.choice(_WORDS).capitalize()
    while len(text) < wanted:
        text += " " + choose.choice(_WORDS)
    text = text[:wanted].rstrip().ljust(shortest, ".")
    if name == "content" and len(text) + len(CODE) + 2 <= longest:
        text += f"\n\n{CODE}"
    return text


# --- behaviour of other servers -------------------------------------------------------------------


Step = bytes | float | Literal["hang", "reset"]
"""Bytes to send, seconds to wait, silence until the client disconnects, or a connection reset."""

Script = Callable[[dict[str, Any]], Iterable[Step]]
"""A function from the body of a chat request to the steps of its raw HTTP response."""


class ScriptedLlm:
    """A TCP server that answers byte by byte from scripts, one path `/{name}/v1` for each name.

    A name's scripts answer its calls in order; the last one answers all further calls.
    """

    def __init__(self) -> None:
        self.scripts: dict[str, list[Script]] = {}
        self.models: dict[str, str] = {}
        """Name -> the model that its `/models` lists; `test-model` by default."""
        self.listings: dict[str, Any] = {}
        """Name -> the answer of its `/models`, instead of a list with its model."""
        self.requests: dict[str, list[dict[str, Any]]] = {}
        self.left: set[str] = set()
        """Names whose client disconnected before its answer had ended."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", limit=2**24)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._port}/{name}/v1"

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
            body = await reader.readexactly(int(length[1])) if length else b""
            name, _, path = head.split()[1].removeprefix("/").partition("/v1")
            if path == "/models":
                card = {"id": self.models.get(name, "test-model"), "max_model_len": 8_192}
                listing = self.listings.get(name, {"data": [card]})
                writer.write(raw_response(json.dumps(listing).encode()))
            else:
                await self._play(name, json.loads(body or b"{}"), reader, writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left.add(name)
        finally:
            writer.close()

    async def _play(
        self,
        name: str,
        request: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        requests = self.requests.setdefault(name, [])
        requests.append(request)
        scripts = self.scripts[name]
        for step in scripts[min(len(requests), len(scripts)) - 1](request):
            match step:
                case bytes():
                    writer.write(step)
                    await writer.drain()
                case "hang":
                    await reader.read()
                    self.left.add(name)
                case "reset":
                    await asyncio.sleep(0.05)  # else it overtakes the bytes sent before
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, linger
                    )
                    writer.transport.abort()
                    return
                case float():
                    await asyncio.sleep(step)


def raw_response(
    body: bytes | None,
    status: str = "200 OK",
    content_type: str = "application/json",
    **headers: str,
) -> bytes:
    """Return an HTTP response, or only its head if body is None.

    What follows the head is then its body, until the connection closes.
    """
    fields = {"Content-Type": content_type, "Connection": "close"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        fields["Content-Length"] = str(len(body))
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


async def _serve(port: int, server: LlmServer) -> None:
    await server.start(port)
    print(server.url, flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", action="append", help="a model's name; may be given again")
    parser.add_argument("--window", type=int, default=8_192, help="tokens")
    parser.add_argument("--delay-ms", type=float, default=0, help="before the first token")
    parser.add_argument("--token-ms", type=float, default=0, help="after every token")
    given = parser.parse_args()
    server = LlmServer(
        models=given.model or ["test-model"],
        window=given.window,
        delay_ms=given.delay_ms,
        token_ms=given.token_ms,
    )
    asyncio.run(_serve(given.port, server))


if __name__ == "__main__":
    main()
