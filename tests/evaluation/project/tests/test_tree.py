from stockroom import tree


def test_a_category_counts_for_the_one_above() -> None:
    assert tree.totals([("tools/saws", 2)])["tools"] == 2
