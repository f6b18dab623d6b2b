"""What exercise 8 is checked for; the oracles: app.records, lab.intervals, and a training."""

import random

import arpo_mini
from advantage import Reward, Segment
from app.config import Config
from app.records import step_metrics
from course.checking import check, require, same
from course.checks.ex2_branch_rules import decided
from course.checks.ex7_grow import Always, RandomScript
from course.laboratory import CONFIG, experiment, table
from course.scripted import TOOLS, ScriptedWriter
from lab.intervals import paired


def random_asked(rng: random.Random) -> dict:
    """H_initial, u and a history that may be empty."""
    history = [rng.random() for _ in range(rng.choice([0, 1, 5]))]
    return {"H_initial": rng.random(), "u": rng.random(), "history": history}


@check(points=1)
def a_rule(answer):
    """my_rule: 0 to max_branches forks, also with no history; the same when it is asked again"""
    rng = random.Random(0)
    for _ in range(200):
        H, Z, asked = rng.random(), rng.choice([0, 1, 4]), random_asked(rng)
        forks = [decided(answer.my_rule, H, max_branches=Z, **asked).forks for _ in range(5)]
        require(0 <= forks[0] <= Z, f"{forks[0]} forks, legal is a whole number from 0 to {Z}")
        hint = "asked five times with the same numbers it decides differently: use u"
        require(len(set(forks)) == 1, hint)


@check(points=1)
def depends_on_H(answer):
    """my_rule: H decides, all else being equal"""
    rng = random.Random(1)
    seen = set()
    for _ in range(50):
        asked = random_asked(rng)
        forks = {decided(answer.my_rule, i / 100, **asked).forks > 0 for i in range(101)}
        seen.add(len(forks))
    require(2 in seen, "with H from 0 to 1 it never changes its mind: that is random forking")


def some_groups() -> list[list[Segment]]:
    """Scripted trees with shared calls and refused wishes."""
    config = Config(group_size=6, initial_rollouts=2, max_branches=2, max_tool_calls=3)
    groups = []
    for script in (*map(RandomScript, range(6)), Always(), {}):
        writer, root = ScriptedWriter(script), Segment("prompt", [0])
        budgets = {root: arpo_mini.Budget(4, random.Random(0))}
        groups.append(arpo_mini.grow(writer, [root] * 2, budgets, config, TOOLS))
    return groups


def figure(name: str, groups: list[list[Segment]]) -> float:
    rewards = [[Reward(0.0, 0.0, True, 1) for _ in leaves] for leaves in groups]
    return step_metrics(groups, rewards)[name]


@check(points=2)
def calls(answer):
    """tool_calls: each call that was run counts once, however many leaves share it"""
    groups = some_groups()
    by_path = sum(s.author == "tool" for leaves in groups for leaf in leaves for s in leaf.path())
    mistakes = {"a call that several leaves share is counted for each of them": by_path}
    got = answer.tool_calls(groups)
    same(got, figure("tool_calls", groups), "the tool segments of the trees", mistakes)
    same(answer.tool_calls(groups[-1:]), 0, "paths that answer at once call nothing")


@check(points=2)
def wishes(answer):
    """wish_rate: wanted forks, not granted ones, for each result once"""
    groups = some_groups()
    decisions = [s.decision for g in groups for leaf in g for s in leaf.path() if s.decision]
    granted = {id(d): d.granted > 0 for d in decisions}
    forks = {id(d): d.forks for d in decisions}
    mistakes = {
        "these are the forks that were granted: a wish without a slot counts": rate(granted),
        "this is the mean number of forks: a rate is a share of results": rate(forks),
        "a result that several leaves share is counted for each": sum(
            d.forks > 0 for d in decisions
        )
        / len(decisions),
    }
    same(
        answer.wish_rate(groups), figure("wishes", groups), "a share of the tool results", mistakes
    )


def rate(values: dict[int, float]) -> float:
    return sum(values.values()) / len(values)


@check(points=2)
def paired_interval(answer):
    """interval: differences (1, 2, 3): 2 +- 4.303 / sqrt(3); and 50 random pairs"""
    ours, theirs = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    half = {  # mistake -> half width
        "t has n - 1 degrees of freedom, and the table begins with 1": 3.182 / 3**0.5,
        "1.96 is for very many values: take t": 1.96 / 3**0.5,
        "s divides by n - 1": 4.303 * (2 / 3) ** 0.5 / 3**0.5,
        "this is the spread of one difference: divide by sqrt(n)": 4.303,
        "values of one question belong together: take the differences": 4.303 * (5 / 3) ** 0.5,
    }
    mistakes = {words: (2.0, 2 - width, 2 + width) for words, width in half.items()}
    mistakes["the sign: ours - theirs"] = (-2.0, -2 - 4.303 / 3**0.5, -2 + 4.303 / 3**0.5)
    wanted = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    same(answer.interval(ours, theirs), wanted, "differences 1, 2, 3", mistakes)
    rng = random.Random(0)
    for n in (2, 5, 60, 100):
        ours, theirs = ([rng.random() for _ in range(n)] for _ in range(2))
        wanted = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
        same(answer.interval(ours, theirs), wanted, f"{n} questions")


@check(points=2, seconds=300.0)
def laboratory(answer):
    """three rules are trained and tested, and the table is written"""
    outcomes = experiment(answer.my_rule, answer.wish_rate, answer.STEPS)
    for outcome in outcomes:
        whole = all(len(set(leaves)) == CONFIG.group_size for leaves in outcome.groups)
        require(whole, f"{outcome.name}: a question has not {CONFIG.group_size} trajectories")
    return table(outcomes, answer.tool_calls, answer.interval)
