"""Writes many policy segments side by side, and computes every token of a tree once.

    drafts = writer.begin(nodes, k)    one new segment after each node: its first k tokens
    writer.finish(drafts)              each of them to its end

The rollout says WHAT is written; the writer alone knows what has been computed already: the keys
and values of every path that is still needed, without padding (serving engines call this automatic
prefix caching). `pad_sequence` makes a batch of them, a mask takes it apart again. A token that is
not in there is unread, and is read when a segment that needs it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig

from advantage import Segment
from data.files import UserError
from engine import official
from engine.memory import SCORES_BYTES
from engine.model import Policy
from engine.packing import require_finite
from entropy import normalised_entropy, token_entropy

STEPS = 16  # tokens of one `generate` call at most
LEAVE = 0.4  # a call ends when this share of its rows has: they would be decoded for nothing

LEFT = {"batch_first": True, "padding_side": "left"}
KV = list[Tensor]  # keys and values of a path, layer by layer: (n, heads, d) each, never changed


class Writer:
    """Writes segments with one policy, and counts what that took.

    `prefill_tokens`: prompt and result tokens that were read. Each is read once while there is
    room, but for the last one of a node: every path that starts there needs its logits.
    """

    def __init__(self, policy: Policy, config):
        self.policy, self.config = policy, config
        self.on_scores = official.add_entropy if config.branch_rule == "official" else None
        self.longest = min(config.max_total_tokens, policy.context)  # a trajectory, in tokens
        self.kv: dict[Segment, KV] = {}  # of the path to a segment; least recently used first
        self.prefill_tokens = self.decode_steps = 0
        # One temperature and no top_k; training: the whole distribution, the one it scores.
        drawn = {"temperature": config.temperature, "top_k": 0, "top_p": config.top_p}
        ids = {"eos_token_id": policy.eos_ids, "pad_token_id": policy.pad_id}
        wanted = {"output_scores": True, "return_dict_in_generate": True}
        self.sampling = GenerationConfig(do_sample=config.temperature > 0, **drawn, **ids, **wanted)

    def begin(self, nodes: list[Segment], k: int) -> list[Segment]:
        """Policy segments after nodes (a node twice: a fork): their first k tokens and entropy."""
        if any(node.depth() >= self.longest for node in nodes):
            limits = f"{self.config.max_total_tokens}, the model's context {self.policy.context}"
            raise UserError(f"--max_total_tokens {limits}: a prompt leaves no room to answer")
        drafts = [Segment("policy", [], parent=node) for node in nodes]
        # Where several start from a node that is unread, one of them reads it for all.
        unread = Counter(node for node in nodes if node not in self.kv)
        first = {draft.parent: draft for draft in drafts if unread[draft.parent] > 1}
        self.write(list(first.values()), limit=1, begins=True)
        self.write(drafts, limit=k, begins=True)
        for draft in drafts:
            if draft.entropy is None:  # the released code measures otherwise: `on_scores`
                draft.entropy = normalised_entropy(draft.token_entropy, self.policy.vocab_size)
        return drafts

    def finish(self, drafts: list[Segment], places: Collection[Segment] = ()) -> None:
        """Each draft to its end: `stop` becomes tool, answer, eos or length.

        From here on paths begin only after these drafts, or at `places`: prompts and results.
        """
        needed = {draft for draft in drafts if draft.stop in (None, "tool")}.union(places)
        self.kv = {segment: kv for segment, kv in self.kv.items() if segment in needed}
        self.write(drafts, limit=self.config.max_segment_tokens, begins=False)

    @torch.inference_mode()
    def write(self, drafts: list[Segment], limit: int, begins: bool) -> None:
        """Until every draft is complete or has `limit` tokens; as many at once as there is room."""
        while rows := [d for d in drafts if d.stop is None and len(d.token_ids) < limit]:
            self.generate(rows[: self.config.rollout_rows], limit, begins)

    def generate(self, drafts: list[Segment], limit: int, begins: bool) -> None:
        """One `generate` call: some more tokens for every draft, a row each."""
        R, V = len(drafts), self.policy.vocab_size
        paths = max(R, len(self.kv))  # those that wait take memory, too
        self.policy.limits.in_use = "rollout_rows", min(self.config.rollout_rows, paths)
        before = [len(draft.token_ids) for draft in drafts]
        steps = min(limit - min(before), STEPS, max(1, SCORES_BYTES // (4 * R * V)))
        input_ids, mask, cache = self.batch(drafts, steps)  # (R, W), (R, C + W)
        most, longest = self.config.max_segment_tokens, self.longest
        rooms = [min(most, longest - draft.parent.depth()) for draft in drafts]
        advance = partial(self.advance, drafts, rooms, limit, 1.0 if begins else LEAVE)
        known = {"attention_mask": mask, "past_key_values": cache}
        until = {"max_new_tokens": steps, "stopping_criteria": [advance]}

        def finite(lm, args, out) -> None:
            """Nothing is sampled from logits that are no numbers."""
            require_finite("a logit", out.logits[:, -1], (d.path_tokens() for d in drafts))

        with self.policy.lm.register_forward_hook(finite):
            out = self.policy.lm.generate(input_ids, self.sampling, **known, **until)
        S = len(out.scores)
        self.decode_steps += S
        added = [len(draft.token_ids) - n for draft, n in zip(drafts, before, strict=True)]
        if self.on_scores:
            self.on_scores(drafts, added, out.scores)
        # The cache has seen all but the token sampled last, and pads after the end of a row.
        own = torch.arange(S - 1) < torch.tensor(added)[:, None]  # (R, S - 1)
        seen = torch.cat([mask.bool(), own.to(mask.device)], dim=1)  # (R, C + W + S - 1)
        self.store(drafts, seen, out.past_key_values, begins)

    def advance(self, drafts, rooms, limit, leave, input_ids: Tensor, scores, **kwargs) -> Tensor:
        """Give every new token to its segment, with its log-prob and entropy. Which rows end, (R)?

        All of them when the share `leave` has: a row that has ended is decoded for nothing. By text
        and not by token id, because a tag may be split over several tokens.
        """
        new, ended = input_ids[:, -1:], []  # (R, 1)
        logp = scores[-1].log_softmax(dim=-1).gather(1, new)  # (R, 1)   what it was drawn with
        H = token_entropy(scores[-1])  # (R)   in nats, as logp
        drawn = zip(new[:, 0].tolist(), logp[:, 0].tolist(), H.tolist(), strict=True)
        for draft, room, (token, token_logp, token_H) in zip(drafts, rooms, drawn, strict=True):
            if draft.stop is None and len(draft.token_ids) < limit:
                draft.token_ids.append(token)
                draft.logp.append(token_logp)
                draft.token_entropy.append(token_H)
                full = "length" if len(draft.token_ids) >= room else None
                draft.stop = self.policy.why_ended(draft.token_ids) or full
            ended.append(draft.stop is not None or len(draft.token_ids) >= limit)
        enough = sum(ended) >= leave * len(ended)
        return torch.tensor([enough or end for end in ended], device=input_ids.device)

    # ---- the cache ------------------------------------------------------------------------

    def batch(self, drafts: list[Segment], steps: int) -> tuple[Tensor, Tensor, DynamicCache]:
        """Unread tokens (R, W), mask (R, C + W) and cache (R, heads, C, d), padded on the left."""
        known = [self.known(draft) for draft in drafts]
        lengths = [len(kv[0]) if kv else 0 for kv in known]
        unread = [d.path_tokens()[n:] for d, n in zip(drafts, lengths, strict=True)]
        news, pad = [len(tokens) for tokens in unread], self.policy.pad_id
        C, W = max(lengths), max(news)
        self.prefill_tokens += sum(map(read_by, drafts, news))
        self.make_room(len(drafts) * (C + W + steps))
        cache = DynamicCache()
        empty = next(([x[:0].clone() for x in kv] for kv in known if kv), [])  # (0, heads, d)
        for i in range(0, len(empty), 2):  # keys and values of a layer
            both = [  # popped: a path that goes on is never held twice
                pad_sequence([kv.pop(0) if kv else none for kv in known], **LEFT).transpose(1, 2)
                for none in empty[i : i + 2]
            ]
            cache.update(*both, i // 2)  # (R, heads, C, d) each
        ids = pad_sequence([torch.tensor(tokens) for tokens in unread], **LEFT, padding_value=pad)
        mask = [pad_sequence([torch.ones(n) for n in some], **LEFT) for some in (lengths, news)]
        return *(x.to(self.policy.device) for x in (ids, torch.cat(mask, dim=1).long())), cache

    def known(self, draft: Segment) -> KV:
        """Keys and values of the first tokens of a path; [] where none is known."""
        segment = next((s for s in reversed(draft.path()) if s in self.kv), None)
        if segment is None:
            return []
        kv = self.kv.pop(segment)
        if segment.author != "policy":  # others may start here: it stays, as the newest
            self.kv[segment] = kv
        most = draft.depth() - 1  # one token at least stays unread: it must give the logits
        return [x[:most] for x in kv]

    def store(self, drafts: list[Segment], seen: Tensor, cache, begins: bool) -> None:
        """Take the rows to keep out of a cache, without what is not `seen`, (R, C).

        While segments begin, all of them and the nodes they began at; later those that go on.
        """
        keep = torch.tensor([begins or draft.stop in (None, "tool") for draft in drafts])
        seen = seen & keep.to(seen.device)[:, None]
        lengths, split = seen.sum(dim=1).tolist(), []  # (R); 0: not kept
        for layer in cache.layers:
            for x in (layer.keys, layer.values):
                split.append(x.transpose(1, 2)[seen].split(lengths))  # (n, heads, d) a row
            layer.keys = layer.values = None
        for draft, *kv in (each for each in zip(drafts, *split, strict=True) if len(each[1])):
            # A view keeps all the rows alive. What may outlive them has its own copy.
            self.kv[draft] = [x.clone() for x in kv] if draft.stop == "tool" else kv
            node = draft.parent
            if begins and node not in self.kv:
                n = node.depth()
                self.kv[node] = [x[:n].clone() for x in kv]

    def make_room(self, tokens: int) -> None:
        """Forget the paths that were not used for longest, so that so many tokens more fit."""
        room = self.config.rollout_rows * self.longest - tokens
        stored = sum(len(kv[0]) for kv in self.kv.values())
        while self.kv and stored > room:
            stored -= len(self.kv.pop(next(iter(self.kv)))[0])


def read_by(draft: Segment, unread: int) -> int:
    """How many of the last `unread` tokens of a path stand in prompts and results."""
    authors = [segment.author for segment in draft.path() for _ in segment.token_ids]
    return sum(author != "policy" for author in authors[-unread:])
