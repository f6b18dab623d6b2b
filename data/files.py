"""Files: stub, replaced at the merge."""

from __future__ import annotations


class UserError(Exception):
    """Something the user typed or named cannot be used: one line, exit code 2, no traceback."""


def reason(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__
