from pathlib import Path

import pytest

from activities.checks import lint
from activities.checks.fences import Block, code_blocks
from activities.checks.lint import Lint, lint_code
from activities.checks.parsers import problems
from activities.checks.sandbox import CannotRun, Limits, Sandbox

GOOD = {
    "python": "x = 1\nprint(x)\n",
    "json": '{"a": [1, 2.5, null]}',
    "yaml": "a: &x 1\nb: *x\n---\nc: !Sub ${d}\n",
    "toml": 'a = 1\n[b]\nc = "d"\n',
    "sql": "CREATE TABLE t (id bigserial PRIMARY KEY, at timestamptz DEFAULT now());\nSHOW TABLES;",
    "shell": "if true; then\n  echo 'x' | grep x\nfi\n",
}
BAD = {
    "python": ("x = 1\nprint(x\n", 2),
    "json": ('{\n"a": 1,\n}', 3),
    "yaml": ("a: 1\nb: *nothing\n", 2),
    "toml": ("a = 1\nb = \n", 2),
    "sql": ("SELECT 1;\nSELECT * FROM WHERE x", 2),
    "shell": ("echo a\nfor x in; od\n", 2),
}


def fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```\n"


async def linted(markdown: str) -> Lint:
    return await lint_code(code_blocks(markdown), Sandbox())


@pytest.mark.parametrize("language", GOOD)
async def test_what_parses_scores_full(language: str) -> None:
    result = await linted(fenced(language, GOOD[language]))

    assert result == Lint(score=1.0, problems=[])


@pytest.mark.parametrize("language", BAD)
async def test_what_does_not_parse_scores_nothing_and_names_its_line(language: str) -> None:
    code, line = BAD[language]

    result = await linted(fenced(language, code))

    assert result.score == 0
    assert result.problems[0].line == line + 1
    assert all(problem.error for problem in result.problems)


@pytest.mark.parametrize("dialect", ["postgres", "mysql"])
def test_sql_may_be_of_any_common_dialect(dialect: str) -> None:
    source = {
        "postgres": "CREATE FUNCTION f() RETURNS int AS $$ SELECT 1 $$ LANGUAGE sql;",
        "mysql": "SELECT `a` FROM `t` LIMIT 1, 2;",
    }[dialect]

    assert problems("sql", source) == []


async def test_a_name_that_nothing_defines_is_an_error_and_an_unused_import_a_warning() -> None:
    result = await linted(fenced("python", "import os\nprint(undefined)\n"))

    assert [(p.line, p.message.split()[0], p.error) for p in result.problems] == [
        (2, "F401", False),
        (3, "F821", True),
    ]
    assert result.score == pytest.approx(1 - 0.25 - 0.05)


async def test_a_block_may_use_what_an_earlier_one_defined() -> None:
    first, second = "def f() -> int:\n    return 1\n", "from __future__ import annotations\nf()\n"

    assert (await linted(fenced("python", first) + fenced("python", second))).problems == []


async def test_files_may_define_the_same_names() -> None:
    models = "# models.py\nimport json\n\n\nclass A:\n    text = json.dumps(1)\n"
    app = "# app.py\nimport json\n\nfrom .models import A\n\nprint(A, json)\n"
    twice = "def f():\n    pass\n\n\ndef f():\n    pass\n"

    assert (await linted(fenced("python", models) + fenced("python", app))).problems == []
    assert len((await linted(fenced("python", models) + fenced("python", twice))).problems) == 1


async def test_more_errors_score_less_down_to_nothing() -> None:
    scores = [
        (await linted(fenced("python", "".join(f"print(u{i})\n" for i in range(n))))).score
        for n in (1, 3, 6)
    ]

    assert scores == [0.75, 0.25, 0]


async def test_the_score_is_the_mean_of_the_known_blocks() -> None:
    text = fenced("json", "{}") + fenced("json", "{") + fenced("rust", "not rust")

    assert (await linted(text)).score == 0.5


async def test_problems_are_at_their_lines_in_the_proposal() -> None:
    text = "# Title\n\ntext\n\n" + fenced("python", "x = 1\nprint(y)\n") + fenced("json", "{")

    assert [problem.line for problem in (await linted(text)).problems] == [7, 11]


async def test_shell_is_read_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    assert (await linted(fenced("bash", f"touch {trace}\nset +n\ntouch {trace}\n"))).score == 1
    assert not trace.exists()


@pytest.mark.parametrize("language", GOOD)
async def test_without_a_sandbox_nothing_is_parsed(language: str) -> None:
    blocks = [Block(language, GOOD[language], 1, 1)]

    with pytest.raises(CannotRun, match="nowhere"):
        await lint_code(blocks, Sandbox(bwrap="/nowhere/bwrap"))


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("python", "(" * 50_000),
        ("python", "-" * 50_000 + "1"),
        ("python", "\0"),
        ("json", "[" * 50_000),
        ("json", "1" * 50_000),
        ("json", "NaN"),
        ("toml", "a = " + "[" * 50_000),
        ("sql", "SELECT " + "(" * 5_000),
        ("sql", "SELECT 'x"),
        ("yaml", "a: *" + "x" * 5_000),
    ],
)
def test_a_source_made_to_break_the_parser_is_a_problem(language: str, source: str) -> None:
    found = problems(language, source)

    assert found
    assert all(len(message) <= 300 for _, message in found)


async def test_a_parser_that_hangs_is_killed_and_its_line_reported() -> None:
    quadratic = "a." * 100_000 + "a = 1"
    blocks = code_blocks(fenced("json", "{}") + fenced("toml", quadratic))

    with pytest.raises(CannotRun, match="line 5: toml"):
        await lint_code(blocks, Sandbox(), Limits(cpu_s=1))


async def test_more_problems_than_are_read_fail_every_block_without_an_answer() -> None:
    blocks = code_blocks(fenced("json", "{}") + fenced("json", "{") * 200)

    result = await lint_code(blocks, Sandbox(), Limits(output_bytes=1_000))

    assert result.score == pytest.approx(1 / 201)
    assert len(result.problems) == 200


async def test_a_text_that_overflows_the_parser_s_stack_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    crashing = tmp_path / "parsers.py"
    crashing.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setattr(lint, "_PARSERS", crashing)

    assert (await linted(fenced("json", "{}"))).score == 0
