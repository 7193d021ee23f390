"""Errors that a user can fix. The command line prints them without a traceback and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something outside rlvid is wrong: a file, a row, a key, a device.

    The message names the file, row or key, what was expected, and how to fix it.
    """


class SampleUnusable(UserError):
    """A sample that this model cannot be trained on. It is set aside, as one with a bad clip is."""


class PromptTooLong(SampleUnusable):
    """A sample's prompt does not fit the context."""


class BadClip(Exception):
    """A clip that cannot be read. Quarantined with its reason, never replaced by another clip."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
