"""Planning's pure part: the move of an event, a list's visibility query, and page tokens."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from bridge.grpc.calls import derived_id
from bridge.grpc.planning import (
    listing,
    new_story_id,
    page_read,
    page_token,
)
from bridge.story_list import stories_query
from bridge.story_moves import Position
from workflows.models.errors import InvalidInput
from workflows.models.story import Move, StoryInput, StoryView

VIEW = StoryView(story_id="US-1", title="Undo", state="BUILD", rigor="L1")
DONE = Move(event="build_done", to="TEST", kind="automatic", blocked_by=["builds_passing: no"])
BACK = Move(event="reject_build", to="DESIGN", kind="rejection", roles=["PO", "QA"])
NOW = Position(VIEW, [DONE, BACK])


def test_an_event_is_the_move_of_its_name() -> None:
    assert NOW.by_event("reject_build") == BACK


def test_a_move_between_two_states_is_preferably_one_that_the_mover_may_make() -> None:
    other = BACK.model_copy(update={"event": "give_up", "roles": ["PO"]})
    now = NOW._replace(moves=[BACK.model_copy(update={"roles": ["QA"]}), other])

    assert now.between("BUILD", "DESIGN", {"PO"}) == other
    with pytest.raises(ApplicationError, match="from TEST to DESIGN; the story is in BUILD; legal"):
        now.between("TEST", "DESIGN", {"PO"})
    with pytest.raises(ApplicationError, match="the fleet's own to take"):
        NOW.between("BUILD", "TEST", {"PO"})


def test_a_gate_of_two_roles_is_opened_by_the_one_whose_turn_it_is() -> None:
    gate = Move(event="approve_design", to="BUILD", kind="gate", roles=["PO", "QA"])
    open_gates = {"budget": "PO", "approve_design": "QA"}
    now = Position(VIEW.model_copy(update={"open_gates": open_gates}), [gate])

    assert now.roles(gate)[0] == "QA"
    assert NOW.roles(gate) == ["PO", "QA"]


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ("build_done", "it waits for builds_passing: no; the story is in BUILD"),
        ("approve_scope", "is not legal now; the story is in BUILD; legal now: reject_build"),
    ],
)
def test_what_a_person_may_not_take_names_what_they_may(event: str, words: str) -> None:
    with pytest.raises(ApplicationError, match=words) as refusal:
        NOW.by_event(event)

    assert refusal.value.type == "IllegalMove"
    assert "legal now: reject_build" in refusal.value.message


@given(st.dictionaries(st.sampled_from(["x-state", "x-role", "x-waiting"]), st.text()))
def test_no_metadata_escapes_its_quotes(metadata: dict[str, str]) -> None:
    try:
        filters = listing(metadata)
    except InvalidInput:
        return

    query = stories_query(waiting=filters.waiting, role=filters.role, state=filters.state)
    assert query.count("'") == 2 * (2 + len(metadata.keys() & {"x-state", "x-role"}))


def test_a_list_asks_for_what_waits_for_a_role() -> None:
    query = stories_query(state="DRAFT", role="PO")

    assert query == (
        "WorkflowType = 'StoryWorkflow' AND ExecutionStatus = 'Running' "
        "AND PendingGate IS NOT NULL AND StoryRole = 'PO' AND StoryState = 'DRAFT'"
    )


def test_a_list_asks_for_any_role_that_a_state_machine_may_have() -> None:
    assert listing({"x-role": "DEV-OPS"}).role == "DEV-OPS"


@given(token=st.binary(min_size=1), query=st.text(), other=st.text())
def test_a_page_token_is_valid_only_for_its_query(token: bytes, query: str, other: str) -> None:
    page = page_token(token, query)

    assert page_read(page, query) == token
    if other != query:
        with pytest.raises(InvalidInput):
            page_read(page, other)


@given(st.text(min_size=1))
def test_an_invalid_page_token_is_refused(token: str) -> None:
    with pytest.raises(InvalidInput):
        page_read(token, "")


@given(actor=st.text(), request_id=st.text())
def test_a_request_id_makes_an_id_that_a_story_may_have(actor: str, request_id: str) -> None:
    story_id = new_story_id(actor, request_id)

    assert StoryInput(story_id=story_id, title="Undo").story_id == story_id
    assert (new_story_id(actor, request_id) == story_id) == bool(request_id)


@given(st.text(max_size=40))
@example("000/")  # also base64, in its other alphabet
def test_a_forged_page_token_is_refused(text: str) -> None:
    for token in (text or "x", f"{derived_id('query', text)}.{text}"):
        try:
            read = page_read(token, "query")
        except InvalidInput as error:
            assert error.problems[0][0] == "x-page-token"  # noqa: PT017 - some texts are valid tokens
        else:
            assert page_token(read or b"", "query") == token


@given(st.binary(min_size=1, max_size=200))
def test_a_page_token_of_the_server_is_read(token: bytes) -> None:
    assert page_read(page_token(token, "query"), "query") == token
