"""Result files of test runners and linters: what is counted, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from activities.workspace import results
from activities.workspace.coverage import read_coverage
from activities.workspace.junit import read_tests
from activities.workspace.results import InvalidResult
from activities.workspace.sarif import read_findings
from workflows.rules.globs import matches

BOMB = """<?xml version="1.0"?>
<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]>
<testsuite name="&c;"/>"""

FILE = """<?xml version="1.0"?>
<!DOCTYPE x [<!ENTITY file SYSTEM "file:///etc/passwd">]>
<testsuite name="&file;"/>"""


def junit(folder: Path, text: str, name: str = "unit.xml") -> Path:
    (folder / name).write_text(text)
    return folder


# --- JUnit ----------------------------------------------------------------------------------------


def test_tests_are_counted_by_their_outcome(tmp_path: Path) -> None:
    tests = read_tests(
        junit(
            tmp_path,
            """<testsuites><testsuite name="pytest">
            <testcase classname="tests.test_a" name="test_one"/>
            <testcase classname="tests.test_a" name="test_two">
              <failure message="assert 1 == 2&#10;more">trace</failure></testcase>
            <testcase classname="tests.test_a" name="test_three"><error message="no fixture"/>
            </testcase>
            <testcase classname="tests.test_a" name="test_four"><skipped/></testcase>
            </testsuite></testsuites>""",
        )
    )

    assert tests is not None
    assert (tests.passed, tests.failed, tests.skipped) == (1, 2, 1)
    assert tests.names("failed") == ["tests.test_a::test_two", "tests.test_a::test_three"]
    assert tests.messages["tests.test_a::test_two"] == "assert 1 == 2"


def test_suites_in_suites_and_files_in_folders_are_read(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    junit(tmp_path, '<testsuite name="a"><testsuite name="b"><testcase name="x"/></testsuite></testsuite>')  # fmt: skip  # noqa: E501
    junit(tmp_path / "more", '<testsuites><testcase name="y" classname="test"/></testsuites>')

    tests = read_tests(tmp_path)

    assert tests is not None
    assert sorted(tests.outcomes) == ["b::x", "test::y"]


def test_of_tests_with_the_same_name_one_failure_is_enough(tmp_path: Path) -> None:
    tests = read_tests(
        junit(
            tmp_path,
            '<testsuite><testcase name="x"/><testcase name="x"><failure/></testcase>'
            '<testcase name="x"/></testsuite>',
        )
    )

    assert tests is not None
    assert (tests.outcomes, tests.passed, tests.failed) == ({"x": "failed"}, 2, 1)


def test_without_a_junit_file_nothing_was_counted(tmp_path: Path) -> None:
    junit(tmp_path, "<coverage/>", "coverage.xml")

    assert read_tests(tmp_path) is None


@pytest.mark.parametrize("text", [BOMB, FILE, "<testsuite>", "", "\x00", "<?xml version='1.0' encoding='no-such'?><a/>"])  # fmt: skip  # noqa: E501
def test_hostile_xml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidResult, match=r"unit.xml: is not XML that can be read"):
        read_tests(junit(tmp_path, text))


def test_deeply_nested_xml_does_not_end_the_worker(tmp_path: Path) -> None:
    depth = 200_000
    nested = "<testsuite>" * depth + '<testcase name="x"/>' + "</testsuite>" * depth

    tests = read_tests(junit(tmp_path, nested))

    assert tests is not None
    assert tests.passed == 1


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MAX_BYTES", 100)

    with pytest.raises(InvalidResult, match="it has 1000 bytes; at most 100 are read"):
        read_tests(junit(tmp_path, "x" * 1000))


def test_more_files_than_any_run_writes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "MAX_FILES", 2)
    for number in range(3):
        junit(tmp_path, "<testsuite/>", f"{number}.xml")

    with pytest.raises(InvalidResult, match="3 result files; at most 2"):
        read_tests(tmp_path)


def test_links_pipes_and_folders_are_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    junit(tmp_path, '<testsuite><testcase name="x"/></testsuite>', "secret")
    made: dict[str, Callable[[Path], None]] = {
        "link.xml": lambda file: file.symlink_to(secret),
        "pipe.xml": os.mkfifo,
    }
    for name, make in made.items():
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        make(folder / name)
        with pytest.raises(InvalidResult, match=rf"{name}: (cannot be read|it is not a file)"):
            read_tests(folder)


# --- coverage -------------------------------------------------------------------------------------

COBERTURA = """<?xml version="1.0" ?>
<!DOCTYPE coverage SYSTEM "http://example.com/coverage-04.dtd">
<coverage><sources><source>/project/src</source></sources><packages><package><classes>
<class filename="shop/cart.py"><lines>
  <line number="1" hits="1"/><line number="2" hits="0"/><line number="4" hits="3"/>
  <line number="5" hits="0"/></lines></class>
</classes></package></packages></coverage>"""

LCOV = """TN:
SF:{path}
DA:1,1
DA:2,0
DA:4,3
DA:5,0
end_of_record
"""


def added(path: str, first: int, lines: list[str]) -> str:
    body = "".join(f"+{line}\n" for line in lines)
    return (
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n"
        f"@@ -{first},0 +{first},{len(lines)} @@\n{body}"
    )


def everything(path: str) -> bool:
    return True


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("coverage.xml", COBERTURA),
        ("lcov.info", LCOV.format(path="src/shop/cart.py")),
        ("lcov.info", LCOV.format(path="/project/src/shop/cart.py")),
        ("lcov.info", LCOV.format(path="./src/shop/cart.py")),
    ],
)
def test_only_added_lines_that_can_be_covered_count(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    coverage = read_coverage(tmp_path)
    assert coverage is not None
    diff = added("src/shop/cart.py", 3, ["", "four", "five"])

    new = coverage.of_new_code(diff, tmp_path, everything)

    assert (new.lines, new.covered, new.percent) == (2, 1, 50.0)
    assert new.uncovered == ["src/shop/cart.py:5"]
    assert coverage.of_all().percent == 50.0


def test_a_line_is_covered_if_one_of_several_files_says_so(tmp_path: Path) -> None:
    (tmp_path / "coverage.xml").write_text(COBERTURA)
    (tmp_path / "lcov.info").write_text("SF:src/shop/cart.py\nDA:5,1\nend_of_record\n")
    coverage = read_coverage(tmp_path)
    assert coverage is not None

    new = coverage.of_new_code(added("src/shop/cart.py", 5, ["five"]), tmp_path, everything)

    assert (new.lines, new.covered) == (1, 1)


def test_new_code_that_no_test_loads_is_not_covered(tmp_path: Path) -> None:
    (tmp_path / "coverage.xml").write_text(COBERTURA)
    (tmp_path / "new.py").write_text("one\n\nthree\n")
    (tmp_path / "notes.txt").write_text("one\n")
    coverage = read_coverage(tmp_path)
    assert coverage is not None
    diff = added("new.py", 1, ["one", "", "three"]) + added("notes.txt", 1, ["one"])

    new = coverage.of_new_code(diff, tmp_path, everything)
    tests_only = coverage.of_new_code(diff, tmp_path, lambda path: False)

    assert (new.lines, new.covered, new.uncovered) == (2, 0, ["new.py:1, 3"])
    assert (tests_only.lines, tests_only.percent) == (0, 100.0)


def test_deleted_files_and_links_have_no_lines_to_cover(tmp_path: Path) -> None:
    (tmp_path / "coverage.xml").write_text(COBERTURA)
    (tmp_path / "new.py").write_text("one\n")
    (tmp_path / "link.py").symlink_to("new.py")
    coverage = read_coverage(tmp_path)
    assert coverage is not None
    gone = (
        "diff --git a/gone.py b/gone.py\ndeleted file mode 100644\n--- a/gone.py\n+++ /dev/null\n"
        "@@ -1,2 +0,0 @@\n-one\n-two\n"
    )
    link = (
        "diff --git a/link.py b/link.py\nnew file mode 120000\n--- /dev/null\n+++ b/link.py\n"
        "@@ -0,0 +1 @@\n+new.py\n\\ No newline at end of file\n"
    )

    new = coverage.of_new_code(gone + link + added("new.py", 1, ["one"]), tmp_path, everything)

    assert (new.lines, new.uncovered) == (1, ["new.py:1"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lcov.info", "DA:1,1\n"),
        ("lcov.info", "SF:a\nDA:x,y\nend_of_record"),
        ("lcov.info", "SF:\nDA:1,1\nend_of_record"),
        ("lcov.info", "not lcov at all"),
        ("coverage.xml", BOMB),
    ],
)
def test_coverage_that_cannot_be_read_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(InvalidResult, match=name):
        read_coverage(tmp_path)


@pytest.mark.parametrize("line", ['number="x" hits="1"', 'number="1" hits="many"', 'hits="1"'])
def test_lines_that_are_not_numbers_are_refused(tmp_path: Path, line: str) -> None:
    text = COBERTURA.replace('number="1" hits="1"', line)
    (tmp_path / "coverage.xml").write_text(text)
    coverage = read_coverage(tmp_path)
    assert coverage is not None

    with pytest.raises(InvalidResult, match=r"cart\.py"):
        coverage.of_all()
    with pytest.raises(InvalidResult, match=r"cart\.py"):
        coverage.of_new_code(added("src/shop/cart.py", 1, ["x"]), tmp_path, everything)


# --- SARIF ----------------------------------------------------------------------------------------


def sarif(folder: Path, *found: dict[str, Any], **driver: Any) -> Path:
    run = {"tool": {"driver": {"name": "lint", **driver}}, "results": list(found)}
    (folder / "lint.sarif").write_text(json.dumps({"version": "2.1.0", "runs": [run]}))
    return folder


def finding(rule: str, **other: Any) -> dict[str, Any]:
    place = {"artifactLocation": {"uri": "file:///project/a.js"}, "region": {"startLine": 7}}
    return {
        "ruleId": rule,
        "message": {"text": f"do not\n{rule}"},
        "locations": [{"physicalLocation": place}],
        **other,
    }


def test_findings_have_a_place_a_level_and_a_severity(tmp_path: Path) -> None:
    rules = [
        {"id": "eval", "properties": {"security-severity": "8.1"}},
        {"id": "style", "defaultConfiguration": {"level": "note"}},
        {"id": "strict", "defaultConfiguration": {"level": "error"}},
        {"id": "odd", "properties": {"security-severity": "high"}},
    ]

    found = read_findings(
        sarif(
            tmp_path,
            finding("eval", level="error"),
            finding("style"),
            finding("strict"),
            finding("odd"),
            finding("suppressed", suppressions=[{"kind": "inSource"}]),
            finding("fine", kind="pass"),
            {"message": {"text": "of the whole project"}},
            rules=rules,
        )
    )

    assert found is not None
    assert [(each.rule, each.error, each.critical) for each in found] == [
        ("eval", True, True), ("style", False, False), ("strict", True, False),
        ("odd", False, False), ("?", False, False),
    ]  # fmt: skip
    assert str(found[0]) == "a.js:7: eval do not"
    assert (found[4].path, found[4].line) == ("", 0)


def test_without_a_sarif_file_nothing_was_found_and_nothing_passed(tmp_path: Path) -> None:
    assert read_findings(tmp_path) is None
    assert read_findings(sarif(tmp_path)) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not SARIF 2.1.0"),
        ('{"version": "1.0.0", "runs": []}', "is not SARIF 2.1.0: version"),
        ('{"version": "2.1.0", "runs": [{"results": []}]}', "runs.0.tool"),
        (
            '{"version": "2.1.0", "runs": [{"tool": {"driver": {}}}]}',
            "runs.0.results: Field required",
        ),
    ],
)
def test_what_is_not_sarif_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "lint.sarif").write_text(text)

    with pytest.raises(InvalidResult, match=why):
        read_findings(tmp_path)


# --- globs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "glob", "expected"),
    [
        ("tests/a/b.py", "tests/**", True),
        ("src/tests/b.py", "tests/**", False),
        ("test_a.py", "**/test_*.py", True),
        ("a/b/test_a.py", "**/test_*.py", True),
        ("a/b/my_test_a.py", "**/test_*.py", False),
        ("README.md", "*.md", True),
        ("a/README.md", "*.md", False),
        ("a.b+c", "a.b+c", True),
        ("axb+c", "a.b+c", False),
        ("ab", "a?", True),
        ("a/", "a?", False),
    ],
)
def test_globs_match_within_names_and_across_them(path: str, glob: str, expected: bool) -> None:
    assert matches(path, [glob]) is expected
