"""Lines of comma-separated values."""

from __future__ import annotations


def fields(line: str) -> list[str]:
    """Split a line at commas; quotes protect commas, two quotes are one."""
    found, field, quoted = [], "", False
    rest = iter(range(len(line)))
    for at in rest:
        char = line[at]
        if quoted and char == '"' and line[at + 1 : at + 2] == '"':
            field += '"'
            next(rest)
        elif char == '"':
            quoted = not quoted
        elif char == "," and not quoted:
            found.append(field)
            field = ""
        else:
            field += char
    return [*found, field]


def joined(values: list[str]) -> str:
    """Return the line of some fields: what `fields` splits again."""
    return ",".join(
        '"' + value.replace('"', '""') + '"' if {'"', ","} & set(value) else value
        for value in values
    )
