"""Test results from JUnit XML, as all test runners write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from xml.etree.ElementTree import Element

from junitparser import Error, Failure, Skipped, TestCase

from activities.checks.base import printable
from activities.workspace.results import InvalidResult, one_line, read_xml, result_files

MAX_TESTS = 100_000
NAME_CHARACTERS = 300

Outcome = Literal["passed", "failed", "skipped"]

_WORSE: Mapping[Outcome, int] = {"skipped": 0, "passed": 1, "failed": 2}


@dataclass
class Outcomes:
    """The results of a test run.

    Attributes:
        outcomes: by the test's name; of tests with the same name the worst.
        messages: the first line of each failure, by the test's name.
        passed: how many have passed; tests with the same name count each.
    """

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def names(self, outcome: Outcome) -> list[str]:
        """Return the names of the tests with an outcome, in the report's order."""
        return [name for name, each in self.outcomes.items() if each == outcome]

    def with_passed(self, names: Iterable[str]) -> Outcomes:
        """Return these results with tests that another run has passed."""
        return replace(self, outcomes={**self.outcomes, **dict.fromkeys(names, "passed")})

    def add(self, name: str, outcome: Outcome, message: str) -> None:
        """Add one test."""
        self.passed += outcome == "passed"
        self.failed += outcome == "failed"
        self.skipped += outcome == "skipped"
        known = self.outcomes.get(name)
        if known is None or _WORSE[outcome] > _WORSE[known]:
            self.outcomes[name] = outcome
        if outcome == "failed":
            self.messages.setdefault(name, message)


def read_tests(reports: Path) -> Outcomes | None:
    """Return the tests of all JUnit files of a folder; None if it has no such file.

    Raises:
        InvalidResult: an XML file cannot be read, or has too many tests.
    """
    roots = [read_xml(file) for file in result_files(reports, ".xml")]
    roots = [root for root in roots if root.tag in ("testsuite", "testsuites")]
    if not roots:
        return None
    tests = Outcomes()
    for root in roots:
        for case, suite in _cases(root):
            if len(tests.outcomes) >= MAX_TESTS:
                raise InvalidResult(f"JUnit: more than {MAX_TESTS} tests; at most so many are read")
            tests.add(_name(case, suite), *_outcome(case))
    return tests


def _cases(root: Element) -> Iterator[tuple[TestCase, str]]:
    """Yield each test with the name of its suite, however deep suites are nested."""
    waiting = [(root, "")]
    while waiting:
        element, suite = waiting.pop()
        if element.tag == "testcase":
            yield TestCase.fromelem(element), suite  # type: ignore[no-untyped-call]
        elif element.tag in ("testsuite", "testsuites"):
            below = (element.get("name") or suite) if element.tag == "testsuite" else suite
            waiting += [(child, below) for child in reversed(element)]


def _name(case: TestCase, suite: str) -> str:
    """Return a name that no other test should have; with the suite's if the class is not unique."""
    place = case.classname or ""
    suite = "" if "." in place or suite == "pytest" else suite
    parts = dict.fromkeys((suite, place, case.name or "?"))
    return printable("::".join(filter(None, parts)))[:NAME_CHARACTERS]


def _outcome(case: TestCase) -> tuple[Outcome, str]:
    results = [each for each in case if isinstance(each, (Failure, Error))]
    if results:
        return "failed", _message(results[0])
    if any(isinstance(each, Skipped) for each in case):
        return "skipped", ""
    return "passed", ""


def _message(result: Failure | Error) -> str:
    words = result.message or ""
    if words == "collection failure":  # pytest's error itself is the last of its lines
        words = next(
            (line for line in reversed((result.text or "").splitlines()) if line.strip()), words
        ).removeprefix("E ")
    return printable(one_line(words) or one_line(result.text or ""))
