"""The part of a session that a role gets, the changes that are stored, and scopes in words."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from temporalio.exceptions import ApplicationError

from activities.graph.changes import LAST_VERSION
from activities.graph.changes import change as entry_change
from activities.graph.context_update import rules
from activities.graph.context_update.payloads import (
    ENTITY_TYPES,
    OPERATIONS,
    PAYLOADS,
    EntityType,
    extra_properties,
)
from activities.graph.context_update.rules import (
    EntityState,
    JudgedChanges,
    ParsedChange,
    RejectedChange,
    StorySnapshot,
    judge,
    read_change,
    read_changes,
)
from activities.graph.events import CONTEXT_VERSION
from activities.graph.events import writes as entry_writes
from activities.graph.scopes import Scopes, has_scopes, load_scopes
from activities.graph.sessions import Decided, RoleShare, Session, share_of
from activities.graph.values import number
from bridge.grpc.context import messages
from bridge.grpc.context.messages import rehydrated, require_size, verdict
from bridge.grpc.server import LARGEST_MESSAGE
from bridge.grpc.wire import context_pb2
from tests.unit.conftest import CONFIG
from workflows.models.context import ContextChange, ContextUpdate, ContextWrite
from workflows.models.entries import Entry
from workflows.models.events import ContextUpdated

STORY = "US-1"


@pytest.fixture(scope="module")
def scopes() -> Scopes:
    return load_scopes(CONFIG / "scopes.yaml")


def decided(
    name: str, role: str = "", affects: tuple[str, ...] = (), depends_on: tuple[str, ...] = ()
) -> Decided:
    """Return a decision that affects a subtask of each role in `affects`, each with its own id."""
    return Decided(
        decision={"id": name, "title": name},
        role=role,
        bound=bool(affects),
        affects=[{"subtask_id": f"{name}-{of}", "title": "", "role": of} for of in affects],
        depends_on=list(depends_on),
    )


def session(*decisions: Decided) -> Session:
    tasks = [
        {"subtask_id": f"t-{role}", "role": role, "priority": 1} for role in ("DEV", "QA", "DATA")
    ]
    return Session({"case_id": STORY}, None, tasks, list(decisions), [], "")


# --- roles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decision", "roles"),
    [
        (decided("d"), {"ARCHITECT", "QA", "DEV", "DATA", "DEVOPS"}),
        (decided("d", affects=("DEV",)), {"ARCHITECT", "QA", "DEV"}),
        (decided("d", affects=("DEV", "DATA")), {"ARCHITECT", "QA", "DEV", "DATA"}),
        (decided("d", role="DATA", affects=("DEV",)), {"ARCHITECT", "QA", "DEV", "DATA"}),
        (decided("d", role="COOK", affects=("COOK",)), {"ARCHITECT", "QA"}),
    ],
)
def test_a_decision_is_shown_to_the_roles_it_affects(
    scopes: Scopes, decision: Decided, roles: set[str]
) -> None:
    found = {
        role
        for role in ("ARCHITECT", "QA", "DEV", "DATA", "DEVOPS", "COOK")
        if share_of(session(decision), scopes, role).decisions
    }

    assert found == roles


def test_what_a_decision_builds_on_is_shown_with_it_even_in_a_cycle(scopes: Scopes) -> None:
    ring = (
        decided("a", affects=("DEV",), depends_on=("b", "gone")),
        decided("b", affects=("DATA",), depends_on=("c",)),
        decided("c", affects=("DATA",), depends_on=("a",)),
        decided("x", affects=("DATA",)),
    )

    share = share_of(session(*ring), scopes, "DEV")

    assert [row["id"] for row in share.decisions] == ["a", "b", "c"]
    assert share.edges == [("a", "b"), ("b", "c"), ("c", "a")]
    assert [decision for decision, _ in share.impacts] == ["a", "b", "c"]


def test_a_role_sees_only_its_subtasks_and_an_unknown_role_none(scopes: Scopes) -> None:
    dev, cook = (share_of(session(decided("d")), scopes, role) for role in ("DEV", "COOK"))

    assert [task["subtask_id"] for task in dev.tasks] == ["t-DEV"]
    assert cook == ([], [], [], [])


def test_stats_count_what_two_roles_share_once(scopes: Scopes) -> None:
    shared = session(decided("d", affects=("DEV", "DATA")), decided("e", depends_on=("d",)))

    stats = rehydrated(shared, scopes, ["DEV", "DATA", "dev"]).stats

    assert (stats.decisions, stats.decision_edges, stats.impacts) == (2, 1, 2)
    assert list(stats.roles) == ["DATA", "DEV", "dev"]


def test_roles_that_are_one_are_packed_once_and_answered_under_each_name(
    scopes: Scopes, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[str] = []

    def counted(session: Session, scopes: Scopes, role: str) -> RoleShare:
        packed.append(role)
        return share_of(session, scopes, role)

    monkeypatch.setattr(messages, "share_of", counted)

    answer = rehydrated(session(decided("d")), scopes, ["DEV", "developer", "dev", "QA"])

    assert sorted(packed) == ["DEV", "QA"]
    assert answer.packs["developer"] == answer.packs["dev"] == answer.packs["DEV"]
    assert answer.packs["dev"].role == "DEV"


@pytest.mark.parametrize(
    ("written", "read"), [(2**40, 2**31 - 1), (str(-(2**40)), -(2**31)), (7, 7), ("many", None)]
)
def test_a_number_that_no_int32_holds_is_read_as_the_nearest_that_one_does(
    written: object, read: int | None
) -> None:
    assert number(written) == read


def test_an_answer_that_no_client_could_read_is_refused() -> None:
    fits = context_pb2.GetContextResponse(context="x" * (LARGEST_MESSAGE - 100))
    large = context_pb2.GetContextResponse(context="x" * LARGEST_MESSAGE)

    require_size(fits, "the pack of US-1", "less")
    with pytest.raises(ApplicationError, match=r"the pack of US-1 has .* ask for less") as caught:
        require_size(large, "the pack of US-1", "less")

    assert caught.value.type == "TooLarge"


@pytest.mark.parametrize(
    ("role", "phase", "has"),
    [
        ("developer", "build", True),
        ("DATA", "TEST", True),
        ("COOK", "BUILD", False),
        ("DEV", "LUNCH", False),
    ],
)
def test_a_role_and_phase_are_in_the_scopes_file_or_not(
    scopes: Scopes, role: str, phase: str, has: bool
) -> None:
    assert has_scopes(scopes, role, phase) == has


@pytest.mark.parametrize(("version", "taken"), [(7, True), (LAST_VERSION, True), (2**31, False)])
def test_a_foreign_version_is_taken_if_it_leaves_room_for_the_next(
    version: int, taken: bool
) -> None:
    body = ContextUpdated(story_id=STORY, version=version, changed=[], timestamp="2026-03-01")
    fields = body.model_dump(mode="json")
    entry = Entry(id="e", kind="ContextUpdated", source="s", time=body.timestamp, body=fields)

    written = entry_writes(entry_change(entry, 1, 0))

    assert (CONTEXT_VERSION in [write.cypher for write in written]) == taken


def test_the_verdict_on_scopes_is_explained(scopes: Scopes) -> None:
    assert verdict(scopes, "dev", "build", [], []) == "these are the scopes of DEV in BUILD"
    assert verdict(scopes, "DEV", "LUNCH", ["PLAN_HEADER"], ["MILESTONES"]) == (
        "DEV in LUNCH lacks PLAN_HEADER; DEV in LUNCH is not given MILESTONES; "
        "LUNCH is not a phase, and has the headers only"
    )


# --- changes --------------------------------------------------------------------------------------


def change(operation: str, entity_type: str, entity_id: str, payload: str = "{}") -> ContextChange:
    return ContextChange(
        operation=operation, entity_type=entity_type, entity_id=entity_id, payload=payload
    )


NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def judged(
    *changes: ContextChange,
    found: StorySnapshot | None = None,
    at: str = "2026-03-01",
    roles: list[str] | None = None,
) -> JudgedChanges:
    update = ContextUpdate(story_id=STORY, actor="ana", changes=list(changes), roles=roles)
    started_ms = int(NOW.timestamp() * 1000)
    write = ContextWrite(update_id="u", at=at, started_ms=started_ms, update=update)
    return judge(write, read_changes(write), found or StorySnapshot(story_live=True))


def payload_of(entity_type: str, operation: str = "CREATE", **payload: Any) -> dict[str, Any]:
    """Return the fields that are read from a payload."""
    name = STORY if entity_type == "CASE" else "t"
    read = read_change(0, change(operation, entity_type, name, json.dumps(payload)), STORY, NOW)
    assert read.payload
    return read.payload.model_dump(exclude_none=True)


def nodes(outcome: JudgedChanges) -> list[dict[str, Any]]:
    """Return the properties that are written, entity by entity."""
    return [write.row["node"] for write in outcome.writes if "node" in write.row]


def there(*entities: tuple[str, str]) -> StorySnapshot:
    """Return the state of a story that has these entities."""
    found = StorySnapshot(story_live=True)
    found.entities = {entity: EntityState(live=True) for entity in [("CASE", STORY), *entities]}
    return found


TITLED = '{"title": "x"}'


def test_a_change_sees_the_effects_of_earlier_changes() -> None:
    outcome = judged(
        change("DELETE", "DECISION", "d", ""),
        change("CREATE", "DECISION", "d", TITLED),
        change("UPDATE", "DECISION", "d", TITLED),
        change("DELETE", "DECISION", "d", ""),
        change("DELETE", "DECISION", "d", ""),
        change("CREATE", "DECISION", "d", "{}"),
        change("CREATE", "DECISION", "d", TITLED),
    )

    assert [parsed.number for parsed in outcome.applied] == [1, 2, 3, 6]
    assert [warning.split(" ")[1] for warning in outcome.warnings] == ["0", "4", "5"]


def properties(node: dict[str, Any]) -> dict[str, Any]:
    """Return the non-empty properties of a new node, without its order properties."""
    orders = ("status_order", "text_order")
    return {name: value for name, value in node.items() if value and name not in orders}


@pytest.mark.parametrize(
    ("entity_type", "payload", "stored"),
    [
        ("PLAN", {}, {"status": "DRAFT", "version": 1}),
        ("SUBTASK", {"last_status": "in progress"}, {"status": "IN_PROGRESS"}),
        ("SUBTASK", {"status": "DONE", "lastStatus": "x"}, {"status": "DONE", "x_lastStatus": "x"}),
        ("DECISION", {"status": "approved"}, {"status": "APPROVED", "title": "e"}),
        (
            "DECISION",
            {"description": "One table\nis enough"},
            {"title": "One table", "rationale": "One table\nis enough"},
        ),
    ],
)
def test_an_update_of_what_is_not_there_creates_it(
    entity_type: str, payload: dict[str, Any], stored: dict[str, Any]
) -> None:
    outcome = judged(change("UPDATE", entity_type, "e", json.dumps(payload)))

    assert outcome.warnings == []
    assert stored.items() <= properties(nodes(outcome)[0]).items()


@pytest.mark.parametrize("entity_type", ["PLAN", "SUBTASK", "DECISION", "MILESTONE"])
def test_an_update_does_not_bring_back_what_was_deleted(entity_type: str) -> None:
    needed = '{"title": "x", "event_type": "x"}'
    outcome = judged(
        change("CREATE", entity_type, "e", needed),
        change("DELETE", entity_type, "e"),
        change("UPDATE", entity_type, "e", needed),
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 1]
    assert "is deleted; create it first" in outcome.warnings[0]


def test_a_subtask_creates_the_plan_that_it_names_but_restores_none() -> None:
    found = StorySnapshot(story_live=True, plans={"p-1": 1})
    found.entities["PLAN", "gone"] = EntityState(live=False)

    outcome = judged(
        change("CREATE", "SUBTASK", "t-1", '{"plan_id": "p-2"}'),
        change("UPDATE", "SUBTASK", "t-2", '{"plan_id": "p-2"}'),
        change("CREATE", "SUBTASK", "t-3", '{"plan_id": "gone"}'),
        found=found,
    )

    rows = [write.row for write in outcome.writes if "node" in write.row]
    assert [(row["id"], row.get("plan_id")) for row in rows] == [
        ("p-2", None),
        ("t-1", "p-2"),
        ("t-2", "p-2"),
    ]
    assert properties(rows[0]["node"]) == {"status": "DRAFT", "version": 2}
    assert "gone is deleted" in outcome.warnings[0]


@pytest.mark.parametrize(
    ("payload", "event_type", "description"),
    [
        ({"event_type": "DEMO", "type": "x", "title": "Shown"}, "DEMO", "Shown"),
        ({"type": "DEMO", "event": "x"}, "DEMO", ""),
        ({"event": "DEMO", "description": "Seen", "title": "Shown"}, "DEMO", "Seen"),
    ],
)
def test_a_milestone_is_read_under_alternative_field_names(
    payload: dict[str, Any], event_type: str, description: str
) -> None:
    outcome = judged(change("CREATE", "MILESTONE", "m", json.dumps(payload)))

    (node,) = nodes(outcome)
    assert (node["event_type"], node["description"]) == (event_type, description)
    assert outcome.warnings == []


def test_a_case_gets_the_id_of_its_story() -> None:
    payload = json.dumps({"title": "x", "case_id": "CASE-7"})

    outcome = judged(change("CREATE", "CASE", "CASE-7", payload))

    assert outcome.warnings == []
    assert outcome.writes[0].row["id"] == STORY
    assert nodes(outcome)[0]["x_entity_id"] == "CASE-7"


def test_the_decider_is_from_the_payload_and_the_recorder_is_the_caller() -> None:
    outcome = judged(
        change("CREATE", "DECISION", "d", '{"title": "x", "decided_by": "bo"}'),
        change("CREATE", "MILESTONE", "m", '{"type": "x", "recorded_by": "bo"}'),
    )

    decision, milestone = nodes(outcome)
    assert (decision["decided_by"], decision["recorded_by"]) == ("bo", "ana")
    assert (milestone["actor"], milestone["recorded_by"]) == ("ana", "ana")


@pytest.mark.parametrize(
    ("sent", "known", "roles", "needed"),
    [
        (change("UPDATE", "DECISION", "d", '{"rationale": "y"}'), "bo", ["DEV", "PO"], "OPERATOR"),
        (change("CREATE", "DECISION", "d", '{"title": "y"}'), "bo", ["DEV"], "OPERATOR"),
        (change("UPDATE", "DECISION", "d", '{"colour": "red"}'), "bo", ["QA"], "OPERATOR"),
        (change("UPDATE", "MILESTONE", "d", '{"description": "y"}'), "bo", ["DEV"], "OPERATOR"),
        (change("UPDATE", "DECISION", "d", '{"rationale": "y"}'), "bo", ["OPERATOR"], ""),
        (change("UPDATE", "DECISION", "d", '{"rationale": "y"}'), "ana", ["DEV"], ""),
        (change("UPDATE", "DECISION", "d", '{"decided_by": "ana"}'), "bo", ["DEV"], ""),
        (change("UPDATE", "PLAN", "d", '{"status": "draft"}'), "", ["DEV", "OPERATOR"], "PO"),
        (change("CREATE", "PLAN", "d", '{"colour": "red"}'), "", ["DEV"], "PO"),
        (change("UPDATE", "PLAN", "d", '{"status": "draft"}'), "", ["PO"], ""),
    ],
)
def test_what_is_stored_in_anothers_name_or_approved_changes_by_its_role_only(
    sent: ContextChange, known: str, roles: list[str], needed: str
) -> None:
    status = "APPROVED" if sent.entity_type == "PLAN" else "ACCEPTED"
    stored = EntityState(live=True, name=known, status=status)
    entity: Any = (sent.entity_type, "d")
    found = StorySnapshot(story_live=True, entities={entity: stored})

    if needed:
        with pytest.raises(ApplicationError, match=f"needs the role {needed}") as refused:
            judged(sent, found=found, roles=roles)
        assert refused.value.type == "Permission"
        assert refused.value.non_retryable
    else:
        (node,) = nodes(judged(sent, found=found, roles=roles))
        assert node.get("recorded_by") == (
            None if known in ("", "ana") and "decided_by" not in sent.payload else "ana"
        )


def test_a_change_of_anothers_decision_keeps_the_recorder() -> None:
    taken = change("UPDATE", "DECISION", "d", '{"decided_by": "ana"}')
    then = change("UPDATE", "DECISION", "d", '{"rationale": "y"}')
    found = StorySnapshot(
        story_live=True, entities={("DECISION", "d"): EntityState(live=True, name="bo")}
    )

    first, second = nodes(judged(taken, then, found=found, roles=["DEV"]))

    assert (first["decided_by"], first["recorded_by"]) == ("ana", "ana")
    assert "recorded_by" not in second


OTHERS = {
    "colour": "red",
    "hours": 3,
    "done?": True,
    "ratio": 0.5,
    "tags": ["a", "b"],
    "mixed": [1, "b"],
    "nested": {"a": [1]},
    "huge": 2**80,
    "none": None,
}


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_unknown_fields_are_kept_as_properties_with_a_prefix(
    entity_type: EntityType,
) -> None:
    needed = {"title": "x", "event_type": "x", "status_order": "z"}

    outcome = judged(change("CREATE", entity_type, STORY, json.dumps(needed | OTHERS)))

    assert outcome.warnings == []
    kept = {name: value for name, value in nodes(outcome)[0].items() if name.startswith("x_")}
    assert {
        "x_colour": "red",
        "x_hours": 3,
        "x_done_": True,
        "x_ratio": 0.5,
        "x_tags": ["a", "b"],
        "x_mixed": '[1, "b"]',
        "x_nested": '{"a": [1]}',
        "x_huge": str(2**80),
        "x_status_order": "z",
    }.items() <= kept.items()
    assert nodes(outcome)[0].get("status_order") != "z"


def test_an_unknown_field_alone_is_a_change_and_dropped_fields_are_named() -> None:
    outcome = judged(
        change("CREATE", "PLAN", "p"),
        change("UPDATE", "PLAN", "p", '{"colour": "red"}'),
        change("UPDATE", "PLAN", "p", json.dumps({f"n{n}": n for n in range(51)})),
        change("UPDATE", "PLAN", "p", json.dumps({"x" * 65: 1, "a b": 1, "a-b": 2})),
        change("DELETE", "PLAN", "p"),
        change("CREATE", "PLAN", "p"),
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 1, 2, 3, 4, 5]
    assert ["n50" in outcome.warnings[0], "a-b" in outcome.warnings[1]] == [True, True]
    assert "x" * 40 in outcome.warnings[1]
    created = nodes(outcome)[-1]
    assert created["x_colour"] is None
    assert created["x_n1"] is None


NAMES_AND_VALUES = st.dictionaries(
    st.text(max_size=80),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=60,
)


@given(others=NAMES_AND_VALUES)
def test_any_foreign_name_and_value_fits_into_a_graph_property(
    others: dict[str, Any],
) -> None:
    kept, left_out = extra_properties(others)

    assert len(kept) + len(left_out) == len(others)
    for name, value in kept.items():
        assert re.fullmatch(r"x_[A-Za-z0-9_]{1,64}", name)
        values = value if isinstance(value, list) else [value]
        assert all(isinstance(each, bool | int | float | str) for each in values)
        assert len({type(each) for each in values}) <= 1


def test_what_is_newer_in_the_graph_is_kept() -> None:
    newer = StorySnapshot(story_live=True)
    newer.entities["SUBTASK", "t"] = EntityState(live=True, status_order="9" * 18)

    outcome = judged(
        change("UPDATE", "SUBTASK", "t", '{"status": "done"}'),
        change("UPDATE", "SUBTASK", "t", TITLED),
        change("DELETE", "SUBTASK", "t"),
        found=newer,
    )

    assert [parsed.number for parsed in outcome.applied] == [1]
    assert all("newer" in warning for warning in outcome.warnings)


def test_a_subtask_belongs_to_the_newest_remaining_plan() -> None:
    outcome = judged(
        change("CREATE", "PLAN", "p-7"),
        change("CREATE", "SUBTASK", "t-1"),
        change("DELETE", "PLAN", "p-7"),
        change("CREATE", "SUBTASK", "t-2"),
        found=StorySnapshot(story_live=True, plans={"p-3": 3, "p-1": 1}),
    )

    rows = [write.row for write in outcome.writes]
    assert [row["plan_id"] for row in rows if "plan_id" in row] == ["p-7", "p-3"]
    assert rows[0]["node"]["version"] == 4


def test_alternative_field_names_are_accepted() -> None:
    assert payload_of("SUBTASK", dependencies=["a"], role="dev", colour=1) == {
        "depends_on": ["a"],
        "role": "DEV",
    }


def test_names_as_protobuf_writes_them_in_json_are_accepted() -> None:
    decision = payload_of("DECISION", title="x", decidedBy="bo", decidedAt="2026-02-01", id="t")
    milestone = payload_of("MILESTONE", eventType="DEMO", tsMs="1000")
    case = payload_of("CASE", caseId=STORY, createdBy="bo", createdAt="2026-02-01", title="x")

    assert decision == {
        "title": "x",
        "decided_by": "bo",
        "decided_at": "2026-02-01T00:00:00.000Z",
    }
    assert milestone == {"event_type": "DEMO", "timestamp_ms": 1000}
    assert case == {"title": "x", "created_by": "bo", "created_at": "2026-02-01T00:00:00.000Z"}
    assert payload_of("SUBTASK", subtaskId="t", planId="p-1", dependsOn=["a"]) == {
        "plan_id": "p-1",
        "depends_on": ["a"],
    }


def test_an_empty_word_time_or_actor_counts_as_absent() -> None:
    empty = {"decided_by": "", "decidedAt": " ", "role": "", "type": "", "status": ""}

    assert payload_of("DECISION", title="x", **empty) == {"title": "x"}
    assert payload_of("CASE", title="x", rigor="", created_by="", created_at="") == {"title": "x"}
    assert payload_of("SUBTASK", assignee="", plan_id="", description="") == {"description": ""}


@pytest.mark.parametrize("status", ["in-progress", " In Progress ", "IN_PROGRESS"])
def test_a_status_is_one_word_in_capitals(status: str) -> None:
    assert payload_of("SUBTASK", status=status) == {"status": "IN_PROGRESS"}


def test_an_empty_payload_is_enough_if_nothing_is_required() -> None:
    outcome = judged(
        change("CREATE", "PLAN", "p", ""),
        change("CREATE", "SUBTASK", "t", " "),
        change("UPDATE", "PLAN", "p", ""),
        change("CREATE", "DECISION", "d", ""),
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 1]
    assert "names nothing to change" in outcome.warnings[0]
    assert "payload.title: required" in outcome.warnings[1]


@pytest.mark.parametrize(
    "time",
    [
        "2026-02-01T12:00:00+02:00",
        "2026-02-01T10:00:00Z",
        "2026-02-01T10:00:00",
        "20260201T100000",
    ],
)
def test_times_are_stored_in_utc_and_in_one_form_for_they_are_sorted_as_text(time: str) -> None:
    outcome = judged(
        change("CREATE", "CASE", "", '{"title": "x"}'),
        change("CREATE", "DECISION", "d", json.dumps({"title": "x", "decided_at": time})),
        at=time,
    )

    case, decision = nodes(outcome)
    one = "2026-02-01T10:00:00.000Z"
    assert (case["created_at"], decision["decided_at"]) == (one, one)


@pytest.mark.parametrize(
    ("entity_type", "payload"),
    [
        ("DECISION", {"title": "x", "decided_at": "2026-03-01T12:05:01Z"}),
        ("DECISION", {"title": "x", "decided_at": "2026-03-01T11:05:01-01:00"}),
        ("CASE", {"title": "x", "created_at": "2999-01-01"}),
        ("MILESTONE", {"event_type": "x", "ts_ms": int(NOW.timestamp() * 1000) + 300_001}),
    ],
)
def test_a_time_that_has_not_come_is_refused(entity_type: str, payload: dict[str, Any]) -> None:
    with pytest.raises(RejectedChange, match="later than now"):
        payload_of(entity_type, **payload)


@pytest.mark.parametrize(
    ("entity_type", "payload"),
    [
        ("SUBTASK", {"priority": 1_000_001}),
        ("SUBTASK", {"priority": 2**31}),
        ("PLAN", {"version": 1_000_001}),
    ],
)
def test_a_number_is_bounded_to_int32(entity_type: str, payload: dict[str, Any]) -> None:
    with pytest.raises(RejectedChange, match="1000000"):
        payload_of(entity_type, **payload)


@pytest.mark.parametrize(
    ("entity_type", "payload"),
    [
        ("DECISION", {"id": "d-2", "title": "x"}),
        ("SUBTASK", {"subtask_id": "t-2"}),
        ("SUBTASK", {"subtaskId": "t-2"}),
        ("SUBTASK", {"case_id": "US-2"}),
        ("PLAN", {"plan_id": "p-2"}),
        ("MILESTONE", {"id": 7, "event_type": "x"}),
    ],
)
@pytest.mark.parametrize("operation", ["CREATE", "DELETE"])
def test_a_payload_of_another_id_is_refused(
    operation: str, entity_type: str, payload: dict[str, Any]
) -> None:
    with pytest.raises(RejectedChange, match="is not"):
        payload_of(entity_type, operation, **payload)


def test_two_names_of_one_field_must_agree() -> None:
    assert payload_of("SUBTASK", depends_on=["a"], dependencies=["a"]) == {"depends_on": ["a"]}
    with pytest.raises(RejectedChange, match="under two names"):
        payload_of("SUBTASK", depends_on=["a"], dependencies=["b"])


def test_the_creation_of_a_case_never_changes_and_the_rest_is_stored() -> None:
    found = there()
    found.created = {"created_at": "2026-01-01T00:00:00Z", "created_by": "bo"}
    same = '{"title": "x", "created_by": "bo", "created_at": "2026-01-01T01:00:00+01:00"}'

    outcome = judged(
        change("UPDATE", "CASE", "", '{"title": "x", "created_by": "eve"}'),
        change("UPDATE", "CASE", "", '{"created_at": "2026-01-02"}'),
        change("UPDATE", "CASE", "", same),
        found=found,
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 2]
    assert [warning[:8] for warning in outcome.warnings] == ["change 0", "change 1"]
    assert all("never changes" in warning for warning in outcome.warnings)
    assert "created_by" not in nodes(outcome)[0]
    assert nodes(outcome)[0]["title"] == "x"


def test_after_a_case_is_deleted_nothing_is_stored_until_it_is_created() -> None:
    outcome = judged(
        change("DELETE", "CASE", ""),
        change("CREATE", "DECISION", "d", TITLED),
        change("UPDATE", "CASE", "", TITLED),
        change("CREATE", "CASE", "", "{}"),
        change("CREATE", "PLAN", "p"),
        change("CREATE", "CASE", "", TITLED),
        change("CREATE", "DECISION", "d", TITLED),
        found=there(),
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 5, 6]
    assert len(outcome.warnings) == 4


@pytest.mark.parametrize("entity_type", ENTITY_TYPES)
def test_what_is_created_again_has_nothing_of_what_was_deleted(entity_type: EntityType) -> None:
    needed = json.dumps({"title": "x", "event_type": "x"})

    outcome = judged(change("CREATE", entity_type, STORY, needed))

    properties = set(PAYLOADS[entity_type].model_fields) - {"plan_id", "depends_on"}
    assert properties <= set(nodes(outcome)[0])
    assert outcome.writes[0].row["fresh"]


def test_the_change_that_closes_a_ring_of_subtasks_is_refused() -> None:
    found = there(("SUBTASK", "t-3"))
    found.needs = {"t-2": ["t-3"], "t-9": ["t-8"]}

    outcome = judged(
        change("CREATE", "SUBTASK", "t-1", '{"depends_on": ["t-2"]}'),
        change("UPDATE", "SUBTASK", "t-3", '{"depends_on": ["t-9", "t-1"]}'),
        change("UPDATE", "SUBTASK", "t-1", '{"depends_on": ["t-9"]}'),
        change("UPDATE", "SUBTASK", "t-3", '{"depends_on": ["t-9", "t-1"]}'),
        found=found,
    )

    assert [parsed.number for parsed in outcome.applied] == [0, 2, 3]
    assert "ring" in outcome.warnings[0]


@pytest.mark.parametrize(
    "payload",
    [
        *("null", "[]", "{", '{"title": NaN}', '{"title": "\\ud800"}', "[" * 10_000),
        '{"priority": 1e99}',
        '{"colour": {"deep": ["a\\u0000b"]}}',
        '{"title": "' + "x" * 70_000 + '"}',
    ],
)
def test_a_payload_that_is_not_an_object_is_refused(payload: str) -> None:
    with pytest.raises(RejectedChange, match="payload"):
        read_change(0, change("CREATE", "SUBTASK", "t", payload), STORY, NOW)


@pytest.mark.parametrize(
    "payload",
    [
        '{"title": "a" "b"}',
        '{"title": "a", "decided_at": "{x}"}',
        "{0}",
        "}",
        '{"decided_at": "{error.__traceback__}"}',
        '{"title": "a", "status": "{error.__class__.__init__.__globals__}"}',
    ],
)
def test_no_text_from_outside_is_a_template(payload: str) -> None:
    outcome = judged(change("CREATE", "DECISION", "d", payload))

    (warning,) = outcome.warnings
    assert warning.startswith("change 0 (CREATE DECISION d): payload")
    assert not any(word in warning for word in ("traceback", "object at", "globals", "/work"))


def test_whatever_fails_while_a_change_is_read_is_that_changes_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(what: str, error: Exception) -> Exception:
        raise ValueError(f"{error.__traceback__}")

    monkeypatch.setattr(rules, "invalid_input", broken)

    outcome = judged(
        change("CREATE", "DECISION", "d", '{"title": 7}'),
        change("CREATE", "DECISION", "e", TITLED),
    )

    assert [parsed.number for parsed in outcome.applied] == [1]
    (warning,) = outcome.warnings
    assert warning == (
        "change 0 (CREATE DECISION d): cannot be read (ValueError); write it otherwise"
    )


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    changes=st.lists(
        st.builds(
            ContextChange,
            operation=st.sampled_from([*OPERATIONS, "x"]),
            entity_type=st.sampled_from([*ENTITY_TYPES, "x"]),
            entity_id=st.one_of(st.sampled_from(["a", "b", "", STORY]), TEXT),
            payload=st.one_of(st.sampled_from([TITLED, "{}", '{"event_type": "x"}']), TEXT),
        ),
        max_size=12,
    )
)
def test_every_change_is_stored_or_has_one_warning(changes: list[ContextChange]) -> None:
    outcome = judged(*changes)

    assert len(outcome.applied) + len(outcome.warnings) == len(changes)
    named = [int(warning.split(" ")[1]) for warning in outcome.warnings]
    assert sorted([*named, *(parsed.number for parsed in outcome.applied)]) == list(
        range(len(changes))
    )
    assert all(isinstance(parsed, ParsedChange) for parsed in outcome.applied)
    made: list[Any] = [write.row for write in outcome.writes]
    assert all(row["story_id"] == STORY for row in made)
