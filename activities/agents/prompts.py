"""Prompts: a file per act, rendered so that a council shares one prefill and every prompt fits.

A prompt has two messages. The system message holds what all agents of a deliberation share, with
the same bytes in every act, so that vLLM's prefix cache computes it once. The user message has the
act and its material, and ends with the task's own words (docs/design/0018-prompt-layout.md). Texts
of people and models are fenced by `| data` and cannot close their fence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationError

from activities.agents.openai_client import BYTES_PER_TOKEN, Message
from activities.config import InvalidConfig, parse_yaml, read_text
from activities.redaction import Redact, load_redaction
from workflows.models.base import Section, content_hash
from workflows.models.errors import ErrorType, application_error

if TYPE_CHECKING:  # profiles are checked against the acts of this module
    from activities.agents.profiles import ModelProfile

Values = Mapping[str, str | Sequence[str]]
"""A template's variables: texts, which are cut if the prompt would not fit otherwise."""

SHARED = {
    "system": {"role", "rules", "system"},
    "context": {
        *("context", "tools", "description", "rubric"),
        *("requirements", "feedback", "late_decisions", "late_milestones"),
    },
}
ACTS = {
    "propose": {"examples", "persona", "topic"},
    "criticise": {"examples", "proposal", "persona", "topic"},
    "revise": {"examples", "proposal", "critiques", "persona", "topic"},
    "judge": {"contenders", "persona", "topic"},
    "derive_plan": {"examples", "design", "roles", "persona", "topic"},
    "write_story": {"examples", "goal", "story", "findings", "persona"},
    "next_action": {
        *("commands", "finishing", "paths", "outline", "files", "transcript", "steps_left"),
        *("addition", "persona", "topic"),
    },
}
FOLLOWING = {
    "again": {"problem"},
    "another": {"problem"},
    "decide": {"sentences"},
    "rate": {"points"},
}
"""File name -> the variables that the file must use, all of them."""

_GAP = "\n\n"
_RESERVE = 6
"""A sixth of the window is kept for the answer to a following question, and for asking again."""

FOLLOWING_TOKENS = 64
"""Tokens of the answer to a following question: a few numbers and names."""

WARMER = 0.2
HOTTEST = 1.0
"""A refused answer is asked for again at a temperature higher by this, up to the hottest.

A model that copies or loops at a low temperature does the same again with another seed. The steps
are those of Whisper's temperature fallback (Radford et al., Robust Speech Recognition via
Large-Scale Weak Supervision, 2022, section 4.5, https://arxiv.org/abs/2212.04356).
"""

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n(.*)\Z", re.DOTALL)
_FENCE = re.compile(r"<(?=/?data\b|\|\w+\|>)", re.IGNORECASE)
"""The start of one of our fences, or of a control token of a chat template such as `<|im_end|>`."""


class InvalidPrompt(ValueError):
    """A missing or invalid prompt file; the message has its name and the reason."""


class WritingSettings(Section):
    """An act's front matter. `max_tokens`: of the answer, if the model's window allows it."""

    temperature: float = Field(ge=0, le=2)
    max_tokens: int = Field(ge=64)


@dataclass(frozen=True)
class Prompt:
    """The request of one call. `max_tokens`: of the answer; `window`: of the model, in tokens.

    `thinking_tokens`: what the model may write before its answer. `sampling`: further fields of the
    request. `brief`: see ModelProfile.
    """

    messages: list[Message]
    temperature: float
    max_tokens: int
    window: int
    thinking_tokens: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    brief: bool = False

    @property
    def hash(self) -> str:
        return content_hash(self.messages)


@dataclass(frozen=True)
class _Sizes:
    """The parts of a model's window, in tokens; the prompt's include the shared ones."""

    window: int
    shared: int
    prompt: int
    answer: int
    thoughts: int


@dataclass(frozen=True)
class Prompts:
    """The prompt files, loaded and checked."""

    templates: dict[str, Template]
    settings: dict[str, WritingSettings]
    redact: Redact
    instructions: dict[str, str]
    """Act -> the fixed words of its prompt, with and without what is optional."""

    @classmethod
    def load(cls, folder: Path, redact: Redact | None = None) -> Prompts:
        """Read `{name}.md` for every act and shared part.

        Args:
            folder: the folder of the prompt files.
            redact: removes secrets from every value; None: by the default policy.

        Raises:
            InvalidPrompt: a file is missing, its front matter is wrong, or it does not use
                exactly the variables that its act has.
        """
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters["data"] = _fenced
        templates, settings, instructions = {}, {}, {}
        for name, variables in (SHARED | ACTS | FOLLOWING).items():
            path = folder / f"{name}.md"
            try:
                text = read_text(path)
                if name in ACTS:
                    settings[name], text = _front_matter(path, text)
                used = meta.find_undeclared_variables(environment.parse(text))
                if used != variables:
                    raise InvalidPrompt(_misuse(used, variables))
                templates[name] = environment.from_string(text)
                instructions[name] = "\n".join(
                    templates[name].render(dict.fromkeys(variables, value)) for value in ("x", "")
                )
            except InvalidConfig as error:
                raise InvalidPrompt(str(error)) from error
            except (TemplateError, ValueError, TypeError) as error:
                raise InvalidPrompt(f"{path}: {error}") from error
        return cls(templates, settings, redact or load_redaction(), instructions)

    def own_bytes(
        self, act: str, window: int, profile: ModelProfile, bytes_per_token: float
    ) -> int:
        """Return the bytes that the act's own part has at least, beside the longest shared part.

        Args:
            act: its prompt file.
            window: of the model, in tokens.
            profile: of the model.
            bytes_per_token: of the prompt.
        """
        sizes = self._sizes(act, window, profile)
        return int((sizes.prompt - sizes.shared) * bytes_per_token)

    def _sizes(self, act: str, window: int, profile: ModelProfile) -> _Sizes:
        window = min(window, profile.window or window)
        answer = min(
            self.settings[act].max_tokens, profile.max_tokens.get(act, window), window // 5
        )
        thoughts = min(profile.thinking_tokens, window // 8)
        prompt = window - answer - thoughts - window // _RESERVE
        return _Sizes(window, window * 2 // 5, prompt, answer, thoughts)

    def render(
        self,
        act: str,
        shared: Values,
        material: Values,
        window: int,
        profile: ModelProfile,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> Prompt:
        """Render the messages of one call, so that prompt, answer and a repeated ask fit `window`.

        The shared part gets at most two fifths of the window, regardless of the act, so that it is
        the same in all acts; the answer gets a fifth, thoughts an eighth, and a sixth is
        reserved for a following question or for asking again.

        Args:
            act: the act.
            shared: what all agents of the deliberation get, without what follows from the profile.
            material: the variables of the act's file, likewise.
            window: of the model, in tokens.
            profile: of the model.
            bytes_per_token: the least bytes of a token.

        Raises:
            ApplicationError: `PromptTooLong`, if not even the fixed text of the files fits.
        """
        sizes = self._sizes(act, window, profile)
        shared_bytes = int(sizes.shared * bytes_per_token)
        rules = {"rules": "" if profile.brief else "shown"}
        system = _GAP.join(self._fit(tuple(SHARED), {**shared, **rules}, shared_bytes)).strip()
        left = int(sizes.prompt * bytes_per_token) - len((system + _GAP).encode())
        (task,) = self._fit((act,), self._with_profile(act, material, profile), left)
        return Prompt(
            messages=[
                {"role": "system", "content": system},
                {"role": "user", "content": task},
            ],
            temperature=profile.temperature.get(act, self.settings[act].temperature),
            max_tokens=sizes.answer,
            window=sizes.window,
            thinking_tokens=sizes.thoughts,
            sampling=profile.sampling,
            brief=profile.brief,
        )

    def _with_profile(self, act: str, material: Values, profile: ModelProfile) -> Values:
        """Add the variables of an act's file that depend on the model."""
        values = {
            **material,
            "examples": "" if profile.brief else "shown",
            "persona": "" if profile.brief else material["persona"],
        }
        return {name: value for name, value in values.items() if name in ACTS[act]}

    def follow(self, prompt: Prompt, answer: str, act: str, material: Values) -> Prompt:
        """Return the prompt of a question about an answer, which shares all of its prefix.

        Args:
            prompt: that of the answer.
            answer: what the model wrote.
            act: the file of the question.
            material: the file's variables.
        """
        size = int((prompt.window // _RESERVE - FOLLOWING_TOKENS) * BYTES_PER_TOKEN)
        (request,) = self._fit((act,), material, size)
        more: list[Message] = [
            {"role": "assistant", "content": self.redact(answer)},
            {"role": "user", "content": request},
        ]
        return replace(
            prompt,
            messages=prompt.messages + more,
            temperature=0.0,
            max_tokens=FOLLOWING_TOKENS,
        )

    def ask_for_another(self, prompt: Prompt, problem: str, ask: int) -> Prompt:
        """Return the prompt preceded by the problem of an unusable text, unless it is brief.

        The text itself is left out: a model that loops or strays would continue it. A small model
        writes about the problem, so it is only asked for another sample.

        Args:
            prompt: of the first ask.
            problem: of the latest answer.
            ask: number of the ask that the prompt is for, from 2.
        """
        temperature = warmer(prompt.temperature, ask)
        if prompt.brief:
            return replace(prompt, temperature=temperature)
        system, asked = prompt.messages
        size = int(prompt.window // _RESERVE * BYTES_PER_TOKEN)
        (problem,) = self._fit(("another",), {"problem": problem}, size - len(_GAP))
        content = problem + _GAP + asked["content"]
        return replace(
            prompt,
            messages=[system, {"role": "user", "content": content}],
            temperature=temperature,
        )

    def ask_again(self, prompt: Prompt, answer: str, problem: str, ask: int) -> Prompt:
        """Return the prompt extended by the unusable document and its problem.

        Args:
            prompt: of the first ask.
            answer: the unusable document.
            problem: of that document.
            ask: number of the ask that the prompt is for, from 2.
        """
        size = int(prompt.window // _RESERVE * BYTES_PER_TOKEN)
        (request,) = self._fit(("again",), {"problem": problem}, size // 2)
        more: list[Message] = [
            {
                "role": "assistant",
                "content": cut(self.redact(answer), size - len(request.encode())),
            },
            {"role": "user", "content": request},
        ]
        return replace(
            prompt,
            messages=prompt.messages + more,
            temperature=warmer(prompt.temperature, ask),
        )

    def _fit(self, names: Sequence[str], values: Values, size: int) -> list[str]:
        """Render the templates to at most `size` bytes; cut long values, keep short ones whole."""
        # Secrets are removed before cutting, because no rule detects half of a secret.
        texts = {name: _each(value, self._safe) for name, value in values.items()}
        lengths = [len(text.encode()) for value in texts.values() for text in _flat(value)]
        words = self._render(names, {name: _each(text, _trace) for name, text in texts.items()})
        room = size - len("".join(words).encode())
        if room < 0:
            raise application_error(
                ErrorType.PROMPT_TOO_LONG,
                f"The model's window leaves {size} bytes for the prompt's part "
                f"{'+'.join(names)}, whose own words need {size - room}; "
                "serve a model with a longer window or shorten the prompt file",
            )
        cap = fair_cap(lengths, room)
        return self._render(
            names,
            {name: _each(text, lambda text: cut(text, cap)) for name, text in texts.items()},
        )

    def _safe(self, text: str) -> str:
        return _unfenced(self.redact(text))

    def _render(self, names: Sequence[str], values: Values) -> list[str]:
        return [self.templates[name].render(values).strip() for name in names]


def warmer(temperature: float, ask: int) -> float:
    """Return the temperature of an ask, counted from 1, whose first has `temperature`."""
    return round(max(temperature, min(temperature + WARMER * (ask - 1), HOTTEST)), 2)


def fair_cap(lengths: Sequence[int], room: int) -> int:
    """Return the largest cap with `sum(min(length, cap)) <= room`; short texts stay whole."""
    for place, length in enumerate(sorted(lengths)):
        sharing = len(lengths) - place
        if length * sharing > room:
            return room // sharing
        room -= length
    return max(lengths, default=0)


def cut(text: str, size: int) -> str:
    """Cut `text` to `size` UTF-8 bytes: head, a note of how much is left out, and tail."""
    encoded = text.encode()
    if len(encoded) <= size:
        return text
    marker = f"\n[... {len(encoded) - size} bytes or more left out ...]\n"
    room = size - len(marker)
    if room < len(marker):
        return encoded[: max(size, 0)].decode(errors="ignore")
    head, tail = room - room // 3, room // 3
    return (
        encoded[:head].decode(errors="ignore")
        + marker
        + encoded[len(encoded) - tail :].decode(errors="ignore")
    )


def _front_matter(path: Path, text: str) -> tuple[WritingSettings, str]:
    found = _FRONT_MATTER.match(text)
    if not found:
        raise InvalidPrompt("begins with no front matter; give temperature and max_tokens in ---")
    try:
        return WritingSettings.model_validate(parse_yaml(path, found[1])), found[2]
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise InvalidPrompt(f"front matter: {field or 'the whole'}: {problem['msg']}") from error


def _misuse(used: set[str], variables: set[str]) -> str:
    unknown, missing = sorted(used - variables), sorted(variables - used)
    return "; ".join(
        [
            *([f"unknown variables: {', '.join(unknown)}"] if unknown else []),
            *([f"must use the variables: {', '.join(missing)}"] if missing else []),
        ]
    )


def _fenced(text: str) -> str:
    return f"<data>\n{text}\n</data>"


def _unfenced(text: str) -> str:
    """Escape everything in the text that looks like a fence or the end of its message."""
    return _FENCE.sub(r"<\\", text)


def _trace(text: str) -> str:
    """Return one byte for a text that is not empty, so that the words around it are counted."""
    return "x" if text else ""


def _each(value: str | Sequence[str], change: Callable[[str], str]) -> str | list[str]:
    return change(value) if isinstance(value, str) else [change(text) for text in value]


def _flat(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value
