import math
from dataclasses import asdict

import pytest
import torch
from torch.distributions import Categorical

from entropy import (
    RULES,
    Decision,
    normalised_entropy,
    official_entropy,
    official_scalar,
    token_entropy,
)

PUBLISHED = {  # and the blog's k_sigma; Z, which the paper never gives, is 2 here
    "branch_probability": 0.5,
    "entropy_weight": 0.2,
    "entropy_threshold": 0.5,
    "entropy_sigma": 1.5,
    "max_branches": 2,
}


def decide(rule, H, H_initial=0.3, u=0.5, history=(), **changed):
    return RULES[rule](H, H_initial, u=u, history=list(history), **{**PUBLISHED, **changed})


def logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- measuring ----------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 7, 1000, 151_669])
def test_uniform_is_ln_V_and_certain_is_0(V):
    assert token_entropy(torch.full((V,), -4.0)).item() == pytest.approx(math.log(V), abs=1e-4)
    one_hot = torch.full((V,), -math.inf)
    one_hot[1] = 2.5
    assert token_entropy(one_hot).item() == 0.0


def test_masked_scores_add_nothing():
    """Entropy over the words that are left; p ln p written naively is NaN there."""
    kept = logits(5, 8)
    masked = torch.cat([kept, torch.full((5, 3), -math.inf)], dim=1)
    torch.testing.assert_close(token_entropy(masked), token_entropy(kept))


def test_agrees_with_torch_distributions():
    scores = logits(4, 5, 33)
    torch.testing.assert_close(token_entropy(scores), Categorical(logits=scores).entropy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    scores = logits(6, 5000).to(dtype)
    H = token_entropy(scores)
    assert H.dtype == torch.float32
    torch.testing.assert_close(H, Categorical(logits=scores.double()).entropy().float())


def test_normalised_entropy_is_the_mean_over_the_sampled_steps():
    H = torch.tensor([[1.0, 2.0, 9.0], [4.0, math.nan, math.inf], [7.0, 7.0, 7.0]])
    sampled = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    found = normalised_entropy(H, sampled, vocab_size=100)
    torch.testing.assert_close(found * math.log(100), torch.tensor([1.5, 4.0, 0.0]))


def test_normalised_entropy_is_a_share_of_ln_V():
    scores = torch.stack([torch.zeros(3, 11), logits(3, 11)])
    scores[0, 2] = torch.tensor([50.0] + [0.0] * 10)  # certain, but not part of the segment
    sampled = torch.tensor([[True, True, False], [True, True, True]])
    uniform, other = normalised_entropy(token_entropy(scores), sampled, 11).tolist()
    assert uniform == pytest.approx(1.0)
    expected = Categorical(logits=scores[1]).entropy().mean() / math.log(11)
    assert other == pytest.approx(expected.item(), rel=1e-5)


def test_official_entropy_grows_with_length_up_to_20_tokens():
    top10 = [math.log(1 / 10)] * 10
    one = official_entropy([top10], 151_665)
    assert one == pytest.approx(math.log(10) / math.log(151_665))
    for n in (2, 20, 21, 40):
        assert official_entropy([top10] * n, 151_665) == pytest.approx(min(n, 20) * one)
    assert 20 * one == pytest.approx(3.86, abs=0.001)  # its largest value for Qwen2.5


def test_official_scalar_reads_the_sampled_steps_and_the_top_words():
    scores = logits(2, 4, 30)
    sampled = torch.tensor([[True, True, True, False], [False, False, False, False]])
    top = scores[0, :3].log_softmax(-1).sort(descending=True).values[:, :10]
    got = official_scalar(scores, sampled)
    assert got[0].item() == pytest.approx(official_entropy(top.tolist(), 30), rel=1e-5)
    assert got[1].item() == 0.0
    assert (official_scalar(scores, sampled, top=3) < got).tolist() == [True, False]


def test_official_scalar_of_all_words_is_the_sum_of_the_entropies():
    scores = logits(3, 4, 6)
    scores[:, :, 2] = -math.inf
    everything = official_scalar(scores, torch.ones(3, 4, dtype=torch.bool), top=99)
    torch.testing.assert_close(everything, token_entropy(scores).sum(1) / math.log(6))


# ---- deciding -----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.01, 0.2, 5.0])
@pytest.mark.parametrize("gain", [-0.4, -1e-9, 0.0, 1e-9, 0.4])
def test_with_the_published_alpha_and_tau_the_paper_forks_exactly_on_gain(beta, gain):
    assert (decide("paper", gain, 0.0, entropy_weight=beta).forks > 0) == (gain > 0)


def test_dividing_by_V_leaves_nothing_of_the_gain():
    """Literal Eq. 4: even from certain to uniform, P moves by 1e-5; by ln V it moves by 0.2."""
    V = 151_665
    literal = decide("paper", math.log(V) / V, 0.0).probability - 0.5
    assert 1e-5 < literal < 2e-5
    assert decide("paper", 1.0, 0.0).probability - 0.5 == pytest.approx(0.2)


def test_paper_by_hand():
    yes = decide("paper", 0.7, 0.3, entropy_threshold=0.55)
    assert asdict(yes) == pytest.approx(
        {"H": 0.7, "H_initial": 0.3, "gain": 0.4, "probability": 0.58, "forks": 2, "granted": 0}
    )
    assert decide("paper", 0.5, 0.3, entropy_threshold=0.55).forks == 0  # P = 0.54
    assert decide("paper", 0.9, 0.1, entropy_weight=5).probability == 1.0
    assert decide("paper", 0.1, 0.9, entropy_weight=5).probability == 0.0


@pytest.mark.parametrize("gain, rate", [(0.7, 0.64), (0.1, 0.52), (0.0, 0.5), (-1, 0.3), (9, 1)])
def test_official_is_close_to_a_coin_flip(gain, rate):
    """P(fork) = 0.5 + 0.2 * gain: counted over a grid of draws, and as the decision reports it."""
    decisions = [decide("official", 1.0 + gain, 1.0, u=(i + 0.5) / 2000) for i in range(2000)]
    assert sum(d.forks for d in decisions) / 2000 == pytest.approx(rate, abs=1e-3)
    assert decisions[0].probability == pytest.approx(rate)
    assert {d.forks for d in decisions} <= {0, 1}


def test_adaptive_by_hand():
    history = [0.1, 0.2, 0.3]  # mean 0.2, std sqrt(0.02 / 3) = 0.0816, threshold 0.3225
    threshold = 0.2 + 1.5 * math.sqrt(0.02 / 3)

    def forks(H, **changed):
        return decide("adaptive", H, history=history, **changed).forks

    assert [forks(0.32), forks(0.33), forks(0.64), forks(0.65)] == [0, 1, 1, 2]
    assert [forks(0.99), forks(0.99, max_branches=4), forks(9.9, max_branches=4)] == [2, 3, 4]
    decision = decide("adaptive", 0.65, history=history)
    assert decision.gain == pytest.approx(0.65 - threshold)
    assert decision.probability == 1.0


@pytest.mark.parametrize("history", [[], [0.1]])
def test_adaptive_needs_a_history_with_a_spread(history):
    assert decide("adaptive", 0.9, 0.3, history=history) == Decision(0.9, 0.3, 0.0, 0.0, 0)


def test_adaptive_after_nothing_but_certainty():
    """A threshold of 0 cannot divide: any doubt is infinitely more than usual."""
    assert decide("adaptive", 0.1, history=[0.0, 0.0]).forks == 2
    assert decide("adaptive", 0.0, history=[0.0, 0.0]).forks == 0


def test_random_ignores_the_entropy():
    for H in (0.0, 0.3, 1.0):
        draws = [decide("random", H, u=u, branch_probability=0.3) for u in (0, 0.29, 0.3, 0.9)]
        assert [decision.forks for decision in draws] == [2, 2, 0, 0]
    assert decide("random", 1.0, branch_probability=0.3).probability == 0.3


def test_none_never_forks():
    assert decide("none", 1.0, 0.0, u=0.0) == Decision(1.0, 0.0, 1.0, 0.0, 0)
