"""The clients of a process. A failure to connect reports which server, where, and what to do.

Each client is a module, so that a command which needs one server does not load all clients.
"""

import ipaddress
import re

from pydantic import SecretStr

from workers.settings import Settings

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


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach that address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def require_encryption(settings: Settings, setting: str, host: str, remedy: str) -> None:
    """Refuse to send credentials and stories to another machine in plain text.

    Args:
        settings: ALLOW_PLAIN_TEXT.
        setting: The name of the setting with the address.
        host: The host of the connection, which has no TLS.
        remedy: How TLS is switched on.

    Raises:
        StartError: the host is not this machine, and ALLOW_PLAIN_TEXT is not set.
    """
    if not (is_loopback(host) or settings.allow_plain_text):
        raise StartError(
            f"{setting} names {host}, and the connection would be in plain text: {remedy}, or set "
            "ALLOW_PLAIN_TEXT=true if the network is to be trusted"
        )


def redact_url(url: str) -> str:
    """Return the URL for display, without the user and password that it may contain."""
    return re.sub(r"//[^/@]*@", "//", url)
