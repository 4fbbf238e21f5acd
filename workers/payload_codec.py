"""Encryption of what Temporal stores: payloads are compressed, then encrypted (AES-256-GCM).

The codec works on whole payloads before Temporal's client sends them, and before the external
storage of large ones, so that Temporal and Valkey get cipher text only. A key's id is a hash of the
key: two keys never share an id. Payloads that are not encrypted are read as they are, for old
histories and clients without the codec. See docs/design/0014-payload-encryption.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.contrib.pydantic import PydanticPayloadConverter
from temporalio.converter import (
    CompositePayloadConverter,
    DataConverter,
    DefaultFailureConverter,
    EncodingPayloadConverter,
    PayloadCodec,
    PayloadConverter,
)
from temporalio.exceptions import ApplicationError

from activities.kept_text import NOT_ENCRYPTED, TextCipher
from workflows.models.errors import ErrorType, application_error

ENCRYPTED = b"binary/encrypted"
KEY_ID = "encryption-key-id"
COMPRESSION = "compression"
ZSTD = b"zstd"

KEY_BYTES = 32
NONCE_BYTES = 12
COMPRESSED_FROM_BYTES = 1024
"""Payloads of this size or larger are compressed. Smaller ones gain less than it costs."""


REFUSALS = frozenset({ErrorType.INVALID_INPUT, ErrorType.PERMISSION})
"""Errors that name fields, ids, rules and remedies, and quote no other value that was sent."""


ALTERED = "altered"
"""The metadata by which the codec marks an encrypted payload that was altered."""


class PayloadAltered(ValueError):
    """An encrypted payload is not what was encrypted. No retry can read it."""

    def __init__(self) -> None:
        super().__init__("was altered after it was encrypted: send it again, or restore it")


def unreadable(payload: Payload) -> PayloadAltered | ApplicationError | None:
    """Return why the codec has not decrypted the payload; None if it has.

    Returns:
        ApplicationError: `PayloadKeyMissing`, which is retried: a process may get the key.
        PayloadAltered: no retry can read it.
    """
    if payload.metadata.get("encoding") != ENCRYPTED:
        return None
    if ALTERED in payload.metadata:
        return PayloadAltered()
    name = payload.metadata.get(KEY_ID, b"").decode(errors="replace")[:64]
    return application_error(
        ErrorType.PAYLOAD_KEY_MISSING,
        f"is encrypted with the key {name}, which this process does not have: encrypt it with a "
        "key of the fleet, or add that key to PAYLOAD_KEYS",
    )


class EncryptionCodec(PayloadCodec):
    """A codec that encrypts with the first key and decrypts with any of them.

    Payloads that it cannot decrypt stay encrypted, because an error here would fail each task of a
    workflow that was sent one. Anyone who reads the payload gets the error of `unreadable`.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Use these keys, each of KEY_BYTES; the first encrypts."""
        self._ciphers = {key_id(key): AESGCM(key) for key in keys}
        self._encrypts = next(iter(self._ciphers.items()), None)
        self._compressor = zstandard.ZstdCompressor()

    async def encode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Compress and encrypt the payloads; without keys, return them as they are."""
        return [self.encrypted(payload) for payload in payloads]

    async def decode(self, payloads: Sequence[Payload]) -> list[Payload]:
        """Decrypt and decompress the payloads, except those that are not encrypted."""
        return [self.decrypted(payload) for payload in payloads]

    def encrypted(self, payload: Payload) -> Payload:
        """Return one payload as `encode` does."""
        if self._encrypts is None:
            return payload
        name, cipher = self._encrypts
        content = payload.SerializeToString()
        metadata = {"encoding": ENCRYPTED, KEY_ID: name}
        if len(content) >= COMPRESSED_FROM_BYTES:
            content = self._compressor.compress(content)
            metadata[COMPRESSION] = ZSTD
        nonce = os.urandom(NONCE_BYTES)
        data = nonce + cipher.encrypt(nonce, content, _authenticated(metadata))
        return Payload(metadata=metadata, data=data)

    def decrypted(self, payload: Payload) -> Payload:
        """Return one payload as `decode` does."""
        cipher = self._ciphers.get(payload.metadata.get(KEY_ID, b""))
        if payload.metadata.get("encoding") != ENCRYPTED or cipher is None:
            return payload
        nonce, data = payload.data[:NONCE_BYTES], payload.data[NONCE_BYTES:]
        try:
            content = cipher.decrypt(nonce, data, _authenticated(payload.metadata))
        except (InvalidTag, ValueError):  # ValueError: it is too short for a nonce
            marked = Payload(metadata=payload.metadata, data=payload.data)
            marked.metadata[ALTERED] = b"true"
            return marked
        if payload.metadata.get(COMPRESSION) == ZSTD:
            content = zstandard.decompress(content)
        return Payload.FromString(content)


class EncryptedText:
    """A cipher of texts in Valkey (`activities.kept_text.TextCipher`), in the form of payloads."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Use these keys, as in EncryptionCodec; there must be one."""
        self._codec = EncryptionCodec(keys)

    def encrypt(self, text: str) -> bytes:
        """Return the encrypted payload of the text, serialized."""
        return self._codec.encrypted(Payload(data=text.encode())).SerializeToString()

    def decrypt(self, kept: bytes) -> bytes:
        """Return the text; JSON from before there were keys is returned as it is.

        Raises:
            ApplicationError: `PayloadKeyMissing`.
            PayloadAltered: it is not what was kept.
        """
        if kept.startswith(b"{"):  # no serialized payload does
            return kept
        try:
            payload = Payload.FromString(kept)
        except DecodeError:
            raise PayloadAltered from None
        if payload.metadata.get("encoding") != ENCRYPTED:
            raise PayloadAltered
        text = self._codec.decrypted(payload)
        if error := unreadable(text):
            raise error
        return text.data


def text_cipher(keys: Sequence[bytes]) -> TextCipher:
    """Return the cipher of texts in Valkey; without keys, they are not encrypted."""
    return EncryptedText(keys) if keys else NOT_ENCRYPTED


class _Unreadable(EncodingPayloadConverter):
    """Reports the payloads that the codec could not decrypt."""

    @property
    def encoding(self) -> str:
        return ENCRYPTED.decode()

    def to_payload(self, value: Any) -> Payload | None:
        return None

    def from_payload(self, payload: Payload, type_hint: type | None = None) -> Any:
        error = unreadable(payload)
        assert error
        raise error


_CONVERTERS = (*PydanticPayloadConverter().converters.values(), _Unreadable())
"""Shared by all instances. The SDK makes an instance for each activity and each workflow, whose own
cache of pydantic's type adapters would be empty each time."""


class FleetPayloadConverter(CompositePayloadConverter):
    """Pydantic models as JSON; a payload that the codec has not decrypted raises why."""

    def __init__(self) -> None:
        super().__init__(*_CONVERTERS)


class FleetFailureConverter(DefaultFailureConverter):
    """Raises why a failure's message could not be decrypted, instead of leaving it out."""

    def from_failure(self, failure: Failure, payload_converter: PayloadConverter) -> BaseException:
        """Return the error of the failure."""
        if error := unreadable(failure.encoded_attributes):
            raise error
        return super().from_failure(failure, payload_converter)


class EncodedFailureConverter(FleetFailureConverter):
    """Puts messages and stack traces into payloads, which the codec encrypts.

    The messages of REFUSALS stay readable too: the `temporal` CLI shows no other reason.
    """

    def __init__(self) -> None:
        super().__init__(encode_common_attributes=True)

    def to_failure(
        self, exception: BaseException, payload_converter: PayloadConverter, failure: Failure
    ) -> None:
        """Write the exception into `failure`."""
        super().to_failure(exception, payload_converter, failure)
        if isinstance(exception, ApplicationError) and exception.type in REFUSALS:
            failure.message = exception.message


def encrypting_converter(keys: Sequence[bytes]) -> DataConverter:
    """Return a converter without external storage: Pydantic models as JSON, encrypted.

    The messages and stack traces of failures are encrypted too, because they quote what was sent.

    Args:
        keys: each of KEY_BYTES; the first encrypts, all decrypt. If there are none, nothing is
            encrypted.
    """
    return DataConverter(
        payload_converter_class=FleetPayloadConverter,
        payload_codec=EncryptionCodec(keys),
        failure_converter_class=(EncodedFailureConverter if keys else FleetFailureConverter),
    )


def payloads_of(message: Message) -> Iterator[Payload]:
    """Yield every payload in a message, however deep."""
    if isinstance(message, Payload):
        yield message
        return
    for field, value in message.ListFields():
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if isinstance(value, Message):
            values = [value]
        else:
            values = list(value.values() if isinstance(value, Mapping) else value)
        for each in values:
            if isinstance(each, Message):
                yield from payloads_of(each)


def key_id(key: bytes) -> bytes:
    """Return the id under which payloads name the key: 16 hexadecimal digits."""
    return hashlib.sha256(b"swe-ai-fleet payload key " + key).hexdigest()[:16].encode()


def _authenticated(metadata: Any) -> bytes:
    """Return the metadata that cannot be altered either (AES-GCM's additional data)."""
    return b"\0".join([ENCRYPTED, metadata[KEY_ID], metadata.get(COMPRESSION, b"")])
