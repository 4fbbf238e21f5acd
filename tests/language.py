"""Finds words that a reader stumbles over: `python -m tests.language` (part of `make lint`).

It reads Markdown, docstrings, comments, strings, and names of functions, classes and parameters,
also those of tests. Fields are not read: what histories, the bus and the graph hold keeps its
name.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = ("workflows", "activities", "bridge", "workers", "deploy")
NOT_OURS = ("bridge/grpc/wire", "deploy/examples/ratelimit")

INSTEAD = {
    r"mend(s|ed|ing)?": "fix, correct",
    r"told|tells?": "notify, report, show",
    r"hears?|heard": "receive",
    r"said": "reported, stated",
    r"bury|buries|buried": "dead-letter",
    r"anew": "again",
    r"thrice": "three times",
    r"besides": "also, in addition to",
    r"nobody": "no one, none",
    r"(any|some)body": "anyone, someone",
    r"whoever": "anyone who",
    r"for ever": "forever",
    r"of (its|their) own": "separate, new",
    r"in good order": "gracefully",
    r"let us in": "authentication failed",
    r"(?<!there )(is|are) no (?!longer|more|one)[a-z]+": "is not a",
    r"it serves us": "",
}
WORDS = {re.compile(rf"\b({words})\b", re.IGNORECASE): better for words, better in INSTEAD.items()}


def pages() -> Iterator[tuple[Path, int, str]]:
    """Yield each line of Markdown, with its place."""
    places = ("*.md", "docs/**/*.md", "deploy/*/*.md", "deploy/examples/*/*.md")
    for page in sorted(page for place in places for page in ROOT.glob(place)):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            yield page, number, line


def modules(*folders: str) -> Iterator[Path]:
    """Yield the modules in the folders."""
    for module in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        if not str(module.relative_to(ROOT)).startswith(NOT_OURS):
            yield module


def names() -> Iterator[tuple[Path, int, str]]:
    """Yield the words of each name of a function, class or parameter, with its place."""
    for module in modules(*CODE, "tests"):
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                    | ast.arg(arg=name)
                ):
                    yield module, node.lineno, name.replace("_", " ")


def texts() -> Iterator[tuple[Path, int, str]]:
    """Yield each docstring, comment and other string, with its place."""
    for module in modules(*CODE):
        for node in ast.walk(ast.parse(module.read_text())):
            match node:
                case ast.Constant(value=str(text)):
                    yield module, node.lineno, text
        with module.open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                if token.type == tokenize.COMMENT:
                    yield module, token.start[0], token.string


def main() -> int:
    """Print what was found; the exit code is 1 if there is any."""
    found = 0
    for path, number, text in [*pages(), *texts(), *names()]:
        for pattern, better in WORDS.items():
            for match in pattern.finditer(text):
                line = number + text.count("\n", 0, match.start())
                found += 1
                print(f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; better: {better}")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
