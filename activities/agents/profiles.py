"""Profiles of models: how each is sampled and asked (deploy/config/models.yaml)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from activities.agents.prompts import ACTS
from activities.config import read_config
from workflows.models.base import Section

PROFILES_FILE = "models.yaml"

Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class ModelProfile(Section):
    """How the models of one kind are sampled and asked. None: the engine's default.

    Attributes:
        models: patterns of their names, with `*`; upper and lower case are the same.
        temperature: by act; other acts have that of their prompt file.
        thinking: whether a model that can think does so.
        thinking_tokens: what it may think, in tokens, in addition to its answer.
        window: tokens that a prompt and its answer share; None: what the endpoint states.
        max_tokens: of an answer, by act; other acts have those of their prompt file.
        brief: whether prompts have the task and its requirements only. A small model copies or
            answers what else there is: examples, rules, a rubric, the agent's questions.
    """

    models: Annotated[list[str], Field(min_length=1)]
    temperature: dict[str, Temperature] = {}
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    thinking: bool | None = None
    thinking_tokens: Annotated[int, Field(ge=0)] = 0
    window: Annotated[int, Field(ge=512)] | None = None
    max_tokens: dict[str, Annotated[int, Field(ge=64)]] = {}
    brief: bool = False

    @field_validator("temperature", "max_tokens")
    @classmethod
    def _of_known_acts(cls, by_act: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(by_act.keys() - ACTS.keys()):
            raise ValueError(f"{', '.join(unknown)}: not an act; use {', '.join(ACTS)}")
        return by_act

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of a request that this profile sets, in vLLM's names."""
        names = {"top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"}
        fields = self.model_dump(include=names, exclude_none=True)
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": self.thinking}
        return fields


DEFAULT_PROFILE = ModelProfile(models=["*"])


class _File(Section):
    profiles: list[ModelProfile] = []


@dataclass(frozen=True)
class Profiles:
    """The profiles, in the order of the file."""

    profiles: Sequence[ModelProfile] = ()

    @classmethod
    def load(cls, directory: Path) -> Profiles:
        """Read models.yaml.

        Raises:
            InvalidConfig: the file is missing, not YAML, or inconsistent.
        """
        return cls(read_config(directory / PROFILES_FILE, _File).profiles)

    def of(self, model: str) -> ModelProfile:
        """Return the first profile with a pattern that fits the model's name."""
        name = model.lower()
        fitting = (
            profile
            for profile in self.profiles
            if any(fnmatchcase(name, pattern.lower()) for pattern in profile.models)
        )
        return next(fitting, DEFAULT_PROFILE)


NO_PROFILES = Profiles()
