"""Solution 2. Measured: 10 of 10 points.

P > tau means gain > (tau - alpha) / beta. The published alpha and tau are equal, so this is
gain > 0: beta and what H is divided by have no effect. The released rule forks with chance
0.5 + 0.2 gain, which is near a coin flip.
"""

from entropy import Decision


def clip(x):
    return min(max(x, 0.0), 1.0)


def paper(
    H, H_initial, *, branch_probability, entropy_weight, entropy_threshold, max_branches, **_
) -> Decision:
    gain = H - H_initial
    probability = clip(branch_probability + entropy_weight * gain)
    forks = max_branches if probability > entropy_threshold else 0
    return Decision(H, H_initial, gain, probability, forks)


def official(H, H_initial, *, u, branch_probability, entropy_weight, **_) -> Decision:
    gain = H - H_initial
    forks = 1 if clip(u - entropy_weight * gain) <= branch_probability else 0
    return Decision(H, H_initial, gain, clip(branch_probability + entropy_weight * gain), forks)


def random_control(H, H_initial, *, u, branch_probability, max_branches, **_) -> Decision:
    forks = max_branches if u < branch_probability else 0
    return Decision(H, H_initial, H - H_initial, branch_probability, forks)


def gain_needed(alpha: float, beta: float, tau: float) -> float:
    return (tau - alpha) / beta


SAME_FORKS = {
    "beta 20 instead of 0.2": True,
    "beta 0 instead of 0.2": False,
    "alpha 0.6 instead of 0.5": False,
    "alpha and tau 0.3 instead of 0.5": True,
    "H and H_initial divided by V instead of ln V": True,
}
