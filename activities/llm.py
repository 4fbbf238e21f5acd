"""The client of an OpenAI-compatible endpoint: one streamed answer, its errors, a model's window.

Every foreign error leaves this module as an ApplicationError of the table in `failure`: its type
says what happened, `non_retryable` whether asking again can help (design section 3, Agents).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from openai import (
    APIConnectionError,
    APIError,
    APIResponseValidationError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    AsyncStream,
    Timeout,
)
from openai.types.chat import ChatCompletionMessageParam
from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from workflows.models import Wire

LLM_UNREACHABLE = "LlmUnreachable"
LLM_TIMEOUT = "LlmTimeout"
LLM_OVERLOADED = "LlmOverloaded"
LLM_SERVER_ERROR = "LlmServerError"
LLM_PROTOCOL = "LlmProtocol"
LLM_REFUSED = "LlmRefused"
PROMPT_TOO_LONG = "PromptTooLong"

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 60.0
"""How long an engine may be silent, before its first chunk or between two."""

LONGEST_RETRY_AFTER = timedelta(seconds=60)
LONGEST_MESSAGE = 500
UNTOLD_WINDOW = 8_192
"""Tokens; taken where an endpoint does not tell a model's window."""


def connect(base_url: str, api_key: str, idle_seconds: float = IDLE_SECONDS) -> AsyncOpenAI:
    """A client that never retries by itself: Temporal does. base_url: up to and with `/v1`."""
    timeout = Timeout(idle_seconds, connect=min(CONNECT_SECONDS, idle_seconds))
    return AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0, timeout=timeout)


@dataclass(frozen=True)
class Reply:
    """One streamed answer, whole or cut off. Tokens as the engine counted them."""

    text: str
    cut_off: bool
    tokens_in: int
    tokens_out: int
    cached_tokens: int


class _Delta(Wire):
    content: str | None = None


class _Choice(Wire):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _PromptDetails(Wire):
    cached_tokens: int | None = None


class _Usage(Wire):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Chunk(Wire):
    """What is read of an event. The client's own model of it takes ten times as long to make."""

    choices: list[_Choice] = []
    usage: _Usage | None = None


async def stream_reply(
    client: AsyncOpenAI,
    *,
    model: str,
    messages: list[ChatCompletionMessageParam],
    schema_name: str,
    schema: dict[str, Any],
    temperature: float,
    max_tokens: int,
    seed: int,
    on_token: Callable[[], None],
) -> Reply:
    """Ask once; `on_token` is called for every chunk that brings text.

    A cancellation closes the connection, at which the engine stops generating.

    Raises:
        ApplicationError: see `failure`.
    """
    text: list[str] = []
    finish_reason = None
    usage = None
    try:
        stream = await client.post(
            "/chat/completions",
            body={
                "model": model,
                "messages": messages,
                "stream": True,
                "stream_options": {"include_usage": True},
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": schema_name, "strict": True, "schema": schema},
                },
                "temperature": temperature,
                "max_tokens": max_tokens,
                "seed": seed,
            },
            cast_to=object,
            stream=True,
            stream_cls=AsyncStream[object],
        )
        async with stream:
            content_type = stream.response.headers.get("content-type", "nothing")
            if not content_type.startswith("text/event-stream"):
                raise _protocol(client, f"answered a stream's request with {content_type}")
            async for event in stream:
                chunk = _Chunk.model_validate(event)
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    finish_reason = choice.finish_reason or finish_reason
                    if choice.delta.content:
                        text.append(choice.delta.content)
                        on_token()
    except (APIError, json.JSONDecodeError) as error:
        raise failure(client, error) from None  # its words are in the failure; a chain is too long
    except ValidationError as error:
        raise _protocol(
            client, f"sent an event that is no chunk: {error.errors()[0]['msg']}"
        ) from None
    if finish_reason is None:
        raise ApplicationError(
            f"{_place(client)} ended the stream before its answer was finished",
            type=LLM_UNREACHABLE,
        )
    details = usage.prompt_tokens_details if usage else None
    return Reply(
        text="".join(text),
        cut_off=finish_reason == "length",
        tokens_in=usage.prompt_tokens if usage else 0,
        tokens_out=usage.completion_tokens if usage else len(text),
        cached_tokens=(details.cached_tokens or 0) if details else 0,
    )


class _Model(Wire):
    """One model of GET /v1/models: vLLM tells `max_model_len`, Ray Serve tells in `metadata`."""

    id: str
    max_model_len: int | None = None
    metadata: dict[str, Any] | None = None

    @property
    def window(self) -> int:
        told = self.max_model_len or (self.metadata or {}).get("max_request_context_length")
        return told if isinstance(told, int) else UNTOLD_WINDOW


class _ModelList(Wire):
    data: list[_Model]


async def model_window(client: AsyncOpenAI, model: str) -> int:
    """The tokens that a prompt and its answer may have together.

    Raises:
        ApplicationError: `LlmRefused` where no such model is served; else see `failure`.
    """
    try:
        response = await client.models.with_raw_response.list()
        served = _ModelList.model_validate_json(response.content).data
    except APIError as error:
        raise failure(client, error) from None  # its words are in the failure; a chain is too long
    except ValidationError:
        raise _protocol(client, "answered /models with something else than models") from None
    for candidate in served:
        if candidate.id == model:
            return candidate.window
    names = ", ".join(candidate.id for candidate in served)[:LONGEST_MESSAGE]
    raise ApplicationError(
        f"{_place(client)} does not serve the model '{model}'; it serves: {names or 'none'}",
        type=LLM_REFUSED,
        non_retryable=True,
    )


# --- errors ---------------------------------------------------------------------------------------


def failure(client: AsyncOpenAI, error: Exception) -> ApplicationError:
    """The one table from a client's error to what Temporal is told.

    | what happened                                    | type           | retried |
    |--------------------------------------------------|----------------|---------|
    | no connection, one that broke, a path not yet up | LlmUnreachable | yes     |
    | silence, 408                                     | LlmTimeout     | yes     |
    | 409, 429                                         | LlmOverloaded  | yes     |
    | 5xx, an error event in a stream                  | LlmServerError | yes     |
    | what is not JSON or an event stream              | LlmProtocol    | yes     |
    | the prompt does not fit the window               | PromptTooLong  | no      |
    | any other status                                 | LlmRefused     | no      |

    `Retry-After`, in seconds or as a date, is the next attempt's delay, at most 60 s.
    """
    place = _place(client)
    match error:
        case APITimeoutError():
            return ApplicationError(f"{place} was silent for too long", type=LLM_TIMEOUT)
        case APIConnectionError():
            cause = str(error.__cause__ or error)[:LONGEST_MESSAGE]
            return ApplicationError(f"{place} cannot be reached: {cause}", type=LLM_UNREACHABLE)
        case APIStatusError():
            return _status_failure(place, error)
        case APIResponseValidationError() | json.JSONDecodeError():
            return _protocol(client, "answered with something that is not JSON")
        case APIError() if _too_long(error):
            return ApplicationError(_told(place, error), type=PROMPT_TOO_LONG, non_retryable=True)
        case APIError():
            return ApplicationError(_told(place, error), type=LLM_SERVER_ERROR)
        case _:
            raise error


def _status_failure(place: str, error: APIStatusError) -> ApplicationError:
    status = error.status_code
    message = f"{_told(place, error)} (HTTP {status})"
    retry: Literal["LlmTimeout", "LlmOverloaded", "LlmServerError", "LlmUnreachable"]
    if status == 408:
        retry = "LlmTimeout"
    elif status in (409, 429):
        retry = "LlmOverloaded"
    elif status >= 500:
        retry = "LlmServerError"
    elif status == 404 and not isinstance(error.body, dict):
        # Ray's proxy answers in plain text until the application behind it is up again.
        retry = "LlmUnreachable"
    else:
        kind = PROMPT_TOO_LONG if _too_long(error) else LLM_REFUSED
        return ApplicationError(message, type=kind, non_retryable=True)
    after = retry_after(error.response.headers.get("retry-after"), datetime.now(UTC))
    return ApplicationError(message, type=retry, next_retry_delay=after)


def retry_after(header: str | None, now: datetime) -> timedelta | None:
    """The delay a `Retry-After` header asks for, at most 60 s; None: it asks for none."""
    if not header:
        return None
    try:
        delay = timedelta(seconds=min(float(header), LONGEST_RETRY_AFTER.total_seconds()))
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        delay = until.replace(tzinfo=until.tzinfo or UTC) - now
    return min(delay, LONGEST_RETRY_AFTER) if delay > timedelta() else None


def _protocol(client: AsyncOpenAI, what: str) -> ApplicationError:
    """Most often a proxy's page where the engine should have spoken: it passes."""
    return ApplicationError(f"{_place(client)} {what}", type=LLM_PROTOCOL)


def _place(client: AsyncOpenAI) -> str:
    url = client.base_url
    return f"The LLM at {url.scheme}://{url.host}:{url.port or ''}".rstrip(":")


def _told(place: str, error: APIError) -> str:
    return f"{place} said: {_words(error)[:LONGEST_MESSAGE]}"


def _words(error: APIError) -> str:
    body = error.body
    if isinstance(body, dict):
        return str(body.get("message") or body.get("detail") or body)
    return str(body or error.message)


def _too_long(error: APIError) -> bool:
    """The engines have no common code for it, but these words."""
    words = _words(error)
    return "context length" in words or "maximum model length" in words
