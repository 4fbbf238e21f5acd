"""Coverage of new code, from Cobertura or LCOV files and a diff, by diff-cover."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from xml.etree.ElementTree import Element

from diff_cover.diff_reporter import GitDiffReporter
from diff_cover.git_diff import GitDiffError, GitDiffTool
from diff_cover.git_path import GitPathTool
from diff_cover.violationsreporters.violations_reporter import (
    LcovCoverageReporter,
    XmlCoverageReporter,
)

from activities.workspace.results import (
    InvalidResult,
    read_result,
    read_xml,
    relative_path,
    result_files,
)
from activities.workspace.sandbox import PROJECT

# What diff-cover would ask git for: the folder where the commands ran, which has no repository.
GitPathTool._cwd = GitPathTool._root = PROJECT


@dataclass(frozen=True)
class NewCode:
    """The coverage of the lines that a change adds.

    Attributes:
        lines: how many of them can be covered.
        uncovered: path and lines, such as `src/a.py:3-5, 9`.
    """

    lines: int
    covered: int
    uncovered: list[str]

    @property
    def percent(self) -> float:
        """Coverage in percent; 100 if there is nothing to cover."""
        return round(100 * self.covered / self.lines, 2) if self.lines else 100.0


class _Diff(GitDiffTool):  # type: ignore[misc]  # diff-cover has no types
    """A diff that is given, and not asked of git."""

    def __init__(self, text: str) -> None:
        super().__init__("...", False)
        self._text = text

    def diff_committed(self, compare_branch: str = "") -> str:
        return self._text


class Coverage:
    """What the coverage files of a run say.

    Args:
        cobertura: the roots of Cobertura files.
        lcov: of each LCOV file how often each line ran, by path.
    """

    def __init__(self, cobertura: list[Element], lcov: list[dict[str, dict[int, int]]]) -> None:
        self._reporters = [
            *([XmlCoverageReporter(cobertura)] if cobertura else []),
            *([LcovCoverageReporter(lcov)] if lcov else []),
        ]
        self._paths = {path for root in cobertura for path in _paths(root)}
        self._paths.update(*lcov)
        self._suffixes = {PurePosixPath(path).suffix for path in self._paths}

    def of_all(self) -> NewCode:
        """Count every line that the files have as new."""
        found = [self._lines(path) for path in self._paths]
        lines = sum(len(measured) for measured, _ in found)
        return NewCode(lines, lines - sum(len(missed) for _, missed in found), [])

    def of_new_code(self, diff: str, tree: Path, counts: Callable[[str], bool]) -> NewCode:
        """Count the lines that a diff adds.

        A file of a measured language that the coverage files do not have was not loaded by any
        test: its new lines count as not covered.

        Args:
            diff: from the base to the tree, in git's format.
            tree: has the new text of each file.
            counts: whether the file at a path counts, if no coverage file has it.

        Raises:
            InvalidResult: the diff or a coverage file cannot be read.
        """
        changes = GitDiffReporter(git_diff=_Diff(diff), ignore_staged=True, ignore_unstaged=True)
        lines, covered, uncovered = 0, 0, []
        try:
            for path in changes.src_paths_changed():
                if not (added := set(changes.lines_changed(path))):
                    continue  # as of a file that was deleted
                measured, missed = self._lines(path)
                if path not in self._paths and not measured:
                    loadable = PurePosixPath(path).suffix in self._suffixes and counts(path)
                    measured = missed = _with_text(tree / path) if loadable else set()
                lines += len(measured & added)
                covered += len((measured - missed) & added)
                if missed & added:
                    uncovered.append(f"{path}:{_ranges(missed & added)}")
        except (GitDiffError, ValueError) as error:
            raise InvalidResult(f"coverage of new code: {error}") from error
        return NewCode(lines, covered, uncovered)

    def _lines(self, path: str) -> tuple[set[int], set[int]]:
        """Return the lines that can be covered, and those that no run covered."""
        try:
            found = [
                (set(each.measured_lines(path)), {miss.line for miss in each.violations(path)})
                for each in self._reporters
            ]
        except (TypeError, ValueError) as error:
            raise InvalidResult(f"coverage of {path}: {error}") from error
        measured = set().union(*(all_lines for all_lines, _ in found))
        hit = set().union(*(all_lines - missed for all_lines, missed in found))
        return measured, measured - hit


def read_coverage(reports: Path) -> Coverage | None:
    """Return the coverage files of a folder; None if it has none.

    Raises:
        InvalidResult: one cannot be read.
    """
    xml = [read_xml(file) for file in result_files(reports, ".xml")]
    cobertura = [root for root in xml if root.tag == "coverage"]
    lcov = [_read_lcov(file) for file in result_files(reports, ".info", ".lcov")]
    return Coverage(cobertura, lcov) if cobertura or lcov else None


def _read_lcov(file: Path) -> dict[str, dict[int, int]]:
    text = read_result(file).decode(errors="replace")
    lines = (
        f"SF:{relative_path(line[3:].strip())}" if line.startswith("SF:") else line
        for line in text.splitlines()
        if line.strip()
    )
    with TemporaryDirectory(prefix="fleet-lcov-") as folder:
        relative = Path(folder) / file.name
        relative.write_text("\n".join(lines), encoding="utf-8")
        try:
            parsed: dict[str, dict[int, int]] = LcovCoverageReporter.parse(relative)
        except (ValueError, LookupError) as error:
            raise InvalidResult(f"{file.name}: is not LCOV: {error!r:.200}") from error
    return dict(parsed)


def _paths(root: Element) -> Iterator[str]:
    """Yield the paths of a Cobertura file's classes, relative to the project."""
    sources = [source.text.strip() for source in root.iterfind("sources/source") if source.text]
    for each in root.iterfind(".//class"):
        name = each.get("filename", "")
        for source in sources or [""]:
            yield relative_path(os.path.join(source, name))  # noqa: PTH118  paths of a report


def _with_text(file: Path) -> set[int]:
    """Return the numbers of a file's lines that are not blank; a link has no lines."""
    if file.is_symlink() or not file.is_file():
        return set()
    lines = read_result(file).decode(errors="replace").split("\n")
    return {number for number, line in enumerate(lines, start=1) if line.strip()}


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as `3-5, 9`."""
    groups = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
