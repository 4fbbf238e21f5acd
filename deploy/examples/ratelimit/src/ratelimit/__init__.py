"""Limits how many requests a client may make, so that none starves the others."""

from ratelimit.bucket import RateLimiter, TokenBucket
from ratelimit.middleware import limited

__all__ = ["RateLimiter", "TokenBucket", "limited"]
