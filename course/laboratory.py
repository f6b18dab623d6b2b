"""The laboratory of exercise 8: three branch rules, trained and tested alike.

GRPO begins all M trajectories at the question. A rule of one's own begins one and forks. So does
the control, which forks at random results, as often as that rule wished to. Everything else is
equal: model, questions, seed, M. Small enough for 2 minutes on a laptop: 4 questions a step, and a
test of 60 questions with 4 answers each.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from advantage import Reward, Segment
from app.config import Config
from app.evaluation import evaluate, first_per_domain
from app.records import questions_of_step
from arpo_mini import load_agent, train_step
from course.checking import require
from data.formats import load_questions
from entropy import RULES

CONFIG = Config(questions_per_step=4)
TEST_PER_DOMAIN, SAMPLES = 20, 4


@dataclass
class Outcome:
    name: str
    groups: list[list[Segment]]  # the leaves of every question that was trained on
    rewards: list[list[Reward]]  # and theirs
    accuracy: list[float]  # of each test question: the mean of its answers


def trained(name: str, config: Config, steps: int) -> Outcome:
    """So many steps of training from the shipped policy, then the test."""
    agent = load_agent(config, trainable=True)
    optimizer = torch.optim.AdamW(
        agent.policy.parameters, lr=config.learning_rate, weight_decay=0.0
    )
    questions, groups, rewards = load_questions(config.dataset_path), [], []
    for step in range(1, steps + 1):
        asked = questions_of_step(questions, step, config)
        _, leaves, judged = train_step(agent.policy, optimizer, asked, config, agent.tools, step)
        groups += leaves
        rewards += judged
    test = first_per_domain(load_questions(config.eval_path), TEST_PER_DOMAIN)
    records = evaluate(agent, test, config, SAMPLES)
    return Outcome(name, groups, rewards, [sum(r["accuracy"]) / SAMPLES for r in records])


def experiment(my_rule: Callable, wish_rate: Callable, steps: int) -> list[Outcome]:
    """GRPO, the rule, and its control."""
    RULES["mine"] = my_rule
    mine = trained("my rule", dataclasses.replace(CONFIG, branch_rule="mine"), steps)
    rate = wish_rate(mine.groups)
    hint = "nothing to compare with; `arpo_mini.py show` prints the entropies"
    require(0 < rate < 1, f"your rule wished to fork at {rate:.0%} of the results: {hint}")
    grpo = {"branch_rule": "none", "initial_rollouts": CONFIG.group_size}
    control = {"branch_rule": "random", "branch_probability": rate}
    return [
        trained("GRPO", dataclasses.replace(CONFIG, **grpo), steps),
        mine,
        trained(f"random, {rate:.0%}", dataclasses.replace(CONFIG, **control), steps),
    ]


def table(outcomes: list[Outcome], tool_calls: Callable, interval: Callable) -> str:
    """Calls of the training beside the accuracy after it; differences with their intervals."""
    grpo, mine, control = outcomes
    lines = [f"{'':<14}{'tool calls':>10}{'accuracy':>10}"]
    for each in outcomes:
        accuracy = sum(each.accuracy) / len(each.accuracy)
        lines.append(f"{each.name:<14}{tool_calls(each.groups):>10}{accuracy:>10.1%}")
    for other in (grpo, control):
        mean, low, high = interval(mine.accuracy, other.accuracy)
        name = f"my rule - {other.name}"
        lines.append(f"{name}: {100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")
    return "\n".join(lines)
