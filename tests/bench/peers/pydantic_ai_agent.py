"""The agent of pydantic_ai_temporal.py; in its own module, which workflows do not load again."""

from __future__ import annotations

from pydantic_ai import Agent
from pydantic_ai.durable_exec.temporal import TemporalDurability
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.profiles.openai import OpenAIModelProfile

MODEL = OpenAIChatModel(
    "test-model",
    profile=OpenAIModelProfile(openai_chat_supports_max_completion_tokens=False),  # as vLLM
)
AGENT = Agent(MODEL, name="council", capabilities=[TemporalDurability()])
