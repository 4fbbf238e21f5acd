"""Users of NATS with keys instead of passwords: nkeys, and JWTs as `nsc` makes them."""

import json
import secrets
import time
from base64 import b32encode, urlsafe_b64encode
from hashlib import sha256
from typing import Any

import nkeys

PREFIXES = {
    "O": nkeys.PREFIX_BYTE_OPERATOR,
    "A": nkeys.PREFIX_BYTE_ACCOUNT,
    "U": nkeys.PREFIX_BYTE_USER,
}
UNLIMITED = -1


def new_key(kind: str) -> nkeys.KeyPair:
    """Make the key of an operator (O), an account (A) or a user (U)."""
    return nkeys.from_seed(nkeys.encode_seed(secrets.token_bytes(32), PREFIXES[kind]))


def public(key: nkeys.KeyPair) -> str:
    """Return the public key, as servers are configured with it."""
    return str(bytes(key.public_key).decode())


def seed(key: nkeys.KeyPair) -> str:
    """Return the seed, which only the key's owner has."""
    return str(bytes(key.seed).decode())


def token(issuer: nkeys.KeyPair, subject: nkeys.KeyPair, kind: str, **claims: Any) -> str:
    """Return a JWT of version 2 in which an issuer describes a subject."""
    body = {
        "iat": int(time.time()),
        "iss": public(issuer),
        "sub": public(subject),
        "name": kind,
        "nats": {"type": kind, "version": 2, **claims},
    }
    body["jti"] = b32encode(sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
    parts = [_encode(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": ALG}, body)]
    signed = ".".join(parts)
    return f"{signed}.{_encode(issuer.sign(signed.encode()))}"


ALG = "ed25519-nkey"


def _encode(part: bytes) -> str:
    return urlsafe_b64encode(part).decode().rstrip("=")


def server_configuration(operator: nkeys.KeyPair, account: nkeys.KeyPair) -> str:
    """Return the configuration of a server that trusts an operator with one account."""
    storage = ("mem_storage", "disk_storage", "streams", "consumer")
    connections = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")
    limits = dict.fromkeys((*storage, *connections), UNLIMITED) | {"wildcards": True}
    described = token(operator, account, "account", limits=limits)
    system = new_key("A")
    accounts = {public(account): described, public(system): token(operator, system, "account")}
    return (
        f"operator: {token(operator, operator, 'operator')}\n"
        f"system_account: {public(system)}\n"
        f"resolver: MEMORY\nresolver_preload: {json.dumps(accounts)}\n"
    )


def credentials(user: nkeys.KeyPair, account: nkeys.KeyPair) -> str:
    """Return a credentials file of a user whom an account vouches for."""
    limits = dict.fromkeys(("subs", "data", "payload"), UNLIMITED)
    jwt = token(account, user, "user", pub={}, sub={}, **limits)
    return (
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed(user)}\n------END USER NKEY SEED------\n"
    )
