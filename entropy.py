"""How uncertain is the policy, and should the rollout fork here?

ARPO (arXiv 2507.19849) begins new trajectories where the policy is uncertain. This file computes
the entropy of the next token, its mean over the first k tokens of a segment, and, by one of seven
rules, the branch decision. H is in nats until divided by ln V; then it lies in [0, 1].

Pure functions. k measured tokens, V tokens in the vocabulary. The random draw u is an argument,
so that a decision can be repeated.
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
    """Mean of H / ln V, from the entropies of k tokens in nats: 0 to 1; 0 for an empty list.

    The paper (Eq. 4) divides by V: if V = 152,000, the gain decides only where alpha = tau.
    """
    return sum(H) / max(1, len(H)) / math.log(vocab_size)


def official_entropy(topk_logp: Iterable[Iterable[float]], vocab_size: int) -> float:
    """-(sum of p ln p over the first 20 tokens and the likeliest tokens at each) / ln V.

    The released code (vllm_rollout_with_tools.py:172). A sum and not a mean, so it grows with the
    number of tokens: up to 3.86 for 20 tokens, the 10 likeliest (not renormalised), V = 152,000.
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
    probability: float  # P: compared with tau (paper), or the chance of a fork; in [0, 1]
    forks: int  # new paths that the rule wants, beside the one that goes on
    granted: int = 0  # new paths that begin here: at most those still to begin
    score: float | None = None  # of rule step: compared with the running threshold

    @property
    def rank(self) -> float:
        """If fewer paths are left than wanted, tool results with a higher rank come first."""
        return self.gain if self.score is None else self.score


def clip(x: float) -> float:
    return min(max(x, 0.0), 1.0)


# Every rule is called with the same arguments, by name, and ignores those it does not need: all
# settings (app/config.py), and
#   u            a random number, uniform in [0, 1)
#   history      the entropies measured before this one, in this tree (adaptive)
#   threshold    running_threshold of the last steps' scores (step)


def paper(
    H, H_initial, *, branch_probability, entropy_weight, entropy_threshold, max_branches, **_
):
    """P = clip(alpha + beta * (H - H_initial)), fork when P > tau (paper, Eq. 5; the clip is ours).

    Nothing is drawn. With the published alpha = tau = 0.5 this is H > H_initial for every beta > 0.
    """
    gain = H - H_initial
    probability = clip(branch_probability + entropy_weight * gain)
    forks = max_branches if probability > entropy_threshold else 0
    return Decision(H, H_initial, gain, probability, forks)


def official(H, H_initial, *, u, branch_probability, entropy_weight, **_):
    """Fork one copy when clip(u - w * (H - H_initial)) <= tau (vllm_rollout_with_tools.py:468).

    So P(fork) = clip(tau + w * gain) if tau < 1; published: tau (branch_probability) 0.5, w 0.2.
    """
    gain = H - H_initial
    probability = clip(branch_probability + entropy_weight * gain)
    fork = clip(u - entropy_weight * gain) <= branch_probability
    return Decision(H, H_initial, gain, probability, forks=int(fork))


ROUNDING = 1e-5  # of float32: equal entropies differ by less, computed in another batch


def adaptive(H, H_initial, *, history, entropy_sigma, max_branches, **_):
    """Fork min(floor(H / T), max_branches) times if H > T = mean + k_sigma * std (a blog on ARPO).

    Mean and std are those of the history; with fewer than two values T = H, so no fork.
    We read the blog's N_branches as the number of new paths, not counting the one that goes on.
    """
    T = H
    if len(history) > 1:
        T = statistics.fmean(history) + entropy_sigma * statistics.pstdev(history)
    wanted = H / T if T > 0 else max_branches
    above = H - T > ROUNDING
    forks = math.floor(min(wanted, max_branches)) if above else 0
    return Decision(H, H_initial, gain=H - T, probability=float(above), forks=forks)


def threshold(H, H_initial, *, entropy_threshold, max_branches, **_):
    """Fork min(floor(H * max_branches), max_branches) times if H > entropy_threshold (same blog).

    With the blog's threshold of 0.5: about half of max_branches or more, or none.
    """
    gain = H - entropy_threshold
    forks = min(math.floor(H * max_branches), max_branches) if gain > 0 else 0
    return Decision(H, H_initial, gain, probability=float(gain > 0), forks=forks)


def random_control(H, H_initial, *, u, branch_probability, max_branches, **_):
    """Fork when u < branch_probability, whatever H is: the control experiment."""
    forks = max_branches if u < branch_probability else 0
    return Decision(H, H_initial, H - H_initial, branch_probability, forks)


def never(H, H_initial, **_):
    """No forks: every trajectory begins at the question, which is GRPO."""
    return Decision(H, H_initial, H - H_initial, probability=0.0, forks=0)


def step(H, H_initial, *, u, threshold, branch_score, max_branches, **_):
    """Fork max_branches times if the score is above the step's running threshold (ours).

    All questions of a step share the trajectories, so that more begin where the score (H or the
    gain) is high. A random score is the control.
    """
    gain = H - H_initial
    score = {"entropy": H, "gain": gain, "random": u}[branch_score]
    forks = max_branches if score > threshold else 0
    return Decision(H, H_initial, gain, float(score > threshold), forks, score=score)


def running_threshold(scores: Sequence[Sequence[float]], wanted: float) -> float:
    """The score that about `wanted` results a step exceeded in the last steps (a list for each).

    Without scores it is inf: nothing forks until the first paths have ended.
    """
    known = sorted((score for some in scores for score in some), reverse=True)
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
