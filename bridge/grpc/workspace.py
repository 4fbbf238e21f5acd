"""The Workspace service (fleet.workspace.v1): a workspace report's score by rigor.

A story scores its report by the same function. A call only calculates: it reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.json_format import MessageToDict

from bridge.grpc.calls import Context, parse_request
from bridge.grpc.wire import workspace_pb2 as pb
from bridge.grpc.wire import workspace_pb2_grpc
from workflows.models.errors import InvalidInput
from workflows.models.process import RigorLevel
from workflows.models.report import ReportScore, WorkspaceReport
from workflows.rules.rigor import DIMENSIONS, score_report

DEFAULT_RIGOR = "L1"
"""The rigor of a request that names none, as of a story that names none."""

MESSAGE = "ScoreWorkspaceRequest"


class WorkspaceServicer(workspace_pb2_grpc.WorkspaceServiceServicer):
    """The service that scores reports; any valid token may call it."""

    def __init__(self, levels: Mapping[str, RigorLevel]) -> None:
        """Score by these levels: L0 to L3 of rigor.yaml."""
        self._levels = levels

    async def ScoreWorkspace(  # noqa: N802
        self, request: pb.ScoreWorkspaceRequest, _: Context
    ) -> pb.ScoreWorkspaceResponse:
        """Return the score, the decision, and in `reasons` each dimension's points and deductions.

        An empty rigor_level means L1. Parts that score (build, unit, static with sonar, e2e) are
        required: a part that was not measured is refused, not scored as zero.

        Raises:
            InvalidInput: names each wrong field.
        """
        rigor = request.rigor_level or DEFAULT_RIGOR
        if rigor not in self._levels:
            rule = f"unknown level; one of {', '.join(self._levels)}"
            raise InvalidInput(MESSAGE, [("rigor_level", rule)])
        level = self._levels[rigor]
        score = score_report(level, rigor, report_of(request))
        return pb.ScoreWorkspaceResponse(
            score=score.score,
            rigor=score.rigor,
            reasons=[*breakdown(level, score), *score.reasons],
            gating_decision=score.gating_decision,
        )


def report_of(request: pb.ScoreWorkspaceRequest) -> WorkspaceReport:
    """Convert the message to a report.

    Raises:
        InvalidInput: names each wrong field as the contract does.
    """
    if not request.HasField("report"):
        raise InvalidInput(MESSAGE, [("report", "required; add it")])
    report = request.report
    if request.job_id and report.job_id and request.job_id != report.job_id:
        rule = "is not the report's; give one job_id, or the same in both"
        raise InvalidInput(MESSAGE, [("job_id", rule)])
    # Zeros are included, because they were measured; parts that are absent are not. Coverage, of
    # 32 bits, becomes the shortest decimal: 70.1, not 70.0999985.
    fields = MessageToDict(
        report, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    fields["job_id"] = report.job_id or request.job_id
    names = {name: f"report.{name}" for name in WorkspaceReport.model_fields}
    return parse_request(WorkspaceReport, MESSAGE, fields, names)


def breakdown(level: RigorLevel, score: ReportScore) -> list[str]:
    """Return a line for each dimension, with its points and its weight."""
    return [
        f"{name}: {score.dimensions[name]:.4g} of 100 points, weight {level.weights[name]:g}"
        for name in DIMENSIONS
    ]
