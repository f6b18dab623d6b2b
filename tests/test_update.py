"""The update: every token counted once and for the right trajectories, however it is batched."""

import dataclasses
import math

import pytest
import torch

from advantage import Reward, Segment, group_advantages, shared_by
from arpo_mini import (
    credit,
    drift,
    policy_loss,
    reference_logprobs,
    score,
    short_answers,
    token_logprobs,
    update,
)
from engine.packing import Row, make_batch, make_row, micro_batches


def some_rewards(leaves, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(len(leaves), generator=generator).tolist()
    return [Reward(v, v, True, 1) for v in values]


def rows_of(groups, config, packed, shared_weight=0.0):
    config = dataclasses.replace(config, packed=packed, shared_weight=shared_weight)
    return [row for i, g in enumerate(groups) for row in credit(g, some_rewards(g, i), config)]


def gradient(policy, rows, config, budget=10**9):
    """Loss and gradient of one pass, with old log-probs that make the clip act on both sides."""
    policy.model.zero_grad()
    total, loss_sum = sum(sum(row.weight) for row in rows), 0.0
    for some in micro_batches(rows, budget):
        batch = make_batch(some, policy.pad_id, "cpu")
        (ref_logp,) = reference_logprobs(policy, [batch], config)
        logp = token_logprobs(policy, batch, 1.0)
        shift = 0.5 * torch.sin(batch.input_ids + 3.0 * batch.position_ids)  # off-policy
        loss, clipped = policy_loss(logp, logp.detach() + shift, batch, config, total, ref_logp)
        assert clipped > 0
        loss.backward()
        loss_sum += loss.item()
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return loss_sum, torch.cat([p.grad.flatten() for p in parameters])


def assert_close(a, b, tolerance=1e-4):
    (loss_a, grad_a), (loss_b, grad_b) = a, b
    assert loss_a == pytest.approx(loss_b, rel=tolerance, abs=1e-7)
    assert grad_a.norm() > 1e-4
    assert (grad_a - grad_b).norm() < tolerance * grad_a.norm()


@pytest.mark.parametrize("kl_coefficient", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
@pytest.mark.parametrize("shared_weight", [0.0, 0.3, 1.0])
def test_packed_tree_equals_one_row_a_trajectory(
    policy, config, groups, shared_weight, kl_coefficient
):
    config = dataclasses.replace(config, kl_coefficient=kl_coefficient, dual_clip=1.3)
    groups = groups[1::2]  # one of each domain
    packed, plain = (rows_of(groups, config, p, shared_weight) for p in (True, False))
    assert sum(map(len, packed)) < 0.8 * sum(map(len, plain))
    assert sum(sum(r.weight) for r in packed) == sum(sum(r.weight) for r in plain)
    assert_close(gradient(policy, packed, config), gradient(policy, plain, config))


def test_loss_is_the_textbook_one(policy, config, groups):
    """Against a loop over trajectories and tokens: PPO's clip, dual clip, KL, token mean, count."""
    config = dataclasses.replace(config, shared_weight=0.3, dual_clip=1.5, kl_coefficient=0.2)
    leaves, rewards = groups[0], some_rewards(groups[0])
    (row,) = credit(leaves, rewards, dataclasses.replace(config, packed=True))
    batch = make_batch([row], policy.pad_id, "cpu")
    generator = torch.Generator().manual_seed(5)
    logp, old, ref = (torch.randn(1, len(row), generator=generator) * 0.4 for _ in range(3))
    loss, clipped = policy_loss(logp, old, batch, config, sum(row.weight), ref)
    A = group_advantages([r.total for r in rewards])
    start, at = {}, 0
    for segment in shared_by(leaves):
        start[segment], at = at, at + len(segment.token_ids)
    total, tokens, cut = 0.0, 0, 0
    for i, leaf in enumerate(leaves):
        for segment in leaf.path():
            if segment.author != "policy":
                continue
            below = shared_by(leaves)[segment]
            a = (0.7 * A[i] + 0.3 * A[below].mean()).item()
            for t in range(start[segment], start[segment] + len(segment.token_ids)):
                ratio = math.exp(logp[0, t] - old[0, t])
                objective = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
                if a < 0:
                    objective = max(objective, 1.5 * a)
                d = (ref[0, t] - logp[0, t]).item()
                total += -objective + 0.2 * min(math.exp(d) - d - 1, 10)
                cut += (ratio > 1.2 and a > 0) or (ratio < 0.8 and a < 0)
                tokens += 1
    assert tokens == sum(row.weight)
    assert loss.item() == pytest.approx(total / tokens, rel=1e-4)
    assert clipped.item() == cut > 0


def test_padding_and_micro_batches_do_not_change_the_gradient(policy, config, groups):
    groups = groups[1::2]
    rows = rows_of(groups, config, packed=False)
    whole = gradient(policy, rows, config)
    assert len(list(micro_batches(rows, 400))) > 5
    assert_close(whole, gradient(policy, rows, config, budget=400))
    trees = rows_of(groups, config, packed=True)
    assert_close(gradient(policy, trees, config), gradient(policy, trees, config, budget=400))


def test_micro_batches_keep_every_row_and_the_budget(config, groups):
    rows = rows_of(groups, config, packed=False)
    batches = list(micro_batches(rows, 1000))
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    assert all(len(b) == 1 or max(map(len, b)) * len(b) <= 1000 for b in batches)


def test_only_what_the_policy_sampled_is_trained_and_the_stop_token_is(policy, config, groups):
    """Also where pad is eos: authorship decides, not token ids."""
    eos = policy.eos_ids[0]
    for leaves in groups:
        (row,) = credit(leaves, some_rewards(leaves), config)
        at = 0
        for segment, below in shared_by(leaves).items():
            weights = row.weight[at : at + len(segment.token_ids)]
            expected = len(below) if segment.author == "policy" else 0
            assert weights == [expected] * len(segment.token_ids)  # the last one is the stop token
            at += len(segment.token_ids)
        assert at == len(row)
    prompt = Segment("prompt", [5, eos, 6])
    leaf = Segment("policy", [7, 8, eos], parent=prompt, stop="eos")
    short = Segment("policy", [9], parent=prompt, stop="length")
    counted = {leaf: {leaf: 1.0}, short: {short: -1.0}}
    batch = make_batch([make_row([leaf], counted), make_row([short], counted)], eos, "cpu")
    assert batch.weight.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0]]
    assert batch.attention_mask.tolist() == [[1] * 6, [1, 1, 1, 1, 0, 0]]
    logp = token_logprobs(policy, batch, 1.0)
    assert logp[0, 5] < 0 and logp[1, 4:].tolist() == [0, 0]


def test_index_t_describes_token_t(policy, config, groups):
    """The log-prob at t is that of token t given all before it: against the plain computation."""
    leaf = max(groups[-1], key=lambda leaf: len(leaf.path()))
    counted = {s: {leaf: 1.0} for s in leaf.path() if s.author == "policy"}
    batch = make_batch([make_row([leaf], counted)], policy.pad_id, "cpu")
    logp = token_logprobs(policy, batch, 1.0)
    logits = policy.lm(input_ids=batch.input_ids).logits  # (1, T, V)
    plain = torch.distributions.Categorical(logits=logits[:, :-1])
    expected = plain.log_prob(batch.input_ids[:, 1:])
    counts = batch.weight[:, 1:] > 0
    assert torch.allclose(logp[:, 1:][counts], expected[counts], atol=1e-5)


def test_gradient_through_nf4_is_that_of_the_same_weights_unquantised(policy_4bit, config, groups):
    """bitsandbytes repacks NF4 weights for inference on some CPUs and then drops the gradient.

    The shipped policy is rolled out (no gradient) before it is trained, so that is tried here.
    """
    import bitsandbytes as bnb

    rows = rows_of(groups, config, packed=True)
    with torch.no_grad():
        policy_4bit.lm(input_ids=torch.tensor([rows[0].input_ids]))
    through_nf4 = gradient(policy_4bit, rows, config)
    swapped = []
    for layer in policy_4bit.lm.modules():
        if isinstance(getattr(layer, "base_layer", None), bnb.nn.Linear4bit):
            nf4 = layer.base_layer
            weight = bnb.functional.dequantize_4bit(nf4.weight.data, nf4.weight.quant_state)
            plain = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
            layer.base_layer = plain
            swapped.append((layer, nf4))
    assert len(swapped) == 28
    plain = gradient(policy_4bit, rows, config)
    for layer, nf4 in swapped:
        layer.base_layer = nf4
    assert_close(through_nf4, plain, tolerance=1e-3)


def test_one_update_is_on_policy_and_several_are_not(policy, config, groups):
    """A good trajectory becomes likelier; only later updates on the same rollout can be clipped."""
    rows = rows_of(groups[1::2], config, packed=True)
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def run(n):
        optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
        stats = update(policy, optimizer, rows, dataclasses.replace(config, updates_per_rollout=n))
        after = gain(policy, rows)
        for name, parameter in policy.model.named_parameters():
            if name in before:
                parameter.data = before[name].clone()
        return stats, after

    start = gain(policy, rows)
    once, after_one = run(1)
    thrice, _ = run(3)
    assert once["clip_fraction"] == 0 and once["grad_norm"] > 0
    assert thrice["clip_fraction"] > 0
    assert after_one > start


@torch.no_grad()
def gain(policy, rows):
    """Sum of log-prob times advantage: what a policy gradient step increases."""
    batch = make_batch(rows, policy.pad_id, "cpu")
    logp = token_logprobs(policy, batch, 1.0)
    return (logp * (batch.A_plus + batch.A_minus)).sum().item()


def test_equal_rewards_train_nothing_and_cost_nothing(policy, config, groups):
    equal = [Reward(1.0, 1.0, True, 1)] * config.group_size
    rows = [row for leaves in groups for row in credit(leaves, equal, config)]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    stats = update(policy, torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0), rows, config)
    assert stats["loss"] == 0 and stats["grad_norm"] == 0
    assert stats["train_tokens"] == 0 and stats["drift_mean"] is stats["drift_max"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
def test_a_group_of_equal_rewards_changes_nothing_but_the_mean(
    policy, config, groups, monkeypatch, kl_coefficient
):
    """Left out or trained: the same loss and gradient. The KL term pulls at it all the same."""
    config = dataclasses.replace(config, kl_coefficient=kl_coefficient)
    equal = [Reward(1.0, 1.0, True, 1)] * config.group_size
    dead = [row for leaves in groups[1:3] for row in credit(leaves, equal, config)]
    rows = rows_of(groups[-1:], config, packed=True) + dead
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def step():
        stats = update(policy, torch.optim.SGD(parameters, lr=0.0), rows, config)
        return stats, torch.cat([p.grad.flatten() for p in parameters])

    (stats, gradient), whole = step(), sum(map(len, rows))
    monkeypatch.setattr(Row, "pulls", lambda row: True)
    plain, expected = step()
    assert plain["train_tokens"] == whole
    assert stats["train_tokens"] == (whole if kl_coefficient else len(rows[0]))
    assert stats["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert expected.norm() > 1e-4 and (gradient - expected).norm() < 1e-6 * expected.norm()


def test_momentum_acts_also_in_a_step_without_a_gradient(policy, config, groups):
    """As if the rows had been trained: not skipped, as parameters whose gradient is None are."""
    equal = [Reward(1.0, 1.0, True, 1)] * config.group_size
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    update(policy, optimizer, rows_of(groups[-1:], config, packed=True), config)
    before = [p.detach().clone() for p in parameters]
    update(policy, optimizer, credit(groups[-1], equal, config), config)
    moved = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value
    assert any(moved)


def test_a_loss_that_is_no_number_stops_the_run(policy, config, groups):
    rows = rows_of(groups, config, packed=True)
    parameter = next(p for p in policy.model.parameters() if p.requires_grad)
    kept = parameter.data.clone()
    parameter.data[0, 0] = float("nan")
    try:
        with pytest.raises(FloatingPointError, match="a log-prob is nan"):
            update(policy, torch.optim.SGD([parameter], lr=1.0), rows, config)
    finally:
        parameter.data = kept


def test_the_sampler_is_compared_with_the_trainer_token_by_token(policy, config, groups):
    """At every token that it drew."""
    rows = rows_of(groups, config, packed=True)
    measured = sum(len(segment.logp) for leaves in groups for segment in shared_by(leaves))
    batch = make_batch(rows, policy.pad_id, "cpu")
    with torch.no_grad():
        logp = token_logprobs(policy, batch, 1.0)
    drifts = drift(logp, batch)
    assert len(drifts) == measured > 100 and 0 < max(drifts) < 1e-4
    assert min(drift(logp + 0.5, batch)) > 0.4
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    stats = update(policy, optimizer, rows, dataclasses.replace(config, updates_per_rollout=2))
    assert stats["drift_max"] == pytest.approx(max(drifts), rel=0.5)
    assert stats["drift_mean"] < 1e-5


def test_an_answer_is_short_when_it_has_fewer_tokens_than_its_tags(policy):
    prompt = Segment("prompt", policy.prompt("q"))
    full = policy.tokenizer.encode("<think>a</think><answer>\\boxed{2}</answer>")
    cases = [(full, "answer", 0), (full[:4], "eos", 1), (full[:4], "length", 0), ([], "eos", 1)]
    for token_ids, stop, short in cases:
        leaf = Segment("policy", token_ids, parent=prompt, stop=stop)
        assert short_answers(policy, [[leaf]]) == short
    assert short_answers(policy, [[Segment("tool", [5], parent=leaf)], [leaf]]) == 0.5


def test_reference_is_the_model_without_its_adapter(policy, config, groups):
    rows = rows_of(groups, config, packed=True)
    batch = make_batch(rows, policy.pad_id, "cpu")
    with torch.no_grad():
        assert reference_logprobs(policy, [batch], config) == [None]
        (ref,) = reference_logprobs(
            policy, [batch], dataclasses.replace(config, kl_coefficient=1.0)
        )
        adapted = token_logprobs(policy, batch, 1.0)
        assert not torch.allclose(ref, adapted, atol=1e-3)
        saved = {}
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                saved[name] = parameter.data
                parameter.data = torch.zeros_like(parameter)
        plain = token_logprobs(policy, batch, 1.0)
        for name, parameter in policy.model.named_parameters():
            if name in saved:
                parameter.data = saved[name]
    assert torch.allclose(ref, plain, atol=1e-5)


def test_official_rewards_count_our_calculator_as_their_python(policy, config, tools):
    from arpo_mini import Question

    prompt = Segment("prompt", policy.prompt("q"))
    turns = [
        ("policy", "<think>a</think><search>x</search>"),
        ("tool", "<result>\nb\n</result>"),
        ("policy", "<think>a</think><calculator>1+1</calculator>"),
        ("tool", "<result>\n2\n</result>"),
        ("policy", "<think>a</think><answer>\\boxed{-2}</answer>"),
    ]
    leaf = prompt
    for author, text in turns:
        leaf = Segment(author, policy.tokenizer.encode(text, add_special_tokens=False), parent=leaf)
    question = Question("q", ["2"], "math")
    official = dataclasses.replace(config, official_rewards=True)
    assert score(policy, leaf, question, official, tools).total == pytest.approx(1.1)  # "-2" is "2"
    assert score(policy, leaf, question, config, tools).total == 0
