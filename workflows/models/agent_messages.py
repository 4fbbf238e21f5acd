"""The messages that external agents receive and send on NATS."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from workflows.models.base import Model
from workflows.models.events import Timestamp, WorkId, about

CALL_ID = "6f1d2c9a3b5e4d708192a3b4c5d6e7f8"


class AgentCommand(Model):
    """A call to an external agent, on `agent.cmd.{role}`.

    `call_id` is this one attempt's: an answer bears it. `prompt` is the whole prompt as text. The
    answer's content has the `answer_format`: Markdown as the prompt asks for, or a JSON document of
    `answer_schema`, which is accepted for every act.
    """

    task_id: WorkId
    story_id: Annotated[str, about("The story", "US-101")] = ""
    agent_id: Annotated[str, about("The agent that is asked", "agent-architect-1")]
    act: Annotated[str, about("What it is asked to do", "propose")]
    prompt: Annotated[
        str,
        about(
            "The whole prompt, as text", "You work in the ARCHITECT council of a software team. …"
        ),
    ]
    timestamp: Timestamp
    call_id: Annotated[str, about("This one attempt: the answer bears it", CALL_ID)]
    answer_format: Annotated[
        Literal["markdown", "json"],
        about("How the answer is best written; a JSON document is accepted too", "markdown"),
    ] = "json"
    answer_schema: Annotated[
        dict[str, Any],
        about("The JSON schema of an answer that is a JSON document", {"type": "object"}),
    ]
    max_tokens: Annotated[int, about("How long the answer may be, in tokens", 1_638)]
    temperature: Annotated[float, about("How freely to sample", 0.8)]
    seed: Annotated[int, about("The seed to sample with", 379_963_991)]


class AgentResponse(Model):
    """An external agent's word on `agent.response.{task_id}`.

    `working` says that it is alive and at it; `done` has `content`, `failed` has `error`.
    """

    task_id: WorkId
    agent_id: Annotated[str, about("The agent that answers", "agent-architect-1")]
    call_id: Annotated[str, about("The command's `call_id`", CALL_ID)]
    status: Annotated[
        Literal["working", "done", "failed"],
        about("`working`: alive and at it; `done`: has content; `failed`: has error", "done"),
    ]
    content: Annotated[
        str | None,
        about("The answer: Markdown, or a JSON document of the command's `answer_schema`", "{}"),
    ] = None
    error: Annotated[str | None, about("Why the agent failed")] = None
    duration_ms: Annotated[
        int, about("How long the agent took, in milliseconds", 41_250), Field(ge=0)
    ] = 0
    timestamp: Annotated[
        str, about("When it was published: ISO 8601", "2026-03-01T10:00:41.250Z")
    ] = ""
    model: Annotated[str, about("The model that answered", "SmolLM2-135M-Instruct")] = ""
    tokens_in: Annotated[int, about("How long the prompt was, in tokens", 1_830), Field(ge=0)] = 0
    tokens_out: Annotated[int, about("How long the answer was, in tokens", 412), Field(ge=0)] = 0
