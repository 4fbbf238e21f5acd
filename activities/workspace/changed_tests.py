"""What a change does to the tests that measure it: a person has to look at that.

Results come from files that the fleet's own runner made the tests write. Code that runs inside that
runner can still forge them, so changes of such code are named.
"""

from __future__ import annotations

from collections.abc import Sequence

from workflows.models.measurement import Measurement
from workflows.models.workspace import ChangedFile
from workflows.rules.globs import matches

NAMED = 10
"""How many paths or tests a note names."""

TEST_SETUP = (
    # Python
    *("**/conftest.py", "**/pytest.ini", "**/.pytest.ini", "**/pytest.toml", "**/.pytest.toml"),
    *("**/tox.ini", "**/setup.cfg", "**/pyproject.toml", "**/.coveragerc"),
    *("**/sitecustomize.py", "**/usercustomize.py", "**/*.pth"),
    # Node
    *("**/package.json", "**/jest.config.*", "**/jest.setup.*", "**/vitest.config.*"),
    *("**/vitest.setup.*", "**/vitest.workspace.*", "**/.mocharc.*", "**/.nycrc*"),
    *("**/playwright.config.*", "**/cypress.config.*", "**/babel.config.*"),
    # make
    *("**/Makefile", "**/*.mk"),
)
"""Files that decide how tests run, or whose code runs before them."""


def notes_on_tests(
    files: Sequence[ChangedFile], measurement: Measurement, test_paths: Sequence[str]
) -> list[str]:
    """Return what a person has to know of a report, one line each.

    Args:
        files: what the change touches.
        measurement: of the change, against its base.
        test_paths: globs of the repository's tests.
    """
    changed = [each for each in files if each.status != "added"]
    setup = [each.path for each in files if _has(each, TEST_SETUP)]
    tests = [each.path for each in changed if _has(each, test_paths) and each.path not in setup]
    gone = [*measurement.unit.missing, *measurement.e2e.missing]
    found = {
        "tests of the base that did not run": gone,
        "changed existing tests": tests,
        "changed test configuration": setup,
    }
    return [f"{what}: {_listed(names)}" for what, names in found.items() if names]


def _has(file: ChangedFile, globs: Sequence[str]) -> bool:
    """Return whether a file has, or had, a path that matches."""
    return any(matches(path, globs) for path in (file.path, file.old_path) if path)


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many there are."""
    listed = ", ".join(each[:200] for each in names[:NAMED])
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return listed + more
