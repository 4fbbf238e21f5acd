"""The LLM: any OpenAI-compatible vLLM."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from activities.agents import openai_client as llm
from activities.agents.llm_errors import CallFailed
from workers.clients.connection import (
    ANSWER_WITHIN_S,
    StartError,
    raise_if_not_trusted,
    redact_url,
    require_encryption,
    secret_value,
)
from workers.settings import Settings
from workflows.models.errors import ErrorType

LOOKED_UP_EVERY_S = 30.0
LOOKED_UP_WITHIN_S = 2.0


@dataclass(frozen=True)
class Engine:
    """The LLM's client, and the model for agents that name none (empty: the one that it serves)."""

    client: httpx.AsyncClient
    model: str


@asynccontextmanager
async def open_engine(settings: Settings) -> AsyncIterator[Engine]:
    """Open the LLM's client and check that the model is served.

    Raises:
        StartError: wrong address, credential or model.
    """
    where = f"The LLM at {redact_url(settings.vllm_url)}"
    client = _client(settings)
    async with client:
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                served = await llm.served_models(client)
        except (TimeoutError, CallFailed) as error:
            raise_if_not_trusted(where, error, "VLLM_CA_FILE", "VLLM_URL")
            raise StartError(f"{where} {_refusal(error)}") from error
        _require_model(settings, where, served)
        yield Engine(client, settings.vllm_model or "")


def _client(settings: Settings) -> httpx.AsyncClient:
    url = urlsplit(settings.vllm_url)
    if url.scheme != "https":
        require_encryption(settings, "VLLM_URL", url.hostname or "", "use https://")
    key = secret_value(settings.vllm_api_key) or "none"
    return llm.connect(settings.vllm_url, key, ca_file=settings.vllm_ca_file)


def _refusal(error: TimeoutError | CallFailed) -> str:
    match error:
        case CallFailed(status=401 | 403):
            return "refuses the key. Check VLLM_API_KEY"
        case CallFailed(status=int(status)):
            return (
                f"answers {status} to /models. Set VLLM_URL to an "
                "OpenAI-compatible API: it ends in /v1"
            )
        case TimeoutError() | CallFailed(type=ErrorType.LLM_UNREACHABLE | ErrorType.LLM_TIMEOUT):
            return "is not reachable. Start it (loading a model takes minutes), or set VLLM_URL"
    return (
        "does not answer /models as an OpenAI-compatible API does. "
        "Set VLLM_URL to one: it ends in /v1"
    )


class DefaultModel:
    """The model of agents that name none, for display only.

    It is VLLM_MODEL if set, else the model that the endpoint serves. The endpoint is asked at most
    every LOOKED_UP_EVERY_S. The model is empty while the endpoint does not answer, or if it serves
    several.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._model = ""
        self._looked_up_at = -LOOKED_UP_EVERY_S

    async def __call__(self) -> str:
        if self._settings.vllm_model:
            return self._settings.vllm_model
        if time.monotonic() - self._looked_up_at >= LOOKED_UP_EVERY_S:
            self._model = await self._served()
            self._looked_up_at = time.monotonic()
        return self._model

    async def _served(self) -> str:
        try:
            async with (
                asyncio.timeout(LOOKED_UP_WITHIN_S),
                _client(self._settings) as client,
            ):
                served = await llm.served_models(client)
        except (TimeoutError, CallFailed, StartError):
            return ""  # the agents' own calls report what is wrong
        return next(iter(served)) if len(served) == 1 else ""


def _require_model(settings: Settings, where: str, served: Mapping[str, int]) -> None:
    wanted = settings.vllm_model
    names = ", ".join(served) or "nothing"
    if wanted is None and len(served) != 1:
        raise StartError(f"{where} serves {names}. Set VLLM_MODEL to the one for the agents")
    if wanted and wanted not in served:
        raise StartError(
            f"{where} does not serve the model {wanted}, but {names}. "
            "Correct VLLM_MODEL or serve it"
        )
