"""Exercise 4: who gets the credit for a shared segment?                     20 minutes

A policy segment that d trajectories share gets one advantage from each of them:

    (1 - w) A_i + w mean(A_1, .., A_d)        w = shared_weight

w = 0 is soft credit (the released code, and GRPO), w = 1 is hard credit (arXiv 2507.19849, section
3.2). What is maximised for a token of it is PPO's clipped objective, summed over its trajectories:

    sum over i of min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i)

with rho, the probability of the token now over that when it was sampled.

On paper: prove that the d advantages have the same sum for every w. What follows for rho = 1?

    python -m course.grade 4
"""

from torch import Tensor

from advantage import Segment


def credit(leaves: list[Segment], A: Tensor, shared_weight: float) -> dict[Segment, Tensor]:
    """Each policy segment of the tree -> its (d,) advantages, in the order of the leaves below it.

    A: (M,) the advantages of the leaves. Prompts and tool results get none: nobody trains them.
    `advantage.shared_by` is yours to use.
    """
    raise NotImplementedError


def objective(rho: float, A: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """The formula above for one token with the advantages A, (d,): a single number."""
    raise NotImplementedError


# The clip is 0.2 on both sides. For a token that d trajectories share, soft and hard credit pull
# it with the gradient of the objective by rho. Find numbers, at least two advantages each:


def told_apart() -> tuple[float, list[float]]:
    """(rho, advantages of the trajectories) where the two gradients differ."""
    raise NotImplementedError


def not_told_apart() -> tuple[float, list[float]]:
    """The same with equal gradients, though rho is outside [0.8, 1.2] and the advantages differ."""
    raise NotImplementedError
