"""The LLM: any OpenAI-compatible vLLM."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import openai

from activities import llm
from workers.clients import ANSWER_WITHIN_S, StartError, place, plain
from workers.settings import Settings


@dataclass(frozen=True)
class Engine:
    """The LLM's client, and the model for agents that name none."""

    client: openai.AsyncOpenAI
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
                served = [model.id async for model in client.models.list()]
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise StartError(f"{where} does not let us in. Mend VLLM_API_KEY") from error
        except openai.APIStatusError as error:
            raise StartError(
                f"{where} answers {error.status_code} to /models. Set VLLM_URL to an "
                "OpenAI-compatible API: it ends in /v1"
            ) from error
        except (TimeoutError, openai.APIConnectionError) as error:
            raise StartError(
                f"{where} is not reachable. Start it (loading a model takes minutes), "
                "or set VLLM_URL"
            ) from error
        except (openai.OpenAIError, ValueError, AttributeError, TypeError) as error:
            raise StartError(
                f"{where} does not answer /models as an OpenAI-compatible API does. "
                "Set VLLM_URL to one: it ends in /v1"
            ) from error
        yield Engine(client, _model(settings, where, served))


def _model(settings: Settings, where: str, served: list[str]) -> str:
    wanted = settings.vllm_model
    names = ", ".join(served) or "nothing"
    if wanted is None and len(served) == 1:
        return served[0]
    if wanted is None:
        raise StartError(f"{where} serves {names}. Set VLLM_MODEL to the one for the agents")
    if wanted not in served:
        raise StartError(
            f"{where} does not serve the model {wanted}, but {names}. Mend VLLM_MODEL or serve it"
        )
    return wanted
