"""The clients of a process. A failure to connect reports which server, where, and what to do.

Each client is a module, so that a command which needs one server does not load all clients.
"""

import ipaddress
import re
from collections.abc import Iterator
from itertools import chain

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


def raise_if_not_trusted(where: str, error: Exception, ca: str, address: str) -> None:
    """Report a connection that failed because the server's certificate was refused.

    Args:
        where: The server and its address.
        error: The error of the client.
        ca: The name of the setting with the CA.
        address: The name of the setting with the address.

    Raises:
        StartError: a certificate is the reason; it names the settings.
    """
    if why := next(filter(None, map(_refusal_of_certificate, _causes(error))), ""):
        raise StartError(
            f"{where}: its certificate is refused: {why}. Check {ca}, and the name in {address}"
        ) from error


def _causes(error: BaseException, seen: frozenset[int] = frozenset()) -> Iterator[BaseException]:
    """Yield an error and what led to it; an error may be its own cause."""
    yield error
    seen |= {id(error)}
    groups = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for inner in chain((error.__cause__, error.__context__), groups):
        if inner and id(inner) not in seen:
            yield from _causes(inner, seen)


def _refusal_of_certificate(error: BaseException) -> str:
    import ssl  # only where a connection failed

    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    # Temporal's client has no class for it.
    found = re.search(r"InvalidCertificate\((\w+)", f"{error}")
    return found[1] if found else ""


def redact_url(url: str) -> str:
    """Return the URL for display, without the user and password that it may contain."""
    return re.sub(r"//[^/@]*@", "//", url)
