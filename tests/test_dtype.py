"""float16 and bfloat16: the same training within a bound; numbers that are none end a step."""

import dataclasses
import functools
import itertools
import math
import shutil

import pytest
import torch
from common import ECHO, ROOT, TINY, TINY_QUESTIONS, lines_of, load, roll_out
from safetensors.torch import load_file, save_file
from test_memory import failing
from test_update import flat_gradient, packed_rows

from app.config import DATA, Config
from app.health import notes
from arpo_mini import Agent, safe_step, update
from data.files import UserError
from engine import model
from engine.memory import snapshot
from engine.packing import NonFinite
from lab.bench import plan

# Measured: 5e-6, 0.01 and 0.03 nats between sampler and trainer at the worst token; 0.003 and 0.02
# of the float32 gradient.
BOUNDS = {"float32": (1e-4, 1e-5), "float16": (0.04, 0.01), "bfloat16": (0.2, 0.06)}


def still(policy):
    return torch.optim.SGD(policy.parameters, lr=0.0)


@pytest.fixture
def half(config, tools):
    """A policy in float16, which a test may train; its settings and an optimizer."""
    config = dataclasses.replace(config, group_size=3, dtype="float16")
    policy = load(config, tools)
    return policy, config, torch.optim.AdamW(policy.parameters, lr=1e-3)


@pytest.fixture(scope="module")
def rows(config, policy, tools, questions):
    """Of a rollout in float32."""
    config = dataclasses.replace(config, group_size=3)
    return packed_rows(roll_out(policy, config, tools, questions[2:3]), config)


DTYPES = [("float32", True), ("float16", False)]
DTYPES = [pytest.param(*each, marks=pytest.mark.slow) for each in DTYPES]
DTYPES += [("float16", True), ("bfloat16", True)]


@pytest.mark.parametrize("dtype, four", DTYPES)
def test_every_dtype_samples_what_it_trains_and_has_the_gradient_of_float32(
    dtype, four, config, tools, questions, policy, policy_4bit, rows
):
    drift, off = BOUNDS[dtype]
    config = dataclasses.replace(config, group_size=3, dtype=dtype, load_in_4bit=four)
    own, wanted = load(config, tools), getattr(torch, dtype)
    groups = roll_out(own, config, tools, questions[2:3])
    assert own.lm.dtype == wanted and {p.dtype for p in own.parameters} == {torch.float32}
    if four:
        assert own.lm.get_decoder().layers[0].self_attn.q_proj.base_layer.compute_dtype == wanted
    figures = update(own, still(own), packed_rows(groups, config), config)
    assert figures["drift_max"] < drift and figures["skipped_updates"] == 0
    expected = policy_4bit if four else policy
    update(expected, still(expected), rows, config)
    update(own, still(own), rows, config)
    a, b = flat_gradient(expected), flat_gradient(own)
    assert a.norm() > 1e-4 and (a - b).norm() <= off * a.norm()
    expected.model.zero_grad()


def test_auto_is_what_the_machine_has_natively(monkeypatch):
    found = [model.number_type("auto", "cpu")]
    for native in (True, False):
        supported = functools.partial(lambda native, including_emulation: native, native)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        found += [model.number_type(name, "cuda:0") for name in ("auto", "float32")]
    full = torch.float32
    assert found == [full, torch.bfloat16, full, torch.float16, full]
    with pytest.raises(UserError, match=r"^--dtype half: choose one of auto, bfloat16, float16, f"):
        Config(dtype="half")


def test_a_gradient_that_overflows_is_skipped_counted_and_said(half, rows):
    """The weights stay, the scale is halved; where it is 1 already, the number itself is wrong."""
    policy, config, optimizer = half

    def moved(updates):
        factors = itertools.chain([math.inf], itertools.repeat(1.0))  # of the gradients
        before = [p.detach().clone() for p in policy.parameters]
        some = dataclasses.replace(config, updates_per_rollout=updates)
        with policy.parameters[0].register_hook(lambda grad: grad * next(factors)):
            figures = update(policy, optimizer, rows, some)
        return figures, not all(map(torch.equal, before, policy.parameters))

    figures, changed = moved(updates=2)
    assert figures["skipped_updates"] == 1 and figures["grad_norm"] > 0
    assert policy.scaler.get_scale() == 2**15 and changed  # the second one was made
    figures, changed = moved(updates=1)
    assert figures["grad_norm"] is None and not changed
    metrics = lines_of(ROOT / "tests" / "run", "metrics.jsonl")[0] | figures
    assert any(words.startswith("1 updates skipped") for words in notes(metrics))
    policy.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(NonFinite, match="the gradient norm is"):
        moved(updates=1)
    fresh = dataclasses.replace(policy)  # the first step may have no gradient
    snapshot(fresh, still(fresh))()  # nor may it where it is repeated
    row = dataclasses.replace(rows[0], A_plus=[0.0] * len(rows[0]), A_minus=[0.0] * len(rows[0]))
    assert update(fresh, still(fresh), [row], config)["grad_norm"] == 0


def test_a_repeated_step_has_its_first_scale(half, questions, tools, monkeypatch, caplog):
    """Also between `unscale_` and the end of an optimizer step, which GradScaler remembers."""
    policy, config, optimizer = half
    config = dataclasses.replace(config, questions_per_step=1, kl_coefficient=0.1)
    policy.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    monkeypatch.setattr(torch.optim.AdamW, "step", failing(torch.optim.AdamW.step, 1))
    agent = Agent(policy, tools, config)
    safe_step(agent, optimizer, questions[2:3], config, 1)
    assert policy.scaler.state_dict()["scale"] == 16.0 and "out of memory" in caplog.text
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}
    with torch.no_grad():  # and one that becomes too loud ends its step in one line
        for p in policy.parameters:
            p.mul_(1e4)
    with pytest.raises(NonFinite, match=r"^step 5: activations are too large.*--dtype bfloat16"):
        safe_step(agent, optimizer, questions[2:3], config, 5)


def test_a_model_too_loud_for_float16_is_refused_and_names_the_others(tmp_path):
    folder = shutil.copytree(DATA / "tiny-qwen3", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 2.0**20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loud = Config(model_name=str(folder), load_in_4bit=False)
    for dtype in ("float32", "bfloat16"):
        model.load_policy(dataclasses.replace(loud, dtype=dtype), {}, trainable=True)
    words = "too large for float16; --dtype bfloat16 or --dtype float32"
    with pytest.raises(UserError, match=f"{folder}.*{words}"):
        model.load_policy(dataclasses.replace(loud, dtype="float16"), {}, trainable=True)


@pytest.mark.parametrize("four", [True, False])
def test_the_plan_knows_the_dtype(four):
    lm = plan.empty(plan.model_config("qwen3-1.7b"))
    configs = [Config(load_in_4bit=four, dtype=dtype) for dtype in BOUNDS]
    full, *halves = [plan.planned(lm, config) for config in configs]
    assert halves[0] == halves[1] and full["rollout GiB"] > 1.3 * halves[0]["rollout GiB"]
    times = 1.4 if four else 2  # of a model in 4-bit only the embedding
    assert full["weights GiB"] == pytest.approx(times * halves[0]["weights GiB"], rel=0.1)


# ---- inf and nan --------------------------------------------------------------------------


def step(policy, lr=1e-3):
    optimizer = torch.optim.AdamW(policy.parameters, lr=lr)
    config = dataclasses.replace(TINY, kl_coefficient=0.1)  # also equal rewards have a gradient
    return safe_step(Agent(policy, ECHO, config), optimizer, TINY_QUESTIONS, config, 7)


@pytest.mark.parametrize("bad, words", [(math.nan, "a logit is"), (math.inf, "a log-prob is nan")])
def test_the_question_is_named_in_whose_rows_it_happened(restored, writing, bad, words):
    """While it is rolled out, and while it is trained; the other question is all right."""
    start = restored.prompt("abc")

    def spoil(module, args, kwargs, output):
        rows = [d.path_tokens() for d in writing] if output.past_key_values else kwargs["input_ids"]
        if bool(output.past_key_values) == (words == "a logit is"):
            for hidden, ids in zip(output.last_hidden_state.data, rows, strict=True):
                if list(ids[: len(start)]) == start:
                    hidden[:] = bad

    handle = restored.lm.get_decoder().register_forward_hook(spoil, with_kwargs=True)
    with handle, pytest.raises(NonFinite) as error:
        step(restored)
    said, lengths = str(error.value), [len(row) for row in error.value.rows]
    assert said.startswith(f"step 7: {words}") and "longer" not in said and "\n" not in said
    assert f"in 'abc' ({lengths[0]} tokens)" in said
    assert said.count("'abc'") == min(3, len(lengths)) and ("more" in said) == (len(lengths) > 3)


def test_weights_that_are_none_are_found_before_they_are_saved(restored):
    with pytest.raises(NonFinite, match=r"^step 7: a weight after the step is (nan|-?inf)$"):
        step(restored, lr=1e308)


@pytest.mark.parametrize("factor, words", [(1e39, "the loss is"), (1.0, "the gradient norm is")])
def test_loss_and_gradient_are_looked_at_before_the_step(restored, tiny_groups, factor, words):
    rows, first = packed_rows(tiny_groups, TINY), restored.parameters[0]
    rows[0].A_plus = [factor * (weight > 0) for weight in rows[0].weight]
    before = [p.detach().clone() for p in restored.parameters]
    with first.register_hook(lambda grad: grad * math.inf), pytest.raises(NonFinite, match=words):
        update(restored, torch.optim.SGD(restored.parameters, lr=1.0), rows, TINY)
    assert all(map(torch.equal, before, restored.parameters))
