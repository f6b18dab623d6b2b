"""How good are the answers: trajectories of test questions, their figures, and the table's numbers.

An agent (engine, handed in by arpo_mini.py) rolls out and examines:

    agent.roll_out(questions, config, seed)           leaves and rewards of each question
    agent.examine(leaf, question, reward, config)     {"prediction", "em", "f1", "math_equal", ..}
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from functools import partial

from rich.progress import Progress

from app.config import Config
from app.records import mean, tree_counts
from app.run_folder import RunFolder
from app.screen import say
from data.formats import Question


def evaluate(
    agent,
    questions: list[Question],
    config: Config,
    samples: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """`samples` independent trajectories for each question: one record a question.

    Each part of the questions has a seed of its own: the same policy, questions and settings give
    the same records, whatever was drawn before. `on_progress` is told how many more are done.
    """
    alone = {"group_size": samples, "initial_rollouts": samples, "branch_rule": "none"}
    config = dataclasses.replace(config, **alone)
    n = max(1, config.rollout_rows // samples)
    records: list[dict] = []
    while len(records) < len(questions):
        some = questions[len(records) : len(records) + n]
        groups, rewards = agent.roll_out(some, config, config.seed * 1_000_003 + len(records))
        for question, leaves, of_leaves in zip(some, groups, rewards, strict=True):
            pairs = zip(leaves, of_leaves, strict=True)
            scores = [agent.examine(leaf, question, r, config) for leaf, r in pairs]
            records.append(
                {
                    "question": question.text,
                    "domain": question.domain,
                    "accuracy": [r.accuracy for r in of_leaves],
                    "well_formed": [r.well_formed for r in of_leaves],
                    **{name: [each[name] for each in scores] for name in scores[0]},
                    **tree_counts(leaves),
                }
            )
        on_progress(len(some))
    return records


# ---- while training -----------------------------------------------------------------------


def evaluate_midway(
    run: RunFolder, agent, questions: list[Question], bar: Progress, step: int
) -> dict | None:
    """Figures after `step` steps: {"sampled": at temperature 1}, at both ends also {"greedy"}.

    A resumed run has logged them already. None where they can no longer be had, for the policy has
    gone on since, and with --eval_part 0.
    """
    if run.config.eval_part == 0:
        return None
    figures = {}
    ends = step in (0, run.config.steps)
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0))[: 1 + ends]:
        which = {"step": step, "decoding": name}
        figures[name] = run.evaluated(**which, questions=len(questions))
        if figures[name] is None and run.step > step:
            say(f"the evaluation after step {step} is not in evaluations.jsonl: left out")
            return None
        if figures[name] is None:
            config = dataclasses.replace(run.config, temperature=temperature)
            task = bar.add_task(f"evaluate, {name}", total=len(questions))
            on_progress = partial(bar.advance, task)
            figures[name] = summary(evaluate(agent, questions, config, on_progress=on_progress))
            bar.remove_task(task)
            run.log_evaluation({**which, **figures[name]})
    shares = ", ".join(f"{figures[name]['accuracy']:.1%} {name}" for name in figures)
    words = f"[bold]step {step}: test accuracy {shares}[/] ({len(questions)} questions)"
    bar.console.print(words, soft_wrap=True)
    return figures


def first_per_domain(questions: list[Question], n: int) -> list[Question]:
    """The first n questions of every domain."""
    seen: Counter = Counter()
    some = []
    for question in questions:
        seen[question.domain] += 1
        if seen[question.domain] <= n:
            some.append(question)
    return some


# ---- many answers -------------------------------------------------------------------------


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that k of n samples hold a right one, unbiased (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p seen on n questions (Wilson 1927)."""
    z = 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def summary(records: list[dict], k: int | None = None) -> dict:
    """Shares over all records and for each domain, each record with n trajectories of a question.

    A trajectory is right when its accuracy is 1 or its answer is mathematically equal.
    `tool_productivity` is right answers per tool call (None without calls), and
    `official_productivity` the released code's, from math_equal in the domain math, else from F1.
    """

    def figures(some: list[dict]) -> dict:
        n = len(some[0]["accuracy"])
        pairs = [zip(r["accuracy"], r["math_equal"], strict=True) for r in some]
        right = [sum(a == 1 or equal == 1 for a, equal in pair) for pair in pairs]
        accuracy = mean([count / n for count in right])
        calls = mean([record["tool_calls"] / n for record in some])
        official = mean([mean(r["math_equal" if r["domain"] == "math" else "f1"]) for r in some])
        return {
            "questions": len(some),
            "accuracy": accuracy,
            "interval": wilson(accuracy, len(some)),
            "pass@1": mean([pass_at_k(count, n, 1) for count in right]),
            f"pass@{k or n}": mean([pass_at_k(count, n, k or n) for count in right]),
            **{name: mean([mean(r[name]) for r in some]) for name in ("em", "f1", "math_equal")},
            "well_formed": mean([mean(record["well_formed"]) for record in some]),
            "tool_calls": calls,
            "tool_productivity": accuracy / calls if calls else None,
            "official_productivity": official_productivity(official, calls),
            "entropy_initial": mean([record["entropy_initial"] for record in some]),
            "entropy_after_tool": mean([record["entropy_after_tool"] for record in some]),
        }

    domains = sorted({record["domain"] for record in records})
    by_domain = {d: figures([r for r in records if r["domain"] == d]) for d in domains}
    return {**figures(records), "domains": by_domain}


def official_productivity(accuracy: float, calls: float) -> float:
    """`tool_productivity` of evaluator.py: near the accuracy in percent, unless calls are rare."""
    return 100 * accuracy * calls / (calls + 0.1)
