"""Solution 3. Measured: 10 of 10 points.

dead_chance(0.38, 8) = 0.022, at the accuracy that the shipped policy has over all questions. But
each question has its own p: of one that is right 19 times in 20, two of three groups are dead.
"""

import torch
from torch import Tensor


def group_advantages(rewards: list[float]) -> Tensor:
    r = torch.tensor(rewards, dtype=torch.float32)
    if (r == r[0]).all():  # also a group of one, whose std is nan
        return torch.zeros_like(r)
    return (r - r.mean()) / (r.std() + 1e-6)


def dead_chance(p: float, M: int) -> float:
    return p**M + (1 - p) ** M
