"""The clients of a process. A failure to connect reports which server, where, and what to do.

Each client is a module, so that a command which needs one server does not load all clients.
"""

import re

from pydantic import SecretStr

ANSWER_WITHIN_S = 8.0
"""How long a server has to answer at start-up, in seconds."""


class StartError(Exception):
    """A process cannot start or continue: one line with the server, its address and what to do."""


def secret_value(secret: SecretStr | None) -> str | None:
    """Return the secret itself, for the client that needs it."""
    return secret.get_secret_value() if secret else None


def one_line(error: Exception) -> str:
    """Return an error's message on one line, cut to 300 characters."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def redact_url(url: str) -> str:
    """Return the URL for display, without the user and password that it may contain."""
    return re.sub(r"//[^/@]*@", "//", url)
