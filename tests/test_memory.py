"""Lean memory: what is never there at once, what is computed in pieces, and running out of it."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from common import ECHO, TINY, TINY_QUESTIONS, kept, small_policy
from test_update import flat_gradient

import arpo_mini
import engine.packing
from advantage import Segment
from arpo_mini import Agent, safe_step, train_step
from engine import memory
from engine.memory import Limits, OutOfMemory, fit
from engine.packing import make_batch, make_row, recomputed, token_logprobs
from engine.writer import Writer
from lab.bench.job import peak_bytes


def peak(work, *args):
    work(*args)  # what is built once, and kept, does not count
    return peak_bytes(lambda: work(*args))


def chain(policy, T):
    """A batch of one trajectory of T tokens."""
    ids = [7 * t % policy.vocab_size for t in range(T)]
    leaf = Segment("policy", ids[4:], parent=Segment("prompt", ids[:4]))
    return make_batch([make_row([leaf], {leaf: {leaf: 1.0}})], 0, "cpu")


def backward(policy, batch, recompute=False):
    policy.model.zero_grad()
    policy.limits.recompute = recompute
    token_logprobs(policy, batch, 1.0).sum().backward()


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """Twice the tokens take less than one chunk of logits more, forward and backward."""
    monkeypatch.setattr(engine.packing, "HEAD_BYTES", one_chunk := 2**22)
    policy = small_policy(vocab_size=20_000, layers=1)
    short, long = (peak(backward, policy, chain(policy, T)) for T in (256, 512))
    assert short > one_chunk > long - short and long < 0.7 * 4 * 20_000 * 512  # all logits


def test_values_and_gradients_in_chunks_are_the_plain_ones(restored, monkeypatch):
    """And index t describes token t, given all before it."""
    monkeypatch.setattr(engine.packing, "HEAD_BYTES", 4 * restored.vocab_size * 8)
    batch = chain(restored, 60)
    backward(restored, batch)
    chunked, logp = flat_gradient(restored), token_logprobs(restored, batch, 1.0)
    restored.model.zero_grad()
    plain = torch.distributions.Categorical(logits=restored.lm(batch.input_ids).logits[:, 3:-1])
    expected = plain.log_prob(batch.input_ids[:, 4:])
    expected.sum().backward()
    torch.testing.assert_close(logp[:, 4:], expected)
    torch.testing.assert_close(chunked, flat_gradient(restored))


def test_computing_layers_twice_saves_memory_and_changes_nothing():
    """Also where the model has dropout: it stays off."""
    policy = small_policy(vocab_size=100, layers=6)
    for layer in policy.lm.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    work = backward, policy, chain(policy, 300)
    found = [(peak(*work, on), flat_gradient(policy)) for on in (True, False)]
    (lean, twice), (plain, once) = found
    assert lean < 0.5 * plain
    torch.testing.assert_close(twice, once)
    with recomputed(policy.lm):
        assert policy.lm.get_decoder().layers[0].training
    assert not any(module.training for module in policy.model.modules())


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_an_update_is_near_what_it_takes(recompute):
    """Bytes a token, in float32 on a CPU."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "layers": 4}
    policy = small_policy(vocab_size=100, num_attention_heads=4, num_key_value_heads=2, **shape)
    short, long = (peak(backward, policy, chain(policy, T), recompute) for T in (128, 256))
    each = sum(memory.token_bytes(policy.lm.config, 4, recompute))
    assert 0.9 < each / ((long - short) / 128) < 1.5


def test_less_memory_is_less_at_once_and_none_is_no_limit(policy, config):
    config = replace(config, max_total_tokens=512, micro_batch_tokens=2048)

    def limits(gb):
        return fit(replace(config, memory_gb=gb), policy.lm)

    assert limits(None) == Limits() and limits(None).fitted(config) == config
    large, small, least = limits(1.0), limits(0.35), limits(0.01)
    assert large.rollout_rows > 4 * small.rollout_rows > 40
    assert large.micro_batch_tokens > 1.5 * small.micro_batch_tokens > 200
    assert (least.rollout_rows, least.micro_batch_tokens) == (1, 1)
    assert not large.recompute and least.recompute
    for gb in (0.35, 0.5):  # what it allows stays within what it may use
        some = limits(gb)
        assert some.fitted(config).rollout_rows == min(128, some.rollout_rows)
        rows, T = some.rollout_rows, some.micro_batch_tokens
        each = sum(memory.token_bytes(policy.lm.config, 4, some.recompute))
        rollout = rows * memory.path_bytes(policy.lm.config, 4, 512) + memory.SCORES_BYTES
        assert max(rollout, T * each + 4 * T * T) < gb * memory.GIB


def test_a_gpu_has_what_is_free_and_no_more_is_taken(monkeypatch):
    """8 GiB, of which other programs hold one and this one has reserved another."""
    enforced, fraction, GIB = [1.0], "per_process_memory_fraction", memory.GIB
    for name, answer in {
        "mem_get_info": lambda device: (6 * GIB, 8 * GIB),
        "memory_reserved": lambda device: GIB,
        f"set_{fraction}": lambda share, device: enforced.append(share),
        f"get_{fraction}": lambda device: enforced[-1],
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    gpu = torch.device("cuda", 0)
    limits = [(memory.memory_limit(gb, gpu) / GIB, enforced[-1]) for gb in (None, 20.0, 4.0)]
    assert limits == [(7, 1.0), (7, 1.0), (4, 0.5)]
    assert memory.memory_limit(None, torch.device("cpu")) is None


WORDS = "CUDA out of memory. Tried to allocate 2 GiB\n more words"


def failing(real, *calls):
    """`real`, but the calls with these numbers (from 1) run out of memory at their end."""
    numbers = itertools.count(1)

    def call(*args):
        result = real(*args)
        if next(numbers) in calls:
            raise torch.OutOfMemoryError(WORDS)
        return result

    return call


def test_a_cpu_has_no_error_of_its_own():  # but a RuntimeError; any other is not ours
    limits, rows = Limits(in_use=("rollout_rows", 8)), []

    def work(fitted):
        rows.append(fitted.rollout_rows)
        return torch.empty(2**60 if len(rows) == 1 else 1)

    assert limits.retry(replace(TINY, rollout_rows=8), work).numel() == 1 and rows == [8, 4]
    with pytest.raises(RuntimeError, match="shape"):
        limits.retry(TINY, lambda fitted: torch.ones(2).view(3))


def one_step(policy, config, before=lambda: None):
    """Figures but for seconds, paths, adapter and moments after two steps; `before` the second."""
    policy.limits = Limits()
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-2, weight_decay=0.0)
    with kept(policy.parameters):
        train_step(policy, optimizer, TINY_QUESTIONS, replace(TINY, group_size=2), ECHO, 1)
        before()
        agent = Agent(policy, ECHO, config)
        figures, groups, _ = safe_step(agent, optimizer, TINY_QUESTIONS, config, 2)
        after = [p.detach().tolist() for p in policy.parameters]
    after += [x.tolist() for of in optimizer.state.values() for x in of.values()]
    figures = {k: v for k, v in figures.items() if not k.startswith("seconds")}
    return figures, [leaf.path_tokens() for leaves in groups for leaf in leaves], after


PLACES = {"rollout_rows": (Writer, "generate"), "micro_batch_tokens": (arpo_mini, "token_logprobs")}


@pytest.mark.parametrize("what", PLACES)
def test_a_step_out_of_memory_is_repeated_in_halves(restored, monkeypatch, caplog, what):
    """Twice, also between optimizer steps; then as if it had computed so much from the start."""
    config = replace(TINY, group_size=4, initial_rollouts=4, updates_per_rollout=3)
    place, name = PLACES[what]
    later = failing(getattr(place, name), 4, 10)
    retried = one_step(restored, config, lambda: monkeypatch.setattr(place, name, later))
    monkeypatch.undo()
    least, (other,) = getattr(restored.limits, what), set(PLACES) - {what}
    assert len(caplog.messages) == 2 and getattr(restored.limits, other) == math.inf
    assert f"--{what} " in caplog.messages[1] and f" -> {least}, and the" in caplog.messages[1]
    assert retried == one_step(restored, replace(config, **{what: least}))


def test_paths_that_wait_count_when_a_last_one_runs_out_of_memory(restored, monkeypatch):
    """Else all the rest would go one by one because one row was left when it happened."""
    rows, generate = [], Writer.generate

    def watched(self, drafts, *args):
        rows.append(len(drafts))
        generate(self, drafts, *args)
        if len(drafts) == 1 and len(self.kv) > 4 and max(rows) > 8:
            rows.clear()
            raise torch.OutOfMemoryError(WORDS)

    monkeypatch.setattr(Writer, "generate", watched)
    config = replace(TINY, initial_rollouts=8, max_segment_tokens=40, entropy_tokens=1)
    groups, rewards = Agent(restored, ECHO, config).roll_out(TINY_QUESTIONS, config, seed=1)
    assert 1 < restored.limits.rollout_rows < 8
    assert [len(set(leaves)) for leaves in groups] == [8, 8] == [len(some) for some in rewards]


def test_halves_then_layers_twice_then_one_line(caplog):
    """One trajectory is the smallest; where even it does not fit, the last words say what does."""
    limits, seen = Limits(), []

    def work(fitted):
        size = max(30, fitted.micro_batch_tokens)
        seen.append((size, limits.recompute))
        limits.in_use = "micro_batch_tokens", size
        raise torch.OutOfMemoryError(WORDS)

    with pytest.raises(OutOfMemory) as error:
        limits.retry(replace(TINY, micro_batch_tokens=100), work)
    assert seen == [(100, False), (50, False), (30, False), (30, True)]
    assert len(caplog.messages) == 3
    for part in ("--micro_batch_tokens 30", "Tried to allocate 2 GiB", "a smaller --max_total"):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and "more words" not in str(error.value)
    limits.in_use = "rollout_rows", 1
    with pytest.raises(OutOfMemory, match="--rollout_rows 1, the smallest"):
        limits.shrink("no")
