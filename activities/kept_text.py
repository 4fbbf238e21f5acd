"""How a text that only the fleet reads is kept in Valkey: encrypted if there are keys."""

from __future__ import annotations

from typing import Protocol


class TextCipher(Protocol):
    """Turns texts into what Valkey keeps, and back."""

    def encrypt(self, text: str) -> bytes:
        """Return what Valkey keeps."""

    def decrypt(self, kept: bytes) -> bytes:
        """Return the text, encoded as UTF-8; a text that is not encrypted is returned as it is."""


class NotEncrypted:
    """Keeps texts as they are: the fleet has no keys."""

    def encrypt(self, text: str) -> bytes:
        """Return the text, encoded as UTF-8."""
        return text.encode()

    def decrypt(self, kept: bytes) -> bytes:
        """Return what is kept."""
        return kept


NOT_ENCRYPTED = NotEncrypted()
