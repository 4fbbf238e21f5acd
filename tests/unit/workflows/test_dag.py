"""The rules of a plan, and a schema that only valid plans satisfy."""

from itertools import pairwise
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.agents import DraftTask, PlannedTask
from workflows.rules import dag
from workflows.rules.dag import InvalidPlan

ROLES = ["DEV", "QA", "DATA"]


def task(task_id: str, *depends_on: str, role: str = "DEV", priority: int = 1) -> PlannedTask:
    return PlannedTask(
        task_id=task_id,
        role=role,
        title=f"Do {task_id}",
        description="...",
        depends_on=list(depends_on),
        priority=priority,
    )


def ids(tasks: list[PlannedTask]) -> list[str]:
    return [task.task_id for task in tasks]


def faults(tasks: list[PlannedTask], **rules: Any) -> list[str]:
    with pytest.raises(InvalidPlan) as refusal:
        dag.validate(tasks, **rules)
    assert str(refusal.value) == "; ".join(refusal.value.faults)
    return refusal.value.faults


@st.composite
def plans(draw: st.DrawFn) -> list[PlannedTask]:
    """Generate a valid plan of any shape, in any order."""
    size = draw(st.integers(1, 12))
    tasks = [
        task(
            f"t{n}",
            *sorted(draw(st.sets(st.sampled_from([f"t{m}" for m in range(1, n)]))))
            if n > 1
            else (),
            role=draw(st.sampled_from(ROLES)),
            priority=draw(st.integers(1, 3)),
        )
        for n in range(1, size + 1)
    ]
    return draw(st.permutations(tasks))


# --- validation -----------------------------------------------------------------------------------


@given(plans())
def test_a_valid_plan_is_accepted(tasks: list[PlannedTask]) -> None:
    dag.validate(tasks, ROLES, 12)


def test_a_plan_without_tasks_is_refused() -> None:
    assert faults([]) == ["a plan needs at least 1 task"]


def test_a_derived_plan_has_no_more_tasks_than_it_may() -> None:
    tasks = [task(f"t{n}") for n in range(13)]

    dag.validate(tasks)
    dag.validate(tasks[:12], max_tasks=12)
    assert "13 tasks; at most 12" in faults(tasks, max_tasks=12)[0]


def test_an_unknown_role_is_refused() -> None:
    [fault] = faults([task("t1", role="WIZARD")], roles=ROLES)

    assert "'t1': unknown role 'WIZARD'; one of DEV, QA, DATA" in fault


def test_a_duplicate_id_is_refused() -> None:
    assert "'t1': there 2 times" in faults([task("t1"), task("t2"), task("t1")])[0]


@pytest.mark.parametrize("task_id", ["", "a/b", " a", "a.*", "x" * 201])
def test_an_invalid_id_is_refused(task_id: str) -> None:
    assert "an id is 1 to 100 letters" in faults([task(task_id)])[0]


def test_a_dangling_dependency_is_refused() -> None:
    [fault] = faults([task("t1", "t9")])

    assert "'t1': depends on 't9', which is not in the plan" in fault


def test_a_cycle_is_named_in_its_order() -> None:
    [fault] = faults([task("t0", "t1"), task("t1", "t2"), task("t2", "t3"), task("t3", "t1")])

    assert "t1 -> t2 -> t3 -> t1" in fault


def test_a_task_that_waits_for_itself_is_a_cycle() -> None:
    assert "t1 -> t1" in faults([task("t1", "t1")])[0]


def test_every_fault_is_named_at_once() -> None:
    tasks = [
        task("a", "b"),
        task("b", "a"),
        task("c", "d"),
        task("d", "c"),
        task("e", "nowhere", role="WIZARD"),
    ]

    found = "\n".join(faults(tasks, roles=ROLES, max_tasks=4))

    for part in ("a -> b", "c -> d", "'nowhere'", "'WIZARD'", "5 tasks; at most 4"):
        assert part in found


@given(plans(), st.data())
def test_closing_any_chain_is_a_cycle_with_its_ids(
    tasks: list[PlannedTask], data: st.DataObject
) -> None:
    end = data.draw(st.sampled_from(tasks))
    upstream = {end.task_id}
    while more := {d for t in tasks if t.task_id in upstream for d in t.depends_on} - upstream:
        upstream |= more
    start = data.draw(st.sampled_from(sorted(upstream)))
    closed = [
        t.model_copy(update={"depends_on": [*t.depends_on, end.task_id]})
        if t.task_id == start
        else t
        for t in tasks
    ]

    [fault] = faults(closed)

    named = fault.removeprefix("tasks ").split(":")[0].split(" -> ")
    by_id = {t.task_id: t for t in closed}
    assert named[0] == named[-1]
    assert all(b in by_id[a].depends_on for a, b in pairwise(named))


# --- running --------------------------------------------------------------------------------------


def test_what_waits_for_nothing_is_ready_by_priority_then_id() -> None:
    tasks = [task("t10"), task("t2"), task("t9", priority=0), task("t1", priority=3)]

    assert ids(dag.ready(tasks, [], [])) == ["t9", "t2", "t10", "t1"]


def test_a_task_is_ready_once_all_it_depends_on_is_done() -> None:
    tasks = [task("a"), task("b"), task("c", "a", "b")]

    assert ids(dag.ready(tasks, [], [])) == ["a", "b"]
    assert ids(dag.ready(tasks, ["a"], ["a", "b"])) == []
    assert ids(dag.ready(tasks, ["a", "b"], ["a", "b"])) == ["c"]


@given(plans(), st.data())
def test_a_plan_runs_to_its_end_in_order_and_stops_only_what_a_failure_reaches(
    tasks: list[PlannedTask], data: st.DataObject
) -> None:
    by_id = {t.task_id: t for t in tasks}
    broken = data.draw(st.sets(st.sampled_from(sorted(by_id))))
    done: list[str] = []
    started: list[str] = []
    running: list[str] = []
    while True:
        for next_task in dag.ready(tasks, done, started):
            assert next_task.task_id not in started
            assert set(next_task.depends_on) <= set(done)
            started.append(next_task.task_id)
            running.append(next_task.task_id)
        if not running:
            break
        ended = running.pop(data.draw(st.integers(0, len(running) - 1)))
        if ended not in broken:
            done.append(ended)

    def reached(task_id: str) -> bool:
        depends_on = by_id[task_id].depends_on
        return any(d in broken or reached(d) for d in depends_on)

    assert set(started) == {task_id for task_id in by_id if not reached(task_id)}
    assert set(done) == set(started) - broken


# --- derivation -----------------------------------------------------------------------------------


def test_drafts_are_numbered_and_duplicate_dependencies_merged() -> None:
    drafts = [
        DraftTask(role="DEV", title="One", description="first"),
        DraftTask(role="QA", title="Two", description="second", depends_on=[1, 1], priority=2),
    ]

    numbered = dag.number_tasks("US-1-p1", drafts)

    assert [t.model_dump() for t in numbered] == [
        {
            "task_id": "US-1-p1-t1",
            "role": "DEV",
            "title": "One",
            "description": "first",
            "depends_on": [],
            "priority": 1,
        },
        {
            "task_id": "US-1-p1-t2",
            "role": "QA",
            "title": "Two",
            "description": "second",
            "depends_on": ["US-1-p1-t1"],
            "priority": 2,
        },
    ]


def documents(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Generate documents of a schema that uses only the keywords of a plan's schema."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "string":
        return st.text(min_size=schema["minLength"], max_size=schema["maxLength"])
    if schema["type"] == "object":
        return st.fixed_dictionaries({k: documents(v) for k, v in schema["properties"].items()})
    if prefix := [documents(item) for item in schema.get("prefixItems", [])]:
        return st.integers(schema["minItems"], schema["maxItems"]).flatmap(
            lambda size: st.tuples(*prefix[:size]).map(list)
        )
    if schema["maxItems"] == 0:
        return st.just([])
    return st.lists(documents(schema["items"]), max_size=schema["maxItems"])


@given(st.data(), st.lists(st.sampled_from(ROLES), unique=True, min_size=1), st.integers(1, 12))
def test_every_document_of_the_schema_is_a_valid_plan(
    data: st.DataObject, roles: list[str], max_tasks: int
) -> None:
    schema = dag.plan_schema(roles, max_tasks, title_length=5, description_length=5)
    document = data.draw(documents(schema))
    jsonschema.Draft202012Validator(schema).validate(document)

    drafts = [DraftTask.model_validate(draft) for draft in document["tasks"]]

    dag.validate(dag.number_tasks("US-1-p1", drafts), roles, max_tasks)


GOOD = {"role": "DEV", "title": "t", "description": "d", "depends_on": [], "priority": 1}


@pytest.mark.parametrize(
    "tasks",
    [
        pytest.param([], id="no tasks"),
        pytest.param([GOOD] * 61, id="too many tasks"),
        pytest.param([GOOD | {"role": "WIZARD"}], id="an unknown role"),
        pytest.param([GOOD | {"depends_on": [1]}], id="itself"),
        pytest.param([GOOD, GOOD | {"depends_on": [2]}], id="itself, further on"),
        pytest.param([GOOD | {"depends_on": [2]}, GOOD], id="a later one"),
        pytest.param([GOOD, GOOD | {"depends_on": [0]}], id="no such number"),
        pytest.param([GOOD, GOOD, GOOD | {"depends_on": [1, 2, 1]}], id="more than there are"),
        pytest.param([GOOD | {"title": ""}], id="an empty title"),
        pytest.param([GOOD | {"title": "x" * 81}], id="a long title"),
        pytest.param([GOOD | {"description": "x" * 301}], id="a long description"),
        pytest.param([GOOD | {"priority": 4}], id="an unknown priority"),
        pytest.param([GOOD | {"mood": "good"}], id="an unknown field"),
        pytest.param([{"role": "DEV"}], id="fields missing"),
    ],
)
def test_the_schema_cannot_express_an_invalid_plan(tasks: list[Any]) -> None:
    validator = jsonschema.Draft202012Validator(dag.plan_schema(ROLES))

    longest = GOOD | {"title": "x" * 80, "description": "x" * 300}
    assert validator.is_valid({"tasks": [GOOD, longest | {"depends_on": [1]}]})
    assert not validator.is_valid({"tasks": tasks})


@pytest.mark.parametrize("priority", [1, 2, 3])
def test_the_schema_takes_each_priority(priority: int) -> None:
    validator = jsonschema.Draft202012Validator(dag.plan_schema(ROLES))

    assert validator.is_valid({"tasks": [GOOD | {"priority": priority}]})


@pytest.mark.parametrize("document", [{}, {"tasks": [GOOD], "mood": "good"}, {"plan": [GOOD]}])
def test_the_schema_takes_tasks_and_nothing_else(document: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(dag.plan_schema(ROLES))

    assert not validator.is_valid(document)


def test_the_schema_closes_its_list_after_the_last_task() -> None:
    """Some decoders look at `items` and not at `maxItems`."""
    tasks = dag.plan_schema(ROLES, max_tasks=3)["properties"]["tasks"]

    assert (len(tasks["prefixItems"]), tasks["items"]) == (3, False)
