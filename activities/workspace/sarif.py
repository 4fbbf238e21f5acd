"""Findings from SARIF 2.1.0, as linters write it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from activities.checks.base import printable
from activities.workspace.results import (
    InvalidResult,
    one_line,
    read_result,
    relative_path,
    result_files,
)
from workflows.models.measurement import Finding

MAX_FINDINGS = 100_000

CRITICAL_SEVERITY = 7.0
"""The security severity from which a finding is critical; below it, code scanners say medium."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Message(_Part):
    text: str = ""
    markdown: str = ""
    id: str = ""


class _Artifact(_Part):
    uri: str = ""


class _Region(_Part):
    start_line: int = Field(default=0, ge=0, alias="startLine")


class _Physical(_Part):
    artifact_location: _Artifact = Field(default=_Artifact(), alias="artifactLocation")
    region: _Region = Field(default_factory=lambda: _Region(startLine=0))


class _Location(_Part):
    physical_location: _Physical = Field(
        default_factory=lambda: _Physical(artifactLocation=_Artifact()), alias="physicalLocation"
    )


class _Rule(_Part):
    id: str
    properties: dict[str, Any] = {}
    default_configuration: dict[str, Any] = Field(default={}, alias="defaultConfiguration")

    def severity(self) -> float:
        try:
            return float(self.properties.get("security-severity", 0))
        except (TypeError, ValueError):
            return 0.0


class _Driver(_Part):
    name: str = ""
    rules: list[_Rule] = []


class _Tool(_Part):
    driver: _Driver


class _Result(_Part):
    rule_id: str | None = Field(default=None, alias="ruleId")
    level: Literal["none", "note", "warning", "error"] | None = None
    kind: str = "fail"
    message: _Message
    locations: list[_Location] = []
    suppressions: list[dict[str, Any]] = []


class _Run(_Part):
    tool: _Tool
    results: list[_Result] = Field(max_length=MAX_FINDINGS)


class _Log(_Part):
    version: Literal["2.1.0"]
    runs: list[_Run] = Field(max_length=100)


def read_findings(reports: Path) -> list[Finding] | None:
    """Return the findings of all SARIF files of a folder; None if it has no such file.

    Raises:
        InvalidResult: one cannot be read, or is not SARIF 2.1.0.
    """
    files = result_files(reports, ".sarif", ".sarif.json")
    if not files:
        return None
    return [finding for file in files for finding in _findings(_read(file))]


def _read(file: Path) -> _Log:
    try:
        return _Log.model_validate(json.loads(read_result(file)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidResult(f"{file.name}: is not SARIF 2.1.0: {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidResult(f"{file.name}: is not JSON: {error!r:.200}") from error


def _findings(log: _Log) -> Iterator[Finding]:
    for run in log.runs:
        rules = {rule.id: rule for rule in run.tool.driver.rules}
        for result in run.results:
            if result.kind != "fail" or result.suppressions:
                continue
            rule = rules.get(result.rule_id or "")
            default = rule.default_configuration.get("level") if rule else None
            place = result.locations[0].physical_location if result.locations else None
            yield Finding(
                rule=printable(result.rule_id or "?")[:100],
                path=printable(relative_path(place.artifact_location.uri))[:400] if place else "",
                line=place.region.start_line if place else 0,
                message=printable(one_line(result.message.text or result.message.id)),
                error=(result.level or default or "warning") == "error",
                critical=bool(rule and rule.severity() >= CRITICAL_SEVERITY),
            )
