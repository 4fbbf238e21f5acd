"""Answers about objects that are remembered."""

from activities.workspace.remembered import Remembered


async def test_what_was_asked_is_not_asked_again_until_there_is_too_much() -> None:
    asked: list[tuple[str, ...]] = []

    async def ask(*words: str) -> bytes:
        asked.append(words)
        return b"x" * 40

    remembered = Remembered(limit_bytes=100)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert await remembered.of(("ls-tree", name), ask) == b"x" * 40

    # c takes the place of b, which was not used longest.
    assert [name for _, name in asked] == ["a", "b", "c", "b"]


def test_an_answer_over_the_limit_is_not_kept() -> None:
    remembered = Remembered(limit_bytes=100)
    remembered.add(("a",), b"x" * 101)
    remembered.add(("b",), b"x" * 100)

    assert remembered.get(("a",)) is None
    assert remembered.get(("b",)) == b"x" * 100
