"""Exercise 5: which tokens are trained?                                     20 minutes

A trajectory is `leaf.path()`: a prompt, then segments of the policy and of tools in turn. Only what
the policy sampled is trained, its stop token included. Every Segment knows its author. A token's id
tells nothing: the padding may be the very token that ends a turn, and a tool may write anything.

The loss is one mean over all trained tokens of a step, however it is cut into micro-batches (the
released code's token mean). A micro-batch is (token_loss (B, T), trained (B, T)).

    python -m course.grade 5
"""

from torch import Tensor

from advantage import Segment


def trained_tokens(leaf: Segment) -> list[bool]:
    """For each token of the trajectory, in the order of `leaf.path_tokens()`: is it trained?"""
    raise NotImplementedError


def padded(leaves: list[Segment], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and which of them are trained (B, T), bool: a row for each trajectory.

    T is the longest of them; shorter rows are filled up with `pad_id` on the right.
    """
    raise NotImplementedError


def mean_loss(micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One number: the mean of token_loss over the trained tokens of all micro-batches."""
    raise NotImplementedError
