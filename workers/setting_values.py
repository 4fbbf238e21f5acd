"""The kinds of values that settings have, each with its rule."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, StringConstraints

from workflows.rules.repository_urls import is_url, url_problem


def _seconds(value: Any) -> timedelta:
    try:
        duration = value if isinstance(value, timedelta) else timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        duration = timedelta(-1)
    if duration < timedelta():
        raise ValueError("must be a number of seconds, 0 or more")
    return duration


Seconds = Annotated[timedelta, BeforeValidator(_seconds)]
"""A duration, written as a number of seconds."""

PositiveSeconds = Annotated[timedelta, Field(gt=timedelta()), BeforeValidator(_seconds)]

DeliberationSeconds = Annotated[
    timedelta, Field(gt=timedelta(), le=timedelta(days=1)), BeforeValidator(_seconds)
]
"""A timeout of a deliberation, with the limits of DeliberationInput."""


def _store_place(place: Any) -> Any:
    """Refuse a URL that git does not use; anything else is the path of a folder."""
    text = str(place)
    if is_url(text) and (problem := url_problem(text)):
        raise ValueError(problem)
    return text


StorePlace = Annotated[str, BeforeValidator(_store_place)]
"""A folder, or the URL of a git server."""

Port = Annotated[int, Field(ge=1, le=65535)]
HostPort = Annotated[
    str, StringConstraints(pattern=r"^[^\s:/]+:\d{1,5}$|^\[[0-9a-fA-F:]+\]:\d{1,5}$")
]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://\S+$")]


def api_url(url: Any) -> Any:
    """Return the base URL of an OpenAI-compatible API, with `/v1` if its path has no version."""
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        return url  # the pattern rejects it
    base = url.rstrip("/")
    return base if re.search(r"/v\d", urlsplit(base).path) else f"{base}/v1"


ORIGINS = r"^https?://[^\s,/]+(,https?://[^\s,/]+)*$"

ApiUrl = Annotated[HttpUrl, BeforeValidator(api_url)]


def require_keys(text: str | None) -> None:
    """Refuse a text that is not a list of keys.

    Raises:
        ValueError: the rule, and how to make one.
    """
    if text is not None and not re.fullmatch(
        r"\s*[0-9a-fA-F]{64}([\s,]+[0-9a-fA-F]{64})*\s*", text
    ):
        raise ValueError(
            "must be keys of 64 hexadecimal digits, separated by commas or lines; "
            "`openssl rand -hex 32` makes one"
        )


def read_secret(path: Path) -> str:
    """Return the content of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


NKEY_SEED = r"SU[A-Z2-7]{56}"
"""The seed of an nkey of a user."""
