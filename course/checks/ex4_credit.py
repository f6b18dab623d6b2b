"""What exercise 4 is checked for; the oracle: segment_advantages, clipped_objective."""

import random

import torch
from torch import Tensor

from advantage import Segment, clipped_objective, segment_advantages
from course.checking import check, require, same


def small_tree() -> tuple[Segment, list[Segment]]:
    """A policy segment shared by leaves 0 to 2 of 4, and those leaves."""
    root = Segment("prompt", [1])
    shared = Segment("policy", [2], parent=root)
    result = Segment("tool", [3], parent=shared)
    leaves = [Segment("policy", [4 + i], parent=result) for i in range(3)]
    return shared, [*leaves, Segment("policy", [9], parent=root)]


A = torch.tensor([1.5, 0.0, -0.75, -1.0])  # of its leaves; the mean of the first three is 0.25


def random_tree(rng: random.Random) -> list[Segment]:
    """The leaves of a tree up to three calls deep."""
    nodes, leaves = [Segment("prompt", [0])], []
    for depth in range(4):
        drafts = [Segment("policy", [0], parent=n) for n in nodes for _ in range(rng.randint(1, 3))]
        calling = [draft for draft in drafts if depth < 3 and rng.random() < 0.5]
        leaves += [draft for draft in drafts if draft not in calling]
        nodes = [Segment("tool", [0], parent=draft) for draft in calling]
    rng.shuffle(leaves)
    return leaves


def of_segment(credit: dict[Segment, Tensor], segment: Segment) -> Tensor:
    require(segment in credit, "a policy segment is missing in the dict: its keys are Segments")
    return credit[segment]


@check(points=1)
def soft(answer):
    """w = 0: a shared segment gets the advantage of each leaf below it"""
    shared, leaves = small_tree()
    mistakes = {"this is hard credit: w is the weight of the mean": [0.25] * 3}
    hint = "one advantage for each leaf below, in their order"
    same(of_segment(answer.credit(leaves, A, 0.0), shared), A[:3], hint, mistakes)


@check(points=1)
def hard(answer):
    """w = 1: it gets the mean of the leaves below it, once for each of them"""
    shared, leaves = small_tree()
    mistakes = {
        "this is the mean over all leaves of the question: take those below": [A.mean()] * 3,
        "this is the sum: take the mean": [0.75] * 3,
        "this is soft credit: w is the weight of the mean": A[:3],
    }
    hint = "one number for each leaf below, all equal"
    same(of_segment(answer.credit(leaves, A, 1.0), shared), [0.25] * 3, hint, mistakes)


@check(points=1)
def mixed(answer):
    """w = 0.3: 0.7 of its own and 0.3 of the mean"""
    shared, leaves = small_tree()
    wanted = segment_advantages(leaves, A, 0.3)[shared]
    mistakes = {"the weights are swapped": segment_advantages(leaves, A, 0.7)[shared]}
    same(of_segment(answer.credit(leaves, A, 0.3), shared), wanted, "w = 0.3", mistakes)


@check(points=1)
def policy_only(answer):
    """the dict holds the policy segments, all of them, and nothing else"""
    _, leaves = small_tree()
    got = answer.credit(leaves, A, 0.3)
    for leaf in leaves:
        of_segment(got, leaf)
    authors = {segment.author for segment in got} - {"policy"}
    require(not authors, f"it gives an advantage to the author {', '.join(sorted(authors))}")


@check(points=1)
def random_trees(answer):
    """100 random trees: as the project gives it"""
    rng = random.Random(0)
    for _ in range(100):
        leaves = random_tree(rng)
        given = torch.tensor([rng.gauss(0, 1) for _ in leaves])
        weight = rng.choice([0.0, 0.3, 0.5, 1.0])
        got = answer.credit(leaves, given, weight)
        for segment, wanted in segment_advantages(leaves, given, weight).items():
            same(of_segment(got, segment), wanted, f"a segment at depth {segment.depth()}")


@check(points=1)
def equal_sums(answer):
    """the sum over a segment's advantages is the same for every w"""
    rng = random.Random(1)
    for _ in range(20):
        leaves = random_tree(rng)
        given = torch.tensor([rng.gauss(0, 1) for _ in leaves])
        soft = segment_advantages(leaves, given, 0.0)
        for weight in (0.0, 0.3, 1.0):
            got = answer.credit(leaves, given, weight)
            for segment, own in soft.items():
                total = of_segment(got, segment).sum()
                same(total, own.sum(), f"w = {weight}: your proof says otherwise", tolerance=1e-4)


def oracle(rho: float | Tensor, given: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    """The project's objective of a token that the trajectories with these advantages share."""
    plus, minus = given.clamp(min=0).sum(), given.clamp(max=0).sum()
    return clipped_objective(torch.as_tensor(rho), plus, minus, low, high)


@check(points=1)
def one_trajectory(answer):
    """PPO's four cases, clip 0.2: rho 1.5 and 0.5, A +1 and -1: 1.2, -1.5, 0.5, -0.8"""
    for rho, clipped, a, wanted in (
        (1.5, 1.2, 1.0, 1.2),
        (1.5, 1.2, -1.0, -1.5),
        (0.5, 0.8, 1.0, 0.5),
        (0.5, 0.8, -1.0, -0.8),
    ):
        mistakes = {
            "this is the larger of the two products: PPO keeps the smaller": max(
                rho * a, clipped * a
            ),
            "this is a loss: the objective is to be maximised": -wanted,
        }
        got = answer.objective(rho, torch.tensor([a]), 0.2, 0.2)
        same(got, wanted, f"rho = {rho}, A = {a:g}", mistakes)


@check(points=1)
def summed_over_trajectories(answer):
    """several trajectories: each is clipped for itself, then summed, as in the project"""
    rng = random.Random(2)
    for _ in range(200):
        rho, low, high = rng.uniform(0.3, 2.0), rng.choice([0.1, 0.2]), rng.choice([0.2, 0.28])
        given = torch.tensor([rng.gauss(0, 1) for _ in range(rng.randint(1, 5))])
        wanted = oracle(rho, given, low, high)
        mistakes = {
            "this clips the sum of the advantages; + and - are clipped differently": oracle(
                rho, given.sum(), low, high
            ),
            "this is a mean over the trajectories: the formula has a sum": wanted / len(given),
        }
        mistakes = {words: x for words, x in mistakes.items() if (x - wanted).abs() > 1e-3}
        case = (
            f"rho = {rho:.2f}, clip {low} and {high}, A = {[round(a, 2) for a in given.tolist()]}"
        )
        same(answer.objective(rho, given, low, high), wanted, case, mistakes, tolerance=1e-4)


def gradients(case: tuple[float, list[float]]) -> tuple[float, float]:
    """By rho, of soft and of hard credit, for a segment that the trajectories of a case share."""
    rho, given = float(case[0]), [float(a) for a in case[1]]
    require(rho > 0 and torch.tensor([rho, *given]).isfinite().all(), "numbers, and rho above 0")
    require(len(given) > 1, "one trajectory shares nothing: give at least two advantages")
    shared = Segment("policy", [1])
    result = Segment("tool", [2], parent=shared)
    leaves = [Segment("policy", [3], parent=result) for _ in given]
    found = []
    for weight in (0.0, 1.0):
        ratio = torch.tensor(rho, requires_grad=True)
        oracle(ratio, segment_advantages(leaves, torch.tensor(given), weight)[shared]).backward()
        found.append(ratio.grad.item())
    return found[0], found[1]


@check(points=1)
def a_difference(answer):
    """told_apart: soft and hard credit have different gradients there"""
    case = answer.told_apart()
    soft, hard = gradients(case)
    hint = "the clip must act, and on one sign only"
    require(abs(soft - hard) > 1e-3, f"rho = {case[0]}: both gradients are {soft:.3f}; {hint}")


@check(points=1)
def no_difference(answer):
    """not_told_apart: equal gradients, though rho is outside and the advantages differ"""
    case = answer.not_told_apart()
    soft, hard = gradients(case)
    require(not 0.8 <= case[0] <= 1.2, "rho is inside [0.8, 1.2], where the clip does nothing")
    differ = max(case[1]) - min(case[1]) > 1e-3
    require(differ, "the advantages are all equal: then soft and hard are the same by definition")
    hint = "which of them does the clip treat alike?"
    require(abs(soft - hard) < 1e-3, f"the gradients are {soft:.3f} and {hard:.3f}; {hint}")
