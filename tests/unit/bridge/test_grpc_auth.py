"""Tokens: their actor, the access they give, and invalid ones."""

from datetime import timedelta

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from activities.tokens import Caller, create_token, read_token
from bridge.grpc.auth import Access, caller

KEY = "0123456789abcdef0123456789abcdef"
HOUR = timedelta(hours=1)
ANA = Caller(actor="ana", roles=frozenset({"PO"}))

actors = st.text(min_size=1, max_size=200).map(str.strip).filter(bool)
roles = st.frozensets(st.from_regex(r"[A-Z][A-Z0-9_]{0,31}", fullmatch=True), max_size=5)


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    return [("authorization", f"Bearer {token}")]


@given(actors, roles)
def test_a_token_names_its_actor_and_roles(actor: str, roles: frozenset[str]) -> None:
    made = Caller(actor=actor, roles=roles)

    for keys in ([KEY], [KEY[::-1], KEY], None):
        found = read_token(keys, create_token(KEY, made, HOUR))
        assert (found.actor, found.roles) == (made.actor, made.roles)


def refusal(key: str | None, token: str) -> str:
    with pytest.raises(ApplicationError) as refused:
        read_token([key] if key else None, token)
    assert refused.value.type == "Unauthenticated"
    return refused.value.message


def test_tokens_that_are_expired_unsigned_or_of_another_key_are_invalid() -> None:
    old = create_token(KEY, ANA, timedelta(seconds=-10))
    claims = jwt.decode(create_token(KEY, ANA, HOUR), options={"verify_signature": False})

    assert "Signature" in refusal(KEY, create_token(KEY[::-1], ANA, HOUR))
    assert "has expired" in refusal(KEY, old)
    assert "has expired" in refusal(None, old)
    assert refusal(KEY, jwt.encode(claims, "", algorithm="none"))
    assert "issuer" in refusal(KEY, jwt.encode(claims | {"iss": "others"}, KEY, "HS256"))
    assert "exp" in refusal(KEY, jwt.encode({"iss": "swe-ai-fleet", "sub": "a"}, KEY, "HS256"))
    assert refusal(KEY, jwt.encode(claims | {"roles": ["p o"]}, KEY, "HS256"))
    assert refusal(KEY, jwt.encode(claims | {"roles": 7}, KEY, "HS256"))


@given(st.text(max_size=300))
def test_no_text_is_a_token_by_chance(text: str) -> None:
    assert refusal(KEY, text)


@pytest.mark.parametrize(
    "metadata", [[], bearer(""), [("authorization", "Basic YTpi")], [("authorization", b"\xff")]]
)
async def test_a_call_without_a_token_gets_the_way_to_get_one(
    metadata: list[tuple[str, str | bytes]],
) -> None:
    with pytest.raises(ApplicationError, match="fleet token create") as refused:
        await Access([KEY], 10).admit(metadata)
    assert refused.value.type == "Unauthenticated"


async def test_the_caller_is_known_while_the_call_runs() -> None:
    found = await Access([KEY], 10).admit(bearer(create_token(KEY, ANA, HOUR)))

    assert (found.actor, found.roles) == (ANA.actor, ANA.roles)
    assert caller() == found


def test_a_role_that_the_token_lacks_is_refused_with_those_it_has() -> None:
    assert ANA.require_role("QA", "PO") == "PO"
    with pytest.raises(ApplicationError, match="needs the role QA; the token of ana has PO") as no:
        ANA.require_role("QA")
    assert no.value.type == "Permission"


async def test_one_actor_is_limited_and_another_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("bridge.grpc.auth.time.monotonic", lambda: now)
    access = Access([KEY], 5)
    ana, ben = (bearer(create_token(KEY, Caller(actor=who), HOUR)) for who in ("ana", "ben"))
    for _ in range(10):
        await access.admit(ana)

    with pytest.raises(ApplicationError, match="ana makes more than 5 calls a second") as refused:
        await access.admit(ana)
    await access.admit(ben)
    now += 0.2
    await access.admit(ana)

    assert refused.value.type == "RateLimit"


async def test_every_valid_caller_may_call_once() -> None:
    await Access([KEY], 0.1).admit(bearer(create_token(KEY, ANA, HOUR)))


@pytest.mark.parametrize("actor", ["policy:auto", "Policy:x"])
def test_no_token_names_a_policy(actor: str) -> None:
    claims = jwt.decode(create_token(KEY, ANA, HOUR), options={"verify_signature": False})

    assert "is reserved" in refusal(KEY, jwt.encode(claims | {"sub": actor}, KEY, "HS256"))
    with pytest.raises(ApplicationError, match="is reserved"):
        Caller(actor=actor)
