"""A program in the sandbox that parses code blocks: a parser that is attacked harms no worker.

Standard input is a marshalled list of (language, source). Standard output has a line of JSON for
each, as soon as it is parsed: a list of [line from 1, message], empty if the source parses. The
first argument is the path of bash, which parses without running anything; the second is a folder of
installed packages, or nothing if no language needs one.

With the command of ruff as further arguments, the input is a list of lists of (language, source,
source in JSON): the blocks of several proposals. After the lines of all blocks, ruff writes its
findings in the Python that parses: a notebook for each proposal, in the working directory. A text
that is too much for a parser ends the program, because the proposals after it would not get what
they get alone.

Each parser imports its packages when they are needed, because most of the run time is start-up;
for the same reason, the worker makes the JSON.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import NoReturn

    Problem = tuple[int, str]

SQL_DIALECTS = (None, "postgres", "mysql")
"""The dialects that are tried. None: sqlglot's own, which accepts the most of all."""

STANDARD = frozenset({"python", "json", "toml", "shell"})
"""Languages that the standard library parses: their parsers need no installed package."""


def parse_python(source: str) -> Iterator[Problem]:
    try:
        compile(source, "block", "exec", dont_inherit=True)
    except SyntaxError as error:
        yield error.lineno or 1, error.msg


def parse_json(source: str) -> Iterator[Problem]:
    import json

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(source, parse_constant=refuse)
    except json.JSONDecodeError as error:
        yield error.lineno, error.msg


def parse_toml(source: str) -> Iterator[Problem]:
    import re
    import tomllib

    try:
        tomllib.loads(source)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"line (\d+)", str(error))
        yield int(place[1]) if place else 1, str(error)


def parse_yaml(source: str) -> Iterator[Problem]:
    """Check syntax and anchors, without expanding aliases and merge keys."""
    import yaml

    anchors = set()
    try:
        for event in yaml.parse(source, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent) and event.anchor not in anchors:
                line = event.start_mark.line + 1 if event.start_mark else 1
                yield line, f"undefined alias {event.anchor!r}"
            elif isinstance(event, yaml.NodeEvent) and event.anchor:
                anchors.add(event.anchor)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        yield line, error.problem or "not YAML"
    except yaml.YAMLError as error:
        yield 1, " ".join(str(error).split())


def parse_sql(source: str) -> Iterator[Problem]:
    """Parse SQL of any of SQL_DIALECTS; report the problems in the first dialect."""
    import logging

    import sqlglot
    from sqlglot.errors import ParseError, TokenError

    logging.disable()  # sqlglot logs statements that it accepts without parsing them
    refusals = []
    for dialect in SQL_DIALECTS:
        try:
            sqlglot.parse(source, dialect=dialect, error_level=sqlglot.ErrorLevel.RAISE)
        except (ParseError, TokenError) as error:
            refusals.append(error)
        else:
            return
    refusal = refusals[0]
    if isinstance(refusal, ParseError):
        for each in refusal.errors:
            yield each["line"] or 1, (each["description"] or "not SQL").split(" but got <")[0]
    else:
        yield 1, " ".join(str(refusal).split())


def parse_shell(source: str) -> Iterator[Problem]:
    import re
    import subprocess

    bash = subprocess.run(
        [sys.argv[1], "-n"], input=source.encode(), capture_output=True, check=False
    )
    if bash.returncode:
        stderr = bash.stderr.decode(errors="replace")
        place = re.search(r"line (\d+): (.*)", stderr)
        yield (int(place[1]), place[2]) if place else (1, stderr.strip() or "bash cannot read it")


PARSERS: dict[str, Callable[[str], Iterator[Problem]]] = {
    "python": parse_python,
    "json": parse_json,
    "toml": parse_toml,
    "yaml": parse_yaml,
    "sql": parse_sql,
    "shell": parse_shell,
}


def problems(language: str, source: str, alone: bool = True) -> list[Problem]:
    """Return the first five problems that prevent a source from being parsed.

    Args:
        language: one of PARSERS.
        source: the text.
        alone: False: raise what is too much for a parser.

    Raises:
        RecursionError: the source is nested too deeply, and is not alone.
        MemoryError: the source needs too much memory, and is not alone.
    """
    try:
        found = list(PARSERS[language](source))[:5]
    except (RecursionError, MemoryError):
        if not alone:
            raise
        return [(1, "nested too deeply to be parsed")]
    except ValueError as error:  # a zero byte, a number with thousands of digits
        found = [(1, str(error))]
    return [(line, message[:300]) for line, message in found]


def answer(found: list[Problem]) -> str:
    if not found:
        return "[]"
    import json

    return json.dumps(found)


def notebook(sources: Sequence[str]) -> str:
    """Return code cells as a Jupyter notebook. `sources`: each in JSON."""
    cells = ", ".join(
        f'{{"cell_type": "code", "metadata": {{}}, "outputs": [], "execution_count": null, '
        f'"source": {source}}}'
        for source in sources
    )
    return f'{{"cells": [{cells}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 4}}'


def check_together(proposals: list[list[tuple[str, str, str]]], ruff: list[str]) -> None:
    """Parse the blocks of all proposals, then become ruff, if any of them has Python."""
    files = []
    for number, blocks in enumerate(proposals):
        sources = []
        for language, source, in_json in blocks:
            found = problems(language, source, alone=False)
            print(answer(found), flush=True)
            if language == "python" and not found:
                sources.append(in_json)
        if sources:
            files.append(f"{number}.ipynb")
            with open(files[-1], "w", encoding="utf-8") as file:  # noqa: PTH123  slow to import
                file.write(notebook(sources))
    if files:
        os.execv(ruff[0], [*ruff, *files])  # noqa: S606  no shell


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")
    if sys.argv[2]:
        sys.path.append(sys.argv[2])
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # standard error would mix with the answers
    blocks = marshal.loads(sys.stdin.buffer.read())  # noqa: S302  the worker's
    if ruff := sys.argv[3:]:
        check_together(blocks, ruff)
        return
    for language, source in blocks:
        print(answer(problems(language, source)), flush=True)


if __name__ == "__main__":
    main()
