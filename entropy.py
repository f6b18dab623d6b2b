"""How uncertain is the policy, and should the rollout fork here?

ARPO (arXiv 2507.19849) spends its rollouts where the policy hesitates. This file holds that idea:
the entropy of the next token, its mean over the first k tokens of a segment, and the rules that
turn it into a branch decision. H is in nats until divided by ln V; then it lies in [0, 1].

Pure functions. B rows, k measured tokens, V words in the vocabulary. The random draw u is passed
in, so a decision can be taken again.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ---- measuring ----------------------------------------------------------------------------


def token_entropy(logits: Tensor) -> Tensor:
    """H = -sum_v p_v ln p_v in nats (paper, Eq. 3). A logit of -inf has p = 0 and adds nothing."""
    p = logits.float().softmax(dim=-1)  # (..., V)
    return torch.special.entr(p).sum(dim=-1)  # (...)      entr(p) = -p ln p, entr(0) = 0


def normalised_entropy(H: Sequence[float], vocab_size: int) -> float:
    """Mean of H / ln V over the entropies of k tokens in nats: in [0, 1]; none chose nothing: 0.

    The paper (Eq. 4) divides by V itself: with V = 152k a change of H then decides nothing.
    """
    return sum(H) / max(1, len(H)) / math.log(vocab_size)


def official_entropy(topk_logp: Iterable[Iterable[float]], vocab_size: int) -> float:
    """-(sum of p ln p over the first 20 tokens and the top log-probs reported for each) / ln V.

    The released code (vllm_rollout_with_tools.py:172). A sum and not a mean, so it grows with the
    number of tokens: up to 3.86 for 20 tokens, the top 10 (not renormalised), V = 152k.
    """
    first = [logp for token in list(topk_logp)[:20] for logp in token if logp > -math.inf]
    return -sum(math.exp(logp) * logp for logp in first) / math.log(vocab_size)


# ---- deciding -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """A branch decision taken at one tool result, with the numbers it was taken on."""

    H: float  # entropy here
    H_initial: float  # entropy at the start of the same trajectory
    gain: float  # by how much H exceeds what the rule compares it with
    probability: float  # the rule's P, in [0, 1]
    forks: int  # extra paths wanted, beside the one that goes on
    granted: int = 0  # how many paths the budget let begin here
    score: float | None = None  # what rule step compares with the running threshold

    @property
    def rank(self) -> float:
        """Where slots are short, tool results with a higher one come first."""
        return self.gain if self.score is None else self.score


def clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


# Every rule is called with the same arguments, by name, and ignores those it has no use for: all
# settings (app/config.py), and
#   u            a uniform draw from [0, 1)
#   history      the entropies measured before this one, in this tree
#   threshold    running_threshold of the last steps' scores


def paper(
    H, H_initial, *, branch_probability, entropy_weight, entropy_threshold, max_branches, **_
):
    """P = clip(alpha + beta * (H - H_initial)), fork when P > tau (paper, Eq. 5; the clip is ours).

    Nothing is drawn. With the published alpha = tau = 0.5 this is H > H_initial, whatever beta.
    """
    gain = H - H_initial
    probability = clip(branch_probability + entropy_weight * gain)
    forks = max_branches if probability > entropy_threshold else 0
    return Decision(H, H_initial, gain, probability, forks)


def official(H, H_initial, *, u, branch_probability, entropy_weight, **_):
    """Fork one copy when clip(u - w * (H - H_initial)) <= tau (vllm_rollout_with_tools.py:468).

    So P(fork) = clip(tau + w * gain) for tau < 1: with the published 0.5 and 0.2 near a coin flip.
    """
    gain = H - H_initial
    probability = clip(branch_probability + entropy_weight * gain)
    fork = clip(u - entropy_weight * gain) <= branch_probability
    return Decision(H, H_initial, gain, probability, forks=int(fork))


def adaptive(H, H_initial, *, history, entropy_sigma, max_branches, **_):
    """Fork min(floor(H / T), max_branches) times if H > T = mean + k_sigma * std (a blog on ARPO).

    Mean and std are those of the history; fewer than two values have no spread: T = H, no fork.
    The blog's N_branches is read as forks beside the path itself: one path in all is no fork.
    """
    T = H
    if len(history) > 1:
        T = statistics.fmean(history) + entropy_sigma * statistics.pstdev(history)
    wanted = H / T if T > 0 else max_branches
    forks = math.floor(min(wanted, max_branches)) if H > T else 0
    return Decision(H, H_initial, gain=H - T, probability=float(H > T), forks=forks)


def threshold(H, H_initial, *, entropy_threshold, max_branches, **_):
    """Fork min(floor(H * max_branches), max_branches) times if H > entropy_threshold (same blog).

    With its threshold of 0.5 that is never less than half of max_branches.
    """
    gain = H - entropy_threshold
    forks = min(math.floor(H * max_branches), max_branches) if gain > 0 else 0
    return Decision(H, H_initial, gain, probability=float(gain > 0), forks=forks)


def random_control(H, H_initial, *, u, branch_probability, max_branches, **_):
    """Fork when u < branch_probability, whatever H: the control experiment nobody published."""
    forks = max_branches if u < branch_probability else 0
    return Decision(H, H_initial, H - H_initial, branch_probability, forks)


def never(H, H_initial, **_):
    """No forks: every rollout starts at the question, which is GRPO."""
    return Decision(H, H_initial, H - H_initial, probability=0.0, forks=0)


def step(H, H_initial, *, u, threshold, branch_score, max_branches, **_):
    """Fork max_branches times if the score is above the step's running threshold (ours).

    All questions of a step share one budget, so that it goes where the score, H or the gain, is
    high. A random score is the control.
    """
    gain = H - H_initial
    score = {"entropy": H, "gain": gain, "random": u}[branch_score]
    forks = max_branches if score > threshold else 0
    return Decision(H, H_initial, gain, float(score > threshold), forks, score=score)


def running_threshold(scores: Sequence[Sequence[float]], wanted: float) -> float:
    """What so many of a step's scores exceed, if it is like the last ones: a list for each of them.

    Without any nothing is above it: all forks wait until the first paths have ended.
    """
    known = sorted((score for step in scores for score in step), reverse=True)
    above = round(wanted * len(scores))
    return known[above] if above < len(known) else -math.inf if known else math.inf


RULES: dict[str, Callable[..., Decision]] = {
    "paper": paper,
    "official": official,
    "adaptive": adaptive,
    "threshold": threshold,
    "step": step,
    "random": random_control,
    "none": never,
}
