"""The LLM: any OpenAI-compatible vLLM."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from activities import llm
from activities.llm_errors import CallFailed
from workers.clients import ANSWER_WITHIN_S, StartError, place, plain
from workers.settings import Settings


@dataclass(frozen=True)
class Engine:
    """The LLM's client, and the model for agents that name none; empty: the one it serves."""

    client: httpx.AsyncClient
    model: str


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open the LLM's client and see that the model is served.

    Raises:
        StartError: wrong address, credential or model.
    """
    where = f"The LLM at {place(settings.vllm_url)}"
    client = llm.connect(settings.vllm_url, plain(settings.vllm_api_key) or "none")
    async with client:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                served = await llm.served_models(client)
        except (TimeoutError, CallFailed) as error:
            raise StartError(f"{where} {_refusal(error)}") from error
        _require_model(settings, where, served)
        yield Engine(client, settings.vllm_model or "")


def _refusal(error: TimeoutError | CallFailed) -> str:
    match error:
        case CallFailed(status=401 | 403):
            return "does not let us in. Mend VLLM_API_KEY"
        case CallFailed(status=int(status)):
            return (
                f"answers {status} to /models. Set VLLM_URL to an "
                "OpenAI-compatible API: it ends in /v1"
            )
        case TimeoutError() | CallFailed(type="LlmUnreachable" | "LlmTimeout"):
            return "is not reachable. Start it (loading a model takes minutes), or set VLLM_URL"
    return (
        "does not answer /models as an OpenAI-compatible API does. "
        "Set VLLM_URL to one: it ends in /v1"
    )


def _require_model(settings: Settings, where: str, served: Mapping[str, int]) -> None:
    wanted = settings.vllm_model
    names = ", ".join(served) or "nothing"
    if wanted is None and len(served) != 1:
        raise StartError(f"{where} serves {names}. Set VLLM_MODEL to the one for the agents")
    if wanted and wanted not in served:
        raise StartError(
            f"{where} does not serve the model {wanted}, but {names}. Mend VLLM_MODEL or serve it"
        )
