"""The Workspace service over a real channel: a report's score, its breakdown, its refusals."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest
from hypothesis import given, settings

from activities.planning import load_config
from bridge.grpc.server import Served
from bridge.grpc.wire import workspace_pb2 as pb
from bridge.grpc.wire import workspace_pb2_grpc
from bridge.grpc.workspace import WorkspaceServicer
from deploy.local.ports import free_ports
from tests.support.grpc_service import bearer, problem, serving
from tests.support.messages import messages
from workflows.models.process import RigorLevel
from workflows.models.report import WorkspaceReport
from workflows.rules.rigor import LEVELS, score_report

RIGOR = load_config().rigor
ANA = bearer("ana")

# The generated stubs are typed for synchronous channels only.
Stub: Any = workspace_pb2_grpc.WorkspaceServiceStub


def served(levels: Mapping[str, RigorLevel]) -> Served:
    return Served(
        "fleet.workspace.v1.WorkspaceService",
        WorkspaceServicer(levels),
        workspace_pb2_grpc.add_WorkspaceServiceServicer_to_server,
    )


@pytest.fixture(scope="module")
async def workspace() -> AsyncIterator[Any]:
    async with serving(served(RIGOR)) as channel:
        yield Stub(channel)


def report(**changed: Any) -> pb.WorkspaceReport:
    parts: dict[str, Any] = {
        "job_id": "job-1",
        "commit": "3f2a9c1",
        "build": pb.BuildResult(ok=True),
        "unit": pb.UnitResult(ok=True, passed=18, failed=2, coverage=70.1),
        "static": pb.StaticResult(
            ok=True, sonar=pb.SonarResult(quality_gate="OK", new_critical=3, new_major=0)
        ),
        "e2e": pb.E2EResult(ok=True, passed=9, failed=1),
    } | changed
    return pb.WorkspaceReport(**parts)


async def violations(call: Any) -> dict[str, str]:
    """Return field -> rule of a call that must be refused as INVALID_ARGUMENT."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    assert refusal.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    reason, details = problem(refusal.value)
    assert reason == "InvalidInput"
    (bad,) = (detail for detail in details if isinstance(detail, BadRequest))
    return {each.field: each.description for each in bad.field_violations}


@pytest.mark.parametrize("rigor", LEVELS)
async def test_a_report_scores_as_the_workflow_scores_it(workspace: Any, rigor: str) -> None:
    message = pb.ScoreWorkspaceRequest(job_id="job-1", report=report(), rigor_level=rigor)

    answer = await workspace.ScoreWorkspace(message, metadata=ANA)

    same = WorkspaceReport.model_validate(
        {
            "job_id": "job-1",
            "build": {"ok": True},
            "unit": {"ok": True, "passed": 18, "failed": 2, "coverage": 70.1},
            "static": {
                "ok": True,
                "sonar": {"quality_gate": "OK", "new_critical": 3, "new_major": 0},
            },
            "e2e": {"ok": True, "passed": 9, "failed": 1},
        }
    )
    expected = score_report(RIGOR[rigor], rigor, same)
    assert (answer.score, answer.rigor, answer.gating_decision) == (
        expected.score,
        rigor,
        expected.gating_decision,
    )
    assert list(answer.reasons[-len(expected.reasons) :] if expected.reasons else []) == (
        expected.reasons
    )


async def test_the_reasons_begin_with_each_dimensions_points(workspace: Any) -> None:
    message = pb.ScoreWorkspaceRequest(report=report(), rigor_level="L1")

    answer = await workspace.ScoreWorkspace(message, metadata=ANA)

    assert list(answer.reasons) == [
        "build: 100 of 100 points, weight 0.35",
        "unit: 94.74 of 100 points, weight 0.25",
        "static: 100 of 100 points, weight 0.2",
        "e2e: 100 of 100 points, weight 0.1",
        "coverage: 100 of 100 points, weight 0.05",
        "lint: 100 of 100 points, weight 0.05",
        "unit: 18 of 20 tests passed (90 %), the threshold is 95 %: 94.74 of 100 points",
    ]
    assert (answer.score, answer.gating_decision) == (99, "pass")


async def test_no_end_to_end_tests_are_none_and_not_one_that_failed(workspace: Any) -> None:
    without = report(e2e=pb.E2EResult(ok=False, passed=0, failed=0))

    answer = await workspace.ScoreWorkspace(pb.ScoreWorkspaceRequest(report=without), metadata=ANA)

    assert "e2e: none, no tests ran: 0 of 100 points" in answer.reasons


async def test_a_failed_build_scores_nothing_and_blocks(workspace: Any) -> None:
    failed = report(build=pb.BuildResult(ok=False))

    answer = await workspace.ScoreWorkspace(pb.ScoreWorkspaceRequest(report=failed), metadata=ANA)

    assert (answer.score, answer.rigor, answer.gating_decision) == (0, "L1", "block")
    assert answer.reasons[-1] == "build: failed; nothing else counts until it is ok"


async def test_a_coverage_of_32_bits_reaches_a_threshold_with_a_decimal() -> None:
    level = RIGOR["L1"].model_copy(update={"coverage": 70.1})

    async with serving(served({"L1": level})) as channel:
        answer = await Stub(channel).ScoreWorkspace(
            pb.ScoreWorkspaceRequest(report=report()), metadata=ANA
        )

    assert "coverage: 100 of 100 points, weight 0.05" in answer.reasons


@pytest.mark.parametrize(
    ("message", "field", "rule"),
    [
        (pb.ScoreWorkspaceRequest(), "report", "required"),
        (
            pb.ScoreWorkspaceRequest(report=report(), rigor_level="L9"),
            "rigor_level",
            "one of L0, L1, L2, L3",
        ),
        (pb.ScoreWorkspaceRequest(report=report(), job_id="job-2"), "job_id", "same in both"),
        (pb.ScoreWorkspaceRequest(report=report(job_id="")), "report.job_id", "at least 1"),
        (pb.ScoreWorkspaceRequest(report=report(build=None)), "report.build", "required"),
        (
            pb.ScoreWorkspaceRequest(report=report(static=pb.StaticResult(ok=True))),
            "report.static.sonar",
            "required",
        ),
        (
            pb.ScoreWorkspaceRequest(report=report(static=pb.StaticResult(sonar=pb.SonarResult()))),
            "report.static.sonar.quality_gate",
            "'OK', 'WARN'",
        ),
        (
            pb.ScoreWorkspaceRequest(report=report(e2e=pb.E2EResult(passed=-1))),
            "report.e2e.passed",
            "greater than or equal to 0",
        ),
        (
            pb.ScoreWorkspaceRequest(
                report=report(unit=pb.UnitResult(ok=True, coverage=float("nan")))
            ),
            "report.unit.coverage",
            "less than or equal to 100",
        ),
    ],
)
async def test_what_is_wrong_is_named_as_the_contract_names_it(
    workspace: Any, message: pb.ScoreWorkspaceRequest, field: str, rule: str
) -> None:
    found = await violations(workspace.ScoreWorkspace(message, metadata=ANA))

    assert rule in found[field]
    assert set(found) == {field}


async def test_every_wrong_field_is_named_at_once(workspace: Any) -> None:
    wrong = pb.ScoreWorkspaceRequest(report=pb.WorkspaceReport(job_id="job-1"))

    found = await violations(workspace.ScoreWorkspace(wrong, metadata=ANA))

    assert set(found) == {"report.build", "report.unit", "report.static", "report.e2e"}


@settings(max_examples=300)
@given(message=messages(pb.ScoreWorkspaceRequest))
async def test_any_message_is_scored_or_refused_by_field(
    workspace: Any, message: pb.ScoreWorkspaceRequest
) -> None:
    call = workspace.ScoreWorkspace(message, metadata=ANA)

    if await call.code() == grpc.StatusCode.OK:
        answer = await call
        assert 0 <= answer.score <= 100
        assert answer.rigor == (message.rigor_level or "L1")
    else:
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_200_clients_at_once_are_all_answered() -> None:
    (port,) = free_ports(1)
    message = pb.ScoreWorkspaceRequest(report=report(), rigor_level="L2")

    async def client() -> int:
        # Its own pool: one connection for each client, as from 200 machines.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=alone) as own:
            answers = [await Stub(own).ScoreWorkspace(message, metadata=ANA) for _ in range(5)]
        return len({answer.score for answer in answers})

    async with serving(served(RIGOR), port=port):
        scores = await asyncio.gather(*(client() for _ in range(200)))

    assert scores == [1] * 200
