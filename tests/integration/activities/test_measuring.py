"""Measuring commits: projects whose build, tests and linters really run."""

import asyncio
import json
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from activities.checks.sandbox import CannotRun, Sandbox
from activities.planning import load_config
from activities.workspace.measuring import measure, measure_base
from activities.workspace.reports import workspace_report
from activities.workspace.toolchains import MissingToolchain
from tests.support.recovering import Recovering
from workflows.models.measurement import BaseResults, Measurement
from workflows.models.workspace import Limits, Repository
from workflows.rules.rigor import score_report

PYTHON = Repository(key="shop", url="file:///shop.git", limits=Limits(seconds=120))

SHOP = {
    "src/shop/__init__.py": "",
    "src/shop/price.py": "import os\n\n\ndef plus(a: int, b: int) -> int:\n    return a + b\n",
    "tests/test_price.py": """
        from shop.price import plus


        def test_plus():
            assert plus(1, 2) == 3


        def test_negative():
            assert plus(1, -2) == -1


        def test_known_to_fail():
            assert plus(1, 1) == 3
        """,
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text).lstrip("\n"))
    return root


def diff(base: Path, tree: Path) -> str:
    done = subprocess.run(
        ["git", "diff", "--no-index", "--no-prefix", "base", "tree"],
        cwd=base.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout
    for folder in ("base", "tree"):
        text = text.replace(f" {folder}/", f" {'a' if folder == 'base' else 'b'}/")
    return "\n".join(
        line.replace(" b/", " a/", 1) if line.startswith("diff --git b/") else line
        for line in text.split("\n")
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BaseResults]:
    """Return the project and its results; a test changes a copy."""
    tree = write(tmp_path_factory.mktemp("shop") / "base", SHOP)
    return tree, asyncio.run(measure_base(PYTHON, tree, commit="b" * 40))


async def changed(
    base: tuple[Path, BaseResults],
    tmp_path: Path,
    files: dict[str, str],
    sandbox: Sandbox | None = None,
    repository: Repository = PYTHON,
) -> Measurement:
    """Measure the project with other files."""
    before = shutil.copytree(base[0], tmp_path / "base")
    tree = write(shutil.copytree(base[0], tmp_path / "tree"), files)
    return await measure(
        repository, tree, base[1], diff=diff(before, tree), commit="c" * 40, sandbox=sandbox
    )


def score(measurement: Measurement) -> tuple[int, list[str]]:
    report = workspace_report(measurement, "job", "shop")
    scored = score_report(load_config().rigor["L1"], "L1", report)
    return scored.score, scored.reasons


# --- against the base -----------------------------------------------------------------------------


async def test_a_change_is_measured_by_what_it_adds(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    found = await changed(
        base,
        tmp_path,
        {
            "src/shop/price.py": SHOP["src/shop/price.py"]
            + "\n\ndef twice(a: int) -> int:\n    if a > 9:\n        return 0\n    return a * 2\n",
            "tests/test_twice.py": """
                from shop.price import twice


                def test_twice():
                    assert twice(2) == 4
                """,
        },
    )

    assert (found.commit, found.base) == ("c" * 40, "b" * 40)
    assert found.build.ran
    assert (found.unit.ok, found.unit.passed, found.unit.failed) == (True, 3, 0)
    assert (found.unit.tests, found.unit.base_tests) == (4, 3)
    assert found.unit.failing_on_base == ["tests.test_price::test_known_to_fail"]
    assert found.unit.exit_code == 1
    assert (found.coverage.lines, found.coverage.covered) == (4, 3)
    assert found.coverage.uncovered == ["src/shop/price.py:10"]
    assert (found.lint.errors, found.lint.known) == (0, 1)  # the unused import is the base's
    assert found.broken == []
    assert found.e2e.not_measured == "no end-to-end tests; put them in tests/e2e/"
    assert score(found) == (
        90,
        ["e2e: none, no tests ran: 0 of 100 points"],
    )
    assert not list((tmp_path / "tree").rglob("__pycache__"))


async def test_a_test_that_passed_on_the_base_and_fails_now_is_broken(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    found = await changed(
        base,
        tmp_path,
        {
            "src/shop/price.py": "def plus(a: int, b: int) -> int:\n    return a + abs(b)\n",
            "tests/test_new.py": "def test_new():\n    assert 1 == 2, 'not yet'\n",
        },
    )

    assert found.broken == ["tests.test_price::test_negative"]
    assert [(each.name, each.message) for each in found.unit.failures] == [
        ("tests.test_new::test_new", "AssertionError: not yet"),
        ("tests.test_price::test_negative", "assert 3 == -1"),
    ]
    assert (found.unit.ok, found.unit.passed, found.unit.failed) == (False, 1, 2)
    assert "not yet" in found.unit.tail
    assert score(found)[0] == 0


async def test_one_more_run_decides_whether_a_test_is_flaky(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    sandbox = Recovering()

    found = await changed(
        base,
        tmp_path,
        {
            "tests/test_service.py": """
                from pathlib import Path


                def test_service():
                    assert Path("service").exists()


                def test_never():
                    assert Path("nothing").exists()
                """
        },
        sandbox,
    )

    assert sandbox.test_runs == 2
    assert found.unit.flaky == ["tests.test_service::test_service"]
    assert [each.name for each in found.unit.failures] == ["tests.test_service::test_never"]
    assert (found.unit.passed, found.unit.failed, found.broken) == (3, 1, [])


async def test_new_findings_count_and_those_of_the_base_do_not(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    found = await changed(
        base,
        tmp_path,
        {
            "src/shop/price.py": "import sys\n" + SHOP["src/shop/price.py"],
            "src/shop/run.py": "import subprocess\n\n\ndef run(command: str) -> None:\n"
            "    subprocess.run(command, shell=True)\n",
        },
    )

    findings = [str(each) for each in found.lint.findings if each.path == "src/shop/price.py"]
    assert "src/shop/price.py:1: F401 `sys` imported but unused" in findings
    assert (found.lint.errors, found.lint.known) == (len(found.lint.findings), 1)
    critical = [each.rule for each in found.static.findings if each.critical]
    assert (critical, found.static.critical) == (["S602"], 1)
    assert workspace_report(found, "job", "shop").static.sonar.quality_gate == "ERROR"
    assert found.coverage.percent < 50  # no test loads run.py


# --- code that lies -------------------------------------------------------------------------------


async def test_tests_that_a_conftest_hides_are_missed(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    found = await changed(
        base,
        tmp_path,
        {"conftest.py": "def pytest_collection_modifyitems(items):\n    del items[1:]\n"},
    )

    assert (found.unit.tests, found.unit.base_tests) == (1, 3)
    assert found.unit.missing == [
        "tests.test_price::test_negative",
        "tests.test_price::test_known_to_fail",
    ]


async def test_tests_that_are_skipped_now_are_missed_too(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    skipping = "import pytest\n\n\n@pytest.fixture(autouse=True)\ndef never():\n    pytest.skip()\n"

    found = await changed(base, tmp_path, {"conftest.py": skipping})

    assert found.unit.not_measured == "the report has no test that ran"
    assert not found.unit.ok
    assert score(found)[0] == 0


async def test_a_report_that_the_code_rewrote_does_not_excuse_the_exit_code(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    forged = "<testsuite><testcase classname='tests.test_price' name='test_plus'/></testsuite>"
    found = await changed(
        base,
        tmp_path,
        {
            "tests/test_price.py": "def test_plus():\n    assert 0\n",
            "conftest.py": "import atexit\n\n\ndef forge():\n"
            f'    open("/reports/tests.xml", "w").write("{forged}")\n\n\natexit.register(forge)\n',
        },
    )

    assert not found.unit.ok
    assert found.unit.failures[0].message.startswith("exit code 1, though the report has no failed")


@pytest.mark.parametrize(
    ("conftest", "why"),
    [
        ("import os\n\n\nos._exit(0)\n", "exit code 0: no JUnit XML file in $REPORTS"),
        (
            'import os\n\n\nos.symlink("/etc/passwd", "/reports/more.xml")\n',
            "more.xml: cannot be read",
        ),
        (
            "def pytest_collection_modifyitems(items):\n    items.clear()\n",
            "no unit tests; put them in tests/",
        ),
    ],
)
async def test_what_was_not_measured_has_not_passed(
    base: tuple[Path, BaseResults], tmp_path: Path, conftest: str, why: str
) -> None:
    found = await changed(base, tmp_path, {"conftest.py": conftest})

    assert why in found.unit.not_measured
    assert found.coverage.not_measured
    assert not found.unit.ok
    value, reasons = score(found)
    assert value == 0
    assert "unit: failed (not measured:" in reasons[0]


# --- limits and what is missing -------------------------------------------------------------------


async def test_tests_that_hang_are_not_measured(
    base: tuple[Path, BaseResults], tmp_path: Path
) -> None:
    repository = PYTHON.model_copy(
        update={"unit": "sleep 600", "limits": Limits(seconds=15), "lint": "touch $REPORTS/x"}
    )

    found = await changed(base, tmp_path, {}, repository=repository)

    assert found.unit.not_measured == "ran for more than 15 s"
    assert found.lint.not_measured == "exit code 0: no SARIF file in $REPORTS"
    report = workspace_report(found, "job", "shop")
    assert (report.static.lint_errors, report.static.ok) == (None, False)


async def test_without_its_tool_chain_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    repository = Repository(key="web", url="file:///web.git", image="node", build="true")

    with pytest.raises(MissingToolchain, match="node is not installed"):
        await measure(repository, write(tmp_path / "tree", {"a.js": ""}))


async def test_without_a_sandbox_nothing_is_measured(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="install it"):
        await measure(PYTHON, write(tmp_path / "tree", SHOP), sandbox=Sandbox("/nowhere/bwrap"))


# --- by commands ----------------------------------------------------------------------------------


async def test_a_python_project_is_measured_by_its_own_commands(tmp_path: Path) -> None:
    files = SHOP | {
        "tests/test_price.py": "from shop.price import plus\n\n\ndef test_plus():\n"
        "    assert plus(1, 2) == 3\n",
        "made.sh": "mkdir -p made && echo built > made/result\n",
    }
    repository = PYTHON.model_copy(
        update={
            "build": "sh made.sh",
            "unit": "cat made/result && PYTHONPATH=src pytest -q -p no:valkey "
            "--junitxml=$REPORTS/unit.xml --cov=src --cov-report=xml:$REPORTS/coverage.xml",
            "lint": "ruff check --output-format sarif --output-file $REPORTS/lint.sarif",
        }
    )

    found = await measure(repository, write(tmp_path / "tree", files))

    assert (found.unit.ok, found.unit.passed, found.coverage.percent) == (True, 1, 100.0)
    assert (found.lint.exit_code, found.lint.errors) == (1, 1)
    assert found.e2e.not_measured.startswith("no end-to-end tests")
    assert not (tmp_path / "tree/made").exists()


NODE = Repository(
    key="web",
    url="file:///web.git",
    image="node",
    build="node --check src/price.mjs",
    unit=(
        "node --test --experimental-test-coverage --test-reporter=junit "
        "--test-reporter-destination=$REPORTS/unit.xml --test-reporter=lcov "
        "--test-reporter-destination=$REPORTS/lcov.info test/"
    ),
    lint="node lint.mjs > $REPORTS/lint.sarif",
)

WEB = {
    "src/price.mjs": """
        export function plus(a, b) {
          return a + b;
        }
        export function minus(a, b) {
          return a - b;
        }
        """,
    "test/price.test.mjs": """
        import assert from "node:assert";
        import test from "node:test";
        import { plus } from "../src/price.mjs";

        test("adds", () => assert.equal(plus(1, 2), 3));
        """,
    "lint.mjs": """
        import { readFileSync } from "node:fs";
        const lines = readFileSync("src/price.mjs", "utf8").split("\\n");
        const results = lines.flatMap((text, number) => text.includes("eval(") ? [{
          ruleId: "no-eval", level: "error", message: { text: "eval is unsafe" },
          locations: [{ physicalLocation: {
            artifactLocation: { uri: "src/price.mjs" }, region: { startLine: number + 1 } } }],
        }] : []);
        console.log(JSON.stringify({
          version: "2.1.0", runs: [{ tool: { driver: { name: "lint" } }, results }] }));
        """,
}


async def test_a_node_project_is_measured_by_its_commands(tmp_path: Path) -> None:
    before = write(tmp_path / "base", WEB)
    known = await measure_base(NODE, before)
    more = "export function risky(a) {\n  return eval(a);\n}\n"
    tree = write(shutil.copytree(before, tmp_path / "tree"), {})
    (tree / "src/price.mjs").write_text((before / "src/price.mjs").read_text() + more)

    found = await measure(NODE, tree, known, diff=diff(before, tree))

    assert found.build.ran
    assert (found.unit.ok, found.unit.passed, found.unit.base_tests) == (True, 1, 1)
    assert found.coverage.uncovered == ["src/price.mjs:8-9"]
    assert [str(each) for each in found.lint.findings] == [
        "src/price.mjs:8: no-eval eval is unsafe"
    ]
    assert found.e2e.not_measured.startswith("no command; add `e2e` to the entry web")
    assert workspace_report(found, "job", "web").static.sonar.new_major == 1


GO_CONVERTER = r"""
# Writes the output of `go test -v` as JUnit XML, and a cover profile as LCOV.
prefix=example.com/shop
case="<testcase classname='$prefix' name='\\1'"
{
  echo '<testsuite>'
  sed -nE -e "s|^--- PASS: (\w+) .*|$case/>|p" \
    -e "s|^--- FAIL: (\w+) .*|$case><failure/></testcase>|p" "$1"
  echo '</testsuite>'
} > "$REPORTS/unit.xml"
sed -nE "s|^$prefix/([^:]+):([0-9]+)\S+,([0-9]+)\S+ [0-9]+ ([0-9]+)$|\1 \2 \3 \4|p" "$2" |
while read -r file from to hits; do
  echo "SF:$file"
  seq "$from" "$to" | sed "s/.*/DA:&,$hits/"
  echo end_of_record
done > "$REPORTS/lcov.info"
"""

GO = Repository(
    key="shop",
    url="file:///shop.git",
    image="go",
    build="export GOCACHE=$PWD/cache; go build ./... && go test -vet=off -cover -run '^$' ./...",
    unit=(
        "export GOCACHE=$PWD/cache; "
        "go test -vet=off -v -coverprofile=/tmp/cover ./... > /tmp/output; code=$?; "
        "sh report.sh /tmp/output /tmp/cover; exit $code"
    ),
)


async def test_a_go_project_is_measured_by_its_commands(tmp_path: Path) -> None:
    tree = write(tmp_path / "tree", {
        "go.mod": "module example.com/shop\n\ngo 1.21\n",
        "price.go": "package shop\n\nfunc Plus(a, b int) int {\n\treturn a + b\n}\n\n"
        "func Minus(a, b int) int {\n\treturn a - b\n}\n",
        "price_test.go": 'package shop\n\nimport "testing"\n\nfunc TestPlus(t *testing.T) {\n'
        "\tif Plus(1, 2) != 3 {\n\t\tt.Fatal()\n\t}\n}\n\n"
        'func TestMinus(t *testing.T) {\n\tt.Fatal("not yet")\n}\n',
        "report.sh": GO_CONVERTER,
    })  # fmt: skip

    found = await measure(GO, tree)

    assert found.build.ran, found.build.tail
    assert (found.unit.passed, found.unit.failed) == (1, 1), found.unit
    assert found.unit.failures[0].name == "example.com/shop::TestMinus"
    assert (found.coverage.lines, found.coverage.covered) == (6, 3)
    assert found.lint.not_measured.startswith("no command; add `lint`")
    assert json.loads(found.model_dump_json())["unit"]["exit_code"] == 1
