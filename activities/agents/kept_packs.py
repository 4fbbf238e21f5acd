"""Context packs that calls refer to by their key in Valkey."""

from __future__ import annotations

from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import RedisError

from activities.cache import BLOCKS_TTL
from activities.kept_text import NOT_ENCRYPTED, TextCipher
from workflows.models.agents import AgentCall
from workflows.models.context import ContextPack
from workflows.models.errors import ErrorType, application_error

Call = TypeVar("Call", bound=AgentCall)


class KeptPacks:
    """Reads the packs that `Graph.keep_pack` has kept."""

    def __init__(self, valkey: Redis, cipher: TextCipher = NOT_ENCRYPTED) -> None:
        self._valkey, self._cipher = valkey, cipher

    async def in_full(self, call: Call) -> Call:
        """Return the call with the blocks of its pack, which is kept for longer from now.

        Raises:
            ApplicationError: `PackMissing`, not retryable: the workflow builds the pack again;
                `StoreUnreachable`.
        """
        key = call.pack.kept_at
        if not key:
            return call
        try:
            kept = cast("bytes | None", await self._valkey.getex(key, ex=BLOCKS_TTL))
        except RedisError as error:
            raise application_error(
                ErrorType.STORE_UNREACHABLE, f"Valkey cannot be asked for a context pack: {error}"
            ) from error
        if kept is None:
            raise application_error(
                ErrorType.PACK_MISSING, f"Valkey does not have the context pack {key}"
            )
        pack = ContextPack.model_validate_json(self._cipher.decrypt(kept))
        return call.model_copy(update={"pack": pack})
