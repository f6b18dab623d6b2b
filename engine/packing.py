"""Trees as rows: every token of a question's tree once, seeing its ancestors only.

The loss and its gradient are those of a row for each trajectory (tests/test_update.py), also where
a tree is cut at a fork because it is too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advantage import Segment, shared_by


@dataclass
class Row:
    """Some trajectories of one question, every token of their tree once. Lists of T values."""

    input_ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)  # depth in the tree
    parent: list[int] = field(default_factory=list)  # index of the token before it
    weight: list[int] = field(default_factory=list)  # trajectories it counts for; 0: not sampled
    A_plus: list[float] = field(default_factory=list)  # sum of their positive advantages
    A_minus: list[float] = field(default_factory=list)  # sum of their negative advantages
    n_plus: list[int] = field(default_factory=list)  # how many of them are positive
    n_minus: list[int] = field(default_factory=list)  # how many are negative
    drawn: list[float] = field(default_factory=list)  # log-prob it was drawn with; nan: not kept

    def __len__(self) -> int:
        return len(self.input_ids)

    def pulls(self) -> bool:
        """Whether any gradient comes from it (but for KL): equal rewards leave advantages of 0."""
        return any(self.A_plus) or any(self.A_minus)

    def sees(self) -> Tensor:
        """(T, T): True where a token (row) attends to a token (column): itself, its ancestors."""
        T = len(self)
        mask = torch.ones(T, T, dtype=torch.bool).tril()  # right where each follows the one before
        starts = [t for t in range(T) if self.parent[t] != t - 1]
        for start, end in zip(starts, [*starts[1:], T], strict=True):  # a segment: a run of tokens
            parent = self.parent[start]
            mask[start:end, :start] = mask[parent, :start] if parent >= 0 else False
        return mask


def make_row(leaves: list[Segment], advantages: dict[Segment, dict[Segment, float]]) -> Row:
    """The tree of these leaves, parents first; `advantages[segment][leaf]` for policy segments."""
    row, last = Row(), {}  # last: segment -> index of its last token
    for segment, below in shared_by(leaves).items():
        credit = [advantages[segment][leaves[i]] for i in below] if segment in advantages else []
        plus, minus = [a for a in credit if a > 0], [a for a in credit if a < 0]
        parent = last.get(segment.parent, -1)
        depth = row.position[parent] + 1 if parent >= 0 else 0
        for i, token in enumerate(segment.token_ids):
            row.input_ids.append(token)
            row.position.append(depth + i)
            row.parent.append(parent if i == 0 else len(row) - 2)
            row.weight.append(len(credit))
            row.A_plus.append(sum(plus, 0.0))
            row.A_minus.append(sum(minus, 0.0))
            row.n_plus.append(len(plus))
            row.n_minus.append(len(minus))
            row.drawn.append(segment.logp[i] if i < len(segment.logp) else math.nan)
        last[segment] = len(row) - 1
    return row


def cut(leaves: list[Segment], limit: int) -> list[list[Segment]]:
    """Groups of leaves whose trees hold at most `limit` tokens each, or one trajectory.

    A tree is cut at its forks: depth first, a leaf joins the group of the one before it while there
    is room. What both sides share is in both rows, each time for the leaves of its row alone, so
    that loss and gradient, which are sums over leaves, stay the same.
    """
    order = {segment: i for i, segment in enumerate(shared_by(leaves))}
    if sum(len(segment.token_ids) for segment in order) <= limit:
        return [leaves]
    groups, inside, size = [], set(), limit
    for leaf in sorted(leaves, key=lambda leaf: [order[segment] for segment in leaf.path()]):
        size += sum(len(segment.token_ids) for segment in leaf.path() if segment not in inside)
        if size > limit:
            groups.append([])
            inside = set()
            size = sum(len(segment.token_ids) for segment in leaf.path())
        inside.update(leaf.path())
        groups[-1].append(leaf)
    return groups


@dataclass
class Batch:
    """Rows padded to one length. Index t of every (B, T) tensor describes token t."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), or additive (B, 1, T, T) where a row holds a whole tree
    position_ids: Tensor  # (B, T)
    parent: Tensor  # (B, T) index of the token whose logits score token t
    weight: Tensor  # (B, T) trajectories that token t counts for; 0: prompt, tool or padding
    A_plus: Tensor  # (B, T)
    A_minus: Tensor  # (B, T)
    n_plus: Tensor  # (B, T)
    n_minus: Tensor  # (B, T)
    drawn: Tensor  # (B, T) log-prob the sampler drew token t with; nan where it was not kept


def make_batch(rows: list[Row], pad_id: int, device, dtype=torch.float32) -> Batch:
    T = max(map(len, rows))

    def padded(name: str, fill: float) -> Tensor:
        values = [getattr(row, name) + [fill] * (T - len(row)) for row in rows]
        return torch.tensor(values, device=device)

    chains = all(row.parent == list(range(-1, len(row) - 1)) for row in rows)
    if chains:  # causal rows need no more than their padding
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    else:
        mask = torch.full((len(rows), 1, T, T), torch.finfo(dtype).min, dtype=dtype)
        mask.diagonal(dim1=2, dim2=3).zero_()  # padding sees itself
        for i, row in enumerate(rows):
            mask[i, 0, : len(row), : len(row)].masked_fill_(row.sees(), 0.0)
        mask = mask.to(device)
    return Batch(
        input_ids=padded("input_ids", pad_id),
        attention_mask=mask,
        position_ids=padded("position", 0),
        parent=padded("parent", 0).clamp(min=0),
        weight=padded("weight", 0),
        A_plus=padded("A_plus", 0.0),
        A_minus=padded("A_minus", 0.0),
        n_plus=padded("n_plus", 0),
        n_minus=padded("n_minus", 0),
        drawn=padded("drawn", math.nan),
    )


def micro_batches(rows: list[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most `token_budget` tokens (padding included) a batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
