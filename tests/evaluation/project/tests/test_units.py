from stockroom import units


def test_bytes_are_whole() -> None:
    assert units.shown(512) == "512 B"


def test_kibibytes_have_a_fraction() -> None:
    assert units.shown(1536) == "1.5 KiB"
