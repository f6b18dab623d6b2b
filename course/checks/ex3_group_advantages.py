"""What exercise 3 is checked for; the oracle is advantage.group_advantages."""

import itertools
import math
import random

import torch

from advantage import group_advantages
from course.checking import check, require, same

BIASED = "this divides by M, not by M - 1: the biased std"


@check(points=2)
def by_hand(answer):
    """(1, 0, 0, 1): mean 1/2, std sqrt(1/3), so +-0.8660; (0, 0, 0, 1): std 1/2"""
    mistakes = {
        BIASED: [1, -1, -1, 1],
        "this is divided by the variance: take its square root": [1.5, -1.5, -1.5, 1.5],
        "this is not divided by the std": [0.5, -0.5, -0.5, 0.5],
        "this is not compared with the mean": [math.sqrt(3), 0, 0, math.sqrt(3)],
    }
    wanted = math.sqrt(3) / 2 * torch.tensor([1, -1, -1, 1])
    same(answer.group_advantages([1.0, 0.0, 0.0, 1.0]), wanted, "r = (1, 0, 0, 1)", mistakes)
    biased = {BIASED: torch.tensor([-1.0, -1, -1, 3]) / math.sqrt(3)}
    wanted = torch.tensor([-0.5, -0.5, -0.5, 1.5])
    same(answer.group_advantages([0.0, 0, 0, 1]), wanted, "(0, 0, 0, 1)", biased)


@check(points=2)
def equal_rewards(answer):
    """equal rewards give exactly 0, whatever they are and however many"""
    for value in (0.0, 1.0, -1.0, 0.1, 0.7, 1.1, 1 / 3):
        for M in (2, 3, 7, 8, 16):
            A = answer.group_advantages([value] * M)
            shown = f"{M} rewards of {value:.3g}"
            same(A, torch.zeros(M), f"{shown}: rounding noise, divided by 1e-6, is not small")
            require(not A.any(), f"{shown}: near 0, but not exactly 0")


@check(points=1)
def group_of_one(answer):
    """a group of one gets 0"""
    for value in (1.0, -1.0, 0.3):
        hint = "the std of one number is 0 / 0; there is nobody to compare with"
        same(answer.group_advantages([value]), group_advantages([value]), hint)


@check(points=1)
def epsilon(answer):
    """1e-6 is added to the std: (0, 1e-6) gives +-0.2929"""
    rewards = [0.0, 1e-6]
    mistakes = {
        "nothing is added to the std": [-0.7071, 0.7071],
        "far too near 0: 1e-6 is added to the std, not to the variance": [-0.0005, 0.0005],
        BIASED: [-1 / 3, 1 / 3],
    }
    got = answer.group_advantages(rewards)
    same(got, group_advantages(rewards), "r = (0, 1e-6)", mistakes, tolerance=1e-3)


@check(points=1)
def whole_numbers(answer):
    """rewards that are ints work like floats"""
    for rewards in ([1, 0, -1, 1], [0, 1], [1, 1]):
        hint = f"{rewards}: rewards may come as ints"
        wanted = answer.group_advantages([float(r) for r in rewards])
        same(answer.group_advantages(rewards), wanted, hint)


@check(points=1)
def random_groups(answer):
    """200 random groups: as the project's, in the order of the rewards"""
    rng = random.Random(0)
    for _ in range(200):
        rewards = [
            rng.choice([-1.0, 0.0, 1.0, 1.1, rng.random()]) for _ in range(rng.randint(2, 9))
        ]
        got = answer.group_advantages(rewards)
        hint = f"rewards {[round(r, 3) for r in rewards]}"
        same(got, group_advantages(rewards), hint, tolerance=1e-3)


@check(points=1)
def dead_by_hand(answer):
    """two trajectories, p = 1/2: dead with chance 1/2; p = 0 and p = 1: always; M = 1: always"""
    mistakes = {"all right is one way to be equal: there is another": 0.25}
    same(answer.dead_chance(0.5, 2), 0.5, "p = 1/2, M = 2", mistakes)
    for p, M in ((0.0, 8), (1.0, 8), (0.3, 1)):
        same(answer.dead_chance(p, M), 1.0, f"p = {p}, M = {M}")


@check(points=1)
def dead_by_counting(answer):
    """dead_chance is what all 2^M groups give, weighted, with the project's advantages"""
    for p, M in ((0.38, 8), (0.9, 4), (0.5, 3)):
        chance = 0.0
        for rewards in itertools.product((0.0, 1.0), repeat=M):
            if not group_advantages(rewards).any():
                chance += p ** sum(rewards) * (1 - p) ** (M - sum(rewards))
        same(answer.dead_chance(p, M), chance, f"p = {p}, M = {M}", tolerance=1e-4)
