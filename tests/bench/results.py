"""The answers of the benchmark, and their rows, tables and figures by way of asking."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from rich.table import Table

from tests.bench.figures import Figure, at_least, at_most

PLAIN, ONE, BEST, COUNCIL = "plain", "one agent", "best of three", "council"


class Answer(BaseModel):
    """An answer with its cost, and what the judges found in it.

    Attributes:
        number: which of the repetitions with other seeds it is.
        seeds: of its calls.
        max_tokens: of its first call, as is `temperature`.
        text: the answer; empty if there was none.
        error: why there is no answer.
        criteria: name -> why it is not met; empty if it is met.
    """

    task: str
    kind: str
    way: str
    agents: int
    rounds: int
    number: int
    model: str
    seeds: list[int]
    max_tokens: int
    temperature: float
    text: str
    error: str = ""
    tokens_in: int
    tokens_out: int
    cached_tokens: int
    seconds: float
    criteria: dict[str, str] = {}
    basic: bool = False
    copied: float = 0
    is_copy: bool = False
    is_met: bool = False

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.task, self.way, self.agents, self.rounds, self.number

    def line(self) -> str:
        """Return what the progress shows."""
        met = sum(not why for why in self.criteria.values())
        unmet = ", ".join(name for name, why in self.criteria.items() if why)
        return (
            f"{self.task}, {self.way}: {met} of {len(self.criteria)} criteria"
            f"{f' (not {unmet})' if unmet else ''}, {'basic' if self.basic else 'not basic'}, "
            f"{f'copied {self.copied:.0%}, ' if self.is_copy else ''}{len(self.text)} characters, "
            f"{self.tokens_in + self.tokens_out} tokens, {self.seconds:.1f} s, seeds "
            f"{' '.join(map(str, self.seeds))}{f'; no answer: {self.error}' if self.error else ''}"
        )


@dataclass(frozen=True)
class Row:
    """The result of one way of asking.

    Attributes:
        criteria: the share of the criteria that are met.
        tokens: the mean of an answer, as are `written` and `seconds`.
        cached: the share of the prompts' tokens that the engine had in its cache.
    """

    way: str
    answers: int
    met: int
    basic: int
    criteria: float
    copies: int
    tokens: float
    written: float
    cached: float
    seconds: float
    unanswered: int


def row(way: str, given: Sequence[Answer]) -> Row:
    """Sum up the answers of one way."""
    criteria = [not why for answer in given for why in answer.criteria.values()]
    answered = [answer for answer in given if not answer.error] or given
    return Row(
        way=way,
        answers=len(given),
        met=sum(answer.is_met for answer in given),
        basic=sum(answer.basic for answer in given),
        criteria=sum(criteria) / len(criteria),
        copies=sum(answer.is_copy for answer in given),
        tokens=statistics.mean(answer.tokens_in + answer.tokens_out for answer in answered),
        written=statistics.mean(answer.tokens_out for answer in answered),
        cached=sum(answer.cached_tokens for answer in given)
        / max(sum(answer.tokens_in for answer in given), 1),
        seconds=statistics.mean(answer.seconds for answer in answered),
        unanswered=sum(bool(answer.error) for answer in given),
    )


def rows(given: Sequence[Answer]) -> list[Row]:
    """Return a row for each way that has answers."""
    by_way: dict[str, list[Answer]] = {PLAIN: [], ONE: [], BEST: [], COUNCIL: []}
    for answer in given:
        by_way[answer.way].append(answer)
    return [row(named(way, found), found) for way, found in by_way.items() if found]


def named(way: str, given: Sequence[Answer]) -> str:
    council = f"council of {given[0].agents}, {given[0].rounds} rounds"
    return council if way == COUNCIL else way


def paired(given: Sequence[Answer]) -> list[Answer]:
    """Return the answers to the tasks that have one in every way; none without a council's."""
    every = {PLAIN, ONE, BEST, COUNCIL}
    asked: dict[tuple[str, int], set[str]] = {}
    for answer in given:
        asked.setdefault((answer.task, answer.number), set()).add(answer.way)
    return [answer for answer in given if asked[answer.task, answer.number] == every]


def tables(given: Sequence[Answer]) -> Iterator[Table]:
    """Yield the table of all tasks, and of those that were asked in every way."""
    both = [answer for answer in given if answer.way in (PLAIN, ONE)]
    for title, found in (("All tasks", both), ("Tasks asked in every way", paired(given))):
        if found:
            yield table(title, rows(found))


def table(title: str, found: Sequence[Row]) -> Table:
    heads = ("way of asking", "tasks met", "basic", "criteria met", "copies", "no answer", "tokens")
    shown = Table(*heads, "written", "seconds", title=title)
    for each in found:
        shown.add_row(
            each.way,
            f"{each.met} of {each.answers}",
            f"{each.basic} of {each.answers}",
            f"{each.criteria:.0%}",
            str(each.copies),
            str(each.unanswered),
            f"{each.tokens:,.0f}",
            f"{each.written:,.0f}",
            f"{each.seconds:.1f}",
        )
    return shown


def figures_of(given: Sequence[Answer]) -> list[Figure]:
    """Return the figures: rates of all tasks, and of those that were asked in every way."""
    both = rows([answer for answer in given if answer.way in (PLAIN, ONE)])
    plain, one = both[0], both[1]
    through = [answer for answer in given if answer.way != PLAIN]
    copies = sum(answer.is_copy for answer in through)
    how = f"of {one.answers} answers; {plain.basic} asked plainly"
    return [
        at_least("basic answers through the fleet", one.basic, "", plain.basic, how),
        at_most("copies through the fleet", copies, "", 0, f"of {len(through)} answers"),
        *(figure for each in both for figure in _figures(each, "all tasks")),
        *(
            figure
            for each in rows(paired(given))
            for figure in _figures(each, "asked in every way")
        ),
    ]


def _figures(each: Row, which: str) -> Iterator[Figure]:
    name, how = f"{each.way}, {which}", f"of {each.answers} answers"
    yield Figure(f"{name}: tasks met", each.met, "", how=how)
    yield Figure(f"{name}: basic", each.basic, "", how=how)
    yield Figure(f"{name}: criteria met", each.criteria * 100, "%", how=how)
    yield Figure(f"{name}: copies", each.copies, "", how=how)
    yield Figure(f"{name}: tokens", each.tokens, "", how=f"mean {how}")
    yield Figure(f"{name}: prompts from the cache", each.cached * 100, "%", how=how)
    yield Figure(f"{name}: time", each.seconds, "s", how=f"mean {how}")
