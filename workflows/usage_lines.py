"""What calls used, by phase, role and model. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from workflows.models.agents import CallUsage, UsageLine


def summed(phase: str, calls: Iterable[CallUsage]) -> list[UsageLine]:
    """Return what calls of a phase used, one line for each role and model."""
    return merged(
        UsageLine(
            phase=phase,
            role=call.role,
            model=call.model,
            calls=call.calls,
            tokens_in=call.tokens_in,
            tokens_out=call.tokens_out,
            cached_tokens=call.cached_tokens,
            seconds=call.latency_ms / 1000,
            estimated=call.estimated,
        )
        for call in calls
    )


def merged(lines: Iterable[UsageLine]) -> list[UsageLine]:
    """Return one line for each phase, role and model."""
    by_kind: dict[tuple[str, str, str], UsageLine] = {}
    for line in lines:
        kind = (line.phase, line.role, line.model)
        by_kind[kind] = added(by_kind[kind], line) if kind in by_kind else line
    return [by_kind[kind] for kind in sorted(by_kind)]


def added(one: UsageLine, other: UsageLine) -> UsageLine:
    """Return the sum of two lines of one kind."""
    return one.model_copy(
        update={
            field: round(getattr(one, field) + getattr(other, field), 3)
            for field in ("calls", "tokens_in", "tokens_out", "cached_tokens", "seconds")
        }
        | {"estimated": one.estimated or other.estimated}
    )
