"""Which URLs of git repositories are used: they hold no credentials and run no program."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_TRANSPORTS = ("https", "ssh", "file")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_SCP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[^:].*")
"""`user@host:path`, which git takes for ssh."""


def is_url(place: str) -> bool:
    """Return whether a text is a URL, or `user@host:path`, and not the path of a folder."""
    return "://" in place or bool(_SCP.fullmatch(place))


def url_problem(url: str) -> str:
    """Return the rule that a repository's URL breaks and the remedy; empty if none."""
    if url.startswith("-") or re.search(r"[\x00-\x20\x7f]", url):
        return "a URL has no leading '-' and no spaces or control characters; correct it"
    if "://" not in url:
        if _SCP.fullmatch(url):
            return ""
        shown = url.partition("::")[0] if "::" in url else "a path"
        return f"{shown} is not a transport that is used; write file:///..., https:// or ssh://"
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        return f"is not a URL ({error}); correct it"
    scheme = parts.scheme.lower()
    if "::" in parts.scheme or scheme not in (*_TRANSPORTS, "http"):
        return f"{scheme} is not a transport that is used; use {', '.join(_TRANSPORTS)}"
    if parts.password is not None or (parts.username and scheme != "ssh"):
        return (
            "a URL has no credentials: histories hold it. Remove them; put a token or a key into "
            "the folder that REPOSITORY_CREDENTIALS names"
        )
    if parts.query or parts.fragment:
        return "a URL has no query and no fragment: they may be credentials; remove them"
    if scheme == "http" and host not in _LOOPBACK:
        return f"http to {host} is plain text; use https"
    if scheme == "file" and (host not in ("", "localhost") or not parts.path.strip("/")):
        return "a file URL is absolute and without a host; write file:///..."
    if scheme != "file" and (not host or host.startswith("-")):
        return "a URL names a host; correct it"
    return ""
