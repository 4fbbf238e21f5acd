"""Secrets, and nothing else, are removed from the text that agents receive."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.agents.profiles import DEFAULT_PROFILE
from activities.agents.prompts import ACTS, SHARED, Prompts
from activities.graph.context_packs import assemble
from activities.graph.scope_reads import ScopeSection
from activities.graph.scopes import load_scopes
from activities.graph.sessions import Decided, Session, redacted
from activities.redaction import REDACTED, load_redaction
from tests.unit.activities.test_policy import KEY, RULES, SECRETS
from tests.unit.conftest import CONFIG
from workflows.models.context import PackQuery

REDACT = load_redaction()
PROMPTS = Prompts.load(CONFIG / "prompts")

# name -> (the text, the part of it that must not appear)
HELD: dict[str, tuple[str, str]] = {name: (text, text) for name, text in SECRETS.items()} | {
    "private_key": (
        "-----BEGIN RSA "
        + f"PRIVATE KEY-----\n{KEY}{KEY}\n{KEY[::-1]}\n-----END RSA PRIVATE KEY-----",
        KEY[::-1],
    ),
    "json_web_token": ("eyJ" + KEY + ".eyJ" + KEY + "." + KEY, KEY),
    "password_in_url": ("postgresql://app:" + "Tr0ub4dor9Q@db:5432/x", "Tr0ub4dor9Q"),
    "password_in_code": ("db_password = '" + "Tr0ub4dor9Q'", "Tr0ub4dor9Q"),
    "password_in_environment": ("DB_PASSWORD=" + "Tr0ub4dor9Q", "Tr0ub4dor9Q"),
    "high_entropy": (f"'{KEY}'", KEY),
}


def test_every_rule_on_secrets_has_a_sample_here() -> None:
    assert {rule["id"] for rule in RULES["secrets"]["rules"]} == set(HELD)


@pytest.mark.parametrize("rule", HELD)
@given(before=st.text(max_size=60), after=st.text(max_size=60))
def test_a_secret_is_redacted_wherever_it_stands_and_once_for_all(
    rule: str, before: str, after: str
) -> None:
    text, secret = HELD[rule]

    safe = REDACT(f"{before}\n{text}\n{after}")

    assert secret not in safe
    assert REDACTED in safe
    assert REDACT(safe) == safe


@given(
    text=st.lists(
        st.sampled_from(
            [
                *("the password is wrong", "password: ${DB_PASSWORD}", "sk-example-key"),
                *("as a user", "AKIA", "deadbeef" * 5, "token = 'your-token-here'", "<data>", "é"),
            ]
        )
    ).map("\n".join)
)
def test_a_text_without_secrets_is_unchanged(text: str) -> None:
    assert REDACT(text) == text


def test_many_secrets_in_one_text_are_each_redacted() -> None:
    text = " and ".join(text for text, _ in HELD.values())

    safe = REDACT(text)

    assert not any(secret in safe for _, secret in HELD.values())
    assert " and " in safe


SECRET = SECRETS["github_token"]


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("long", [False, True], ids=["whole", "cut"])
def test_no_prompt_of_any_act_contains_a_secret_from_any_value(act: str, long: bool) -> None:
    texts: Sequence[str] = (f"use {SECRET} here", "x " * 2_000 + SECRET) if long else (SECRET,)
    shared = {name: "\n".join(texts) for name in set().union(*SHARED.values())}
    material = {name: list(texts) if name == "contenders" else texts[-1] for name in ACTS[act]}

    prompt = PROMPTS.render(act, shared, material, window=2_048, profile=DEFAULT_PROFILE)
    again = PROMPTS.ask_again(prompt, f"my answer is {SECRET}", f"not JSON: {SECRET}", 2)

    sent = "\n".join(str(message["content"]) for message in again.messages)
    assert SECRET[8:30] not in sent
    assert long or REDACTED in sent


def test_a_pack_never_contains_part_of_a_secret() -> None:
    scopes = load_scopes(CONFIG / "scopes.yaml")
    query = PackQuery(story_id="US-1", role="DEV", phase="BUILD")

    for room in range(1, 60):
        line = "y " * room + SECRET
        pack = assemble(scopes, query, 150, [ScopeSection("CASE_HEADER", [line])], REDACT)
        assert SECRET[:12] not in pack.context


def test_every_text_of_a_session_is_redacted_and_its_ids_stay() -> None:
    row: dict[str, Any] = {"id": "d-1", "title": SECRET, "dependencies": ["t-1"], "priority": 1}
    session = Session(
        case={"case_id": "US-1", "description": SECRET},
        plan=None,
        tasks=[row],
        decisions=[Decided(row, "DEV", True, [row], ["d-0"])],
        milestones=[{"description": SECRET, "ts_ms": 7}],
        summary=SECRET,
    )

    safe = redacted(session, REDACT)

    assert SECRET not in repr(safe)
    assert safe.decisions[0].decision == row | {"title": REDACTED}
    assert (safe.case["case_id"], safe.milestones[0]["ts_ms"]) == ("US-1", 7)
