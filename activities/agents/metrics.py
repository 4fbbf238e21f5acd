"""Metrics of calls to agents: requests, time and tokens, by model and act."""

from __future__ import annotations

from prometheus_client import Counter, Histogram

REQUESTS = Counter(
    "fleet_agent_requests",
    "Requests to agents; outcome: answered, or the type of the error",
    ["model", "act", "outcome"],
)
SECONDS = Histogram(
    "fleet_agent_request_seconds",
    "How long requests to agents take",
    ["model", "act"],
    buckets=(0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
TOKENS = Counter(
    "fleet_agent_tokens",
    "Tokens of requests to agents; kind: input, cached (a part of the input), output",
    ["model", "act", "kind"],
)


def count_request(model: str, act: str, outcome: str, seconds: float) -> None:
    """Count one request.

    Args:
        model: the requested model.
        act: what the agent was asked to do, such as propose.
        outcome: `answered`, or the type of the error.
        seconds: how long it took.
    """
    REQUESTS.labels(model, act, outcome).inc()
    SECONDS.labels(model, act).observe(seconds)


def count_tokens(model: str, act: str, tokens_in: int, tokens_out: int, cached: int = 0) -> None:
    """Count the tokens of one request.

    Args:
        model: the requested model.
        act: what the agent was asked to do.
        tokens_in: the tokens of the prompt.
        tokens_out: the tokens of the answer.
        cached: the tokens of the prompt that the engine had in its cache.
    """
    for kind, count in (("input", tokens_in), ("cached", cached), ("output", tokens_out)):
        TOKENS.labels(model, act, kind).inc(count)
