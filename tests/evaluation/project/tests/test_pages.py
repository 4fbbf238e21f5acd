import pytest

from stockroom import pages


def test_full_pages_are_counted() -> None:
    assert pages.count(20, 10) == 2


def test_the_first_page_begins_with_the_first_item() -> None:
    assert pages.page("abcdef", 1, 4) == ["a", "b", "c", "d"]


def test_there_is_no_page_0() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        pages.page("abc", 0, 2)
