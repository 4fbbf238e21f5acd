"""The globs of what two lists of globs both match, such as a story's paths and a project's tests.

Pure. The result is a list of ordinary globs, so everything that takes the paths of a story (the
decoder's schema, the rules for a write, the policy) also takes those of one of its phases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from workflows.rules.paths import wild_match

MOST = 100
"""How many globs two lists may have in common: as many as an implementation takes."""

_ANY, _FOLDERS = "*", "**"

Meet = Callable[[str, str], Sequence[str]]
Found = set[tuple[str, ...]]


class TooManyGlobs(ValueError):
    """Two lists of globs have too many globs in common."""


def common(left: Sequence[str], right: Sequence[str]) -> list[str]:
    """Return globs that match exactly the paths that match a glob of each list, sorted.

    Raises:
        TooManyGlobs: there are more than MOST.
    """
    found = {glob for one in left for other in right for glob in _both(one, other)}
    kept = [glob for glob in sorted(found) if not any(_covers(other, glob) for other in found)]
    if len(kept) > MOST:
        raise TooManyGlobs(f"they have {len(kept)} globs in common, at most {MOST} are allowed")
    return kept


def _both(one: str, other: str) -> list[str]:
    return [_written(names) for names in _met(_names(one), _names(other), _FOLDERS, _same_names)]


def _names(glob: str) -> list[str]:
    names = glob.split("/")
    return [*names, _ANY] if names[-1] == _FOLDERS else names


def _written(names: Sequence[str]) -> str:
    """Return a glob of these names in its shortest form."""
    once = [
        name
        for place, name in enumerate(names)
        if (name, place) == (_FOLDERS, 0) or name != _FOLDERS or names[place - 1] != _FOLDERS
    ]
    return "/".join(once[:-1] if once[-2:] == [_FOLDERS, _ANY] else once)


@lru_cache(maxsize=4_096)
def _same_names(one: str, other: str) -> tuple[str, ...]:
    """Return patterns of the names that two patterns of a name both match."""
    if not {*_ANY, "?"} & {*one, *other}:
        return (one,) if one == other else ()
    return tuple("".join(each) for each in _met(one, other, _ANY, _same_characters))


def _same_characters(one: str, other: str) -> Sequence[str]:
    if one == "?":
        return (other,)
    return (one,) if other in ("?", one) else ()


def _met(left: Sequence[str], right: Sequence[str], star: str, meet: Meet) -> Found:
    """Return the sequences of elements that both match; `star` is any number of elements."""
    after: list[Found] = []
    for place in range(len(left), -1, -1):
        row: list[Found] = [set() for _ in range(len(right) + 1)]
        for other in range(len(right), -1, -1):
            row[other] = _cell(left[place:][:1], right[other:][:1], row, after, other, star, meet)
            if len(row[other]) > MOST:
                raise TooManyGlobs(f"they have more than {MOST} globs in common")
        after = row
    return after[0]


def _cell(
    left: Sequence[str],
    right: Sequence[str],
    row: list[Found],
    after: list[Found],
    place: int,
    star: str,
    meet: Meet,
) -> Found:
    """Return what both match from a place on.

    Args:
        left: its next element; empty at the end.
        right: its next element; empty at the end.
        row: what both match from the same element of `left` and later ones of `right` on.
        after: the row of the next element of `left`; empty at its end.
        place: of the element of `right`.
        star: the element that matches any number of elements.
        meet: returns what matches both of two other elements.
    """
    if not left and not right:
        return {()}
    one, other = (left[0] if left else ""), (right[0] if right else "")
    if one == star and other == star:
        return {(star, *rest) for rest in after[place] | row[place + 1]}
    if one == star:
        taken = {(other, *rest) for rest in row[place + 1]} if right else set()
        return after[place] | taken
    if other == star:
        return row[place + 1] | ({(one, *rest) for rest in after[place]} if left else set())
    if not left or not right:
        return set()
    return {(both, *rest) for both in meet(one, other) for rest in after[place + 1]}


def _covers(glob: str, other: str) -> bool:
    """Return whether a glob matches everything that another one matches, as far as is seen."""
    if glob == other:
        return False
    return wild_match(_names(glob), _names(other), _FOLDERS, _name_covers)


def _name_covers(name: str, other: str) -> bool:
    return other != _FOLDERS and wild_match(name, other, _ANY, _character_covers)


def _character_covers(character: str, other: str) -> bool:
    return character == other or (character == "?" and other != _ANY)
