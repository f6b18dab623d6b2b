"""Exercise 6: the one-token shift                                           20 minutes

The logits that a causal model gives at position t - 1 score the token at position t. Here every
array is (B, T), and index t describes token t: so one function, and only one, has to shift.

    logp[b, t] = log_softmax(logits[b, t - 1] / temperature)[input_ids[b, t]]

Index 0 is 0, for nothing comes before it. A tree that is packed into one row has every shared token
once; then the token before token t is not always at t - 1. Its index is parent[b, t], or -1:

    question -- thought, call, result -+- answer 1        index     0 1 2 3 4 5 6
                                       +- answer 2        parent   -1 0 1 2 3 2 5

    python -m course.grade 6
"""

from torch import Tensor


def logprobs(logits: Tensor, input_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, T, V), (B, T) -> (B, T): the log-prob of each token, and 0 at index 0.

    Gradients must reach the logits.
    """
    raise NotImplementedError


def tree_logprobs(
    logits: Tensor, input_ids: Tensor, parent: Tensor, temperature: float = 1.0
) -> Tensor:
    """The same where parent (B, T) says which index comes before each token; 0 where it is -1."""
    raise NotImplementedError
