"""Conversion of graph properties for readers, whatever type they were written with.

Other systems write the same properties as native times, numbers, lists or nothing. Every read of
the graph converts its values here, and only here; a value that has no meaning as the requested type
counts as absent. No conversion raises: data is never an error. See
docs/design/0010-reading-what-others-write.md.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Annotated, Any

import neo4j.time
from pydantic import BaseModel, BeforeValidator, ConfigDict

from workflows.timestamps import format_timestamp

MILLISECONDS_FROM = 10**11
"""A number from this value on is a time in milliseconds, a smaller one in seconds."""

NUMBER = re.compile(r"\d{9,}|\d+\.\d+")
"""Texts that are numbers although ISO 8601 allows a date without dashes, and any character between
it and the time: 38381021.03 as a date is in the year 3838, 1772102512345 in 1772."""

INT32 = (-(2**31), 2**31 - 1)
"""The range of counts, versions and priorities in the API."""


def instant(value: Any) -> datetime | None:
    """Convert a native time, a number, or a text (ISO 8601 or a number) to UTC, or return None.

    A time without an offset is taken as UTC; a date stands for its first moment.
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
    if NUMBER.fullmatch(text):
        return instant(float(text))
    try:
        return _in_utc(datetime.fromisoformat(text))
    except ValueError:
        return instant(float(text))


def _in_utc(at: datetime) -> datetime:
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def text(value: Any) -> str:
    """Convert any value to text; None, bytes and points become the empty text."""
    match value:
        case str():
            return value
        case bool():
            return str(value).lower()
        case int() | float():
            return str(value)
        case neo4j.time.DateTime() | neo4j.time.Date():
            at = instant(value)
            return format_timestamp(at) if at else value.iso_format()
        case neo4j.time.Time() | neo4j.time.Duration():
            return value.iso_format()
        case list() | set() | frozenset():
            return ", ".join(texts(list(value)))
    return ""


def texts(value: Any) -> list[str]:
    """Convert to a list of texts; a single value becomes a list of one, empty texts are skipped."""
    values = value if isinstance(value, list) else [value]
    return [converted for each in values if (converted := text(each))]


def time_text(value: Any) -> str:
    """Convert a time to ISO 8601 in UTC; any other value to its text."""
    at = instant(value)
    return format_timestamp(at) if at else text(value)


def number(value: Any) -> int | None:
    """Convert a number, also one as text, to an integer limited to int32, or return None."""
    found = real(value)
    return None if found is None else int(min(max(found, INT32[0]), INT32[1]))


def real(value: Any) -> float | None:
    """Convert a finite number, also one as text, or return None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def yes(value: Any) -> bool:
    """Return whether the value is true, also as a number or text."""
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
    """A row of a query, converted by the types of its fields; missing values get the default."""

    model_config = ConfigDict(frozen=True, extra="ignore")
