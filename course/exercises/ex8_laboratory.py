"""Exercise 8: a laboratory            20 minutes of work and 2 of computing

Write a branch rule of your own and try it against forking at random. The random rule is the
control: if it does as well, then the place of a fork made no difference. It has to fork as often as
your rule does; otherwise two things would differ, the place and the number of forks.

    python -m course.exercises.ex8_laboratory    trains with three rules and prints the table
    python -m course.grade 8                     the same after the other checks

Then write two sentences: what does each interval say, and what does it not say?
"""

import sys

from advantage import Segment
from entropy import Decision

STEPS = 30  # of training with each rule


def my_rule(H, H_initial, *, u, history, **settings) -> Decision:
    """A branch rule in ten lines, as those in entropy.py, that depends on H.

    u: drawn from [0, 1), for rules that need chance; history: the entropies measured before at
    results of the same question, maybe none; settings["max_branches"]: the most forks. It draws
    nothing by itself and changes nothing.
    """
    raise NotImplementedError


def tool_calls(groups: list[list[Segment]]) -> int:
    """The tool calls that were run for these groups of leaves; one that leaves share ran once."""
    raise NotImplementedError


def wish_rate(groups: list[list[Segment]]) -> float:
    """The share of tool results at which the rule wanted to fork, whether or not a slot was left.

    The `.decision` of a tool segment says how many forks were wanted, and how many granted.
    """
    raise NotImplementedError


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The mean difference (ours - theirs) and its 95 % interval: (mean, low, high).

    Value i of both belongs to test question i, so the n differences are what is random:
    mean +- t * s / sqrt(n), s with n - 1, t from lab.intervals.T_975 (first value: 1 degree of
    freedom; n differences have n - 1; beyond the table its last value).
    """
    raise NotImplementedError


if __name__ == "__main__":
    from course.laboratory import experiment, table

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    print(table(experiment(my_rule, wish_rate, steps), tool_calls, interval))
