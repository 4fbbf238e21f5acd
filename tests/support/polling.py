"""Waiting for something to happen, with one deadline for all tests."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

T = TypeVar("T")

WITHIN_S = 300
"""How many seconds a test waits for anything: the machine may be busy, and only failures wait."""


@overload
async def until(
    read: Callable[[], Awaitable[T]],
    holds: Callable[[T], object] = bool,
    *,
    within_s: float = ...,
    every_s: float = ...,
) -> T: ...
@overload
async def until(
    read: Callable[[], T],
    holds: Callable[[T], object] = bool,
    *,
    within_s: float = ...,
    every_s: float = ...,
) -> T: ...
async def until(
    read: Callable[[], Any],
    holds: Callable[[Any], object] = bool,
    *,
    within_s: float = WITHIN_S,
    every_s: float = 0.02,
) -> Any:
    """Call `read` until `holds` is true of its result, and return that result.

    Raises:
        AssertionError: not within `within_s` seconds; it names `read` and shows its last result.
    """
    found: Any = "none yet"
    try:
        async with asyncio.timeout(within_s) as deadline:
            while True:
                answer = read()
                found = await answer if inspect.isawaitable(answer) else answer
                if holds(found):
                    return found
                await asyncio.sleep(every_s)
    except TimeoutError:
        if not deadline.expired():  # it is an error of `read`
            raise
        words = f"not within {within_s:.0f} s: {_name(read)}; last result: {found!r:.2000}"
        raise AssertionError(words) from None


async def until_early_in_the_hour() -> None:
    """Wait while the hour ends: what is counted per hour would begin again during the test."""
    await until(lambda: time.time() % 3_600 < 3_600 - 120, every_s=1)


def _name(read: Callable[[], Any]) -> str:
    """Return the function's name, and the arguments of a partial."""
    if isinstance(read, functools.partial):
        return f"{_name(read.func)}({', '.join(map(repr, read.args))})"
    return getattr(read, "__qualname__", repr(read))
