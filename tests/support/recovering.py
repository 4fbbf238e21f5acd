"""A sandbox in which a service that tests need is away at first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from activities.checks.sandbox import Mount, Run, Sandbox


class Recovering(Sandbox):
    """The service is a file; it is there after the first runs of tests.

    Attributes:
        test_runs: how often tests were run.
    """

    def __init__(self, away: int = 1) -> None:
        """Set how many runs the service is away for."""
        super().__init__()
        self._away = away
        self.test_runs = 0

    async def run(self, argv: Sequence[str], *args: Any, **options: Any) -> Run:
        self.test_runs += "pytest" in argv[-1]
        mounts: Sequence[Mount] = options["mounts"]
        if self.test_runs > self._away:
            (mounts[0].outside / "service").write_text("up")
        return await super().run(argv, *args, **options)
