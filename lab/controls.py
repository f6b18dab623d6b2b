"""What a comparison changes in the algorithm itself: the controls of a step's budget.

Each function replaces functions of arpo_mini.py in the process of one run.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter

import transformers

import arpo_mini
from advantage import Segment
from arpo_mini import Budget, grow, judge, spend_rest

CONTINUATIONS = 4  # of a tool result, from which the oracle knows how much their rewards differ
SIGMA = 1.0  # k of the threshold mean + k * std


def after() -> None:
    """All forks wait until the first paths have ended: nothing is above the threshold."""
    arpo_mini.running_threshold = lambda scores, wanted: math.inf


def sigma() -> None:
    """The threshold is mean + k * std of the last steps' scores, as in a blog on ARPO."""

    def threshold(scores, wanted: float) -> float:
        known = [score for step in scores for score in step]
        if len(known) < 2:
            return math.inf
        return statistics.fmean(known) + SIGMA * statistics.pstdev(known)

    arpo_mini.running_threshold = threshold


def shuffled() -> None:
    """Forks afterwards, by the step's entropies, dealt anew: a result seldom gets its own."""
    after()

    def spend(budget: Budget, config) -> list[Segment]:
        results = [node for node in budget.places if node.decision]
        scores = [budget.places[node] for node in results]
        budget.rng.shuffle(scores)
        budget.places |= zip(results, scores, strict=True)
        return spend_rest(budget, config)

    arpo_mini.spend_rest = spend


def oracle() -> None:
    """Forks afterwards, where the rewards of some continuations differ most: a ceiling.

    What the continuations cost is not counted, and nothing is trained on them.
    """
    after()
    rollout, now = arpo_mini.rollout, {}

    def watched(writer, questions, config, tools, seed, scores=()):
        now.update(writer=writer, questions=questions, tools=tools)
        return rollout(writer, questions, config, tools, seed, scores)

    def spend(budget: Budget, config) -> list[Segment]:
        results = [node for node in budget.places if node.decision]
        if budget.slots and results and budget.most:
            budget.rng.shuffle(results)  # few spreads are possible: equal ones in any order
            found = spreads(budget, results, config, **now)
            budget.places = dict.fromkeys(results) | budget.places | found
        return spend_rest(budget, config)

    arpo_mini.rollout, arpo_mini.spend_rest = watched, spend


def spreads(budget: Budget, results, config, writer, questions, tools) -> dict[Segment, float]:
    """Tool result -> variance of the rewards of what goes on from there."""
    roots = [node for node in budget.places if node.author == "prompt"]  # as they were asked
    asked = dict(zip(roots, questions, strict=True))
    begun = [node for node in results for _ in range(CONTINUATIONS)]
    # A slot that nobody may take: nothing forks, and what the results share stays in the cache.
    kept = Budget(1, random.Random(0), most=0, places=dict(budget.places))
    own = dict.fromkeys(asked, kept)
    before = writer.prefill_tokens
    rewards = {node: [] for node in results}
    for leaf in grow(writer, begun, own, config, tools):
        # results may stand on one path: a leaf belongs to the last of them
        node = next(segment for segment in reversed(leaf.path()) if segment in rewards)
        rewards[node].append(judge(writer.policy, leaf, asked[leaf.path()[0]], config).total)
    writer.prefill_tokens = before
    return {node: statistics.pvariance(some) for node, some in rewards.items()}


def live() -> None:
    """GRPO that asks twice, then those whose two rewards differ, up to max_leaves (8) each."""

    def rollout(writer, questions, config, tools, seed, scores=()):
        transformers.set_seed(seed % 2**32)
        roots = [Segment("prompt", writer.policy.prompt(q.text)) for q in questions]
        asked = dict(zip(roots, questions, strict=True))
        N, left = config.initial_rollouts, len(roots) * config.group_size
        # A slot that nobody may take: nothing forks, and the prompts stay in the cache.
        budgets = {root: Budget(1, random.Random(0), most=0) for root in roots}
        leaves = grow(writer, [root for root in roots for _ in range(N)], budgets, config, tools)
        rewards = {root: set() for root in roots}
        for leaf in leaves:
            root = leaf.path()[0]
            rewards[root].add(judge(writer.policy, leaf, asked[root], config).total)
        first = sorted(roots, key=lambda root: len(rewards[root]) == 1)
        given = Counter(dict.fromkeys(roots, N))
        while sum(given.values()) < left:
            some = [root for root in first if len(rewards[root]) > 1]
            most = config.max_leaves or 2 * config.group_size
            some = [root for root in some or roots if given[root] < most] or roots
            root = min(some, key=lambda root: given[root])
            given[root] += 1
        more = [root for root in roots for _ in range(given[root] - N)]
        leaves += grow(writer, more, budgets, config, tools)
        return [[leaf for leaf in leaves if leaf.path()[0] is root] for root in roots]

    arpo_mini.rollout = rollout
