"""Figures of the benchmark, and whether they reached their aims."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One line of the table; `met` is whether the aim was reached, or None without an aim.

    A value of None was not measured, and `how` says how to.
    """

    what: str
    value: float | None
    unit: str
    aim: str = ""
    met: bool | None = None
    how: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "not measured"
        return f"{self.value:.3g} {self.unit}".rstrip()


def at_most(what: str, value: float, unit: str, aim: float, how: str) -> Figure:
    return Figure(what, value, unit, f"at most {aim:g}", value <= aim, how)


def at_least(what: str, value: float, unit: str, aim: float, how: str) -> Figure:
    return Figure(what, value, unit, f"at least {aim:g}", value >= aim, how)
