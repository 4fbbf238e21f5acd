from stockroom import periods


def test_periods_overlap() -> None:
    assert periods.overlap((1, 5), (4, 9))


def test_separate_periods_do_not_overlap() -> None:
    assert not periods.overlap((1, 3), (5, 9))


def test_overlapping_periods_are_joined() -> None:
    assert periods.merged([(4, 9), (1, 5)]) == [(1, 9)]
