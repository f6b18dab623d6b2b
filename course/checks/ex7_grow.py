"""What exercise 7 is checked for; the oracle is arpo_mini.grow on the same script."""

import random

import arpo_mini
from advantage import Segment
from app.config import Config
from course.checking import check, require
from course.scripted import TOOLS, ScriptedWriter


class RandomScript(dict):
    """Calls in three of four turns; what is drawn depends on the name of the path alone."""

    def __init__(self, seed: int):
        self.seed = seed

    def get(self, name: str, otherwise=None) -> tuple[str, float]:
        rng = random.Random(f"{self.seed} {name}")
        return "call" if rng.random() < 0.75 else "answer", rng.random()


class Always(dict):
    """Every path calls; its entropy grows with its depth, so every result is forked."""

    def get(self, name: str, otherwise=None) -> tuple[str, float]:
        return "call", name.count(".") / 10


def settings(**changed) -> Config:
    few = {"group_size": 6, "initial_rollouts": 2, "max_branches": 2, "max_tool_calls": 3}
    return Config(**(few | changed))


def grown(answer, script: dict, config: Config) -> tuple[ScriptedWriter, list[Segment]]:
    writer = ScriptedWriter(script)
    return writer, answer.grow(writer, Segment("prompt", [0]), config)


def names(writer: ScriptedWriter, leaves: list[Segment]) -> list[str]:
    unknown = [leaf.author for leaf in leaves if leaf not in writer.names]
    require(not unknown, f"a leaf is no draft of the writer, but a segment by {unknown[:1]}")
    return sorted(writer.names[leaf] for leaf in leaves)


def oracle(script: dict, config: Config) -> list[str]:
    """The names of the leaves that the project grows."""
    writer, root = ScriptedWriter(script), Segment("prompt", [0])
    slots = config.group_size - config.initial_rollouts
    budgets = {root: arpo_mini.Budget(slots, random.Random(0))}
    nodes = [root] * config.initial_rollouts
    return names(writer, arpo_mini.grow(writer, nodes, budgets, config, TOOLS))


@check(points=1)
def exactly_M(answer):
    """M different leaves, whether the paths answer at once, never fork, or fork all the time"""
    falls = {"0": ("call", 0.9), "1": ("call", 0.9)}
    for script in ({}, falls, Always(), *map(RandomScript, range(10))):
        for N in (1, 2, 6):
            config = settings(initial_rollouts=N)
            _, leaves = grown(answer, script, config)
            M, many = config.group_size, len(leaves)
            why = "are slots used up?" if many > M else "where do the slots go when all have ended?"
            require(many == M, f"{many} leaves, expected M = {M} (N = {N}): {why}")
            require(len(set(leaves)) == M, "a leaf is there twice")


@check(points=1)
def allowed_calls(answer):
    """max_tool_calls results on a path that always calls: not one more, not one less"""
    for most in (0, 1, 3):
        _, leaves = grown(answer, Always(), settings(max_tool_calls=most))
        for leaf in leaves:
            calls = sum(segment.author == "tool" for segment in leaf.path())
            require(calls == most, f"{calls} results on a path, max_tool_calls is {most}")


@check(points=1)
def after_the_result(answer):
    """a fork begins right after the tool result that was read, and shares all before it"""
    script = {"0": ("call", 0.1), "0.0": ("answer", 0.7), "0.1": ("answer", 0.3)}
    writer, leaves = grown(answer, script, settings(initial_rollouts=1, max_branches=1))
    hint = "one path, one uncertain result, Z = 1: 0.0 goes on from it and 0.1 is the fork"
    got = names(writer, leaves)
    require("0.1" in got, f"{hint}; your leaves: {', '.join(got)}")


@check(points=1)
def begun_at_the_question(answer):
    """N paths begin at the question, no more while forks can use the slots"""
    for N in (1, 3):
        writer, _ = grown(answer, Always(), settings(initial_rollouts=N, max_branches=4))
        begun = sum("." not in name for name in writer.names.values())
        require(begun == N, f"{begun} paths begin at the question, N = {N}")


@check(points=1)
def where_it_is_uncertain(answer):
    """no fork where the entropy falls or stays; compared with the start of the same trajectory"""
    script = {
        "0": ("call", 0.5),  # after it 0.5: stays
        "0.0": ("call", 0.5),
        "0.0.0": ("call", 0.4),  # falls
        "0.0.0.0": ("answer", 0.45),  # rises, but not above the start
        "1": ("call", 0.9),  # an uncertain start
        "1.0": ("answer", 0.8),  # falls, though it is more than the start of the other path
    }
    writer, _ = grown(answer, script, settings())
    forks = sorted(n for n in writer.names.values() if "." in n and not n.endswith(".0"))
    hint = "gain: its entropy minus that of the first policy segment of its own trajectory"
    require(not forks, f"forks {', '.join(forks)} at results that have no gain. {hint}")
    script = {"0": ("call", 0.1), "0.0": ("call", 0.05), "0.0.0": ("answer", 0.3)}
    writer, _ = grown(answer, script, settings(initial_rollouts=1))
    forked = "0.0.1" in writer.names.values()
    require(forked, f"no fork at the second result, where the gain is 0.2. {hint}")


@check(points=1)
def at_most_Z(answer):
    """at most Z forks at one result, and exactly Z where slots allow it; Z = 0: none"""
    script = {"0": ("call", 0.1), "0.0": ("answer", 0.9)}
    for Z in (0, 1, 3, 9):
        config = settings(initial_rollouts=1, max_branches=Z)
        writer, leaves = grown(answer, script, config)
        forks = sum(n.startswith("0.") for n in names(writer, leaves)) - 1
        wanted = min(Z, config.group_size - 1)
        hint = f"{forks} forks at the result, expected {wanted} (Z = {Z}, 5 slots)"
        require(forks == wanted, hint)


@check(points=1)
def nothing_is_lost(answer):
    """each draft that is begun is finished, and is part of a leaf's path"""
    for script in (Always(), *map(RandomScript, range(10))):
        writer, leaves = grown(answer, script, settings())
        lost = sorted(writer.names[draft] for draft in writer.unfinished)
        require(not lost, f"begun and never finished: {', '.join(lost[:3])}")
        kept = {segment for leaf in leaves for segment in leaf.path()}
        lost = sorted(name for draft, name in writer.names.items() if draft not in kept)
        require(not lost, f"on no leaf's path: {', '.join(lost[:3])}")


@check(points=1)
def largest_gain_first(answer):
    """when slots are few they go to the most uncertain results of the level"""
    script = {str(i): ("call", 0.1) for i in range(4)}
    script |= {f"{i}.0": ("answer", H) for i, H in enumerate((0.3, 0.9, 0.2, 0.8))}
    config = settings(initial_rollouts=4, max_branches=1)  # two slots
    writer, leaves = grown(answer, script, config)
    forks = sorted(name for name in names(writer, leaves) if name.endswith(".1"))
    hint = "gains 0.2, 0.8, 0.1, 0.7 after paths 0 to 3, two slots"
    require(forks == ["1.1", "3.1"], f"{hint}; your forks: {', '.join(forks) or 'none'}")


@check(points=1)
def rest_at_once(answer):
    """when every path has ended, all slots that are left begin at the question side by side"""
    script = {str(i): ("call", 0.1) for i in range(1, 6)}
    script |= {f"{i}.0": ("answer", 0.9) for i in range(1, 6)}
    got = names(*grown(answer, script, settings(initial_rollouts=1)))
    wanted = oracle(script, settings(initial_rollouts=1))
    hint = "path 0 answers at once; the five slots begin together, and none is left for forks"
    require(got == wanted, f"{hint}; your leaves: {', '.join(got)}")


@check(points=1)
def like_the_project(answer):
    """on 30 random scripts the leaves are those of arpo_mini.grow"""
    rng = random.Random(0)
    for seed in range(30):
        config = settings(
            group_size=rng.randint(4, 9),
            initial_rollouts=rng.randint(1, 4),
            max_branches=rng.randint(0, 3),
            max_tool_calls=rng.randint(0, 4),
        )
        got = names(*grown(answer, RandomScript(seed), config))
        wanted = oracle(RandomScript(seed), config)
        sizes = f"M = {config.group_size}, N = {config.initial_rollouts}, Z = {config.max_branches}"
        wrong = sorted(n for n in {*got, *wanted} if got.count(n) != wanted.count(n))
        require(not wrong, f"script {seed}, {sizes}: {len(wrong)} leaves differ, as {wrong[:1]}")
