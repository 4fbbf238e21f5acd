"""The context service as existing clients call it: by the contract alone, over a real channel.

The client is built from tests/contracts, the contracts as agreed, not from our own code.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc
from neo4j import AsyncDriver
from redis.asyncio import Redis
from temporalio.client import Client

from activities.graph.activities import Graph
from deploy.local.parts import DEVELOPER_ROLES
from tests.integration.bridge.test_grpc_context import served
from tests.support.fleet import a_namespace, connect
from tests.support.grpc_service import bearer, serving
from tests.support.polling import WITHIN_S, until
from tests.support.servers import Servers
from tests.support.stories import new_story, rows
from workers.environment import ROOT
from workers.processes.context import context_worker
from workers.processes.story import story_worker
from workers.search_attributes import register
from workers.settings import Settings
from workflows.models.ids import story_workflow_id
from workflows.models.story import Amend, StoryInput
from workflows.story import StoryWorkflow
from workflows.stubs import STORY_QUEUE

AGREED = ROOT / "tests" / "contracts"

Roles = tuple[str, ...]


class ContractClient:
    """A client that calls the methods of one service by their names in its contract."""

    def __init__(self, channel: grpc.aio.Channel, service: Any, pool: Any) -> None:
        self._channel = channel
        self._service = service
        self._pool = pool

    async def __call__(
        self, method: str, *, roles: Roles = DEVELOPER_ROLES, actor: str = "ana", **fields: Any
    ) -> dict[str, Any]:
        """Return the response as JSON with the contract's names, including fields with no value."""
        found = self._service.methods_by_name[method]
        request = json_format.ParseDict(fields, message_factory.GetMessageClass(found.input_type)())
        answer_type: Any = message_factory.GetMessageClass(found.output_type)
        call: Any = self._channel.unary_unary(
            f"/{self._service.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_type.FromString,
        )
        answer = await call(request, metadata=bearer(actor, *roles), timeout=WITHIN_S)
        shown: dict[str, Any] = json_format.MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return shown

    async def update(self, story_id: str, *changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        return await self("UpdateContext", story_id=story_id, changes=changes, **more)

    async def refused(self, method: str, **fields: Any) -> tuple[grpc.StatusCode, str]:
        """Return the status and details of a call that must be refused."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self(method, **fields)
        return caught.value.code(), caught.value.details() or ""


@pytest.fixture(scope="module")
async def temporal_client(servers: Servers) -> Client:
    client = await connect(servers.temporal.address, await a_namespace(servers))
    await register(client)
    return client


@pytest.fixture(scope="module")
async def context(
    temporal_client: Client,
    graph: Graph,
    driver: AsyncDriver,
    client: Redis,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[ContractClient]:
    into = tmp_path_factory.mktemp("contracts") / "set"
    pool, service = compiled(AGREED / "context.proto", into)
    settings = Settings()
    story = story_worker(temporal_client, settings, client)
    stores = context_worker(temporal_client, settings, driver, client)
    async with serving(served(temporal_client, graph)) as channel, story, stores:
        yield ContractClient(channel, service, pool)


def compiled(proto: Path, into: Path) -> tuple[Any, Any]:
    arguments = [
        "protoc",
        f"--proto_path={proto.parent}",
        f"--descriptor_set_out={into}",
        str(proto),
    ]
    assert protoc.main(arguments) == 0
    pool = descriptor_pool.DescriptorPool()
    (file,) = FileDescriptorSet.FromString(into.read_bytes()).file
    pool.Add(file)
    return pool, pool.FindServiceByName(f"{file.package}.{file.service[0].name}")


def change(operation: str, entity_type: str, entity_id: str = "", **payload: Any) -> dict[str, Any]:
    return {
        "operation": operation,
        "entity_type": entity_type,
        "entity_id": entity_id,
        "payload": json.dumps(payload),
        "reason": "a test",
    }


# --- UpdateContext --------------------------------------------------------------------------------

PATH = """
MATCH (c:Case:Story {id: $story})-[:HAS_PLAN]->(p:PlanVersion)-[:HAS_SUBTASK]->(t:Subtask)
RETURN p.id, t.id, t.status
"""

SENT: list[tuple[list[dict[str, Any]], str, list[Any]]] = [
    (
        [change("CREATE", "CASE", "CASE-7", title="Log in", case_id="CASE-7", team="web")],
        "MATCH (c:Case:Story {id: $story}) RETURN c.title, c.status, c.x_entity_id, c.x_team",
        ["Log in", "DRAFT", "CASE-7", "web"],
    ),
    (
        [change("CREATE", "SUBTASK", "t-1", title="The form", plan_id="p-9")],
        PATH,
        ["p-9", "t-1", "PENDING"],
    ),
    (
        [
            change("CREATE", "CASE", title="Log in"),
            change("UPDATE", "PLAN", "p-1", status="DRAFT"),
            change("UPDATE", "SUBTASK", "t-1", last_status="in_progress"),
        ],
        PATH,
        ["p-1", "t-1", "IN_PROGRESS"],
    ),
    (
        [
            change("CREATE", "CASE", title="Log in"),
            change("CREATE", "PLAN", "p-1"),
            change("UPDATE", "DECISION", "d-1", rationale="Enough", decided_by="bo", weight=3),
        ],
        "MATCH (:Case {id: $story})-[:HAS_PLAN]->(:PlanVersion)-[:CONTAINS_DECISION]->(d:Decision) "
        "RETURN d.title, d.decided_by, d.recorded_by, d.x_weight",
        ["Enough", "bo", "ana", 3],
    ),
    (
        [
            change("CREATE", "CASE", title="Log in"),
            change("CREATE", "MILESTONE", "m-1", type="DEMO", title="Shown to Bo"),
        ],
        "MATCH (:Case {id: $story})<-[:OF]-(e:Event {id: 'm-1'}) "
        "RETURN e.event_type, e.description, e.actor",
        ["DEMO", "Shown to Bo", "ana"],
    ),
    (
        [
            change("CREATE", "CASE", title="Log in", meta={"colour": "red"}),
            change("UPDATE", "CASE", sprint=7),
        ],
        "MATCH (c:Case {id: $story}) RETURN c.x_meta, c.x_sprint",
        ['{"colour": "red"}', 7],
    ),
]


async def test_what_the_predecessors_clients_send_is_stored_without_a_warning(
    context: ContractClient, driver: AsyncDriver
) -> None:
    stories = [new_story() for _ in SENT]

    answers = await asyncio.gather(
        *(
            context.update(story, *changes)
            for story, (changes, _, _) in zip(stories, SENT, strict=True)
        )
    )

    pack = await context("GetContext", story_id=stories[3], role="DEV", phase="BUILD")
    assert "(bo, recorded by ana)" in pack["context"]
    for story, answer, (changes, query, stored) in zip(stories, answers, SENT, strict=True):
        assert (answer["version"], answer["warnings"]) == (1, []), changes
        assert await rows(driver, query, story=story) == [stored], changes


MAY: list[tuple[dict[str, Any], Roles, str]] = [
    (change("CREATE", "PLAN", "p-1"), ("DEV",), ""),
    (change("CREATE", "SUBTASK", "t-1"), ("DATA",), ""),
    (change("CREATE", "DECISION", "d-1", title="x"), ("ARCHITECT",), ""),
    (change("CREATE", "DECISION", "d-1", title="x", decided_by="ana"), ("DEVOPS",), ""),
    (change("CREATE", "MILESTONE", "m-1", type="x"), ("QA",), ""),
    (change("CREATE", "DECISION", "d-1", title="x", decided_by="bo"), ("OPERATOR",), ""),
    (change("UPDATE", "CASE", title="y"), ("OPERATOR",), ""),
    (change("UPDATE", "PLAN", "p-1", status="approved"), ("PO",), ""),
    (change("CREATE", "DECISION", "d-1", title="x"), (), "DEV or QA or ARCHITECT"),
    (change("CREATE", "SUBTASK", "t-1"), ("COOK",), "DEV or QA or ARCHITECT"),
    (change("CREATE", "DECISION", "d-1", title="x", decidedBy="bo"), ("PO",), "OPERATOR"),
    (change("CREATE", "MILESTONE", "m-1", type="x", actor="bo"), ("DEV",), "OPERATOR"),
    (change("UPDATE", "CASE", title="y"), ("PO", "DEV"), "OPERATOR"),
    (change("CREATE", "PLAN", "p-1", status="APPROVED"), ("OPERATOR",), "PO"),
    (change("DELETE", "PLAN", "p-1"), ("OPERATOR", "DEV"), "PO"),
    (change("delete", "case"), ("OPERATOR",), "PO"),
]


async def test_who_may_change_what_is_by_the_tokens_roles_and_a_refusal_names_the_role(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context.update(story, change("CREATE", "CASE", title="x"))
    stored = 1

    for each, roles, needed in MAY:
        if not needed:
            answer = await context.update(story, each, roles=roles)
            stored += 1
            assert (answer["version"], answer["warnings"]) == (stored, []), (each, roles)
            continue
        code, words = await context.refused(
            "UpdateContext", story_id=story, changes=[each], roles=roles
        )
        assert code is grpc.StatusCode.PERMISSION_DENIED, each
        assert f"needs the role {needed}" in words, words
        assert "change 0" in words
    found = await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.context_version", story=story)
    assert found == [[stored]]


WRITERS = frozenset({"DEV", "QA", "ARCHITECT", "DEVOPS", "DATA", "PO", "OPERATOR"})
POLICY: list[tuple[dict[str, Any], frozenset[str]]] = [
    (change("CREATE", "DECISION", "d-1", title="x"), WRITERS),
    (change("UPDATE", "DECISION", "d-1", title="x", decided_by="eve"), WRITERS),
    (change("CREATE", "MILESTONE", "m-1", type="x"), WRITERS),
    (change("CREATE", "SUBTASK", "t-1", title="x"), WRITERS),
    (change("CREATE", "PLAN", "p-1"), WRITERS),
    (change("UPDATE", "PLAN", "p-1", status="draft"), WRITERS),
    (change("INVENT", "PLAN", "p-1"), WRITERS),
    (change("CREATE", "DECISION", "d-1", title="x", decided_by="ana"), frozenset({"OPERATOR"})),
    (change("UPDATE", "DECISION", "d-1", decidedBy="ana"), frozenset({"OPERATOR"})),
    (change("CREATE", "MILESTONE", "m-1", type="x", actor="ana"), frozenset({"OPERATOR"})),
    (change("CREATE", "CASE", title="x"), frozenset({"OPERATOR"})),
    (change("UPDATE", "CASE", description="x"), frozenset({"OPERATOR"})),
    (change("UPDATE", "CASE", sprint=7), frozenset({"OPERATOR"})),
    (change("CREATE", "PLAN", "p-1", status="APPROVED"), frozenset({"PO"})),
    (change("UPDATE", "PLAN", "p-1", status="approved", version=900_000), frozenset({"PO"})),
    (change("CREATE", "PLAN", "p-1", version=900_000), frozenset({"PO"})),
    *(
        (change("DELETE", kind, f"{kind[0].lower()}-1"), frozenset({"PO"}))
        for kind in ("CASE", "PLAN", "SUBTASK", "DECISION", "MILESTONE")
    ),
]
"""A change -> the roles with which eve may send it."""

ROLES = [*sorted(WRITERS), "STRANGER", ""]


@pytest.mark.parametrize("name", ["policy:auto", "Policy:x"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("CASE", {"title": "x", "created_by": ""}),
        ("DECISION", {"title": "x", "decided_by": ""}),
        ("MILESTONE", {"type": "x", "actor": ""}),
    ],
)
async def test_no_role_acts_in_the_name_of_a_policy(
    context: ContractClient, driver: AsyncDriver, name: str, kind: str, fields: dict[str, str]
) -> None:
    story = new_story()
    named = {field: text or name for field, text in fields.items()}

    update = await context.refused(
        "UpdateContext",
        story_id=story,
        changes=[change("CREATE", kind, "" if kind == "CASE" else "e-1", **named)],
    )
    decision = await context.refused(
        "AddProjectDecision", story_id=story, title="x", metadata={"decided_by": name}
    )

    for code, words in (update, decision):
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "reserved" in words
    assert await rows(driver, "MATCH (n {id: $story}) RETURN n.id", story=story) == []


async def test_no_insufficient_role_changes_anything(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context.update(story, change("CREATE", "CASE", title="x"))

    for each, allowed in POLICY:
        for role in (role for role in ROLES if role not in allowed):
            harmless = change("CREATE", "DECISION", "d-2", title="x")
            for changes in ([each], [harmless, each] if role in WRITERS else [each, harmless]):
                code, words = await context.refused(
                    "UpdateContext",
                    story_id=story,
                    changes=changes,
                    roles=tuple(filter(None, [role])),
                    actor="eve",
                )
                assert code is grpc.StatusCode.PERMISSION_DENIED, (each, role)
                assert any(f"role {needed}" in words for needed in ("DEV or", *allowed)), words
                assert f"eve has {role or 'none'}" in words

    stored = await rows(
        driver,
        "MATCH (s:Story {id: $story}) RETURN s.context_version, s.title, "
        "COUNT { MATCH (n:PlanVersion|Subtask|Decision {case_id: $story}) }",
        story=story,
    )
    assert stored == [[1, "x", 0]]


async def test_a_decision_in_anothers_name_and_an_approved_plan_are_not_rewritten(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context.update(
        story,
        change("CREATE", "CASE", title="x"),
        change("CREATE", "PLAN", "p-1", status="APPROVED"),
        change("CREATE", "DECISION", "d-1", title="No SMS", rationale="Cost"),
    )
    eve: dict[str, Any] = {"story_id": story, "actor": "eve", "roles": ("DEV", "ARCHITECT")}
    harmless = change("CREATE", "DECISION", "d-2", title="x")

    decision = await context.refused(
        "UpdateContext",
        **eve,
        changes=[harmless, change("UPDATE", "DECISION", "d-1", rationale="SMS after all")],
    )
    plan = await context.refused(
        "UpdateContext", **eve, changes=[change("UPDATE", "PLAN", "p-1", status="DRAFT")]
    )
    version = await context.refused(
        "UpdateContext", **eve, changes=[change("CREATE", "PLAN", "p-2", version=900_000)]
    )
    untouched = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story}) MATCH (p:PlanVersion {case_id: $story}) "
        "RETURN d.id, d.rationale, d.decided_by, p.id, p.status",
        story=story,
    )
    await context.update(
        story,
        change("UPDATE", "DECISION", "d-1", rationale="Cost, and spam"),
        actor="otto",
        roles=("OPERATOR",),
    )
    corrected = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story}) RETURN d.rationale, d.decided_by, d.recorded_by",
        story=story,
    )

    for refused, needed in ((decision, "OPERATOR"), (plan, "PO"), (version, "PO")):
        assert refused[0] is grpc.StatusCode.PERMISSION_DENIED
        assert f"needs the role {needed}" in refused[1]
        assert "eve has ARCHITECT, DEV" in refused[1]
    assert untouched == [["d-1", "Cost", "ana", "p-1", "APPROVED"]]
    assert corrected == [["Cost, and spam", "ana", "otto"]]


# --- the six methods ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["InitializeProjectContext", "CreateStory"])
async def test_a_case_is_recorded_without_a_workflow_and_once(
    context: ContractClient, driver: AsyncDriver, method: str
) -> None:
    story = new_story()
    fields: dict[str, Any] = {"story_id": story, "title": "Log in", "description": "A form"}

    answers = await asyncio.gather(*(context(method, **fields) for _ in range(3)))
    other = await context(method, **(fields | {"title": "Other", "initial_phase": "BUILD"}))
    refused = await context.refused(method, **fields, roles=("OPERATOR", "DEV"))

    wanted = {"context_id": f"ctx-{story}", "story_id": story, "current_phase": "DESIGN"}
    assert answers == [wanted] * 3
    assert other == wanted
    stored = await rows(
        driver,
        "MATCH (s:Case:Story {id: $story}) "
        "RETURN s.title, s.description, s.status, s.created_by, s.context_version",
        story=story,
    )
    assert stored == [["Log in", "A form", "DESIGN", "ana", 1]]
    assert refused[0] is grpc.StatusCode.PERMISSION_DENIED
    assert "PO" in refused[1]


async def test_a_task_and_a_decision_of_a_story_are_stored_and_its_phase_is_moved(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context("CreateStory", story_id=story, title="Log in", initial_phase="draft")
    await context.update(story, change("CREATE", "PLAN", "p-1"))

    task = await context(
        "CreateTask",
        story_id=story,
        task_id="t-1",
        title="The form",
        role="developer",
        priority=2,
        dependencies=["t-0"],
        estimated_hours=8,
        roles=("DEV",),
    )
    decision = await context(
        "AddProjectDecision",
        story_id=story,
        decision_type="ARCHITECTURE",
        title="One table",
        rationale="Enough",
        alternatives_considered="Two tables",
        metadata={"confidence": "high"},
        roles=("ARCHITECT",),
        actor="bo",
    )
    moved = await context(
        "TransitionPhase",
        story_id=story,
        from_phase="DRAFT",
        to_phase="design",
        rationale="Ready",
        roles=("PO",),
    )
    itself = await context.refused(
        "CreateTask", story_id=story, task_id="t-2", title="x", dependencies=["t-2"]
    )
    session: Any = await context("RehydrateSession", case_id=story)

    assert itself[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "itself" in itself[1]
    assert task == {"task_id": "t-1", "story_id": story, "status": "PENDING"}
    assert moved["current_phase"] == "DESIGN"
    assert moved["transitioned_at"].endswith("Z")
    pack = session["packs"]["DEV"]
    assert pack["case_header"]["status"] == "DESIGN"
    (subtask,) = pack["subtasks"]
    assert (subtask["subtask_id"], subtask["priority"], subtask["dependencies"]) == (
        *("t-1", 2),
        ["t-0"],
    )
    stored = await rows(
        driver,
        "MATCH (d:Decision {case_id: $story, id: $id}) "
        "MATCH (t:Subtask {case_id: $story, id: 't-1'}) "
        "RETURN d.type, d.title, d.decided_by, d.x_alternatives_considered, d.x_metadata, "
        "t.x_estimated_hours",
        story=story,
        id=decision["decision_id"],
    )
    assert stored == [
        ["ARCHITECTURE", "One table", "bo", "Two tables", '{"confidence": "high"}', 8]
    ]
    transition = "MATCH (n:PhaseTransition {story_id: $story}) RETURN n.from_phase, n.to_phase"
    await until(
        lambda: rows(driver, transition, story=story), lambda found: found == [["DRAFT", "DESIGN"]]
    )


REFUSED: list[tuple[str, dict[str, Any], grpc.StatusCode, str]] = [
    ("CreateStory", {"title": ""}, grpc.StatusCode.INVALID_ARGUMENT, "title"),
    ("CreateStory", {"initial_phase": "two words"}, grpc.StatusCode.INVALID_ARGUMENT, "phase"),
    ("CreateStory", {"initial_phase": "DELETED"}, grpc.StatusCode.INVALID_ARGUMENT, "phase: DEL"),
    ("CreateStory", {"title": "a\0b"}, grpc.StatusCode.INVALID_ARGUMENT, "title: contains U+0000"),
    ("TransitionPhase", {"to_phase": "DELETED"}, grpc.StatusCode.INVALID_ARGUMENT, "to_phase: DEL"),
    ("CreateTask", {"task_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "task_id"),
    ("CreateTask", {"priority": -1}, grpc.StatusCode.INVALID_ARGUMENT, "priority"),
    ("CreateTask", {"dependencies": ["t-1"]}, grpc.StatusCode.INVALID_ARGUMENT, "itself"),
    ("CreateTask", {"roles": ()}, grpc.StatusCode.PERMISSION_DENIED, "DEV"),
    ("AddProjectDecision", {"title": ""}, grpc.StatusCode.INVALID_ARGUMENT, "title"),
    ("AddProjectDecision", {"roles": ()}, grpc.StatusCode.PERMISSION_DENIED, "ARCHITECT"),
    (
        "AddProjectDecision",
        {"metadata": {"decided_by": "bo"}, "roles": ("PO",)},
        grpc.StatusCode.PERMISSION_DENIED,
        "OPERATOR",
    ),
    ("AddProjectDecision", {}, grpc.StatusCode.NOT_FOUND, "not found"),
    ("TransitionPhase", {"to_phase": ""}, grpc.StatusCode.INVALID_ARGUMENT, "to_phase"),
    ("TransitionPhase", {"roles": ("DEV",)}, grpc.StatusCode.PERMISSION_DENIED, "PO"),
    ("TransitionPhase", {}, grpc.StatusCode.NOT_FOUND, "not found"),
    ("GetGraphRelationships", {"node_type": "Moon"}, grpc.StatusCode.INVALID_ARGUMENT, "EPIC"),
    ("GetGraphRelationships", {"depth": 4}, grpc.StatusCode.INVALID_ARGUMENT, "depth"),
    ("GetGraphRelationships", {"node_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "node_id"),
    ("GetGraphRelationships", {"roles": ()}, grpc.StatusCode.NOT_FOUND, "node not found"),
]


async def test_an_impossible_request_is_refused_with_the_field_or_the_role(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    right: dict[str, dict[str, Any]] = {
        "CreateStory": {"story_id": story, "title": "x"},
        "CreateTask": {"story_id": story, "task_id": "t-1", "title": "x"},
        "AddProjectDecision": {"story_id": story, "title": "x"},
        "TransitionPhase": {"story_id": story, "from_phase": "DESIGN", "to_phase": "BUILD"},
        "GetGraphRelationships": {"node_id": story, "node_type": "Story"},
    }

    for method, wrong, code, words in REFUSED:
        refusal = await context.refused(method, **(right[method] | wrong))
        assert refusal[0] is code, (method, wrong, refusal)
        assert words in refusal[1], (method, wrong, refusal)

    assert await rows(driver, "MATCH (n {id: $story}) RETURN n.id", story=story) == []


async def test_a_change_that_is_not_stored_leaves_the_version_and_publishes_nothing(
    context: ContractClient, driver: AsyncDriver, temporal_client: Client
) -> None:
    story = new_story()
    await context("CreateStory", story_id=story, title="Log in")
    for name, needed in (("t-1", ["t-2"]), ("t-2", ["t-3"])):
        await context("CreateTask", story_id=story, task_id=name, title="x", dependencies=needed)

    code, words = await context.refused(
        "CreateTask", story_id=story, task_id="t-3", title="x", dependencies=["t-1"]
    )

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "closes a ring" in words
    found = await rows(driver, "MATCH (s:Story {id: $story}) RETURN s.context_version", story=story)
    assert found == [[3]]
    workflow = f"WorkflowId STARTS_WITH 'context-{story}-' AND ExecutionStatus = "
    await until(
        lambda: temporal_client.count_workflows(f"{workflow} 'Failed'"),
        lambda failed: failed.count == 1,
    )


@pytest.mark.parametrize("letter", ["ж", "🧵"])
async def test_texts_of_any_letters_have_the_same_limit(
    context: ContractClient, letter: str
) -> None:
    longest = letter * 20_000
    story = new_story()

    await context("CreateStory", story_id=story, title="x", description=longest)
    code, words = await context.refused(
        "CreateStory", story_id=new_story(), title="x", description=longest + letter
    )

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "description" in words


# --- a story with a running workflow --------------------------------------------------------------


async def test_a_running_story_changes_only_by_its_moves_and_amend(
    context: ContractClient, temporal_client: Client, driver: AsyncDriver
) -> None:
    story = new_story()
    text = StoryInput(
        story_id=story,
        title="Undo the deletion of a note",
        brief="As a writer I want to undo a deletion so that a slip costs me nothing.",
        acceptance_criteria=["Given a deleted note, when I press undo, then it is back."],
        rigor="L0",
    )
    running = await temporal_client.start_workflow(
        StoryWorkflow.run, text, id=story_workflow_id(story), task_queue=STORY_QUEUE
    )
    await until(
        lambda: running.query(StoryWorkflow.state),
        lambda view: view.pending_gate == "approve_scope",
    )
    # No mirror runs here, so the story records its start only after it has waited for one.
    titled = "MATCH (s:Story {id: $id}) WHERE s.title IS NOT NULL RETURN s.id"
    await until(lambda: rows(driver, titled, id=story))

    move = {"story_id": story, "from_phase": "DRAFT", "to_phase": "DESIGN"}
    illegal = await context.refused("TransitionPhase", **(move | {"to_phase": "BUILD"}))
    elsewhere = await context.refused("TransitionPhase", **(move | {"from_phase": "TEST"}))
    forbidden = await context.refused("TransitionPhase", **move, roles=("QA", "OPERATOR"))
    amended = await context.refused(
        "UpdateContext", story_id=story, changes=[change("UPDATE", "CASE", title="Mine")]
    )
    beside = await context.update(
        story,
        change("UPDATE", "CASE", sprint=7),
        change("CREATE", "DECISION", "d-1", title="No SMS"),
    )
    await running.execute_update(
        StoryWorkflow.amend, Amend(title="Undo the deletion of any note", actor="ana")
    )
    await until(
        lambda: running.query(StoryWorkflow.state),
        lambda view: view.pending_gate == "approve_scope",
    )
    moved = await context("TransitionPhase", **move, rationale="Ready", roles=("PO",))

    for code, words in (illegal, elsewhere):
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "legal now: approve_scope to DESIGN" in words
    assert forbidden[0] is grpc.StatusCode.PERMISSION_DENIED
    assert "PO" in forbidden[1]
    assert amended[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert "`amend`" in amended[1]
    assert (beside["version"], beside["warnings"]) == (1, [])
    assert moved["current_phase"] == "DESIGN"
    query = (
        "MATCH (u:ContextUpdate)-[:OF]->(:Case {id: $story}) RETURN u.version ORDER BY u.version"
    )
    await until(lambda: rows(driver, query, story=story), lambda found: found == [[1], [2]])

    await running.terminate()
    onward = {"story_id": story, "from_phase": "DESIGN", "to_phase": "DRAFT"}
    code, words = await context.refused("TransitionPhase", **onward, roles=("PO",))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert f"story {story} has ended; legal now: none" in words


# --- the graph ------------------------------------------------------------------------------------


async def test_a_node_and_its_neighbours_are_shown_whatever_their_properties_are(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context("CreateStory", story_id=story, title="Log in")
    await context.update(
        story,
        change("CREATE", "PLAN", "p-1"),
        change("CREATE", "SUBTASK", f"{story}-t1", title="The form"),
        change("CREATE", "SUBTASK", f"{story}-t2", title="Gone"),
        change("DELETE", "SUBTASK", f"{story}-t2"),
        change("CREATE", "DECISION", "d-1", title="One table", affects=[f"{story}-t1"]),
    )
    await rows(
        driver,
        "MATCH (s:Case {id: $story}) SET s.created_at = datetime('2026-01-01T10:00:00Z'), "
        "s.odd = [1, 2], s.place = point({x: 1, y: 2}), s.raw = true, s.ratio = 0.5 "
        "CREATE (:Project {project_id: $story, name: 'Web'})"
        "-[:HAS_EPIC {since: date('2026-01-01')}]->(:Epic {id: 'epic-1'})-[:HAS_STORY]->(s)",
        story=story,
    )

    near = await context(
        "GetGraphRelationships", node_id=story, node_type="story", depth=1, roles=()
    )
    far = await context("GetGraphRelationships", node_id=story, node_type="Story")
    project = await context("GetGraphRelationships", node_id=story, node_type="PROJECT", depth=3)
    task = await context("GetGraphRelationships", node_id=f"{story}-t1", node_type="Task")

    node = near["node"]
    assert (node["id"], node["type"], node["title"]) == (story, "Story", "Log in")
    shown = {name: node["properties"][name] for name in ("created_at", "odd", "raw", "ratio")}
    assert shown == {
        "created_at": "2026-01-01T10:00:00.000000000+00:00",
        "odd": "[1, 2]",
        "raw": "true",
        "ratio": "0.5",
    }
    assert node["labels"] == ["Case", "Story"]
    assert near["success"]
    assert "p-1" in {each["id"] for each in near["neighbors"]}
    assert f"{story}-t1" not in {each["id"] for each in near["neighbors"]}
    assert f"{story}-t1" in {each["id"] for each in far["neighbors"]}
    assert f"{story}-t2" not in {each["id"] for each in far["neighbors"]}
    edges = {
        (each["from_node_id"], each["type"], each["to_node_id"]) for each in far["relationships"]
    }
    assert {(story, "HAS_PLAN", "p-1"), ("p-1", "HAS_SUBTASK", f"{story}-t1")} <= edges
    assert (project["node"]["id"], project["node"]["type"]) == (story, "Project")
    assert project["node"]["title"] == "Web"
    assert {"Epic", "Story", "PlanVersion"} <= {each["type"] for each in project["neighbors"]}
    assert task["node"]["type"] == "Task"


async def test_of_many_neighbours_the_nearest_are_shown(
    context: ContractClient, driver: AsyncDriver
) -> None:
    story = new_story()
    await context("CreateStory", story_id=story, title="Log in")
    await rows(
        driver,
        "MATCH (s:Case {id: $story}) UNWIND range(1, 300) AS n "
        "CREATE (:Event {case_id: $story, id: 'e-' + n})-[:OF]->(s)",
        story=story,
    )

    answer = await context("GetGraphRelationships", node_id=story, node_type="Story", depth=3)

    assert len(answer["neighbors"]) == 200
    assert "there are more" in answer["message"]


# --- secrets --------------------------------------------------------------------------------------

SECRET = "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0dF3hJ6k"
PASSWORD = "password = 'tr0ub4dor&Zebra'"


async def test_secrets_are_redacted_in_packs_and_sessions_and_the_graph_keeps_them(
    context: ContractClient, driver: AsyncDriver, client: Redis
) -> None:
    story = new_story()
    await context.update(
        story,
        change("CREATE", "CASE", title=f"Use {SECRET}", description=f"with {PASSWORD}"),
        change("CREATE", "PLAN", "p-1"),
        change("CREATE", "SUBTASK", "t-1", title="x", description=SECRET, role="DEV"),
        change("CREATE", "DECISION", "d-1", title="Token", rationale=f"it is {SECRET}"),
        change("CREATE", "MILESTONE", "m-1", type="DEMO", description=f"{SECRET} shown"),
    )

    answers = [
        await context("GetContext", story_id=story, role="DEV", phase="BUILD", token_budget=3_000),
        await context("GetContext", story_id=story, role="QA", phase="BUILD", token_budget=3_000),
        await context(
            "RehydrateSession",
            case_id=story,
            include_timeline=True,
            persist_bundle=True,
            ttl_seconds=60,
        ),
        await context("GetGraphRelationships", node_id=story, node_type="Story"),
    ]

    async def kept() -> list[str]:
        """Return the session and the packs that are kept; the event of an update drops packs."""
        for role in ("DEV", "QA"):
            await context("GetContext", story_id=story, role=role, phase="BUILD")
        keys = [key async for key in client.scan_iter(f"*{story}*")]
        return [
            str(await client.get(key))
            for key in keys
            if (b"session" in key or b"context:" in key) and await client.type(key) == b"string"
        ]

    texts = await until(kept, lambda texts: sum("[REDACTED]" in text for text in texts) >= 2)

    for text in (*map(json.dumps, answers), *texts):
        assert SECRET not in text
        assert "tr0ub4dor" not in text
    assert all("[REDACTED]" in json.dumps(answer) for answer in answers)
    stored = await rows(
        driver, "MATCH (s:Case {id: $story}) RETURN s.title, s.description", story=story
    )
    assert stored == [[f"Use {SECRET}", f"with {PASSWORD}"]]
