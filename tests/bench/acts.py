"""A workflow for acts that no deliberation has: one agent criticises a proposal or splits a design.

It calls the fleet's activities as the fleet's workflows do, with a council's first agent.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from temporalio import workflow

from workflows.models.agents import (
    CallUsage,
    CouncilQuery,
    CriticiseInput,
    CritiqueAnswer,
    DerivePlanAnswer,
    DerivePlanInput,
    Proposal,
    Task,
)
from workflows.models.base import Model
from workflows.models.context import PackQuery
from workflows.stubs import STORE, AgentStub, GraphStub, agent_call

QUEUE = "bench-acts"


class ActInput(Model):
    """The act, its task, and the proposal that is criticised or the design that is split."""

    act: Literal["criticise", "derive_plan"]
    task: Task
    material: Proposal


class ActAnswer(Model):
    """The text that the agent wrote, and its cost."""

    text: str
    usage: CallUsage


@workflow.defn
class ActWorkflow:
    """A workflow that asks a council's first agent once."""

    @workflow.run
    async def run(self, input: ActInput) -> ActAnswer:
        task = input.task
        council, pack = await asyncio.gather(
            workflow.execute_activity_method(
                GraphStub.load_council, CouncilQuery(role=task.role, size=1), **STORE
            ),
            workflow.execute_activity_method(
                GraphStub.build_pack,
                PackQuery(story_id="", role=task.role, phase=task.phase),
                **STORE,
            ),
        )
        agent = council.agents[0]
        call: dict[str, Any] = {"task": task, "agent": agent, "pack": pack, "wave": 1}
        if input.act == "criticise":
            critique = await workflow.execute_activity_method(
                AgentStub.criticise,
                CriticiseInput(**call, author_id="another", proposal=input.material),
                **agent_call(agent),
            )
            return ActAnswer(text=critique_text(critique), usage=critique.usage)
        plan = await workflow.execute_activity_method(
            AgentStub.derive_plan,
            DerivePlanInput(**call, design=input.material, roles=council.roles),
            **agent_call(agent),
        )
        return ActAnswer(text=plan_text(plan), usage=plan.usage)


def critique_text(answer: CritiqueAnswer) -> str:
    critique = answer.critique
    points = [f"- {point.severity}: {point.text}" for point in critique.points]
    return "\n".join([f"Verdict: {critique.verdict}", *points, "", critique.suggestion])


def plan_text(answer: DerivePlanAnswer) -> str:
    return "\n\n".join(
        f"{number}. {task.role}: {task.title}\n   {' '.join(task.description.split())}"
        for number, task in enumerate(answer.tasks, 1)
    )
