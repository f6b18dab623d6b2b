"""Exercise 1: how uncertain is the next token?                              15 minutes

A policy gives each of the V words of its vocabulary a score, its logit. The softmax of the logits
is the probability p_v that word v comes next. The entropy says how uncertain the policy is:

    H = - sum over v of p_v ln p_v        in nats; arXiv 2507.19849, Eq. 3

It is 0 when one word is certain, and ln V when all are equally likely. ARPO measures the first k
tokens after a tool result; here their mean is divided by the largest value there is, ln V:

    mean(H_1, .., H_k) / ln V             in [0, 1]; the paper's Eq. 4 divides by V instead

    python -m course.grade 1
"""

from collections.abc import Sequence

from torch import Tensor


def token_entropy(logits: Tensor) -> Tensor:
    """(..., V) -> (...): H of each position. A logit of -inf means p = 0, which adds nothing.

    Logits may come in bfloat16, which is too coarse for a sum over a vocabulary.
    """
    raise NotImplementedError


def normalised_entropy(H: Sequence[float], vocab_size: int) -> float:
    """The mean of the k numbers in H, in nats, divided by ln V. No numbers: 0."""
    raise NotImplementedError
