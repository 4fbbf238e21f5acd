"""The JSON schema of an agent's next action, with the paths that it may change.

The decoder can write only allowed actions and paths: a path is one of an enum, or a new one that
matches a pattern made of the globs. Patterns are bounded, because decoders do not apply `maxLength`
beside them, and a small model writes until it is stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from workflows.models.implementation import COMMAND_CHARACTERS, ActionName

NAME = "[A-Za-z0-9_.-]{0,40}"
SEGMENT = "[A-Za-z0-9_][A-Za-z0-9_.-]{0,40}"
FOLDERS = f"({SEGMENT}/){{0,5}}"
ANYWHERE = "**"

_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|[^*?]+")
_SPECIAL = re.compile(r"([.+()|{}^$\[\]\\])")

Schema = dict[str, Any]


def action_schema(
    allowed: Sequence[ActionName],
    paths: Sequence[str],
    editable: Sequence[str],
    more_editable: bool,
    longest: Callable[[float], int],
) -> Schema:
    """Return the schema of an action.

    Args:
        allowed: the actions to choose from.
        paths: the globs that may change; empty: all.
        editable: files that exist and may change.
        more_editable: whether there are more of them.
        longest: share of the answer -> characters.
    """
    globs = list(paths) or [ANYWHERE]
    plain = [glob for glob in globs if not is_pattern(glob)]
    patterns = [path_pattern(glob) for glob in globs if is_pattern(glob)]
    known = list(dict.fromkeys(editable))
    new = _path(list(dict.fromkeys([*known, *plain])), patterns)
    old = _path(known, patterns if more_editable else [])
    shapes: dict[ActionName, Schema | None] = {
        "run": {"command": _text(1, min(longest(0.5), COMMAND_CHARACTERS))},
        "write": {"path": new, "content": _text(0, longest(0.85))} if new else None,
        "replace": {
            "path": old,
            "old": _text(1, longest(0.4)),
            "new": _text(0, longest(0.4)),
        }
        if old
        else None,
        "finish": _finish(longest),
    }
    variants = [
        _object({"action": {"const": name, "type": "string"}, **shape})
        for name in allowed
        if (shape := shapes[name])
    ]
    return variants[0] if len(variants) == 1 else {"anyOf": variants}


def is_pattern(glob: str) -> bool:
    """Return whether a glob can match more than one path."""
    return "*" in glob or "?" in glob


def path_pattern(glob: str) -> str:
    """Return a regular expression of paths that the glob matches; not of all of them."""
    parts = [_part(part) for part in _PARTS.findall(glob.removeprefix("/"))]
    return f"^{''.join(parts)}$"


def _part(part: str) -> str:
    match part:
        case "**/":
            return FOLDERS
        case "**":
            return FOLDERS + SEGMENT
        case "*":
            return NAME
        case "?":
            return "[A-Za-z0-9_-]"
    return _SPECIAL.sub(r"\\\1", part)


def _path(known: list[str], patterns: list[str]) -> Schema | None:
    choices: list[Schema] = [{"type": "string", "pattern": pattern} for pattern in patterns]
    if known:
        choices.insert(0, {"type": "string", "enum": known})
    if not choices:
        return None
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _text(shortest: int, longest: int) -> Schema:
    return {"type": "string", "minLength": shortest, "maxLength": longest}


def _finish(longest: Callable[[float], int]) -> Schema:
    decision = _object(
        {
            "title": _text(1, min(longest(0.03), 300)),
            "rationale": _text(1, min(longest(0.08), 4_000)),
            "affects": {"type": "array", "items": _text(1, longest(0.02)), "maxItems": 2},
        }
    )
    return {
        "summary": _text(1, longest(0.4)),
        "decisions": {"type": "array", "items": decision, "maxItems": 3},
    }


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
