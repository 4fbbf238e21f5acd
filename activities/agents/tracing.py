"""Spans of calls to agents, by OpenTelemetry's conventions for generative AI.

Prompts and answers are not in them.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import httpx
from opentelemetry import trace
from opentelemetry.semconv._incubating.attributes.gen_ai_attributes import (
    GEN_AI_AGENT_ID,
    GEN_AI_AGENT_NAME,
    GEN_AI_OPERATION_NAME,
    GEN_AI_OUTPUT_TYPE,
    GEN_AI_PROVIDER_NAME,
    GEN_AI_REQUEST_MAX_TOKENS,
    GEN_AI_REQUEST_MODEL,
    GEN_AI_REQUEST_SEED,
    GEN_AI_REQUEST_STREAM,
    GEN_AI_REQUEST_TEMPERATURE,
)
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT

from workflows.models.agents import Agent

PROVIDER = "vllm"

tracer = trace.get_tracer(__name__)


def chat_span(
    url: httpx.URL, model: str, temperature: float, max_tokens: int, seed: int
) -> AbstractContextManager[trace.Span]:
    """Return the span of one request to an OpenAI-compatible endpoint.

    Args:
        url: the endpoint.
        model: the requested model.
        temperature: that of the request.
        max_tokens: the maximum number of tokens of the answer.
        seed: that of the request.
    """
    return tracer.start_as_current_span(
        f"chat {model}",
        kind=trace.SpanKind.CLIENT,
        attributes={
            GEN_AI_OPERATION_NAME: "chat",
            GEN_AI_PROVIDER_NAME: PROVIDER,
            GEN_AI_REQUEST_MODEL: model,
            GEN_AI_REQUEST_TEMPERATURE: temperature,
            GEN_AI_REQUEST_MAX_TOKENS: max_tokens,
            GEN_AI_REQUEST_SEED: seed,
            GEN_AI_REQUEST_STREAM: True,
            GEN_AI_OUTPUT_TYPE: "json",
            SERVER_ADDRESS: url.host,
            SERVER_PORT: url.port or {"https": 443}.get(url.scheme, 80),
        },
    )


def name_agent(agent: Agent) -> None:
    """Name the agent in the span of the activity that calls it."""
    trace.get_current_span().set_attributes(
        {GEN_AI_AGENT_ID: agent.agent_id, GEN_AI_AGENT_NAME: agent.role}
    )
