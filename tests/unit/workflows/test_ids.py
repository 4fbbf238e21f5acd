"""Ids: which texts are valid, and how they are encoded in workflow ids, subjects and keys."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from activities.cache import pack_key, timeline_key
from bridge.agents.responses import response_subject
from workflows.models.ids import (
    ID_PATTERN,
    Id,
    LongId,
    Role,
    called_deliberation_workflow_id,
    context_workflow_id,
    decode_id,
    deliberation_workflow_id,
    derivation_workflow_id,
    encode_id,
    plan_workflow_id,
    story_of,
    story_workflow_id,
    task_of,
)

IDS = st.from_regex(ID_PATTERN, fullmatch=True).filter(lambda text: text.isascii())
SAFE = re.compile(r"[A-Za-z0-9_%-]*")


@given(st.text())
def test_any_text_is_given_back_and_its_token_is_safe_everywhere(text: str) -> None:
    token = encode_id(text)

    assert decode_id(token) == text
    assert SAFE.fullmatch(token)


@given(IDS, IDS)
def test_two_ids_share_a_token_only_if_they_are_the_same(one: str, other: str) -> None:
    assert (encode_id(one) == encode_id(other)) == (one == other)
    assert story_of(story_workflow_id(one)) == one
    assert task_of(deliberation_workflow_id(one)) == one
    assert task_of(called_deliberation_workflow_id(one)) == one


@given(st.text(), st.text())
def test_no_callers_deliberation_has_the_id_of_a_council(one: str, other: str) -> None:
    assert called_deliberation_workflow_id(one) != deliberation_workflow_id(other)


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", fullmatch=True))
def test_an_id_of_letters_digits_and_hyphens_is_its_own_token(text: str) -> None:
    assert encode_id(text) == text
    assert story_workflow_id(text) == f"story-{text}"


def test_builders_encode_what_the_models_carry_as_it_is() -> None:
    assert encode_id("Story 12.3:a") == "Story%2012%2E3%3Aa"
    assert story_workflow_id("Story 12.3:a") == "story-Story%2012%2E3%3Aa"
    assert plan_workflow_id("a.b", "c:d") == "plan-a%2Eb-c%3Ad"
    assert derivation_workflow_id("a.b", "c") == "derivation-a%2Eb.c"
    assert context_workflow_id("a.b", "c") == "context-a%2Eb-c"
    assert response_subject("T 1.2") == "agent.response.T%201%2E2"
    assert timeline_key("a:b") == "swe:case:a%3Ab:planning:stream"
    assert pack_key("a:b", "DEV", "BUILD") == "context:a%3Ab:DEV:BUILD"


def test_the_derivations_of_two_stories_never_have_one_id() -> None:
    ids = ("a", "b", "a-b", "b-c", "c", "a.b", "a b", "b.c", "a-b.c")
    made = {derivation_workflow_id(story, plan) for story in ids for plan in ids}

    assert len(made) == len(ids) ** 2


def test_the_longest_ids_fit_temporals_limit() -> None:
    story, plan = "a" + ":" * 99, "a" + ":" * 199
    TypeAdapter(Id).validate_python(story)
    TypeAdapter(LongId).validate_python(plan)
    assert len(plan_workflow_id(story, plan)) <= 1_000
    assert len(derivation_workflow_id(story, plan)) <= 1_000


@pytest.mark.parametrize("text", ["US-101", "Story 12.3:a", "a", "1.2.3", "a b c", "a" * 100])
def test_valid_ids_are_accepted(text: str) -> None:
    assert TypeAdapter(Id).validate_python(text) == text


@pytest.mark.parametrize(
    "text",
    ["", " a", "a ", "a  b", "-a", ".a", "a/b", "a*", "a%20", "ä", "a\n", "a'b", "a" * 101, "a\0"],
)
def test_invalid_ids_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python(text)


@pytest.mark.parametrize(("text", "fits"), [("DEV", True), ("TECH-LEAD", True), ("-DEV", False)])
def test_a_role_may_hold_hyphens(text: str, fits: bool) -> None:
    try:
        TypeAdapter(Role).validate_python(text)
    except ValidationError:
        assert not fits
    else:
        assert fits
