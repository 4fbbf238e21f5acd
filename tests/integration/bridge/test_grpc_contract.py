"""The wire format of the five services is the agreed one, and the process `grpc` serves it."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_tools import protoc

from bridge.grpc.wire import (
    orchestrator_pb2,
    orchestrator_pb2_grpc,
    planning_pb2,
    planning_pb2_grpc,
)
from deploy.local.ports import free_ports
from deploy.local.settings import GRPC_PORTS
from tests.support.fleet import Environment, launch, running
from tests.support.grpc_service import bearer, problem
from tests.support.grpc_wire import Wire, agreed, breaks, wire_of
from tests.support.polling import WITHIN_S
from workers.environment import ROOT, SERVICES

# The generated stubs are typed for synchronous channels only.
Health: Any = health_pb2_grpc.HealthStub
Reflection: Any = reflection_pb2_grpc.ServerReflectionStub
Orchestrator: Any = orchestrator_pb2_grpc.OrchestratorServiceStub
Planning: Any = planning_pb2_grpc.PlanningServiceStub

PROTOS = ROOT / "bridge" / "grpc" / "protos"
AGREED = ROOT / "tests" / "contracts"
"""The contracts as agreed with the clients: a copy to compare with and to build clients from."""

FULL_NAMES = {
    "orchestrator": "orchestrator.v1.OrchestratorService",
    "context": "fleet.context.v1.ContextService",
    "planning": "fleet.planning.v1.PlanningService",
    "storycoach": "fleet.storycoach.v1.StoryCoachService",
    "workspace": "fleet.workspace.v1.WorkspaceService",
}


def compiled(folder: Path, into: Path) -> Wire:
    """Compile the contracts of a folder and return their wire format."""
    protos = [str(path) for path in sorted(folder.glob("*.proto"))]
    arguments = ["protoc", f"--proto_path={folder}", f"--descriptor_set_out={into}", *protos]
    assert protoc.main(arguments) == 0
    files = FileDescriptorSet.FromString(into.read_bytes()).file
    return {name: members for file in files for name, members in wire_of(file).items()}


@pytest.mark.parametrize("folder", [PROTOS, AGREED], ids=["served", "agreed"])
def test_the_contracts_are_as_agreed(folder: Path, tmp_path: Path) -> None:
    assert breaks(agreed(), compiled(folder, tmp_path / "set")) == []


def test_what_is_served_has_every_field_of_the_contracts_and_no_other(tmp_path: Path) -> None:
    assert compiled(PROTOS, tmp_path / "ours") == compiled(AGREED, tmp_path / "theirs")


def test_a_changed_contract_is_noticed() -> None:
    changed = agreed()
    name = "fleet.context.v1.ContextChange"
    changed[name] = changed[name] | {"payload": [7, "TYPE_STRING", False]}
    del changed["fleet.planning.v1.Story"]

    breaking = breaks(agreed(), changed)

    assert any(line.startswith(f"{name}.payload: [7,") for line in breaking)
    assert "fleet.planning.v1.Story: missing" in breaking


async def served(channel: grpc.aio.Channel, symbol: str) -> Wire:
    """Return a service's wire format by reflection, which needs no token."""
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    stub = Reflection(channel)
    found: Wire = {}
    async for answer in stub.ServerReflectionInfo(iter([request])):
        for file in answer.file_descriptor_response.file_descriptor_proto:
            found |= wire_of(FileDescriptorProto.FromString(file))
    return found


async def test_the_process_serves_what_was_agreed_each_service_on_its_port(
    environment: Environment,
) -> None:
    found: Wire = {}
    async with running("grpc", environment):
        for name in SERVICES:
            async with grpc.aio.insecure_channel(at(environment, name)) as channel:
                health = await Health(channel).Check(
                    health_pb2.HealthCheckRequest(service=FULL_NAMES[name])
                )
                assert health.status == health_pb2.HealthCheckResponse.SERVING
                found |= await served(channel, FULL_NAMES[name])

    assert breaks(agreed(), found) == []


async def test_a_request_id_stands_for_one_request_in_every_replica(
    environment: Environment,
) -> None:
    mine = (("x-request-id", uuid.uuid4().hex),)
    ana, bo = bearer("ana", "PO"), bearer("bo", "PO")
    event = orchestrator_pb2.PlanningEventRequest(  # needs no worker: it only starts the plan
        event_type="plan.approved", case_id=f"US-{uuid.uuid4().hex[:10]}", plan_id="plan-1"
    )
    other = orchestrator_pb2.PlanningEventRequest(event_type="plan.approved", case_id="US-other")
    ports = dict(zip(GRPC_PORTS, map(str, free_ports(len(GRPC_PORTS))), strict=True))
    second = environment | {name.upper(): port for name, port in ports.items()}

    async with (
        running("grpc", environment),
        running("grpc", second, "orchestrator"),
        grpc.aio.insecure_channel(at(environment, "orchestrator")) as one,
        grpc.aio.insecure_channel(at(second, "orchestrator")) as replica,
        grpc.aio.insecure_channel(at(environment, "planning")) as planning,
    ):
        here, there = Orchestrator(one), Orchestrator(replica)
        for stub in (here, there):
            answer = await stub.ProcessPlanningEvent(event, metadata=ana + mine)
            assert answer.processed
        assert (await there.ProcessPlanningEvent(event, metadata=bo + mine)).processed
        for call in (
            there.ProcessPlanningEvent(other, metadata=ana + mine),
            Planning(planning).CreateStory(
                planning_pb2.CreateStoryRequest(title="Undo"), metadata=ana + mine
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as reused:
                await call
            assert reused.value.code() == grpc.StatusCode.ALREADY_EXISTS
            assert problem(reused.value)[0] == "RequestReused"


def at(environment: Environment, service: str) -> str:
    return f"127.0.0.1:{environment[f'GRPC_{service.upper()}_PORT']}"


async def test_without_a_key_for_its_tokens_nothing_is_served(environment: Environment) -> None:
    process = await launch("grpc", environment | {"GRPC_TOKEN_KEY": ""})

    _, output = await asyncio.wait_for(process.communicate(), WITHIN_S)

    assert process.returncode == 1
    assert b"GRPC_TOKEN_KEY" in output
    assert len(output.decode().splitlines()) == 1


async def test_tokens_do_not_go_over_a_network_in_the_clear(environment: Environment) -> None:
    process = await launch("grpc", environment | {"GRPC_HOST": "0.0.0.0"})

    _, output = await asyncio.wait_for(process.communicate(), WITHIN_S)

    assert process.returncode == 1
    assert b"set GRPC_TLS_CERT and GRPC_TLS_KEY" in output


async def test_one_service_alone_is_served_over_tls_to_who_trusts_its_certificate(
    environment: Environment, tmp_path: Path
) -> None:
    certificate, key = self_signed(tmp_path)
    tls = {"GRPC_TLS_CERT": str(certificate), "GRPC_TLS_KEY": str(key)}
    port = environment["GRPC_WORKSPACE_PORT"]
    trusting = grpc.ssl_channel_credentials(certificate.read_bytes())
    async with running("grpc", environment | tls, "workspace"):
        async with grpc.aio.secure_channel(f"localhost:{port}", trusting) as channel:
            found = await served(channel, FULL_NAMES["workspace"])
        async with grpc.aio.insecure_channel(f"localhost:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await Health(channel).Check(health_pb2.HealthCheckRequest())
        async with grpc.aio.insecure_channel(at(environment, "planning")) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as absent:
                await Health(channel).Check(health_pb2.HealthCheckRequest())

    assert FULL_NAMES["workspace"] in found
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert absent.value.code() == grpc.StatusCode.UNAVAILABLE


def self_signed(folder: Path) -> tuple[Path, Path]:
    """Create a certificate for `localhost`, valid for one day, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoded = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    for file, text in (
        ("cert", certificate.public_bytes(serialization.Encoding.PEM)),
        ("key", encoded),
    ):
        (folder / file).write_bytes(text)
    return folder / "cert", folder / "key"


@pytest.mark.parametrize(
    ("key", "words"),
    [(None, b"go together"), ("cert", b"are not a certificate and its key")],
)
async def test_an_invalid_certificate_or_key_is_refused(
    environment: Environment, tmp_path: Path, key: str | None, words: bytes
) -> None:
    certificate, _ = self_signed(tmp_path)
    half = {"GRPC_TLS_CERT": str(certificate)}
    other = {"GRPC_TLS_KEY": str(tmp_path / key)} if key else {}
    process = await launch("grpc", environment | half | other)

    _, output = await asyncio.wait_for(process.communicate(), WITHIN_S)

    assert process.returncode == 1
    assert words in output
