from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreWorkspaceRequest(_message.Message):
    __slots__ = ("job_id", "report", "rigor_level")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    RIGOR_LEVEL_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    report: WorkspaceReport
    rigor_level: str
    def __init__(self, job_id: _Optional[str] = ..., report: _Optional[_Union[WorkspaceReport, _Mapping]] = ..., rigor_level: _Optional[str] = ...) -> None: ...

class WorkspaceReport(_message.Message):
    __slots__ = ("job_id", "commit", "build", "unit", "static", "e2e", "pr", "timings")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    STATIC_FIELD_NUMBER: _ClassVar[int]
    E2E_FIELD_NUMBER: _ClassVar[int]
    PR_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    commit: str
    build: BuildResult
    unit: UnitResult
    static: StaticResult
    e2e: E2EResult
    pr: PRResult
    timings: Timings
    def __init__(self, job_id: _Optional[str] = ..., commit: _Optional[str] = ..., build: _Optional[_Union[BuildResult, _Mapping]] = ..., unit: _Optional[_Union[UnitResult, _Mapping]] = ..., static: _Optional[_Union[StaticResult, _Mapping]] = ..., e2e: _Optional[_Union[E2EResult, _Mapping]] = ..., pr: _Optional[_Union[PRResult, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class BuildResult(_message.Message):
    __slots__ = ("ok",)
    OK_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    def __init__(self, ok: _Optional[bool] = ...) -> None: ...

class UnitResult(_message.Message):
    __slots__ = ("ok", "passed", "failed", "coverage")
    OK_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    passed: int
    failed: int
    coverage: float
    def __init__(self, ok: _Optional[bool] = ..., passed: _Optional[int] = ..., failed: _Optional[int] = ..., coverage: _Optional[float] = ...) -> None: ...

class StaticResult(_message.Message):
    __slots__ = ("ok", "sonar")
    OK_FIELD_NUMBER: _ClassVar[int]
    SONAR_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    sonar: SonarResult
    def __init__(self, ok: _Optional[bool] = ..., sonar: _Optional[_Union[SonarResult, _Mapping]] = ...) -> None: ...

class SonarResult(_message.Message):
    __slots__ = ("project_key", "quality_gate", "new_critical", "new_major")
    PROJECT_KEY_FIELD_NUMBER: _ClassVar[int]
    QUALITY_GATE_FIELD_NUMBER: _ClassVar[int]
    NEW_CRITICAL_FIELD_NUMBER: _ClassVar[int]
    NEW_MAJOR_FIELD_NUMBER: _ClassVar[int]
    project_key: str
    quality_gate: str
    new_critical: int
    new_major: int
    def __init__(self, project_key: _Optional[str] = ..., quality_gate: _Optional[str] = ..., new_critical: _Optional[int] = ..., new_major: _Optional[int] = ...) -> None: ...

class E2EResult(_message.Message):
    __slots__ = ("ok", "passed", "failed")
    OK_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    passed: int
    failed: int
    def __init__(self, ok: _Optional[bool] = ..., passed: _Optional[int] = ..., failed: _Optional[int] = ...) -> None: ...

class PRResult(_message.Message):
    __slots__ = ("url",)
    URL_FIELD_NUMBER: _ClassVar[int]
    url: str
    def __init__(self, url: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("total_ms",)
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    total_ms: int
    def __init__(self, total_ms: _Optional[int] = ...) -> None: ...

class ScoreWorkspaceResponse(_message.Message):
    __slots__ = ("score", "rigor", "reasons", "gating_decision")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    RIGOR_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    GATING_DECISION_FIELD_NUMBER: _ClassVar[int]
    score: int
    rigor: str
    reasons: _containers.RepeatedScalarFieldContainer[str]
    gating_decision: str
    def __init__(self, score: _Optional[int] = ..., rigor: _Optional[str] = ..., reasons: _Optional[_Iterable[str]] = ..., gating_decision: _Optional[str] = ...) -> None: ...
