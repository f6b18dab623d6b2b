"""Entropy and branch rules by hand; those of the released code: test_parity.py."""

import itertools
import math
from dataclasses import asdict

import pytest
import torch
from torch.distributions import Categorical

from entropy import RULES, Decision, normalised_entropy, running_threshold, token_entropy

PUBLISHED = {"branch_probability": 0.5, "entropy_weight": 0.2, "entropy_threshold": 0.5}
PUBLISHED |= {"entropy_sigma": 1.5, "max_branches": 2}  # a blog's; ours: the paper never gives Z


def decide(rule, H, H_initial=0.3, u=0.5, history=(), **changed):
    return RULES[rule](H, H_initial, u=u, history=list(history), **{**PUBLISHED, **changed})


def logits(*shape):
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_uniform_is_ln_V_and_certain_is_0():
    for V in (2, 7, 151_669):
        one_hot = torch.full((V,), -math.inf).scatter(0, torch.tensor([1]), 2.5)
        H = token_entropy(torch.stack([torch.full((V,), -4.0), one_hot])).tolist()
        assert [pytest.approx(math.log(V), abs=1e-4), 0.0] == H
        assert normalised_entropy(H, V) == pytest.approx(0.5, abs=1e-4)
    assert normalised_entropy([], 7) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_torch_distributions_and_masked_scores_add_nothing(dtype):
    """Half precision is computed in float32; p ln p written naively is NaN at -inf."""
    scores = logits(4, 5, 33).to(dtype)
    H = token_entropy(scores)
    assert H.dtype == torch.float32
    torch.testing.assert_close(H, Categorical(logits=scores.double()).entropy().float())
    masked = torch.cat([scores, torch.full((4, 5, 3), -math.inf, dtype=dtype)], dim=-1)
    torch.testing.assert_close(token_entropy(masked), H)


def test_paper_by_hand():
    yes = asdict(decide("paper", 0.7, 0.3, entropy_threshold=0.55))
    numbers = {"H": 0.7, "H_initial": 0.3, "gain": 0.4, "probability": 0.58}
    assert yes == pytest.approx({**numbers, "forks": 2, "granted": 0, "score": None})
    assert decide("paper", 0.5, 0.3, entropy_threshold=0.55).forks == 0  # P = 0.54
    assert decide("paper", 0.9, 0.1, entropy_weight=5).probability == 1.0
    assert decide("paper", 0.1, 0.9, entropy_weight=5).probability == 0.0
    # Literal Eq. 4 divides by V: from certain to uniform P moves by 1e-5; with ln V by 0.2.
    literal = decide("paper", math.log(151_665) / 151_665, 0.0).probability - 0.5
    assert 1e-5 < literal < 2e-5 < decide("paper", 1.0, 0.0).probability - 0.699
    for beta, gain in itertools.product((0.01, 0.2, 5.0), (-0.4, -1e-9, 0.0, 1e-9, 0.4)):
        # with the published alpha and tau it forks exactly where H has risen
        assert (decide("paper", gain, 0.0, entropy_weight=beta).forks > 0) == (gain > 0)


def test_adaptive_by_hand():
    history = [0.1, 0.2, 0.3]  # mean 0.2, std sqrt(0.02 / 3) = 0.0816, threshold 0.3225

    def forks(H, history=history, **changed):
        return decide("adaptive", H, history=history, **changed).forks

    assert [forks(0.32), forks(0.33), forks(0.64), forks(0.65)] == [0, 1, 1, 2]
    assert [forks(0.99), forks(0.99, max_branches=4), forks(9.9, max_branches=4)] == [2, 3, 4]
    decision = decide("adaptive", 0.65, history=history)
    assert decision.gain == pytest.approx(0.65 - 0.2 - 1.5 * math.sqrt(0.02 / 3))
    assert decision.probability == 1.0
    for short in ([], [0.1]):  # no spread
        assert decide("adaptive", 0.9, 0.3, history=short) == Decision(0.9, 0.3, 0.0, 0.0, 0)
    assert decide("adaptive", 0.5 + 1e-7, history=[0.5, 0.5]).forks == 0  # that is rounding
    # After nothing but certainty a threshold of 0 cannot divide: any doubt is more than usual.
    assert (forks(0.1, history=[0.0, 0.0]), forks(0.0, history=[0.0, 0.0])) == (2, 0)


def test_threshold_is_the_listing_of_the_blog():
    def listing(entropy_score, entropy_threshold, max_branches):
        if entropy_score > entropy_threshold:
            return min(int(entropy_score * max_branches), max_branches)
        return 0  # a single path

    for H in (0.0, 0.2, 0.25, 0.5, 0.5000001, 0.74, 0.75, 0.99, 1.0, 1.7):
        for tau, Z in ((0.5, 4), (0.2, 1), (0.2, 7), (0.0, 0)):
            found = decide("threshold", H, entropy_threshold=tau, max_branches=Z)
            assert found.forks == listing(H, tau, Z) and found.gain == H - tau


def test_step_forks_where_its_score_is_above_the_running_threshold():
    def forks(score, u=0.5):
        return decide("step", 0.7, 0.3, u=u, branch_score=score, threshold=0.6).forks

    assert [forks("entropy"), forks("gain"), forks("random"), forks("random", 0.61)] == [2, 0, 0, 2]
    past = [[0.9, 0.1, 0.5], [0.8, 0.2]]  # of two steps: what 1 result a step, 2 in all, exceed
    assert [running_threshold(past, n) for n in (0, 1, 2)] == [0.9, 0.5, 0.1]
    assert running_threshold(past, 3) == -math.inf  # there were fewer: fork everywhere
    assert running_threshold([], 1) == running_threshold([[], []], 1) == math.inf


def test_random_ignores_the_entropy_and_none_never_forks():
    for H in (0.0, 0.3, 1.0):
        draws = [decide("random", H, u=u, branch_probability=0.3) for u in (0, 0.29, 0.3, 0.9)]
        assert [(d.forks, d.probability) for d in draws] == [(2, 0.3), (2, 0.3), (0, 0.3), (0, 0.3)]
    assert decide("none", 1.0, 0.0, u=0.0) == Decision(1.0, 0.0, 1.0, 0.0, 0)
