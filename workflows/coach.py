"""CoachWorkflow: an agent writes or improves a story, and the Definition of Ready scores it.

council -> write -> score -> write again with the findings if the score is too low. The result never
scores lower than the original.
"""

from __future__ import annotations

from collections.abc import Sequence

from temporalio import workflow

from workflows.search_attributes import STORY_ROLE
from workflows.stubs import (
    READ_CONFIG,
    STORE,
    AgentStub,
    GraphStub,
    PlanningStub,
    agent_call,
    fair_priority,
)

with workflow.unsafe.imports_passed_through():
    from workflows.call_costs import cancelled_as_such
    from workflows.models.agents import (
        Agent,
        CallUsage,
        CouncilQuery,
        Task,
        WriteStoryAnswer,
        WriteStoryInput,
    )
    from workflows.models.coach import CoachInput, CoachResult
    from workflows.models.context import ContextPack
    from workflows.models.readiness import Readiness, StoryText

ROLE = "ARCHITECT"
"""The council whose first agent writes: the one that has to design what the story asks for."""

MAX_ATTEMPTS = 2
BEST = 100

TASK = "Write a user story that meets the Definition of Ready."
RUBRIC = (
    "INVEST: independent, negotiable, valuable, estimable, small, testable. "
    "Each acceptance criterion can be verified by a test."
)

Scored = tuple[StoryText, Readiness]


@workflow.defn
class CoachWorkflow:
    """A story for a goal, or a better version of a story; ends with the one to use."""

    @workflow.init
    def __init__(self, input: CoachInput) -> None:
        self.input = input
        self.usage: list[CallUsage] = []

    @workflow.run
    async def run(self, input: CoachInput) -> CoachResult:
        """Write, score, choose. Fails if the agent's call fails: there is no fallback."""
        workflow.upsert_search_attributes([STORY_ROLE.value_set(ROLE)])
        original = None
        if input.story is not None:
            original = (input.story, await self.score(input.story))
        agent = await self.seat()
        wanted = original[1].total if original else BEST
        written: list[Scored] = []
        for ask in range(1, MAX_ATTEMPTS + 1):
            answer = await self.write(agent, ask, written[-1] if written else original)
            written.append((answer.story, await self.score(answer.story)))
            if written[-1][1].total >= wanted:
                break
        return choose(original, written).model_copy(update={"usage": self.usage})

    async def seat(self) -> Agent:
        council = await workflow.execute_activity_method(
            GraphStub.load_council,
            CouncilQuery(role=ROLE, size=1),
            **(STORE | {"summary": f"who writes: the first of council {ROLE}"}),
        )
        return council.agents[0]

    async def write(self, agent: Agent, ask: int, before: Scored | None) -> WriteStoryAnswer:
        """Ask the agent for a story. `before`: the version to improve, with its findings."""
        with cancelled_as_such():
            answer = await workflow.execute_activity_method(
                AgentStub.write_story,
                WriteStoryInput(
                    task=Task(
                        task_id=workflow.info().workflow_id,
                        role=agent.role,
                        description=TASK,
                        rubric=RUBRIC,
                        actor=self.input.actor,
                    ),
                    agent=agent,
                    pack=ContextPack(),
                    wave=ask,
                    goal=self.input.goal,
                    story=before[0] if before else None,
                    findings=before[1].findings if before else [],
                ),
                **(
                    agent_call(agent)
                    | {
                        "summary": f"{agent.agent_id} writes the story",
                        "priority": fair_priority(self.input.actor or workflow.info().workflow_id),
                    }
                ),
            )
        self.usage.append(answer.usage)
        return answer

    async def score(self, text: StoryText) -> Readiness:
        return await workflow.execute_activity_method(
            PlanningStub.score_story,
            text,
            **(READ_CONFIG | {"summary": "score against INVEST and the acceptance criteria"}),
        )


def choose(original: Scored | None, written: Sequence[Scored]) -> CoachResult:
    """Return the best written story (the first of equals), or the original if it scores higher."""
    story, readiness = max(written, key=lambda scored: scored[1].total)
    if original is None:
        return CoachResult(story=story, readiness=readiness)
    before = original[1]
    if readiness.total >= before.total:
        return CoachResult(story=story, readiness=readiness, original=before)
    lost = ", ".join(finding.code for finding in readiness.findings)
    return CoachResult(
        story=original[0],
        readiness=before,
        original=before,
        reason=f"the original comes back: it scores {before.total}, and the best of "
        f"{len(written)} refinements {readiness.total} ({lost})",
    )
