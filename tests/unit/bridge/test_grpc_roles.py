"""Every method of the five services by every role: refused before it runs, or carried out."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass

from bridge.grpc.roles import METHODS, Needed
from bridge.grpc.server import Served
from bridge.grpc.wire import (
    context_pb2,
    context_pb2_grpc,
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    planning_pb2,
    planning_pb2_grpc,
    storycoach_pb2,
    storycoach_pb2_grpc,
    workspace_pb2,
    workspace_pb2_grpc,
)
from tests.support.grpc_service import bearer, serving
from workers.environment import ROOT

SERVICES = {
    "planning": (planning_pb2, planning_pb2_grpc, "PlanningService"),
    "storycoach": (storycoach_pb2, storycoach_pb2_grpc, "StoryCoachService"),
    "workspace": (workspace_pb2, workspace_pb2_grpc, "WorkspaceService"),
    "context": (context_pb2, context_pb2_grpc, "ContextService"),
    "orchestrator": (orchestrator_pb2, orchestrator_pb2_grpc, "OrchestratorService"),
}

ROLES = ("DEV", "QA", "ARCHITECT", "DEVOPS", "DATA", "PO", "OPERATOR", "STRANGER", "")

ALLOWED = {
    "PO OPERATOR DEV": (
        "planning CreateStory",
        "storycoach RefineStory",
        "storycoach SuggestStory",
        "orchestrator Deliberate",
        "orchestrator StreamDeliberation",
        "orchestrator Orchestrate",
        "orchestrator DeriveSubtasks",
    ),
    "OPERATOR PO": (
        "orchestrator CreateCouncil",
        "orchestrator RegisterAgent",
        "orchestrator UnregisterAgent",
    ),
    "PO": (
        "context InitializeProjectContext",
        "context CreateStory",
        "context TransitionPhase",
    ),
    "DEV QA ARCHITECT DEVOPS DATA PO OPERATOR": (
        "context CreateTask",
        "context AddProjectDecision",
    ),
}
"""The roles of design section 10 -> the methods that need one of them; any token for the others."""

NEEDED = {method: tuple(roles.split()) for roles, found in ALLOWED.items() for method in found}


def method_names() -> list[str]:
    """Return `service Method` for every method of the contracts."""
    return [
        f"{name} {method.name}"
        for name, (pb, _, service) in SERVICES.items()
        for method in pb.DESCRIPTOR.services_by_name[service].methods
    ]


class Reached:
    """The calls that reached a method, by all services of the fixture."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        self.channels: dict[str, grpc.aio.Channel] = {}

    def servicer(self, name: str) -> Any:
        """Return a servicer of which every method only notes that it was reached."""
        pb, pb_grpc, service = SERVICES[name]

        def noting(method: Any) -> Any:
            async def answer(_: Any, request: Any, context: Any) -> Any:
                self.methods.append(f"{name} {method.name}")
                return GetMessageClass(method.output_type)()

            async def stream(_: Any, request: Any, context: Any) -> AsyncIterator[Any]:
                self.methods.append(f"{name} {method.name}")
                yield GetMessageClass(method.output_type)()

            return stream if method.server_streaming else answer

        methods = pb.DESCRIPTOR.services_by_name[service].methods
        base = getattr(pb_grpc, f"{service}Servicer")
        return type(service, (base,), {each.name: noting(each) for each in methods})()

    async def call(self, name: str, *roles: str) -> grpc.aio.AioRpcError | None:
        """Call a method with an empty request; return the error."""
        service, _, method = name.partition(" ")
        pb, _, full = SERVICES[service]
        found = pb.DESCRIPTOR.services_by_name[full].methods_by_name[method]
        channel = self.channels[service]
        kind: Any = channel.unary_stream if found.server_streaming else channel.unary_unary
        call = kind(
            f"/{found.containing_service.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(found.output_type).FromString,
        )(GetMessageClass(found.input_type)(), metadata=bearer("eve", *roles))
        try:
            await (call.read() if found.server_streaming else call)
        except grpc.aio.AioRpcError as error:
            return error
        return None


@pytest.fixture(scope="module")
async def reached() -> AsyncIterator[Reached]:
    """Serve all five services."""
    found = Reached()
    async with AsyncExitStack() as stack:
        for name, (pb, pb_grpc, service) in SERVICES.items():
            full_name = pb.DESCRIPTOR.services_by_name[service].full_name
            add = getattr(pb_grpc, f"add_{service}Servicer_to_server")
            served = Served(full_name, found.servicer(name), add)
            found.channels[name] = await stack.enter_async_context(serving(served))
        yield found


def test_every_method_has_its_roles() -> None:
    contracts = {
        f"/{pb.DESCRIPTOR.services_by_name[service].full_name}/{method.name}"
        for pb, _, service in SERVICES.values()
        for method in pb.DESCRIPTOR.services_by_name[service].methods
    }

    assert set(METHODS) == contracts


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role or "none")
@pytest.mark.parametrize("method", method_names())
async def test_a_method_runs_for_its_roles_only(reached: Reached, method: str, role: str) -> None:
    needed = NEEDED.get(method, ())
    reached.methods.clear()

    error = await reached.call(method, *filter(None, [role]))

    if not needed or role in needed:
        assert error is None
        assert reached.methods == [method]
    else:
        assert error is not None
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        details = error.details() or ""
        assert set(needed) == set(details.partition("role ")[2].partition(";")[0].split(" or "))
        assert details.endswith(f"eve has {role or 'none'}")
        assert reached.methods == []


def test_the_documentation_shows_the_roles() -> None:
    shown = (ROOT / "docs" / "grpc.md").read_text()
    rows: dict[Needed, list[str]] = {}
    for name, needed in METHODS.items():
        service, _, method = name.rpartition(".")[2].partition("/")
        rows.setdefault(needed, []).append(f"`{service.removesuffix('Service')}/{method}`")

    for needed, methods in rows.items():
        roles = " or ".join(needed.roles) or ("" if needed.checks else "any token")
        assert (
            f"| {', '.join(methods)} | {'. '.join(filter(None, (roles, needed.checks)))} |" in shown
        )
