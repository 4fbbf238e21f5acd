"""The questions of each act, for agents of any kind: prompt, form of the answer, seed.

A question depends on an activity's input alone, so that the input is enough to parse the answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from temporalio.exceptions import ApplicationError

from activities.agents.additions import addition_to
from activities.agents.llm_errors import LONGEST_MESSAGE
from activities.agents.openai_client import BYTES_PER_TOKEN
from activities.agents.profiles import DEFAULT_PROFILE, ModelProfile
from activities.agents.prompts import SHARED, Prompt, Prompts, Values, cut
from activities.agents.response_schemas import (
    ResponseSchema,
    action_form,
    addition_form,
    critique_form,
    plan_form,
    proposal_form,
    story_form,
    verdict_form,
)
from workflows.models.agents import (
    AgentCall,
    CallUsage,
    CriticiseInput,
    Critique,
    CritiqueAnswer,
    DerivePlanAnswer,
    DerivePlanInput,
    JudgeAnswer,
    JudgeInput,
    Proposal,
    ProposalAnswer,
    ProposeInput,
    ReviseInput,
    WriteStoryAnswer,
    WriteStoryInput,
)
from workflows.models.base import Model
from workflows.models.errors import ErrorType, application_error
from workflows.models.implementation import NextActionAnswer, NextActionInput
from workflows.models.readiness import StoryText
from workflows.rules import transcript

MAX_ATTEMPTS = 3
"""How often an agent is asked: after an unusable answer, it is asked again at most twice."""


ANSWERS: Mapping[str, type[Model]] = {
    "propose": ProposalAnswer,
    "criticise": CritiqueAnswer,
    "revise": ProposalAnswer,
    "judge": JudgeAnswer,
    "derive_plan": DerivePlanAnswer,
    "write_story": WriteStoryAnswer,
    "next_action": NextActionAnswer,
}
"""Act -> the return type of its activity."""

AnswerT = TypeVar(
    "AnswerT",
    ProposalAnswer,
    CritiqueAnswer,
    JudgeAnswer,
    DerivePlanAnswer,
    WriteStoryAnswer,
    NextActionAnswer,
)

TRANSCRIPT_SHARE, OUTLINE_SHARE = 0.65, 0.15
"""Of what the window leaves beside the shared part and the answer; the rest is for fixed words."""


@dataclass(frozen=True)
class AgentRequest(Generic[AnswerT]):
    """One call of one act. `form`: the answer's tokens -> how the answer is written and parsed."""

    act: str
    call: AgentCall
    material: Values
    form: Callable[[int], ResponseSchema]
    answer_type: type[AnswerT]

    def prompt(
        self,
        prompts: Prompts,
        window: int,
        profile: ModelProfile = DEFAULT_PROFILE,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> Prompt:
        """Render the prompt, cut to a model's window in tokens.

        Args:
            prompts: the prompt files.
            window: of the model, in tokens.
            profile: of the model.
            bytes_per_token: the least bytes of a token.

        Raises:
            ApplicationError: as in `Prompts.render`.
        """
        return self._rendered(prompts, self.material, window, profile, bytes_per_token)

    def _rendered(
        self,
        prompts: Prompts,
        material: Values,
        window: int,
        profile: ModelProfile,
        bytes_per_token: float,
    ) -> Prompt:
        call, task = self.call, self.call.task
        last = topic(task.description)
        if profile.brief and task.requirements:
            last += f"\n{_bullets(task.requirements)}"
        return prompts.render(
            self.act,
            shared_values(call, brief=profile.brief),
            {**material, "persona": call.agent.persona, "topic": last},
            window,
            profile,
            bytes_per_token,
        )

    def form_of(self, prompt: Prompt) -> ResponseSchema:
        """Return how the answer to a prompt is written and parsed."""
        return self.form(prompt.max_tokens)

    @property
    def about(self) -> str:
        """What an answer has to be about."""
        return self.call.task.about

    def seed(self, ask: int) -> int:
        """Return the seed of the call's `ask`th ask, counted from 1."""
        call = self.call
        task, agent_id = call.task, call.agent.agent_id
        return call_seed(task.task_id, task.attempt, agent_id, call.wave, ask)

    def answer(self, fields: Mapping[str, Any], usage: CallUsage) -> AnswerT:
        """Build the activity's result from the fields that `Form.read` returned, and the costs."""
        return self.answer_type.model_validate({**fields, "usage": usage})

    def unanswered(self, who: str, problem: str) -> ApplicationError:
        """Return the error of a call whose asks all gave unusable answers."""
        return application_error(
            ErrorType.BAD_ANSWER,
            f"{who} was asked {MAX_ATTEMPTS} times to {self.act.replace('_', ' ')} "
            f"and gave no usable answer; the last: {problem[:LONGEST_MESSAGE]}",
        )


@dataclass(frozen=True)
class ActionRequest(AgentRequest[NextActionAnswer]):
    """The request of a next action: the transcript gets its share of the model's window."""

    request: NextActionInput

    @property
    def about(self) -> str:
        """The goal of the story, if the agent gets it, or its task."""
        return "\n".join(self.request.goal) or super().about

    def prompt(
        self,
        prompts: Prompts,
        window: int,
        profile: ModelProfile = DEFAULT_PROFILE,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> Prompt:
        """Render the prompt, as `AgentRequest.prompt`; for an addition, with the goal only."""
        if profile.brief and (addition := addition_to(self.request)):
            title, *criteria = self.about.split("\n")
            paragraph = {
                **dict.fromkeys([*self.material, "outline", "files", "transcript"], ""),
                "addition": addition.path,
                "persona": "",
                "topic": "\n".join(filter(None, (title, _bullets(criteria)))),
            }
            role = {"role": self.call.task.role}
            shared = dict.fromkeys(SHARED["system"] | SHARED["context"], "") | role
            return prompts.render(self.act, shared, paragraph, window, profile, bytes_per_token)
        room = prompts.own_bytes(self.act, window, profile, bytes_per_token)
        outline = int(room * OUTLINE_SHARE)
        steps = transcript.render(self.request.steps, int(room * TRANSCRIPT_SHARE))
        material = {
            **self.material,
            "outline": cut(self.request.outline.text, outline),
            "files": cut(files_text(self.request), outline),
            "transcript": steps or "none",
            "addition": "",
        }
        return self._rendered(prompts, material, window, profile, bytes_per_token)

    def form_of(self, prompt: Prompt) -> ResponseSchema:
        """Return the form of a paragraph, if the prompt asks for one, or of an action."""
        wanted = super().form_of(prompt)
        addition = addition_to(self.request) if prompt.brief else None
        return addition_form(wanted, addition) if addition else wanted


def propose(request: ProposeInput) -> AgentRequest[ProposalAnswer]:
    return AgentRequest("propose", request, {}, proposal_form, ProposalAnswer)


def criticise(request: CriticiseInput) -> AgentRequest[CritiqueAnswer]:
    material = {"proposal": proposal_text(request.proposal)}
    return AgentRequest("criticise", request, material, critique_form, CritiqueAnswer)


def revise(request: ReviseInput) -> AgentRequest[ProposalAnswer]:
    material = {
        "proposal": proposal_text(request.proposal),
        "critiques": "\n\n".join(critique_text(critique) for critique in request.critiques),
    }
    return AgentRequest("revise", request, material, proposal_form, ProposalAnswer)


def judge(request: JudgeInput) -> AgentRequest[JudgeAnswer]:
    material = {
        "contenders": [
            f"id: {contender.agent_id}\n{proposal_text(contender.proposal)}"
            for contender in request.contenders
        ]
    }
    form = verdict_form([contender.agent_id for contender in request.contenders])
    return AgentRequest("judge", request, material, form, JudgeAnswer)


def derive_plan(request: DerivePlanInput) -> AgentRequest[DerivePlanAnswer]:
    material = {"design": proposal_text(request.design), "roles": ", ".join(request.roles)}
    form = plan_form(request.roles, request.max_tasks)
    return AgentRequest("derive_plan", request, material, form, DerivePlanAnswer)


def write_story(request: WriteStoryInput) -> AgentRequest[WriteStoryAnswer]:
    material = {
        "goal": request.goal,
        "story": story_text(request.story) if request.story else "",
        "findings": _bullets(finding.message for finding in request.findings),
    }
    return AgentRequest("write_story", request, material, story_form, WriteStoryAnswer)


def next_action(request: NextActionInput) -> AgentRequest[NextActionAnswer]:
    material = {
        "commands": "yes" if "run" in request.allowed else "",
        "finishing": "yes" if "finish" in request.allowed else "",
        "paths": "\n".join(request.paths) or "all, except the configuration of CI and git",
        "steps_left": str(request.steps_left),
    }
    form = action_form(request)
    return ActionRequest("next_action", request, material, form, NextActionAnswer, request)


def question(act: str, request: Mapping[str, Any]) -> AgentRequest[Any]:
    """Build the question of an act from its activity's input as JSON."""
    match act:
        case "propose":
            return propose(ProposeInput.model_validate(request))
        case "criticise":
            return criticise(CriticiseInput.model_validate(request))
        case "revise":
            return revise(ReviseInput.model_validate(request))
        case "judge":
            return judge(JudgeInput.model_validate(request))
        case "derive_plan":
            return derive_plan(DerivePlanInput.model_validate(request))
        case "write_story":
            return write_story(WriteStoryInput.model_validate(request))
        case "next_action":
            return next_action(NextActionInput.model_validate(request))
    raise ValueError(f"no act is named {act!r}")


def charged(error: ApplicationError, usage: CallUsage) -> ApplicationError:
    """Return the error with the costs of the failed call, which workflows count."""
    return ApplicationError(
        error.message,
        usage,
        type=error.type,
        non_retryable=error.non_retryable,
        next_retry_delay=error.next_retry_delay,
    )


def call_seed(task_id: str, attempt: int, agent_id: str, wave: int, ask: int) -> int:
    """Return a seed from 0 to 2^31 - 1.

    It differs for each attempt, agent, wave and ask, and is the same when a run is repeated.
    """
    words = f"{task_id}/{attempt}/{agent_id}/{wave}/{ask}"
    digest = hashlib.sha256(words.encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


# --- prompt values ------------------------------------------------------------------------------


def shared_values(call: AgentCall, *, brief: bool = False) -> dict[str, str]:
    """Return the prompt values that all agents of a deliberation get in every act.

    A short task is not among them: a prompt ends with it, and a small model that reads it twice
    writes about the task instead of doing it.

    Args:
        call: of one of the agents.
        brief: whether prompts have no more than they need, and end with the requirements.
    """
    task, pack = call.task, call.pack
    is_short = topic(task.description) == task.description
    return {
        "role": task.role,
        "system": "" if brief else pack.system,
        "context": pack.context,
        "tools": "" if brief else pack.tools,
        "description": "" if brief or is_short else task.description,
        "rubric": "" if brief else task.rubric,
        "requirements": "" if brief else _bullets(task.requirements),
        "feedback": _bullets(task.feedback),
        "late_decisions": _bullets(
            f"WITHDRAWN, it is void: {decision.title}"
            if decision.withdrawn
            else f"{decision.title}: {decision.rationale} ({decision.decided_by})"
            for decision in call.late_decisions
        ),
        "late_milestones": _bullets(
            f"{milestone.event_type}: {milestone.description}" for milestone in call.late_milestones
        ),
    }


SHORT_TASK = 400
"""Characters; a longer task is repeated in short at the end of a prompt."""

_SENTENCE = re.compile(r"\A.*?[.!?](?=\s|\Z)", re.DOTALL)


def topic(description: str) -> str:
    """Return a task in short: the whole, or the first sentence of each of its paragraphs."""
    if len(description) <= SHORT_TASK:
        return description
    paragraphs = (part.strip() for part in description.split("\n\n"))
    return "\n\n".join(
        found[0] if (found := _SENTENCE.match(part)) else part for part in paragraphs if part
    )


def proposal_text(proposal: Proposal) -> str:
    decisions = _bullets(
        f"{decision.title}: {decision.rationale}"
        + (f" (affects {', '.join(decision.affects)})" if decision.affects else "")
        for decision in proposal.decisions
    )
    approach = "" if proposal.content.startswith(proposal.approach) else proposal.approach
    parts = (approach, proposal.content, decisions and f"Decisions:\n{decisions}")
    return "\n\n".join(part for part in parts if part)


def story_text(story: StoryText) -> str:
    criteria = _bullets(story.acceptance_criteria)
    return f"Title: {story.title}\n\n{story.brief}\n\nAcceptance criteria:\n{criteria}"


def critique_text(critique: Critique) -> str:
    points = _bullets(f"{point.severity}: {point.text}" for point in critique.points)
    parts = (
        points,
        critique.suggestion and f"Suggestion: {critique.suggestion}",
        f"Verdict: {critique.verdict}",
    )
    return "\n\n".join(part for part in parts if part)


def files_text(request: NextActionInput) -> str:
    return "\n".join(f"{file.path}:\n{file.text}" for file in request.outline.files)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
