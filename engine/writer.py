"""Beneath the rollout: open paths over one KV cache, and what `generate` calls at every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

import tools as toolbox
from advantage import Segment
from entropy import official_scalar, token_entropy
from engine.packing import make_row
from engine.model import Policy
from app.run_folder import NonFinite


@dataclass
class Paths:
    """The open paths of one level, a row each, over one KV cache of C columns.

    A column that means nothing for a row (padding, what a finished row went on to generate, the
    sibling's tokens in a fork) is a hole: mask 0. Positions come from the running sum of the mask,
    so a row's tokens are contiguous for the model whatever holes lie between them.
    """

    drafts: list[Segment]  # (R) the segment that each path writes; its parent is where it stands
    owners: list[int]  # (R) the question it belongs to
    cache: DynamicCache  # keys and values (R, heads, C, d) of every layer
    mask: Tensor | None  # (R, C); None: used up
    pending: list[list[int]]  # (R) tokens that the cache has not seen yet

    def __len__(self) -> int:
        return len(self.drafts)

    def select(self, rows: list[int], mask: Tensor | None = None, keep: bool = False) -> Paths:
        """The named rows (again, to fork them) on a cache of their own, squeezed free of holes."""
        (selected,) = self.split([rows], mask, keep)
        return selected

    def split(
        self, parts: list[list[int]], mask: Tensor | None = None, keep: bool = False
    ) -> list[Paths]:
        """The rows of each part on a cache of its own, squeezed free of holes.

        These paths are used up, a layer at a time, so that the cache never exists twice; unless
        they are to `keep`. `mask` replaces that of the rows of all parts, one after the other.
        """
        rows = [row for part in parts for row in part]
        masks = (self.mask[rows] if mask is None else mask).split([len(part) for part in parts])
        caches = [DynamicCache() for _ in parts]
        picks = [torch.tensor(part, device=self.mask.device)[:, None] for part in parts]
        columns = []
        for seen in masks:  # (R', C)
            width = int(seen.sum(dim=1).max())
            holes_first = seen.argsort(dim=1, stable=True)
            columns.append(holes_first[:, seen.shape[1] - width :])  # (R', C')
        for i, layer in enumerate(self.cache.layers):
            for cache, pick, column in zip(caches, picks, columns, strict=True):
                kept = (x[pick, :, column].transpose(1, 2) for x in (layer.keys, layer.values))
                cache.update(*kept, i)
            if not keep:
                layer.keys = layer.values = None
        if not keep:
            self.mask = None  # `grow` holds the paths of every level until it returns
        return [
            Paths(
                [self.drafts[row] for row in part],
                [self.owners[row] for row in part],
                cache,
                seen.gather(1, column),
                [list(self.pending[row]) for row in part],
            )
            for part, cache, seen, column in zip(parts, caches, masks, columns, strict=True)
        ]

    @staticmethod
    def join(parts: list[Paths]) -> Paths | None:
        """The rows of all parts on one cache, with holes on the left of the shorter ones."""
        if len(parts) < 2:
            return parts[0] if parts else None
        width = max(part.mask.shape[1] for part in parts)

        def widened(x: Tensor, dim: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = width - shape[dim]
            return torch.cat([x.new_zeros(shape), x], dim=dim)

        cache = DynamicCache()
        for i in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[i] for part in parts]
            keys = torch.cat([widened(layer.keys, 2) for layer in layers])
            values = torch.cat([widened(layer.values, 2) for layer in layers])
            for layer in layers:
                layer.keys = layer.values = None
            cache.update(keys, values, i)
        mask = torch.cat([widened(part.mask, 1) for part in parts])
        for part in parts:
            part.mask = None  # as in `split`
        return Paths(
            [draft for part in parts for draft in part.drafts],
            [owner for part in parts for owner in part.owners],
            cache,
            mask,
            [tokens for part in parts for tokens in part.pending],
        )


class SegmentEnd(StoppingCriteria):
    """Gives every sampled token to its segment, and ends a row when its segment is complete.

    By text and not by token id, because a tag may be split over several tokens. With `leave`, the
    whole call ends when that share of its rows has ended, so that they can be dropped.
    """

    def __init__(
        self, policy: Policy, drafts: list[Segment], limits: list[int], leave: float = 1.0
    ):
        self.policy, self.drafts, self.limits, self.leave = policy, drafts, limits, leave

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        newest = input_ids[:, -1].tolist()
        for draft, limit, token in zip(self.drafts, self.limits, newest, strict=True):
            if draft.stop is None:
                draft.token_ids.append(token)
                draft.stop = self.why(draft.token_ids, limit)
        ended = [draft.stop is not None for draft in self.drafts]
        enough = sum(ended) >= self.leave * len(ended)
        return torch.tensor([enough or end for end in ended], device=input_ids.device)

    def why(self, token_ids: list[int], limit: int) -> str | None:
        if token_ids[-1] in self.policy.eos_ids:
            return "eos"
        closed = token_ids[-1] in self.policy.closers
        stop = toolbox.policy_stop(self.policy.decode(token_ids)) if closed else None
        return stop or ("length" if len(token_ids) >= limit else None)


class FiniteLogits(LogitsProcessor):
    """Nothing is sampled from logits that are no numbers."""

    def __init__(self, drafts: list[Segment]):
        self.drafts = drafts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = (~scores.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if wrong:
            rows = [make_row([self.drafts[row]], {}) for row in wrong]
            raise NonFinite("the sampler's log-probs are not finite", rows, {"logits": scores})
        return scores


class Meter(LogitsProcessor):
    """The entropy of every step and the log-prob of every token, while the scores pass by.

    So one step of (R, V) is held, never all of a segment. With `official`, also what the released
    code's rule reads off each step.
    """

    def __init__(self, temperature: float, official: bool):
        self.temperature, self.official = temperature, official
        self.H: list[Tensor] = []  # (R) a step, in nats
        self.logp: list[Tensor] = []  # (R) a step
        self.scalar: list[Tensor] = []  # (R) a step; empty unless `official`
        self.latest: Tensor | None = None  # (R, V) log-probs of the step whose token is not known

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.latest is not None:
            self.pick(input_ids[:, -1])
        scaled = scores.float() / self.temperature  # (R, V)
        self.H.append(token_entropy(scaled))
        if self.official:
            one_step = scaled.new_ones(len(scaled), 1).bool()
            self.scalar.append(official_scalar(scaled[:, None], one_step))
        self.latest = scaled.log_softmax(dim=-1)
        return scores

    def pick(self, tokens: Tensor) -> None:
        self.logp.append(self.latest.gather(1, tokens[:, None])[:, 0])

    def record(self, newest: Tensor, drafts: list[Segment], added: list[int]) -> None:
        """Tell each draft what the tokens `added` to it were drawn with; the `newest` are last."""
        self.pick(newest)
        H, logp = (torch.stack(steps, dim=1).tolist() for steps in (self.H, self.logp))  # (R, S)
        for row, (draft, n) in enumerate(zip(drafts, added, strict=True)):
            draft.token_entropy += H[row][:n]
            draft.logp += logp[row][:n]
