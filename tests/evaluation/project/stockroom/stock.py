"""How many of each article there are."""

from __future__ import annotations


class OutOfStock(Exception):
    """There are fewer than are wanted."""


class Stock:
    """The articles on the shelves."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, article: str, count: int) -> None:
        """Put articles on the shelf."""
        if count < 0:
            raise ValueError("count must be 0 or more")
        self._counts[article] = self.count(article) + count

    def take(self, article: str, count: int) -> None:
        """Take articles from the shelf: all of them, or none."""
        if count > self.count(article):
            raise OutOfStock(f"{article}: {self.count(article)} of {count}")
        self._counts[article] = self.count(article) - count

    def count(self, article: str) -> int:
        """Return how many there are."""
        return self._counts.get(article, 0)

    def empty(self) -> list[str]:
        """Return the articles that are used up, by name."""
        return sorted(name for name, count in self._counts.items() if count == 0)
