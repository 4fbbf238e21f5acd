"""Temporal's External Storage on Valkey: payloads over 64 KiB are kept there, not in histories.

The codec comes first (workers/payload_codec.py): what is stored here, and measured, is compressed
and encrypted. The history then contains a claim: the SHA-256 of the payload's bytes. The key is
made of the same hash, so storing a payload again is harmless, and a retrieved payload can be
verified. Clients without this driver (the `temporal` CLI) write their payloads into the history;
a reader handles both kinds.

A payload is needed as long as any history has its claim, and several histories may. Every time it
is stored, it is kept for PAYLOAD_DAYS again, and `workers/payload_keeper.py` renews those of open
runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from datetime import timedelta

from redis.asyncio import Redis
from temporalio.api.common.v1 import Payload
from temporalio.converter import (
    DataConverter,
    ExternalStorage,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverStoreContext,
)

from workers.payload_codec import encrypting_converter
from workers.settings import PAYLOAD_DAYS

THRESHOLD_BYTES = 64 * 1024
"""Payloads of this size or larger are stored in Valkey."""

KEEP_FOR = timedelta(days=PAYLOAD_DAYS)


class PayloadMissing(LookupError):
    """Valkey does not have a payload that a history refers to."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"Valkey has no {key}, which a history claims: restore Valkey's append-only file, "
            "or point REDIS_HOST at the server that the history was written with"
        )


class PayloadDamaged(ValueError):
    """The bytes that Valkey has under a claim's key are not those that were stored."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} in Valkey is not what was stored: restore it from a backup")


class ValkeyStorageDriver(StorageDriver):
    """A driver that keeps payloads under `swe:payload:{sha256}`; its client must return bytes.

    Raises:
        redis.exceptions.RedisError: when Valkey did not carry out a command; Temporal then retries.
        PayloadMissing, PayloadDamaged: on retrieval.
    """

    def __init__(self, client: Redis, keep_for: timedelta = KEEP_FOR) -> None:
        self._client = client
        self._keep_for = keep_for

    def name(self) -> str:
        """Return the name that claims contain; histories store it, so it never changes."""
        return "valkey"

    async def store(
        self, context: StorageDriverStoreContext, payloads: Sequence[Payload]
    ) -> list[StorageDriverClaim]:
        """Store the payloads; one that is already stored stays as it is, and is kept longer."""
        claims = []
        async with self._client.pipeline(transaction=False) as pipe:
            for payload in payloads:
                content = payload.SerializeToString(deterministic=True)
                digest = hashlib.sha256(content).hexdigest()
                pipe.set(payload_key(digest), content, nx=True, px=self._keep_for)
                pipe.pexpire(payload_key(digest), self._keep_for)
                claims.append(StorageDriverClaim({"sha256": digest}))
            await pipe.execute()
        return claims

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        """Fetch the payloads and verify each against its hash."""
        digests = [claim.claim_data["sha256"] for claim in claims]
        contents = await self._client.mget([payload_key(digest) for digest in digests])
        return [
            _payload(digest, content) for digest, content in zip(digests, contents, strict=True)
        ]


def data_converter(
    client: Redis, keep_for: timedelta = KEEP_FOR, keys: Sequence[bytes] = ()
) -> DataConverter:
    """Return the fleet's converter: Pydantic models as JSON, encrypted, large ones in Valkey.

    Args:
        client: A client of Valkey that returns bytes.
        keep_for: How long a payload is kept in Valkey after it was last stored or renewed.
        keys: As for `encrypting_converter`.
    """
    storage = ExternalStorage(
        drivers=[ValkeyStorageDriver(client, keep_for)], payload_size_threshold=THRESHOLD_BYTES
    )
    return dataclasses.replace(encrypting_converter(keys), external_storage=storage)


def payload_key(digest: str) -> str:
    """Return the key in Valkey of the payload with this SHA-256."""
    return f"swe:payload:{digest}"


def _payload(digest: str, content: bytes | str | None) -> Payload:
    if content is None:
        raise PayloadMissing(payload_key(digest))
    if not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() != digest:
        raise PayloadDamaged(payload_key(digest))
    return Payload.FromString(content)
