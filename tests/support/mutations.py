"""Random and mutated documents, from a seed: what an attacker or a broken sender may send."""

from __future__ import annotations

import copy
import json
import random
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MessageT = TypeVar("MessageT", bound=Message)

ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x" * 70_000,
    "\x00",
    "\ud83d",
    "\u202e\u2066",
    "' OR 1=1 --",
    "../../etc/passwd",
    "planning.>",
    "2026-13-45T99:99:99Z",
    "<script>",
    "{{ 7 * 7 }}",
    [],
    {},
    [[]],
    {"": ""},
    [None] * 1_000,
)

YAML = ("&a [*a]", "!!python/object:os.system x", "a: &a\n  <<: *a", "- " * 500, "2026-13-45", "? ")


def mutated(random: random.Random, document: Any) -> Any:
    """Return a copy of a JSON value with one to four random changes."""
    root = [copy.deepcopy(document)]
    for _ in range(random.randint(1, 4)):
        holder, key = _place(random, root)
        match random.randrange(6):
            case 0:
                holder[key] = copy.deepcopy(random.choice(ODD))
            case 1 if isinstance(holder, dict):
                del holder[key]
            case 2 if isinstance(holder, dict):
                holder[_text(random)] = copy.deepcopy(random.choice(ODD))
            case 3:
                holder[key] = [holder[key]]
            case 4:
                holder[key] = _deep(random.choice((5, 50, 2_000)))
            case _:
                holder[key] = _text(random)
    return root[0]


def reworded(random: random.Random, document: Any) -> Any:
    """Return a copy of a JSON value of the same shape, with other texts in one or two places."""
    copied = copy.deepcopy(document)
    for _ in range(random.randint(1, 2)):
        holder, key = _leaf(random, [copied])
        if isinstance(holder[key], str):
            holder[key] = random.choice([each for each in ODD if isinstance(each, str)])
    return copied


def encoded(random: random.Random, document: Any) -> bytes:
    """Return the JSON of a value, in most cases whole, else cut or with changed bytes."""
    try:
        data = bytearray(json.dumps(document, ensure_ascii=random.random() < 0.5).encode())
    except (UnicodeEncodeError, RecursionError, ValueError):
        data = bytearray(json.dumps("\ud83d").encode())
    return damaged(random, data)


def damaged(random: random.Random, data: bytearray) -> bytes:
    """Return the bytes, in some cases cut, or with some of them changed."""
    if data and random.random() < 0.2:
        del data[random.randrange(len(data)) :]
    if data and random.random() < 0.2:
        for _ in range(random.randint(1, 5)):
            data[random.randrange(len(data))] = random.randrange(256)
    return bytes(data)


def filled(random: random.Random, message: MessageT, depth: int = 0) -> MessageT:
    """Give random fields of the message values of their wire types; return the message."""
    texts = [each for each in ODD if isinstance(each, str) and each != "\ud83d"]
    for field in message.DESCRIPTOR.fields:
        if random.random() < 0.4 or depth > 3:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        times = random.randint(1, 3) if field.is_repeated else 1
        for _ in range(times):
            if field.message_type is not None:
                inner = getattr(message, field.name)
                filled(random, inner.add() if field.is_repeated else inner, depth + 1)
                continue
            value: Any = random.choice([*texts, "US-1", "DEV", "DESIGN"])
            if field.type != FieldDescriptor.TYPE_STRING:
                value = random.choice([0, 1, 2**31 - 1])
                if field.type in (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE):
                    value = random.choice([0.0, -1.0, float("nan"), float("inf"), 1e30])
                elif field.type == FieldDescriptor.TYPE_BOOL:
                    value = random.random() < 0.5
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def _place(random: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """Return a random place in the document: what holds it, and its key or index there."""
    holder: Any = root
    key: Any = 0
    while True:
        value = holder[key]
        if not isinstance(value, dict | list) or not value or random.random() < 0.2:
            return holder, key
        holder = value
        key = (
            random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        )


def _leaf(random: random.Random, root: list[Any]) -> tuple[Any, Any]:
    """Return a random place of a value that holds no other."""
    holder: Any = root
    key: Any = 0
    while (value := holder[key]) and isinstance(value, dict | list):
        holder = value
        key = (
            random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
        )
    return holder, key


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def _text(random: random.Random) -> str:
    return "".join(
        chr(random.choice((32, 47, 65, 97, 233, 0x202E, 0x1F600, 10, 0))) for _ in range(9)
    )
