"""Which paths of a repository a story may change. Pure.

A path is relative to the repository's root, with `/` between its names. It must mean the same file
on every file system, also on those that fold case, compose Unicode or have device names: git
repositories are checked out on all of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

CLOSED: tuple[str, ...] = (
    # git
    "**/.git*",
    "**/.git*/**",
    "**/.lfsconfig",
    "**/codeowners",
    # CI, and what runs on commits
    ".github/**",
    ".gitlab/**",
    ".gitlab-ci.yml",
    ".gitea/**",
    ".forgejo/**",
    ".circleci/**",
    ".buildkite/**",
    ".teamcity/**",
    ".semaphore/**",
    ".tekton/**",
    ".woodpecker/**",
    ".woodpecker.y*ml",
    ".azure-pipelines/**",
    "**/azure-pipelines*.y*ml",
    "**/jenkinsfile*",
    ".travis.yml",
    ".cirrus.*",
    ".drone.*",
    "*appveyor.yml",
    "bitbucket-pipelines.yml",
    "buildspec*.y*ml",
    "cloudbuild*.y*ml",
    ".pre-commit-config.yaml",
    ".husky/**",
    "lefthook*.y*ml",
    ".lefthook*",
)
"""Patterns, in lower case, of paths that only an entry of repositories.yaml opens."""

NAME_BYTES = 255
PATH_BYTES = 4_000

_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
_SHORT = re.compile(r"gi[^.~]{0,4}~[0-9]+(\..*)?", re.IGNORECASE)
"""Names under which Windows also knows `.git` and `.gitmodules`."""

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def _as_regex(pattern: str) -> str:
    """Return a pattern as a regular expression, which is fast for the few simple ones here."""
    names = pattern.split("/")
    if names[-1] == "**":
        names.append("*")
    return "/".join(map(_name_as_regex, names)).replace("**/", "(?:[^/]*/)*")


def _name_as_regex(name: str) -> str:
    return name if name == "**" else re.escape(name).replace(r"\*", "[^/]*")


_CLOSED = re.compile("|".join(map(_as_regex, CLOSED)))


def folded(path: str) -> str:
    """Return what all paths have in common that some file system takes for the same."""
    if path.isascii() and path.isprintable():
        return path.lower()
    seen = "".join(each for each in path if unicodedata.category(each) not in _INVISIBLE)
    once = unicodedata.normalize("NFKC", seen).casefold()
    return unicodedata.normalize("NFKC", once).casefold()


def git_name(name: str) -> bool:
    """Return whether some file system takes a name for `.git`."""
    plain = folded(name).partition(":")[0].rstrip(". ")
    return plain == ".git" or bool(_SHORT.fullmatch(plain) and plain.startswith("git~"))


def matches(pattern: str, path: str) -> bool:
    """Return whether a glob matches a whole path: `*` within a name, `**` across names.

    `docs/**` matches what is in the folder; `**/x` matches `x` in any folder and at the root.
    """
    names = pattern.split("/")
    if names[-1] == "**":
        names.append("*")
    return wild_match(names, path.split("/"), "**", _same_name)


def _same_name(glob: str, name: str) -> bool:
    return wild_match(glob, name, "*", _same)


def _same(expected: str, given: str) -> bool:
    return expected in ("?", given)


def wild_match(
    pattern: Sequence[str], given: Sequence[str], star: str, fits: Callable[[str, str], bool]
) -> bool:
    """Match with `star` for any number of elements, in at most len(pattern) * len(given) steps."""
    at = place = 0
    star_at, star_place = -1, 0
    while place < len(given):
        if at < len(pattern) and pattern[at] == star:
            star_at, star_place = at, place
            at += 1
        elif at < len(pattern) and fits(pattern[at], given[place]):
            at, place = at + 1, place + 1
        elif star_at >= 0:
            star_place += 1
            at, place = star_at + 1, star_place
        else:
            return False
    return all(each == star for each in pattern[at:])


def glob_problem(pattern: str) -> str:
    """Return the rule that a pattern breaks and the remedy; empty if none."""
    if "\\" in pattern:
        return "a pattern has no backslash; write '/' between names"
    if pattern.startswith("/") or pattern.endswith("/"):
        return "a pattern neither begins nor ends with '/'; write 'docs/**' for a folder"
    for name in pattern.split("/"):
        if name in ("", ".", ".."):
            return "a pattern has no empty name, '.' or '..'; write it from the root"
        if "**" in name and name != "**":
            return "'**' stands alone between '/'; write '**/*.py'"
    if any(unicodedata.category(each) in _INVISIBLE for each in pattern):
        return "a pattern has only visible characters; remove the others"
    return ""


def name_problem(path: str) -> str:
    """Return the rule that a path breaks and the remedy, whatever is allowed; empty if none."""
    if not path:
        return "a path is not empty; name a file"
    if any(unicodedata.category(each) in _INVISIBLE for each in path):
        return "a path has only visible characters; remove control and zero-width ones"
    if "\\" in path:
        return "a path has no backslash; write '/' between names"
    if path.startswith("/"):
        return "a path is relative to the repository's root; remove the leading '/'"
    if unicodedata.normalize("NFC", path) != path:
        return "a path is in Unicode's composed form (NFC); write it so"
    if len(path.encode()) > PATH_BYTES:
        return f"a path has at most {PATH_BYTES:,} bytes; choose shorter names"
    return next((problem for part in path.split("/") if (problem := _part_problem(part))), "")


def _part_problem(name: str) -> str:
    if name in ("", ".", ".."):
        return "a path has no empty name, '.' or '..'; write it from the root"
    if git_name(name) or _SHORT.fullmatch(name):
        return f"{name!r} is a name of git's own folder on some system; choose another"
    if name != name.rstrip(". ") or name != name.lstrip(" "):
        return f"{name!r} begins with a space or ends with a space or '.'; remove these"
    if any(each in name for each in ':<>"|?*'):
        return f'{name!r} has one of the characters : < > " | ? *; choose another name'
    if _DEVICES.fullmatch(name):
        return f"{name!r} is a device on Windows; choose another name"
    if len(name.encode()) > NAME_BYTES:
        return f"a name has at most {NAME_BYTES} bytes; shorten {name[:40]!r}..."
    return ""


def closed(path: str, open_paths: Sequence[str] = ()) -> bool:
    """Return whether a path is CI or git configuration that the repository does not open."""
    if not _CLOSED.fullmatch(folded(path)):
        return False
    return not any(matches(pattern, path) for pattern in open_paths)


def allowed(path: str, paths: Sequence[str], open_paths: Sequence[str] = ()) -> bool:
    """Return whether a story may change a path.

    Args:
        path: the path.
        paths: the story's patterns; empty: everything that is not closed.
        open_paths: the patterns of CI and git configuration that the repository opens.
    """
    if closed(path, open_paths):
        return False
    return not paths or any(matches(pattern, path) for pattern in paths)


def rule_problem(path: str, paths: Sequence[str], open_paths: Sequence[str] = ()) -> str:
    """Return why `allowed` refuses a path, with the remedy; empty if it does not."""
    if closed(path, open_paths):
        return "CI and git configuration is closed; a person opens it by `open_paths`"
    if not allowed(path, paths, open_paths):
        return f"the story may change only {', '.join(paths)}; choose one of these"
    return ""


def one_file(paths: Sequence[str]) -> bool:
    """Return whether a story's patterns allow a change of one file at most."""
    return len(paths) == 1 and not any(sign in paths[0] for sign in "*?")


def spellings(existing: Iterable[str]) -> dict[str, str]:
    """Return, by its folded form, each path of a commit and each folder above one."""
    found: dict[str, str] = {}
    for path in existing:
        while path and folded(path) not in found:
            found[folded(path)] = path
            path = path.rpartition("/")[0]
    return found


def path_problem(
    path: str,
    *,
    paths: Sequence[str] = (),
    open_paths: Sequence[str] = (),
    existing: Mapping[str, str] | None = None,
    links: Collection[str] = (),
) -> str:
    """Return why a story may not write a path, with the remedy; empty if it may.

    Args:
        path: the path.
        paths: the story's patterns; empty: everything that is not closed.
        open_paths: the patterns of CI and git configuration that the repository opens.
        existing: `spellings` of the commit that is changed.
        links: its symbolic links, which no path may be or lead through.
    """
    if problem := name_problem(path) or rule_problem(path, paths, open_paths):
        return problem
    above = [path[: found.start()] for found in re.finditer("/", path)]
    for each in (*above, path):
        other = (existing or {}).get(folded(each), each)
        if other != each:
            return f"{each!r} and {other!r} are one file on some systems; use {other!r}"
        if each in links:
            return f"{each!r} is a symbolic link, which is never followed; choose another path"
    return ""
