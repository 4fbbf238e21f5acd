"""Parses code blocks in a process of its own: a parser that hangs or crashes harms no worker.

Standard input is a marshalled list of (language, source). Standard output has a line of JSON for
each, as soon as it is read: a list of [line from 1, message], empty where the source parses. bash
is found at the path that is the first argument; it reads and runs nothing.

Each parser imports what it needs, when it is needed: starting is most of what is done here.
"""

from __future__ import annotations

import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import NoReturn

    Problem = tuple[int, str]

SQL_DIALECTS = (None, "postgres", "mysql")
"""None: sqlglot's own, which takes most of all of them."""

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
    """Syntax and anchors; what an alias or a merge key stands for is not built up."""
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
    """SQL of any of SQL_DIALECTS; its problems are those of the first."""
    import logging

    import sqlglot
    from sqlglot.errors import ParseError, TokenError

    logging.disable()  # it tells of statements that it takes as they are
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
        said = bash.stderr.decode(errors="replace")
        place = re.search(r"line (\d+): (.*)", said)
        yield (int(place[1]), place[2]) if place else (1, said.strip() or "bash cannot read it")


PARSERS: dict[str, Callable[[str], Iterator[Problem]]] = {
    "python": parse_python,
    "json": parse_json,
    "toml": parse_toml,
    "yaml": parse_yaml,
    "sql": parse_sql,
    "shell": parse_shell,
}


def problems(language: str, source: str) -> list[Problem]:
    """What keeps a source from being parsed; its first five problems."""
    try:
        found = list(PARSERS[language](source))[:5]
    except (RecursionError, MemoryError):
        return [(1, "nested too deeply to be parsed")]
    except ValueError as error:  # a zero byte, a number of thousands of digits
        found = [(1, str(error))]
    return [(line, message[:300]) for line, message in found]


def answer(found: list[Problem]) -> str:
    if not found:
        return "[]"
    import json

    return json.dumps(found)


def main() -> None:
    import warnings

    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nothing but answers
    for language, source in marshal.loads(sys.stdin.buffer.read()):  # noqa: S302  the worker's
        print(answer(problems(language, source)), flush=True)


if __name__ == "__main__":
    main()
