"""Scopes: what an agent is shown of a story, by role and phase, as scopes.yaml defines it."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from activities.config import InvalidConfig, read_config
from workflows.models.base import Section, content_hash
from workflows.models.ids import Role

Scope = Literal[
    "CASE_HEADER",
    "PLAN_HEADER",
    "DECISIONS_GLOBAL",
    "DECISIONS_GLOBAL_MIN",
    "DECISIONS_RELEVANT_ROLE",
    "DEPS_DECISIONS",
    "DEPS_RELEVANT",
    "SUBTASKS_ALL",
    "SUBTASKS_ALL_MIN",
    "SUBTASKS_ROLE",
    "SUBTASKS_ROLE_MIN",
    "MILESTONES",
    "SUMMARY_LAST",
]

SCOPES: tuple[Scope, ...] = get_args(Scope)


class Scopes(Section):
    """The content of scopes.yaml.

    `token_budget` is a pack's default budget in tokens; `relevance` lists the most relevant scope
    first.
    """

    token_budget: Annotated[int, Field(gt=0)]
    aliases: dict[Role, Role] = {}
    headers: list[Scope]
    relevance: list[Scope]
    tools: str
    scopes: dict[Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")], dict[Role, list[Scope]]]

    @model_validator(mode="after")
    def _each_scope_once(self) -> Self:
        if sorted(self.relevance) != sorted(SCOPES):
            raise ValueError("relevance must name every scope once")
        for phase, roles in self.scopes.items():
            for role, scopes in roles.items():
                if len({*scopes, *self.headers}) != len(scopes) + len(self.headers):
                    raise ValueError(f"scopes.{phase}.{role} names a scope twice, or a header")
        return self

    @cached_property
    def version(self) -> str:
        """The content hash; a pack that was built with another one is stale."""
        return content_hash(self.model_dump())

    def role(self, name: str) -> str:
        """Return the role's canonical name: upper case, with aliases resolved."""
        role = name.strip().upper()
        return self.aliases.get(role, role)


def load_scopes(path: Path) -> Scopes:
    """Read and check scopes.yaml.

    Raises:
        ApplicationError: `InvalidConfig`, not retryable, with the file, the field and the rule.
    """
    try:
        return read_config(path, Scopes)
    except InvalidConfig as error:
        raise error.final() from error


def scopes_for(config: Scopes, role: str, phase: str) -> list[Scope]:
    """Return the scopes of a role in a phase; for an unknown role or phase, the headers."""
    table = config.scopes.get(phase.strip().upper(), {})
    return [*config.headers, *table.get(config.role(role), [])]


def has_scopes(config: Scopes, role: str, phase: str) -> bool:
    """Return whether the file has that role in that phase; if not, it has the headers only."""
    return config.role(role) in config.scopes.get(phase.strip().upper(), {})


def check_scopes(
    config: Scopes, role: str, phase: str, provided: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the scopes that `provided` lacks and those that it has in excess: (missing, extra)."""
    expected = scopes_for(config, role, phase)
    missing: list[str] = [scope for scope in expected if scope not in provided]
    return missing, sorted(set(provided).difference(expected))
