"""The Workspace service (fleet.workspace.v1): a workspace report's score by rigor.

The story scores its report by the same function. Nothing is read or written: a call is arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bridge.grpc.calls import Context, understood
from bridge.grpc.wire import workspace_pb2 as wire
from bridge.grpc.wire import workspace_pb2_grpc
from workflows.models import InvalidInput, ReportScore, RigorLevel, WorkspaceReport
from workflows.rigor import DIMENSIONS, score_report

DEFAULT_RIGOR = "L1"
"""Of a request that names none, as of a story that names none."""

COVERAGE_DECIMALS = 4
"""Coverage crosses the wire in 32 bits, which hold 70.1 as 70.0999985: four decimals are right."""

MESSAGE = "ScoreWorkspaceRequest"


class WorkspaceServicer(workspace_pb2_grpc.WorkspaceServiceServicer):
    """Scores reports. Any valid token may ask."""

    def __init__(self, levels: Mapping[str, RigorLevel]) -> None:
        """levels: L0 to L3, as rigor.yaml has them."""
        self._levels = levels

    async def ScoreWorkspace(  # noqa: N802
        self, request: wire.ScoreWorkspaceRequest, _: Context
    ) -> wire.ScoreWorkspaceResponse:
        """The score, the decision, and in `reasons` each dimension's points and what cost them.

        An empty rigor_level is L1. Parts that score (build, unit, static with sonar, e2e) must be
        there: one that was not measured is refused, not scored as zero.

        Raises:
            InvalidInput: names each wrong field.
        """
        rigor = request.rigor_level or DEFAULT_RIGOR
        if rigor not in self._levels:
            rule = f"unknown level; one of {', '.join(self._levels)}"
            raise InvalidInput(MESSAGE, [("rigor_level", rule)])
        level = self._levels[rigor]
        score = score_report(level, rigor, report_of(request))
        return wire.ScoreWorkspaceResponse(
            score=score.score,
            rigor=score.rigor,
            reasons=[*breakdown(level, score), *score.reasons],
            gating_decision=score.gating_decision,
        )


def report_of(request: wire.ScoreWorkspaceRequest) -> WorkspaceReport:
    """The report as the workflows know it.

    Raises:
        InvalidInput: names each wrong field as the contract does.
    """
    if not request.HasField("report"):
        raise InvalidInput(MESSAGE, [("report", "required; add it")])
    report = request.report
    if request.job_id and report.job_id and request.job_id != report.job_id:
        rule = "is not the report's; give one job_id, or the same in both"
        raise InvalidInput(MESSAGE, [("job_id", rule)])
    fields = _fields(report) | {"job_id": report.job_id or request.job_id}
    if "unit" in fields:
        fields["unit"]["coverage"] = round(report.unit.coverage, COVERAGE_DECIMALS)
    names = {name: f"report.{name}" for name in WorkspaceReport.model_fields}
    return understood(WorkspaceReport, MESSAGE, fields, names)


def breakdown(level: RigorLevel, score: ReportScore) -> list[str]:
    """A line for each dimension: its points and its weight."""
    return [
        f"{name}: {score.dimensions[name]:.4g} of 100 points, weight {level.weights[name]:g}"
        for name in DIMENSIONS
    ]


def _fields(message: Any) -> dict[str, Any]:
    """A message's fields by name: zeros too, for they are measured, but no part that is absent."""
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None:
            fields[field.name] = value
        elif message.HasField(field.name):
            fields[field.name] = _fields(value)
    return fields
