from stockroom import lines


def test_fields_are_split_at_commas() -> None:
    assert lines.fields("a,b,,c") == ["a", "b", "", "c"]


def test_quotes_protect_commas() -> None:
    assert lines.fields('"a,b",c') == ["a,b", "c"]


def test_plain_fields_are_joined() -> None:
    assert lines.joined(["a", "b"]) == "a,b"
