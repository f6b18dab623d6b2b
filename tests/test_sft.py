"""The cold start of any model: what counts, what is left out, and the pipeline it begins."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from arpo_mini import Rollout, score
from arpo_mini import main as arpo
from data.formats import load_questions
from engine.memory import Chunks
from engine.model import load_policy
from engine.packing import make_batch
from lab import sft
from lab.coldstart import build_model
from lab.sft import Settings, from_file, from_mini_world, main, with_calculator

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "data" / "tiny-qwen3")
SHAREGPT = str(ROOT / "tests" / "fixtures" / "sharegpt.jsonl")


@pytest.fixture(scope="module")
def demonstrations(tools):
    return from_mini_world(6, tools, seed=0)


# ---- what a demonstration becomes ---------------------------------------------------------


def test_demonstrations_of_the_mini_world_are_right_and_spelled_like_rollouts(
    demonstrations, policy, config, tools
):
    """A row is what a rollout would have made: same tokens, same authors, reward 1 or more."""
    assert len({d.question for d in demonstrations}) == 6
    test = {q.text for q in load_questions(config.eval_path)}
    for demonstration in demonstrations:
        assert demonstration.question not in test
        row = sft.demonstration_row(policy, demonstration)
        prompt = policy.prompt(demonstration.question)
        text = "".join(text for _, text in demonstration.turns)
        assert row.input_ids[: len(prompt)] == prompt
        assert policy.decode(row.input_ids[len(prompt) : -1]) == text
        assert row.input_ids[-1] in policy.eos_ids and row.weight[-1] == 1
        # the authors again, from the other end: from the text
        written = [i for i, w in zip(row.input_ids, row.weight, strict=True) if w]
        by_policy = "".join(text for author, text in demonstration.turns if author == "policy")
        assert policy.decode(written[:-1]) == by_policy and set(row.weight) == {0, 1}
        assert "<result>" not in by_policy


def test_results_of_a_file_are_spelled_as_our_tools_spell_them():
    kept, left_out = from_file(SHAREGPT, "calculator")
    assert [d.question for d in kept] == [
        "How many days are 17 weeks and 3 days?",
        "In which town is the maker of the oak lamp?",
    ]
    assert dict(left_out) == {"call python for more than one expression": 1}
    assert kept[0].turns[:2] == [
        ("policy", "<think>I multiply.</think><calculator>17 * 7 + 3</calculator>"),
        ("tool", "<result>\n122\n</result>"),
    ]
    results = [text for author, text in kept[1].turns if author == "tool"]
    # markup in a result is escaped, as in a rollout: it cannot pass for a tag
    made = "Page 1: The oak lamp is made by Badger Workshop. &lt;b>1911&lt;/b>"
    assert results[0] == f"<result>\n{made}\n</result>"


def test_python_calls_are_kept_for_a_tool_of_ones_own():
    kept, left_out = from_file(SHAREGPT, "keep")
    assert len(kept) == 3 and not left_out
    assert kept[2].turns[0][1].endswith("print(total)\n</python>")


@pytest.mark.parametrize(
    ("code", "printed", "call"),
    [
        ("print(17 * 7 + 3)", "122", "17 * 7 + 3"),
        ("2**10", "1024", "2**10"),
        ("print(1/4)", "0.25", "1/4"),
        ("print(17 * 7 + 3)", "123", None),  # the calculator comes to something else
        ("x = 3\nprint(x)", "3", None),
        ("print('a')", "a", None),
        ("print(1, 2)", "1 2", None),
        ("print(3)\nprint(4)", "3\n4", None),
        ("", "", None),
    ],
)
def test_code_that_is_one_expression_becomes_a_calculator_call(code, printed, call):
    end = ("policy", "<think>So.</think><answer>\\boxed{1}</answer>")
    turns = [("policy", f"<think>x</think><python>{code}</python>"), ("tool", printed), end]
    got = with_calculator(turns)
    if call is None:
        assert got is None
    else:
        assert got[0] == ("policy", f"<think>x</think><calculator>{call}</calculator>")
        assert got[1][0] == "tool" and got[2] == end


def test_a_demonstration_without_an_answer_or_too_long_is_left_out(policy, tmp_path):
    said = "<think>x</think><search>q</search><result>r</result>"
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": said}]}
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps(row) + "\n", "utf-8")
    assert from_file(str(path), "keep") == ([], {"end in a tool result": 1})
    kept, _ = from_file(SHAREGPT, "keep")
    lengths = sorted(len(sft.demonstration_row(policy, d)) for d in kept)
    rows, long = sft.make_rows(policy, kept, limit=lengths[1])
    assert sorted(map(len, rows)) == lengths[:2] and long == 1


# ---- what is trained ----------------------------------------------------------------------


def labelled_loss(policy, demonstrations):
    """The textbook way: all logits, labels of -100 where somebody else wrote."""
    rows = []
    for d in demonstrations:
        ids = policy.prompt(d.question)
        labels = [-100] * len(ids)
        for author, text in d.turns:
            piece = policy.encode(text)
            ids = ids + piece
            labels += piece if author == "policy" else [-100] * len(piece)
        rows.append((ids + policy.eos_ids[:1], labels + policy.eos_ids[:1]))
    losses = []
    for ids, labels in rows:  # one at a time: no padding
        logits = policy.lm(input_ids=torch.tensor([ids])).logits[0, :-1]  # (T-1, V)
        labels = torch.tensor(labels[1:])
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    counted = sum(label != -100 for _, labels in rows for label in labels)
    return sum(losses) / counted


def gradients(policy):
    return [p.grad.clone() for p in policy.model.parameters() if p.requires_grad]


def test_only_what_the_policy_wrote_has_a_gradient(policy, demonstrations):
    """Loss and gradient equal those of masked labels, however the rows are split."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    policy.model.zero_grad()
    expected = labelled_loss(policy, demonstrations)
    expected.backward()
    wanted = gradients(policy)
    assert max(g.abs().max() for g in wanted) > 1e-4
    rows, _ = sft.make_rows(policy, demonstrations, limit=4096)
    for tokens in (10_000, 150):
        settings = Settings(model_name="x", micro_batch_tokens=tokens, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(trained, lr=0.0)
        loss = sft.update(policy, optimizer, rows, settings)
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for got, want in zip(gradients(policy), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)
    policy.model.zero_grad()


def test_a_step_that_runs_out_of_memory_is_made_in_smaller_parts(
    policy, demonstrations, monkeypatch
):
    rows, _ = sft.make_rows(policy, demonstrations, limit=4096)
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    config = Settings(model_name="x", max_grad_norm=1e9).of_policy()
    monkeypatch.setattr(policy, "chunks", Chunks())
    whole = sft.fitting_update(policy, torch.optim.SGD(trained, lr=0.0), rows, config)
    real, sizes = sft.token_logprobs, []

    def small(policy, batch, temperature):
        sizes.append(batch.input_ids.numel())
        if sizes[-1] > 300:
            raise torch.OutOfMemoryError("no memory")
        return real(policy, batch, temperature)

    monkeypatch.setattr(sft, "token_logprobs", small)
    parts = sft.fitting_update(policy, torch.optim.SGD(trained, lr=0.0), rows, config)
    assert parts == pytest.approx(whole, rel=1e-5) and max(sizes) > 300 >= sizes[-1]
    policy.model.zero_grad()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, capsys):
    def broken(policy, batch, temperature):
        return torch.full(batch.weight.shape, float("nan"))

    monkeypatch.setattr(sft, "token_logprobs", broken)
    few = ["--demonstrations", "3", "--output_dir", str(tmp_path / "run")]
    assert main(["--model_name", TINY, *few]) == 1
    assert "the loss is nan" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_no_logits_are_made_for_prompts_and_results(policy, demonstrations):
    """The head scores exactly the policy's tokens: the others cannot have a gradient."""
    rows, _ = sft.make_rows(policy, demonstrations, limit=4096)
    batch = make_batch(rows, policy.pad_id, policy.device)
    scored = []
    head = policy.lm.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: scored.append(out.shape[0]))
    with torch.no_grad():
        logp = sft.token_logprobs(policy, batch, 1.0)
    hook.remove()
    assert sum(scored) == sum(sum(row.weight) for row in rows)
    assert (logp[batch.weight == 0] == 0).all() and logp.sum() < 0


# ---- the command line ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--model_name is missing"]),
        (["--model_name", "no/such/model"], ["no/such/model"]),
        (["--model_name", TINY, "--data", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
        (["--model_name", TINY, "--adapter", "no/such/adapter"], ["no/such/adapter"]),
        (["--model_name", TINY, "--python_calls", "run"], ["run", "calculator, keep"]),
        (["--model_name", TINY, "--epochs", "0"], ["--epochs 0.0", "above 0"]),
        (["--model_name", TINY, "--group_size", "4"], ["--group_size", "--learning_rate"]),
        (
            ["--model_name", TINY, "--data", SHAREGPT, "--max_total_tokens", "9"],
            ["no demonstration is left", "2 have more than 9 tokens", "1 call python"],
        ),
        (
            ["--model_name", TINY, "--data", str(ROOT / "data" / "test.jsonl")],
            ["test.jsonl, line 1", "'conversations' is missing"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, error = capsys.readouterr()
    assert out == "" and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert all(word in error for word in words)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_the_adapter(tmp_path, monkeypatch, capsys):
    real, steps = sft.update, []

    def interrupted(*args):
        if steps:
            raise KeyboardInterrupt
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(sft, "update", interrupted)
    few = "--demonstrations 6 --demonstrations_per_step 2".split()
    assert main(["--model_name", TINY, "--output_dir", str(tmp_path / "run"), *few]) == 130
    assert "stopped" in capsys.readouterr().out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A tiny Qwen3 that has learnt nothing, with the tokenizer of the one that has."""
    folder = str(tmp_path_factory.mktemp("random"))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    torch.manual_seed(0)
    model = build_model(tokenizer)
    # At a fresh model's size of embeddings (tied, and frozen here) no logit gets beyond 2.6.
    model.get_input_embeddings().weight.data *= 10
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_from_a_random_model_to_an_evaluated_adapter(random_model, tmp_path, capsys):
    """Cold start, ARPO, evaluation: the three commands, and each goes on from the one before."""
    few = "--epochs 3 --demonstrations 120 --demonstrations_per_step 8 --learning_rate 0.01"
    command = [sys.executable, "-m", "lab.coldstart", "--model_name", random_model, *few.split()]
    command += ["--output_dir", str(tmp_path / "cold")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "the adapter is in" in done.stdout
    log = (tmp_path / "cold" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log]
    assert len(losses) == 45 and losses[0] > 6
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]

    adapter = str(tmp_path / "cold" / "adapter")
    model = ["--model_name", random_model]
    short = "--steps 1 --questions_per_step 1 --group_size 2 --eval_every 0".split()
    test = ["--eval_path", str(ROOT / "tests" / "fixtures" / "plain.jsonl")]
    folder = str(tmp_path / "run")
    assert arpo(["train", *model, "--adapter", adapter, *short, *test, "--output_dir", folder]) == 0
    figures = tmp_path / "figures.json"
    trained = str(tmp_path / "run" / "adapter")
    assert arpo(["eval", *model, "--adapter", trained, *test, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["greedy"]["questions"] == 3
    capsys.readouterr()


@pytest.mark.slow
def test_what_was_demonstrated_is_said(random_model, tmp_path, capsys):
    """One demonstration, read until it is known by heart, comes back as a trajectory."""
    data = tmp_path / "one.jsonl"
    data.write_text(Path(SHAREGPT).read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    many = "--epochs 150 --learning_rate 0.01 --load_in_4bit false".split()
    args = ["--model_name", random_model, "--data", str(data), *many]
    assert main([*args, "--output_dir", str(tmp_path / "cold")]) == 0
    settings = Settings(
        model_name=random_model, adapter=str(tmp_path / "cold" / "adapter"), load_in_4bit=False
    )
    config = dataclasses.replace(
        settings.of_policy(),
        temperature=0.0,
        group_size=1,
        initial_rollouts=1,
        max_total_tokens=400,
    )
    tools = sft.make_tools(config)
    policy = load_policy(config, tools, trainable=False)
    (question,) = load_questions(str(data))
    ((leaf,),) = Rollout(policy, config, tools, sft.Random(0)).run([question])
    assert score(policy, leaf, question, config, tools).total == 1.0
    capsys.readouterr()
