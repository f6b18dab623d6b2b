"""Exercise 3: better or worse than the others?                              15 minutes

GRPO has no value network. It compares the M trajectories of one question with each other:

    A_i = (r_i - mean) / (std + 1e-6)         std divides by M - 1
    (GRPO, arXiv 2402.03300; the released code of ARPO, core_algos.py:113)

    python -m course.grade 3
"""

from torch import Tensor


def group_advantages(rewards: list[float]) -> Tensor:
    """(M,) -> (M,): the advantage of each trajectory.

    Exactly 0 for all where all rewards are equal, and for a group of one: there is nothing to
    compare. Try eight rewards of 0.1 before you hand it in.
    """
    raise NotImplementedError


def dead_chance(p: float, M: int) -> float:
    """How likely a group teaches nothing: each of M trajectories gets 1 with chance p, else 0."""
    raise NotImplementedError
