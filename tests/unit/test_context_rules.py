"""What of a session is a role's, which changes are stored, and scopes in words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.context import Scopes, load_scopes
from activities.graph.sessions import Decided, Session, share_of
from activities.graph.updates import (
    ENTITY_TYPES,
    OPERATIONS,
    Asked,
    Found,
    Judged,
    Known,
    Refused,
    judge,
    read_change,
    read_changes,
)
from bridge.grpc.context import rehydrated, verdict
from tests.unit.conftest import CONFIG
from workflows.models import ContextChange, ContextUpdate, ContextWrite

STORY = "US-1"


@pytest.fixture(scope="module")
def scopes() -> Scopes:
    return load_scopes(CONFIG / "scopes.yaml")


def decided(
    name: str, role: str = "", affects: tuple[str, ...] = (), depends_on: tuple[str, ...] = ()
) -> Decided:
    """affects: roles of the subtasks that it affects, each with an id of its own."""
    return Decided(
        decision={"id": name, "title": name},
        role=role,
        bound=bool(affects),
        affects=[{"subtask_id": f"{name}-{of}", "title": "", "role": of} for of in affects],
        depends_on=list(depends_on),
    )


def session(*decisions: Decided) -> Session:
    tasks = [{"subtask_id": f"t-{role}", "role": role} for role in ("DEV", "QA", "DATA")]
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
def test_a_decision_is_told_to_whom_it_bears_on(
    scopes: Scopes, decision: Decided, roles: set[str]
) -> None:
    told = {
        role
        for role in ("ARCHITECT", "QA", "DEV", "DATA", "DEVOPS", "COOK")
        if share_of(session(decision), scopes, role).decisions
    }

    assert told == roles


def test_what_a_decision_builds_on_is_told_with_it_in_turn_even_in_a_ring(scopes: Scopes) -> None:
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


def test_a_role_has_its_own_subtasks_and_an_unknown_one_nothing(scopes: Scopes) -> None:
    dev, cook = (share_of(session(decided("d")), scopes, role) for role in ("DEV", "COOK"))

    assert [task["subtask_id"] for task in dev.tasks] == ["t-DEV"]
    assert cook == ([], [], [], [])


def test_stats_count_what_two_roles_share_once(scopes: Scopes) -> None:
    shared = session(decided("d", affects=("DEV", "DATA")), decided("e", depends_on=("d",)))

    stats = rehydrated(shared, scopes, ["DEV", "DATA", "dev"]).stats

    assert (stats.decisions, stats.decision_edges, stats.impacts) == (2, 1, 2)
    assert list(stats.roles) == ["DATA", "DEV", "dev"]


def test_scopes_are_judged_in_words(scopes: Scopes) -> None:
    assert verdict(scopes, "dev", "build", [], []) == "these are the scopes of DEV in BUILD"
    assert verdict(scopes, "DEV", "LUNCH", ["PLAN_HEADER"], ["MILESTONES"]) == (
        "DEV in LUNCH lacks PLAN_HEADER; DEV in LUNCH is not given MILESTONES; "
        "LUNCH is no phase, and has the headers only"
    )


# --- changes --------------------------------------------------------------------------------------


def change(operation: str, entity_type: str, entity_id: str, payload: str = "{}") -> ContextChange:
    return ContextChange(
        operation=operation, entity_type=entity_type, entity_id=entity_id, payload=payload
    )


def judged(*changes: ContextChange, found: Found | None = None, at: str = "2026-03-01") -> Judged:
    update = ContextUpdate(story_id=STORY, actor="ana", changes=list(changes))
    write = ContextWrite(update_id="u", at=at, started_ms=1, update=update)
    return judge(write, read_changes(changes, STORY), found or Found(story_live=True))


TITLED = '{"title": "x"}'


def test_a_change_sees_what_those_before_it_have_done() -> None:
    outcome = judged(
        change("UPDATE", "DECISION", "d", TITLED),
        change("CREATE", "DECISION", "d", TITLED),
        change("UPDATE", "DECISION", "d", TITLED),
        change("DELETE", "DECISION", "d", ""),
        change("DELETE", "DECISION", "d", ""),
        change("CREATE", "DECISION", "d", "{}"),
        change("CREATE", "DECISION", "d", TITLED),
    )

    assert [asked.number for asked in outcome.applied] == [1, 2, 3, 6]
    assert [warning.split(" ")[1] for warning in outcome.warnings] == ["0", "4", "5"]


def test_what_is_newer_in_the_graph_is_kept() -> None:
    newer = Found(story_live=True)
    newer.entities["SUBTASK", "t"] = Known(live=True, status_order="9" * 18)

    outcome = judged(
        change("UPDATE", "SUBTASK", "t", '{"status": "done"}'),
        change("UPDATE", "SUBTASK", "t", TITLED),
        change("DELETE", "SUBTASK", "t"),
        found=newer,
    )

    assert [asked.number for asked in outcome.applied] == [1]
    assert all("newer" in warning for warning in outcome.warnings)


def test_a_subtask_hangs_on_the_newest_plan_that_is_left() -> None:
    outcome = judged(
        change("CREATE", "PLAN", "p-7"),
        change("CREATE", "SUBTASK", "t-1"),
        change("DELETE", "PLAN", "p-7"),
        change("CREATE", "SUBTASK", "t-2"),
        found=Found(story_live=True, plans={"p-3": 3, "p-1": 1}),
    )

    rows = [write.row for write in outcome.writes]
    assert [row["plan_id"] for row in rows if "plan_id" in row] == ["p-7", "p-3"]
    assert rows[0]["node"]["version"] == 4


def test_others_names_for_our_fields_are_understood() -> None:
    read = read_change(
        0,
        change("CREATE", "SUBTASK", "t", '{"dependencies": ["a"], "role": "dev", "colour": 1}'),
        STORY,
    )

    assert read.payload
    assert read.payload.model_dump(exclude_none=True) == {"depends_on": ["a"], "role": "DEV"}


@pytest.mark.parametrize(
    "payload",
    [
        *("", "null", "[]", "{", '{"title": NaN}', '{"title": "\\ud800"}', "[" * 10_000),
        '{"priority": 1e99}',
        '{"title": "' + "x" * 70_000 + '"}',
    ],
)
def test_a_payload_that_is_none_is_refused(payload: str) -> None:
    with pytest.raises(Refused, match="payload"):
        read_change(0, change("CREATE", "SUBTASK", "t", payload), STORY)


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
    assert sorted([*named, *(asked.number for asked in outcome.applied)]) == list(
        range(len(changes))
    )
    assert all(isinstance(asked, Asked) for asked in outcome.applied)
    made: list[Any] = [write.row for write in outcome.writes]
    assert all(row["story_id"] == STORY for row in made)
