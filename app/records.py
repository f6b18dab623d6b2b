"""What is kept of a step and of a tree, as plain data: figures for the log, trees to draw later."""

from __future__ import annotations

import dataclasses
import math
import random

import torch

from advantage import Reward, Segment, group_advantages, segment_advantages, shared_by
from app.config import Config
from data.formats import Question

RECORD_EVERY = 10  # steps: the trees of steps 1, 11, 21, .. are kept
RECORDED = 2  # questions of such a step whose trees are kept


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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


def step_metrics(groups: list[list[Segment]], rewards: list[list[Reward]]) -> dict:
    """What the trees of one step, and their rewards, look like.

    `wishes` is the share of the tool results at which the rule wanted a fork, whether or not there
    was a place for it; None where nothing was decided.
    """
    leaves = [leaf for group in groups for leaf in group]
    decisions = [segment.decision for segment in shared_by(leaves) if segment.decision]
    all_rewards = [r for some in rewards for r in some]
    return {
        "reward": mean([r.total for r in all_rewards]),
        "accuracy": mean([r.accuracy == 1 for r in all_rewards]),
        "well_formed": mean([r.well_formed for r in all_rewards]),
        "groups": len(groups),
        "equal_groups": sum(len({r.total for r in some}) == 1 for some in rewards),
        "rollouts": len(leaves),
        **tree_counts(leaves),
        "wishes": mean([decision.forks > 0 for decision in decisions]),
        "entropy": mean([h for leaf in leaves for s in leaf.path() for h in s.token_entropy]),
        "train_tokens_unpacked": sum(len(s.token_ids) for leaf in leaves for s in leaf.path()),
    }


def short_answers(policy, groups: list[list[Segment]]) -> float:
    """Share of the trajectories that end with fewer tokens than an empty answer in its tags has."""
    least = len(policy.encode("<think></think><answer>\\boxed{}</answer>"))
    ended = [leaf for leaves in groups for leaf in leaves]
    return mean([leaf.stop in ("answer", "eos") and len(leaf.token_ids) < least for leaf in ended])


def scores_of(groups: list[list[Segment]]) -> list[float]:
    """What tool results were ranked by, of all of a step."""
    segments = shared_by([leaf for leaves in groups for leaf in leaves])
    return [segment.decision.rank for segment in segments if segment.decision]


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


def record_trees(run, policy, step: int, questions, groups, rewards) -> None:
    """The trees of the first questions of every tenth step, to draw them later."""
    if (step - 1) % RECORD_EVERY == 0:
        for each in list(zip(questions, groups, rewards, strict=True))[:RECORDED]:
            run.append("rollouts.jsonl", {"step": step, **tree_record(policy, *each, run.config)})


def tree_record(
    policy, question: Question, leaves: list[Segment], rewards: list[Reward], config: Config
) -> dict:
    """A question's tree as plain data: nodes name their parent by index, leaves name their node."""
    A = group_advantages([r.total for r in rewards]).tolist()
    credits = segment_advantages(leaves, torch.tensor(A), config.shared_weight)
    most = math.log(policy.vocab_size)  # nats
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
