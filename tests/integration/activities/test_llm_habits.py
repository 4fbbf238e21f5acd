"""Behaviors of OpenAI-compatible endpoints, byte by byte, and the outcome of each answer."""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from redis.asyncio import Redis
from temporalio.activity import ActivityCancellationDetails
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.agents import openai_client as llm
from activities.agents.activities import VllmAgents
from activities.agents.requests import AgentRequest, judge, propose
from tests.integration.activities.test_agents import PROMPTS, proposing
from tests.support.llm_server import Script, ScriptedLlm, Step, raw_response
from tests.support.polling import until
from tests.support.servers import RunningServer
from workflows.models.agents import (
    CallUsage,
    Contender,
    JudgeInput,
    Proposal,
)

CONTENT = 'Store each event, then publish it: `{"a": 1}` and\n```json\n{}\n```\nü 😀'
PROPOSAL = {
    "approach": "an outbox",
    "content": CONTENT,
    "decisions": [{"title": "Outbox", "rationale": "durable", "affects": ["bridge"]}],
}
SHORT = Proposal(approach="an outbox", content=CONTENT)
DOCUMENT = json.dumps(PROPOSAL)
MIDDLE = len(DOCUMENT) // 2
IN_UTF_8 = json.dumps(PROPOSAL, ensure_ascii=False)
HALF, REST = DOCUMENT[:MIDDLE], DOCUMENT[MIDDLE:]

PATIENCE_S = 30.0
"""The client's idle timeout in seconds: a complete answer must not wait for it."""

HEAD = raw_response(None, content_type="text/event-stream")
USAGE = {"prompt_tokens": 700, "completion_tokens": 90}
TOKENS = (700, 90)
ERROR = {"message": "the KV cache is gone", "type": "InternalServerError", "code": 500}


def event(value: Any, ascii: bool = True) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=ascii).encode() + b"\n\n"


def chunk(content: Any = None, finish: Any = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


BEGIN = chunk(HALF)
END = chunk(REST)
WORDS = BEGIN + END
STOP = chunk(finish="stop")
COUNTED = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
WHOLE = WORDS + STOP + COUNTED + DONE


@dataclass(frozen=True)
class Habit:
    """The responses that an endpoint sends to successive requests, and the expected outcome.

    kind: `taken`, or the failure's type. tokens: None if they are estimated.
    """

    asks: list[tuple[Step, ...]]
    kind: str
    words: str = ""
    tokens: tuple[int, int] | None = None
    calls: int = 1
    patience: float = PATIENCE_S

    def scripts(self) -> list[Script]:
        return [lambda _, steps=steps: steps for steps in self.asks]  # type: ignore[misc]


def taken(*steps: Step, tokens: tuple[int, int] | None = TOKENS) -> Habit:
    """Expect the answer to be taken at the first request."""
    return Habit([(HEAD, *steps)], "taken", tokens=tokens)


def taken_response(*steps: Step, tokens: tuple[int, int] | None = TOKENS) -> Habit:
    return Habit([steps], "taken", tokens=tokens)


def failed(kind: str, words: str, *steps: Step, patience: float = PATIENCE_S) -> Habit:
    """Expect the stream to fail with this type and these words."""
    return Habit([(HEAD, *steps)], kind, words, patience=patience)


def refused(kind: str, words: str, status: str, body: Any, **headers: str) -> Habit:
    """Expect the HTTP status to fail with this type and these words."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Habit([(raw_response(text, status, **headers),)], kind, words)


def again(words: str, *steps: Step) -> Habit:
    """Expect the answer to be rejected, requested again with these words, and then taken."""
    ok = (HEAD, WHOLE)
    return Habit([(HEAD, *steps), ok], "taken", words, calls=2, tokens=None)


def pinged(ping: bytes, times: int = 40) -> list[Step]:
    return [step for _ in range(times) for step in (ping, 0.1)]


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, **more}}


def flat(message: str, code: int) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": "BadRequestError", "code": code}


def chunked(body: bytes) -> bytes:
    return f"{len(body):x}\r\n".encode() + body + b"\r\n"


CHUNKED_HEAD = raw_response(None, content_type="text/event-stream", Transfer_Encoding="chunked")

ENDS = {
    "[DONE] after usage": taken(WHOLE),
    "finish_reason without [DONE]": taken(WORDS, STOP, COUNTED),
    "[DONE] without finish_reason": taken(WORDS, COUNTED, DONE),
    "[DONE] without a blank line": taken(WORDS, STOP, COUNTED, b"data: [DONE]"),
    "hangs after [DONE]": taken(WHOLE, "hang"),
    "hangs after finish_reason": taken(WORDS, STOP, COUNTED, "hang"),
    "hangs after finish_reason, uncounted": taken(WORDS, STOP, "hang", tokens=None),
    "hangs after the last word": taken(WORDS, "hang", tokens=None),
    "pings after the last word": taken(WORDS, *pinged(b": ping\n\n"), tokens=None),
    "pings as events after the last word": taken(
        WORDS, *pinged(b'event: ping\ndata: {"type": "ping"}\n\n'), tokens=None
    ),
    "resets after [DONE]": taken(WHOLE, "reset"),
    "resets after finish_reason": taken(WORDS, STOP, COUNTED, "reset"),
    "resets after the last word": taken(WORDS, "reset", tokens=None),
    "breaks its chunked body after the last word": taken_response(
        CHUNKED_HEAD, chunked(WORDS), b"ff\r\nhalf", tokens=None
    ),
    "ends without finish_reason": taken(WORDS, COUNTED),
    "empty finish_reason": taken(BEGIN, chunk(REST, finish=""), COUNTED),
    "finish_reason 'null'": taken(chunk(HALF, finish="null"), chunk(REST, finish="null"), COUNTED),
    "finish_reason with every chunk": taken(
        chunk(HALF, finish="stop"), chunk(REST, finish="stop"), COUNTED, DONE
    ),
    "unknown finish_reason": taken(WORDS, chunk(finish="eos_token"), COUNTED, DONE),
    "length, but the document is whole": taken(WORDS, chunk(" \n", "length"), COUNTED, DONE),
    "abort, but the document is whole": taken(WORDS, chunk(finish="abort"), COUNTED, DONE),
    "error after the answer": taken(WORDS, STOP, COUNTED, event({"error": ERROR})),
    "half an event at the end": taken(WORDS, COUNTED, b'data: {"choi'),
}

FRAMES = {
    "comments": taken(
        b": hello\n\n:\n\n", BEGIN, b": OPENROUTER PROCESSING\n\n", END, STOP + COUNTED
    ),
    "event: ping without data": taken(b"event: ping\n\n", WHOLE),
    "empty data": taken(b"data:\n\n", BEGIN, b"data: \n\n", END, STOP, COUNTED, DONE),
    "retry and id": taken(b"retry: 10000\nid: 1\n\n", BEGIN, b"id: 2\nretry: x\n\n", END, COUNTED),
    "data: null": taken(b"data: null\n\n", BEGIN, b"data: null\n\n", END, STOP, COUNTED),
    "words as data": taken(b"data: keep-alive\n\n", BEGIN, b"data: ping\n\n", END, STOP, COUNTED),
    "numbers and lists as data": taken(b"data: 7\n\ndata: []\n\n", WHOLE),
    "CRLF": taken(WHOLE.replace(b"\n", b"\r\n")),
    "CR": taken(WHOLE.replace(b"\n", b"\r"), "hang"),
    "single line ends": taken(WHOLE.replace(b"\n\n", b"\n")),
    "multi-line data": taken(WHOLE.replace(b'"choices": ', b'"choices":\ndata: ')),
    "data without a space": taken(WHOLE.replace(b"data: ", b"data:")),
    "a byte order mark": taken(b"\xef\xbb\xbf", WHOLE),
    "byte by byte": taken(*(WHOLE[place : place + 1] for place in range(len(WHOLE)))),
    "another charset": taken_response(
        raw_response(None, content_type="text/event-stream; charset=iso-8859-1"),
        event({"choices": [{"delta": {"content": IN_UTF_8}}]}, ascii=False),
        STOP + COUNTED,
    ),
    "no content type": taken_response(raw_response(None, content_type=""), WHOLE),
    "a stream as text/plain": taken_response(raw_response(None, content_type="text/plain"), WHOLE),
    "gzip": taken_response(
        raw_response(
            gzip.compress(WHOLE), content_type="text/event-stream", Content_Encoding="gzip"
        )
    ),
    "not gzip": Habit(
        [(raw_response(WHOLE, content_type="text/event-stream", Content_Encoding="gzip"),)],
        "LlmProtocol",
        "decompressed",
    ),
    "bytes that are not UTF-8": taken(WHOLE.replace(b"durable", b"\xff\xfe\xe9")),
    "halves of a character in two chunks": taken(
        *(chunk(part) for part in (DOCUMENT[:20], "\ud83d", "\ude00", DOCUMENT[20:])),
        STOP + COUNTED,
    ),
}

SHAPES = {
    "usage null": taken(BEGIN, chunk(REST, usage=None), STOP, COUNTED),
    "choices null": taken(WORDS, event({"choices": None}), STOP, COUNTED),
    "choices an object": taken(event({"choices": {"delta": {"content": DOCUMENT}}}), STOP, COUNTED),
    "choices missing": taken(event({"id": "1", "object": "chat.completion.chunk"}), WHOLE),
    "choices of strings": taken(event({"choices": ["x", None, 3]}), WHOLE),
    "delta null": taken(event({"choices": [{"delta": None}]}), WHOLE),
    "delta missing": taken(event({"choices": [{"index": 0}]}), WHOLE),
    "delta a list": taken(event({"choices": [{"delta": [1]}]}), WHOLE),
    "content null": taken(
        event({"choices": [{"delta": {"role": "assistant", "content": None}}]}), WHOLE
    ),
    "content in parts": taken(
        chunk([{"type": "text", "text": HALF}, {"type": "text", "text": REST}]), STOP, COUNTED
    ),
    "content a number": taken(chunk(7), WHOLE),
    "a second choice": taken(
        event({"choices": [{"index": 1, "delta": {"content": "other"}}]}), WHOLE
    ),
    "usage partial": taken(WORDS, STOP, event({"usage": {"total_tokens": 790}}), tokens=None),
    "usage a list": taken(WORDS, STOP, event({"choices": [], "usage": [1, 2]}), tokens=None),
    "usage a string": taken(WORDS, STOP, event({"choices": [], "usage": "many"}), tokens=None),
    "usage negative": taken(
        WORDS, STOP, event({"usage": {"prompt_tokens": -1, "completion_tokens": -5}}), tokens=None
    ),
    "usage beyond all measure": taken(
        WORDS,
        STOP,
        b'data: {"usage": {"prompt_tokens": 1e999, "completion_tokens": 1e18}}\n\n',
        tokens=None,
    ),
    "usage in floats": taken(
        WORDS, STOP, event({"usage": {"prompt_tokens": 700.0, "completion_tokens": 90.4}})
    ),
    "usage in digits": taken(
        WORDS, STOP, event({"usage": {"prompt_tokens": "700", "completion_tokens": "90"}})
    ),
    "usage in other names": taken(
        WORDS, STOP, event({"usage": {"input_tokens": 700, "output_tokens": 90}})
    ),
    "several figures": taken(
        chunk(HALF, usage={"prompt_tokens": 700, "completion_tokens": 45}),
        chunk(REST, "stop", usage=USAGE),
        event({"choices": [], "usage": {"prompt_tokens": 0, "completion_tokens": 0}}),
        DONE,
    ),
    "no usage": taken(WORDS, STOP, DONE, tokens=None),
    "reasoning_content": taken(
        event({"choices": [{"delta": {"reasoning_content": "{so}"}}]}), WHOLE
    ),
    "the answer as reasoning": taken(
        event({"choices": [{"delta": {"reasoning_content": DOCUMENT}}]}), STOP, COUNTED, DONE
    ),
    "<think>": taken(chunk('<think>{"approach": 1} or\n\n'), chunk("</think>\n"), WHOLE),
    "fenced": taken(chunk("```json\n"), WORDS, chunk("\n```"), STOP, COUNTED, DONE),
    "words around the document": taken(
        chunk("Sure:\n"), WORDS, chunk("\nDone {ok}."), STOP, COUNTED
    ),
    "U+0000 in the text": taken(chunk("\0"), WHOLE.replace(b"durable", b"dur\\\\u0000able")),
    "half a character": taken(WHOLE.replace(b"durable", b"dur\\\\ud83d")),
    "a whole message as JSON": taken_response(
        raw_response(
            json.dumps(
                {
                    "choices": [
                        {"message": {"content": DOCUMENT}, "finish_reason": "stop"},
                    ],
                    "usage": USAGE,
                }
            ).encode()
        )
    ),
    "a whole message in the last chunk": taken(
        event({"choices": [{"message": {"content": DOCUMENT}, "finish_reason": "stop"}]}), COUNTED
    ),
}

UNUSABLE = {
    "length": again("it was cut off", BEGIN, chunk(finish="length"), COUNTED, DONE),
    "content_filter": again("content filter", BEGIN, chunk(finish="content_filter"), COUNTED, DONE),
    "tool_calls": again(
        "called a tool",
        event({"choices": [{"delta": {"tool_calls": [{"function": {"name": "f"}}]}}]}),
        chunk(finish="tool_calls"),
        DONE,
    ),
    "nothing": again("it was empty", STOP, COUNTED, DONE),
    "only thoughts": again(
        "it was empty", event({"choices": [{"delta": {"reasoning": "hm"}}]}), STOP, DONE
    ),
    "prose": again("too short", chunk("I cannot do that."), STOP, COUNTED, DONE),
    "not of the schema": again(
        "decisions: Field required", chunk('{"approach": "a", "content": "c"}'), STOP, DONE
    ),
    "over the schema's length": again(
        "at most", chunk(DOCUMENT.replace("an outbox", "a" * 60_000)), STOP, DONE
    ),
}

ERRORS = {
    "nested error": failed(
        "LlmServerError", "the KV cache is gone", BEGIN, event({"error": ERROR})
    ),
    "flat error": failed(
        "LlmServerError", "the KV cache is gone", event({"object": "error", **ERROR}), DONE
    ),
    "flat error of a request": failed(
        "LlmRefused",
        "no such grammar",
        event(
            {
                "object": "error",
                "message": "no such grammar",
                "type": "BadRequestError",
                "code": 400,
            }
        ),
    ),
    "event: error": failed(
        "LlmOverloaded",
        "try later",
        b'event: error\ndata: {"message": "try later", "code": 429}\n\n',
    ),
    "event: error in words": failed(
        "LlmServerError", "out of memory", b"event: error\ndata: out of memory\n\n"
    ),
    "error as a string": failed(
        "LlmServerError",
        "Request failed during generation",
        event({"error": "Request failed during generation: CUDA", "error_type": "generation"}),
    ),
    "error of overload by name": failed(
        "LlmOverloaded",
        "is overloaded",
        event({"error": "Model is overloaded", "error_type": "overloaded"}),
    ),
    "error code in digits": failed("LlmOverloaded", "slow", event(error("slow", code="529"))),
    "an error that is null": taken(chunk(HALF, error=None), END, STOP, COUNTED, DONE),
    "too long within a stream": failed(
        "PromptTooLong",
        "8192",
        event(error("maximum context length is 8192 tokens", type="BadRequestError", code=400)),
    ),
    "abort": failed("LlmServerError", "finish_reason abort", BEGIN, chunk(finish="abort"), DONE),
    "error as a finish_reason": failed(
        "LlmServerError", "finish_reason error", BEGIN, chunk(finish="error")
    ),
    "silence": failed("LlmTimeout", "silent", BEGIN, "hang", patience=1.0),
    "a reset in the middle": failed("LlmUnreachable", "broke", BEGIN, "reset"),
    "an end in the middle": failed("LlmUnreachable", "before its answer was finished", BEGIN),
    "not one chunk": failed("LlmProtocol", "hello", b"data: hello\n\n"),
    "JSON that is not a completion": Habit(
        [(raw_response(b'{"status": "ok"}'),)], "LlmProtocol", "status"
    ),
    "an error as JSON with status 200": Habit(
        [(raw_response(json.dumps({"error": ERROR}).encode()),)], "LlmServerError", "the KV cache"
    ),
    "a page": Habit(
        [(raw_response(b"<html>Sign in</html>", content_type="text/html"),)],
        "LlmProtocol",
        "text/html",
    ),
}

BAD_REQUEST = "400 Bad Request"
UNPROCESSABLE = "422 Unprocessable Entity"
TOO_LONG: dict[str, tuple[str, Any]] = {
    "vLLM": (
        BAD_REQUEST,
        error("This model's maximum context length is 4096 tokens. However, you requested 5000"),
    ),
    "vLLM, flat": (
        BAD_REQUEST,
        flat("The decoder prompt (length 9) is longer than the maximum model length of 4.", 400),
    ),
    "llama.cpp": (BAD_REQUEST, error("try increasing it", type="exceed_context_size_error")),
    "llama.cpp, old": (
        "500 Internal Server Error",
        error("the request exceeds the available context size", type="server_error", code=500),
    ),
    "TGI": (
        UNPROCESSABLE,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096.",
            "error_type": "validation",
        },
    ),
    "TGI, inputs": (
        UNPROCESSABLE,
        {"error": "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000"},
    ),
    "Ollama": (BAD_REQUEST, {"error": "the input length exceeds the context length"}),
    "SGLang": (
        BAD_REQUEST,
        flat("The input (9000 tokens) is longer than the model's context length (8192).", 400),
    ),
    "SGLang, allowed": (
        BAD_REQUEST,
        flat("Input length (9000 tokens) exceeds the maximum allowed length (8191 tokens).", 400),
    ),
    "OpenAI": (BAD_REQUEST, error("Please reduce it.", code="context_length_exceeded")),
    "Mistral": (
        BAD_REQUEST,
        {"message": "Prompt too large for model with 32768 maximum context length", "code": "3051"},
    ),
    "413": ("413 Content Too Large", b"<html>too big</html>"),
}

REFUSALS = {
    **{
        f"too long: {name}": refused("PromptTooLong", "", *reply)
        for name, reply in TOO_LONG.items()
    },
    "a rate limit in tokens": refused(
        "LlmOverloaded", "TPM", "429 Too Many Requests", error("Request too large: TPM limit 8000")
    ),
    "a key that is wrong": refused("LlmRefused", "key", "401 Unauthorized", error("Invalid key")),
    "forbidden": refused("LlmRefused", "no entry", "403 Forbidden", b"no entry"),
    "FastAPI's detail": refused(
        "LlmRefused", "extra", "422 Unprocessable Entity", {"detail": [{"msg": "extra field"}]}
    ),
    "model not found": refused(
        "LlmRefused", "does not exist", "404 Not Found", error("The model `x` does not exist.")
    ),
    "a proxy's 404 as JSON": refused(
        "LlmUnreachable", "no Route matched", "404 Not Found", {"message": "no Route matched"}
    ),
    "a proxy's 404 as detail": refused(
        "LlmUnreachable", "Not Found", "404 Not Found", {"detail": "Not Found"}
    ),
    "a proxy's 404 as a page": refused(
        "LlmUnreachable", "nginx", "404 Not Found", b"<h1>nginx</h1>"
    ),
    "overloaded": refused("LlmOverloaded", "", "529 Overloaded", b""),
    **{
        str(status): refused("LlmServerError", "HTTP", f"{status} Oh", b"\xff\xfe not text")
        for status in (500, 502, 503, 504)
    },
    "a redirect": refused(
        "LlmRefused", "set VLLM_URL", "301 Moved", b"", Location="https://elsewhere.example/v1"
    ),
    "an error whose body hangs": Habit(
        [(raw_response(None, "503 Busy"), b"sto", "reset")], "LlmServerError", "HTTP 503"
    ),
    "headers that are not HTTP": Habit([(b"SSH-2.0-OpenSSH\r\n\r\n",)], "LlmUnreachable", "broke"),
    **{
        f"Retry-After: {value}": refused("LlmOverloaded", "", "429 Slow", b"", Retry_After=value)
        for value in ("-inf", "nan", "1e999", "soon", "Fri, 99 Foo 99999 25:61:61 GMT", "-5")
    },
}

HABITS = ENDS | FRAMES | SHAPES | UNUSABLE | ERRORS | REFUSALS
FINAL = {"LlmRefused", "PromptTooLong", "BadAnswer"}


@pytest.fixture(scope="module")
async def store(valkey: RunningServer) -> AsyncIterator[Redis]:
    client = Redis(host=valkey.host, port=valkey.port, password=valkey.password)
    yield client
    await client.aclose()


def environment_of_a_run() -> ActivityEnvironment:
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(
        environment.info,
        workflow_run_id=str(uuid.uuid4()),
        heartbeat_timeout=timedelta(seconds=5),
    )
    return environment


@dataclass
class Outcome:
    """The outcome of a call, and the requests that the endpoint received."""

    answer: Any
    error: BaseException | None
    seconds: float
    requests: list[dict[str, Any]]


async def ask(
    server: ScriptedLlm,
    name: str,
    store: Redis,
    patience: float = PATIENCE_S,
    question: AgentRequest[Any] | None = None,
) -> Outcome:
    began = time.monotonic()
    answer, failure = None, None
    async with llm.connect(server.url(name), "none", patience) as client:
        agents = VllmAgents(client, store, "", PROMPTS)
        try:
            asked = question or propose(proposing())
            answer = await environment_of_a_run().run(agents.answer, asked)
        except Exception as raised:
            failure = raised
    return Outcome(answer, failure, time.monotonic() - began, server.requests.get(name, []))


def path(name: str) -> str:
    return f"habit-{[*HABITS].index(name)}"


@pytest.fixture(scope="module")
async def outcomes(store: Redis) -> dict[str, Outcome]:
    """Run every habit once, up to 16 at a time."""
    limit = asyncio.Semaphore(16)

    async def meet(server: ScriptedLlm, name: str, habit: Habit) -> Outcome:
        async with limit:
            return await ask(server, path(name), store, habit.patience)

    async with ScriptedLlm() as server:
        server.scripts = {path(name): habit.scripts() for name, habit in HABITS.items()}
        met = await asyncio.gather(*(meet(server, *each) for each in HABITS.items()))
    return dict(zip(HABITS, met, strict=True))


@pytest.mark.parametrize("name", [name for name in HABITS if HABITS[name].kind == "taken"])
async def test_an_answer_that_is_whole_is_taken(outcomes: dict[str, Outcome], name: str) -> None:
    habit, met = HABITS[name], outcomes[name]

    assert met.error is None, met.error
    assert met.answer
    assert met.seconds < PATIENCE_S
    assert met.answer.proposal.content == CONTENT
    assert "\\u0000" not in met.answer.model_dump_json()
    usage = met.answer.usage
    assert usage.asks == len(met.requests) == habit.calls
    if habit.calls == 2:
        assert habit.words in met.requests[1]["messages"][-1]["content"]
    elif habit.tokens:
        assert (usage.tokens_in, usage.tokens_out, usage.estimated) == (*habit.tokens, False)
    else:
        assert usage.estimated
        assert usage.tokens_in > 100
        assert 50 < usage.tokens_out < 1_000


@pytest.mark.parametrize("name", [name for name in HABITS if HABITS[name].kind != "taken"])
async def test_an_error_of_an_endpoint_keeps_its_words_and_its_class(
    outcomes: dict[str, Outcome], name: str
) -> None:
    habit, met = HABITS[name], outcomes[name]

    assert isinstance(met.error, ApplicationError), met
    assert met.error.type == habit.kind, met.error.message
    assert met.error.non_retryable == (habit.kind in FINAL)
    assert habit.words in met.error.message
    assert "127.0.0.1" in met.error.message
    assert len(met.error.message) < 700
    assert len(met.requests) == (3 if habit.kind == "PromptTooLong" else habit.calls)


def test_enough_habits_are_tested() -> None:
    assert len(HABITS) == len({*ENDS, *FRAMES, *SHAPES, *UNUSABLE, *ERRORS, *REFUSALS}) >= 46


# --- the cost of a call ---------------------------------------------------------------------------


def paid(met: Outcome) -> CallUsage:
    assert isinstance(met.error, ApplicationError)
    (usage,) = met.error.details
    assert isinstance(usage, CallUsage)
    return usage


async def test_a_failed_call_reports_its_cost(store: Redis) -> None:
    async with ScriptedLlm() as server:
        half: Script = lambda _: (HEAD, BEGIN, STOP, COUNTED, DONE)  # noqa: E731
        server.scripts = {
            "unusable": [half],
            "broken": [half, lambda _: (HEAD, BEGIN, "reset")],
            "refused": [lambda _: (raw_response(b"{}", "400 Bad Request"),)],
        }
        unusable, broken, nothing = [
            await ask(server, name, store) for name in ("unusable", "broken", "refused")
        ]

    assert (paid(unusable).tokens_in, paid(unusable).tokens_out) == (2_100, 270)
    assert (paid(unusable).asks, paid(unusable).estimated) == (3, False)
    assert (paid(broken).asks, paid(broken).estimated) == (2, True)
    assert paid(broken).tokens_in > 700
    assert paid(broken).tokens_out > 90 + len(HALF) // 5
    assert (paid(broken).model, paid(broken).act) == ("test-model", "propose")
    assert isinstance(nothing.error, ApplicationError)
    assert not nothing.error.details


async def test_the_next_attempt_counts_what_the_one_before_has_cost(store: Redis) -> None:
    environment = environment_of_a_run()
    heartbeats: list[Any] = []
    environment.on_heartbeat = heartbeats.append
    async with ScriptedLlm() as server:
        server.scripts["a"] = [
            lambda _: (HEAD, BEGIN, COUNTED, "reset"),
            lambda _: (HEAD, WHOLE),
        ]
        async with llm.connect(server.url("a"), "none") as client:
            agents = VllmAgents(client, store, "", PROMPTS)
            with pytest.raises(ApplicationError) as broken:
                await environment.run(agents.answer, propose(proposing()))
            environment.info = dataclasses.replace(
                environment.info, attempt=2, heartbeat_details=[heartbeats[-1]]
            )
            answer = await environment.run(agents.answer, propose(proposing()))

    assert broken.value.type == "LlmUnreachable"
    assert (answer.usage.tokens_in, answer.usage.tokens_out) == (1_400, 180)
    assert answer.usage.asks == 2


TIMED_OUT = ActivityCancellationDetails(timed_out=True)
REQUESTED = ActivityCancellationDetails(cancel_requested=True)


@pytest.mark.parametrize("why", [REQUESTED, TIMED_OUT], ids=["cancelled", "timed out"])
async def test_a_call_that_is_stopped_reports_what_it_had_received(
    store: Redis, why: ActivityCancellationDetails
) -> None:
    environment = environment_of_a_run()
    heartbeats: list[Any] = []
    environment.on_heartbeat = heartbeats.append
    async with ScriptedLlm() as server:
        server.scripts["s"] = [
            lambda _: (HEAD, chunk("No."), STOP, COUNTED, DONE),
            lambda _: (HEAD, BEGIN, "hang"),
            lambda _: (HEAD, WHOLE),
        ]
        async with llm.connect(server.url("s"), "none") as client:
            agents = VllmAgents(client, store, "", PROMPTS)
            call = asyncio.ensure_future(environment.run(agents.answer, propose(proposing())))
            await until(lambda: any(beat["asks"] == 2 for beat in heartbeats))

            environment.cancel(why)

            expected = ApplicationError if why is REQUESTED else asyncio.CancelledError
            with pytest.raises(expected) as stopped:
                await call
            await until(lambda: "s" in server.left)
            environment = environment_of_a_run()
            environment.info = dataclasses.replace(
                environment.info, attempt=2, heartbeat_details=[heartbeats[-1]]
            )
            answer = await environment.run(agents.answer, propose(proposing()))

    at_the_end = CallUsage.model_validate(heartbeats[-1])
    assert (at_the_end.asks, at_the_end.estimated, at_the_end.role) == (2, True, "DEV")
    assert at_the_end.tokens_in > 700
    assert at_the_end.tokens_out == 90 + round(len(HALF) / 3)
    assert (answer.usage.asks, answer.usage.tokens_out) == (3, at_the_end.tokens_out + 90)
    if isinstance(stopped.value, ApplicationError):
        (usage,) = stopped.value.details
        assert (stopped.value.type, stopped.value.non_retryable) == ("Cancelled", True)
        assert usage.tokens == at_the_end.tokens


# --- other requests -------------------------------------------------------------------------------


async def test_a_model_that_was_renamed_behind_the_endpoint_is_looked_up_again(
    store: Redis,
) -> None:
    def serving(request: dict[str, Any]) -> Iterable[Step]:
        if request["model"] == server.models["e"]:
            return (HEAD, WHOLE)
        reply = error(f"The model `{request['model']}` does not exist.", code=404)
        return (raw_response(json.dumps(reply).encode(), "404 Not Found"),)

    async with ScriptedLlm() as server:
        server.scripts["e"], server.models["e"] = [serving], "old-model"
        async with llm.connect(server.url("e"), "none") as client:
            by_lookup = VllmAgents(client, store, "", PROMPTS)
            by_setting = VllmAgents(client, store, "old-model", PROMPTS)
            for agents in (by_lookup, by_setting):
                await environment_of_a_run().run(agents.answer, propose(proposing()))
            server.models["e"] = "new-model"

            answer = await environment_of_a_run().run(by_lookup.answer, propose(proposing()))
            with pytest.raises(ApplicationError, match="does not exist") as refusal:
                await environment_of_a_run().run(by_setting.answer, propose(proposing()))

    assert answer.usage.model == "new-model"
    assert (refusal.value.type, refusal.value.non_retryable) == ("LlmRefused", True)


async def test_an_answer_that_was_cut_off_is_asked_again_with_shorter_texts(store: Redis) -> None:
    def longest(request: dict[str, Any]) -> int:
        schema = json.dumps(request["response_format"])
        return max(map(int, re.findall(r'"maxLength": (\d+)', schema)))

    cut = (HEAD, BEGIN, chunk(finish="length"), COUNTED, DONE)
    whole = (HEAD, chunk('{"reason": "It is smaller.", "winner_id": "dev-2"}'), STOP, DONE)
    contenders = [Contender(agent_id=f"dev-{n}", score=1, proposal=SHORT) for n in (1, 2)]
    question = judge(JudgeInput(**dict(proposing()), contenders=contenders))
    async with ScriptedLlm() as server:
        server.scripts["cut"] = [lambda _: cut, lambda _: cut, lambda _: whole]

        met = await ask(server, "cut", store, question=question)

    assert met.answer is not None
    first, second, third = map(longest, met.requests)
    assert second <= first / 2
    assert third <= first / 3


@pytest.mark.parametrize("steps", [(), (HEAD,)])
async def test_a_cancelled_call_leaves_its_endpoint(store: Redis, steps: tuple[Step, ...]) -> None:
    async with ScriptedLlm() as server:
        server.scripts["c"] = [lambda _: (*steps, "hang")]
        async with llm.connect(server.url("c"), "none") as client:
            agents = VllmAgents(client, store, "test-model", PROMPTS)
            environment = environment_of_a_run()
            call = asyncio.ensure_future(environment.run(agents.answer, propose(proposing())))
            await until(lambda: "c" in server.requests)

            environment.cancel()

            with pytest.raises(asyncio.CancelledError):
                await call
            await until(lambda: "c" in server.left)


@pytest.mark.parametrize(
    ("status", "is_followed"), [("307 Temporary Redirect", True), ("302 Found", False)]
)
async def test_a_redirect_is_followed_where_it_keeps_the_method(
    store: Redis, status: str, is_followed: bool
) -> None:
    async with ScriptedLlm() as server:
        there = f"{server.url('there')}/chat/completions"
        server.scripts["there"] = [lambda _: (HEAD, WHOLE)]
        server.scripts["here"] = [lambda _: (raw_response(b"", status, Location=there),)]

        met = await ask(server, "here", store)

    assert bool(met.answer) == is_followed
    assert is_followed or there in str(met.error)


@pytest.mark.parametrize(
    ("body", "window"),
    [
        ({"data": [{"id": "m", "max_model_len": 4_096}]}, 4_096),
        ({"data": [{"id": "m", "max_model_len": None, "context_length": "2048"}]}, 2_048),
        ({"data": [{"id": "m", "meta": {"n_ctx": 1_024}}, "x", {"id": 7}]}, 1_024),
        ({"data": [{"id": "m", "metadata": {"max_request_context_length": 512}}]}, 512),
        ({"data": [{"id": "m", "max_model_len": -1}]}, 8_192),
        ({"data": None}, None),
        ([], None),
        ("models", None),
    ],
)
async def test_a_models_window_is_read_however_it_is_stated(body: Any, window: int | None) -> None:
    async with ScriptedLlm() as server, llm.connect(server.url("w"), "none") as client:
        server.listings["w"] = body
        if window is not None:
            assert await llm.served_models(client) == {"m": window}
            return
        with pytest.raises(ApplicationError, match="something else than models") as failure:
            await llm.served_models(client)
    assert failure.value.type == "LlmProtocol"
