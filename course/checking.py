"""What the checks of the exercises are made of.

A check is a function of the student's module. It returns when the answer is right (with a text to
show, or None) and raises Wrong with a hint when it is not. Its docstring says what should hold.
"""

import math
import reprlib

import torch


class Wrong(Exception):
    """The answer is wrong. The text names the likely mistake, not the solution."""


class Missing(Wrong, AttributeError):
    """The student's file has no such name. An AttributeError, so that `hasattr` says no."""


def check(points: int, seconds: float = 3.0):
    """Mark a function as a check that is worth so many points and may take so many seconds."""

    def mark(function):
        function.points, function.seconds = points, seconds
        return function

    return mark


def require(condition, hint: str) -> None:
    if not condition:
        raise Wrong(hint)


def same(got, wanted, hint: str, instead: dict | None = None, tolerance: float = 1e-5) -> None:
    """Wrong unless `got` has the shape and, up to `tolerance`, the values of `wanted`.

    `instead` names mistakes by the values that they give: {hint: values}.
    """
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    require(got is not None, "it returned None: is a `return` missing?")
    try:
        value = torch.as_tensor(got).detach().double()
    except (TypeError, ValueError, RuntimeError):
        shown = reprlib.repr(got)
        raise Wrong(f"it returned {shown}: a number or a tensor is expected") from None
    shapes = f"shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
    for words, other in (instead or {}).items():
        other = torch.as_tensor(other, dtype=torch.float64)
        if other.shape == value.shape and torch.allclose(value, other, rtol=1e-4, atol=1e-4):
            raise Wrong(words)
    require(value.shape == wanted.shape, f"{hint} ({shapes})")
    off = ~torch.isclose(value, wanted, rtol=tolerance, atol=tolerance)
    if off.any():
        at = tuple(off.nonzero()[0].tolist())
        where = f" at index {at[0] if len(at) == 1 else at}" if at else ""
        raise Wrong(f"{hint} (got {value[at]:.6g}{where}, expected {wanted[at]:.6g})")


def is_number(value) -> bool:
    """A finite int or float, or a tensor of one; True and False are no numbers here."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and bool(value.isfinite())
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
