"""Solution 5. Measured: 10 of 10 points.

`course/checks/ex5_trained_tokens.py` has a trajectory of 13 tokens, 7 of them trained. A mask made
from token ids (id != pad) would lose its stop token, so ending a turn would never be learnt.
"""

import torch
from torch import Tensor

from advantage import Segment


def trained_tokens(leaf: Segment) -> list[bool]:
    return [segment.author == "policy" for segment in leaf.path() for _ in segment.token_ids]


def padded(leaves: list[Segment], pad_id: int) -> tuple[Tensor, Tensor]:
    T = max(leaf.depth() for leaf in leaves)
    ids = [leaf.path_tokens() + [pad_id] * (T - leaf.depth()) for leaf in leaves]
    trained = [trained_tokens(leaf) + [False] * (T - leaf.depth()) for leaf in leaves]
    return torch.tensor(ids), torch.tensor(trained)


def mean_loss(micro_batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    total = sum(trained.sum() for _, trained in micro_batches)
    return sum((loss * trained).sum() for loss, trained in micro_batches) / total
