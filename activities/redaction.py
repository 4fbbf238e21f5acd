"""Redaction of secrets in the texts for agents, by the policy's rules on secrets.

It is applied at the edges: where a context pack or a session is assembled, and where a prompt is
rendered. The graph keeps the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from activities.checks.policy import SecretPatterns, load_policy
from activities.config import CONFIG
from workflows.models.base import content_hash

REDACTED = "[REDACTED]"

PASSES = 5
"""Maximum number of passes: removing a secret may expose another one next to it."""


class Redaction:
    """A function that removes the secrets from a text. `version`: the hash of the rules."""

    def __init__(self, secrets: SecretPatterns) -> None:
        self._secrets = secrets
        self.version = content_hash(secrets.rules.model_dump())

    def __call__(self, text: str) -> str:
        """Replace each secret in the text by `[REDACTED]`; the rest stays unchanged."""
        for _ in range(PASSES):
            spans = self._secrets.spans(text)
            if not spans:
                break
            parts, end = [], 0
            for start, stop in spans:
                parts += [text[end:start], REDACTED]
                end = stop
            text = "".join(parts) + text[end:]
        return text


Redact = Callable[[str], str]


@cache
def load_redaction(directory: Path = CONFIG) -> Redaction:
    """Load the redaction from a directory's policy.yaml.

    Raises:
        InvalidConfig: the file is missing, not YAML, or inconsistent.
    """
    return Redaction(SecretPatterns(load_policy(directory).secrets))
