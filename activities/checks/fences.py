"""The code of a proposal: the code blocks of its Markdown, with language and position."""

from __future__ import annotations

import ast
import builtins
import json
import re
from dataclasses import dataclass

from markdown_it import MarkdownIt

_MARKDOWN = MarkdownIt("commonmark").disable("inline")  # blocks only: text is not rendered

_CANONICAL = {
    "py": "python",
    "py3": "python",
    "python3": "python",
    "yml": "yaml",
    "sh": "shell",
    "bash": "shell",
    "postgres": "sql",
    "postgresql": "sql",
    "mysql": "sql",
    "sqlite": "sql",
}


@dataclass(frozen=True)
class Block:
    """One code block.

    Attributes:
        language: lower case, `python` for `py` and similar; empty if unnamed.
        line: number of its first line of code in the Markdown, from 1.
        lines: number of lines that it covers.
        file: the relative path in its label or its first comment; empty if neither has one.
    """

    language: str
    text: str
    line: int
    lines: int
    file: str = ""


def code_blocks(markdown: str) -> list[Block]:
    """Return every fenced or indented code block, in order; an unclosed fence runs to the end.

    Raw HTML is a block in the language HTML, because readers may take its content for code. Blocks
    in lists and quotes count. The language is the info string's first word: `python` for
    "```python title=x", "```{.python}" and "```{python}".
    """
    blocks = []
    for token in _MARKDOWN.parse(markdown):
        if token.type in ("fence", "code_block", "html_block") and token.map is not None:
            first, end = token.map
            fenced = token.type == "fence"
            text = without_prompts(token.content)
            blocks.append(
                Block(
                    language=HTML if token.type == "html_block" else _language(token.info, text),
                    text=text,
                    line=first + 1 + fenced,
                    lines=end - first - fenced,
                    file=_file(token.info, text),
                )
            )
    return blocks


HTML = "html"
UNCLEAR = "unclear"
"""The language of a block that may be Python: it looks like Python but cannot be parsed, or it is a
single unlabelled line that is also valid in other languages.
"""

_PYTHON = re.compile(r"(?:i?python[\d.]*|py[\d.]*|pycon|pyi|python-repl|code-cell|doctest)$")
_FILE = re.compile(r"[\w./-]+\.(py|pyi|json|toml|ya?ml|sql|sh)$")
_FIRST_COMMENT = re.compile(
    r"\s*(?:#|//|--)[ \t]*(?:file(?:name)?:[ \t]*)?(\S+)[ \t]*(?:\n|$)", re.I
)
_UNNAMED = {"", "text", "txt", "plain", "plaintext", "none", "code", "console", "output"}
_PYTHON_LINE = re.compile(
    r"(?m)^\s*(?:import [\w.]+|from [\w.]+ import .+|(?:async )?def \w+\(.*|class \w+.*:)\s*$"
)


def _language(info: str, text: str) -> str:
    """Return the language in the info string, or the language detected from the text.

    Text that parses as Python and imports, defines or calls something is `python`, regardless of
    its label.
    """
    named = _named(info)
    if named == "python" or _is_python(text):
        return "python"
    if named in _CANONICAL.values() or named in ("json", "toml"):
        return named
    if named not in _UNNAMED:
        return named
    if _is_json(text):
        return "json"
    calls = _calls(text)
    if "\n" in text.strip() or not calls.isdisjoint(dir(builtins)):
        return "python" if calls else UNCLEAR if _PYTHON_LINE.search(text) else named
    # `console.log(x)` is a call in most languages.
    return UNCLEAR if calls or _PYTHON_LINE.search(text) else named


def _named(info: str) -> str:
    words = re.split(r"[\s,{}=\"']+", info.strip().lower())
    names = [word.strip(".").split(":")[0] for word in words]
    if any(_PYTHON.match(name) for name in names[:2]):
        return "python"
    for name in names:
        if file := _FILE.search(name):
            return _CANONICAL.get(file[1], "python" if file[1] == "pyi" else file[1])
    name = next((name for name in names if name), "")
    return _CANONICAL.get(name, name)


def _file(info: str, text: str) -> str:
    comment = _FIRST_COMMENT.match(text)
    names = [*re.split(r"[\s,{}=:\"'`]+", info), *(comment.groups() if comment else ())]
    for name in names:
        parts = [part for part in name.strip("`").split("/") if part != "."]
        if _FILE.fullmatch(name.strip("`")) and not {"", ".."} & set(parts):
            return "/".join(parts)
    return ""


def _is_python(text: str) -> bool:
    """Return whether the text parses as Python that imports or defines something."""
    certain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, certain) for node in _parsed(text))


def _calls(text: str) -> set[str]:
    """Return the first name of each call in the text, if it parses as Python."""
    found = set()
    for node in (node for statement in _parsed(text) for node in ast.walk(statement)):
        if isinstance(node, ast.Call):
            called: ast.expr = node.func
            while isinstance(called, ast.Attribute):
                called = called.value
            found.add(called.id if isinstance(called, ast.Name) else "")
    return found


def _parsed(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _is_json(text: str) -> bool:
    """Return whether the text is a JSON object or list."""
    try:
        return text.lstrip().startswith(("{", "[")) and json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def without_prompts(text: str) -> str:
    """Remove the prompts from a Python session; its output becomes empty lines.

    Any other text stays unchanged, such as a program with a session in a docstring, or a session
    whose output looks like code, so that prompts cannot hide code from the checks.
    """
    if not text.lstrip().startswith(">>> "):
        return text
    lines = text.split("\n")
    prompted = [line.rstrip() == "..." or line.startswith((">>> ", "... ")) for line in lines]
    output = "\n".join(line for line, code in zip(lines, prompted, strict=True) if not code)
    if _PYTHON_LINE.search(output):
        return text
    return "\n".join(line[4:] if code else "" for line, code in zip(lines, prompted, strict=True))
