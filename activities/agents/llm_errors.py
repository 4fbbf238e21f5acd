"""Errors of an OpenAI-compatible endpoint: one table of types, retryable or not.

| what happened                                         | type           | retried |
|-------------------------------------------------------|----------------|---------|
| no connection, a broken connection, a proxy's 404     | LlmUnreachable | yes     |
| silence, 408                                          | LlmTimeout     | yes     |
| 409, 429, 529, an error event with that meaning       | LlmOverloaded  | yes     |
| 5xx, any other error event, finish_reason abort       | LlmServerError | yes     |
| a body that is neither JSON nor an event stream       | LlmProtocol    | yes     |
| the prompt does not fit the window, 413               | PromptTooLong  | no      |
| any other status; an error event with that meaning    | LlmRefused     | no      |

`Retry-After`, in seconds or as a date, is the next attempt's delay, at most 60 s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from temporalio.exceptions import ApplicationError

from workflows.models.errors import RETRYABLE, ErrorType

LONGEST_RETRY_AFTER = timedelta(seconds=60)
LONGEST_MESSAGE = 500

_TOO_LONG_CODE = re.compile(
    r"context_length_exceeded|exceed_context_size|context_?window_?exceeded|prompt_too_long"
    r"|string_above_max_length|request_too_large",
    re.IGNORECASE,
)
_TOO_LONG_WORDS = re.compile(
    r"context (length|size|window|limit)"  # vLLM, llama.cpp, Ollama, SGLang, LM Studio
    r"|max(imum)? (model|context|input|allowed|sequence) length"  # vLLM, SGLang, TensorRT-LLM
    r"|max_new_tokens\W+must be <=|must have less than \d+ tokens"  # TGI
    r"|(prompt|input|request)( is)? too (long|large)"
    r"|token count exceeds|exceeds? the maximum number of tokens",
    re.IGNORECASE,
)
_UNKNOWN_MODEL = re.compile(
    r"model_?not_?found"
    r"|(model|deployment)\b.{0,200}(does not exist|not found|is not (served|loaded))"
    r"|(unknown|no such|could not find|cannot find)( the)? (model|deployment)",
    re.IGNORECASE | re.DOTALL,
)
_NAMED_OVERLOADED = re.compile(
    r"overload|rate.?limit|too.?many|capacity|exhausted|busy|unavailable", re.IGNORECASE
)
_NAMED_TIMEOUT = re.compile(r"time.?out|timed.?out|deadline", re.IGNORECASE)
_NAMED_REFUSED = re.compile(
    r"invalid|bad.?request|auth|permission|forbidden|not.?found|unsupported|unprocessable"
    r"|validation|content.?(filter|policy)|quota",
    re.IGNORECASE,
)


class CallFailed(ApplicationError):
    """A call without an answer.

    Attributes:
        status: the HTTP status, if present.
        is_unknown_model: whether the endpoint does not serve the requested model.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str,
        status: int | None = None,
        is_unknown_model: bool = False,
        next_retry_delay: timedelta | None = None,
    ) -> None:
        super().__init__(
            message,
            type=str(type),
            non_retryable=type not in RETRYABLE,
            next_retry_delay=next_retry_delay if type in RETRYABLE else None,
        )
        self.status = status
        self.is_unknown_model = is_unknown_model


@dataclass(frozen=True)
class Problem:
    """An error as stated by an endpoint. `names`: its type and code; `code`: a status in them."""

    words: str
    names: tuple[str, ...] = ()
    code: int | None = None
    is_engines: bool = field(default=False)
    """Whether it has the shape of an OpenAI-compatible engine's own error."""

    @property
    def is_too_long(self) -> bool:
        """Whether the prompt is too long. Engines have no common code for it, but similar words."""
        return any(map(_TOO_LONG_CODE.search, self.names)) or bool(
            _TOO_LONG_WORDS.search(self.words)
        )

    @property
    def is_unknown_model(self) -> bool:
        return any(map(_UNKNOWN_MODEL.search, (*self.names, self.words)))

    def is_named(self, pattern: re.Pattern[str]) -> bool:
        return any(map(pattern.search, self.names))


def place_of(url: httpx.URL) -> str:
    """Return the name of an endpoint for errors, without path and credentials."""
    return f"The LLM at {url.scheme}://{url.host}:{url.port or ''}".rstrip(":")


def problem_in(value: Any) -> Problem | None:
    """Find the error in a JSON value: nested, flat, or as a string; return None without one."""
    if not isinstance(value, dict):
        return None
    error = value.get("error")
    if isinstance(error, dict) and error:
        return _stated(error, is_engines=True)
    if isinstance(error, str) and error:
        return _stated({**value, "message": error}, is_engines=False)
    if value.get("object") == "error" or value.get("type") == "error":
        return _stated(value, is_engines=True)
    return None


def problem_of(data: str) -> Problem:
    """Parse the error in a text: the body of an error, or the data of an `event: error`."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return Problem(data.strip())
    if problem := problem_in(value):
        return problem
    if isinstance(value, dict):
        return _stated(value, is_engines=False)
    return Problem(value if isinstance(value, str) else data.strip())


def _stated(error: dict[str, Any], is_engines: bool) -> Problem:
    words = next(
        (error[key] for key in ("message", "detail", "error_message") if error.get(key)), error
    )
    names = [error.get(key) for key in ("type", "code", "error_type", "status")]
    codes = (_status(name) for name in names)
    return Problem(
        words=words if isinstance(words, str) else json.dumps(words, ensure_ascii=False),
        names=tuple(name for name in names if isinstance(name, str)),
        code=next((code for code in codes if code), None),
        is_engines=is_engines,
    )


def _status(value: Any) -> int | None:
    """Convert an error's code to an HTTP status; return None if it is something else."""
    if isinstance(value, str) and re.fullmatch(r"[45]\d\d", value):
        return int(value)
    return value if type(value) is int and 400 <= value < 600 else None


def stated_failure(place: str, problem: Problem) -> CallFailed:
    """Return the failure for an error within a stream or a body of status 200."""
    words = _shown(problem)
    return CallFailed(
        f"{place} reported: {words}",
        type=_type_of(problem.code, problem),
        status=problem.code,
        is_unknown_model=problem.is_unknown_model,
    )


def status_failure(place: str, response: httpx.Response, body: bytes) -> CallFailed:
    """Return the failure for any status but 2xx; `body` may be incomplete."""
    status = response.status_code
    problem = problem_of(body.decode(errors="replace"))
    words = _shown(problem) or "nothing"
    if location := response.headers.get("location"):
        words = f"go to {location}; set VLLM_URL to the address that answers"
    return CallFailed(
        f"{place} answered: {words[:LONGEST_MESSAGE]} (HTTP {status})",
        type=_type_of(status, problem),
        status=status,
        is_unknown_model=problem.is_unknown_model,
        next_retry_delay=retry_after(response.headers.get("retry-after"), datetime.now(UTC)),
    )


def _type_of(status: int | None, problem: Problem) -> str:
    if status == 413 or (problem.is_too_long and not _is_other_than_too_long(status, problem)):
        return ErrorType.PROMPT_TOO_LONG
    if status is None:
        return _named_type(problem)
    if status == 408:
        return ErrorType.LLM_TIMEOUT
    if status in (409, 429, 529):
        return ErrorType.LLM_OVERLOADED
    if status >= 500:
        return ErrorType.LLM_SERVER_ERROR
    if status == 404 and not (problem.is_engines or problem.is_unknown_model):
        # A proxy answers like this, in text or JSON, until the engine behind it is up again.
        return ErrorType.LLM_UNREACHABLE
    return ErrorType.LLM_REFUSED


def _is_other_than_too_long(status: int | None, problem: Problem) -> bool:
    """Return whether it is another error: rate limits mention tokens in similar words."""
    return status in (401, 403, 429) or problem.is_named(_NAMED_OVERLOADED)


def _named_type(problem: Problem) -> str:
    """Return the type of an error event without a status, by the names in it."""
    for pattern, kind in (
        (_NAMED_OVERLOADED, ErrorType.LLM_OVERLOADED),
        (_NAMED_TIMEOUT, ErrorType.LLM_TIMEOUT),
        (_NAMED_REFUSED, ErrorType.LLM_REFUSED),
    ):
        if problem.is_named(pattern):
            return kind
    return ErrorType.LLM_REFUSED if problem.is_unknown_model else ErrorType.LLM_SERVER_ERROR


def _shown(problem: Problem) -> str:
    """Return the words on one line, with the names that they do not contain."""
    names: Iterable[str] = (name for name in problem.names if name and name not in problem.words)
    more = ", ".join(names)
    words = " ".join(problem.words.split())[:LONGEST_MESSAGE]
    return f"{words} ({more[:100]})" if more else words


def transport_failure(place: str, error: httpx.HTTPError | httpx.StreamError) -> CallFailed:
    """Return the failure for an error of the HTTP client."""
    match error:
        case httpx.ConnectTimeout() | httpx.ConnectError():
            kind, what = ErrorType.LLM_UNREACHABLE, f"cannot be reached: {_cause(error)}"
        case httpx.TimeoutException():
            kind, what = ErrorType.LLM_TIMEOUT, "was silent for too long"
        case httpx.DecodingError():
            kind, what = (
                ErrorType.LLM_PROTOCOL,
                f"sent what cannot be decompressed: {_cause(error)}",
            )
        case _:
            kind, what = ErrorType.LLM_UNREACHABLE, f"broke the connection: {_cause(error)}"
    return CallFailed(f"{place} {what}", type=kind)


def _cause(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:LONGEST_MESSAGE]


def retry_after(header: str | None, now: datetime) -> timedelta | None:
    """Return the delay that a `Retry-After` header asks for, at most 60 s, or None."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
            seconds = (until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds()
        except (ValueError, OverflowError):
            return None
    if math.isnan(seconds) or seconds <= 0:
        return None
    return timedelta(seconds=min(seconds, LONGEST_RETRY_AFTER.total_seconds()))
