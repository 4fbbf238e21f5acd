"""Encrypted payloads: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.api.common.v1 import Payload
from temporalio.api.failure.v1 import Failure
from temporalio.exceptions import ApplicationError, FailureError

from workers.payload_codec import (
    COMPRESSED_FROM_BYTES,
    COMPRESSION,
    ENCRYPTED,
    KEY_ID,
    REFUSALS,
    EncryptedText,
    EncryptionCodec,
    PayloadAltered,
    encrypting_converter,
    key_id,
    text_cipher,
    unreadable,
)
from workflows.models.errors import ErrorType, application_error

KEY, OTHER, THIRD = bytes(32), bytes(range(32)), b"k" * 32

payloads = st.builds(
    Payload,
    metadata=st.dictionaries(st.text(max_size=20), st.binary(max_size=20), max_size=4),
    data=st.one_of(
        st.binary(max_size=2 * COMPRESSED_FROM_BYTES),
        st.integers(0, 200_000).map(lambda size: b"brief " * size),
    ),
).filter(lambda payload: payload.metadata.get("encoding") != ENCRYPTED)


async def encrypted(payload: Payload, *keys: bytes) -> Payload:
    (result,) = await EncryptionCodec(keys or [KEY]).encode([payload])
    return result


async def decrypted(payload: Payload, *keys: bytes) -> Payload:
    (result,) = await EncryptionCodec(keys or [KEY]).decode([payload])
    return result


async def refused(payload: Payload, *keys: bytes) -> bool:
    return isinstance(unreadable(await decrypted(payload, *keys)), PayloadAltered)


def text(words: str) -> Payload:
    return Payload(metadata={"encoding": b"json/plain"}, data=json.dumps(words).encode())


@given(payload=payloads)
async def test_what_is_encrypted_is_read_again(payload: Payload) -> None:
    result = await encrypted(payload)

    assert result.metadata["encoding"] == ENCRYPTED
    assert await decrypted(result) == payload


@given(payload=payloads)
async def test_a_payload_without_encryption_is_read_as_it_is(payload: Payload) -> None:
    assert await decrypted(payload) == payload


@given(payload=payloads, first=st.permutations([KEY, OTHER, THIRD]), new=st.booleans())
async def test_every_key_decrypts_while_the_first_encrypts(
    payload: Payload, first: Sequence[bytes], new: bool
) -> None:
    result = await encrypted(payload, *first)

    assert result.metadata[KEY_ID] == key_id(first[0])
    rotated = [THIRD, *first] if new else [first[1], first[0]]
    assert await decrypted(result, *rotated) == payload


@given(
    payload=payloads,
    at=st.integers(0),
    bit=st.integers(0, 7),
)
async def test_an_altered_bit_is_refused(payload: Payload, at: int, bit: int) -> None:
    result = await encrypted(payload)
    data = bytearray(result.data)
    data[at % len(data)] ^= 1 << bit
    result.data = bytes(data)

    assert await refused(result, KEY)


@given(payload=payloads, cut=st.integers(1, 40))
async def test_a_truncated_payload_is_refused(payload: Payload, cut: int) -> None:
    result = await encrypted(payload)
    result.data = result.data[:-cut]

    assert await refused(result, KEY)


async def test_a_payload_under_the_id_of_another_key_is_refused() -> None:
    result = await encrypted(text("brief"))
    result.metadata[KEY_ID] = key_id(OTHER)

    assert await refused(result, KEY, OTHER)


@pytest.mark.parametrize("size", [10, 10 * COMPRESSED_FROM_BYTES])
async def test_the_mark_of_compression_cannot_be_altered(size: int) -> None:
    result = await encrypted(text("b" * size))
    if COMPRESSION in result.metadata:
        del result.metadata[COMPRESSION]
    else:
        result.metadata[COMPRESSION] = b"zstd"

    assert await refused(result, KEY)


@pytest.mark.parametrize("keys", [[], [OTHER]])
async def test_an_unknown_key_is_named_and_waited_for(keys: list[bytes]) -> None:
    (payload,) = await encrypting_converter([KEY]).encode(["brief"])
    failure = Failure()
    await encrypting_converter([KEY]).encode_failure(ValueError("brief"), failure)
    known_as, reader = key_id(KEY).decode(), encrypting_converter(keys)

    for reading in (reader.decode([payload]), reader.decode_failure(failure)):
        with pytest.raises(ApplicationError, match=f"key {known_as}, .*PAYLOAD_KEYS") as error:
            await reading
        assert error.value.type == ErrorType.PAYLOAD_KEY_MISSING
        assert not error.value.non_retryable


async def test_without_a_key_id_no_key_is_tried() -> None:
    (payload,) = await encrypting_converter([KEY]).encode(["brief"])
    del payload.metadata[KEY_ID]

    with pytest.raises(ApplicationError):
        await encrypting_converter([KEY]).decode([payload])


async def test_a_value_that_was_altered_is_not_converted() -> None:
    converter = encrypting_converter([KEY])
    (payload,) = await converter.encode(["brief"])
    payload.data = payload.data[:-1] + bytes([payload.data[-1] ^ 1])

    with pytest.raises(PayloadAltered, match="altered after it was encrypted"):
        await converter.decode([payload])


async def test_two_equal_values_are_encrypted_differently() -> None:
    assert await encrypted(text("brief")) != await encrypted(text("brief"))


async def test_a_large_text_is_compressed_first() -> None:
    large = text("As a reader of stories, I want less of the same. " * 2_000)

    assert (await encrypted(large)).ByteSize() < large.ByteSize() / 20


async def test_a_failure_shows_neither_its_message_nor_its_details() -> None:
    converter = encrypting_converter([KEY])
    failure = Failure()
    try:
        try:
            raise ValueError("canary one")
        except ValueError as cause:
            raise ApplicationError("canary two", "canary three", type="Refused") from cause
    except ApplicationError as error:
        await converter.encode_failure(error, failure)

    assert b"canary" not in failure.SerializeToString()
    read = await converter.decode_failure(failure)
    assert isinstance(read, ApplicationError)
    assert (read.message, read.type, list(read.details)) == (
        "canary two",
        "Refused",
        ["canary three"],
    )
    assert isinstance(read.cause, FailureError)
    assert read.cause.message == "canary one"


@pytest.mark.parametrize("kind", sorted(REFUSALS))
async def test_the_message_of_a_refusal_can_be_read_without_a_key(kind: ErrorType) -> None:
    converter = encrypting_converter([KEY])
    failure = Failure()
    try:
        raise application_error(kind, "title: required; add it")
    except ApplicationError as error:
        await converter.encode_failure(error, failure)

    assert (failure.message, failure.stack_trace) == ("title: required; add it", "")
    read = await converter.decode_failure(failure)
    assert isinstance(read, ApplicationError)
    assert (read.message, read.type) == ("title: required; add it", kind)


async def test_without_keys_nothing_is_encrypted() -> None:
    converter = encrypting_converter([])
    failure = Failure()
    await converter.encode_failure(ApplicationError("plain", type="Refused"), failure)

    assert failure.message == "plain"
    assert (await converter.encode(["brief"]))[0] == text("brief")


# --- texts in Valkey ------------------------------------------------------------------------------


@given(words=st.text(), keys=st.permutations([KEY, OTHER]))
def test_a_text_is_read_again_with_each_key(words: str, keys: Sequence[bytes]) -> None:
    kept = EncryptedText(keys).encrypt(words)

    assert EncryptedText(keys[::-1]).decrypt(kept).decode() == words
    assert len(words) < 8 or words.encode() not in kept


def test_a_text_from_before_there_were_keys_is_read() -> None:
    kept = text_cipher([]).encrypt('{"approach": "brief"}')

    assert text_cipher([KEY]).decrypt(kept) == kept == b'{"approach": "brief"}'


@given(st.data())
def test_a_text_that_was_altered_is_refused(data: st.DataObject) -> None:
    kept = EncryptedText([KEY]).encrypt("brief")
    place = data.draw(st.integers(1, len(kept) - 1))
    altered = (
        kept[:place] + bytes([kept[place] ^ data.draw(st.integers(1, 255))]) + kept[place + 1 :]
    )

    with pytest.raises((PayloadAltered, ApplicationError)):
        EncryptedText([KEY]).decrypt(altered)


def test_a_text_with_an_unknown_key_waits_for_it() -> None:
    with pytest.raises(ApplicationError, match="PAYLOAD_KEYS") as error:
        EncryptedText([OTHER]).decrypt(EncryptedText([KEY]).encrypt("brief"))

    assert error.value.type == ErrorType.PAYLOAD_KEY_MISSING
    assert not error.value.non_retryable
