"""Refusals of what comes from outside: each wrong field with its rule and remedy."""

from __future__ import annotations

from pydantic import ValidationError
from temporalio.exceptions import ApplicationError

from workflows.models.error_types import MESSAGE_CHARACTERS, ErrorType
from workflows.models.ids import ID_RULE

NOT_UNDERSTOOD = "not_understood"
"""The signal that replaces an unknown or malformed one, with its name and the reason."""


_REMEDIES = {
    "extra_forbidden": "unknown field; remove it or correct its name",
    "json_invalid": "is not JSON ({error}); send one JSON value in UTF-8",
    "model_type": "must be a JSON object; send {{...}}",
    "missing": "required; add it",
    "string_pattern_mismatch": f"must match {{pattern}}; an id is {ID_RULE}",
}


class InvalidInput(ApplicationError):
    """A rejected request.

    Attributes:
        problems: each wrong field with its rule; lost when Temporal serialises the error.
    """

    def __init__(self, what: str, problems: list[tuple[str, str]]) -> None:
        lines = "; ".join(f"{field}: {rule}" for field, rule in problems)
        super().__init__(
            f"{what} refused. {lines}"[:MESSAGE_CHARACTERS],
            type=ErrorType.INVALID_INPUT.value,
            non_retryable=True,
        )
        self.problems = problems


def invalid_input(what: str, error: ValidationError) -> InvalidInput:
    """Build a rejected request's error: each wrong field with its rule, cut to 2,000 characters."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        field = ".".join(str(part) for part in problem["loc"]) or "(the whole)"
        # Only our own texts are templates: pydantic's messages contain what was sent.
        remedy = _REMEDIES.get(problem["type"])
        rule = remedy.format(**problem.get("ctx", {})) if remedy else problem["msg"]
        problems.append((field, rule))
    return InvalidInput(what, problems)
