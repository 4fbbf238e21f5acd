"""Messages from outside, parsed without a server: the contract's cases, limits, and any input."""

import base64
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from activities.graph.changes import parse_timestamp
from activities.graph.values import MILLISECONDS_FROM
from bridge.inbox.envelopes import (
    LARGEST_INTEGER,
    MAX_BODY_BYTES,
    STRUCTURED,
    InvalidMessage,
    in_lower_case,
    stated_identity,
)
from bridge.inbox.parsing import (
    IDS_OF,
    MAX_DECISIONS,
    MAX_ID_CHARACTERS,
    MAX_VERSION,
    READING,
    ParsedEvent,
    Received,
    parse_event,
)
from workflows.models.events import PUBLISHED

SUBJECTS = sorted(kind.SUBJECT for kind in READING)
TRANSITIONED = "planning.story.transitioned"
DELIBERATED = "orchestration.deliberation.completed"
UPDATED = "context.updated"
STORED_AT = datetime(2026, 1, 31, 12, tzinfo=UTC)
MOVE = {"story_id": "US-1", "from_phase": "DRAFT", "to_phase": "DESIGN"}

CASES = [
    case
    for name in ("inbound", "inbound_more")
    for case in json.loads((Path(__file__).parents[2] / "cases" / f"{name}.json").read_text())[
        "cases"
    ]
    # Whether an identity was used before is known only to the inbox.
    if "was used" not in case["expect"].get("dead_letter", "")
]


def parsed(
    body: Any, subject: str = TRANSITIONED, headers: dict[str, str] | None = None
) -> ParsedEvent:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_event(
        Received(subject, "PLANNING_EVENTS", 7, STORED_AT, in_lower_case(headers), data)
    )


def refusal(body: Any, subject: str = TRANSITIONED, headers: dict[str, str] | None = None) -> str:
    with pytest.raises(InvalidMessage) as refused:
        parsed(body, subject, headers)
    return str(refused.value)


def body_of(event: ParsedEvent) -> dict[str, Any]:
    return event.change.entry.body


# --- the contract's cases -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: json.dumps(case)[:80])
def test_a_case_of_the_contract_is_parsed_or_refused_by_its_field(case: dict[str, Any]) -> None:
    data = str(case.get("raw") or json.dumps(case["body"])).encode()
    expect = case["expect"]

    if field := expect.get("dead_letter"):
        assert refusal(data, case["subject"], case["headers"]).startswith(field)
        return

    entry = parsed(data, case["subject"], case["headers"]).change.entry
    if identity := expect.get("identity"):
        assert entry.id == identity
    shared = {name: value for name, value in expect.items() if name in entry.body}
    for name in ("timestamp", "decisions"):  # compared by the graph's test, as it stores them
        shared.pop(name, None)
    assert {name: entry.body[name] for name in shared} == shared


def test_every_subject_that_the_inbox_takes_has_a_case() -> None:
    assert {case["subject"] for case in CASES} == set(SUBJECTS)


# --- envelopes ------------------------------------------------------------------------------------


def structured(**more: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": "e-1",
        "source": "/jira",
        "type": TRANSITIONED,
        "time": "2026-01-30T10:00:00Z",
    } | more


def enveloped(payload: Any) -> dict[str, Any]:
    return {
        "event_type": TRANSITIONED,
        "payload": payload,
        "idempotency_key": "e-1",
        "producer": "/jira",
        "timestamp": "2026-01-30T10:00:00Z",
    }


AS_JSON = json.dumps(MOVE)
BINARY = {"CE-Id": "e-1", "ce-source": "/jira", "Ce-Time": "2026-01-30T10:00:00Z"}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (MOVE, BINARY),
        (structured(data=MOVE), {}),
        (structured(data=AS_JSON), {"Content-Type": f"{STRUCTURED}; charset=utf-8"}),
        (structured(data_base64=base64.b64encode(AS_JSON.encode()).decode()), {}),
        (enveloped(MOVE), {}),
        (enveloped(AS_JSON), {}),
        (structured(data=enveloped(MOVE)), {}),
    ],
    ids=["binary", "structured", "text", "base64", "envelope", "envelope of text", "both"],
)
def test_every_format_of_a_message_means_the_same(body: Any, headers: dict[str, str]) -> None:
    flat = parsed(MOVE | {"timestamp": "2026-01-30T10:00:00Z"}, headers={"ce-id": "e-1"})

    found = parsed(body, headers=headers)

    assert body_of(found) == body_of(flat)
    assert (found.change.entry.id, found.change.entry.source) == ("e-1", "/jira")
    assert stated_identity(in_lower_case(headers), json.dumps(body).encode()) == "e-1"


def test_a_message_without_identity_is_known_by_its_place_and_has_no_hash() -> None:
    found = parsed(MOVE)

    assert found.change.entry.id.startswith("PLANNING_EVENTS/7/")
    assert found.change.entry.source == "/nats/PLANNING_EVENTS"
    assert found.change.entry.time == STORED_AT.isoformat()
    assert found.content == ""


def test_the_hash_is_of_what_the_sender_wrote_about_the_event() -> None:
    first = parsed(MOVE, headers={"ce-id": "e-1"}).content
    reordered = dict(reversed(MOVE.items())) | {"unknown": "field"}

    assert first
    assert parsed(reordered, headers={"ce-id": "e-2"}).content == first
    assert parsed(MOVE | {"to_phase": "BUILD"}, headers={"ce-id": "e-1"}).content != first


# --- limits ---------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    return b'{"story_id":' + b"[" * depth + b"]" * depth + b"}"


def decisions(count: int) -> dict[str, Any]:
    many = [{"id": f"d{number}"} for number in range(count)]
    return {"story_id": "US-1", "task_id": "T-1", "decisions": many}


@pytest.mark.parametrize(
    ("subject", "body", "headers"),
    [
        (TRANSITIONED, MOVE, {"ce-id": "x" * MAX_ID_CHARACTERS}),
        (TRANSITIONED, MOVE | {"note": LARGEST_INTEGER}, {}),
        (TRANSITIONED, MOVE | {"timestamp": (STORED_AT + timedelta(minutes=5)).isoformat()}, {}),
        (TRANSITIONED, MOVE | {"timestamp": 0}, {}),
        (DELIBERATED, decisions(MAX_DECISIONS), {}),
        (UPDATED, {"story_id": "US-1", "version": MAX_VERSION}, {}),
        (UPDATED, {"story_id": "x" * 100, "version": 0}, {}),
    ],
    ids=["identity", "integer", "clock", "1970", "decisions", "version", "id"],
)
def test_the_largest_of_everything_is_parsed(
    subject: str, body: dict[str, Any], headers: dict[str, str]
) -> None:
    assert parsed(body, subject, headers).change.entry.subject == subject


@pytest.mark.parametrize(
    ("subject", "body", "headers", "words"),
    [
        (TRANSITIONED, MOVE, {"ce-id": "x" * (MAX_ID_CHARACTERS + 1)}, "ce-id: longer than 1000"),
        (TRANSITIONED, MOVE | {"note": LARGEST_INTEGER + 1}, {}, "note: the number has more than"),
        (
            TRANSITIONED,
            MOVE | {"timestamp": (STORED_AT + timedelta(minutes=5, seconds=1)).isoformat()},
            {},
            "timestamp: 2026-01-31T12:05:01+00:00 is later than the message itself",
        ),
        (TRANSITIONED, MOVE | {"timestamp": "1969-12-31T23:59:59Z"}, {}, "is before 1970"),
        (DELIBERATED, decisions(MAX_DECISIONS + 1), {}, "decisions: 501 in one message"),
        (UPDATED, {"story_id": "US-1", "version": MAX_VERSION + 1}, {}, "version: 2147483649 is"),
        (UPDATED, {"story_id": "x" * 101}, {}, "story_id: 'xxx"),
        (TRANSITIONED, b" " * MAX_BODY_BYTES + b"{}", {}, "body: 1048578 bytes; at most"),
        (TRANSITIONED, nested(100_000), {}, "body: nested too deeply"),
        (TRANSITIONED, b"\xff", {}, "body: is not JSON"),
        (TRANSITIONED, b"[1]", {}, "body: is JSON, but not an object"),
        (TRANSITIONED, structured(data=MOVE, specversion="2.0"), {}, "specversion: '2.0'"),
        (TRANSITIONED, structured(), {}, "data: required; add it"),
        (DELIBERATED, decisions(0) | {"decisions": "many"}, {}, "decisions: must be a list"),
        (DELIBERATED, decisions(0) | {"decisions": [{"id": "a/b"}]}, {}, "decisions.0.id: 'a/b'"),
        (DELIBERATED, decisions(0) | {"decisions": [{"title": True}]}, {}, "decisions.0.title: is"),
        ("planning.plan.approved", {"story_id": "U", "plan_id": "p", "roles": {"a": 1}}, {}, "ro"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_with_field_rule_and_remedy(
    subject: str, body: Any, headers: dict[str, str], words: str
) -> None:
    assert words in refusal(body, subject, headers)


# --- any input ------------------------------------------------------------------------------------

WORDS = st.text(max_size=20) | st.sampled_from(["US-1", "DEV", "", " ", "1e999", "\0", "2026"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted(
    {name for kind in READING for name in kind.model_fields}
    | {
        word
        for reading in READING.values()
        for words in reading.spellings.values()
        for word in words
    }
    | {"specversion", "type", "source", "data", "data_base64", "payload", "event_type"}
    | {"idempotency_key", "id", "subject", "time"}
)
HEADERS = st.dictionaries(
    st.sampled_from(["ce-id", "CE-Type", "ce-time", "Ce-Subject", "ce-source", "content-type"]),
    WORDS | st.sampled_from([STRUCTURED, TRANSITIONED, "application/json"]),
    max_size=3,
)


ODD: tuple[Any, ...] = ([], {}, [[]], [{}], [None], {"id": []}, True, -1, 1.5, 2**63, "x", " ")
"""Values of each JSON type, of which at most one has the type of a field."""


@pytest.mark.parametrize("odd", ODD, ids=json.dumps)
@pytest.mark.parametrize("shape", ["flat", "structured", "enveloped"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_field_of_any_type_is_parsed_or_refused(subject: str, shape: str, odd: Any) -> None:
    ids: dict[str, Any] = dict.fromkeys(IDS_OF[PUBLISHED[subject]], "US-1")
    ids["to_phase"] = "DESIGN"
    event = {"specversion": "1.0", "type": subject, "source": "/x", "data": ids}
    envelope = {"event_type": subject, "idempotency_key": "k", "payload": ids}
    whole = {"flat": ids, "structured": event, "enveloped": envelope}[shape]
    inner = {"flat": "", "structured": "data", "enveloped": "payload"}[shape]
    parsed(whole, subject)

    for name in NAMES:
        for body in (whole | {name: odd}, whole | ({inner: ids | {name: odd}} if inner else {})):
            stated_identity({}, json.dumps(body).encode())
            with suppress(InvalidMessage):
                parsed(body, subject)


@st.composite
def bodies(draw: st.DrawFn, subject: str) -> dict[str, Any]:
    """Generate a body with any values, most with ids so that they get past the first rule."""
    ids = {
        name: draw(st.sampled_from(["US-1", "a b", "x:1"])) for name in IDS_OF[PUBLISHED[subject]]
    }
    return ids | draw(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5))


@given(data=st.data(), subject=st.sampled_from(SUBJECTS), headers=HEADERS)
def test_any_object_is_parsed_or_refused(
    data: st.DataObject, subject: str, headers: dict[str, str]
) -> None:
    sent = json.dumps(data.draw(bodies(subject))).encode()
    try:
        found = parsed(sent, subject, headers)
    except InvalidMessage:
        return

    kind = PUBLISHED[subject]
    entry = found.change.entry
    assert kind.model_validate(entry.body).story_id == entry.story_id
    assert datetime.fromisoformat(entry.time) <= STORED_AT + timedelta(minutes=5)
    if stated := stated_identity(in_lower_case(headers), sent):
        assert entry.id == stated
    json.dumps(entry.body).encode()  # what the graph and the bus can hold


@given(data=st.binary(max_size=200), subject=st.sampled_from(SUBJECTS), headers=HEADERS)
def test_random_bytes_are_refused(data: bytes, subject: str, headers: dict[str, str]) -> None:
    with pytest.raises(InvalidMessage):
        parsed(data, subject, headers)
    stated_identity(in_lower_case(headers), data)


@given(milliseconds=st.integers(86_400_000, int(STORED_AT.timestamp() * 1000)))
@example(milliseconds=38_381_021_030)  # its seconds look like an ISO 8601 date without dashes
@example(milliseconds=1_766_102_512_345)  # it looks like an hour of a day in 1766
@example(milliseconds=1_766_102_512_000)
def test_a_time_means_the_same_however_it_is_written(milliseconds: int) -> None:
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)
    written = [at.isoformat(), milliseconds / 1000, str(milliseconds / 1000)]
    if milliseconds >= MILLISECONDS_FROM:
        written += [milliseconds, str(milliseconds)]
    if milliseconds % 1000 == 0 and milliseconds >= 10**11:
        written.append(str(milliseconds // 1000))

    times = [parsed(MOVE | {"timestamp": each}).change.entry.time for each in written]

    for time in times:
        assert abs(datetime.fromisoformat(time) - at) < timedelta(milliseconds=1)


def test_a_date_without_dashes_is_a_date() -> None:
    assert parsed(MOVE | {"timestamp": "20260131"}).change.entry.time.startswith("2026-01-31T00:00")


@pytest.mark.parametrize("text", ["1772102512345", "177210251"])
def test_a_number_where_only_iso_8601_is_allowed_is_refused(text: str) -> None:
    with pytest.raises(ApplicationError, match="is not ISO 8601"):
        parse_timestamp(text, "timestamp")
