"""What exercise 5 is checked for; the oracle: make_row, make_batch and policy_loss."""

import random

import torch
from torch import Tensor

from advantage import Segment
from app.config import Config
from arpo_mini import policy_loss
from course.checking import check, require, same
from engine.packing import Batch, Row, make_batch, make_row

EOS = 9  # ends a turn, and is the padding too


def trajectory(*turns: list[int]) -> Segment:
    """Prompt, policy, tool, policy, ..: the leaf of a path with these token ids."""
    segment = Segment("prompt", turns[0])
    for i, token_ids in enumerate(turns[1:]):
        author, stop = (("policy", "tool"), ("tool", None))[i % 2]
        segment = Segment(author, token_ids, parent=segment, stop=stop)
    segment.stop = "eos"
    return segment


# The prompt has an end of turn in it, the result too; the policy wrote 5 6 9, then 7 9 5 9.
LEAF = trajectory([1, EOS, 2], [5, 6, EOS], [3, EOS, 4], [7, EOS, 5, EOS])


def row_of(leaf: Segment, advantage: float = 1.0) -> Row:
    policy = [segment for segment in leaf.path() if segment.author == "policy"]
    return make_row([leaf], {segment: {leaf: advantage} for segment in policy})


def random_leaf(rng: random.Random) -> Segment:
    turns = [[rng.randint(0, 9) for _ in range(rng.randint(1, 5))] for _ in range(6)]
    return trajectory(*turns[: rng.choice([2, 4, 6])])


def marked(answer) -> list[bool]:
    """What it says of LEAF."""
    got = answer.trained_tokens(LEAF)
    same(len(got), LEAF.depth(), "one bool for each token of the path, the prompt's included")
    return got


@check(points=1)
def prompt(answer):
    """the question is not trained"""
    require(not any(marked(answer)[:3]), "a token of the prompt is trained: nobody sampled it")


@check(points=1)
def results(answer):
    """a tool result is not trained"""
    hint = "a token of the tool result is trained: the policy read it and did not write it"
    require(not any(marked(answer)[6:9]), hint)


@check(points=2)
def stop_token(answer):
    """the token that ends a turn of the policy is trained, though it is the padding's id"""
    got = marked(answer)
    hint = "is not trained: so the policy never learns to stop; do not look at its id"
    require(got[5], f"the stop token of the first turn {hint}")
    require(got[12], f"the stop token of the last turn {hint}")


@check(points=1)
def every_turn(answer):
    """all else that the policy wrote is trained, in the first turn and in the last"""
    got = marked(answer)
    require(got[4], "the turn before the result is not trained: a path has many segments")
    require(got[11], "the last turn is not trained")
    hint = "index t describes token t, and nothing is shifted here"
    require(got[3] and got[9], f"the first token of a turn is not trained: {hint}")
    require(got[10], "a token inside the last turn is not trained: its id is that of the padding")


@check(points=1)
def author_not_id(answer):
    """100 random trajectories: as the project's rows, whatever the ids"""
    rng = random.Random(0)
    for _ in range(100):
        leaf = random_leaf(rng)
        wanted = [weight > 0 for weight in row_of(leaf).weight]
        hint = f"authors {[s.author for s in leaf.path()]}: it is not the author's"
        same(answer.trained_tokens(leaf), wanted, hint)


def batch_of(leaves: list[Segment]) -> Batch:
    return make_batch([row_of(leaf) for leaf in leaves], EOS, "cpu")


@check(points=2)
def padding(answer):
    """rows are filled up on the right with pad_id, and padding is not trained"""
    rng = random.Random(1)
    for n in (1, 2, 5):
        leaves = [LEAF, *(random_leaf(rng) for _ in range(n - 1))]
        batch = batch_of(leaves)
        got = answer.padded(leaves, EOS)
        left = {"these are filled up on the left: here it is the right": flush_right(leaves)}
        same(got[0], batch.input_ids, "the token ids of the trajectories", left if n > 1 else None)
        all_ones = {
            "the padding is trained, or the prompt, or a result": torch.ones(n, LEAF.depth())
        }
        hint = "which tokens are trained; padding never is"
        same(got[1], batch.weight > 0, hint, all_ones)


def flush_right(leaves: list[Segment]) -> Tensor:
    T = max(leaf.depth() for leaf in leaves)
    return torch.tensor([[EOS] * (T - leaf.depth()) + leaf.path_tokens() for leaf in leaves])


def parts_of(leaves: list[Segment], advantages: list[float], sizes: list[int]):
    """Micro-batches of these sizes, with a loss also where nothing is trained; the wanted mean."""
    rows = [row_of(*pair) for pair in zip(leaves, advantages, strict=True)]
    total, parts, wanted = sum(sum(row.weight) for row in rows), [], 0.0
    for size in sizes:
        batch = make_batch(rows[:size], EOS, "cpu")
        rows = rows[size:]
        logp = torch.zeros(batch.weight.shape, requires_grad=True)  # the ratio is 1, the loss -A
        wanted += policy_loss(logp, logp.detach(), batch, Config(), total)[0]
        trained = batch.weight > 0
        parts.append((torch.where(trained, logp - batch.A_plus - batch.A_minus, 50.0), trained))
    return parts, wanted


@check(points=1)
def mean_over_trained(answer):
    """mean_loss counts trained tokens only: neither prompts nor results nor padding"""
    short = trajectory([1], [2])
    parts, wanted = parts_of([LEAF, short], [1.0, -2.0], [2])
    loss, trained = parts[0]
    by_row = ((loss * trained).sum(dim=1) / trained.sum(dim=1)).mean()
    mistakes = {
        "this is a mean over padding, prompts and results too": (loss * trained).mean(),
        "the loss of tokens that are not trained is in there": loss.mean(),
        "this is a mean of the means of the rows: it favours short answers": by_row,
        "this is the sum: divide by the number of trained tokens": (loss * trained).sum(),
    }
    same(answer.mean_loss(parts), wanted, "one micro-batch of two rows", mistakes)


@check(points=1)
def one_normaliser(answer):
    """however the step is cut into micro-batches, the mean is the project's"""
    rng = random.Random(2)
    leaves = [random_leaf(rng) for _ in range(6)]
    advantages = [rng.gauss(0, 1) for _ in leaves]
    for sizes in ([6], [1, 5], [2, 3, 1]):
        parts, wanted = parts_of(leaves, advantages, sizes)
        each = [loss[trained].mean() for loss, trained in parts]
        mistakes = {
            "this is a mean of means: a token counts more in a small one": sum(each) / len(each)
        }
        cut = f"cut into {sizes}"
        same(answer.mean_loss(parts), wanted, cut, mistakes if len(sizes) > 1 else None)
