"""shim"""
from __future__ import annotations
import dataclasses, math, random
import torch
from advantage import *
from advantage import Segment, Reward, shared_by, group_advantages, segment_advantages
from app.evaluation import mean
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


def questions_of_step(questions, step: int, config) -> list:
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


def tree_record(
    policy, question, leaves: list[Segment], rewards: list[Reward], config
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


