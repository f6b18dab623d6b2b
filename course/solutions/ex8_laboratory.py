"""Solution 8. Measured: 10 of 10 points; 2 to 3 minutes of one core (seed 0, 30 steps):

                  tool calls  accuracy
    GRPO                1863     83.8%
    my rule             1041     85.4%
    random, 50%         1026     85.0%
    my rule - GRPO: +1.7 points [-1.9, +5.3]
    my rule - random, 50%: +0.4 points [-3.3, +4.2]

Forking takes 56 % of the calls. Both intervals hold 0: after one training each, on 60 questions,
no difference in accuracy was found, neither by forking nor by where to fork.
"""

import math
import sys

from advantage import Segment, shared_by
from entropy import Decision
from lab.intervals import T_975

STEPS = 30


def my_rule(H, H_initial, *, u, history, **settings) -> Decision:
    """Fork where H is above the median of what was measured before; the first results fork."""
    before = sorted(history)
    median = before[len(before) // 2] if before else 0.0
    gain = H - median
    forks = settings["max_branches"] if gain > 0 else 0
    return Decision(H, H_initial, gain, float(gain > 0), forks)


def segments(groups: list[list[Segment]]) -> list[Segment]:
    return [segment for leaves in groups for segment in shared_by(leaves)]


def tool_calls(groups: list[list[Segment]]) -> int:
    return sum(segment.author == "tool" for segment in segments(groups))


def wish_rate(groups: list[list[Segment]]) -> float:
    decisions = [segment.decision for segment in segments(groups) if segment.author == "tool"]
    return sum(decision.forks > 0 for decision in decisions) / len(decisions)


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    s = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    half = T_975[min(n - 1, len(T_975)) - 1] * s / math.sqrt(n)
    return mean, mean - half, mean + half


if __name__ == "__main__":
    from course.laboratory import experiment, table

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    print(table(experiment(my_rule, wish_rate, steps), tool_calls, interval))
