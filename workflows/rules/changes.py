"""The choice among changes in a repository: what bars one, its score, and the order of all.

Pure. What was not measured never counts as passed: it scores nothing. A change is compared by its
measured score, then by policy, then by its size; only what is equal in all three needs a judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from workflows.models.agents import Critique, Decision, Proposal
from workflows.models.changes import MeasuredChange
from workflows.models.deliberation import Check
from workflows.models.measurement import LintResult, Measurement, Step, SuiteResult
from workflows.models.report import ReportScore
from workflows.models.workspace import Change
from workflows.rules.ranking import Candidate

NAMED = 10
"""How many tests, findings or files a text names."""

TAIL_CHARACTERS = 1_000
"""Of the output of each step that failed, in what a critic reads."""

CHANGES_NOTHING = "changes nothing"

_BACKTICKS = re.compile("`+")


# --- checks ---------------------------------------------------------------------------------------


def checks(measured: MeasuredChange, scored: ReportScore) -> list[Check]:
    """Return every check of a change: what bars it, what was measured, then policy and substance.

    Args:
        measured: the change.
        scored: its report's score.
    """
    if not measured.change.files:
        return [_barring("change", CHANGES_NOTHING)]
    return [_tests(measured.measurement), _measured(measured, scored), *measured.checks]


def _tests(measurement: Measurement) -> Check:
    """Return whether the tests that passed on the base still do."""
    findings = [
        *(
            [f"breaks what passed on the base: {named(broken)}"]
            if (broken := measurement.broken)
            else []
        ),
        *(
            lost
            for name, suite in (("unit", measurement.unit), ("end-to-end", measurement.e2e))
            if (lost := _lost(name, suite))
        ),
    ]
    if findings:
        return _barring("tests", *findings)
    unit = measurement.unit
    if unit.not_measured:
        why = f"not measured: {unit.not_measured}"
        return Check(name="tests", outcome="not_checked", findings=[why])
    gone = [f"tests of the base that are gone: {named(unit.missing)}"] if unit.missing else []
    return Check(
        name="tests",
        outcome="passed" if unit.ok else "failed",
        score=1.0 if unit.ok else 0.0,
        findings=[*gone, *(f"{each.name}: {each.message}" for each in unit.failures[:NAMED])],
        errors=unit.failed,
    )


def _lost(name: str, suite: SuiteResult) -> str:
    """Return that a run which is not ok lacks tests of the base; empty if it does not.

    Code that cannot be imported makes tests disappear instead of fail.
    """
    if suite.not_measured and suite.base_tests:
        return f"the base's {suite.base_tests} {name} tests do not run: {suite.not_measured}"
    if suite.missing and not suite.ok:
        return f"{name} tests of the base do not run: {named(suite.missing)}"
    return ""


def _measured(measured: MeasuredChange, scored: ReportScore) -> Check:
    measurement = measured.measurement
    unknown = measurement.build.not_measured and measurement.unit.not_measured
    passed = scored.gating_decision == "pass"
    return Check(
        name="measured",
        outcome="not_checked" if unknown else "passed" if passed else "failed",
        score=0.0 if unknown else scored.score / 100,
        findings=[*scored.reasons, *scored.notes],
    )


def _barring(name: str, *findings: str) -> Check:
    return Check(
        name=name,
        outcome="failed",
        score=0.0,
        blocking=True,
        findings=list(findings),
        errors=len(findings),
    )


def candidate(
    agent_id: str, checks: Sequence[Check], scored: ReportScore, change: Change, open_points: int
) -> Candidate:
    """Return a change as it is compared with others.

    Args:
        agent_id: its author.
        checks: all of its checks.
        scored: its report's score.
        change: what it changes.
        open_points: of its critiques.
    """
    outcomes = {check.outcome for check in checks}
    policy = next((check.score for check in checks if check.name == "policy"), None)
    return Candidate(
        agent_id=agent_id,
        score=scored.score / 100 if change.files else 0.0,
        barred=any(check.blocking and check.outcome == "failed" for check in checks),
        open_points=open_points,
        verified=outcomes <= {"passed", "not_applicable"},
        unchecked="not_checked" in outcomes,
        policy=policy or 0.0,
        size=change.insertions + change.deletions,
    )


# --- the order ------------------------------------------------------------------------------------


def order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort by measured score, policy, size, open points and agent id; barred ones come last."""
    return sorted(
        candidates, key=lambda each: (each.barred, *_worth(each), each.open_points, each.agent_id)
    )


def tied(candidates: Iterable[Candidate]) -> list[str]:
    """Return the agent ids that are equal to the best in score, policy and size, in `order`.

    One id: it has won. Several: they need a judge. None: every candidate is barred.
    """
    fit = [each for each in order(candidates) if not each.barred]
    return [each.agent_id for each in fit if _worth(each) == _worth(fit[0])]


def rank(candidates: Sequence[Candidate], winner_id: str) -> list[Candidate]:
    """Return the final order: the winner, then the others in `order`.

    Raises:
        ValueError: `winner_id` is not one of the tied.
    """
    if winner_id not in tied(candidates):
        raise ValueError(f"{winner_id!r} cannot win; one of {tied(candidates)} can")
    return sorted(order(candidates), key=lambda each: each.agent_id != winner_id)


def _worth(candidate: Candidate) -> tuple[float, float, int]:
    return -candidate.score, -candidate.policy, candidate.size


# --- texts ----------------------------------------------------------------------------------------


def proposal(measured: MeasuredChange, summary: str, decisions: list[Decision]) -> Proposal:
    """Return a change as critics and judges read it: its summary, the diff, and what was measured.

    Args:
        measured: the change.
        summary: the author's.
        decisions: the author's.
    """
    change = measured.change
    diff = fenced("diff", measured.diff) if change.files else "It changes no file."
    counts = f"{len(change.files)} files, +{change.insertions} -{change.deletions}"
    text = f"{diff}\n\n## Measured by the fleet ({counts})\n\n{measured_text(measured.measurement)}"
    return Proposal(approach=summary, content=text, decisions=decisions)


def feedback(critiques: Iterable[Critique], found: Iterable[Check]) -> list[str]:
    """Return what an author reads before the revision: critiques, then the findings of checks."""
    lines = []
    for critique in critiques:
        lines += [f"{point.severity}: {point.text}" for point in critique.points]
        lines += [f"suggestion: {critique.suggestion}"] if critique.suggestion else []
    return lines + [
        f"measured: {check.name}: {finding}"
        for check in found
        if check.outcome != "passed"
        for finding in check.findings[:NAMED]
    ]


def measured_text(measurement: Measurement) -> str:
    """Return a measurement in Markdown, with the ends of the outputs of what failed."""
    steps: tuple[tuple[str, Step], ...] = (
        ("build", measurement.build),
        ("unit tests", measurement.unit),
        ("end-to-end tests", measurement.e2e),
        ("coverage of new code", measurement.coverage),
        ("lint", measurement.lint),
        ("static analysis", measurement.static),
    )
    lines = [f"- {name}: {line}" for name, step in steps for line in _step_lines(measurement, step)]
    tails = [
        f"The end of {name}:\n{fenced('', step.tail[-TAIL_CHARACTERS:])}"
        for name, step in steps
        if step.tail and not isinstance(step, LintResult)
    ]
    return "\n\n".join(["\n".join(lines), *tails])


def _step_lines(measurement: Measurement, step: Step) -> Iterator[str]:
    if step.not_measured:
        yield f"not measured: {step.not_measured}"
        return
    match step:
        case SuiteResult():
            yield f"{step.passed} passed, {step.failed} failed, {step.skipped} skipped"
            yield from (f"fails: {each.name}: {each.message}" for each in step.failures[:NAMED])
            for words, names in (
                ("passed on the base and fail now", step.broken),
                ("failed on the base too", step.failing_on_base),
                ("are in the base only", step.missing),
            ):
                if names:
                    yield f"{words}: {named(names)}"
        case LintResult():
            yield f"{step.errors} new errors, {step.critical} of them critical"
            yield from map(str, step.findings[:NAMED])
        case _ if step is measurement.coverage:
            coverage = measurement.coverage
            yield f"{coverage.percent:g} % of {coverage.lines} lines"
            if coverage.uncovered:
                yield f"no test reaches {named(coverage.uncovered)}"
        case _:
            yield step.stopped or f"exit code {step.exit_code}"


def named(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def fenced(label: str, text: str) -> str:
    """Return a text as a code block that it cannot close."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{label}\n{text.rstrip()}\n{fence}"
