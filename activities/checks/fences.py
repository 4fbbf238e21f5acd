"""The code of a proposal: its Markdown's code blocks, with language and place."""

from __future__ import annotations

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
    """One code block. language: lower case, `python` for `py` and its like, empty where unnamed.

    line: number of its first line of code in the Markdown, from 1. lines: how many it covers.
    """

    language: str
    text: str
    line: int
    lines: int


def code_blocks(markdown: str) -> list[Block]:
    """Every fenced or indented code block, in order; an unclosed fence runs to the end.

    Blocks in lists and quotes count. The language is the info string's first word: `python` of
    "```python title=x", of "```{.python}" and of "```{python}".
    """
    blocks = []
    for token in _MARKDOWN.parse(markdown):
        if token.type in ("fence", "code_block") and token.map is not None:
            first, end = token.map
            fenced = token.type == "fence"
            blocks.append(
                Block(
                    language=_language(token.info),
                    text=token.content,
                    line=first + 1 + fenced,
                    lines=end - first - fenced,
                )
            )
    return blocks


def _language(info: str) -> str:
    words = info.strip().strip("{}").split()
    name = words[0].strip("{}.,").split(":")[0].lower() if words else ""
    return _CANONICAL.get(name, name)
