"""What exercise 6 is checked for; the oracle is engine.packing.token_logprobs."""

import dataclasses
from types import SimpleNamespace

import torch
from torch import Tensor

from advantage import Segment
from course.checking import check, require, same
from engine.memory import Limits
from engine.packing import make_batch, make_row, token_logprobs

V = 11


def oracle(logits: Tensor, input_ids: Tensor, parent: Tensor, temperature: float = 1.0) -> Tensor:
    """The project's log-probs, from a model whose last layer gives these logits."""
    row = make_row([Segment("prompt", [0])], {})
    tokens = {"input_ids": input_ids, "parent": parent, "weight": (parent >= 0).long()}
    batch = dataclasses.replace(make_batch([row], 0, "cpu"), **tokens)
    lm = SimpleNamespace(
        get_decoder=lambda: lambda **_: SimpleNamespace(last_hidden_state=logits),
        get_output_embeddings=lambda: lambda hidden: hidden,
    )
    policy = SimpleNamespace(lm=lm, limits=Limits(), vocab_size=logits.shape[-1])
    return token_logprobs(policy, batch, temperature)


def chain(B: int, T: int) -> Tensor:
    return torch.arange(-1, T - 1).expand(B, T)


def random_case(seed: int, B: int = 2, T: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, V, generator=generator, requires_grad=True) * 2
    return logits, torch.randint(V, (B, T), generator=generator)


@check(points=2)
def by_hand(answer):
    """p = (.9 .1), (.25 .75), (.6 .4), tokens 0, 1, 0: logp = 0, ln 0.1, ln 0.25"""
    p = torch.tensor([[[0.9, 0.1], [0.25, 0.75], [0.6, 0.4]]])
    logits, ids = p.log(), torch.tensor([[0, 1, 0]])
    mistakes = {
        "nothing is shifted: the logits at t score the token at t + 1": (0.75, 0.6),
        "this is shifted the other way: logits cannot score a token of the past": (0.4, 1.0),
        "right numbers, one place too early: index t describes token t": (0.25, 1.0),
    }
    mistakes = {words: torch.tensor([pair]).log() for words, pair in mistakes.items()}
    mistakes["these are probabilities: take the logarithm"] = [[0.1, 0.25]]
    mistakes["the sign is wrong: a log-prob is never above 0"] = [[2.3026, 1.3863]]
    wanted = torch.tensor([[0.1, 0.25]]).log()
    same(answer.logprobs(logits, ids)[:, 1:], wanted, "tokens 1 and 2", mistakes)


@check(points=1)
def first_token(answer):
    """the result is (B, T), and index 0 is 0 in every row"""
    logits, ids = random_case(0, B=3, T=4)
    got = answer.logprobs(logits, ids)
    hint = "one value for each token, the first included"
    require(got.shape == (3, 4), f"shape {tuple(got.shape)}, expected (3, 4): {hint}")
    same(got[:, 0], torch.zeros(3), "nothing comes before token 0, so nothing scores it")


@check(points=1)
def softmax(answer):
    """the same number added to all logits of a position changes nothing, also 1000"""
    logits, ids = random_case(1)
    wanted = answer.logprobs(logits, ids)
    for added in (5.0, 1000.0):
        hint = f"with {added:g} added: a log_softmax is needed, and exp(1000) is inf"
        same(answer.logprobs(logits + added, ids), wanted, hint, tolerance=1e-3)


@check(points=1)
def temperature(answer):
    """logits are divided by the temperature, then comes the softmax"""
    logits, ids = random_case(2)
    for T in (0.5, 2.0):
        for name, given in (("logprobs", ()), ("tree_logprobs", (chain(2, 6),))):
            wanted, at_one, at_inverse = (
                oracle(logits, ids, chain(2, 6), x) for x in (T, 1, 1 / T)
            )
            mistakes = {
                f"{name}: the logits are multiplied by the temperature": at_inverse,
                f"{name}: the temperature has no effect": at_one,
                f"{name}: the log-prob is divided, not the logits": at_one / T,
            }
            got = getattr(answer, name)(logits, ids, *given, temperature=T)
            same(got, wanted, f"{name}, temperature {T}", mistakes)


@check(points=1)
def several_rows(answer):
    """rows of different lengths and batches: as the project's"""
    for seed, (B, T) in enumerate(((1, 2), (1, 7), (4, 3), (3, 5))):
        logits, ids = random_case(seed, B, T)
        got = answer.logprobs(logits, ids)
        same(got, oracle(logits, ids, chain(B, T)), f"B = {B}, T = {T}")


@check(points=1)
def chain_is_a_tree(answer):
    """tree_logprobs with parent[t] = t - 1 is logprobs"""
    logits, ids = random_case(4)
    wanted = oracle(logits, ids, chain(2, 6))
    same(answer.tree_logprobs(logits, ids, chain(2, 6)), wanted, "no fork in here at all")


def tree() -> Tensor:
    """The parents of a packed tree, (1, T), by the project's make_row."""
    root = Segment("prompt", [1, 2])
    call = Segment("policy", [3, 4], parent=root)
    result = Segment("tool", [5, 6], parent=call)
    leaves = [Segment("policy", [7, 8], parent=result) for _ in range(3)]
    other = Segment("policy", [9, 10, 1], parent=root)
    return torch.tensor([make_row([*leaves, other], {}).parent])


@check(points=2)
def fork(answer):
    """the first token of each branch is scored where the tree forks"""
    parent = tree()
    T = parent.shape[1]
    logits, ids = random_case(5, 1, T)
    in_row = "the token before it in the row is not the token before it in the tree"
    mistakes = {in_row: oracle(logits, ids, chain(1, T))}
    got, wanted = answer.tree_logprobs(logits, ids, parent), oracle(logits, ids, parent)
    same(got, wanted, f"parent = {parent[0].tolist()}", mistakes)


@check(points=1)
def no_parent(answer):
    """a parent of -1 gives 0, wherever it stands, and rows may have different parents"""
    parent = torch.cat([tree(), chain(1, tree().shape[1])]).clone()
    parent[1, 4] = -1  # a second text begins in this row
    logits, ids = random_case(6, *parent.shape)
    got = answer.tree_logprobs(logits, ids, parent)
    hint = "in Python index -1 is the last one; here it means: none"
    same(got[parent < 0], torch.zeros(3), hint)
    same(got, oracle(logits, ids, parent), "two rows with different parents")
