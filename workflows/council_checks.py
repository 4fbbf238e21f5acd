"""The check of a council's proposals: all of them in one activity, or each in a separate one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from workflows.gathering import FEWER_STEPS
from workflows.stubs import CHECK, CHECK_TOGETHER, CheckStub

with workflow.unsafe.imports_passed_through():
    from workflows.models.deliberation import CheckInput, CheckReport, CouncilCheckInput

if TYPE_CHECKING:
    from workflows.deliberation import DeliberationWorkflow, Participant


class CouncilChecks:
    """The reports on the proposals of a deliberation."""

    def __init__(self, council: DeliberationWorkflow) -> None:
        self.council = council

    async def together(self) -> dict[str, CheckReport]:
        """Check all proposals at once, and return their reports by agent.

        Empty if the check fails for good: one of the proposals may be the cause.
        """
        council = self.council
        if not council.fewer_events and not workflow.patched(FEWER_STEPS):
            return {}
        proposals = {seat.agent.agent_id: seat.proposal for seat in council.seats}
        summary = f"check {len(proposals)} proposals"
        try:
            report = await workflow.execute_activity_method(
                CheckStub.check_council,
                CouncilCheckInput(
                    proposals=proposals,
                    task=council.task.description,
                    about=council.task.about,
                ),
                **(CHECK_TOGETHER | {"summary": summary, "priority": council.priority()}),
            )
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            return {}
        return {agent_id: report.of(agent_id) for agent_id in proposals}

    async def alone(self, seat: Participant) -> CheckReport:
        """Check one proposal.

        Raises:
            ActivityError: the check fails for good.
        """
        council, agent_id = self.council, seat.agent.agent_id
        task = council.task
        return await workflow.execute_activity_method(
            CheckStub.check_proposal,
            CheckInput(
                agent_id=agent_id,
                proposal=seat.proposal,
                task=task.description,
                about=task.about,
            ),
            **(CHECK | {"summary": f"check {agent_id}", "priority": council.priority()}),
        )
