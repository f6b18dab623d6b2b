"""Lean memory: what is never there at once, what is computed in pieces, and running out of it."""

import dataclasses
import gc
import random

import pytest
import torch
from conftest import roll_out, with_random_adapter
from peft import LoraConfig, get_peft_model
from test_update import assert_close, gradient, rows_of, some_rewards
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import arpo_mini
import engine.writer as decoding
import engine.memory as memory
import policy as policy_module
from advantage import Segment, shared_by
from arpo_mini import (
    Rollout,
    credit,
    evaluate,
    main,
    parse_command,
    recomputed,
    token_logprobs,
    train_step,
)
from engine.memory import Chunks, OutOfMemory, fit
from engine.packing import cut, make_batch, make_row
from engine.model import Policy, load_policy
from app.config import PRESETS, Config


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


def small_policy(vocab_size, layers=1):
    """A random Qwen3 with an adapter that adds something; no tokenizer."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM(shape), lora).eval()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return with_random_adapter(Policy(model, None, "", eos_ids=[0], pad_id=0, closers=set()))


def chain(policy, T):
    """A batch of one trajectory of T tokens."""
    generator = torch.Generator().manual_seed(T)
    ids = torch.randint(1, policy.lm.config.vocab_size, (T,), generator=generator).tolist()
    leaf = Segment("policy", ids[4:], parent=Segment("prompt", ids[:4]))
    return make_batch([make_row([leaf], {leaf: {leaf: 1.0}})], 0, "cpu")


def backward(policy, batch, recompute=False):
    def work():
        policy.model.zero_grad()
        with recomputed(policy, recompute):
            logp = token_logprobs(policy, batch, 1.0)
        logp.sum().backward()

    return work


def flat_gradient(policy):
    grads = [p.grad for p in policy.model.parameters() if p.grad is not None]
    return torch.cat([grad.flatten() for grad in grads])


# ---- what is never there at once ----------------------------------------------------------


def test_logits_of_all_tokens_never_exist(monkeypatch):
    """Twice the tokens take less than one chunk of logits more, forward and backward."""
    monkeypatch.setattr(memory, "HEAD_BYTES", 2**22)
    policy = small_policy(vocab_size=20_000)
    chunk = memory.head_chunk(20_000)
    assert chunk == 52
    short, long = (peak_bytes(backward(policy, chain(policy, T))) for T in (256, 512))
    one_chunk, all_logits = 4 * 20_000 * chunk, 4 * 20_000 * 512
    assert short > one_chunk  # else nothing is measured
    assert long - short < one_chunk
    assert long < 0.7 * all_logits


def test_values_and_gradients_in_chunks_are_the_plain_ones(monkeypatch):
    monkeypatch.setattr(memory, "HEAD_BYTES", 2**14)
    policy = small_policy(vocab_size=500)
    batch = chain(policy, 60)
    assert memory.head_chunk(500) == 8
    backward(policy, batch)()
    chunked, logp = flat_gradient(policy), token_logprobs(policy, batch, 1.0)
    policy.model.zero_grad()
    plain = torch.distributions.Categorical(logits=policy.lm(batch.input_ids).logits[:, 3:-1])
    expected = plain.log_prob(batch.input_ids[:, 4:])
    expected.sum().backward()
    torch.testing.assert_close(logp[:, 4:], expected)
    torch.testing.assert_close(chunked, flat_gradient(policy))


def test_gradient_checkpointing_saves_memory_and_changes_nothing():
    """Also where the model has dropout: it stays off."""
    policy = small_policy(vocab_size=100, layers=6)
    for layer in policy.lm.get_decoder().layers:
        layer.self_attn.attention_dropout = 0.5
    batch = chain(policy, 300)
    plain, lean = (peak_bytes(backward(policy, batch, on)) for on in (False, True))
    assert lean < 0.5 * plain
    backward(policy, batch, False)()
    expected = flat_gradient(policy)
    backward(policy, batch, True)()
    torch.testing.assert_close(flat_gradient(policy), expected)
    assert not any(module.training for module in policy.model.modules())


def test_the_update_checkpoints_when_it_is_told_to(policy, config, groups, monkeypatch):
    seen = []
    real = arpo_mini.token_logprobs

    def watched(policy, *args):
        seen.append(policy.lm.get_decoder().layers[0].training)
        return real(policy, *args)

    monkeypatch.setattr(arpo_mini, "token_logprobs", watched)
    rows = rows_of(groups[:1], config, packed=True)
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    for on in (True, None):
        small = dataclasses.replace(config, gradient_checkpointing=on)
        arpo_mini.update(policy, optimizer, rows, small)
    assert seen == [True, False]


def test_one_step_of_scores_is_held_however_many_are_measured(config, monkeypatch):
    V, R = 20_000, 4
    policy = small_policy(V)
    node = Segment("prompt", [5, 6, 7])
    monkeypatch.setattr(decoding.SegmentEnd, "why", lambda self, ids, limit: None)

    def probe(k):
        def work():
            rollout = Rollout(policy, config, {}, random.Random(0))
            paths = rollout.read([(0, node)] * R)
            with torch.no_grad():
                rollout.sample(paths, k, measure=True)
            assert all(len(draft.logp) == k for draft in paths.drafts)

        return work

    short, long = peak_bytes(probe(2)), peak_bytes(probe(24))
    assert short > 4 * R * V  # one step of float32 scores
    assert long - short < 4 * R * V


def test_the_cache_is_gone_before_the_update(policy, config, tools, questions, monkeypatch):
    alive = []

    def watched(*args):
        gc.collect()
        alive.append(sum(type(thing) is DynamicCache for thing in gc.get_objects()))
        return {}

    monkeypatch.setattr(arpo_mini, "update", watched)
    optimizer = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=0.0)
    train_step(policy, optimizer, questions[:1], config, tools, 1)
    assert alive == [0]


# ---- a tree too large for its mask --------------------------------------------------------


@pytest.mark.parametrize("shared_weight", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_a_tree_cut_at_its_forks_gives_the_same_loss_and_gradient(
    policy, config, groups, shared_weight
):
    config = dataclasses.replace(config, kl_coefficient=0.1, dual_clip=1.3)
    groups = groups[3:5]
    whole = rows_of(groups, config, True, shared_weight)
    limit = max(map(len, whole)) // 2
    small = dataclasses.replace(config, micro_batch_tokens=limit)
    pieces = rows_of(groups, small, True, shared_weight)
    assert len(pieces) >= 2 * len(whole) - 2 and max(map(len, pieces)) <= limit
    plain = sum(len(s.token_ids) for leaves in groups for leaf in leaves for s in leaf.path())
    assert sum(map(len, whole)) < sum(map(len, pieces)) < plain
    assert sum(sum(row.weight) for row in pieces) == sum(sum(row.weight) for row in whole)
    assert_close(gradient(policy, pieces, config), gradient(policy, whole, config))


def test_a_cut_keeps_siblings_together():
    """question - a - (b, c) and question - d: what shares more stays in one row."""
    root = Segment("prompt", [0] * 10)
    a, d = Segment("policy", [1] * 20, root), Segment("policy", [2] * 5, root)
    b, c = Segment("policy", [3] * 5, a), Segment("policy", [4] * 5, a)
    leaves = [b, d, c]
    assert cut(leaves, 45) == [[b, d, c]]
    assert cut(leaves, 44) == [[b, c], [d]]
    assert cut(leaves, 39) == [[b], [c], [d]]
    assert cut(leaves, 1) == [[b], [c], [d]]  # a trajectory cannot be cut


# ---- what fits ----------------------------------------------------------------------------


def token_bytes(shape, recompute: bool) -> int:
    """What a token of the update takes at most, in float32."""
    kept = memory.kept_bytes(shape, 4, recompute)
    return kept + memory.passing_bytes(shape, 4, recompute)


def test_the_estimate_of_an_update_is_near_what_it_takes():
    """Bytes a token, in float32 on a CPU: with and without gradient checkpointing."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(Qwen3ForCausalLM(shape), lora).eval()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    policy = Policy(model, None, "", eos_ids=[0], pad_id=0, closers=set())
    for recompute in (False, True):
        short, long = (
            peak_bytes(backward(policy, chain(policy, T), recompute)) for T in (128, 256)
        )
        measured = (long - short) / 128
        assert 0.9 < token_bytes(shape, recompute) / measured < 1.5


def test_less_memory_is_less_at_once_and_none_is_no_limit(policy, config):
    config = dataclasses.replace(config, max_total_tokens=512, micro_batch_tokens=2048)

    def chunks(gb):
        return fit(dataclasses.replace(config, memory_gb=gb), policy.lm)

    assert chunks(None) == Chunks()
    assert chunks(None).fitted(config) == dataclasses.replace(config, gradient_checkpointing=False)
    large, small, least = chunks(1.0), chunks(0.1), chunks(1e-6)
    assert large.rollout_rows > 10 * small.rollout_rows > 100
    assert large.micro_batch_tokens > 2 * small.micro_batch_tokens > 200
    assert (least.rollout_rows, least.micro_batch_tokens) == (1, 1)
    assert not large.recompute and least.recompute
    assert small.fitted(config).rollout_rows == min(128, small.rollout_rows)
    typed = dataclasses.replace(config, gradient_checkpointing=False)
    assert least.fitted(config).gradient_checkpointing
    assert not least.fitted(typed).gradient_checkpointing
    for gb in (0.1, 0.3):  # what it allows stays within what it may use
        allowed = chunks(gb)
        rows = allowed.rollout_rows * memory.path_bytes(policy.lm.config, 4, 512)
        each = token_bytes(policy.lm.config, allowed.recompute)
        T = allowed.micro_batch_tokens
        assert max(rows, T * each + 4 * T * T) < gb * memory.GIB


def test_a_gpu_has_what_is_free_and_no_more_is_taken(monkeypatch):
    """8 GiB, of which other programs hold one and this one has reserved another."""
    enforced = [1.0]
    figures = {"mem_get_info": (6 * memory.GIB, 8 * memory.GIB), "memory_reserved": memory.GIB}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    fraction = "per_process_memory_fraction"
    monkeypatch.setattr(torch.cuda, f"set_{fraction}", lambda share, device: enforced.append(share))
    monkeypatch.setattr(torch.cuda, f"get_{fraction}", lambda device: enforced[-1])
    gpu = torch.device("cuda", 0)
    assert memory.memory_limit(None, gpu) == 7 * memory.GIB and enforced == [1.0]
    assert memory.memory_limit(20.0, gpu) == 7 * memory.GIB and enforced[-1] == 1.0
    assert memory.memory_limit(4.0, gpu) == 4 * memory.GIB and enforced[-1] == 0.5
    assert memory.memory_limit(None, torch.device("cpu")) is None


PUBLISHED_SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, tied embeddings
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, True),
    "Qwen3-1.7B": (2048, 6144, 28, 16, 8, True),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, True),
    "Qwen3-8B": (4096, 12288, 36, 32, 8, False),
}


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("8gb", "Qwen3-0.6B"),
        ("8gb", "Qwen3-4B"),
        ("12gb", "Qwen3-8B"),
        ("16gb", "Qwen3-1.7B"),
        ("16gb", "Qwen3-8B"),
        ("24gb", "Qwen3-8B"),
    ],
)
def test_a_preset_leaves_room_for_a_group_by_the_estimate(preset, name):
    """Weights in NF4, embeddings in bfloat16; on a meta device, so that no weight exists."""
    config = Config(**PRESETS[preset])
    D, F, L, heads, kv, tied = PUBLISHED_SHAPES[name]
    shape = Qwen3Config(
        vocab_size=151_936,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=128,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        lm = Qwen3ForCausalLM(shape).to(torch.bfloat16)
        lm.requires_grad_(False)
        for name, module in lm.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                inside, outside = module.in_features, module.out_features
                module.weight = torch.nn.Parameter(  # two weights a byte, a scale for 64
                    torch.empty(inside * outside * 9 // 16, dtype=torch.uint8), requires_grad=False
                )
                rank = config.lora_rank
                module.A = torch.nn.Parameter(torch.empty(rank, inside))
                module.B = torch.nn.Parameter(torch.empty(outside, rank))
    chunks = fit(config, lm)
    assert chunks.rollout_rows >= config.group_size
    assert chunks.micro_batch_tokens >= config.max_total_tokens


def settings_of(args, monkeypatch):
    found = []
    monkeypatch.setitem(arpo_mini.COMMANDS, "train", (found.append, {}))
    parse_command(["train", *args])()
    return found[0]


def test_a_preset_is_where_flags_start_from(monkeypatch, capsys):
    config = settings_of(["--preset", "paper"], monkeypatch)
    assert (config.group_size, config.initial_rollouts, config.learning_rate) == (16, 8, 1e-6)
    config = settings_of(
        ["--group_size", "4", "--preset", "24gb", "--initial_rollouts", "2"], monkeypatch
    )
    assert (config.group_size, config.initial_rollouts, config.memory_gb) == (4, 2, 23.0)
    default = settings_of(["--preset", "paper", "--group_size", "8"], monkeypatch)
    assert default.group_size == 8  # typed, though it is also the default
    assert settings_of([], monkeypatch) == Config()
    for settings in PRESETS.values():
        Config(**settings)  # every name and value is legal
    assert main(["train", "--preset", "4gb"]) == 2
    error = capsys.readouterr().err
    assert "4gb" in error and len(error.splitlines()) == 1
    assert all(name in error for name in PRESETS)


# ---- running out --------------------------------------------------------------------------


def fails(real, *calls):
    """`real`, but the calls with these numbers (from 1) run out of memory."""
    count = 0

    def call(*args, **kwargs):
        nonlocal count
        count += 1
        if count in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n more words")
        return real(*args, **kwargs)

    return call


def one_step(policy, config, tools, questions):
    """Metrics without the clock, leaves as token ids, and the adapter after one step; restored."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    policy.chunks = Chunks()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    metrics, groups, _ = train_step(policy, optimizer, questions, config, tools, 1)
    after = [p.detach().clone() for p in parameters]
    for parameter, value in zip(parameters, before, strict=True):
        parameter.data = value
        parameter.grad = None
    chunks, policy.chunks = policy.chunks, Chunks()
    metrics = {k: v for k, v in metrics.items() if not k.startswith("seconds")}
    paths = [[[s.token_ids for s in leaf.path()] for leaf in leaves] for leaves in groups]
    assert [len(set(leaves)) for leaves in groups] == [config.group_size] * len(questions)
    return metrics, paths, after, chunks


def assert_same_step(one, other):
    assert one[0] == other[0] and one[1] == other[1]
    assert all(torch.equal(a, b) for a, b in zip(one[2], other[2], strict=True))


@pytest.mark.parametrize(
    "calls", [(3,), *(pytest.param(c, marks=pytest.mark.slow) for c in ((1,), (2, 5)))]
)
def test_a_rollout_out_of_memory_is_repeated_in_halves(
    policy, config, tools, questions, monkeypatch, capsys, calls
):
    config, some = dataclasses.replace(config, group_size=4, entropy_tokens=6), questions[2:4]
    monkeypatch.setattr(Rollout, "sample", fails(Rollout.sample, *calls))
    retried = one_step(policy, config, tools, some)
    monkeypatch.undo()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(calls) and "--rollout_rows 8 -> 4" in lines[0]
    rows = 8 >> len(calls)
    assert retried[3].rollout_rows == rows
    narrow = dataclasses.replace(config, rollout_rows=rows)
    assert_same_step(retried, one_step(policy, narrow, tools, some))


@pytest.mark.parametrize(
    "calls", [(4,), *(pytest.param(c, marks=pytest.mark.slow) for c in ((1,), (2, 5)))]
)
def test_an_update_out_of_memory_is_repeated_in_halves(
    policy, config, tools, questions, monkeypatch, capsys, calls
):
    """Also between the optimizer steps of one rollout: adapter and optimizer start again."""
    config = dataclasses.replace(config, updates_per_rollout=3, group_size=4)
    some = questions[2:4]
    failing = fails(arpo_mini.token_logprobs, *calls)
    monkeypatch.setattr(arpo_mini, "token_logprobs", failing)
    retried = one_step(policy, config, tools, some)
    monkeypatch.undo()
    assert len(capsys.readouterr().out.splitlines()) == len(calls)
    tokens = retried[3].micro_batch_tokens
    assert tokens < 8192 and retried[3].rollout_rows == float("inf")
    small = dataclasses.replace(config, micro_batch_tokens=tokens)
    assert_same_step(retried, one_step(policy, small, tools, some))


def test_an_evaluation_out_of_memory_goes_on_in_halves(
    policy, config, tools, questions, monkeypatch, capsys
):
    policy.chunks = Chunks()
    monkeypatch.setattr(Rollout, "sample", fails(Rollout.sample, 1))
    records = evaluate(policy, questions, config, tools, samples=2)
    monkeypatch.undo()
    assert "--rollout_rows 12 -> 6" in capsys.readouterr().out
    narrow = dataclasses.replace(config, rollout_rows=6)
    policy.chunks = Chunks()
    assert records == evaluate(policy, questions, narrow, tools, samples=2)


def test_when_not_even_the_least_fits_the_run_ends_with_one_line(tmp_path, monkeypatch, capsys):
    questions = tmp_path / "one.jsonl"
    questions.write_text('{"question": "What is 2 plus 2?", "answer": "4"}\n')
    args = f"train --steps 2 --eval_every 0 --group_size 4 --eval_path {questions}"
    args += f" --questions_per_step 1 --output_dir {tmp_path / 'run'}"
    real, steps = arpo_mini.update, []

    def second_step_fails(*args):
        steps.append(1)
        if len(steps) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args)

    monkeypatch.setattr(arpo_mini, "update", second_step_fails)
    assert main(args.split()) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Traceback" not in error
    for words in ("--micro_batch_tokens", "--max_total_tokens", "smaller --model_name"):
        assert words in error
    assert 2 < len(steps) < 8  # it stops where no smaller chunk exists
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_model_that_does_not_fit_is_one_line(monkeypatch, capsys):
    out_of_memory = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2 GiB\n more words"
    )
    monkeypatch.setattr(policy_module, "load_model", fails_with(out_of_memory))
    assert main(["show", "--load_in_4bit", "false"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "Tried to allocate 2 GiB" in error
    assert "--load_in_4bit true or a smaller model" in error


def test_nothing_else_is_caught():
    with pytest.raises(RuntimeError, match="a bug"):
        Chunks().retry("rollout_rows", Config(), fails_with(RuntimeError("a bug")))
    with pytest.raises(OutOfMemory, match="--rollout_rows 1, the smallest"):
        out = fails_with(torch.OutOfMemoryError("no"))
        Chunks().retry("rollout_rows", Config(), out, largest=2)


def fails_with(error):
    def work(config):
        raise error

    return work


def test_memory_gb_splits_a_run_that_still_fits(config, tools, questions):
    """The same commands with little memory: fewer rows at once, as many leaves."""
    config = dataclasses.replace(config, max_total_tokens=256)
    policy = load_policy(config, tools, trainable=True)
    parameters = list(policy.lm.parameters())
    fixed = sum(4 * p.numel() + 12 * p.numel() * p.requires_grad for p in parameters)
    room = 3.5 * memory.path_bytes(policy.lm.config, 4, 256)
    tight = dataclasses.replace(config, memory_gb=(fixed + room) / memory.USABLE / memory.GIB)
    fitted = fit(tight, policy.lm).fitted(tight)
    assert fitted.rollout_rows == 3 and fitted.gradient_checkpointing
    groups = roll_out(policy, fitted, tools, questions[:2])
    assert [len(set(leaves)) for leaves in groups] == [tight.group_size] * 2
    rows = [row for leaves in groups for row in credit(leaves, some_rewards(leaves), fitted)]
    longest = max(sum(len(s.token_ids) for s in leaf.path()) for g in groups for leaf in g)
    assert max(map(len, rows)) <= max(fitted.micro_batch_tokens, longest)
    assert len({s for leaves in groups for s in shared_by(leaves)}) > 16
