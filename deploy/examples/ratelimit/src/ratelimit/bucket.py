"""Token buckets: a client spends one token a request, and tokens flow back at a steady rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds that only grow."""


class TokenBucket:
    """Holds `capacity` tokens at most, and gains `per_second` of them each second."""

    def __init__(self, capacity: int, per_second: float, now: float) -> None:
        self.capacity = capacity
        self.per_second = per_second
        self._tokens = float(capacity)
        self._at = now

    def take(self, now: float) -> float:
        """Spend a token. 0.0: it was there; else the seconds until there is one."""
        self._fill(now)
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self.per_second

    def is_full(self, now: float) -> bool:
        """Whether a client that comes now finds the bucket as a new one."""
        self._fill(now)
        return self._tokens >= self.capacity

    def _fill(self, now: float) -> None:
        gained = max(0.0, now - self._at) * self.per_second
        self._tokens = min(float(self.capacity), self._tokens + gained)
        self._at = max(self._at, now)


class RateLimiter:
    """A bucket for each client. Safe to use from many threads.

    Raises:
        ValueError: `capacity` is below 1, or `per_second` is not above 0.
    """

    def __init__(self, capacity: int, per_second: float, clock: Clock = time.monotonic) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: {capacity} is below 1; nobody could make a request")
        if per_second <= 0:
            raise ValueError(f"per_second: {per_second} is not above 0; no token would come back")
        self.capacity = capacity
        self.per_second = per_second
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}
        self._lock = threading.Lock()
        self._sweep_at = clock() + self._time_to_fill

    def wait_for(self, client: str) -> float:
        """Count a request of `client`. 0.0: let it through; else the seconds it has to wait."""
        with self._lock:
            now = self._clock()
            if now >= self._sweep_at:
                self._forget_quiet_clients(now)
            bucket = self._buckets.get(client)
            if bucket is None:
                bucket = self._buckets[client] = TokenBucket(self.capacity, self.per_second, now)
            return bucket.take(now)

    def __len__(self) -> int:
        """How many clients are remembered."""
        with self._lock:
            return len(self._buckets)

    @property
    def _time_to_fill(self) -> float:
        return self.capacity / self.per_second

    def _forget_quiet_clients(self, now: float) -> None:
        self._buckets = {
            client: bucket for client, bucket in self._buckets.items() if not bucket.is_full(now)
        }
        self._sweep_at = now + self._time_to_fill
