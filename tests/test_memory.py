"""Lean memory: what is never there at once, what is computed in pieces, and running out of it."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import ECHO, TINY, TINY_QUESTIONS, kept, small_policy
from test_update import flat_gradient
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

import arpo_mini
import engine.packing
from advantage import Segment
from app.config import PRESETS, Config
from arpo_mini import Agent, safe_step, train_step
from engine import memory
from engine.memory import Limits, OutOfMemory, fit, snapshot
from engine.model import load_policy
from engine.packing import make_batch, make_row, recomputed, token_logprobs
from engine.writer import Writer


def peak_bytes(work):
    """The most memory that tensors took at the same time while work() ran, beside what was there.

    From every allocation and release that PyTorch's allocator reports.
    """
    work()  # what is built once, and kept, does not count
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak


def chain(policy, T):
    """A batch of one trajectory of T tokens."""
    ids = torch.arange(T).mul(7).remainder(policy.vocab_size).tolist()
    leaf = Segment("policy", ids[4:], parent=Segment("prompt", ids[:4]))
    return make_batch([make_row([leaf], {leaf: {leaf: 1.0}})], 0, "cpu")


def backward(policy, batch, recompute=False):
    def work():
        policy.model.zero_grad()
        policy.limits.recompute = recompute
        token_logprobs(policy, batch, 1.0).sum().backward()

    return work


# ---- what is never there at once ----------------------------------------------------------


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """Twice the tokens take less than one chunk of logits more, forward and backward."""
    monkeypatch.setattr(engine.packing, "HEAD_BYTES", one_chunk := 2**22)
    policy = small_policy(vocab_size=20_000, layers=1)
    short, long = (peak_bytes(backward(policy, chain(policy, T))) for T in (256, 512))
    assert short > one_chunk > long - short
    assert long < 0.7 * 4 * 20_000 * 512  # all logits


def test_values_and_gradients_in_chunks_are_the_plain_ones(restored, monkeypatch):
    """And index t describes token t, given all before it."""
    monkeypatch.setattr(engine.packing, "HEAD_BYTES", 4 * restored.vocab_size * 8)
    batch = chain(restored, 60)
    backward(restored, batch)()
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
    batch = chain(policy, 300)
    plain, lean = (peak_bytes(backward(policy, batch, on)) for on in (False, True))
    assert lean < 0.5 * plain
    twice = flat_gradient(policy)
    backward(policy, batch)()
    torch.testing.assert_close(twice, flat_gradient(policy))
    with recomputed(policy.lm):
        assert policy.lm.get_decoder().layers[0].training
    assert not any(module.training for module in policy.model.modules())


# ---- what fits ----------------------------------------------------------------------------


def token_bytes(shape, recompute: bool) -> int:
    """What a token of the update takes at most, in float32."""
    kept = memory.kept_bytes(shape, 4, recompute)
    return kept + memory.passing_bytes(shape, 4, recompute)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_estimate_of_an_update_is_near_what_it_takes(recompute):
    """Bytes a token, in float32 on a CPU."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "layers": 4}
    policy = small_policy(vocab_size=100, num_attention_heads=4, num_key_value_heads=2, **shape)
    short, long = (peak_bytes(backward(policy, chain(policy, T), recompute)) for T in (128, 256))
    measured = (long - short) / 128
    assert 0.9 < token_bytes(policy.lm.config, recompute) / measured < 1.5


def test_the_estimate_of_a_rollout_is_near_what_it_takes():
    """Bytes a row: its keys and values, and its scores."""
    policy = small_policy(vocab_size=2_000, num_key_value_heads=2)
    policy.why_ended = lambda token_ids: None
    prompt, config = Segment("prompt", list(range(1, 200))), replace(TINY, max_segment_tokens=8)

    def writes(R):
        def work():
            writer = Writer(policy, config)
            writer.finish(writer.begin([prompt] * R, 2))

        return work

    measured = (peak_bytes(writes(40)) - peak_bytes(writes(8))) / 32
    scores = 4 * 6 * policy.vocab_size  # of six steps: `fit` sets SCORES_BYTES aside for them
    assert 0.5 < (memory.path_bytes(policy.lm.config, 4, 208) + scores) / measured < 1.5


def test_less_memory_is_less_at_once_and_none_is_no_limit(policy, config):
    config = replace(config, max_total_tokens=512, micro_batch_tokens=2048)

    def limits(gb):
        return fit(replace(config, memory_gb=gb), policy.lm)

    assert limits(None) == Limits() and limits(None).fitted(config) == config
    large, small, least = limits(1.0), limits(0.35), limits(1e-6)
    assert large.rollout_rows > 4 * small.rollout_rows > 40
    assert large.micro_batch_tokens > 1.5 * small.micro_batch_tokens > 200
    assert (least.rollout_rows, least.micro_batch_tokens) == (1, 1)
    assert not large.recompute and least.recompute
    assert small.fitted(config).rollout_rows == min(128, small.rollout_rows)
    for gb in (0.35, 0.5):  # what it allows stays within what it may use
        allowed = limits(gb)
        rows = allowed.rollout_rows * memory.path_bytes(policy.lm.config, 4, 512)
        T, each = allowed.micro_batch_tokens, token_bytes(policy.lm.config, allowed.recompute)
        assert max(rows + memory.SCORES_BYTES, T * each + 4 * T * T) < gb * memory.GIB


def test_weights_and_the_optimizer_are_counted(restored, policy_4bit):
    weights = list(policy_4bit.lm.parameters())
    packed = [p.quant_state for p in weights if hasattr(p, "quant_state")]
    n = sum(p.numel() * p.element_size() for p in weights)
    assert memory.weight_bytes(policy_4bit.lm) == n + sum(4 * s.absmax.numel() for s in packed) > n
    optimizer = torch.optim.AdamW(restored.parameters, lr=0.0)
    for parameter in restored.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [x for of in optimizer.state.values() for x in of.values() if x.dim()]
    taken = sum(x.nbytes for x in state + [p.grad for p in restored.parameters])
    assert memory.trained_bytes(sum(p.numel() for p in restored.parameters)) == taken


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
    assert memory.memory_limit(None, gpu) == 7 * GIB and enforced == [1.0]
    assert memory.memory_limit(20.0, gpu) == 7 * GIB and enforced[-1] == 1.0
    assert memory.memory_limit(4.0, gpu) == 4 * GIB and enforced[-1] == 0.5
    assert memory.memory_limit(None, torch.device("cpu")) is None


SHAPES = {  # Qwen3: hidden, intermediate, layers, heads, tied embeddings; 8 key-value heads
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
}
FITS = "8gb 0.6B, 8gb 4B, 12gb 8B, 16gb 1.7B, 16gb 8B, 24gb 8B".split(", ")


@pytest.mark.parametrize("card", FITS)
def test_a_preset_leaves_room_for_a_group_by_the_estimate(card):
    """Weights in NF4, embeddings in bfloat16; on a meta device, so that no weight exists."""
    preset, name = card.split()
    config, (D, F, L, heads, tied) = Config(**PRESETS[preset]), SHAPES[name]
    shape = {"num_hidden_layers": L, "num_attention_heads": heads, "num_key_value_heads": 8}
    shape |= {"hidden_size": D, "intermediate_size": F, "tie_word_embeddings": tied}
    with torch.device("meta"):
        lm = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, head_dim=128, **shape))
        lm = lm.to(torch.bfloat16).requires_grad_(False)
        for name, module in lm.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                sizes = module.in_features, module.out_features
                nf4 = torch.empty(math.prod(sizes) * 9 // 16, dtype=torch.uint8)  # 64 and a scale
                module.weight = torch.nn.Parameter(nf4, requires_grad=False)
                module.lora = torch.nn.Parameter(torch.empty(config.lora_rank, sum(sizes)))
    limits = fit(config, lm)
    assert limits.rollout_rows >= config.group_size
    assert limits.micro_batch_tokens >= config.max_total_tokens


# ---- running out --------------------------------------------------------------------------

WORDS = "CUDA out of memory. Tried to allocate 2 GiB\n more words"


@pytest.fixture(autouse=True)
def no_gc(monkeypatch):
    """Looking at all of torch takes a third of a second."""
    monkeypatch.setattr(memory.gc, "collect", lambda: None)


def failing(real, *calls):
    """`real`, but the calls with these numbers (from 1) run out of memory at their end."""
    count = 0

    def call(*args):
        nonlocal count
        count += 1
        result = real(*args)
        if count in calls:
            raise torch.OutOfMemoryError(WORDS)
        return result

    return call


def one_step(policy, config, before=lambda: None):
    """Figures but for seconds, paths, adapter and moments after the second of two steps.

    `before` is called between the steps: the second one finds an optimizer with moments.
    """
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


@pytest.mark.parametrize("calls", [(4,), (2, 9)], ids=str)
@pytest.mark.parametrize("what", PLACES)
def test_a_step_out_of_memory_is_repeated_in_halves(restored, monkeypatch, caplog, what, calls):
    """Also between the optimizer steps of one rollout: adapter and optimizer start again.

    The same as a step that computed so much at once from the beginning.
    """
    config = replace(TINY, group_size=4, initial_rollouts=4, updates_per_rollout=3)
    place, name = PLACES[what]
    failing_call = failing(getattr(place, name), *calls)
    retried = one_step(restored, config, lambda: monkeypatch.setattr(place, name, failing_call))
    monkeypatch.undo()
    limits, (other,) = restored.limits, set(PLACES) - {what}
    assert len(caplog.messages) == len(calls) and getattr(limits, other) == math.inf
    least = getattr(limits, what)
    assert f"--{what} " in caplog.text
    assert f" -> {least}, and the same again" in caplog.messages[-1]
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


def test_undo_puts_adapter_and_optimizer_back(restored):
    optimizer = torch.optim.AdamW(restored.parameters, lr=1e-2)

    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in restored.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        return [p.detach().tolist() for p in restored.parameters]

    step(1)
    undo = snapshot(restored.parameters, optimizer)
    expected = step(2)
    for _ in range(2):  # it may run out of memory twice
        step(3)
        undo()
        assert all(parameter.grad is None for parameter in restored.parameters)
        assert step(2) == expected


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
    with pytest.raises(ZeroDivisionError):  # nothing else is caught
        limits.retry(TINY, lambda config: 1 / 0)


def test_a_model_that_does_not_fit_is_one_line(config, tools, monkeypatch):
    def load_model(config):
        raise torch.OutOfMemoryError(WORDS)

    monkeypatch.setattr("engine.model.load_model", load_model)
    with pytest.raises(
        OutOfMemory, match=r"2 GiB\).*--load_in_4bit true or a smaller model"
    ) as error:
        load_policy(config, tools, trainable=True)
    assert "\n" not in str(error.value)
