"""The clients of a process, opened with an answer or refused: which server, where, what to do.

Each is a module of its own: a command that needs one server does not load the clients of all.
"""

import re

from pydantic import SecretStr

ANSWER_WITHIN_S = 8.0
"""How long a server has to answer at start-up, in seconds."""


class StartError(Exception):
    """A process cannot start, or go on: one line that says which server, where, what to do."""


def plain(secret: SecretStr | None) -> str | None:
    """The secret itself, for the client that needs it."""
    return secret.get_secret_value() if secret else None


def words(error: Exception) -> str:
    """What an error says, on one line, cut to 300 characters."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def place(url: str) -> str:
    """The URL for people to read: without the user and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)
