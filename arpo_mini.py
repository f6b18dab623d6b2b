"""ARPO in one file: roll out, branch where uncertain, credit, update (arXiv 2507.19849).

    python arpo_mini.py train | eval | show      (--help lists the flags of each)

Read `train` first: it is the algorithm, a line a step. Then `Rollout.grow`, the recursion that
branches, and `credit` and `policy_loss`, what is trained on. The lessons it stands on: entropy.py
(where to branch), advantage.py (who gets the credit), packing.py (a tree as one row) and tools.py
(what can be called). decoding.py has the paths over one cache, policy.py the model, settings.py
every flag. runs.py keeps what a run leaves on the disk, memory.py decides how much is computed at
once, alarms.py says when figures go wrong, metrics.py scores answers, terminal.py draws tables.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import tools as toolbox
from advantage import (
    Reward,
    Segment,
    clipped_objective,
    group_advantages,
    kl_k3,
    official_reward,
    reward,
    segment_advantages,
    shared_by,
)
from app.health import remarks
from data.formats import Question, load_questions
from engine.writer import FiniteLogits, Meter, Paths, SegmentEnd
from entropy import RULES, normalised_entropy
from engine.memory import head_chunk, snapshot
from app.evaluation import judge, mean, official_judge, summary
from engine.packing import Batch, Row, cut, make_batch, make_row, micro_batches
from engine.model import Policy, load_policy, refuse_long
from app.run_folder import NonFinite, RunFolder, Terminated, resumed, watched
from app.config import PRESETS, Config
from app.screen import (
    LOG_HEAD,
    Parser,
    UserError,
    advance,
    comparison,
    console,
    draw_tree,
    effort_table,
    log_line,
    one_line,
    progress_bar,
    reason,
    report_table,
)
from app.page.page import Run, page
from app.page.trees import tree

# ---- the rollout --------------------------------------------------------------------------


LEAVE = 0.4  # share of rows that ends a call of `generate`, to go on without them


class Rollout:
    """Rolls out questions with one policy and counts what that took.

    `prefill_tokens` are the prompt and result tokens that were computed, each once but for the last
    one of a node where paths start, and for forks that had to wait: they read all before them.
    """

    def __init__(self, policy: Policy, config: Config, tools: dict, rng: random.Random):
        self.policy, self.config, self.tools, self.rng = policy, config, tools, rng
        self.longest = min(config.max_total_tokens, policy.context)  # a trajectory, in tokens
        self.history: list[float] = []  # entropies measured so far, for the adaptive rule
        self.prefill_tokens = 0

    @torch.inference_mode()
    def run(self, questions: list[Question]) -> list[list[Segment]]:
        """Exactly `group_size` distinct leaves for each question; together as many as fit."""
        n = max(1, self.config.rollout_rows // self.config.group_size)
        parts = [questions[i : i + n] for i in range(0, len(questions), n)]
        return [leaves for part in parts for leaves in self.run_together(part)]

    def run_together(self, questions: list[Question]) -> list[list[Segment]]:
        M, N = self.config.group_size, self.config.initial_rollouts
        n = len(questions)
        roots = [Segment("prompt", self.policy.prompt(question.text)) for question in questions]
        start = self.read(list(enumerate(roots)))
        waiting = [(q, root) for q, root in enumerate(roots) for _ in range(N)]
        leaves = self.grow(start, None, waiting, [M - N] * n)
        return [[leaf for owner, leaf in leaves if owner == q] for q in range(n)]

    def read(self, nodes: list[tuple[int, Segment]]) -> Paths:
        """A row for each (question, node): all before it but its last token, which is pending."""
        texts = [[t for segment in node.path() for t in segment.token_ids] for _, node in nodes]
        longest = max(map(len, texts))
        if longest >= self.longest:
            limit = f"--max_total_tokens {self.config.max_total_tokens}"
            context = f"the model's context {self.policy.context}"
            raise UserError(f"{limit}, {context}: a prompt has {longest} tokens already")
        input_ids, mask = self.left_pad([text[:-1] for text in texts])
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.policy.lm(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        self.prefill_tokens += int(mask.sum())
        drafts = [Segment("policy", [], parent=node) for _, node in nodes]
        owners = [owner for owner, _ in nodes]
        return Paths(drafts, owners, cache, mask, [text[-1:] for text in texts])

    def grow(
        self,
        start: Paths,
        paths: Paths | None,
        waiting: list[tuple[int, Segment]],
        slots: list[int],
    ) -> list[tuple[int, Segment]]:
        """Continue every open path to its end: (question, leaf) of each.

        One policy segment for every path, forks where the rule says so (`slots[q]` are left to
        question q), a tool result for every call, and the same again for the paths still open and
        for those that begin: at a (question, node) that was `waiting` for room, or fresh from the
        question where too few forks can come to fill its slots.
        """
        fresh = self.fresh(paths, waiting, slots)
        slots = [left - taken for left, taken in zip(slots, fresh, strict=True)]
        roots = [(q, start.drafts[q].parent) for q, count in enumerate(fresh) for _ in range(count)]
        paths, waiting = self.begin(start, paths, waiting + roots)
        if paths is None:
            return []
        paths, later, slots = self.branch(paths, slots)
        called, ended = self.write(paths)
        called, unread = self.call_tools(called)
        return ended + unread + self.grow(start, called, waiting + later, slots)

    def fresh(
        self, paths: Paths | None, waiting: list[tuple[int, Segment]], slots: list[int]
    ) -> list[int]:
        """How many slots of each question are certain to stay open, whatever its paths do."""
        c = self.config
        Z = {"none": 0, "official": 1}.get(c.branch_rule, c.max_branches)
        most = [0] * len(slots)  # forks that can still come

        def count(owner: int, node: Segment, decided: bool) -> None:
            used = sum(segment.author == "tool" for segment in node.path())
            decisions = c.max_tool_calls - used + (node.author == "tool" and not decided)
            most[owner] += (1 + Z) ** decisions - 1

        for owner, draft in zip(paths.owners, paths.drafts, strict=True) if paths else ():
            count(owner, draft.parent, decided=False)
        for owner, node in waiting:
            count(owner, node, decided=True)
        return [max(0, left - forks) for left, forks in zip(slots, most, strict=True)]

    def begin(
        self, start: Paths, paths: Paths | None, waiting: list[tuple[int, Segment]]
    ) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """A row for each path that waits while there is room, and those that go on waiting."""
        room = self.config.rollout_rows - (len(paths) if paths else 0)
        now, later = waiting[:room], waiting[room:]
        roots = [owner for owner, node in now if node.author == "prompt"]
        forks = [(owner, node) for owner, node in now if node.author == "tool"]
        parts = [paths] if paths else []
        if roots:
            begun = start.select(roots, keep=True)
            begun.drafts = [Segment("policy", [], parent=draft.parent) for draft in begun.drafts]
            parts.append(begun)
        if forks:
            parts.append(self.read(forks))
        self.prefill_tokens += len(now)
        return Paths.join(parts), later

    def branch(
        self, paths: Paths, slots: list[int]
    ) -> tuple[Paths, list[tuple[int, Segment]], list[int]]:
        """Probe k tokens and fork where they are uncertain: the paths, forks that must wait for
        room, and the slots that are left."""
        k = self.config.entropy_tokens
        node_end = paths.mask.shape[1] + max(map(len, paths.pending)) - 1  # the node's last column
        self.sample(paths, k, measure=True)
        forked, slots = self.decisions(paths, slots)
        room = self.config.rollout_rows - len(paths)
        later = [(paths.owners[row], paths.drafts[row].parent) for row in forked[room:]]
        if forked[:room]:
            paths = self.fork(paths, forked[:room], node_end)
            self.sample(paths, k, measure=True)
        return paths, later, slots

    def decisions(self, paths: Paths, slots: list[int]) -> tuple[list[int], list[int]]:
        """The rows to fork, once for each fork, and the slots that are left."""
        slots, forked = list(slots), []
        history = [*self.history]
        self.history += [draft.entropy for draft in paths.drafts]
        nodes = [draft.parent for draft in paths.drafts]
        asked = [row for row, node in enumerate(nodes) if node.author == "tool"]
        asked = [row for row in asked if nodes[row].decision is None]
        for row in asked:
            nodes[row].decision = self.decide(paths.drafts[row], history)
        for row in sorted(asked, key=lambda row: -nodes[row].decision.gain):
            node, owner = nodes[row], paths.owners[row]
            granted = min(node.decision.forks, slots[owner])
            node.decision = dataclasses.replace(node.decision, granted=granted)
            slots[owner] -= granted
            forked += [row] * granted
        return forked, slots

    def decide(self, draft: Segment, history: list[float]):
        """What the rule says at the tool result that `draft` has just read."""
        c, path = self.config, draft.path()
        first = next(segment for segment in path if segment.author == "policy")
        # The official code measures the segment that ends in the call: one call too early.
        measured = draft.parent.parent if c.branch_rule == "official" else draft
        return RULES[c.branch_rule](
            measured.entropy,
            first.entropy,
            u=self.rng.random(),
            history=history,
            branch_probability=c.branch_probability,
            entropy_weight=c.entropy_weight,
            entropy_threshold=c.entropy_threshold,
            entropy_sigma=c.entropy_sigma,
            max_branches=c.max_branches,
        )

    def fork(self, paths: Paths, forked: list[int], node_end: int) -> Paths:
        """The same paths, and after them a row for each fork, which stands right after its node."""
        n = len(paths)
        rows = [*range(n), *forked]
        mask = paths.mask[rows]
        # Not the sibling's probe, and not the node's last token: it is read again for its logits.
        mask[n:, node_end:] = 0
        both = paths.select(rows, mask)
        for row in range(n, len(rows)):
            node = both.drafts[row].parent
            both.drafts[row] = Segment("policy", [], parent=node)
            both.pending[row] = node.token_ids[-1:]
        self.prefill_tokens += len(forked)
        return both

    def write(self, paths: Paths | None) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """Finish every segment: the paths that call a tool, and the leaves, (question, leaf) each.

        Rows that have ended leave the batch, those that call a tool until it has answered.
        """
        called, ended = [], []
        while paths:
            drafts, parts = paths.drafts, {"call": [], "leaf": [], "writing": []}
            for row, draft in enumerate(drafts):
                called_now = "call" if self.may_call(draft) else "leaf"
                parts[called_now if draft.stop else "writing"].append(row)
            ended += [(paths.owners[row], drafts[row]) for row in parts["leaf"]]
            if len(parts["writing"]) < len(paths):
                some = [part for part in (parts["call"], parts["writing"]) if part]
                split = paths.split(some)
                paths = split.pop() if parts["writing"] else None
                called += split
            if paths:
                self.sample(paths, self.config.max_segment_tokens, measure=False)
        return Paths.join(called), ended

    def sample(self, paths: Paths, steps: int, measure: bool) -> None:
        """One `generate` call: up to `steps` more tokens for every segment that is not complete."""
        drafts = paths.drafts
        limits = [self.room(draft) for draft in drafts]
        written = [len(draft.token_ids) for draft in drafts]
        left = [a - b for a, b, d in zip(limits, written, drafts, strict=True) if not d.stop]
        if not left:
            return
        steps = min(steps, max(left))
        input_ids, fresh = self.left_pad(paths.pending)  # (R, W)
        paths.mask = torch.cat([paths.mask, fresh], dim=1)  # (R, C + W)
        official = self.config.branch_rule == "official"
        meter = Meter(self.config.temperature or 1.0, official and measure)
        out = self.policy.lm.generate(
            input_ids,
            attention_mask=paths.mask,
            past_key_values=paths.cache,
            generation_config=self.sampling(steps),
            logits_processor=[FiniteLogits(drafts), meter],
            stopping_criteria=[
                SegmentEnd(self.policy, drafts, limits, leave=1.0 if measure else LEAVE)
            ],
        )
        added = [len(d.token_ids) - n for d, n in zip(drafts, written, strict=True)]
        S = out.shape[1] - input_ids.shape[1]
        columns = torch.arange(S, device=paths.mask.device)
        kept = columns < torch.tensor(added, device=paths.mask.device)[:, None]  # (R, S)
        # The cache has not seen the token sampled last: it is still to be read.
        paths.mask = torch.cat([paths.mask, kept[:, :-1].long()], dim=1)  # (R, C + W + S - 1)
        paths.pending = [
            d.token_ids[-1:] if n == S else [] for d, n in zip(drafts, added, strict=True)
        ]
        meter.record(out[:, -1], drafts, added)
        if measure:
            for draft, before, H in zip(drafts, written, self.measure(meter, kept), strict=True):
                draft.entropy = H if before == 0 else draft.entropy

    def measure(self, meter: Meter, kept: Tensor) -> list[float]:
        """What the rule reads off the steps that each row has `kept`, (R, S) -> (R)."""
        if meter.official:  # a sum over the first 20, not a mean
            return (torch.stack(meter.scalar, dim=1) * kept)[:, :20].sum(dim=1).tolist()
        H = torch.stack(meter.H, dim=1)  # (R, S)
        return normalised_entropy(H, kept, self.policy.lm.config.vocab_size).tolist()

    def room(self, draft: Segment) -> int:
        """Tokens that this segment may have."""
        before = sum(len(segment.token_ids) for segment in draft.parent.path())
        return min(self.config.max_segment_tokens, self.longest - before)

    def sampling(self, steps: int) -> GenerationConfig:
        """One temperature and no top_k; training: the whole distribution, the one it scores."""
        greedy = self.config.temperature == 0
        return GenerationConfig(
            max_new_tokens=steps,
            do_sample=not greedy,
            temperature=None if greedy else self.config.temperature,
            top_k=None if greedy else 0,
            top_p=None if greedy else self.config.top_p,
            eos_token_id=self.policy.eos_ids,
            pad_token_id=self.policy.pad_id,
        )

    def call_tools(self, paths: Paths | None) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """Run the calls of a level: the paths that go on, and the leaves that end here."""
        if paths is None:
            return None, []
        results = self.results(paths.drafts)
        open_rows = [row for row, result in enumerate(results) if self.fits(result)]
        ended = []
        for owner, draft, result in zip(paths.owners, paths.drafts, results, strict=True):
            if not self.fits(result):
                draft.stop = "length"
                ended.append((owner, draft))
        if not open_rows:
            return None, ended
        if ended:
            paths = paths.select(open_rows)
        for row, pending in enumerate(paths.pending):
            result = results[open_rows[row]]
            paths.drafts[row] = Segment("policy", [], parent=result)
            pending += result.token_ids
            self.prefill_tokens += len(result.token_ids)
        return paths, ended

    def results(self, drafts: list[Segment]) -> list[Segment]:
        """The result of each draft's call."""
        texts = [self.policy.decode(draft.token_ids) for draft in drafts]
        calls = [toolbox.read_call(text, self.tools) for text in texts]
        results = toolbox.run_calls(calls, self.tools, self.config.tool_time_limit)
        most = self.config.max_result_tokens
        token_ids = [self.policy.encode_result(result, most) for result in results]
        pairs = zip(drafts, token_ids, strict=True)
        return [Segment("tool", ids, parent=draft) for draft, ids in pairs]

    def may_call(self, draft: Segment) -> bool:
        used = sum(segment.author == "tool" for segment in draft.path())
        return draft.stop == "tool" and used < self.config.max_tool_calls

    def fits(self, node: Segment) -> bool:
        """Whether the trajectory still has room to answer after this result."""
        return sum(len(s.token_ids) for s in node.path()) < self.longest

    def left_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (R, W) each, of rows of different lengths."""
        W = max(1, *map(len, rows))
        ids = [[self.policy.pad_id] * (W - len(row)) + row for row in rows]
        mask = [[0] * (W - len(row)) + [1] * len(row) for row in rows]
        device = self.policy.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---- what is trained on -------------------------------------------------------------------


@contextmanager
def recomputed(policy: Policy, on: bool | None) -> Iterator[None]:
    """Gradient checkpointing: layers keep their input only and compute the rest again.

    transformers does it for layers in training mode; nothing else enters it, so no dropout acts.
    """
    layers = [m for m in policy.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = bool(on)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> Tensor:
    """Log-prob of every counted token with its gradient, (B, T); 0 elsewhere.

    Logits are made chunk by chunk from the hidden states of those tokens and made again in the
    backward pass: (B, T, V) never exists.
    """
    hidden = policy.lm.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state  # (B, T, D)
    b, t = batch.weight.nonzero(as_tuple=True)  # (n,)
    hidden = hidden[b, batch.parent[b, t]]  # (n, D) what predicts token t: the only shift there is
    target = batch.input_ids[b, t]  # (n,)

    def score(hidden: Tensor, target: Tensor) -> Tensor:
        logits = policy.lm.get_output_embeddings()(hidden).float() / temperature  # (n, V)
        return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]

    size = head_chunk(policy.lm.config.vocab_size)
    chunks = zip(hidden.split(size), target.split(size), strict=True)
    scored = [checkpoint(score, h, y, use_reentrant=False) for h, y in chunks]
    logp = torch.cat(scored)  # (n,)
    return logp.new_zeros(batch.weight.shape).index_put((b, t), logp)


def policy_loss(
    logp: Tensor, old_logp: Tensor, batch: Batch, config: Config, total: float, ref_logp=None
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, a mean over the `total` policy tokens of the whole batch (official code).

    Also returns for how many of those tokens the clip took the gradient away.
    """
    ratio = torch.exp(logp - old_logp)  # (B, T)
    objective = clipped_objective(
        ratio, batch.A_plus, batch.A_minus, config.clip_low, config.clip_high, config.dual_clip
    )
    loss = -objective.sum() / total  # A is 0 where nothing counts
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp)  # (B, T)
        loss = loss + config.kl_coefficient * (batch.weight * kl).sum() / total
    clipped = batch.n_plus * (ratio > 1 + config.clip_high)
    clipped = clipped + batch.n_minus * (ratio < 1 - config.clip_low)
    return loss, clipped.sum()


def reference_logprobs(policy: Policy, batches: list[Batch], config: Config) -> list:
    """Log-probs with the adapter switched off; no pass where nothing asks for them."""
    if not config.kl_coefficient:
        return [None for _ in batches]
    with policy.model.disable_adapter():
        return [token_logprobs(policy, batch, config.temperature) for batch in batches]


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> dict[str, float | None]:
    """`updates_per_rollout` optimizer steps on one rollout; one normaliser however it is split.

    A row that nothing pulls at (its group has equal rewards) counts in the mean and costs nothing.
    """
    total = sum(sum(row.weight) for row in rows)
    rows = [row for row in rows if row.pulls() or config.kl_coefficient]
    groups = list(micro_batches(rows, config.micro_batch_tokens))
    batches = [make_batch(some, policy.pad_id, policy.device, policy.lm.dtype) for some in groups]
    with torch.no_grad():
        ref_logps = reference_logprobs(policy, batches, config)
        several = config.updates_per_rollout > 1  # with one update the ratio is 1, no extra pass
        old_logps = [
            token_logprobs(policy, batch, config.temperature) if several else None
            for batch in batches
        ]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    sums, drifts = Counter(), []
    for i in range(config.updates_per_rollout):
        for p in parameters:
            p.grad = torch.zeros_like(p)  # not None: Adam's momentum acts also where no row pulls
        for some, batch, old_logp, ref_logp in zip(
            groups, batches, old_logps, ref_logps, strict=True
        ):
            with recomputed(policy, config.gradient_checkpointing):
                logp = token_logprobs(policy, batch, config.temperature)
            require_finite("a log-prob", logp, some, batch, logp)
            drifts += drift(logp.detach(), batch) if i == 0 else []
            old_logp = logp.detach() if old_logp is None else old_logp
            loss, clipped = policy_loss(logp, old_logp, batch, config, total, ref_logp)
            require_finite("the loss", loss, some, batch, logp)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            require_finite("the gradient norm", norm, some, batch, logp)
            sums["loss"] += loss.item()
            sums["clipped"] += clipped.item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
    tokens = total * config.updates_per_rollout
    return {
        "train_tokens": sum(map(len, rows)),
        "loss": sums["loss"] / config.updates_per_rollout,
        "clip_fraction": sums["clipped"] / tokens,
        "grad_norm": grad_norm.item(),
        "drift_mean": mean(drifts),
        "drift_max": max(drifts, default=None),
    }


def drift(logp: Tensor, batch: Batch) -> list[float]:
    """How far the trainer's log-probs are from those that the sampler drew its tokens with."""
    return (logp - batch.drawn)[~batch.drawn.isnan()].abs().tolist()


def require_finite(name: str, value: Tensor, rows: list[Row], batch: Batch, logp: Tensor) -> None:
    """NonFinite unless all of `value` is finite; it names the rows that are not, where it can."""
    wrong = ~value.isfinite()
    if wrong.any():
        if value is logp:  # (B, T)
            rows = [row for row, bad in zip(rows, wrong.any(dim=1).tolist(), strict=True) if bad]
        words = f"{name} is {value[wrong].flatten()[0].item()}"
        raise NonFinite(words, rows, {**vars(batch), "logp": logp})


# ---- reward and credit --------------------------------------------------------------------


def score(policy: Policy, leaf: Segment, question: Question, config: Config, tools: dict) -> Reward:
    """The reward of one trajectory, judged on its text and on who wrote which part of it."""
    turns = read_turns(policy, leaf)
    if config.official_rewards:
        return official_reward(official_transcript(turns), question.answers)
    return reward(turns, question.answers, tool_names=list(tools))


def read_turns(policy: Policy, leaf: Segment) -> list[tuple[str, str]]:
    """(author, text) of every segment after the prompt, without the eos."""
    turns = []
    for segment in leaf.path()[1:]:
        token_ids = segment.token_ids[:-1] if segment.stop == "eos" else segment.token_ids
        turns.append((segment.author, policy.decode(token_ids)))
    return turns


def official_transcript(turns: list[tuple[str, str]]) -> str:
    """One text; the official tool is called python where ours is a calculator."""
    return "".join(text for _, text in turns).replace("calculator>", "python>")


def credit(leaves: list[Segment], rewards: list[Reward], config: Config) -> list[Row]:
    """Rewards of one question -> advantages of its leaves -> of its segments -> rows to train."""
    A = group_advantages([reward.total for reward in rewards])  # (M,)
    below = shared_by(leaves)
    advantages = {
        segment: dict(zip((leaves[i] for i in below[segment]), values.tolist(), strict=True))
        for segment, values in segment_advantages(leaves, A, config.shared_weight).items()
    }
    alone = [[leaf] for leaf in leaves]
    together = cut(leaves, config.micro_batch_tokens) if config.packed else alone
    return [make_row(some, advantages) for some in together]


def seed_all(number: int) -> None:
    """torch, and python's and numpy's global generators, which a tool may draw from."""
    transformers.set_seed(number % 2**32)


# ---- evaluation ---------------------------------------------------------------------------


def evaluate(
    policy: Policy,
    questions: list[Question],
    config: Config,
    tools: dict,
    samples: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """`samples` independent trajectories for each question: one record a question.

    It seeds itself: the same policy, questions and settings give the same records.
    """
    alone = dataclasses.replace(
        config, group_size=samples, initial_rollouts=samples, branch_rule="none"
    )
    records = []
    while len(records) < len(questions):
        left = questions[len(records) :]

        def roll_out(config: Config, left=left) -> tuple[list, list]:
            some = left[: max(1, config.rollout_rows // samples)]
            seed_all(config.seed * 1_000_003 + len(records))
            return some, Rollout(policy, config, tools, random.Random(config.seed)).run(some)

        most = len(left) * samples
        some, groups = policy.chunks.retry("rollout_rows", alone, roll_out, largest=most)
        for question, leaves in zip(some, groups, strict=True):
            rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
            pairs = zip(leaves, rewards, strict=True)
            judged = [judge_leaf(policy, leaf, question, r, config) for leaf, r in pairs]
            records.append(
                {
                    "question": question.text,
                    "domain": question.domain,
                    "accuracy": [r.accuracy for r in rewards],
                    "well_formed": [r.well_formed for r in rewards],
                    **{name: [scores[name] for scores in judged] for name in judged[0]},
                    **tree_counts(leaves),
                }
            )
        on_progress(len(some))
    return records


def judge_leaf(policy: Policy, leaf: Segment, question: Question, r: Reward, config: Config):
    """What it answers, and how good that is by each measure of metrics.py."""
    turns = read_turns(policy, leaf)
    if config.official_rewards:
        is_math = question.domain == "math"
        return official_judge(official_transcript(turns), question.answers, is_math)
    return judge(turns, question.answers, r.well_formed)


def tree_counts(leaves: list[Segment]) -> dict[str, float | None]:
    """What the trees over these leaves took: each segment counts once, however many share it."""
    segments = list(shared_by(leaves))
    policy = [segment for segment in segments if segment.author == "policy"]
    calls = [segment for segment in segments if segment.author == "tool"]
    first = [s.entropy for s in policy if s.parent.author == "prompt"]
    after = [s.entropy for s in policy if s.parent.author == "tool"]
    return {
        "tool_calls": len(calls),
        "forks": sum(segment.decision.granted for segment in calls if segment.decision),
        "generated_tokens": sum(len(segment.token_ids) for segment in policy),
        # what the prefixes cost if every turn read them again
        "reread_tokens": sum(len(s.token_ids) for segment in policy for s in segment.path()[:-1]),
        "entropy_initial": mean(first),
        "entropy_after_tool": mean(after),
    }


# ---- training -----------------------------------------------------------------------------


def questions_of_step(questions: list[Question], step: int, config: Config) -> list[Question]:
    """What step 1, 2, .. asks: every question once in a random order, then again in another."""
    asked, orders, n = [], {}, config.questions_per_step
    for i in range((step - 1) * n, step * n):
        epoch, at = divmod(i, len(questions))
        if epoch not in orders:
            rng = random.Random(f"order {config.seed} {epoch}")
            orders[epoch] = rng.sample(questions, len(questions))
        asked.append(orders[epoch][at])
    return asked


def train_step(
    policy: Policy, optimizer, questions: list[Question], config: Config, tools, step: int
) -> tuple[dict, list[list[Segment]], list[list[Reward]]]:
    """One step of ARPO: its metrics, and the leaves and their rewards for each question.

    All that it draws depends on the seed and the number of the step alone.
    """
    started = time.perf_counter()

    def roll_out(config: Config) -> tuple[Rollout, list[list[Segment]]]:
        seed_all(config.seed * 1_000_003 + step)
        rollout = Rollout(policy, config, tools, random.Random(f"rollout {config.seed} {step}"))
        return rollout, rollout.run(questions)  # M leaves for each question

    most = len(questions) * config.group_size
    rollout, groups = policy.chunks.retry("rollout_rows", config, roll_out, largest=most)
    rewards = [
        [score(policy, leaf, question, config, tools) for leaf in leaves]
        for question, leaves in zip(questions, groups, strict=True)
    ]
    rolled_out = time.perf_counter()

    def learn(config: Config) -> dict[str, float | None]:
        rows = [row for pair in zip(groups, rewards, strict=True) for row in credit(*pair, config)]
        return update(policy, optimizer, rows, config)

    lengths = [sum(len(s.token_ids) for s in leaf.path()) for group in groups for leaf in group]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    stats = policy.chunks.retry(
        "micro_batch_tokens",
        config,
        learn,
        smallest=max(lengths),
        largest=sum(lengths),
        undo=snapshot(parameters, optimizer),
    )
    metrics = {
        **step_metrics(groups, rewards),
        "short_answers": short_answers(policy, groups),
        "prefill_tokens": rollout.prefill_tokens,
        **stats,
        "seconds_rollout": rolled_out - started,
        "seconds_update": time.perf_counter() - rolled_out,
    }
    return metrics, groups, rewards


def step_metrics(groups: list[list[Segment]], rewards: list[list[Reward]]) -> dict:
    """What the trees of one step, and their rewards, look like."""
    leaves = [leaf for group in groups for leaf in group]
    all_rewards = [r for some in rewards for r in some]
    return {
        "reward": mean([r.total for r in all_rewards]),
        "accuracy": mean([r.accuracy == 1 for r in all_rewards]),
        "well_formed": mean([r.well_formed for r in all_rewards]),
        "groups": len(groups),
        "equal_groups": sum(len({r.total for r in some}) == 1 for some in rewards),
        "rollouts": len(leaves),
        **tree_counts(leaves),
        "entropy": mean([h for leaf in leaves for s in leaf.path() for h in s.token_entropy]),
        "train_tokens_unpacked": sum(len(s.token_ids) for leaf in leaves for s in leaf.path()),
    }


def short_answers(policy: Policy, groups: list[list[Segment]]) -> float:
    """Share of the trajectories that end with fewer tokens than an empty answer in its tags has."""
    empty = "<think></think><answer>\\boxed{}</answer>"
    least = len(policy.tokenizer.encode(empty, add_special_tokens=False))
    ended = [leaf for leaves in groups for leaf in leaves]
    return mean([leaf.stop in ("answer", "eos") and len(leaf.token_ids) < least for leaf in ended])


def train(
    config: Config, tools: dict[str, toolbox.Tool] | None = None, resume: Path | None = None
) -> int:
    """Roll out, reward, credit, update, log; evaluate before, now and then, and after."""
    if config.temperature == 0:
        raise UserError("--temperature 0: training needs samples that differ; it must be above 0")
    if config.top_p != 1:
        raise UserError(f"--top_p {config.top_p}: training scores the whole distribution; legal: 1")
    questions, test = load_questions(config.dataset_path), load_questions(config.eval_path)
    tools = tools or make_tools(config)
    with RunFolder(config, resume) as run:
        torch.manual_seed(config.seed)  # the fresh adapter
        policy = load_policy(dataclasses.replace(config, adapter=run.adapter), tools, True)
        refuse_long(policy, questions, config.dataset_path, config)
        refuse_long(policy, test, config.eval_path, config)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        run.start(policy.model, optimizer, policy.chunks, policy.prompt("question"))
        with progress_bar() as bar:
            before = look(run, policy, test, tools, bar, step=0)
            task = bar.add_task("train", total=config.steps, completed=run.step)
            bar.console.print(LOG_HEAD)
            for step in range(run.step + 1, config.steps + 1):
                if step > 1 and config.eval_every and (step - 1) % config.eval_every == 0:
                    look(run, policy, part_of(test, config.eval_part), tools, bar, step - 1)
                asked = questions_of_step(questions, step, config)
                with watched(run, policy, asked, step):
                    metrics, *trees = train_step(policy, optimizer, asked, config, tools, step)
                run.log({"step": step, **metrics})
                bar.console.print(log_line(step, metrics, remarks(run.metrics)))
                if config.record_every and (step - 1) % config.record_every == 0:
                    record(run, policy, step, asked, *trees)
                run.complete(step)
                bar.advance(task)
            bar.remove_task(task)
            after = look(run, policy, test, tools, bar, step=config.steps)
        console.print(comparison(before, after))
        console.print(run.in_words(), markup=False, soft_wrap=True)
    return 0


def look(run: RunFolder, policy: Policy, questions: list[Question], tools, bar, step: int) -> dict:
    """Accuracy sampled at temperature 1, and greedy; a resumed run may have it already."""
    figures = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        which = {"step": step, "decoding": name}
        figures[name] = run.evaluated(**which, questions=len(questions))
        if figures[name] is None:
            config = dataclasses.replace(run.config, temperature=temperature)
            on_progress = advance(bar, f"evaluate, {name}", questions)
            with watched(run, policy, questions, step):
                records = evaluate(policy, questions, config, tools, on_progress=on_progress)
            figures[name] = summary(records)
            run.log_evaluation({**which, **figures[name]})
    sampled, greedy = figures["sampled"], figures["greedy"]
    bar.console.print(
        f"[bold]step {step}: test accuracy {sampled['accuracy']:.1%} sampled, "
        f"{greedy['accuracy']:.1%} greedy[/] ({sampled['questions']} questions)"
    )
    return figures


def part_of(questions: list[Question], per_domain: int) -> list[Question]:
    """The first few questions of every domain, for a quick look while training."""
    seen: Counter = Counter()
    some = []
    for question in questions:
        seen[question.domain] += 1
        if seen[question.domain] <= per_domain:
            some.append(question)
    return some


RECORDED = 2  # questions of a recorded step whose trees are kept


def record(run: RunFolder, policy: Policy, step: int, questions, groups, rewards) -> None:
    """The trees of some questions, to draw them later."""
    for each in list(zip(questions, groups, rewards, strict=True))[:RECORDED]:
        run.append("rollouts.jsonl", {"step": step, **tree_record(policy, *each, run.config)})


def tree_record(
    policy: Policy, question: Question, leaves: list[Segment], rewards: list[Reward], config: Config
) -> dict:
    """A question's tree as plain data: nodes name their parent by index, leaves name their node."""
    A = group_advantages([r.total for r in rewards]).tolist()
    credits = segment_advantages(leaves, torch.tensor(A), config.shared_weight)
    most = math.log(policy.lm.config.vocab_size)  # nats
    index = {segment: i for i, segment in enumerate(shared_by(leaves))}
    nodes = [
        {
            "parent": index.get(segment.parent),
            "author": segment.author,
            "tokens": [policy.decode([token]) for token in segment.token_ids],
            "stop": segment.stop,
            "entropy": segment.entropy,
            "token_entropy": [round(h / most, 4) for h in segment.token_entropy] or None,
            "advantage": credits[segment].mean().item() if segment in credits else None,
            "decision": dataclasses.asdict(segment.decision) if segment.decision else None,
        }
        for segment in index
    ]
    return {
        "question": question.text,
        "answers": question.answers,
        "domain": question.domain,
        "nodes": nodes,
        "leaves": [
            {"node": index[leaf], "advantage": a, **dataclasses.asdict(r)}
            for leaf, r, a in zip(leaves, rewards, A, strict=True)
        ],
    }


# ---- command line -------------------------------------------------------------------------


def make_tools(config: Config) -> dict[str, toolbox.Tool]:
    """The built-in tools, by name."""
    c = config
    try:
        return toolbox.default_tools(c.documents_path, c.search_results, c.search_chars)
    except (OSError, ValueError) as error:
        raise UserError(f"--documents_path {c.documents_path}: {reason(error)}") from None


def eval_command(config: Config, samples: int, pass_k: int | None, json_path: str | None) -> int:
    """Answers to a file of questions, sampled and greedy: how many are right, and what they took.

    Settings of the paper: --temperature 0.6 --top_p 0.95 --samples 5. The measures: metrics.py.
    """
    k = samples if pass_k is None else pass_k
    if not 1 <= k <= samples:
        raise UserError(f"--samples {samples} --pass_k {k}: it must be 1 <= pass_k <= samples")
    questions, tools = load_questions(config.eval_path), make_tools(config)
    policy = load_policy(config, tools, trainable=False)
    refuse_long(policy, questions, config.eval_path, config)
    if json_path:
        write_text("--json", json_path, "", mode="a")  # better refused now than after the work
    figures = {}
    with progress_bar() as bar:
        for name, temperature, n in (("sampled", config.temperature, samples), ("greedy", 0.0, 1)):
            asked = dataclasses.replace(config, temperature=temperature)
            records = evaluate(policy, questions, asked, tools, n, advance(bar, name, questions))
            figures[name] = {**summary(records, min(k, n)), "records": records}
            console.print(report_table(name, figures[name]), effort_table(figures[name]))
    if json_path:
        value = {"config": dataclasses.asdict(config), **figures}
        write_text("--json", json_path, json.dumps(value, indent=2) + "\n")
    return 0


def write_text(flag: str, path: str, text: str, mode: str = "w") -> None:
    """What a flag asked to be written; a lone surrogate in it becomes a question mark."""
    try:
        with open(path, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{flag} {path}: {reason(error)}") from None


EXAMPLES = {
    "deep_search": Question(  # four searches and the calculator
        "How many workers do the workshop of Orla Ulver and the workshop of Hilde Nyberg employ "
        "together?",
        ["63"],
        "deep_search",
    ),
    "divisible": Question(
        "What is the smallest positive whole number n for which 2^n + 3^n is divisible by 7?",
        ["3"],
        "math",
    ),
}


def show_command(
    config: Config, text: str | None, answer: str | None, example: str | None, html: str | None
) -> int:
    """Roll out one question and draw its tree: entropy, tool results, decisions, rewards."""
    question = question_to_show(config, text, answer, example)
    tools = make_tools(config)
    torch.manual_seed(config.seed)
    policy = load_policy(config, tools, trainable=False)
    if html:
        write_text("--html", html, "", mode="a")  # better refused now than after the work

    def roll_out(config: Config) -> list[list[Segment]]:
        return Rollout(policy, config, tools, random.Random(config.seed)).run([question])

    (leaves,) = policy.chunks.retry("rollout_rows", config, roll_out, largest=config.group_size)
    rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
    record = tree_record(policy, question, leaves, rewards, config)
    console.print(draw_tree(record))
    if html:
        settings = dataclasses.asdict(config)
        run = Run("show", settings, trees=[tree(record, settings)])
        write_text("--html", html, page("arpo_mini: a rollout", [run]))
    answer = ", ".join(question.answers) or "unknown; name it with --answer"
    console.print(f"answer: {one_line(answer)}", markup=False)
    return 0


def question_to_show(
    config: Config, text: str | None, answer: str | None, example: str | None
) -> Question:
    """One's own question, an example, or the deep search among the questions of eval_path."""
    if example is not None and text is not None:
        raise UserError(f"--example {example} --question {text}: name one of the two")
    if example is not None:
        return EXAMPLES[example]
    known = load_questions(config.eval_path)
    if text is not None:
        own = Question(text, [answer] if answer else [])
        return next((q for q in known if q.text == text), own)
    ready = [q for q in known if q == EXAMPLES["deep_search"]]
    return next(iter(ready + [q for q in known if q.domain == "deep_search"] + known))


def train_command(config: Config, resume: Path | None) -> int:
    """Train a policy: evaluate, roll out and update step by step, evaluate again."""
    return train(config, resume=resume)


COMMANDS = {  # name: (function, flags it has beside those of Config)
    "train": (
        train_command,
        {
            "--resume": {
                "nargs": "?",
                "const": "",
                "metavar": "DIR",
                "help": "go on with the run in this folder (default: the newest of --output_dir)",
            }
        },
    ),
    "eval": (
        eval_command,
        {
            "--samples": {"type": int, "default": 1, "help": "trajectories for each question"},
            "--pass_k": {"type": int, "help": "k of pass@k (default: samples)"},
            "--json": {"help": "write the figures and every question's record to this file"},
        },
    ),
    "show": (
        show_command,
        {
            "--question": {"help": "the question (default: a deep search of the mini-world)"},
            "--answer": {"help": "its right answer, where the question is your own"},
            "--example": {"choices": tuple(EXAMPLES), "help": "a question that is ready"},
            "--html": {"help": "write the tree to this file too, as a page for a browser"},
        },
    ),
}


def parse_command(args: list[str]) -> Callable[[], int]:
    """The command that was asked for, with its settings, ready to run."""
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if args else 2)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    command, own_flags = COMMANDS[name]
    parser = Parser(prog=f"arpo_mini.py {name}", description=command.__doc__, allow_abbrev=False)
    for flag, options in own_flags.items():
        parser.add_argument(flag, **options)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from")
    for item in dataclasses.fields(Config):
        if name == "train":
            parser.add_field(item)
        elif item.name != "dataset_path":  # there, --dataset_path names what is evaluated on
            parser.add_field(item, *(["--dataset_path"] if item.name == "eval_path" else []))
    values = parser.parse(args[1:])
    values = {**PRESETS.get(values.pop("preset"), {}), **values}  # what was typed stays
    if values.get("resume") is not None:
        values = resumed(values, Config)
    own = [values.pop(flag.removeprefix("--")) for flag in own_flags]
    config = Config(**values)
    return lambda: command(config, *own)


def main(args: list[str]) -> int:
    try:
        return parse_command(args)()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except NonFinite as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
