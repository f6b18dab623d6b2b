"""The trees of one question under one branch rule or two: in a terminal, or as a page."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from app.config import Config
from app.page.page import Run, page
from app.page.text_tree import draw_tree, print_tree
from app.page.trees import tree
from app.records import tree_counts, tree_record
from app.screen import say
from data.files import UserError
from data.formats import Question, load_questions
from entropy import RULES


class Shown(NamedTuple):
    name: str  # of the rule
    config: Config
    record: dict  # the tree
    costs: str  # what it took


def to_show(config: Config, compare: str | None) -> dict[str, Config]:
    """The settings by the name of their rule: those given, and the same with another rule.

    "grpo" begins every trajectory at the question.
    """
    if compare is None:
        return {config.branch_rule: config}
    others = ["grpo", *(rule for rule in RULES if rule != config.branch_rule)]
    if compare not in others:
        raise UserError(f"--compare {compare}: choose one of {', '.join(others)}")
    grpo = {"branch_rule": "none", "initial_rollouts": config.group_size}
    changed = grpo if compare == "grpo" else {"branch_rule": compare}
    return {config.branch_rule: config, compare: dataclasses.replace(config, **changed)}


def grow_trees(agent, question: Question, configs: dict[str, Config]) -> list[Shown]:
    """A tree for each of the settings, from the same seed."""
    shown = []
    for name, config in configs.items():
        (leaves,), (rewards,) = agent.roll_out([question], config, config.seed)
        record = tree_record(agent.policy, question, leaves, rewards, config)
        took, right = tree_counts(leaves), sum(reward.accuracy == 1 for reward in rewards)
        costs = (
            f"{took['tool_calls']} tool calls, {took['generated_tokens']:,} tokens generated, "
            f"{agent.prefill_tokens:,} prefilled; {right} of {len(leaves)} answers right"
        )
        shown.append(Shown(name, config, record, costs))
    return shown


def trees_page(shown: list[Shown]) -> str:
    """One HTML page; where there are two trees, its first control picks one."""
    runs = []
    for name, config, record, costs in shown:
        settings = dataclasses.asdict(config)
        runs.append(Run(name, settings, trees=[tree(record, settings)], notes=[f"{name}: {costs}"]))
    return page(f"arpo_mini: a rollout, {' and '.join(each.name for each in shown)}", runs)


IN_WORDS = {
    "paper": "forks where P = {branch_probability} + {entropy_weight} gain > {entropy_threshold}",
    "official": "forks with chance P = {branch_probability} + {entropy_weight} gain",
    "adaptive": "forks where H > mean + {entropy_sigma} std of the H before; that is the gain",
    "threshold": "forks where H > {entropy_threshold}",
    "step": "forks where its score ({branch_score}) is above that of most results before",
    "random": "forks with chance {branch_probability}, whatever H is",
    "none": "never forks",
}


def print_trees(shown: list[Shown]) -> None:
    """One under the other; then what each of them took."""
    for name, config, record, _ in shown:
        settings = dataclasses.asdict(config)
        say(f"---- {name}: {IN_WORDS[config.branch_rule].format(**settings)} ----")
        if config.branch_rule not in ("adaptive", "none"):
            say("H: entropy after a result, from 0 (sure) to 1; gain = H - H_initial, at the start")
            say("3 of 4 forks: the rule wants 4; 3 of the trajectories had not begun yet")
        print_tree(draw_tree(record))
    width = max(len(each.name) for each in shown)
    for each in shown:
        say(f"{each.name:{width}}  {each.costs}")


EXAMPLES = {
    "deep_search": Question(  # four searches and the calculator
        "How many workers do the workshop of Orla Ulver and the workshop of Hilde Nyberg employ "
        "together?", ["63"], "deep_search",
    ),
    "divisible": Question(
        "What is the smallest positive whole number n for which 2^n + 3^n is divisible by 7?",
        ["3"], "math",
    ),
}  # fmt: skip


def question_to_show(
    config: Config, text: str | None, answer: str | None, example: str | None
) -> Question:
    """One's own question, an example, or the deep search among the questions of eval_path."""
    if example is not None and text is not None:
        raise UserError(f"--example {example} --question {text}: name one of the two")
    if any(typed is not None and not typed.strip() for typed in (text, answer)):
        raise UserError(f"--question {text!r} --answer {answer!r}: it must not be empty")
    if answer is not None and text is None:
        raise UserError(f"--answer {answer}: it goes with a --question")
    if example is not None:
        return EXAMPLES[example]
    known = load_questions(config.eval_path)
    if text is not None:
        own = Question(text, [answer] if answer else [])
        return own if answer else next((q for q in known if q.text == text), own)
    return min(known, key=lambda q: (q != EXAMPLES["deep_search"], q.domain != "deep_search"))
