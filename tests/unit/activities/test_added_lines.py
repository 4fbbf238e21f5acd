"""The lines that a diff adds, and the policy and substance applied to them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.checks.sandbox import Sandbox
from activities.config import CONFIG
from activities.workspace.added_lines import ChangeChecks, added_lines
from workflows.models.deliberation import Check
from workflows.models.workspace import Repository

SECRET = 'token = "ghp_' + "a1B2c3D4e5" * 3 + '012345"\n'
REPOSITORY = Repository(key="sample", url="file:///r")


def diff_of(tmp_path: Path, before: dict[str, str], after: dict[str, str]) -> str:
    """Return git's diff between two folders with these files."""
    for folder, files in (("a", before), ("b", after)):
        for name, text in files.items():
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode())
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    words = ["git", "diff", "--no-index", "--no-prefix", "-U0", "a", "b"]
    return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).stdout


async def checked(
    diff: str | None, *changed: str, paths: tuple[str, ...] = (), task: str = ""
) -> dict[str, Check]:
    made = await ChangeChecks(CONFIG, Sandbox()).made(
        REPOSITORY, diff, changed or tuple(added_lines(diff or "")), paths, task
    )
    return {check.name: check for check in made}


def test_added_lines_have_their_numbers_in_the_new_file(tmp_path: Path) -> None:
    diff = diff_of(tmp_path, {"x.py": "a\nb\nc\n"}, {"x.py": "a\nB\nc\nd\n", "y.md": "new\n"})

    assert added_lines(diff) == {"x.py": {2: "B", 4: "d"}, "y.md": {1: "new"}}


def test_text_that_looks_like_a_header_is_a_line(tmp_path: Path) -> None:
    sly = "++ b/other.py\n@@ -1 +1 @@\n+++ b/other.py\n"

    diff = diff_of(tmp_path, {}, {"x.md": sly})

    assert added_lines(diff) == {"x.md": dict(enumerate(sly.splitlines(), start=1))}


LINES = st.lists(st.sampled_from(["a", "", "+++ b/z", "@@ -1 +1 @@", "-- a/z", " ", "\\ x"]))


@given(before=LINES, after=LINES)
def test_what_a_diff_adds_is_in_the_new_file(
    tmp_path_factory: pytest.TempPathFactory, before: list[str], after: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("diff")

    diff = diff_of(folder, {"x": "\n".join(before)}, {"x": "\n".join(after)})

    found = added_lines(diff)
    assert set(found) <= {"x"}
    for number, text in found.get("x", {}).items():
        assert after[number - 1] == text


async def test_a_secret_in_an_added_line_bars_and_is_named_by_path_and_line(
    tmp_path: Path,
) -> None:
    diff = diff_of(tmp_path, {"x.py": "a = 1\n"}, {"x.py": f"a = 1\n{SECRET}"})

    policy = (await checked(diff))["policy"]

    assert policy.blocking
    assert "x.py line 2" in policy.findings[0]
    assert "a1B2c3" not in policy.findings[0]


async def test_a_secret_that_was_there_before_is_not_held_against_the_change(
    tmp_path: Path,
) -> None:
    diff = diff_of(tmp_path, {"x.py": SECRET}, {"x.py": f"{SECRET}b = 1\n"})

    assert (await checked(diff))["policy"].outcome == "passed"


async def test_a_secret_in_the_name_of_a_file_bars() -> None:
    name = SECRET.split('"')[1]

    assert (await checked("", name))["policy"].blocking


async def test_a_command_in_a_script_bars_and_one_in_prose_warns(tmp_path: Path) -> None:
    script = diff_of(tmp_path / "1", {}, {"clean.sh": "rm -rf / --no-preserve-root\n"})
    prose = diff_of(
        tmp_path / "2", {}, {"README.md": "Never enter `rm -rf / --no-preserve-root` here.\n"}
    )

    assert (await checked(script))["policy"].blocking
    warned = (await checked(prose))["policy"]
    assert (warned.blocking, warned.warnings) == (False, 1)


@pytest.mark.parametrize(
    ("changed", "paths"),
    [(".github/workflows/ci.yml", ()), ("setup.py", ("docs/**",)), ("a/.gitmodules", ())],
)
async def test_a_path_that_may_not_change_bars(changed: str, paths: tuple[str, ...]) -> None:
    policy = (await checked("", changed, paths=paths))["policy"]

    assert policy.blocking
    assert policy.findings == [f"blocking path: {changed}: the story may not change it"]


async def test_a_diff_that_is_too_long_to_read_bars() -> None:
    policy = (await checked(None, "x.py"))["policy"]

    assert policy.blocking
    assert "make a smaller change" in policy.findings[0]


async def test_documentation_that_repeats_itself_is_barred_and_code_is_not_read_as_prose(
    tmp_path: Path,
) -> None:
    loop = "It goes on and on and on. " * 60
    docs = diff_of(tmp_path / "1", {}, {"docs/a.md": loop})
    code = diff_of(tmp_path / "2", {}, {"a.py": "x = [\n" + "    0,\n" * 60 + "]\n"})

    assert (await checked(docs, task="Explain limits"))["substance"].blocking
    assert (await checked(code, task="Explain limits"))["substance"].outcome == "not_applicable"
