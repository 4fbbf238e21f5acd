"""The addresses that processes listen on."""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv6Address, ip_address

import psutil


def addresses_of(pids: Collection[int]) -> list[tuple[str, int]]:
    """Return every address and port that these processes listen on."""
    return [
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("tcp")
        if connection.laddr and connection.status == psutil.CONN_LISTEN and connection.pid in pids
    ]


def is_loopback(address: str) -> bool:
    """Return whether only this machine can connect."""
    parsed = ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return (mapped or parsed).is_loopback
