"""lab.bench: predictions are exact where they can be; what is timed is what was asked for."""

import dataclasses
import json
import re
import sys
import time
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoTokenizer

from app.config import DATA, PRESETS, Config
from engine import memory, model
from lab.bench import against, gpu, job, plan
from lab.bench.__main__ import cell, measured
from lab.command import exit_code
from tools import ToolResult, result_text

TINY = str(DATA / "tiny-qwen3")
BILLIONS = dict(zip(plan.NAMES, (0.6, 1.72, 4.02, 8.19, 14.77), strict=True))
SIZE = job.Size(turns=2, segment=16, result=20)
SMALL = Config(questions_per_step=1, group_size=4, max_total_tokens=130, entropy_tokens=8)


def main(args):
    return exit_code(lambda: measured(args))


# ---- plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BILLIONS)
def test_the_shapes_have_the_parameters_of_the_model_cards(name):
    shape = plan.model_config(name)
    assert plan.model_config(name.partition("/")[2].lower()) == shape  # the short spelling
    billions = plan.weight_bytes(plan.empty(shape), False, b=1) / 1e9
    assert billions == pytest.approx(BILLIONS[name], abs=0.01)


def test_predicted_weights_are_those_of_the_loaded_model(policy, policy_4bit, config):
    empty = plan.empty(plan.model_config(TINY))
    for loaded, four in ((policy, False), (policy_4bit, True)):
        trained = sum(p.numel() for p in loaded.parameters)
        assert plan.adapter_size(empty, config.lora_rank) == trained
        assert plan.weight_bytes(empty, four, b=4) == memory.weight_bytes(loaded.lm) - 4 * trained


def test_the_peak_is_the_sum_of_what_is_held_together():
    lm, config = plan.empty(plan.model_config("qwen3-1.7b")), Config(max_total_tokens=1024)
    ways = [(8, True), (64, True), (8, False)]  # rows, recompute
    some, many, kept = (
        plan.predict(lm, config, rows, tokens=4096, recompute=twice) for rows, twice in ways
    )
    fixed = some["weights GiB"] + some["adapter GiB"]
    assert some["peak GiB"] == fixed + max(some["rollout GiB"], some["update GiB"])
    assert many["rollout GiB"] > 7 * some["rollout GiB"] and many["peak GiB"] > some["peak GiB"]
    assert kept["update GiB"] > 5 * some["update GiB"]


@pytest.mark.parametrize("text", ["null", '{"model_type": "t5"}', '{"model_type": ["a"]}'])
def test_a_plan_of_no_causal_model_is_one_line(text, refused, tmp_path):
    (tmp_path / "config.json").write_text(text)
    refused(main(["plan", "--model_name", str(tmp_path)]), f"--model_name {tmp_path}: ")


def test_plan_needs_no_weights_and_says_what_fits(capsys, tmp_path):
    path = tmp_path / "plan.json"
    args = ["--model_name", "Qwen/Qwen3-14B", "--lora_rank", "8", "--preset", "12gb"]
    assert main(["plan", *args, "--json", str(path)]) == 0
    shown, plans = capsys.readouterr().out, json.loads(path.read_text())["figures"]
    assert [*plans] == ["as set", *plan.CARDS]
    assert plans["as set"] == plans["12gb"]  # what was typed stays, the rest is the card's
    assert plans["12gb"]["adapter GiB"] == plans["8gb"]["adapter GiB"] < 0.5  # half of rank 16
    assert [plans[card]["fits"] for card in plan.CARDS] == [False, False, True, True]
    assert plans["8gb"]["recomputed"] and plans["8gb"]["paths"] == 1
    assert re.search(r"24gb .* yes", shown) and re.search(r"8gb .* no", shown)
    assert [*map(cell, (1234.5, 0.00712, 1, None, "why"))] == ["1,234", "0.00712", "1", "-", "why"]


@pytest.mark.parametrize(("shape", "group", "tokens", "gib"), gpu.GOALS)
def test_the_plan_keeps_the_goals(shape, group, tokens, gib):
    sizes = {"group_size": group, "max_total_tokens": tokens, "questions_per_step": 1}
    lm = plan.empty(plan.model_config(shape))
    planned = plan.planned(lm, Config(**sizes, memory_gb=gib))
    assert planned["fits"] and planned["paths"] == group and planned["tokens a pass"] >= tokens


@pytest.mark.slow
def test_the_predicted_peak_is_near_the_measured_one(monkeypatch):
    """A vocabulary of real size, so that every part counts. The CPU computes in float32."""
    shape = plan.model_config("qwen3-0.6b")
    shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = 128, 384, 4
    shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 4, 2, 32
    shape.vocab_size = 100_000
    monkeypatch.setattr(plan, "model_config", lambda name: shape)
    monkeypatch.setattr(gpu, "REPEATS", 1)
    monkeypatch.setattr(gpu, "TURNS", 1)
    settings = {"group_size": 4, "max_total_tokens": 400}
    figures = gpu.measured("a shape", settings, Config(entropy_tokens=8))
    assert figures["plan GiB"] / figures["peak GiB"] == pytest.approx(1, abs=0.15)
    assert figures["seconds"] > 0 and figures["written/s"] > 0 and figures["trained/s"] > 0


# ---- a forced policy ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def forced():
    return job.forced(SMALL, SIZE, plan.model_config(TINY))


def test_a_forced_rollout_has_the_turns_and_tokens_it_was_asked_for(forced):
    (leaves,), (rewards,) = forced.agent.roll_out(forced.asked(1), forced.agent.config, seed=1)
    for leaf in leaves:
        lengths = [len(segment.token_ids) for segment in leaf.path()]
        assert lengths[1:] == [SIZE.segment, SIZE.result] * SIZE.turns + [SIZE.segment]
        assert leaf.depth() == SMALL.max_total_tokens and leaf.stop == "answer"
    assert len({segment for leaf in leaves for segment in leaf.path()}) < 6 * len(leaves)  # forks
    assert all(reward.well_formed for reward in rewards)
    assert {reward.total for reward in rewards} == {0.0, 1.0}  # only the last digit differs


def test_steps_change_nothing_and_their_tokens_are_counted(forced):
    policy, metrics = forced.agent.policy, {}
    before = [p.detach().clone() for p in policy.parameters]
    seen = job.watched(policy, lambda: metrics.update(forced.step(1)))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters, strict=True))
    assert seen["tokens, update"] == metrics["train_tokens"]
    assert seen["tokens, rollout"] >= metrics["generated_tokens"] + metrics["prefill_tokens"] - 8
    assert not policy.lm.get_decoder()._forward_pre_hooks  # nothing is counted any longer


@pytest.mark.parametrize("four", [False, True])
def test_a_model_of_a_shape_is_built_like_a_loaded_one(four, policy, policy_4bit, config):
    with job.any_weights(plan.model_config(TINY)):
        made = model.load_policy(dataclasses.replace(config, load_in_4bit=four), {}, True).lm
    loaded = (policy_4bit if four else policy).lm
    described = [
        {n: (type(p), p.shape, p.dtype, p.requires_grad) for n, p in lm.named_parameters()}
        for lm in (made, loaded)
    ]
    assert described[0] == described[1]
    frequencies = [lm.model.rotary_emb.inv_freq for lm in (made, loaded)]
    assert torch.equal(*frequencies)  # buffers are computed, not loaded


def test_peak_memory_counts_what_is_held_at_one_time():
    def work():
        for _ in range(3):
            torch.zeros(1_000_000) + 1  # two times 4 MB

    assert 8e6 <= job.peak_bytes(work) < 9e6


# ---- beside others ------------------------------------------------------------------------


@pytest.mark.slow
def test_one_run_compares_with_the_plain_page(capsys, tmp_path):
    path = tmp_path / "plain.json"
    small = ["--questions_per_step", "2", "--max_tool_calls", "2", "--repeats", "1"]
    assert main(["plain", *small, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["settings"] == {"questions_per_step": 2, "max_tool_calls": 2, "repeats": 1}
    figures = report["figures"]
    assert [*figures] == ["peak GiB", "seconds", "tokens, rollout", "tokens, update"]
    for figure in figures.values():
        assert figure["share"] == figure["ours"] / figure["one page"] > 0
    assert figures["tokens, rollout"]["share"] < 0.6 and figures["tokens, update"]["share"] < 1
    assert "one page" in capsys.readouterr().out


def test_trl_reads_the_same_tokens_as_we_do(policy):
    """Its prompt, and what its template puts after a call, are ours token by token."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = against.TURNS
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    asked = [{"role": "user", "content": "Where is it?"}]
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = result_text(ToolResult("in Hallin", ok=True))
    answered = [*called, {"role": "tool", "name": "search", "content": text}]

    def render(messages, **more):
        return tokenizer.apply_chat_template(messages, return_dict=False, **more)

    described = {"tools": [{"name": "x"}], "add_generation_prompt": True}
    assert render(asked, **described) == policy.prompt("Where is it?")
    assert len(render(asked, **described, schemas=True)) > 200
    before, after = render(called), render(answered, add_generation_prompt=True)
    assert after[: len(before)] == before and after[len(before) :] == policy.encode(text)


def test_trl_finds_the_call_of_this_turn_and_no_earlier_one():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.response_template = against.RESPONSE
    before = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    for name, text in (("search", "Hallin"), ("calculator", "1 + 1")):
        turn = f"<think>why</think><{name}>{text}</{name}>"
        (call,) = tokenizer.parse_response(turn, prefix=before)["tool_calls"]
        assert call["function"] == {"name": name, "arguments": {"text": text}}
        before += turn + "<result>\nx\n</result>"
    answer = tokenizer.parse_response("<think>so</think><answer>2</answer>", prefix=before)
    assert not answer.get("tool_calls")


def test_trl_pays_what_we_pay(policy):
    text = "<think>a</think><search>b</search><result>\nc\n</result><think>d</think>"
    right = against.reward_function(policy.tokenizer, {"search", "calculator"})
    cut, whole = map(policy.tokenizer.encode, (text, text + "<answer>\\boxed{4}</answer>"))
    assert right([whole, whole, cut], [["4"], ["5"], ["4"]]) == [1.0, 0.0, -1.0]


# ---- GPU ----------------------------------------------------------------------------------


def test_a_sweep_ends_in_time_and_keeps_what_it_has(monkeypatch, tmp_path, capsys):
    path, clock = tmp_path / "gpu.json", [0.0]

    def stub(shape, settings, config):
        clock[0] += 100
        return {"error": "out of memory"} if shape == "qwen3-4b" else {"seconds": 1.0}

    for name, value in {"measured": stub, "decoding": Mock(return_value=1), "CHECKS": {}}.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    report = gpu.whole(gpu.cases(), Config(), 540, str(path))
    assert clock[0] == 500 and len(report["figures"]) == 5  # a sixth might end too late
    assert json.loads(path.read_text()) == report
    assert "the time is over before qwen3-8b, --preset 8gb" in capsys.readouterr().out
    first, *_, last = gpu.cases().values()  # goals and presets before 4-bit beside bf16
    assert first == ("qwen3-1.7b", PRESETS["8gb"]) and not last[1]["load_in_4bit"]


@pytest.mark.slow
def test_the_whole_command_is_rehearsed_on_a_cpu(monkeypatch, tmp_path, capsys):
    """With a tiny model, and with other commands for the tests and the default run."""
    small, path = {"group_size": 3, "max_total_tokens": 320}, tmp_path / "gpu.json"
    checks = {"fast tests": ["-c", "print('2 passed')"]}
    for name, value in {"CHECKS": checks, "GOALS": [], "REPEATS": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    cases = {name: (TINY, small | {"load_in_4bit": name == "4"}) for name in ("4", "32", "more")}
    report = gpu.whole(cases, Config(entropy_tokens=8), seconds=9000, path=str(path))
    assert [*report["figures"]] == [*cases] and report["fast tests"] == "2 passed"
    assert all(row["seconds"] > 0 for row in report["figures"].values())
    assert report["a decoded token"][".item()"] > 0 == report["a decoded token"]["launches"]
    assert json.loads(path.read_text()) == report
    assert gpu.check(["-c", "while 1: 1"], time.monotonic() + 2) == "not done in 1 seconds"


def test_running_out_of_memory_is_a_figure_too(monkeypatch):
    """Also while a model is loaded: what was measured before, and what comes after it, is kept."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n more words")
    monkeypatch.setattr(model, "load_model", Mock(side_effect=full))
    error = gpu.measured(TINY, {"group_size": 4}, Config())["error"]
    words = "memory. Tried to allocate 2 GiB); --load_in_4bit true or a smaller model takes less"
    assert "does not fit into memory (CUDA" in error and error.endswith(words)


# ---- command line -------------------------------------------------------------------------


BAD = {
    "trian": "unknown command trian; the commands are plan, plain, trl, gpu",
    "plan --model_name Qwen/Qwen9": f"Qwen/Qwen9: choose one of {plan.NAMES[0]}, ",
    "plan --json no/such/folder/x": "no/such/folder/x",
    "plain --repeats 0": "--repeats 0: it must be at least 1",
    "plain --dual_clip 3": "--dual_clip 3.0: course/one_page.py does without it",
    "plain --branch_rule step": "--branch_rule step: course/one_page.py does",
    "plain --branch_rule official": "--branch_rule official: course/one_page.py does",
    "plain --max_total_tokens 9": "question 1: a prompt of 28 tokens leaves no room",
    "gpu --minutes -1": "--minutes -1.0: it must be above 0",
    "plan --preset 9gb": "--preset 9gb: choose one of ",
    "plan --repeats 3": "unknown: --repeats 3",
    "trl": "trl is missing; install it with: pip install trl",
    "gpu": "no GPU was found",
}


@pytest.mark.parametrize("args", BAD)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(refused, monkeypatch, args):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(main(args.split()), BAD[args])
