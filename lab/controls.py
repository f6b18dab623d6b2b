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
from data.formats import Question
from engine.model import Policy
from engine.writer import Writer

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
    """Forks afterwards, by the entropies of the step in a random order; few keep their place."""
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


def continued(writer: Writer, nodes, k: int, config, tools, kept=()) -> dict[Segment, list]:
    """Node (prompt or tool result) -> the leaves of k paths that go on from it, without forks.

    Prompts among the nodes, and what is in `kept`, stay in the writer's cache.
    """
    budget = Budget(1, random.Random(0), most=0, places=dict.fromkeys(kept, 0.0))  # never spent
    repeated, found = [node for node in nodes for _ in range(k)], {node: [] for node in nodes}
    for leaf in grow(writer, repeated, {n.path()[0]: budget for n in nodes}, config, tools):
        # nodes may stand on one path: a leaf belongs to the last of them
        found[[segment for segment in leaf.path() if segment in found][-1]].append(leaf)
    return found


def rewards(policy: Policy, leaves: list[Segment], question: Question, config) -> list[float]:
    return [judge(policy, leaf, question, config).total for leaf in leaves]


def spreads(budget: Budget, results, config, writer, questions, tools) -> dict[Segment, float]:
    """Tool result -> variance of the rewards of what goes on from there."""
    roots = [node for node in budget.places if node.author == "prompt"]  # as they were asked
    asked, before = dict(zip(roots, questions, strict=True)), writer.prefill_tokens
    found = continued(writer, results, CONTINUATIONS, config, tools, kept=budget.places)
    writer.prefill_tokens = before
    won = {n: rewards(writer.policy, x, asked[n.path()[0]], config) for n, x in found.items()}
    return {node: statistics.pvariance(some) for node, some in won.items()}


def live() -> None:
    """GRPO that asks twice, then those whose two rewards differ, up to max_leaves (8) each."""

    def rollout(writer, questions, config, tools, seed, scores=()):
        transformers.set_seed(seed % 2**32)
        roots = [Segment("prompt", writer.policy.prompt(q.text)) for q in questions]
        asked = dict(zip(roots, questions, strict=True))
        N, left = config.initial_rollouts, len(roots) * config.group_size
        groups = continued(writer, roots, N, config, tools)
        won = {r: {*rewards(writer.policy, groups[r], q, config)} for r, q in asked.items()}
        differ = [root for root in roots if len(won[root]) > 1]
        given = Counter(dict.fromkeys(roots, N))
        most = config.max_leaves or 2 * config.group_size
        while sum(given.values()) < left:
            some = [root for root in differ or roots if given[root] < most] or roots
            given[min(some, key=given.get)] += 1
        more = [root for root in roots for _ in range(given[root] - N)]
        for root, leaves in continued(writer, more, 1, config, tools).items():
            groups[root] += leaves
        return list(groups.values())

    arpo_mini.rollout = rollout
