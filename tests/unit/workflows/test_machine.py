"""The state machine: moves that the shipped YAML allows, and YAML that is always refused."""

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from workflows.models.process import Machine
from workflows.rules import machine as fsm
from workflows.rules.machine import COMPUTED_GUARDS, Facts
from workflows.rules.machine_file import InvalidMachine, parse_machine

DOCUMENT: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[3] / "deploy/config/agile.fsm.yaml").read_text()
)
AGILE = parse_machine(DOCUMENT)
STATES = [state.name for state in AGILE.states]
EVENTS = sorted({transition.event for transition in AGILE.transitions})
ALL_HOLD = Facts(
    guards=dict.fromkeys(COMPUTED_GUARDS, True), approved=["po_approved", "qa_signoff"]
)


def rows(machine: Machine) -> list[tuple[str, str, str, set[str], set[str]]]:
    return [(t.source, t.event, t.target, set(t.guards), set(t.roles)) for t in machine.transitions]


def problems(document: dict[str, Any]) -> str:
    with pytest.raises(InvalidMachine) as refusal:
        parse_machine(document)
    assert str(refusal.value) == "; ".join(refusal.value.problems)
    return "\n".join(refusal.value.problems)


# --- the shipped machine --------------------------------------------------------------------------


def test_the_shipped_machine_is_the_design_s_table() -> None:
    po, qa = "PO", "QA"

    assert rows(AGILE) == [
        ("BACKLOG", "create_story", "DRAFT", set(), set()),
        ("DRAFT", "approve_scope", "DESIGN", {"dor_ok", "po_approved"}, set()),
        ("DESIGN", "approve_design", "BUILD", {"po_approved", "design_complete"}, set()),
        ("BUILD", "build_done", "TEST", {"all_subtasks_done", "builds_passing"}, set()),
        ("TEST", "qa_passed", "DOCS", {"qa_signoff", "tests_passing"}, set()),
        ("DOCS", "docs_ready", "DONE", {"po_approved", "docs_complete"}, set()),
        ("DESIGN", "reject_design", "DRAFT", set(), {po}),
        ("BUILD", "reject_build", "DESIGN", set(), {po, qa}),
        ("TEST", "reject_test", "BUILD", set(), {po, qa}),
        ("DOCS", "reject_docs", "BUILD", set(), {po}),
    ]
    assert (AGILE.initial, AGILE.final) == ("BACKLOG", "DONE")
    assert AGILE.gates == ["approve_scope", "approve_design", "qa_passed", "docs_ready"]
    assert {g.name: g.role for g in AGILE.guards if g.role} == {"po_approved": po, "qa_signoff": qa}
    assert {(s.name, s.work, s.role) for s in AGILE.states} == {
        ("BACKLOG", "none", ""),
        ("DRAFT", "readiness", ""),
        ("DESIGN", "design", "ARCHITECT"),
        ("BUILD", "plan", ""),
        ("TEST", "deliberation", "QA"),
        ("DOCS", "deliberation", "ARCHITECT"),
        ("DONE", "none", ""),
    }


@pytest.mark.parametrize("state", STATES)
def test_every_state_can_reach_the_final_one(state: str) -> None:
    reached = {state}
    while (
        more := {fsm.apply(AGILE, s, e) for s in reached for e in fsm.legal_events(AGILE, s)}
        - reached
    ):
        reached |= more

    assert AGILE.final in reached


def test_the_final_state_has_no_exits() -> None:
    assert fsm.legal_events(AGILE, AGILE.final) == []


@given(st.lists(st.sampled_from([*EVENTS, "unheard_of"]), max_size=60))
def test_no_sequence_of_events_leaves_the_machine(events: list[str]) -> None:
    state = AGILE.initial
    for event in events:
        if event in fsm.legal_events(AGILE, state):
            state = fsm.apply(AGILE, state, event)
        else:
            with pytest.raises(ValueError, match=re.escape(repr(event))):
                fsm.apply(AGILE, state, event)
        assert state in STATES


def test_an_illegal_event_is_refused_with_those_that_are_legal() -> None:
    with pytest.raises(ValueError, match="legal events: approve_design, reject_design"):
        fsm.apply(AGILE, "DESIGN", "docs_ready")


# --- gates, rejections, automatic moves -----------------------------------------------------------


def test_moves_name_what_blocks_them() -> None:
    moves = fsm.moves(AGILE, "DESIGN", Facts())

    assert [m.model_dump() for m in moves] == [
        {
            "event": "approve_design",
            "to": "BUILD",
            "kind": "gate",
            "roles": ["PO"],
            "blocked_by": ["po_approved (role PO)", "design_complete"],
        },
        {
            "event": "reject_design",
            "to": "DRAFT",
            "kind": "rejection",
            "roles": ["PO"],
            "blocked_by": [],
        },
    ]


def test_an_automatic_move_has_no_roles() -> None:
    moves = fsm.moves(AGILE, "BUILD", Facts(guards={"builds_passing": True}))

    assert moves[0].model_dump() == {
        "event": "build_done",
        "to": "TEST",
        "kind": "automatic",
        "roles": [],
        "blocked_by": ["all_subtasks_done"],
    }


def test_a_gate_opens_when_only_approvals_are_missing() -> None:
    assert fsm.open_gate(AGILE, "DRAFT", Facts()) is None

    gate = fsm.open_gate(AGILE, "DRAFT", Facts(guards={"dor_ok": True}))

    assert gate is not None
    assert gate.event == "approve_scope"


@given(st.sampled_from(STATES), st.sets(st.sampled_from(COMPUTED_GUARDS)), st.booleans())
def test_nothing_is_automatic_that_needs_a_person(
    state: str, holding: set[str], approved: bool
) -> None:
    facts = Facts(
        guards=dict.fromkeys(holding, True), approved=ALL_HOLD.approved if approved else []
    )

    taken = fsm.automatic_transition(AGILE, state, facts)

    if taken is not None:
        assert taken.event not in AGILE.gates
        assert not taken.roles
        assert set(taken.guards) <= holding
    elif state in ("BACKLOG", "BUILD"):
        assert not {"all_subtasks_done", "builds_passing"} <= holding


@given(st.sampled_from(STATES), st.sets(st.sampled_from(COMPUTED_GUARDS)))
def test_a_move_is_unblocked_exactly_where_its_guards_hold(state: str, holding: set[str]) -> None:
    facts = Facts(guards=dict.fromkeys(holding, True), approved=ALL_HOLD.approved)

    for move in fsm.moves(AGILE, state, facts):
        transition = next(
            t for t in AGILE.transitions if (t.source, t.event) == (state, move.event)
        )
        assert (move.blocked_by == []) == (
            set(transition.guards) <= holding | set(ALL_HOLD.approved)
        )


def test_an_approval_given_stands_for_its_guard_only() -> None:
    assert fsm.moves(AGILE, "TEST", Facts(approved=["qa_signoff"]))[0].blocked_by == [
        "tests_passing"
    ]
    assert fsm.moves(AGILE, "TEST", Facts(guards={"qa_signoff": True}))[0].blocked_by == [
        "qa_signoff (role QA)",
        "tests_passing",
    ]


def test_a_gate_is_found_by_its_name() -> None:
    gate = fsm.gate_transition(AGILE, "qa_passed")

    assert gate is not None
    assert (gate.source, gate.target) == ("TEST", "DOCS")
    assert fsm.gate_roles(AGILE, "qa_passed") == ["QA"]


@pytest.mark.parametrize("event", ["build_done", "reject_test", "unheard_of"])
def test_an_unknown_gate_is_not_found(event: str) -> None:
    assert fsm.gate_transition(AGILE, event) is None
    assert fsm.gate_roles(AGILE, event) == []


def test_a_rejection_belongs_to_its_state() -> None:
    found = fsm.rejection(AGILE, "TEST", "reject_test")

    assert found is not None
    assert found.roles == ["PO", "QA"]
    assert fsm.rejection(AGILE, "DOCS", "reject_test") is None
    assert fsm.rejection(AGILE, "TEST", "qa_passed") is None


def test_the_way_back_from_docs_to_draft_is_three_rejections() -> None:
    way = fsm.rejection_path(AGILE, "DOCS", "DRAFT")

    assert way is not None
    assert [t.event for t in way] == ["reject_docs", "reject_build", "reject_design"]


@given(st.sampled_from(STATES), st.sampled_from(STATES))
def test_the_way_back_is_a_chain_of_rejections(state: str, target: str) -> None:
    way = fsm.rejection_path(AGILE, state, target)

    if way is None:
        assert state != target
        return
    for step in way:
        assert step.roles
        state = fsm.apply(AGILE, state, step.event)
    assert state == target


def test_the_way_back_is_the_shortest() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["transitions"].append(
        {"from": "DOCS", "event": "start_over", "to": "DRAFT", "roles": ["PO"]}
    )

    way = fsm.rejection_path(parse_machine(document), "DOCS", "DRAFT")

    assert way is not None
    assert [t.event for t in way] == ["start_over"]


# --- a team's own process -------------------------------------------------------------------------


def test_a_team_adds_a_state_with_a_gate_in_yaml_alone() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["states"]["REVIEW"] = {
        "work": "deliberation",
        "role": "DEVOPS",
        "task": "Review the change for security.",
    }
    document["guards"]["security_signoff"] = {"role": "SECURITY"}
    document["gates"].append("pass_review")
    qa_passed = next(t for t in document["transitions"] if t["event"] == "qa_passed")
    qa_passed["to"] = "REVIEW"
    document["transitions"] += [
        {
            "from": "REVIEW",
            "event": "pass_review",
            "to": "DOCS",
            "guards": ["security_signoff", "po_approved", "tests_passing"],
        },
        {"from": "REVIEW", "event": "reject_review", "to": "BUILD", "roles": ["SECURITY"]},
    ]

    machine = parse_machine(document)

    assert fsm.apply(machine, "TEST", "qa_passed") == "REVIEW"
    assert fsm.gate_roles(machine, "pass_review") == ["SECURITY", "PO"]
    facts = Facts(guards={"tests_passing": True}, approved=["po_approved"])
    gate = fsm.open_gate(machine, "REVIEW", facts)
    assert gate is not None
    assert gate.event == "pass_review"
    assert fsm.moves(machine, "REVIEW", facts)[0].blocked_by == ["security_signoff (role SECURITY)"]
    assert fsm.rejection_path(machine, "REVIEW", "BUILD") == [
        fsm.rejection(machine, "REVIEW", "reject_review")
    ]


# --- documents that are refused -------------------------------------------------------------------


def put(*path: Any, to: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = to

    return change


def add(key: str, *rows: Any) -> Any:
    def change(document: dict[str, Any]) -> None:
        document[key] = [*document[key], *rows]

    return change


SCOPE, BUILD_DONE, REJECT_DESIGN = 1, 3, 6  # indexes in the shipped machine's transitions
FAULTS: dict[str, tuple[Any, str]] = {
    "a transition to nowhere": (
        put("transitions", 0, "to", to="LIMBO"),
        r"transition 'create_story' from 'BACKLOG': unknown state 'LIMBO'; add it",
    ),
    "a transition from nowhere": (
        add("transitions", {"from": "LIMBO", "event": "wake", "to": "DRAFT"}),
        r"transition 'wake' from 'LIMBO': unknown state 'LIMBO'",
    ),
    "a council of tests in a state that deliberates nothing": (
        put("states", "BUILD", "in_repository", to={"changes": "tests", "task": "Test it."}),
        r"state 'BUILD': in_repository: is for work deliberation",
    ),
    "a council that changes something unknown": (
        put("states", "TEST", "in_repository", "changes", to="code"),
        r"state 'TEST': in_repository: unknown changes 'code'; use one of tests, docs",
    ),
    "a council that is asked nothing in a repository": (
        put("states", "DOCS", "in_repository", "task", to=" "),
        r"state 'DOCS': in_repository: task: required",
    ),
    "an unknown key of a council in a repository": (
        put("states", "DOCS", "in_repository", "colour", to="red"),
        r"state 'DOCS': in_repository: unknown key 'colour'",
    ),
    "a state no one gets to": (
        put("states", "ISLAND", to={}),
        r"state 'ISLAND': unreachable from 'BACKLOG'",
    ),
    "a dead end": (
        lambda d: (
            put("states", "PIT", to={})(d),
            add("transitions", {"from": "TEST", "event": "fall", "to": "PIT", "roles": ["QA"]})(d),
        ),
        r"state 'PIT': a dead end",
    ),
    "a guard that is not declared": (
        put("transitions", BUILD_DONE, "guards", to=["moon_is_full"]),
        r"transition 'build_done' from 'BUILD': unknown guard 'moon_is_full'",
    ),
    "a guard that nobody can pass": (
        put("guards", "moon_is_full", to={}),
        r"guard 'moon_is_full': a human guard without a role.*builds_passing",
    ),
    "a human guard without a role": (
        put("guards", "qa_signoff", to={"role": ""}),
        r"guard 'qa_signoff': a human guard without a role; add the role",
    ),
    "a computed guard with a role": (
        put("guards", "dor_ok", to={"role": "PO"}),
        r"guard 'dor_ok': the engine computes it; remove its role",
    ),
    "the same transition twice": (
        add(
            "transitions",
            {"from": "BUILD", "event": "reject_build", "to": "DRAFT", "roles": ["PO"]},
        ),
        r"transition 'reject_build' from 'BUILD': there 2 times",
    ),
    "a gate that no transition has": (
        add("gates", "sign_in_blood"),
        r"gate 'sign_in_blood': no transition has this event",
    ),
    "a gate twice": (add("gates", "qa_passed"), r"gates: gate 'qa_passed' is there 2 times"),
    "a gate of two states": (
        add(
            "transitions",
            {"from": "BUILD", "event": "qa_passed", "to": "DOCS", "guards": ["qa_signoff"]},
        ),
        r"gate 'qa_passed': leaves TEST, BUILD; name a separate gate for each",
    ),
    "a state with two gates": (
        lambda d: (
            add("gates", "skip")(d),
            add(
                "transitions",
                {"from": "DRAFT", "event": "skip", "to": "BUILD", "guards": ["po_approved"]},
            )(d),
        ),
        r"state 'DRAFT': has gates approve_scope, skip",
    ),
    "a gate without a human guard": (
        put("transitions", SCOPE, "guards", to=["dor_ok"]),
        r"transition 'approve_scope' from 'DRAFT': a gate without a human guard",
    ),
    "a human guard off the gates": (
        put("transitions", BUILD_DONE, "guards", to=["builds_passing", "qa_signoff"]),
        r"transition 'build_done' from 'BUILD': human guard 'qa_signoff' .* not a gate",
    ),
    "a rejection that is a gate": (
        put("transitions", SCOPE, "roles", to=["PO"]),
        r"transition 'approve_scope' from 'DRAFT': a rejection .* and a gate",
    ),
    "a rejection with guards": (
        put("transitions", REJECT_DESIGN, "guards", to=["dor_ok"]),
        r"transition 'reject_design' from 'DESIGN': a rejection .* takes no guards",
    ),
    "no initial state": (lambda d: d.pop("initial"), r"initial: required"),
    "no final state": (lambda d: d.pop("final"), r"final: required"),
    "an unknown initial state": (put("initial", to="LIMBO"), r"initial: unknown state 'LIMBO'"),
    "an unknown final state": (put("final", to="LIMBO"), r"final: unknown state 'LIMBO'"),
    "one state for both ends": (put("final", to="BACKLOG"), r"final: 'BACKLOG' is the initial"),
    "a final state no one gets to": (
        put("transitions", 5, "to", to="BUILD"),
        r"the final state 'DONE': unreachable",
    ),
    "a final state with exits": (
        add("transitions", {"from": "DONE", "event": "reopen", "to": "DRAFT", "roles": ["PO"]}),
        r"transition 'reopen' from 'DONE': 'DONE' is final and has no exits",
    ),
    "a final state with work": (
        put("states", "DONE", to={"work": "plan"}),
        r"state 'DONE': the final state does no work",
    ),
    "an unknown kind of work": (
        put("states", "TEST", "work", to="prayer"),
        r"state 'TEST': unknown work 'prayer'; use one of none, readiness, design, plan, delib",
    ),
    "a council without a role": (
        lambda d: d["states"]["DOCS"].pop("role"),
        r"state 'DOCS': work deliberation is deliberated and has no role; add",
    ),
    "a council without a task": (
        put("states", "DESIGN", "task", to=" "),
        r"state 'DESIGN': work design is deliberated and has no task; add",
    ),
    "a task without a council": (
        put("states", "BUILD", to={"work": "plan", "task": "Build it."}),
        r"state 'BUILD': work plan asks no council; remove task",
    ),
    "an unknown key": (put("colour", to="red"), r"the document: unknown key 'colour'"),
    "an unknown key of a state": (
        put("states", "TEST", "rol", to="QA"),
        r"state 'TEST': unknown key 'rol'; .* work, role, task, rubric",
    ),
    "an unknown key of a guard": (
        put("guards", "dor_ok", to={"rolle": "PO"}),
        r"guard 'dor_ok': unknown key 'rolle'",
    ),
    "an unknown key of a transition": (
        put("transitions", 0, "guard", to=["dor_ok"]),
        r"transition 'create_story' from 'BACKLOG': unknown key 'guard'; .* from, event, to",
    ),
    "a name that is no name": (
        lambda d: (
            put("states", "IN REVIEW", to={})(d),
            put("transitions", 0, "to", to="IN REVIEW")(d),
        ),
        r"state 'IN REVIEW': a name is",
    ),
    "a role that is no role": (
        put("guards", "po_approved", "role", to="the owner"),
        r"guard 'po_approved': role 'the owner': a role is",
    ),
    "automatic moves in a ring": (
        add("transitions", {"from": "TEST", "event": "again", "to": "BUILD"}),
        r"states (BUILD -> TEST -> BUILD|TEST -> BUILD -> TEST): automatic transitions go round",
    ),
    "a plan without a design": (
        put("states", "DESIGN", to={"work": "readiness"}),
        r"state 'BUILD': runs a plan, and can be entered before there is one",
    ),
    "a rejection that leads from a design on to its plan": (
        add("transitions", {"from": "DESIGN", "event": "skip", "to": "BUILD", "roles": ["PO"]}),
        r"state 'BUILD': runs a plan, and can be entered before there is one",
    ),
    "a design asked of a state that makes none": (
        put("transitions", BUILD_DONE, "guards", to=["design_complete"]),
        r"'build_done' from 'BUILD': guard 'design_complete' is never true in a state of work 'pl",
    ),
    "documentation asked of a state that writes none": (
        put("transitions", BUILD_DONE, "guards", to=["docs_complete"]),
        r"'build_done' from 'BUILD': guard 'docs_complete' is never true .* design or deliberation",
    ),
    "readiness asked of a story that was never scored": (
        put("states", "DRAFT", to={}),
        r"'approve_scope' from 'DRAFT': guard 'dor_ok' is never true: no state of work readiness",
    ),
    "two states of one name": (
        lambda d: (
            put("states", "Test", to={})(d),
            add("transitions", {"from": "TEST", "event": "x", "to": "Test", "roles": ["QA"]})(d),
            add("transitions", {"from": "Test", "event": "y", "to": "DOCS", "roles": ["QA"]})(d),
        ),
        r"states TEST, Test: differ in letter case only",
    ),
    "the budget's gate": (
        lambda d: (
            put("transitions", 5, "event", to="budget")(d),
            put("gates", 3, to="budget")(d),
        ),
        r"gate 'budget': is the name of the token budget's gate; choose another",
    ),
    "a list for a mapping": (put("states", to=["BACKLOG"]), r"states: Input should be"),
    "a transition without a target": (
        lambda d: d["transitions"][0].pop("to"),
        r"transitions.0.to: required; add it",
    ),
    "a word that YAML reads as false": (
        put("initial", to=False),
        r"initial: Input should be a valid string",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_machine_is_refused(fault: str) -> None:
    document = copy.deepcopy(DOCUMENT)
    change, reason = FAULTS[fault]

    change(document)

    assert re.search(reason, problems(document))


def test_every_problem_is_named_at_once() -> None:
    document = copy.deepcopy(DOCUMENT)
    for fault in ("a state no one gets to", "an unknown key", "a gate without a human guard"):
        FAULTS[fault][0](document)

    found = problems(document)

    assert re.search("'ISLAND': unreachable", found)
    assert re.search("unknown key 'colour'", found)
    assert re.search("'approve_scope' .* a gate without a human guard", found)


@pytest.mark.parametrize("document", [{}, {"states": {}}, [], None, "BACKLOG"])
def test_an_invalid_machine_is_refused(document: Any) -> None:
    assert problems(document)


@st.composite
def chains(draw: st.DrawFn) -> dict[str, Any]:
    """Generate a valid machine: a chain of states with gates, automatic moves and rejections."""
    length = draw(st.integers(2, 7))
    names = [f"S{n}" for n in range(length)]
    document: dict[str, Any] = {
        "initial": names[0],
        "final": names[-1],
        "states": {name: draw(st.sampled_from([{}, None])) for name in names},
        "guards": {"signed": {"role": "PO"}, **{guard: {} for guard in COMPUTED_GUARDS}},
        "gates": [],
        "transitions": [],
    }
    of_reports = ["builds_passing", "tests_passing"]  # any state may wait for a report
    computed = st.lists(st.sampled_from(of_reports), unique=True)
    for n, (here, there) in enumerate(pairwise(names)):
        guards = draw(computed)
        if draw(st.booleans()):
            document["gates"].append(f"go_{n}")
            guards.insert(draw(st.integers(0, len(guards))), "signed")
        document["transitions"].append(
            {"from": here, "event": f"go_{n}", "to": there, "guards": guards}
        )
        if n and draw(st.booleans()):
            back = draw(st.sampled_from(names[:n]))
            document["transitions"].append(
                {"from": here, "event": "reject", "to": back, "roles": ["PO", "QA"]}
            )
    document["transitions"] = draw(st.permutations(document["transitions"]))
    return document


@given(chains())
def test_a_valid_machine_is_accepted_and_reaches_its_final_state(document: dict[str, Any]) -> None:
    machine = parse_machine(document)

    state = machine.initial
    facts = Facts(guards=dict.fromkeys(COMPUTED_GUARDS, True), approved=["signed"])
    for _ in machine.states:
        step = fsm.automatic_transition(machine, state, facts) or fsm.open_gate(
            machine, state, facts
        )
        state = step.target if step else state
    assert state == machine.final


INJECTED: dict[str, Any] = {
    "'LOST': unreachable": lambda d, t: put("states", "LOST", to={})(d),
    "unknown state 'LIMBO'": lambda d, t: t.update(to="LIMBO"),
    "unknown guard 'odd'": lambda d, t: t.update(guards=[*t.get("guards", []), "odd"]),
    "there 2 times; keep one": lambda d, t: d["transitions"].append(dict(t)),
    "'ghost': no transition has this event": lambda d, t: d["gates"].append("ghost"),
    "unknown key 'gards'": lambda d, t: t.update(gards=[]),
    "'signed': a human guard without a role": lambda d, t: d["guards"].update(signed={}),
    "unknown work 'magic'": lambda d, t: put("states", t["from"], to={"work": "magic"})(d),
}


@given(st.data(), chains(), st.sampled_from(sorted(INJECTED)))
def test_one_fault_in_any_machine_is_named(
    data: st.DataObject, document: dict[str, Any], fault: str
) -> None:
    INJECTED[fault](document, data.draw(st.sampled_from(document["transitions"])))

    assert fault in problems(document)
