"""What a council needs before it begins: its agents, and their context."""

from __future__ import annotations

from workflows.models.agents import Council, CouncilQuery
from workflows.models.base import Model
from workflows.models.context import ContextPack, PackQuery


class GatherInput(Model):
    """A query for a council and its context pack."""

    council: CouncilQuery
    pack: PackQuery


class Gathered(Model):
    """A council, and its context pack as calls pass it on."""

    council: Council
    pack: ContextPack
