"""Prompts: a file per act, rendered so that a council shares one prefill and every prompt fits.

A prompt has two messages. The system message and the start of the user message hold the part that
all agents of a deliberation share, with the same bytes in every act. The act and its material
follow, the persona last, so that vLLM's prefix cache computes the shared part once. Texts of people
and models are fenced by `| data` and cannot close their fence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationError

from activities.agents.openai_client import BYTES_PER_TOKEN, Message
from activities.config import InvalidConfig, parse_yaml, read_text
from activities.redaction import Redact, load_redaction
from workflows.models.base import Section, content_hash
from workflows.models.errors import ErrorType, application_error

Values = Mapping[str, str | Sequence[str]]
"""A template's variables: texts, which are cut if the prompt would not fit otherwise."""

SHARED = {
    "system": {"role", "system"},
    "context": {
        *("context", "tools", "description", "rubric"),
        *("requirements", "feedback", "late_decisions", "late_milestones"),
    },
}
ACTS = {
    "propose": {"persona"},
    "criticise": {"proposal", "persona"},
    "revise": {"proposal", "critiques", "persona"},
    "judge": {"contenders", "persona"},
    "derive_plan": {"design", "roles", "persona"},
    "write_story": {"goal", "story", "findings", "persona"},
    "next_action": {
        *("commands", "finishing", "paths", "outline", "files", "transcript", "steps_left"),
        "persona",
    },
}
ASK_AGAIN = {"again": {"problem"}}
"""File name -> the variables that the file must use, all of them."""

_GAP = "\n\n"
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
    """The request of one call. `max_tokens`: of the answer; `window`: of the model, in tokens."""

    messages: list[Message]
    temperature: float
    max_tokens: int
    window: int

    @property
    def hash(self) -> str:
        return content_hash(self.messages)


@dataclass(frozen=True)
class Prompts:
    """The prompt files, loaded and checked."""

    templates: dict[str, Template]
    settings: dict[str, WritingSettings]
    redact: Redact

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
        templates, settings = {}, {}
        for name, variables in (SHARED | ACTS | ASK_AGAIN).items():
            path = folder / f"{name}.md"
            try:
                text = read_text(path)
                if name in ACTS:
                    settings[name], text = _front_matter(path, text)
                used = meta.find_undeclared_variables(environment.parse(text))
                if used != variables:
                    raise InvalidPrompt(_misuse(used, variables))
                templates[name] = environment.from_string(text)
                templates[name].render(dict.fromkeys(variables, "x"))
            except InvalidConfig as error:
                raise InvalidPrompt(str(error)) from error
            except (TemplateError, ValueError, TypeError) as error:
                raise InvalidPrompt(f"{path}: {error}") from error
        return cls(templates, settings, redact or load_redaction())

    def own_bytes(self, act: str, window: int, bytes_per_token: float) -> int:
        """Return the bytes that the act's own part has at least, beside the longest shared part.

        Args:
            act: its prompt file.
            window: of the model, in tokens.
            bytes_per_token: of the prompt.
        """
        answer = min(self.settings[act].max_tokens, window // 5)
        return int((window - answer - window // 10 - window * 2 // 5) * bytes_per_token)

    def render(
        self,
        act: str,
        shared: Values,
        material: Values,
        window: int,
        bytes_per_token: float = BYTES_PER_TOKEN,
    ) -> Prompt:
        """Render the messages of one call, so that prompt, answer and a repeated ask fit `window`.

        The shared part gets at most two fifths of the window, regardless of the act, so that it is
        the same in all acts; the answer gets a fifth, and a tenth is reserved for asking again.

        Raises:
            ApplicationError: `PromptTooLong`, if not even the fixed text of the files fits.
        """
        settings = self.settings[act]
        max_tokens = min(settings.max_tokens, window // 5)
        shared_bytes = int(window * 2 // 5 * bytes_per_token)
        system, context = self._fit(tuple(SHARED), shared, shared_bytes)
        prompt_bytes = int((window - max_tokens - window // 10) * bytes_per_token)
        left = prompt_bytes - len((system + context + _GAP).encode())
        (task,) = self._fit((act,), material, left)
        return Prompt(
            messages=[
                {"role": "system", "content": system},
                {"role": "user", "content": context + _GAP + task},
            ],
            temperature=settings.temperature,
            max_tokens=max_tokens,
            window=window,
        )

    def ask_again(self, prompt: Prompt, answer: str, problem: str) -> Prompt:
        """Return the prompt extended by the unusable answer and its problem."""
        size = int(prompt.window // 10 * BYTES_PER_TOKEN)
        (request,) = self._fit(("again",), {"problem": problem}, size // 2)
        more: list[Message] = [
            {
                "role": "assistant",
                "content": cut(self.redact(answer), size - len(request.encode())),
            },
            {"role": "user", "content": request},
        ]
        return replace(prompt, messages=prompt.messages + more)

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
