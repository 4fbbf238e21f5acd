"""Measure a Python project for a workspace report: build, test, coverage, lint and analysis.

The fleet measures agents' commits by the same code (activities/workspace/measuring.py). Everything
runs for real, with this interpreter and its packages, in the sandbox (docs/design/0006-sandbox.md).
Each step gets its own copy of the project, and sees neither the original nor any other file of the
user. Only the set-up command has the network.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from activities.checks.sandbox import CannotRun, Sandbox
from activities.workspace.scratch import scratch
from workflows.models.measurement import Measurement
from workflows.models.report import WorkspaceReport
from workflows.models.workspace import Limits, Repository

LIMITS = Limits(seconds=900, memory_bytes=2 * 1024**3, processes=256)
"""Limits of each step."""

GIT_WITHIN_S = 120

_TOOLS = ("defusedxml", "diff_cover", "junitparser", "packaging", "pytest", "pytest_cov")
"""Modules of the extra `report`."""

_NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "venv", ".tox", ".nox", "node_modules", "__pycache__", ".*_cache",
    ".coverage", "*.egg-info",
)  # fmt: skip
_BUILT = {"build", "dist"}
"""Top-level folders that a build creates; a package further down may have the same name."""


class CannotMeasure(Exception):
    """The project has nothing to measure, or a tool could not run.

    The message gives the reason and what to do.
    """


def measure(
    directory: Path, on_step: Callable[[str], None], setup: str = "", sandbox: Sandbox | None = None
) -> WorkspaceReport:
    """Measure the Python project in `directory`.

    Its code is in src/, or in packages and modules at the top; its unit tests in tests/ or test/,
    its end-to-end tests in tests/e2e/ or e2e/. All of its code counts as new.

    Args:
        directory: the project.
        on_step: called with a line as each step begins, and with one for a build or a unit run that
            fails.
        setup: a shell command that runs first, with the network. What it installs in the folder
            $PACKAGES can be imported in all steps; it leaves nothing else behind.
        sandbox: runs all steps; None: a new one.

    Raises:
        CannotMeasure: a tool is not installed; the directory does not exist, or has no code or
            no unit test; there is no sandbox; a step could not run or did not end in time.
    """
    if missing := [name for name in _TOOLS if importlib.util.find_spec(name) is None]:
        raise CannotMeasure(
            f"{' and '.join(missing)} not installed; install the extra `report`: "
            "pip install 'swe-ai-fleet[report]'"
        )
    with scratch() as folder:
        return asyncio.run(_measure(directory.resolve(), folder, setup, on_step, sandbox))


def require_commit(directory: Path) -> None:
    """Refuse a directory without a commit, which a story requires of a report.

    Raises:
        CannotMeasure: git is not installed, or knows no commit of the directory.
    """
    with scratch() as folder:
        if not _commit(directory, folder):
            raise CannotMeasure(
                f"{directory}: git is not installed or has no commit of it, and a report names the "
                "commit that was measured; commit the project first"
            )


async def _measure(
    directory: Path,
    folder: Path,
    setup: str,
    on_step: Callable[[str], None],
    sandbox: Sandbox | None,
) -> WorkspaceReport:
    # They need the packages of the extra `report`.
    from activities.workspace import measuring, preparing, python_project
    from activities.workspace.reports import workspace_report

    repository = Repository(key="project", url="", setup=setup, limits=LIMITS)
    tree = folder / "tree"
    _copy(directory, tree)
    try:
        python_project.prepare_settings(tree)
        python_project.python_commands(tree)
        prepared = None
        if setup:
            on_step("set-up")
            prepared = await preparing.prepare(
                repository, tree, folder / "prepared", sandbox=sandbox
            )
        found = await measuring.measure(
            repository,
            tree,
            commit=await asyncio.to_thread(_commit, directory, folder),
            prepared=prepared,
            sandbox=sandbox,
            on_step=on_step,
        )
        name = python_project.project_name(tree) or directory.name
    except python_project.InvalidProject as error:
        raise CannotMeasure(f"{directory}: {error}") from error
    except preparing.PreparationFailed as error:
        raise CannotMeasure(str(error)) from error
    except CannotRun as error:
        raise CannotMeasure(f"a project is measured in the sandbox only, and {error}") from error
    _require_measured(found)
    report = workspace_report(found, f"measure-{uuid.uuid4().hex[:12]}", name, measured_by="")
    if not report.build.ok:
        on_step(f"build failed: {report.build.why}")
    if not report.unit.ok:
        on_step(f"unit tests failed: {report.unit.why}")
    if found.coverage.not_measured:
        on_step(f"coverage not measured: {found.coverage.not_measured}")
    return report


def _require_measured(found: Measurement) -> None:
    """Refuse a measurement that has nothing to say about what a person wants to know."""
    for name, step in (
        ("build", found.build),
        ("unit tests", found.unit),
        ("lint", found.lint),
        ("static analysis", found.static),
    ):
        if step.not_measured:
            tail = " | ".join(line.strip() for line in step.tail.splitlines() if line.strip())
            raise CannotMeasure(f"{name}: {step.not_measured}{tail and ': '}{tail[-600:]}")
    if found.e2e.not_measured and found.e2e.command and found.e2e.stopped:
        raise CannotMeasure(f"end-to-end tests: {found.e2e.not_measured}")


def _copy(directory: Path, tree: Path) -> None:
    if not directory.is_dir():
        raise CannotMeasure(f"{directory}: no such directory; name the project's own")
    if tree.is_relative_to(directory):
        raise CannotMeasure(
            f"{directory}: has the folder for temporary files in it ({tree.parent.parent}); name "
            "the project's own directory, or set TMPDIR to a folder outside it"
        )
    try:
        shutil.copytree(directory, tree, symlinks=True, ignore=_left_out(directory))
    except shutil.Error as error:
        first, *others = error.args[0]
        more = f", and {len(others)} more files" if others else ""
        raise CannotMeasure(f"{directory}: cannot be copied: {first[-1][:300]}{more}") from error
    except OSError as error:
        raise CannotMeasure(f"{directory}: cannot be copied: {error}") from error


def _left_out(top: Path) -> Callable[[str, list[str]], set[str]]:
    """Return a filter for files that are not copied.

    It matches some names, and sockets, FIFOs and devices anywhere.
    """

    def left_out(folder: str, names: list[str]) -> set[str]:
        special = {name for name in names if _is_special(Path(folder, name))}
        built = _BUILT if Path(folder) == top else set()
        return _NOT_COPIED(folder, names) | special | built

    return left_out


def _is_special(path: Path) -> bool:
    return not (path.is_symlink() or path.is_file() or path.is_dir())


def _commit(directory: Path, scratch: Path) -> str:
    """Return HEAD, with `-dirty` if the project differs from it; empty without git.

    git runs outside the sandbox, where it can read the repository, and with another repository's
    settings: its own may name programs to run.
    """
    if shutil.which("git") is None:
        return ""

    def git(*arguments: str, **environment: str) -> str | None:
        ended = subprocess.run(
            ["git", *arguments],
            cwd=directory,
            env={"PATH": os.pathsep.join(os.get_exec_path()), "HOME": str(scratch)} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=GIT_WITHIN_S,
            check=False,
        )
        return ended.stdout.strip() if ended.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    if head is None:
        return ""
    paths = ("--path-format=absolute", "--git-path", "objects", "--git-path", "index")
    objects, index, top = (git("rev-parse", *paths, "--show-toplevel") or "").splitlines()
    safe = scratch / "git"
    git("init", "--quiet", "--bare", "--template=", str(safe))
    (safe / "objects/info").mkdir(exist_ok=True)
    (safe / "objects/info/alternates").write_text(f"{objects}\n")
    shutil.copyfile(index, safe / "index")
    (safe / "HEAD").write_text(f"{head}\n")
    own = {"GIT_DIR": str(safe), "GIT_WORK_TREE": top}
    changed = git("status", "--porcelain", "--ignore-submodules", "--", ".", **own)
    return head if changed == "" else f"{head}-dirty"
