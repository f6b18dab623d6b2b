"""Exercise 2: should the rollout fork here?                                 20 minutes

After a tool result the policy's entropy H is compared with H_initial, that at the start of the
same trajectory. Three rules decide how many extra paths begin there:

    paper      P = clip(alpha + beta (H - H_initial)); fork Z times when P > tau
               (arXiv 2507.19849, Eq. 5; clip: to [0, 1], which is ours)
    official   the released code draws u from [0, 1) and forks one copy when
               clip(u - w (H - H_initial)) <= tau       (vllm_rollout_with_tools.py:468)
    random     fork Z times when u < p, whatever H: the control experiment

Published: alpha = 0.5, beta = w = 0.2, tau = 0.5. The project's names for them:

    branch_probability   alpha of the paper; tau of the released code; p of the random rule
    entropy_weight       beta of the paper; w of the released code
    entropy_threshold    tau of the paper
    max_branches         Z

    python -m course.grade 2
"""

from entropy import Decision  # Decision(H, H_initial, gain, probability, forks)


def paper(
    H, H_initial, *, branch_probability, entropy_weight, entropy_threshold, max_branches, **_
) -> Decision:
    """gain: how far H is above H_initial; probability: P."""
    raise NotImplementedError


def official(H, H_initial, *, u, branch_probability, entropy_weight, **_) -> Decision:
    """probability: the chance of a fork over all u. Find a formula for it (tau < 1)."""
    raise NotImplementedError


def random_control(H, H_initial, *, u, branch_probability, max_branches, **_) -> Decision:
    """gain as above, although the rule does not look at it; probability: p."""
    raise NotImplementedError


def gain_needed(alpha: float, beta: float, tau: float) -> float:
    """The paper's rule forks exactly where H - H_initial is above this number. beta > 0, tau < 1.

    Solve P > tau for the gain. Then put in the published alpha and tau: what does beta do?
    """
    raise NotImplementedError


# The published constants, and one change at a time. Does the paper's rule still fork at the same
# tool results, whatever H and H_initial are? True or False.
SAME_FORKS = {
    "beta 20 instead of 0.2": None,
    "beta 0 instead of 0.2": None,
    "alpha 0.6 instead of 0.5": None,
    "alpha and tau 0.3 instead of 0.5": None,
    "H and H_initial divided by V instead of ln V": None,
}
