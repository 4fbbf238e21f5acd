"""A council and its context pack, in one activity."""

from __future__ import annotations

import asyncio

from temporalio import workflow

from workflows.kept_packs import kept_pack
from workflows.stubs import STORE, GraphStub

FEWER_STEPS = "council-in-fewer-steps"
"""The patch of deliberations that gather, check and announce in fewer steps."""

with workflow.unsafe.imports_passed_through():
    from workflows.models.agents import CouncilQuery
    from workflows.models.context import PackQuery
    from workflows.models.gathering import Gathered, GatherInput


async def gather(council: CouncilQuery, pack: PackQuery, at_once: bool) -> Gathered:
    """Load a council, and let Valkey keep its context pack.

    Args:
        council: the council.
        pack: the context pack.
        at_once: whether one activity does both; else it depends on a patch.

    Raises:
        ActivityError: `UnknownCouncil`, `CouncilTooSmall`, `InvalidAgent`, `MockAgent` or
            `GraphLost`.
    """
    if at_once or workflow.patched(FEWER_STEPS):
        return await workflow.execute_activity_method(
            GraphStub.gather,
            GatherInput(council=council, pack=pack),
            **(STORE | {"summary": f"council {council.role}, context pack {pack.phase}"}),
        )
    loading = workflow.execute_activity_method(
        GraphStub.load_council, council, **(STORE | {"summary": f"council {council.role}"})
    )
    found, kept = await asyncio.gather(loading, kept_pack(pack))
    return Gathered(council=found, pack=kept)
