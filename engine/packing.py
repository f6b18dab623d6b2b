"""Trees as rows: every token of a question's tree once, seeing its ancestors only.

The loss and its gradient are those of a row for each trajectory (tests/test_update.py), also where
a tree is cut at a fork because it is too large. At the end, the log-probs of a batch of such rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from itertools import compress

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from advantage import Segment, shared_by
from engine.memory import HEAD_BYTES

MAX_GRAD_NORM = 1.0  # as in the released settings
SIMILAR = 1.25  # length of a row / that of the shortest in its batch, at most: padding is work


@dataclass
class Row:
    """Some trajectories of one question, every token of their tree once. Lists of T values."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)  # depth in the tree
    parent: list[int] = field(default_factory=list)  # index of the token before it, or -1
    weight: list[int] = field(default_factory=list)  # trajectories it counts for; 0: not sampled
    A_plus: list[float] = field(default_factory=list)  # sum of their positive advantages
    A_minus: list[float] = field(default_factory=list)  # sum of their negative advantages
    n_plus: list[int] = field(default_factory=list)  # how many of them are positive
    n_minus: list[int] = field(default_factory=list)  # how many are negative
    sampled_logp: list[float] = field(default_factory=list)  # as the sampler drew it; else nan

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(kw_only=True)
class Batch(Row):
    """Rows padded to one length: (B, T) tensors. The logits at `parent[t]` score token t."""

    attention_mask: Tensor  # (B, T), or additive (B, 1, T, T) where a row holds a whole tree


def make_row(leaves: list[Segment], advantages: dict[Segment, dict[Segment, float]]) -> Row:
    """The tree of these leaves, parents first; `advantages[segment][leaf]` for policy segments."""
    row, last = Row(), {}  # last: segment -> index of its last token
    for segment, below in shared_by(leaves).items():
        credit = [advantages[segment][leaves[i]] for i in below] if segment in advantages else []
        plus, minus = [a for a in credit if a > 0], [a for a in credit if a < 0]
        parent = last.get(segment.parent, -1)
        n, before = len(segment.token_ids), len(row)
        row.input_ids += segment.token_ids
        row.position_ids += range(segment.depth() - n, segment.depth())
        row.parent += [parent, *range(before, before + n - 1)]
        row.sampled_logp += segment.logp or [math.nan] * n
        counts = {"weight": len(credit), "n_plus": len(plus), "n_minus": len(minus)}
        for name, value in {**counts, "A_plus": sum(plus, 0.0), "A_minus": sum(minus, 0.0)}.items():
            getattr(row, name).extend([value] * n)  # the same for every token of a segment
        last[segment] = len(row) - 1
    return row


def split_tree(leaves: list[Segment], limit: int) -> list[list[Segment]]:
    """Groups of leaves whose trees hold at most `limit` tokens each, or one trajectory.

    A tree is cut at its forks: depth first, a leaf joins the group of the one before it while there
    is room. What both sides share is in both rows, each time for the leaves of its row alone, so
    that loss and gradient, which are sums over leaves, stay the same.
    """
    order = {segment: i for i, segment in enumerate(shared_by(leaves))}
    if sum(len(segment.token_ids) for segment in order) <= limit:
        return [leaves]
    groups = [[]]
    for leaf in sorted(leaves, key=lambda leaf: [order[segment] for segment in leaf.path()]):
        together = shared_by([*groups[-1], leaf])
        if groups[-1] and sum(len(segment.token_ids) for segment in together) > limit:
            groups.append([])
        groups[-1].append(leaf)
    return groups


def make_batch(rows: list[Row], pad_id: int, device, dtype=torch.float32) -> Batch:
    T, padded = max(map(len, rows)), {}
    fills = {"input_ids": pad_id, "sampled_logp": math.nan}  # of padding; else 0
    for item in fields(Row):
        fill = [fills.get(item.name, 0)]
        values = [getattr(row, item.name) + fill * (T - len(row)) for row in rows]
        padded[item.name] = torch.tensor(values, device=device)  # (B, T)
    if all(row.parent == list(range(-1, len(row) - 1)) for row in rows):  # no fork: causal
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    else:
        # (B, T, T): a token (row) sees a token (column): itself, and what the one before it sees.
        sees = torch.eye(T, dtype=torch.bool).repeat(len(rows), 1, 1)
        for tree, row in zip(sees, rows, strict=True):
            for t, before in enumerate(row.parent[1:], start=1):
                tree[t] |= tree[before]
        mask = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)
        mask = mask[:, None]  # (B, 1, T, T)
    return Batch(attention_mask=mask.to(device), **padded)


def micro_batches(rows: list[Row], token_budget: int) -> list[list[Row]]:
    """Rows of similar length together: at most `token_budget` tokens, padding included, a batch."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=len):
        some = batches[-1] if batches else []
        if not some or len(row) > min(token_budget // (len(some) + 1), SIMILAR * len(some[0])):
            batches.append([])
        batches[-1].append(row)
    return batches


# ---- the log-prob of every token ----------------------------------------------------------


def token_logprobs(policy, batch: Batch, temperature: float) -> Tensor:
    """Log-prob of every counted token with its gradient, (B, T); 0 elsewhere.

    Logits are made chunk by chunk from the hidden states of those tokens and made again in the
    backward pass: (B, T, V) never exists.
    """
    policy.limits.in_use = "micro_batch_tokens", batch.input_ids.numel()
    with recomputed(policy.lm) if policy.limits.recompute else nullcontext():
        read = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        out = policy.lm.get_decoder()(**read, position_ids=batch.position_ids, use_cache=False)
    b, t = batch.weight.nonzero(as_tuple=True)  # (n,)
    hidden = out.last_hidden_state[b, batch.parent[b, t]]  # (n, D) before t: the only shift
    target = batch.input_ids[b, t]  # (n,)

    def logp_of(hidden: Tensor, target: Tensor) -> Tensor:
        logits = policy.lm.get_output_embeddings()(hidden).float() / temperature  # (n, V)
        return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]

    size = max(1, HEAD_BYTES // (4 * policy.vocab_size))
    chunks = zip(hidden.split(size), target.split(size), strict=True)
    logp = torch.cat([checkpoint(logp_of, h, y, use_reentrant=False) for h, y in chunks])  # (n,)
    return logp.new_zeros(batch.weight.shape).index_put((b, t), logp)


def take_step(policy, optimizer, total: float, rows: list[Row]) -> float | None:
    """An optimizer step, the gradient scaled down to MAX_GRAD_NORM at most; its norm before.

    None: the scaled gradient of float16 was too large, so that the step is left out.
    """
    if policy.processes.count > 1:
        policy.processes.add_up(policy.parameters, total)
    policy.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters, MAX_GRAD_NORM)
    if policy.scaler.get_scale() == 1:  # no scale, or none left to make smaller
        require_finite("the gradient norm", norm, [row.input_ids for row in rows])
    policy.scaler.step(optimizer)  # may overflow although the gradient did not
    policy.scaler.update()
    weights = torch.nn.utils.get_total_norm([p.detach() for p in policy.parameters])
    require_finite("a weight after the step", weights, [])
    return norm.item() if norm.isfinite() else None


@contextmanager
def recomputed(lm: torch.nn.Module) -> Iterator[None]:
    """Gradient checkpointing: layers keep their input only and compute the rest again.

    transformers does it for layers in training mode; nothing else enters it, so no dropout acts.
    """
    for module in lm.modules():
        module.training = isinstance(module, GradientCheckpointingLayer)
    try:
        yield
    finally:
        lm.eval()


class NonFinite(FloatingPointError):
    """A number is inf or nan. `rows` are the token ids of the rows that it happened in."""

    def __init__(self, words: str, rows: list[list[int]]):
        super().__init__(words)
        self.rows = rows

    def within(self, step: int, prompts: dict[str, list[int]]) -> NonFinite:
        """The same with the step and the questions it happened in: text -> token ids of prompts."""
        named = [
            f"{text!r} ({len(row)} tokens)"
            for row in self.rows
            for text, prompt in prompts.items()
            if row[: len(prompt)] == prompt
        ]
        where = f", in {', '.join(named[:3])}" if named else ""
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return NonFinite(f"step {step}: {self}{where}{more}", self.rows)


def require_finite(name: str, value: Tensor, rows: Iterable[list[int]]) -> None:
    """NonFinite unless all of `value` is finite; where its first dimension is `rows`, those."""
    bad = ~value.isfinite()
    if bad.any():
        if value.dim() > 1:  # (B, ..)
            rows = compress(rows, bad.flatten(1).any(dim=1).tolist())
        raise NonFinite(f"{name} is {value[bad][0].item()}", [*rows])
