"""What exercise 1 is checked for; the oracle is entropy.py."""

import math

import torch

import entropy
from course.checking import check, same

LN2 = math.log(2)
NAN = "0 times -inf is nan: a token without a chance must add 0"


@check(points=1)
def natural_log(answer):
    """V equal logits give ln V"""
    for V in (2, 5, 1270):
        H = math.log(V)
        mistakes = {
            "this is in bits: the formula has the natural logarithm": math.log2(V),
            "this is with the logarithm to base 10: take the natural one": math.log10(V),
            "the sign is wrong: ln p is never above 0, H never below": -H,
            "this is a mean over the vocabulary: the formula has a sum": H / V,
        }
        same(answer.token_entropy(torch.zeros(V)), H, f"V = {V}", mistakes)


@check(points=1)
def by_hand(answer):
    """p = (1/2, 1/4, 1/4) gives 1/2 ln 2 + 1/4 ln 4 + 1/4 ln 4 = 1.5 ln 2; and 50 random cases"""
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    mistakes = {
        "this is in bits": 1.5,
        "this is not weighted: each ln p counts p times": 5 * LN2,
        "this is the surprise of the likeliest token: sum over all": LN2,
    }
    same(answer.token_entropy(logits), 1.5 * LN2, "work it out on paper", mistakes)
    for logits in 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0)):
        same(answer.token_entropy(logits), entropy.token_entropy(logits), f"logits {logits}")


@check(points=1)
def logits_not_probabilities(answer):
    """the same number added to every logit changes nothing, also 1000"""
    logits = torch.tensor([0.3, -1.2, 2.0, 0.0])
    wanted = answer.token_entropy(logits)
    for added in (3.0, -50.0, 1000.0):
        hint = f"with {added:g} added: logits need a softmax, and exp(1000) is inf"
        same(answer.token_entropy(logits + added), wanted, hint, tolerance=1e-3)


@check(points=2)
def one_hot(answer):
    """a token that is certain gives 0, with logits of -inf beside it or of -1000"""
    for low in (-math.inf, -1000.0):
        logits = torch.tensor([low, 0.0, low, low])
        same(answer.token_entropy(logits), 0.0, f"the other logits are {low}. {NAN}")


@check(points=1)
def minus_infinity(answer):
    """two equal logits beside two of -inf give what two alone give"""
    logits = torch.tensor([-math.inf, 1.0, 1.0, -math.inf])
    same(answer.token_entropy(logits), answer.token_entropy(torch.zeros(2)), NAN)


@check(points=1)
def last_dimension(answer):
    """logits (B, k, V) give (B, k), and (V,) gives a single number"""
    for shape in ((3, 4, 6), (2, 6), (6,)):
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
        alone = [float(answer.token_entropy(row)) for row in logits.view(-1, 6)]
        hint = "softmax and sum go over the last dimension, V, and over no other"
        same(answer.token_entropy(logits), torch.tensor(alone).view(shape[:-1]), hint)


@check(points=1)
def precision(answer):
    """logits in bfloat16 are made float32 first"""
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(2)).bfloat16()
    hint = "bfloat16 keeps 3 digits; a sum of 1000 terms needs more"
    wanted = answer.token_entropy(logits.float())
    same(answer.token_entropy(logits), wanted, hint, tolerance=1e-3)


@check(points=1)
def mean_over_tokens(answer):
    """H of k tokens becomes one mean, divided by ln V: in [0, 1], whatever k"""
    cases = [([2 * LN2, LN2, 0.0], 4), ([2 * LN2] * 8, 4), ([0.1, 0.7, 0.4], 1270), ([LN2], 2)]
    for H, V in cases:
        mistakes = {
            "this is the sum over the tokens: it grows with k": sum(H) / math.log(V),
            "this is divided by V, as in the paper; here it is ln V": sum(H) / len(H) / V,
            "this is not divided by ln V": sum(H) / len(H),
            "this is divided by log2 V, but H is in nats": sum(H) / len(H) / math.log2(V),
        }
        wanted = entropy.normalised_entropy(H, V)
        mistakes = {words: x for words, x in mistakes.items() if abs(x - wanted) > 1e-3}
        same(answer.normalised_entropy(H, V), wanted, f"H = {H}, V = {V}", mistakes)


@check(points=1)
def nothing_written(answer):
    """no token, no choice: 0"""
    hint = "a segment can be empty: a mean of nothing divides by 0"
    same(answer.normalised_entropy([], 1270), entropy.normalised_entropy([], 1270), hint)
