from stockroom import retries


def test_delays_double() -> None:
    assert retries.delays(4, 1, 60)[:2] == [1, 2]
