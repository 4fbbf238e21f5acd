from stockroom.cache import Cache


def test_the_oldest_entry_goes_first() -> None:
    cache = Cache(1)
    cache.put("a", 1)
    cache.put("b", 2)
    assert (cache.get("a"), cache.get("b")) == (None, 2)
