"""What the checks of the exercises are made of.

A check is a function of the student's module. It returns when the answer is right (with a text to
show, or None) and raises Wrong with a hint when it is not. Its docstring says what should hold.
"""

import numbers
import reprlib
from inspect import formatannotation
from typing import get_args, get_origin

import torch
from torch import Tensor

from advantage import Segment
from entropy import Decision

RETURNED = {  # by the functions of the exercises, as their signatures say
    Tensor: "token_entropy group_advantages objective mean_loss logprobs tree_logprobs",
    float: "normalised_entropy gain_needed dead_chance wish_rate",
    int: "tool_calls",
    Decision: "paper official random_control my_rule",
    list[bool]: "trained_tokens",
    list[Segment]: "grow",
    dict[Segment, Tensor]: "credit",
    tuple[Tensor, Tensor]: "padded",
    tuple[float, list[float]]: "told_apart not_told_apart",
    tuple[float, float, float]: "interval",
}
KINDS = {name: kind for kind, names in RETURNED.items() for name in names.split()}
LEGAL = {float: numbers.Real | Tensor, int: numbers.Integral, tuple: list | tuple}


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


def watched(name: str, function, /, *args, **settings):
    """What it returns, if that is of the right kind and what it was given is as it was."""
    before = values([*args, *settings.values()])
    got = function(*args, **settings)
    unchanged = values([*args, *settings.values()]) == before
    require(unchanged, f"{name} changes what it is given, and others still need it: take a copy")
    of_kind(f"{name} returned", got, KINDS[name])
    return got


def values(given):
    """What tells later whether a list, a tensor or a segment was changed."""
    if isinstance(given, list | tuple):
        return [values(each) for each in given]
    if isinstance(given, Segment):
        return given, given.path_tokens()
    return repr(given.tolist()) if isinstance(given, Tensor) else given


def of_kind(what: str, value, kind) -> None:
    """Wrong unless the value is of a kind such as float or tuple[Tensor, Tensor]."""
    shown = " ".join(f"{reprlib.repr(value)} ({type(value).__name__})".split())
    hint = ": is a `return` missing?" if value is None else ""
    require(fits(value, kind), f"{what} {shown}, expected {formatannotation(kind)}{hint}")


def fits(value, kind) -> bool:
    """A list will do for a tuple, and a tensor for a float: of one number, or the value is off."""
    outer, parts = get_origin(kind) or kind, get_args(kind)
    if not isinstance(value, LEGAL.get(outer, outer)):
        return False
    if outer is dict:
        return fits(list(value.items()), list[tuple[parts]])
    if outer is list:
        parts *= len(value)
    return not parts or (len(value) == len(parts) and all(map(fits, value, parts)))


def same(got, wanted, hint: str, instead: dict | None = None, tolerance: float = 1e-5) -> None:
    """Wrong unless `got` has the shape and, up to `tolerance`, the values of `wanted`.

    Where that is a tensor, also its kind of numbers, and a gradient if it has one.
    `instead` names mistakes by the values that they give: {hint: values}.
    """
    if isinstance(wanted, Tensor):
        kinds = f"{hint} (dtype {got.dtype}, expected {wanted.dtype})"
        require(torch.can_cast(got.dtype, wanted.dtype), kinds)
        through = got.requires_grad or not wanted.requires_grad
        require(through, "no gradient comes through: was something detached, or made a number?")
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    value = torch.as_tensor(got).detach().double()
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
