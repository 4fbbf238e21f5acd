"""What a property of the graph is to its readers, whatever type it was written with.

Other systems write the same properties as native times, numbers, lists or nothing. Every read of
the graph converts here what it finds, and nowhere else; a value that has no meaning as what is
asked for counts as absent. No conversion raises: data is never an error.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any

import neo4j.time
from pydantic import BaseModel, BeforeValidator, ConfigDict

from workflows.clock import iso

MILLISECONDS_FROM = 10**11
"""A number of at least so much is a time in milliseconds, a smaller one in seconds."""

INT32 = (-(2**31), 2**31 - 1)
"""What counts, versions and priorities are on the wire."""


def instant(value: Any) -> datetime | None:
    """A time in UTC: of ISO 8601 or a number as text, a number, a native time; or None.

    What has no offset is taken as UTC; a date is its first moment.
    """
    try:
        match value:
            case bool():
                return None
            case int() | float():
                seconds = value / 1000 if abs(value) >= MILLISECONDS_FROM else value
                return datetime.fromtimestamp(seconds, UTC)
            case neo4j.time.DateTime():
                return _in_utc(value.to_native())
            case neo4j.time.Date():
                return datetime(value.year, value.month, value.day, tzinfo=UTC)
            case str():
                return _of_text(value.strip())
    except (ValueError, OverflowError, OSError, AttributeError, TypeError):
        return None
    return None


def _of_text(text: str) -> datetime | None:
    try:
        return _in_utc(datetime.fromisoformat(text))
    except ValueError:
        return instant(float(text))


def _in_utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def text(value: Any) -> str:
    """Any value as text; nothing, bytes and points are the empty text."""
    match value:
        case str():
            return value
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case neo4j.time.DateTime() | neo4j.time.Date():
            at = instant(value)
            return iso(at) if at else value.iso_format()
        case neo4j.time.Time() | neo4j.time.Duration():
            return value.iso_format()
        case list() | set() | frozenset():
            return ", ".join(texts(list(value)))
    return ""


def texts(value: Any) -> list[str]:
    """A list of texts; a single value is a list of one, and what is no text is left out."""
    values = value if isinstance(value, list) else [value]
    return [said for each in values if (said := text(each))]


def time_text(value: Any) -> str:
    """A time in UTC as ISO 8601; what is no time, as its text."""
    at = instant(value)
    return iso(at) if at else text(value)


def number(value: Any) -> int | None:
    """A whole number, also one as text, or None. One that int32 cannot hold is the nearest."""
    found = real(value)
    return None if found is None else int(min(max(found, INT32[0]), INT32[1]))


def real(value: Any) -> float | None:
    """A finite number, also one as text, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def yes(value: Any) -> bool:
    """Whether it is true, also as a number or text."""
    return value is True or value == 1 or text(value).strip().lower() in ("true", "yes")


Instant = Annotated[datetime | None, BeforeValidator(instant)]
Text = Annotated[str, BeforeValidator(text)]
Texts = Annotated[list[str], BeforeValidator(texts)]
TimeText = Annotated[str, BeforeValidator(time_text)]
Real = Annotated[float, BeforeValidator(lambda value: real(value) or 0.0)]
Number = Annotated[int, BeforeValidator(lambda value: number(value) or 0)]
MaybeNumber = Annotated[int | None, BeforeValidator(number)]
MaybeReal = Annotated[float | None, BeforeValidator(real)]
Flag = Annotated[bool, BeforeValidator(yes)]


class Row(BaseModel):
    """What a query returns, converted by the types of the fields; what is missing has a default."""

    model_config = ConfigDict(frozen=True, extra="ignore")
