"""lab.bench: predictions are exact where they can be; what is timed is what was asked for."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import roll_out
from transformers import AutoTokenizer, DynamicCache

import engine.memory as memory
import policy as policy_module
from advantage import shared_by
from arpo_mini import train_step
from lab.bench import against_trl, compare, gpu, plan, weights
from lab.bench.__main__ import main
from lab.bench.job import forced, random_weights, size_of
from lab.bench.measure import compared, frozen_bytes, peak_bytes
from lab.bench.shapes import NAMES, model_config
from engine.model import Policy, load_policy
from app.config import DATA, PRESETS, Config
from tools import ToolResult, result_text

TINY = str(DATA / "tiny-qwen3")
README = Path(__file__).parent.parent / "README.md"
SMALL = Config(questions_per_step=1, group_size=4, max_segment_tokens=16, entropy_tokens=8)

# ---- plan ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "outside_the_embedding"),
    [*zip(NAMES, (0.6, 1.7, 4.0, 8.2, 14.8), (0.44, 1.4, 3.6, 6.95, 13.2), strict=True)],
)
def test_the_shapes_have_the_parameters_of_the_model_cards(name, billions, outside_the_embedding):
    counts = plan.count(model_config(name))
    assert counts.total / 1e9 == pytest.approx(billions, abs=0.06)
    assert (counts.total - counts.embedding) / 1e9 == pytest.approx(outside_the_embedding, abs=0.06)


def test_both_spellings_and_a_folder_name_a_shape():
    assert model_config("qwen3-4b").hidden_size == model_config("Qwen/Qwen3-4B").hidden_size == 2560
    assert model_config(TINY).hidden_size == 128


def test_predicted_weights_are_those_of_the_loaded_model(policy, policy_4bit, config):
    counts = plan.count(model_config(TINY))
    for loaded, four in ((policy, False), (policy_4bit, True)):
        predicted = plan.weights(counts, four, b=4)
        assert sum(predicted.values()) == frozen_bytes(loaded.lm)
        frozen = [p for p in loaded.lm.parameters() if not p.requires_grad]
        scales = [p.quant_state.absmax.nbytes for p in frozen if hasattr(p, "quant_state")]
        assert len(scales) == (28 if four else 0)
        assert sum(predicted.values()) == sum(p.nbytes for p in frozen) + sum(scales)
        trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
        assert plan.adapter_parameters(counts, config.lora_rank) == trained


def test_predicted_cache_is_that_of_a_forward_pass(policy):
    cache = DynamicCache()
    with torch.no_grad():
        policy.lm(input_ids=torch.zeros(3, 50, dtype=torch.long), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    shape = model_config(TINY)
    sizes = plan.Sizes(rows=3, columns=50, read=0, tokens=0, scored=0, recompute=False)
    predicted = plan.rollout(shape, sizes, b=4)["KV cache"]
    assert predicted == held + held // shape.num_hidden_layers  # a layer of it twice


def test_the_peak_is_the_sum_of_what_is_held_together():
    shape = model_config("qwen3-1.7b")
    sizes = plan.Sizes(rows=8, columns=1024, read=200, tokens=4096, scored=4096, recompute=True)
    counts = plan.count(shape)
    parts = plan.predict(shape, counts, Config(), sizes)
    always = sum(parts["weights"].values()) + sum(parts["adapter"].values())
    rollout, update = (sum(parts[name].values()) for name in ("rollout", "update"))
    assert parts["peak"] == {
        "rollout": always + rollout,
        "update": always + update,
        "both": always + max(rollout, update),
    }
    kept = plan.predict(shape, counts, Config(), dataclasses.replace(sizes, recompute=False))
    assert kept["peak"]["update"] > 2 * parts["peak"]["update"]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_the_predicted_peak_is_near_the_measured_one(recompute):
    """A vocabulary of real size, so that every part counts. The CPU computes in float32."""
    shape = model_config("qwen3-0.6b")
    shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers = 256, 768, 6
    shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim = 8, 4, 64
    config = dataclasses.replace(
        SMALL, gradient_checkpointing=recompute, micro_batch_tokens=3000, max_segment_tokens=64
    )
    job = forced(config, size_of(3, 1024, 64), shape)
    figures = gpu.measured(job, shape, size_of(3, 1024, 64), repeats=1)
    assert figures["predicted_over_measured"] == pytest.approx(1, abs=0.15)


def test_plan_needs_no_weights_and_says_what_fits(capsys, tmp_path):
    path = tmp_path / "plan.json"
    args = ["--model_name", "Qwen/Qwen3-4B", "--group_size", "16", "--preset", "12gb"]
    assert main(["plan", *args, "--json", str(path)]) == 0
    shown, report = capsys.readouterr().out, json.loads(path.read_text())
    for part in ("weights", "adapter", "rollout", "update", "peak"):
        assert part in shown and report["parts"][part]
    assert report["cards"]["24gb"]["fits"] and "24gb: fits" in shown
    assert report["parts"]["peak"]["both"] <= 11.5 * memory.GIB
    assert report["cards"]["8gb"]["rows"] < report["cards"]["24gb"]["rows"]
    assert set(report["activations"]) == {"all kept", "checkpointed"}


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B"])
def test_the_readme_repeats_the_plan(size):
    line = readme_line(size)
    shape = model_config(f"Qwen/Qwen3-{size}")
    counts = plan.count(shape)
    constant, rows = [], []
    for four in (True, False):
        adapter = 16 * plan.adapter_parameters(counts, Config().lora_rank)
        constant.append(sum(plan.weights(counts, four, b=2).values()) + adapter)
        configs = (Config(**PRESETS[card], load_in_4bit=four) for card in plan.CARDS)
        on_cards = [
            plan.on_card(shape, counts, config, card)
            for config, card in zip(configs, plan.CARDS, strict=True)
        ]
        rows.append(", ".join(str(c["rows"]) if c["fits"] else "none" for c in on_cards))
    sizes = [f"{x / memory.GIB:.2f}" for x in constant]
    assert line[1:-1] == sizes + rows


def readme_line(size: str) -> list[str]:
    """The cells of the README's table that say what a size takes."""
    lines = (line.strip(" |") for line in README.read_text(encoding="utf-8").splitlines())
    (line,) = (line for line in lines if line.startswith(f"{size} |"))
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("case", gpu.GOALS, ids=lambda case: case.shape)
def test_the_plan_keeps_the_goals_and_the_readme_repeats_it(case):
    """With the flags that the README names."""
    config = dataclasses.replace(
        Config(questions_per_step=1, micro_batch_tokens=4096, gradient_checkpointing=True),
        model_name=case.shape,
        group_size=case.group_size,
        max_total_tokens=case.context,
    )
    peak = plan.run(config)["parts"]["peak"]["both"] / memory.GIB
    assert peak < gpu.GOALS[case]
    size = case.shape.removeprefix("qwen3-").upper()
    words = f"{size} with {case.group_size} paths of {case.context:,} tokens: {peak:.1f} GiB"
    assert words in " ".join(README.read_text(encoding="utf-8").split())


def test_plan_says_what_does_not_fit(capsys):
    assert main(["plan", "--model_name", "qwen3-14b"]) == 0
    assert "8gb: does not fit" in capsys.readouterr().out


def test_an_unknown_model_is_refused_with_the_legal_names(capsys):
    assert main(["plan", "--model_name", "Qwen/Qwen9"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Qwen/Qwen9" in error
    assert all(name in error for name in NAMES)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian"], "unknown command trian; the commands are plan, weights, trl, gpu"),
        (["--shape", "qwen3-5b"], "choose one of"),
        (["--shape", "qwen3-0.6b", "--context", "100"], "--context 100"),
        (["--repeats", "0"], "--repeats 0"),
        (["gpu", "--shapes", "tiny"], "--shapes tiny: choose from qwen3-0.6b"),
        (["plan", "--group_size", "0"], "--group_size 0"),
        (["weights", "--shapes", "qwen3-0.6b,qwen3-5b"], "--shapes qwen3-5b: choose one of"),
        (["weights", "--rows", "0"], "--rows 0: it must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, args, words):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error


# ---- 4-bit and bfloat16 -------------------------------------------------------------------


def test_both_kinds_of_weights_are_measured(capsys, tmp_path):
    path = tmp_path / "weights.json"
    args = ["--rows", "2", "--context", "16", "--repeats", "1"]
    assert main(["weights", "--shapes", TINY, *args, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())["shapes"][TINY]
    counts = plan.count(model_config(TINY))
    for way, four in (("4-bit", True), ("bf16", False)):
        assert figures[way]["weight_bytes"] == sum(plan.weights(counts, four, b=2).values())
        assert figures[way]["seconds"] > 0
    ratio = figures["4-bit / bf16"]
    assert ratio["seconds"] == figures["4-bit"]["seconds"] / figures["bf16"]["seconds"]
    assert f"{ratio['weight_bytes']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B"])
def test_the_readme_repeats_what_was_measured(size):
    """And the weights took, byte for byte, what the plan says of them."""
    results = json.loads((README.parent / "lab/results/weights-cpu.json").read_text())
    figures = results["shapes"][f"qwen3-{size.lower()}"]
    counts = plan.count(model_config(f"qwen3-{size.lower()}"))
    for way, four in (("4-bit", True), ("bf16", False)):
        assert figures[way]["weight_bytes"] == sum(plan.weights(counts, four, b=2).values())
    seconds = [f"{figures[way]['seconds']:.2f}" for way in ("4-bit", "bf16")]
    ratio = figures["4-bit / bf16"]["seconds"]
    assert readme_line(size)[-1] == f"{seconds[0]} / {seconds[1]} = {ratio:.2f}"


# ---- forced jobs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job():
    return forced(SMALL, size_of(2, 192, 16), model_config(TINY))


def test_a_forced_rollout_has_the_turns_and_tokens_it_was_asked_for(job):
    size = size_of(2, 192, 16)
    assert (size.context, size.segment, size.turns) == (192, 16, 2)
    metrics, groups, rewards = train_step(
        job.policy, job.optimizer, job.asked(1), job.config, job.tools, 1
    )
    for leaf in groups[0]:
        lengths = [len(segment.token_ids) for segment in leaf.path()]
        assert lengths == [size.prompt, *[size.segment, size.result] * size.turns, size.segment]
        assert leaf.stop == "answer"
    assert metrics["forks"] > 0 and metrics["train_tokens"] < metrics["train_tokens_unpacked"]
    assert all(r.well_formed for r in rewards[0])
    assert {r.total for r in rewards[0]} == {0.0, 1.0}  # the last digit is left to chance


@pytest.mark.parametrize("four", [False, True])
def test_a_random_model_is_built_like_a_loaded_one(four, policy, policy_4bit, config, tools):
    with random_weights(model_config(TINY)):
        made = load_policy(dataclasses.replace(config, load_in_4bit=four), tools, trainable=True)
    loaded = policy_4bit if four else policy

    def description(policy: Policy):
        named = policy.lm.named_parameters()
        return {n: (type(p), p.shape, p.dtype, p.device, p.requires_grad) for n, p in named}

    assert description(made) == description(loaded)
    assert frozen_bytes(made.lm) == frozen_bytes(loaded.lm)
    assert made.lm.lm_head.weight is made.lm.model.embed_tokens.weight


def test_the_rotary_embedding_of_a_random_model_is_computed():
    with random_weights(model_config(TINY)):
        made = load_policy(SMALL, {}, trainable=False)
    loaded = load_policy(SMALL, {}, trainable=False)
    frequencies = [p.lm.model.rotary_emb.inv_freq for p in (made, loaded)]
    assert torch.equal(*frequencies)


# ---- comparisons --------------------------------------------------------------------------


def test_rereading_says_the_same_tokens_and_reads_every_prefix(job, monkeypatch):
    groups, _ = compare.roll_out(compare.grpo(job), 1)
    segments, generate = [], job.policy.lm.generate

    def recorded(input_ids, **kwargs):
        out = generate(input_ids, **kwargs)
        segments.extend(out[:, input_ids.shape[1] :].tolist())
        return out

    monkeypatch.setattr(job.policy.lm, "generate", recorded)
    read = compare.reread(job, groups)
    paths = [leaf.path() for leaf in groups[0]]
    written = [path[turn] for turn in (1, 3, 5) for path in paths]
    assert segments == [segment.token_ids for segment in written]
    assert read == sum(len(s.token_ids) for w in written for s in w.path()[:-1])


def test_rereading_ends_where_a_trajectory_ends(policy, config, tools, questions):
    job = compare.Job(config, policy, tools, questions[-2:], optimizer=None)
    groups = roll_out(policy, compare.grpo(job).config, tools, job.questions)
    every = [s for leaves in groups for s in shared_by(leaves) if s.author == "policy"]
    read = compare.reread(job, groups)
    assert read == sum(len(s.token_ids) for w in every for s in w.path()[:-1])


def test_ratios_are_medians_over_pairs():
    runs = {
        "slow": [{"s": 2.0}, {"s": 4.0}, {"s": 8.0}],
        "fast": [{"s": 1.0}, {"s": 1.0}, {"s": 6.0}],
    }
    figure = compared(runs, plain="slow", ours="fast")["figures"]["s"]
    assert figure == {"plain": 4.0, "ours": 1.0, "ratio": 0.5}


def test_peak_memory_counts_what_is_held_at_one_time():
    def work():
        for _ in range(3):
            a = torch.zeros(1_000_000)  # 4 MB
            b = a + 1
            del a, b

    assert 8e6 <= peak_bytes(work) < 9e6


@pytest.mark.slow
def test_one_run_compares_everything(capsys, tmp_path):
    path = tmp_path / "bench.json"
    small = ["--questions_per_step", "2", "--group_size", "4", "--repeats", "1"]
    assert main([*small, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    figures = {name: c["figures"] for name, c in report["comparisons"].items()}
    assert set(figures) == {"cache reuse", "forks", "packing", "quantisation"}
    assert figures["cache reuse"]["prefill_tokens"]["ratio"] < 0.6
    assert figures["packing"]["train_tokens"]["ratio"] < 1
    assert figures["packing"]["peak_bytes"]["ours"] > 1e6
    assert figures["quantisation"]["weight_bytes"]["ratio"] < 0.35
    for name in (*compare.TOKENS, "seconds"):
        assert set(figures["forks"][name]) == {"plain", "ours", "ratio"}
    split = report["split"]
    assert all(split["seconds"][name] > 0 for name in ("decode", "prefill", "tools", "update"))
    assert 0 < split["decode_share_of_limit"] <= split["decode_passes_share_of_limit"]
    assert report["machine"]["threads"] >= 1
    assert "packed against unpacked" in capsys.readouterr().out


# ---- TRL ----------------------------------------------------------------------------------


def test_without_trl_the_command_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trl", None)
    assert main(["trl"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install trl" in error


def test_trl_reads_the_same_tokens_as_we_do(policy):
    """Its prompt, and what its template puts after a call, are ours token by token."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = against_trl.TURNS
    call = {"type": "function", "function": {"name": "search", "arguments": {}}}
    asked = [{"role": "user", "content": "Where is it?"}]
    called = [*asked, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = result_text(ToolResult("in Hallin", ok=True))
    answered = [*called, {"role": "tool", "name": "search", "content": text}]

    def render(messages, prompt=True):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )

    assert render(asked) == policy.prompt("Where is it?")
    before, after = render(called, prompt=False), render(answered)
    assert after[: len(before)] == before and after[len(before) :] == policy.encode(text)


def test_trl_finds_the_call_of_this_turn_and_no_earlier_one():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.response_template = against_trl.RESPONSE
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    turn = "<think>first</think><search>Hallin</search>"
    later = asked + turn + "<result>\nx\n</result>"
    for prefix, text, found in (
        (asked, turn, ("search", "Hallin")),
        (later, "<think>then</think><calculator>1 + 1</calculator>", ("calculator", "1 + 1")),
    ):
        (call,) = tokenizer.parse_response(text, prefix=prefix)["tool_calls"]
        name, argument = found
        assert call["function"] == {"name": name, "arguments": {"text": argument}}
    answer = tokenizer.parse_response("<think>so</think><answer>2</answer>", prefix=later)
    assert not answer.get("tool_calls")


# ---- GPU ----------------------------------------------------------------------------------


def test_every_case_and_goal_of_a_shape_is_measured():
    cases = gpu.in_order(["qwen3-1.7b", "qwen3-4b", "qwen3-8b"])
    assert len(cases) == len(set(cases)) and set(gpu.GOALS) == set(cases[:3])
    assert [case.preset for case in cases[3:7]] == [*plan.CARDS]  # then what a user would choose
    assert sum(case.preset is None for case in gpu.cases_of("qwen3-4b")) == 2 * 2 * 2
    assert {case.preset for case in cases} == {None, *plan.CARDS}


def test_a_sweep_goes_on_where_it_stopped(monkeypatch, tmp_path):
    path, measured = tmp_path / "gpu.json", []

    def stub(case, config):
        measured.append(case)
        if len(measured) == 2:
            return {"error": "out of memory"}
        return {"peak_bytes": 1, "predicted_over_measured": 1.0, "seconds": 1.0}

    monkeypatch.setattr(gpu, "under_cap", stub)
    cases = gpu.cases_of("qwen3-1.7b")
    gpu.sweep(cases[:3], Config(), 60, path)
    report = gpu.sweep(cases, Config(), 60, path)
    assert measured == cases and list(report["cases"]) == [case.name for case in cases]
    assert report["cases"][cases[2].name]["goal_met"] is True
    assert json.loads(path.read_text()) == report
    gpu.sweep(gpu.cases_of("qwen3-4b"), Config(), -1, path)
    assert len(measured) == len(cases)  # no time: nothing new was begun


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys):
    assert main(["gpu"]) == 2
    assert "no GPU was found" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("preset", [None, "8gb"])
def test_a_case_is_measured_on_a_cpu_too(preset):
    case = gpu.Case(TINY, True, 4, 512 if preset is None else 1024, preset)
    figures = gpu.under_cap(case, Config())
    assert figures["train_tokens"] < figures["train_tokens_unpacked"]
    assert figures["rows"] == (4 if preset is None else 8)
    assert figures["peak_bytes"] > 1e6 and figures["seconds"] > 0
    assert figures["recompute"] is (preset is None)


def test_running_out_of_memory_is_a_figure_too(monkeypatch, capsys):
    """Also while a model is loaded: what was measured before, and what comes after it, is kept."""

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(policy_module, "load_model", fails)
    error = gpu.under_cap(gpu.Case(TINY, True, 4, 512), Config())["error"]
    assert "does not fit into memory (CUDA out of memory)" in error
    assert main(["weights", "--shapes", f"{TINY},{TINY}/"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("does not fit into memory") == 2 * len(weights.WAYS)
