"""The update: every token counted once and for the right trajectories, however it is batched."""

import copy
from dataclasses import replace
from itertools import pairwise

import bitsandbytes as bnb
import pytest
import torch
from common import TINY, kept, random_trees
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from advantage import Reward, Segment, group_advantages, segment_advantages, shared_by
from arpo_mini import credit, fixed_logprobs, judge, policy_loss, update
from data.formats import Question
from engine.packing import SIMILAR, make_batch, make_row, micro_batches, split_tree, token_logprobs

EQUAL = [Reward(1.0, 1.0, True, 1)] * 8


def some_rewards(leaves, seed=0):
    values = torch.rand(len(leaves), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Reward(v, v, True, 1) for v in values]


def packed_rows(groups, config):
    return [row for i, g in enumerate(groups) for row in credit(g, some_rewards(g, i), config)]


def plain_rows(groups, config):
    """A row for each trajectory, made without `credit` and without `split_tree`."""
    rows = []
    for i, leaves in enumerate(groups):
        A = group_advantages([reward.total for reward in some_rewards(leaves, i)])
        below = shared_by(leaves)
        shares = segment_advantages(leaves, A, config.shared_weight)
        for j, leaf in enumerate(leaves):
            path = [segment for segment in leaf.path() if segment in shares]
            own = {s: {leaf: shares[s][below[s].index(j)].item()} for s in path}
            rows.append(make_row([leaf], own))
    return rows


def flat_gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])


def gradient(policy, rows, config, budget=10**9):
    """Loss, clipped tokens and gradient; old log-probs that make the clip act on both sides."""
    policy.model.zero_grad()
    total, sums = sum(sum(row.weight) for row in rows), torch.zeros(2)
    for some in micro_batches(rows, budget):
        batch = make_batch(some, policy.pad_id, policy.device)
        _, (ref_logp,) = fixed_logprobs(policy, [batch], config)
        logp = token_logprobs(policy, batch, config.temperature)
        shift = 0.5 * torch.sin(batch.input_ids + 3.0 * batch.position_ids)  # off-policy
        loss, clipped = policy_loss(logp, logp.detach() + shift, batch, config, total, ref_logp)
        loss.backward()
        sums += torch.stack([loss.detach(), clipped])
    return sums, flat_gradient(policy)


def assert_close(a, b, tolerance=1e-4):
    (figures_a, grad_a), (figures_b, grad_b) = a, b
    assert figures_a == pytest.approx(figures_b, rel=tolerance, abs=1e-5)
    assert grad_a.norm() > 1e-4
    assert (grad_a - grad_b).norm() < tolerance * grad_a.norm()


LOSSES = {"shared_weight": [0.0, 0.3, 1.0], "kl_coefficient": [0.1, 0.0], "temperature": [1.0, 0.7]}
LOSSES |= {"dual_clip": [None, 1.3]}


@settings(max_examples=20)
@given(
    groups=st.lists(random_trees(), min_size=1, max_size=2),
    limit=st.integers(1, 40),
    budget=st.integers(1, 90),
    changes=st.fixed_dictionaries({name: st.sampled_from(LOSSES[name]) for name in LOSSES}),
)
def test_packed_and_cut_anywhere_is_one_row_a_trajectory(tiny, groups, limit, budget, changes):
    config = replace(TINY, micro_batch_tokens=limit, **changes)
    packed, plain = packed_rows(groups, config), plain_rows(groups, config)
    paths = [leaf.depth() for leaves in groups for leaf in leaves]
    assert all(len(row) <= limit or len(row) in paths for row in packed)
    assert sum(map(len, packed)) <= sum(map(len, plain))
    assert sum(sum(r.weight) for r in packed) == sum(sum(r.weight) for r in plain)
    batches = micro_batches(packed, budget)
    for some in batches:
        assert len(some) == 1 or len(some[-1]) <= min(budget // len(some), SIMILAR * len(some[0]))
    for some, (row, *_) in pairwise(batches):  # as many as may be together
        assert len(row) * (len(some) + 1) > budget or len(row) > SIMILAR * min(map(len, some))
    expected = gradient(tiny, plain, config)
    assume(expected[1].norm() > 1e-4)  # the clip may have taken all of it away
    assert_close(gradient(tiny, packed, config, budget), expected)


def test_a_cut_keeps_siblings_together():
    """question - a - (b, c) and question - d: what shares more stays in one row."""
    root = Segment("prompt", [0] * 10)
    a, d = Segment("policy", [1] * 20, root), Segment("policy", [2] * 5, root)
    b, c = Segment("policy", [3] * 5, a), Segment("policy", [4] * 5, a)
    assert split_tree([b, d, c], 45) == [[b, d, c]]
    assert split_tree([b, d, c], 44) == [[b, c], [d]]
    assert split_tree([b, d, c], 39) == [[b], [c], [d]]
    assert split_tree([b, d, c], 1) == [[b], [c], [d]]  # a trajectory cannot be cut


def test_4bit_has_the_values_and_gradient_of_its_weights(policy_4bit, config, groups_4bit):
    """Packed, plain and unquantised; that it is what was sampled: test_dtype.py.

    bitsandbytes repacks NF4 weights for inference on some CPUs and then drops the gradient. The
    shipped policy is rolled out (no gradient) before it is trained, as here.
    """
    config = replace(config, kl_coefficient=0.1, micro_batch_tokens=200)
    packed, plain = packed_rows(groups_4bit, config), plain_rows(groups_4bit, config)
    assert sum(map(len, packed)) < sum(map(len, plain))
    through_nf4 = gradient(policy_4bit, packed, config)
    assert_close(through_nf4, gradient(policy_4bit, plain, config), tolerance=1e-3)
    unquantised = copy.deepcopy(policy_4bit)
    unquantised.lm.dequantize()
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in unquantised.lm.modules())
    assert_close(through_nf4, gradient(unquantised, packed, config), tolerance=1e-3)


def test_loss_is_the_textbook_one(tiny_groups):
    """PPO's clip, dual clip, KL, token mean, count, a row a trajectory. Packed: the tests above."""
    config = replace(TINY, dual_clip=1.5, kl_coefficient=0.2)
    batch = make_batch(plain_rows(tiny_groups, config), 0, "cpu")
    generator, total = torch.Generator().manual_seed(5), batch.weight.sum().item()
    logp, old, ref = 0.4 * torch.randn(3, *batch.weight.shape, generator=generator)  # (B, T) each
    loss, clipped = policy_loss(logp, old, batch, config, total, ref)
    a, ratio, d = batch.A_plus + batch.A_minus, (logp - old).exp(), ref - logp
    clipped_to = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    objective = torch.where(a < 0, clipped_to.max(1.5 * a), clipped_to)
    kl = batch.weight * (d.exp() - d - 1).clamp(max=10)
    assert loss.item() == pytest.approx((0.2 * kl - objective).sum().item() / total, rel=1e-4)
    cut = (ratio > 1.2) & (a > 0) | ((ratio < 0.8) | (ratio > 1.5)) & (a < 0)
    assert clipped == cut.sum() > 0


def test_one_update_is_on_policy_and_several_are_not(restored, tiny_groups):
    """The clip acts in later updates; the reference is the policy without its adapter."""
    rows, figures = packed_rows(tiny_groups, TINY), []
    batch = make_batch(rows, 0, "cpu")
    assert fixed_logprobs(restored, [batch], TINY) == ([None], [None])
    for n in (1, 3):
        optimizer = torch.optim.AdamW(restored.parameters, lr=3e-3, weight_decay=0.0)
        with kept(restored.parameters):
            config = replace(TINY, updates_per_rollout=n)
            figures.append(update(restored, optimizer, rows, config))
    once, thrice = figures
    assert once["clip_fraction"] == 0 and once["grad_norm"] > 0
    assert 0 < thrice["clip_fraction"] < 1 and thrice["loss"] != once["loss"]
    config = replace(TINY, kl_coefficient=1.0, updates_per_rollout=2)
    ((old,), (ref,)) = fixed_logprobs(restored, [batch], config)
    with torch.no_grad():
        assert torch.equal(old, token_logprobs(restored, batch, 1.0))
        for parameter in restored.parameters:
            parameter.zero_()
        assert not torch.allclose(ref, old, atol=1e-2)
        assert torch.allclose(ref, token_logprobs(restored, batch, 1.0), atol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.1])
def test_a_group_of_equal_rewards_changes_nothing_but_the_mean(restored, tiny_groups, kl):
    """Left out or trained: the same loss and gradient. The KL term pulls at it all the same."""
    config = replace(TINY, kl_coefficient=kl)
    (dead,), alive = credit(tiny_groups[0], EQUAL, config), packed_rows(tiny_groups[1:], config)
    nearly = replace(dead, A_plus=[a + 1e-30 for a in dead.A_plus])  # a gradient: it is trained
    found = []
    for rows in ([*alive, dead], [*alive, nearly]):
        figures = update(restored, torch.optim.SGD(restored.parameters, lr=0.0), rows, config)
        found.append((figures["loss"], flat_gradient(restored)))
        assert figures["train_tokens"] == sum(map(len, rows if kl or nearly in rows else alive))
    assert_close(*found, tolerance=1e-5)


def test_equal_rewards_train_nothing_and_cost_nothing_but_momentum_acts(restored, tiny_groups):
    """As if the rows had been trained: not skipped, as parameters whose gradient is None are."""
    equal = [row for leaves in tiny_groups for row in credit(leaves, EQUAL, TINY)]
    optimizer = torch.optim.AdamW(restored.parameters, lr=1e-2, weight_decay=0.0)
    moved = []
    for rows in (equal, packed_rows(tiny_groups, TINY), equal):
        before = [p.detach().clone() for p in restored.parameters]
        figures = update(restored, optimizer, rows, TINY)
        moved.append(not all(map(torch.equal, before, restored.parameters)))
    assert moved == [False, True, True] and figures["loss"] == figures["grad_norm"] == 0
    assert figures["train_tokens"] == 0 and figures["drift_mean"] is figures["drift_max"] is None


def test_the_sampler_is_compared_with_the_trainer_token_by_token(restored, tiny_groups):
    """At every token that it drew, padding left out. And a gradient's norm becomes at most 1."""
    rows = packed_rows(tiny_groups, TINY)
    for row, by in zip(rows, (0.5, -0.25), strict=True):  # only what is written down is changed
        row.sampled_logp = [logp - by for logp in row.sampled_logp]
        row.A_plus = [1000 * a for a in row.A_plus]
    optimizer = torch.optim.SGD(restored.parameters, lr=1e-3)
    figures = update(restored, optimizer, rows, replace(TINY, updates_per_rollout=2))
    a, b = (sum(weight > 0 for weight in row.weight) for row in rows)
    expected = {"drift_mean": (0.5 * a + 0.25 * b) / (a + b), "drift_max": 0.5}
    assert {name: figures[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert figures["grad_norm"] > 2 * flat_gradient(restored).norm() == pytest.approx(2, rel=1e-4)


BOTH, ONE = ("search", "calculator"), ("search", "search")
CALLED = [(BOTH, "-2", False, 1.1), (BOTH, "2", False, 0.0), (ONE, "-2", False, 1.0)]
CALLED += [(("search", None), "-2", False, 1.0)]  # only a tool that answered counts
CALLED += [((None, None), "2", True, 1.1)]  # no authors, punctuation or failed calls there


@pytest.mark.parametrize("kinds, gold, official, total", CALLED)
def test_a_leaf_is_judged_by_what_each_author_wrote(policy, config, kinds, gold, official, total):
    """The released code knows our calculator as python."""
    texts = ["<think>a</think><search>x</search>", "<result>\nb\n</result>"]
    texts += ["<think>a</think><calculator>1+1</calculator>", "<result>\n2\n</result>"]
    texts += ["<think>a</think><answer>\\boxed{-2}</answer><|im_end|>"]
    leaf, kinds = Segment("prompt", policy.prompt("q")), iter(kinds)
    for i, text in enumerate(texts):
        ids = policy.tokenizer.encode(text, add_special_tokens=False)
        leaf = Segment(("policy", "tool")[i % 2], ids, leaf, tool=next(kinds) if i % 2 else None)
    leaf.stop = "eos"
    found = judge(policy, leaf, Question("q", [gold]), replace(config, official_rewards=official))
    assert found.total == pytest.approx(total)
