"""What is wrong with a process's settings."""

from __future__ import annotations

_CHARACTERS_MAX = 4000  # values are repeated in it, and may be of any length


class SettingsError(Exception):
    """A setting is missing, misspelt or out of range; the text names it and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _CHARACTERS_MAX else f"{message[:_CHARACTERS_MAX]}...")
