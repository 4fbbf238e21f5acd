from stockroom import money


def test_an_amount_has_cents() -> None:
    assert money.parse("12.50") == 1250


def test_an_amount_without_a_point_is_whole() -> None:
    assert money.parse("7") == 700


def test_an_amount_can_be_split_evenly() -> None:
    assert money.split(900, 3) == [300, 300, 300]
