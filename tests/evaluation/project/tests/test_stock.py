import pytest

from stockroom.stock import OutOfStock, Stock


def test_articles_are_added_and_taken() -> None:
    stock = Stock()
    stock.add("bolt", 5)
    stock.take("bolt", 2)
    assert stock.count("bolt") == 3


def test_more_than_there_is_cannot_be_taken() -> None:
    with pytest.raises(OutOfStock):
        Stock().take("bolt", 1)
