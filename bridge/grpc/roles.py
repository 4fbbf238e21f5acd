"""The roles that each method of the five services needs: the only list of them.

`AuthInterceptor` checks them before a method runs, so a call that is refused has read and stored
nothing. `checks` says what the method itself checks in addition, because it depends on the request.
docs/grpc.md shows this table.
"""

from __future__ import annotations

from typing import NamedTuple

from temporalio.client import Client

from activities.tokens import Caller
from bridge.executions import find_execution
from workflows.models.errors import ErrorType, application_error
from workflows.models.ids import story_workflow_id

PO = "PO"
OPERATOR = "OPERATOR"

STARTERS = (PO, OPERATOR, "DEV")
"""Roles that start stories, and work of agents."""

COUNCIL_ROLES = (OPERATOR, PO)
"""Roles that change councils, and let agents work on a story that has a workflow."""

WRITERS = ("DEV", "QA", "ARCHITECT", "DEVOPS", "DATA", PO, OPERATOR)
"""Roles that write decisions, milestones, subtasks and draft plans in their own name."""


class Needed(NamedTuple):
    """What a method needs.

    Attributes:
        roles: one of these; empty: any token will do.
        checks: what the method itself checks, by its request.
    """

    roles: tuple[str, ...] = ()
    checks: str = ""


ANY = Needed()

METHODS: dict[str, Needed] = {
    "/fleet.planning.v1.PlanningService/CreateStory": Needed(STARTERS),
    "/fleet.planning.v1.PlanningService/ListStories": ANY,
    "/fleet.planning.v1.PlanningService/GetStory": ANY,
    "/fleet.planning.v1.PlanningService/Transition": Needed(checks="the gate's own role"),
    "/fleet.planning.v1.PlanningService/GetPlan": ANY,
    "/fleet.storycoach.v1.StoryCoachService/ScoreStory": ANY,
    "/fleet.storycoach.v1.StoryCoachService/RefineStory": Needed(STARTERS),
    "/fleet.storycoach.v1.StoryCoachService/SuggestStory": Needed(STARTERS),
    "/fleet.workspace.v1.WorkspaceService/ScoreWorkspace": ANY,
    "/fleet.context.v1.ContextService/GetContext": ANY,
    "/fleet.context.v1.ContextService/UpdateContext": Needed(
        checks="decisions, milestones, subtasks and draft plans: "
        + " or ".join(WRITERS)
        + "; these in another's name (sent or stored), and a case without a workflow: OPERATOR; a "
        "plan that is not DRAFT (sent or stored) or has a version, and deletes: PO; the text of a "
        "story with a workflow: no one",
    ),
    "/fleet.context.v1.ContextService/RehydrateSession": ANY,
    "/fleet.context.v1.ContextService/ValidateScope": ANY,
    "/fleet.context.v1.ContextService/InitializeProjectContext": Needed((PO,)),
    "/fleet.context.v1.ContextService/CreateStory": Needed((PO,)),
    "/fleet.context.v1.ContextService/CreateTask": Needed(WRITERS),
    "/fleet.context.v1.ContextService/AddProjectDecision": Needed(
        WRITERS, "another's name (`decided_by`): OPERATOR"
    ),
    "/fleet.context.v1.ContextService/TransitionPhase": Needed(
        (PO,), "a story with a workflow: the gate's own role too"
    ),
    "/fleet.context.v1.ContextService/GetGraphRelationships": ANY,
    "/orchestrator.v1.OrchestratorService/Deliberate": Needed(STARTERS),
    "/orchestrator.v1.OrchestratorService/Orchestrate": Needed(
        STARTERS, "a story with a workflow: OPERATOR or PO"
    ),
    "/orchestrator.v1.OrchestratorService/StreamDeliberation": Needed(STARTERS),
    "/orchestrator.v1.OrchestratorService/GetDeliberationResult": ANY,
    "/orchestrator.v1.OrchestratorService/RegisterAgent": Needed(COUNCIL_ROLES),
    "/orchestrator.v1.OrchestratorService/CreateCouncil": Needed(COUNCIL_ROLES),
    "/orchestrator.v1.OrchestratorService/ListCouncils": ANY,
    "/orchestrator.v1.OrchestratorService/UnregisterAgent": Needed(COUNCIL_ROLES),
    "/orchestrator.v1.OrchestratorService/ProcessPlanningEvent": Needed(
        checks="a move of a story: the gate's own role; an approved plan, or a move of a case "
        "without a workflow: PO; a new case: PO or OPERATOR or DEV",
    ),
    "/orchestrator.v1.OrchestratorService/DeriveSubtasks": Needed(
        STARTERS, "a story with a workflow: OPERATOR or PO"
    ),
    "/orchestrator.v1.OrchestratorService/GetTaskContext": ANY,
    "/orchestrator.v1.OrchestratorService/GetStatus": ANY,
    "/orchestrator.v1.OrchestratorService/GetMetrics": ANY,
}
"""Full name of a method -> what it needs."""


def require_method_role(caller: Caller, method: str) -> None:
    """Refuse a call for which the caller's token has no role.

    Raises:
        ApplicationError: `Permission` names the roles.
        KeyError: the method is not in METHODS, so no one may call it.
    """
    if roles := METHODS[method].roles:
        caller.require_role(*roles)


async def require_story_role(temporal: Client, caller: Caller, story_id: str) -> None:
    """Refuse agents' work in the name of a story that has a workflow, which directs its own agents.

    Args:
        temporal: finds the story's workflow, running or ended.
        caller: needs one of COUNCIL_ROLES.
        story_id: the story; empty: none, which needs no role.

    Raises:
        ApplicationError: `Permission` names the roles.
        RPCError: Temporal does not answer.
    """
    if not story_id or caller.roles.intersection(COUNCIL_ROLES):
        return
    if await find_execution(temporal, story_workflow_id(story_id)):
        has = ", ".join(sorted(caller.roles)) or "none"
        raise application_error(
            ErrorType.PERMISSION,
            f"story {story_id} has a workflow: to let agents work on it needs the role "
            f"{' or '.join(COUNCIL_ROLES)}; the token of {caller.actor} has {has}. Leave the story "
            "out, or use one without a workflow",
        )
