"""The client of an OpenAI-compatible endpoint: one streamed answer, and the models it serves.

A complete answer is accepted, however its stream ends; anything else is raised as a `CallFailed`
from the table in `activities.agents.llm_errors`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from opentelemetry.semconv._incubating.attributes.gen_ai_attributes import (
    GEN_AI_RESPONSE_FINISH_REASONS,
    GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS,
    GEN_AI_USAGE_INPUT_TOKENS,
    GEN_AI_USAGE_OUTPUT_TOKENS,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from activities.agents.llm_errors import (
    LONGEST_MESSAGE,
    CallFailed,
    place_of,
    problem_in,
    problem_of,
    stated_failure,
    status_failure,
    transport_failure,
)
from activities.agents.metrics import count_request, count_tokens
from activities.agents.sse import DocumentParser, Event, EventParser, LineTooLong
from activities.agents.tracing import chat_span
from workflows.models.errors import ErrorType

Message = dict[str, str]
"""A chat message: `role` and `content`."""

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 60.0
"""How long an engine may be silent before its first chunk or between two chunks."""

QUIET_SECONDS = 2.0
"""How long to wait for more (mostly the usage) after the last text of a complete answer."""
AFTER_DONE_SECONDS = 0.1
"""How long to wait for the end of the body after [DONE], so that the connection can be reused."""
TICK_SECONDS = 0.25

LOOP = "loop"
"""The finish_reason of an answer that was stopped because it repeated itself."""
LOOP_SEARCH_CHARACTERS = 200
"""An answer is searched for a loop each time it has grown by so many characters."""

ERROR_BODY_SECONDS = 5.0
LONGEST_ERROR_BODY = 64 * 1024

BYTES_PER_TOKEN = 3.0
"""Minimum UTF-8 bytes per token: 3 holds for prose and code in Latin script. An engine that counts
more tokens refuses the prompt, which is then cut further."""

LARGEST_FIGURE = 10**9
"""Tokens; a larger count cannot be the usage of one call."""

DEFAULT_WINDOW = 8_192
"""Tokens; used if an endpoint does not state a model's window."""

_WINDOW_FIELDS = (
    ("max_model_len",),  # vLLM, SGLang
    ("metadata", "max_request_context_length"),  # Ray Serve
    ("context_length",),
    ("context_window",),
    ("meta", "n_ctx"),  # llama.cpp
)


def connect(
    base_url: str,
    api_key: str,
    idle_seconds: float = IDLE_SECONDS,
    ca_file: Path | None = None,
) -> httpx.AsyncClient:
    """Create a client that never retries, because Temporal does.

    Args:
        base_url: the address up to and including `/v1`.
        api_key: the endpoint's key.
        idle_seconds: how long the endpoint may be silent.
        ca_file: the CA certificate that the endpoint's is checked against; None: the system's.
    """
    return httpx.AsyncClient(
        base_url=base_url,
        verify=ssl.create_default_context(cafile=ca_file) if ca_file else True,
        headers={"Authorization": f"Bearer {api_key}"},
        timeout=httpx.Timeout(idle_seconds, connect=min(CONNECT_SECONDS, idle_seconds)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
    )


@dataclass(frozen=True)
class Reply:
    """One answer as received, possibly incomplete.

    `finish_reason` is the engine's, or empty. `estimated`: a figure that the engine did not state
    is computed from the text.
    """

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int
    cached_tokens: int = 0
    estimated: bool = False


class AnswerBroken(CallFailed):
    """A call that failed after part of its answer was received: `reply` has been paid for."""

    def __init__(self, failed: CallFailed, reply: Reply) -> None:
        super().__init__(
            failed.message,
            type=failed.type or ErrorType.LLM_UNREACHABLE,
            status=failed.status,
            is_unknown_model=failed.is_unknown_model,
            next_retry_delay=failed.next_retry_delay,
        )
        self.reply = reply


async def stream_reply(
    client: httpx.AsyncClient,
    *,
    model: str,
    messages: Sequence[Message],
    act: str,
    schema: dict[str, Any] | None,
    temperature: float,
    max_tokens: int,
    seed: int,
    sampling: Mapping[str, Any],
    on_text: Callable[[str], None],
    is_whole: Callable[[str], bool],
    loops: Callable[[str], bool],
) -> Reply:
    """Ask the model once, and read its answer as a stream.

    The answer is accepted when a finish_reason or `[DONE]` was received, or when `is_whole(text)`
    and the stream ends, breaks or goes silent. A cancellation closes the connection, which makes
    the engine stop generating; so does a text that loops, which gets the finish_reason `loop`.

    Args:
        client: bound to the endpoint's base URL, with its key.
        model: the name in the endpoint's list of models.
        messages: the prompt.
        act: the name that is sent with `schema`, and under which the request is counted.
        schema: the JSON schema of the answer; None: the answer is text.
        temperature: 0 for the likeliest answer.
        max_tokens: the maximum number of tokens of the answer.
        seed: makes the answer repeatable on engines that support it.
        sampling: further fields of the request.
        on_text: called with the text of every chunk that has text.
        is_whole: returns whether a text is a complete answer.
        loops: returns whether a text has begun to repeat itself.

    Raises:
        CallFailed: see `activities.agents.llm_errors`; AnswerBroken if part of the answer was
            received.
    """
    request = client.build_request(
        "POST",
        "/chat/completions",
        headers={"Accept": "text/event-stream, application/json"},
        json={
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": seed,
            **sampling,
            **(_decoded_by(act, schema) if schema else {}),
        },
    )
    answer = _Answer(place_of(client.base_url), messages, on_text, is_whole, loops)
    failed: CallFailed | None = None
    began = time.monotonic()
    with chat_span(client.base_url, model, temperature, max_tokens, seed) as span:
        TraceContextTextMapPropagator().inject(request.headers)
        try:
            async with _sent(client, request) as response:
                await _read(response, answer)
        except (httpx.HTTPError, httpx.StreamError) as error:
            failed = transport_failure(answer.place, error)
        except LineTooLong as error:
            failed = CallFailed(
                f"{answer.place} sent no chunks: {error}", type=ErrorType.LLM_PROTOCOL
            )
        except CallFailed as error:
            failed = error
        span.set_attributes(answer.telemetry())
        outcome, paid = "answered", None
        try:
            paid = answer.reply_or_raise(failed)
            return paid
        except CallFailed as error:
            outcome = error.type or ""
            paid = error.reply if isinstance(error, AnswerBroken) else None
            raise
        finally:
            count_request(model, act, outcome, time.monotonic() - began)
            if paid:
                count_tokens(model, act, paid.tokens_in, paid.tokens_out, paid.cached_tokens)


def _decoded_by(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """Return the field of a request whose answer obeys a schema."""
    form = {"name": name, "strict": True, "schema": schema}
    return {"response_format": {"type": "json_schema", "json_schema": form}}


async def _read(response: httpx.Response, answer: _Answer) -> None:
    """Pass the events to the answer, until the body ends or nothing more is worth waiting for."""
    if not response.is_success:
        raise status_failure(answer.place, response, await _error_body(response))
    parser: EventParser | DocumentParser | None = None
    try:
        async with aclosing(_ticking(response)) as chunks:
            async for chunk in chunks:
                if chunk and (parser or chunk.strip()):
                    parser = parser or _parser_for(chunk, response, answer.place)
                    answer.take(parser.feed(chunk))
                if answer.is_over():
                    return
    finally:
        if parser:
            answer.take(parser.close())


def _parser_for(chunk: bytes, response: httpx.Response, place: str) -> EventParser | DocumentParser:
    """Choose a parser by the first bytes of the body, because the content type is not reliable."""
    match chunk.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]:
        case b"{" | b"[":
            return DocumentParser()
        case b"<":
            content_type = response.headers.get("content-type", "a page")
            raise CallFailed(
                f"{place} answered a stream's request with {content_type}",
                type=ErrorType.LLM_PROTOCOL,
            )
    return EventParser()


async def _ticking(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield the body's chunks, and an empty one after each TICK_SECONDS without a chunk."""
    body = response.aiter_bytes()
    reading: asyncio.Future[bytes] | None = None
    try:
        while True:
            reading = reading or asyncio.ensure_future(anext(body))
            await asyncio.wait({reading}, timeout=TICK_SECONDS)
            if not reading.done():
                yield b""
                continue
            try:
                chunk = reading.result()
            except StopAsyncIteration:
                return
            reading = None
            yield chunk
    finally:
        if reading:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


@dataclass
class _Answer:
    """The part of an answer that was received so far."""

    place: str
    messages: Sequence[Message]
    on_text: Callable[[str], None]
    is_whole: Callable[[str], bool]
    loops: Callable[[str], bool]
    parts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    message: str = ""
    """The text of a complete message, as sent by endpoints that do not stream."""
    finish_reason: str = ""
    is_done: bool = False
    figures: dict[str, int] = field(default_factory=dict)
    error: CallFailed | None = None
    unread: str = ""
    """The first event that is not a chunk."""
    last_word: float = field(default_factory=time.monotonic)
    judged: int = -1
    looked_at: int = 0
    """Characters when the text was last searched for a loop."""

    # --- events -----------------------------------------------------------------------------------

    def take(self, events: Iterator[Event]) -> None:
        for event in events:
            if event.name == "error":
                self._fail(stated_failure(self.place, problem_of(event.data)))
                continue
            for value in self._values(event.data):
                self._take_value(value)

    def _values(self, data: str) -> Iterator[Any]:
        """Yield the JSON values of an event: one, or one per line if no blank lines are sent."""
        text = data.strip()
        if text == "[DONE]":
            self.is_done = True
            self.last_word = time.monotonic()
            return
        try:
            yield json.loads(text)
        except (ValueError, RecursionError):
            if "\n" not in text:
                self.unread = self.unread or text[:100]
                return
            for line in text.split("\n"):
                yield from self._values(line.removeprefix("data:"))

    def _take_value(self, value: Any) -> None:
        if problem := problem_in(value):
            self._fail(stated_failure(self.place, problem))
            return
        chunk = _object(value)
        if value is not None and "choices" not in chunk and "usage" not in chunk:
            self.unread = self.unread or json.dumps(value)[:100]
        self._count(_object(chunk.get("usage")))
        choices = chunk.get("choices")
        for choice in choices if isinstance(choices, list) else [choices]:
            self._take_choice(_object(choice))

    def _take_choice(self, choice: dict[str, Any]) -> None:
        if choice.get("index") not in (None, 0):
            return
        delta, message = _object(choice.get("delta")), _object(choice.get("message"))
        text = _text(delta.get("content"))
        thought = _text(delta.get("reasoning_content") or delta.get("reasoning"))
        if text or thought:
            self.parts.append(text)
            self.thoughts.append(thought)
            self.on_text(text + thought)
        if whole := _text(message.get("content") or choice.get("text")):
            self.message = whole
            self.on_text(whole)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason not in ("", "null"):
            self.finish_reason = reason
        if text or thought or whole or reason:
            self.last_word = time.monotonic()

    def _count(self, usage: dict[str, Any]) -> None:
        """Keep the largest of several figures, because endpoints may increase or repeat them."""
        details = _object(usage.get("prompt_tokens_details"))
        for name, value in (
            ("in", usage.get("prompt_tokens", usage.get("input_tokens"))),
            ("out", usage.get("completion_tokens", usage.get("output_tokens"))),
            ("cached", details.get("cached_tokens")),
        ):
            self.figures[name] = max(self.figures.get(name, 0), figure(value))

    def _fail(self, error: CallFailed) -> None:
        self.error = self.error or error

    def telemetry(self) -> dict[str, Any]:
        """Return the attributes of the call's span that the engine stated."""
        stated = {
            GEN_AI_USAGE_INPUT_TOKENS: self.figures.get("in"),
            GEN_AI_USAGE_OUTPUT_TOKENS: self.figures.get("out"),
            GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: self.figures.get("cached"),
            GEN_AI_RESPONSE_FINISH_REASONS: [self.finish_reason] if self.finish_reason else None,
        }
        return {name: value for name, value in stated.items() if value is not None}

    # --- the end ----------------------------------------------------------------------------------

    @property
    def text(self) -> str:
        """The text; if there is none, that of a message or of thoughts that are an answer."""
        text = _joined(self.parts)
        if not text.strip():
            text = _joined([self.message])
        if not text.strip() and self.thoughts and self.finish_reason != "length":
            thought = _joined(self.thoughts)
            text = thought if self.is_whole(thought) else text
        return text

    def is_over(self) -> bool:
        """Return whether nothing more is worth waiting for."""
        if self.error:
            return True
        if self._has_begun_to_loop():
            self.finish_reason = LOOP
            return True
        silent = time.monotonic() - self.last_word
        if self.is_done:
            return silent >= AFTER_DONE_SECONDS
        if silent < QUIET_SECONDS:
            return False
        if self.finish_reason:
            return True
        size = len(self.parts) + bool(self.message)
        if not size or self.judged == size:
            return False
        self.judged = size
        return self.is_whole(self.text)

    def _has_begun_to_loop(self) -> bool:
        """Search the text and the thoughts for a loop, each time they have grown by some."""
        size = sum(map(len, self.parts)) + sum(map(len, self.thoughts))
        if self.finish_reason or self.is_done or size < self.looked_at + LOOP_SEARCH_CHARACTERS:
            return False
        self.looked_at = size
        return self.loops(_joined(self.parts) or _joined(self.thoughts))

    def reply_or_raise(self, failed: CallFailed | None) -> Reply:
        """Return the reply if it is accepted; otherwise raise `failed` or a more specific error."""
        reply = self._reply()
        has_ended = bool(self.finish_reason or self.is_done) and self.error is None
        if has_ended and self.finish_reason not in ("abort", "error"):
            return reply
        if self.is_whole(reply.text):
            return reply
        error = self.error or failed or self._unfinished()
        paid = reply.text or any(self.thoughts) or any(self.figures.values())
        raise AnswerBroken(error, reply) if paid else error

    def _unfinished(self) -> CallFailed:
        if self.finish_reason:
            return CallFailed(
                f"{self.place} gave up generating (finish_reason {self.finish_reason})",
                type=ErrorType.LLM_SERVER_ERROR,
            )
        if self.unread and not self.parts:
            return CallFailed(
                f"{self.place} sent what is not a chunk: {self.unread!r}",
                type=ErrorType.LLM_PROTOCOL,
            )
        return CallFailed(
            f"{self.place} ended the stream before its answer was finished",
            type=ErrorType.LLM_UNREACHABLE,
        )

    def _reply(self) -> Reply:
        text = self.text
        written = text + _joined(self.thoughts)
        tokens_in, tokens_out = self.figures.get("in", 0), self.figures.get("out", 0)
        return Reply(
            text=text,
            finish_reason=self.finish_reason,
            tokens_in=tokens_in or tokens_of_prompt(self.messages),
            tokens_out=tokens_out or tokens_of(written),
            cached_tokens=self.figures.get("cached", 0),
            estimated=not tokens_in or (bool(written) and not tokens_out),
        )


def tokens_of(text: str) -> int:
    """Estimate the number of tokens of a text, for engines that do not state it."""
    return round(len(text.encode(errors="replace")) / BYTES_PER_TOKEN)


def tokens_of_prompt(messages: Sequence[Message]) -> int:
    return tokens_of("".join(message["content"] for message in messages))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Return the text of a message's content, which is a string or a list of parts."""
    if isinstance(value, list):
        return "".join(_text(_object(part).get("text")) for part in value)
    return value if isinstance(value, str) else ""


def figure(value: Any) -> int:
    """Convert a number of tokens, also one as text or float; return 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0
    try:
        figure = int(float(value))
    except (ValueError, OverflowError):
        return 0
    return figure if 0 < figure <= LARGEST_FIGURE else 0


def _joined(parts: Sequence[str]) -> str:
    """Join the parts; surrogate pairs split across parts are joined, lone ones become U+FFFD."""
    text = "".join(parts)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# --- models -------------------------------------------------------------------------------------


async def served_models(client: httpx.AsyncClient) -> dict[str, int]:
    """Return the models served: name -> the tokens that a prompt and its answer share.

    Raises:
        CallFailed: see `activities.agents.llm_errors`.
    """
    place = place_of(client.base_url)
    try:
        async with _sent(client, client.build_request("GET", "/models")) as response:
            if not response.is_success:
                raise status_failure(place, response, await _error_body(response))
            listed = json.loads(await response.aread())
    except (httpx.HTTPError, httpx.StreamError) as error:
        raise transport_failure(place, error) from None
    except (ValueError, RecursionError):
        listed = None
    models = _object(listed).get("data")
    if not isinstance(models, list):
        raise CallFailed(
            f"{place} answered /models with something else than models", type=ErrorType.LLM_PROTOCOL
        )
    return {model["id"]: _window(model) for model in map(_object, models) if _text(model.get("id"))}


def not_served(client: httpx.AsyncClient, model: str, served: Mapping[str, int]) -> CallFailed:
    """Return the error for a model that the endpoint does not serve."""
    names = ", ".join(served)[:LONGEST_MESSAGE]
    return CallFailed(
        f"{place_of(client.base_url)} does not serve the model '{model}'; "
        f"it serves: {names or 'none'}",
        type=ErrorType.LLM_REFUSED,
        is_unknown_model=True,
    )


def sole_model(client: httpx.AsyncClient, served: Mapping[str, int]) -> str:
    """Return the model for agents that name none, if VLLM_MODEL is unset.

    Raises:
        CallFailed: the endpoint does not serve exactly one model.
    """
    if len(served) == 1:
        return next(iter(served))
    names = ", ".join(served)[:LONGEST_MESSAGE]
    raise CallFailed(
        f"{place_of(client.base_url)} serves {names or 'nothing'}. "
        "Set VLLM_MODEL to the one for the agents",
        type=ErrorType.LLM_REFUSED,
    )


def _window(model: dict[str, Any]) -> int:
    for path in _WINDOW_FIELDS:
        value: Any = model
        for key in path:
            value = _object(value).get(key)
        if window := figure(value):
            return window
    return DEFAULT_WINDOW


# --- HTTP ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _sent(client: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """Send a request and yield the response with its body unread.

    Follows one redirect that keeps the method.
    """
    response = await client.send(request, stream=True)
    if response.status_code in (307, 308) and response.next_request:
        await response.aclose()
        response = await client.send(response.next_request, stream=True)
    try:
        yield response
    finally:
        await response.aclose()


async def _error_body(response: httpx.Response) -> bytes:
    """Read as much of an error's body as arrives in time."""
    body = b""
    try:
        async with asyncio.timeout(ERROR_BODY_SECONDS):
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > LONGEST_ERROR_BODY:
                    break
    except (httpx.HTTPError, httpx.StreamError, TimeoutError):
        pass  # the status is enough
    return body
