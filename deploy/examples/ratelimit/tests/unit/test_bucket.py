"""The limit itself, on a clock that the test turns."""

import threading

import pytest

from ratelimit import RateLimiter, TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_client_may_use_its_whole_capacity_at_once(clock: Clock) -> None:
    limiter = RateLimiter(3, 1.0, clock)

    assert [limiter.wait_for("a") for _ in range(3)] == [0.0, 0.0, 0.0]


def test_one_request_more_has_to_wait_for_a_token(clock: Clock) -> None:
    limiter = RateLimiter(1, 0.5, clock)
    limiter.wait_for("a")

    assert limiter.wait_for("a") == 2.0


def test_a_refused_request_costs_nothing(clock: Clock) -> None:
    limiter = RateLimiter(1, 1.0, clock)
    limiter.wait_for("a")
    limiter.wait_for("a")

    clock.now += 1

    assert limiter.wait_for("a") == 0.0


def test_one_client_does_not_touch_another(clock: Clock) -> None:
    limiter = RateLimiter(1, 1.0, clock)
    limiter.wait_for("greedy")
    limiter.wait_for("greedy")

    assert limiter.wait_for("modest") == 0.0


def test_tokens_come_back_up_to_the_capacity_and_no_further(clock: Clock) -> None:
    limiter = RateLimiter(2, 1.0, clock)
    limiter.wait_for("a")

    clock.now += 3600

    assert [limiter.wait_for("a") == 0.0 for _ in range(3)] == [True, True, False]


def test_a_clock_that_goes_back_gives_no_tokens() -> None:
    bucket = TokenBucket(1, 1.0, now=10.0)
    bucket.take(10.0)

    assert bucket.take(5.0) == 1.0
    assert bucket.take(10.5) == 0.5


def test_quiet_clients_are_forgotten(clock: Clock) -> None:
    limiter = RateLimiter(10, 10.0, clock)
    for number in range(1000):
        limiter.wait_for(f"client-{number}")

    clock.now += 2
    limiter.wait_for("latecomer")

    assert len(limiter) == 1


def test_a_client_that_is_still_limited_is_remembered(clock: Clock) -> None:
    limiter = RateLimiter(10, 1.0, clock)
    clock.now += 9.5
    for _ in range(10):
        limiter.wait_for("greedy")

    clock.now += 0.6
    limiter.wait_for("other")

    assert limiter.wait_for("greedy") > 0


def test_threads_get_no_more_than_the_capacity() -> None:
    limiter = RateLimiter(50, 0.001)
    let_through: list[float] = []

    def ask() -> None:
        let_through.extend(w for w in (limiter.wait_for("a") for _ in range(25)) if w == 0)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(let_through) == 50


@pytest.mark.parametrize(
    ("capacity", "per_second", "field"), [(0, 1.0, "capacity"), (1, 0.0, "per_second")]
)
def test_a_limit_that_lets_nothing_through_is_refused(
    capacity: int, per_second: float, field: str
) -> None:
    with pytest.raises(ValueError, match=field):
        RateLimiter(capacity, per_second)
