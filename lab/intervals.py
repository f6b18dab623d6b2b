"""How sure is a mean over a few seeds? Intervals and paired differences.

Pure functions on plain numbers. An estimate is (mean, low, high), its 95 % interval; low and high
are None where one value alone says nothing about its spread.
"""

from collections.abc import Callable, Sequence

import numpy as np

Estimate = tuple[float, float | None, float | None]

# 97.5 % quantiles of Student's t for 1, 2, .. degrees of freedom: five seeds have four, and the
# normal distribution's 1.96 would make their interval a third too short.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_interval(values: Sequence[float]) -> Estimate:
    """mean +- t * s / sqrt(n), s with n - 1; beyond 31 values t stays at 2.042, a little wide."""
    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return mean, None, None
    half = T_975[min(n - 1, len(T_975)) - 1] * float(np.std(values, ddof=1)) / n**0.5
    return mean, mean - half, mean + half


def paired(ours: dict, theirs: dict, of: Callable = lambda a, b: a - b) -> Estimate | None:
    """The interval of of(a, b), by default the difference, over the keys (seeds) both have."""
    both = [key for key in ours if key in theirs]
    return t_interval([of(ours[key], theirs[key]) for key in both]) if both else None
