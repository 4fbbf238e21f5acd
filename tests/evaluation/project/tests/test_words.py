from stockroom import words


def test_a_name_becomes_an_address() -> None:
    assert words.slug("Hex Bolt M8") == "hex-bolt-m8"


def test_a_short_text_stays() -> None:
    assert words.shortened("bolt", 10) == "bolt"
