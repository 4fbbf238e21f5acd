"""Which paths a story may change: globs, closed paths, and names that mean another file."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workflows.rules.paths import (
    CLOSED,
    allowed,
    closed,
    folded,
    git_name,
    glob_problem,
    matches,
    name_problem,
    one_file,
    path_problem,
    spellings,
)

PATHS = st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=4).map("/".join)
GLOBS = st.text("ab.*", min_size=1, max_size=4).filter(lambda name: "**" not in name)
PATTERNS = st.lists(st.just("**") | GLOBS, min_size=1, max_size=4).map("/".join)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("README.md", "README.md", True),
        ("README.md", "docs/README.md", False),
        ("*.md", "README.md", True),
        ("*.md", "docs/README.md", False),
        ("**/*.md", "README.md", True),
        ("**/*.md", "a/b/c.md", True),
        ("docs/**", "docs/a/b", True),
        ("docs/**", "docs", False),
        ("docs/**", "docs2/a", False),
        ("src/*/x.py", "src/a/x.py", True),
        ("src/*/x.py", "src/a/b/x.py", False),
        ("src/**/x.py", "src/x.py", True),
        ("**/test_*.py", "tests/unit/test_a.py", True),
        ("**", "anything/at/all", True),
        ("a.c", "abc", False),
        ("[ab].py", "a.py", False),
        ("src/*", "src/.hidden", True),
    ],
)
def test_a_glob_matches_whole_paths(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def as_regex(pattern: str) -> str:
    """Return the same glob as a regular expression, which is slow on some patterns."""
    names = pattern.split("/")
    if names[-1] == "**":
        names.append("*")
    folders = ["(?:[^/]+/)*" if name == "**" else as_name(name) + "/" for name in names[:-1]]
    return "".join(folders) + as_name(names[-1])


def as_name(name: str) -> str:
    return "".join("[^/]*" if each == "*" else re.escape(each) for each in name)


@given(PATTERNS, PATHS)
def test_a_glob_matches_as_its_regular_expression_does(pattern: str, path: str) -> None:
    assert matches(pattern, path) is bool(re.fullmatch(as_regex(pattern), path))


@pytest.mark.timeout(60)
def test_no_pattern_is_slow() -> None:
    """A regular expression would not end on this one."""
    assert not matches("**/" * 60 + "*a" * 60 + "b", "/".join(["a" * 60] * 60))


@pytest.mark.parametrize(
    "path",
    [
        ".github/workflows/ci.yml",
        ".GitHub/workflows/ci.yml",
        ".gitlab-ci.yml",
        ".gitattributes",
        "sub/.gitattributes",
        ".gitmodules",
        ".gitignore",
        ".circleci/config.yml",
        "Jenkinsfile",
        "ci/JENKINSFILE",
        "azure-pipelines.yml",
        ".travis.yml",
        ".pre-commit-config.yaml",
        ".husky/pre-commit",
        "CODEOWNERS",
        ".lfsconfig",
        "\uff0egithub/x",
    ],
)
def test_ci_and_git_configuration_is_closed_unless_the_entry_opens_it(path: str) -> None:
    assert closed(path)
    assert not allowed(path, [])
    assert not allowed(path, ["**"])
    assert allowed(path, [], ["**"])
    assert not allowed(path, ["src/**"], ["**"])


CLOSED_NAMES = st.sampled_from(
    [name.replace("*", "x") for pattern in CLOSED for name in pattern.split("/")]
) | st.sampled_from(["", "a\n", "\u017f"])


@given(st.lists(CLOSED_NAMES | st.text(max_size=4), min_size=1, max_size=4).map("/".join))
def test_a_path_is_closed_if_one_of_the_patterns_matches(path: str) -> None:
    assert closed(path) is any(matches(pattern, folded(path)) for pattern in CLOSED)


@given(st.text(max_size=6))
def test_text_in_ascii_is_folded_as_any_other(text: str) -> None:
    assert folded(text) == folded(f"{text}\u00e9").removesuffix("\u00e9")


@pytest.mark.parametrize("path", ["src/app.py", "README.md", "docs/github/x.md", "gitignore.md"])
def test_everything_else_is_open(path: str) -> None:
    assert allowed(path, [])
    assert path_problem(path) == ""


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("", "is not empty"),
        ("/etc/passwd", "is relative"),
        ("../x", "no empty name"),
        ("a/../../x", "no empty name"),
        ("a/./x", "no empty name"),
        ("a//x", "no empty name"),
        ("a/", "no empty name"),
        ("a\\b", "no backslash"),
        ("a\0b", "visible"),
        ("a\nb", "visible"),
        ("a\u202eb", "visible"),
        (".g\u200cit/config", "visible"),
        ("caf\udce9", "visible"),
        (".git/config", "git's own folder"),
        ("sub/.GIT/hooks/x", "git's own folder"),
        ("git~1/config", "git's own folder"),
        ("GIT~2", "git's own folder"),
        ("gitmod~1", "git's own folder"),
        ("gi7eba~1", "git's own folder"),
        (".git./config", "git's own folder"),
        (".git::$INDEX_ALLOCATION", "git's own folder"),
        ("\uff0e\uff47it/x", "git's own folder"),
        ("a./x", "ends with a space or '.'"),
        ("a /x", "ends with a space or '.'"),
        (" a", "begins with a space"),
        ("a:b", "one of the characters"),
        ("nul", "device on Windows"),
        ("src/AUX.py", "device on Windows"),
        ("com1.txt", "device on Windows"),
        ("e\u0301.md", "composed form"),
        ("x" * 256, "at most 255 bytes"),
        ("/".join(["x" * 200] * 21), "at most 4,000 bytes"),
        (".github/x", "is closed"),
    ],
)
def test_a_path_that_may_mean_another_file_is_refused(path: str, rule: str) -> None:
    assert rule in path_problem(path)
    assert rule in path_problem(path, paths=["**"])


@pytest.mark.parametrize(
    "path", ["console.py", "auxiliary/nul_test.py", "git.py", "é.md", "a b/c.d", "com10"]
)
def test_an_ordinary_name_is_not_refused(path: str) -> None:
    assert name_problem(path) == ""


def test_a_path_outside_the_storys_globs_is_refused_with_what_it_may_change() -> None:
    problem = path_problem("src/app.py", paths=["docs/**", "*.md"])

    assert problem == "the story may change only docs/**, *.md; choose one of these"


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("readme.md", "README.md"),
        ("SRC/new.py", "src"),
        ("src/App.py", "src/app.py"),
        ("stra\u00dfe", "strasse"),
        ("\ufb01le", "file"),
    ],
)
def test_a_second_spelling_of_an_existing_path_is_refused(path: str, other: str) -> None:
    existing = spellings(["README.md", "src/app.py", "strasse", "file"])

    assert f"use {other!r}" in path_problem(path, existing=existing)
    assert path_problem("src/app.py", existing=existing) == ""
    assert path_problem("src/other.py", existing=existing) == ""


def test_a_path_through_a_symbolic_link_is_refused() -> None:
    for path in ("out", "out/x", "out/x/y"):
        assert "is a symbolic link" in path_problem(path, links=["out"])
    assert path_problem("outer/x", links=["out"]) == ""


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [
        ("", "no empty name"),
        ("/docs", "neither begins"),
        ("docs/", "neither begins"),
        ("a/../b", "no empty name"),
        ("a\\b", "no backslash"),
        ("a**/b", "stands alone"),
        ("a\nb", "visible"),
    ],
)
def test_a_pattern_that_can_match_nothing_is_refused(pattern: str, rule: str) -> None:
    assert rule in glob_problem(pattern)


@given(st.text(max_size=30))
def test_what_is_accepted_stays_inside_and_is_not_gits(path: str) -> None:
    if path_problem(path) == "":
        parts = path.split("/")
        assert not path.startswith("/")
        assert not {"", ".", ".."} & set(parts)
        assert not any(git_name(part) for part in parts)
        assert unicodedata.normalize("NFC", path) == path
        assert path.encode().decode() == path


VARIANTS = st.sampled_from(
    [".git", ".GIT", ".gIt", "\uff0egit", ".g\u200cit", ".git\u200d", "git~1"]
)


@given(PATHS, VARIANTS, PATHS)
def test_no_spelling_of_gits_folder_is_accepted(before: str, name: str, after: str) -> None:
    for path in (name, f"{name}/{after}", f"{before}/{name}", f"{before}/{name}/{after}"):
        assert path_problem(path) != ""


@given(st.text(max_size=20))
def test_folding_again_changes_nothing(path: str) -> None:
    assert folded(folded(path)) == folded(path)
    assert folded(path.upper()) == folded(path.upper().lower().upper())


@given(PATHS, st.lists(PATTERNS, max_size=3))
def test_more_patterns_never_allow_less(path: str, patterns: list[str]) -> None:
    if patterns and allowed(path, patterns[:1]):
        assert allowed(path, patterns)


@given(PATHS, PATHS, st.sampled_from(["docs/**", "*.md", "a?", "**"]))
def test_only_a_single_path_without_a_wildcard_is_one_file(
    path: str, other: str, pattern: str
) -> None:
    assert one_file([path]) == (set(path).isdisjoint("*?"))
    assert not one_file([])
    assert not one_file([path, other])
    assert not one_file([pattern])
