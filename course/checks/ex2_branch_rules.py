"""What exercise 2 is checked for; the oracle are the rules of entropy.py."""

import random

import entropy
from course.checking import check, of_kind, require, same
from entropy import Decision

PUBLISHED = {"branch_probability": 0.5, "entropy_weight": 0.2, "entropy_threshold": 0.5}
ASKED = {**PUBLISHED, "entropy_sigma": 1.5, "max_branches": 4, "u": 0.3, "history": [0.1, 0.2]}


def decided(rule, H: float, H_initial: float, **changed) -> Decision:
    decision = rule(H, H_initial, **(ASKED | changed))
    for name, kind in (("gain", float), ("probability", float), ("forks", int)):
        of_kind(f"{name} is", getattr(decision, name), kind)
    return decision


def random_cases(n: int):
    """(H, H_initial, settings), from far below the threshold to far above it."""
    rng = random.Random(0)
    for _ in range(n):
        yield (
            rng.random(),
            rng.random(),
            {
                "branch_probability": rng.choice([0.0, 0.3, 0.5, 0.9]),
                "entropy_weight": rng.choice([0.2, 1.0, 5.0]),
                "entropy_threshold": rng.choice([0.2, 0.5, 0.8]),
                "max_branches": rng.randint(0, 5),
                "u": rng.random(),
            },
        )


@check(points=1)
def gain(answer):
    """all rules: the gain is H - H_initial"""
    for name in ("paper", "official", "random_control"):
        decision = decided(getattr(answer, name), 0.4, 0.1)
        mistakes = {f"{name}: the gain has the wrong sign": -0.3}
        same(decision.gain, 0.3, f"{name}: H = 0.4, H_initial = 0.1", mistakes)
        given = decision.H, decision.H_initial
        require(given == (0.4, 0.1), f"{name}: H and H_initial of the Decision are {given}")


@check(points=1)
def paper_by_hand(answer):
    """paper: H = 0.4 after 0.1 gives P = 0.5 + 0.2 * 0.3 = 0.56 and a fork; 0.1 after 0.4 none"""
    up, down = decided(answer.paper, 0.4, 0.1), decided(answer.paper, 0.1, 0.4)
    same(up.probability, 0.56, "P after a rise", {"the gain has the wrong sign": 0.44})
    same(down.probability, 0.44, "P after a fall")
    require(up.forks == 4, f"a rise: {up.forks} forks, expected 4; P is compared with tau")
    require(down.forks == 0, f"a fall: {down.forks} forks, expected 0; P is compared with tau")
    forks = decided(answer.paper, 0.4, 0.1, branch_probability=0.2, entropy_threshold=0.3).forks
    require(forks == 0, "alpha = 0.2, tau = 0.3: P = 0.26, but it forks; alpha is not tau")


@check(points=1)
def strictly_above(answer):
    """no fork in the paper's rule where H = H_initial, so P = tau; nor in random where u = p"""
    for rule, case in ((answer.paper, "paper, gain 0"), (answer.random_control, "random, u = p")):
        forks = decided(rule, 0.25, 0.25, u=0.5).forks
        require(forks == 0, f"{case}: {forks} forks, but equal is neither above nor below")


@check(points=1)
def all_branches(answer):
    """paper and random fork Z times, for every Z; official forks once"""
    for Z in (0, 1, 3):
        for name in ("paper", "random_control"):
            forks = decided(getattr(answer, name), 0.4, 0.1, max_branches=Z).forks
            require(forks == Z, f"{name}, Z = {Z}: {forks} forks")
    forks = decided(answer.official, 0.4, 0.1, max_branches=3).forks
    require(forks == 1, f"official, Z = 3: {forks} forks; the released code adds one copy")


@check(points=1)
def clipped(answer):
    """paper and official: the probability stays in [0, 1]"""
    for H, H_initial in ((0.9, 0.1), (0.1, 0.9)):
        for name in ("paper", "official"):
            P = decided(getattr(answer, name), H, H_initial, entropy_weight=5.0).probability
            require(0 <= P <= 1, f"{name}: beta = 5, gain {H - H_initial:.1f}: P = {P}; clip it")


@check(points=1)
def official_by_hand(answer):
    """official: gain 0.3 moves u = 0.55 to 0.49, a fork; u = 0.5 and gain 0 forks; 0.58 does not"""
    for u, H, wanted in ((0.55, 0.4, 1), (0.58, 0.4, 0), (0.5, 0.1, 1)):
        forks = decided(answer.official, H, 0.1, u=u).forks
        hint = f"u = {u}, gain {H - 0.1:.1f}: {forks} forks; what is added, and is it < or <=?"
        require(forks == wanted, hint)


@check(points=1)
def official_chance(answer):
    """official: the probability is the share of 1000 draws that fork, as the oracle counts them"""
    for H in (0.0, 0.1, 0.8, 1.0):
        for weight in (0.2, 1.0):
            asked = ASKED | {"entropy_weight": weight}
            draws = [(i + 0.5) / 1000 for i in range(1000)]
            rate = sum(entropy.official(H, 0.1, **(asked | {"u": u})).forks for u in draws) / 1000
            got = decided(answer.official, H, 0.1, entropy_weight=weight).probability
            same(got, rate, f"w = {weight}, gain {H - 0.1:.1f}: count them", tolerance=2e-3)


@check(points=1)
def like_the_project(answer):
    """all rules decide as entropy.py does in 300 random cases"""
    pairs = (answer.paper, entropy.paper), (answer.official, entropy.official)
    for H, H_initial, settings in random_cases(300):
        for ours, theirs in (*pairs, (answer.random_control, entropy.random_control)):
            got = decided(ours, H, H_initial, **settings)
            wanted = decided(theirs, H, H_initial, **settings)
            shown = f"{theirs.__name__}({H:.3f}, {H_initial:.3f}, {settings})"
            require(got.forks == wanted.forks, f"{shown}: {got.forks} forks")
            same(got.probability, wanted.probability, shown)


@check(points=1)
def threshold_of_the_gain(answer):
    """gain_needed: a little more forks, a little less does not"""
    hint = "solve alpha + beta * gain > tau for the gain"
    for alpha, beta, tau in ((0.5, 0.2, 0.5), (0.5, 20.0, 0.5), (0.4, 0.2, 0.5), (0.9, 2.0, 0.3)):
        gain = answer.gain_needed(alpha, beta, tau)
        settings = {"branch_probability": alpha, "entropy_weight": beta, "entropy_threshold": tau}
        for nearby, forks in ((gain + 1e-6, True), (gain - 1e-6, False)):
            decision = decided(entropy.paper, nearby, 0.0, **settings)
            case = f"alpha = {alpha}, beta = {beta}, tau = {tau}"
            require(bool(decision.forks) == forks, f"{case}, you said {gain:.4g}: {hint}")


CHANGES = {  # name -> settings, and what H and H_initial are multiplied with
    "beta 20 instead of 0.2": ({"entropy_weight": 20.0}, 1.0),
    "beta 0 instead of 0.2": ({"entropy_weight": 0.0}, 1.0),
    "alpha 0.6 instead of 0.5": ({"branch_probability": 0.6}, 1.0),
    "alpha and tau 0.3 instead of 0.5": (
        {"branch_probability": 0.3, "entropy_threshold": 0.3},
        1.0,
    ),
    "H and H_initial divided by V instead of ln V": ({}, 11.93 / 152_000),  # ln V / V of Qwen3
}


@check(points=1)
def constants_without_effect(answer):
    """SAME_FORKS: which changes of the published constants change no fork"""
    grid = [i / 20 for i in range(21)]
    pairs = [(H, H_initial) for H in grid for H_initial in grid]
    require(set(answer.SAME_FORKS) == set(CHANGES), "SAME_FORKS must keep its five keys")
    require(None not in answer.SAME_FORKS.values(), "not written yet")
    wrong = 0
    for name, (settings, scale) in CHANGES.items():
        before = [decided(entropy.paper, *pair).forks for pair in pairs]
        after = [decided(entropy.paper, H * scale, H0 * scale, **settings).forks for H, H0 in pairs]
        wrong += bool(answer.SAME_FORKS[name]) != (before == after)
    hint = "put each change into gain_needed and see whether the threshold moves"
    require(not wrong, f"{wrong} of {len(CHANGES)} are not right: {hint}")
