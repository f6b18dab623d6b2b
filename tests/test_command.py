"""The command line: what a user types, right and wrong, and what a run leaves behind."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import lines_of, write_questions
from safetensors.torch import load_file

import arpo_mini
from arpo_mini import main, questions_of_step
from data.formats import Question, load_questions
from app.config import Config

FAST = "--steps 2 --questions_per_step 1 --group_size 4 --eval_every 1 --record_every 1".split()


@pytest.fixture(scope="module")
def few_questions(tmp_path_factory):
    """Three test questions, so that an evaluation takes a moment."""
    return write_questions(tmp_path_factory.mktemp("data") / "few.jsonl")


def keys_of_the_readme():
    text = (arpo_mini.Path(arpo_mini.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = text.split("Keys of `metrics.jsonl`")[1].split("\n\n")[1]
    return {
        key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])
    }


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--group_sise", "4"], ["--group_sise", "--group_size", "--learning_rate"]),
        (["trian"], ["trian", "train", "eval", "show"]),
        (["train", "--branch_rule", "best"], ["best", "paper", "official", "adaptive", "random"]),
        (["train", "--group_size", "four"], ["--group_size", "four", "int"]),
        (["train", "--group_size", "0"], ["--group_size 0", "at least 1"]),
        (["train", "--initial_rollouts", "9"], ["--initial_rollouts 9", "group_size (8)"]),
        (["train", "--temperature", "0"], ["--temperature 0", "above 0"]),
        (["train", "--temperature", "nan"], ["--temperature nan"]),
        (["train", "--shared_weight", "1.5"], ["--shared_weight 1.5", "at most 1"]),
        (["train", "--dual_clip", "1"], ["--dual_clip 1.0", "above 1"]),
        (["train", "--learning_rate", "inf"], ["--learning_rate inf", "finite"]),
        (["show", "--max_total_tokens", "5"], ["--max_total_tokens 5", "tokens already"]),
        (["eval", "--json", "no/such/figures.json"], ["no/such/figures.json", "No such file"]),
        (["train", "--load_in_4bit", "maybe"], ["maybe", "true or false"]),
        (["train", "--save_every", "0"], ["--save_every 0", "at least 1"]),
        (["train", "--resume"], ["--resume", "no run in runs/arpo"]),
        (["train", "--resume", "no/such/run"], ["no/such/run", "config.json", "No such file"]),
        (["train", "--dataset_path", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
        (["eval", "--dataset_path", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
        (["train", "--documents_path", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
        (["train", "--model_name", "no/such/model"], ["no/such/model"]),
        (["eval", "--adapter", "no/such/adapter"], ["no/such/adapter"]),
        (["eval", "--samples", "0"], ["--samples 0"]),
        (["eval", "--samples", "2", "--pass_k", "3"], ["--pass_k 3", "--samples 2"]),
        (["eval", "--group_size"], ["--group_size", "expected one argument"]),
        (["train", "--top_p", "0.95"], ["--top_p 0.95", "whole distribution", "legal: 1"]),
        (["eval", "--top_p", "0"], ["--top_p 0.0", "above 0"]),
        (["show", "--example", "nobel"], ["--example", "nobel", "deep_search", "divisible"]),
        (["show", "--example", "divisible", "--question", "q"], ["--example divisible", "one of"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    out, error = capsys.readouterr()
    assert out == "" and "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a"', "line 2"),
        ('{"question": "a"}', "'answer' is missing"),
        ('{"question": "a", "answer": []}', "at least one answer"),
        ('{"question": 3, "answer": "b"}', "a question is a text"),
        ('{"question": "a", "answer": null}', "at least one answer"),
        ("[1, 2]", "line 2"),
        ("7", "line 2"),
    ],
)
def test_a_broken_line_is_named(line, words, capsys, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "q", "answer": 4}\n' + line + "\n")
    assert main(["train", "--dataset_path", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2" in error and words in error and len(error.splitlines()) == 1


def test_files_without_questions_or_of_bytes(capsys, tmp_path):
    path = tmp_path / "odd.jsonl"
    for content, words in ((b"\n\n", "no questions"), (b"\xff\xfe\x00", "cannot read")):
        path.write_bytes(content)
        assert main(["eval", "--dataset_path", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_a_line_separator_inside_a_text_does_not_break_the_line(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": ["x", 2], "domain": "[/x]"}\n', "utf-8")
    (question,) = load_questions(str(path))
    assert question == Question("a\u2028b", ["x", "2"], "[/x]")


def test_help_names_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(Config):
        assert f"--{item.name}" in text
        assert f"(default: {item.default})" in text


def test_every_field_is_read_somewhere():
    source = "".join(
        (arpo_mini.Path(arpo_mini.__file__).parent / name).read_text()
        for name in ("arpo_mini.py", "policy.py", "terminal.py", "runs.py", "memory.py")
    )
    for item in dataclasses.fields(Config):
        read = rf"\b(config|c|self)\.{item.name}\b"
        assert re.search(read, source), item.name


def train(folder, few_questions, *more):
    args = ["train", "--output_dir", str(folder), "--eval_path", few_questions, *FAST, *more]
    return main(args)


def test_train_writes_what_the_readme_says(tmp_path, few_questions, capsys):
    folder = tmp_path / "run"
    assert train(folder, few_questions) == 0
    screen = capsys.readouterr().out
    assert "before" in screen and "after" in screen and "times as many" in screen
    assert json.loads((folder / "config.json").read_text())["steps"] == 2
    metrics = lines_of(folder, "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    assert all(set(m) == keys_of_the_readme() for m in metrics)
    assert all(m["rollouts"] == 4 for m in metrics)
    evaluations = lines_of(folder, "evaluations.jsonl")
    assert {(e["step"], e["decoding"]) for e in evaluations} == {
        (step, decoding) for step in (0, 1, 2) for decoding in ("sampled", "greedy")
    }
    tree = lines_of(folder, "rollouts.jsonl")[0]
    assert len(tree["leaves"]) == 4 and tree["nodes"][0]["author"] == "prompt"
    for node in tree["nodes"][1:]:
        assert node["parent"] < tree["nodes"].index(node)
        if node["author"] == "policy":
            assert len(node["token_entropy"]) == len(node["tokens"])
            assert all(0 <= h <= 1 for h in node["token_entropy"])
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        file.name for file in (folder / "adapter").iterdir()
    }


@pytest.mark.slow
def test_same_seed_same_metrics_and_adapter_bit_for_bit(tmp_path, few_questions):
    runs = [tmp_path / "a", tmp_path / "b"]
    for folder in runs:
        assert train(folder, few_questions, "--branch_rule", "official") == 0
    timed = ("seconds_rollout", "seconds_update")
    one, two = (
        [{k: v for k, v in m.items() if k not in timed} for m in lines_of(f, "metrics.jsonl")]
        for f in runs
    )
    assert one == two
    for name in ("evaluations.jsonl", "rollouts.jsonl", "adapter/adapter_model.safetensors"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    assert train(tmp_path / "c", few_questions, "--seed", "1") == 0
    assert (runs[0] / "rollouts.jsonl").read_bytes() != (tmp_path / "c/rollouts.jsonl").read_bytes()


@pytest.mark.slow
def test_evaluating_does_not_change_the_run(tmp_path, few_questions):
    assert train(tmp_path / "a", few_questions) == 0
    assert train(tmp_path / "b", few_questions, "--eval_every", "0") == 0
    one, two = (load_file(tmp_path / f / "adapter/adapter_model.safetensors") for f in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_the_trained_adapter_can_be_evaluated_and_trained_on(tmp_path, few_questions, capsys):
    assert train(tmp_path / "run", few_questions) == 0
    adapter, figures = str(tmp_path / "run" / "adapter"), tmp_path / "figures.json"
    args = ["eval", "--adapter", adapter, "--dataset_path", few_questions, "--json", str(figures)]
    assert main([*args, "--samples", "4", "--pass_k", "2"]) == 0
    values = json.loads(figures.read_text())
    assert values["sampled"]["questions"] == 3 and "pass@2" in values["sampled"]
    assert set(values["sampled"]["domains"]) == {"math", "knowledge", "deep_search"}
    assert 0 <= values["greedy"]["interval"][0] <= values["greedy"]["accuracy"]
    assert train(tmp_path / "more", few_questions, "--adapter", adapter) == 0
    capsys.readouterr()


@pytest.mark.slow
def test_no_run_overwrites_another(tmp_path, few_questions):
    assert train(tmp_path / "run", few_questions) == 0
    first = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(tmp_path / "run", few_questions, "--steps", "1") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == first
    assert len(lines_of(tmp_path / "run-2", "metrics.jsonl")) == 1


def test_show_draws_the_tree(capsys):
    assert main(["show", "--seed", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("H_initial", "gain", "P 0.5", "fork", "leaf 7", "advantage", "reward", "answer:"):
        assert words in out
    assert main(["show", "--question", "What is 2 plus 2?", "--answer", "4"]) == 0
    assert "What is 2 plus 2?" in capsys.readouterr().out


def test_every_question_is_asked_once_before_any_is_asked_again():
    questions = [Question(str(i), ["x"]) for i in range(7)]
    config = Config(questions_per_step=3)
    asked = [q.text for step in range(1, 8) for q in questions_of_step(questions, step, config)]
    for epoch in (asked[:7], asked[7:14], asked[14:]):
        assert sorted(epoch) == [str(i) for i in range(7)]
    assert asked[:7] != asked[7:14]
    other = dataclasses.replace(config, seed=1)
    assert [q.text for q in questions_of_step(questions, 1, other)] != asked[:3]


@pytest.mark.slow
def test_a_real_ctrl_c_saves_too(tmp_path, few_questions):
    folder = tmp_path / "run"
    command = [sys.executable, "arpo_mini.py", "train", "--output_dir", str(folder), *FAST]
    command += ["--steps", "1000", "--eval_path", few_questions, "--eval_every", "0"]
    root = arpo_mini.Path(arpo_mini.__file__).parent
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130 and error == "stopped\n"
    assert f"train --resume {folder}" in "".join(out.split("\n"))
    assert load_file(folder / "adapter" / "adapter_model.safetensors")
    assert lines_of(folder, "metrics.jsonl")
