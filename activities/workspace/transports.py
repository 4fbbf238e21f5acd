"""How git reaches the repositories that repositories.yaml names, with which credentials.

Credentials are files in the folder that REPOSITORY_CREDENTIALS names: `KEY.token` (https; a user
name may precede it, as in `user:token`), `KEY.key` (ssh, a private key without a passphrase),
`known_hosts` with the hosts' keys (ssh), and `ca.crt` with the authorities of the servers'
certificates (https; without it, those of the system). KEY is the key of the entry, and `STORE` for
the git server that has the stores.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from activities.workspace.git import SSH

_LOCAL = "git -c 'safe.directory=*' -c core.hooksPath=/dev/null -c core.alternateRefsCommand="
"""git at the other end of a file URL, which runs here and does not get our configuration."""


@dataclass(frozen=True)
class Transport:
    """The words, variables and configuration of a command that reaches a repository."""

    protocol: str
    fetch: tuple[str, ...] = ()
    push: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)


def transport(url: str, key: str, credentials: Path | None) -> Transport:
    """Return how git reaches a repository.

    Args:
        url: of the repository.
        key: names its credentials.
        credentials: the folder of all credentials; None: there are none.

    Raises:
        OSError: a credential cannot be read.
    """
    protocol = protocol_of(url)
    if protocol == "file":
        fetch, push = f"{_LOCAL} upload-pack", f"{_LOCAL} receive-pack"
        return Transport(protocol, (f"--upload-pack={fetch}",), (f"--receive-pack={push}",))
    if credentials is None:
        return Transport(protocol)
    if protocol == "ssh":
        return Transport(protocol, env={"GIT_SSH_COMMAND": _ssh(key, credentials)})
    config: dict[str, str] = {}
    authority, token = credentials / "ca.crt", credentials / f"{key}.token"
    if authority.exists():
        config["http.sslCAInfo"] = str(authority)
    if token.exists():
        pair = token.read_text().strip()
        pair = pair if ":" in pair else f"git:{pair}"
        header = f"Authorization: Basic {base64.b64encode(pair.encode()).decode()}"
        config[f"http.{url}.extraHeader"] = header
    return Transport(protocol, config=config)


def protocol_of(url: str) -> str:
    """Return the transport of a URL, or of `user@host:path`."""
    return urlsplit(url).scheme.lower() if "://" in url else "ssh"


def _ssh(key: str, credentials: Path) -> str:
    words = [SSH, "-oStrictHostKeyChecking=yes", "-oIdentitiesOnly=yes"]
    words.append(f"-oUserKnownHostsFile={shlex.quote(str(credentials / 'known_hosts'))}")
    if (credentials / f"{key}.key").exists():
        words.append(f"-i {shlex.quote(str(credentials / f'{key}.key'))}")
    return " ".join(words)
