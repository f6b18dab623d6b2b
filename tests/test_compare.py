"""The comparison: its statistics, its runs (played by a fake trainer), what it writes and says."""

import _thread
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_questions

import arpo_mini
from app.config import Config
from arpo_mini import part_of
from data.formats import load_questions
from lab import compare, figures, forking, verdict
from lab.intervals import T_975, at_budget, bootstrap, bootstrap_ratio, paired, spearman, t_interval

ROOT = Path(__file__).parent.parent

# ---- statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("df", range(1, 31))
def test_the_quantiles_of_student_cut_off_five_percent(df):
    """The density of t, integrated with u = atan(x / sqrt(df)): cos(u) ** (df - 1) / constant."""

    def area(up_to):
        u = np.linspace(0, up_to, 20_001)
        return np.trapezoid(np.cos(u) ** (df - 1), u)

    inside = area(math.atan(T_975[df - 1] / math.sqrt(df))) / area(math.pi / 2)
    assert inside == pytest.approx(0.95, abs=5e-5)  # three decimals


def test_an_interval_by_hand():
    half = 2.776 * math.sqrt(2.5) / math.sqrt(5)  # s^2 of 1..5 is 10 / 4
    assert t_interval([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - half, 3 + half))
    assert t_interval([0.7]) == (0.7, None, None)  # one seed says nothing about its spread


def test_pairs_are_compared_seed_by_seed():
    ours, theirs = {"0": 1.0, "1": 2.0, "2": 9.0}, {"1": 1.0, "0": 0.5, "7": 3.0}
    half = 12.706 * 0.25  # differences 0.5 and 1.0: s = 0.3536, / sqrt(2)
    assert paired(ours, theirs) == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert paired(ours, theirs, of=lambda a, b: a / b)[0] == pytest.approx(2)
    assert paired({"0": 1.0}, {"1": 1.0}) is None


def test_a_budget_is_read_off_the_line_between_two_evaluations():
    assert at_budget([0, 100, 300], [0.4, 0.6, 0.7], 200) == pytest.approx(0.65)
    assert at_budget([0, 100, 300], [0.4, 0.6, 0.7], 300) == 0.7
    with pytest.raises(ValueError, match="301 is outside 0 to 300"):
        at_budget([0, 100, 300], [0.4, 0.6, 0.7], 301)
    with pytest.raises(ValueError, match="cannot fall"):
        at_budget([0, 100, 50], [0.4, 0.6, 0.7], 10)


def test_rank_correlation_by_hand():
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_the_bootstrap_draws_whole_clusters():
    """Copies of a value within a cluster are no more evidence: the interval stays as wide."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=(50, 1, 1))
    single = bootstrap(np.mean, list(values))
    copied = bootstrap(np.mean, [np.repeat(v, 20, axis=0) for v in values])
    assert copied == pytest.approx(single)
    half = (single[2] - single[1]) / 2
    assert half == pytest.approx(1.96 * values.std() / math.sqrt(50), rel=0.1)
    assert bootstrap(lambda rows: math.nan, list(values)) is None


def test_the_bootstrap_of_a_ratio_agrees_with_the_general_one():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, size=60)
    sums = np.stack([counts * rng.random(60), counts], axis=1).astype(float)
    general = bootstrap(lambda r: r[:, 0].sum() / r[:, 1].sum(), list(sums[:, None]), draws=4000)
    assert bootstrap_ratio(sums, draws=4000) == pytest.approx(general, rel=0.02)


# ---- what the figures say -----------------------------------------------------------------


def a_run(accuracy, calls, generated=(0, 100, 200), prefill=(0, 100, 200)):
    points = {"step": [0, 10, 20], "sampled": accuracy, "greedy": accuracy, "seconds": [0, 5, 10]}
    spent = {"tool_calls": calls, "generated_tokens": generated, "prefill_tokens": prefill}
    points |= {name: list(values) for name, values in spent.items()}
    return {"wish_rate": 0.5, "forks_per_question": 3.0, "points": points}


def results_of(**runs):
    """{"grpo": [run of seed 0, ..], ..} with the settings that the text names."""
    settings = {"steps": 20, "questions_per_step": 8, "group_size": 8, "adapter": None}
    settings["final_samples"] = 8
    methods = {
        name.replace("_", "-"): {"overrides": {}, "runs": {str(i): r for i, r in enumerate(some)}}
        for name, some in runs.items()
    }
    return {"settings": {**settings, "model_name": "data/tiny-qwen3"}, "methods": methods}


@pytest.fixture
def two_methods():
    """ARPO ends where GRPO does, or 1 point below, with half the calls and 0.6 of the tokens."""
    base = [a_run([0.4, 0.6, 0.8], [0, 100, 200]), a_run([0.4, 0.5, 0.7], [0, 100, 200])]
    cheap = {"generated": (0, 60, 120), "prefill": (0, 60, 120)}
    ours = [a_run([0.4, 0.7, 0.8], [0, 50, 100], **cheap)]
    ours += [a_run([0.4, 0.6, 0.69], [0, 50, 100], **cheap)]
    return results_of(grpo=base, arpo_paper=ours)


def test_the_three_budgets_by_hand(two_methods):
    f = verdict.figures(two_methods, "arpo-paper")
    assert f.difference["rollouts"][0] == pytest.approx(-0.005)  # 0 and -0.01
    # at 100 calls GRPO is at step 10: 0.8 - 0.6 and 0.69 - 0.5
    assert f.difference["tool calls"][0] == pytest.approx((0.2 + 0.19) / 2)
    # at 120 generated tokens it is at step 12: 0.64 and 0.54
    assert f.difference["generated tokens"][0] == pytest.approx((0.16 + 0.15) / 2)
    assert f.share["tool_calls"] == pytest.approx((0.5, 0.5, 0.5))
    assert f.share["tokens"][0] == pytest.approx(0.6)
    assert f.gained[0] == pytest.approx((1 + 0.29 / 0.3) / 2)


def test_the_dearer_method_is_cut_at_the_budget_too(two_methods):
    """A method that spends more than GRPO is read at what GRPO spent."""
    grpo, paper = (two_methods["methods"][name] for name in ("grpo", "arpo-paper"))
    two_methods["methods"] = {"grpo": paper, "arpo-paper": grpo}
    f = verdict.figures(two_methods, "arpo-paper")
    assert f.difference["tool calls"][0] == pytest.approx(-(0.2 + 0.19) / 2)


def test_the_goal_needs_the_whole_interval(two_methods):
    def met():
        return list(verdict.goal(verdict.figures(two_methods, "arpo-paper")).values())

    assert met() == [False, True, True]  # two seeds: -0.5 +- 6.4 points
    runs = two_methods["methods"]["arpo-paper"]["runs"]
    runs["1"]["points"]["sampled"][-1] = 0.7  # now no difference at all, in any seed
    assert met() == [True, True, True]
    assert "The goal is met by arpo-paper." in verdict.verdict(two_methods, ["grpo", "arpo-paper"])
    for run in runs.values():
        run["points"]["tool_calls"] = [0, 61, 122]
        run["points"]["prefill_tokens"] = [0, 90, 180]
    assert met() == [True, False, False]
    text = verdict.verdict(two_methods, ["grpo", "arpo-paper"])
    assert "No method meets the goal." in text


def test_the_sentence_to_quote_holds_its_figures(two_methods):
    text = verdict.verdict(two_methods, ["grpo", "arpo-paper"])
    assert "arpo-paper answers 74.5% [4.6, 144.4] of the test questions right" in text
    assert "GRPO 75.0% [" in text and "-0.5 [-6.9, +5.9] points" in text
    assert "with 50.0% [50.0, 50.0] of the tool calls and 60.0% [60.0, 60.0] of" in text
    assert "planted miniature" in text
    two_methods["settings"]["model_name"] = "some/model"
    assert "miniature" not in verdict.verdict(two_methods, ["grpo", "arpo-paper"])


def test_a_control_that_controls_for_nothing_is_named(two_methods):
    """A rule that forks wherever it can has a control that is the same method (it happened)."""
    methods = two_methods["methods"]
    methods["arpo-random"] = methods["arpo-paper"]
    assert "arpo-random forks wherever it can" not in verdict.verdict(two_methods, list(methods))
    for run in methods["arpo-random"]["runs"].values():
        run["wish_rate"] = 1.0
    assert "**arpo-random forks wherever it can" in verdict.verdict(two_methods, list(methods))


def test_the_frontier_leaves_out_what_is_beaten():
    results = results_of(
        grpo=[a_run([0.4, 0.6, 0.8], [0, 100, 200])],
        cheap=[a_run([0.4, 0.6, 0.7], [0, 50, 100])],
        beaten=[a_run([0.4, 0.6, 0.69], [0, 60, 120])],
    )
    all_figures = {m: verdict.figures(results, m) for m in results["methods"]}
    assert verdict.frontier(all_figures, "tool_calls") == ["grpo", "cheap"]


def test_a_method_of_fewer_seeds_is_not_on_the_frontier(two_methods):
    lucky = a_run([0.4, 0.8, 0.99], [0, 10, 20])
    two_methods["methods"]["lucky"] = {"overrides": {}, "runs": {"0": lucky}}
    text = verdict.verdict(two_methods, ["grpo", "arpo-paper", "lucky"])
    told = text.split("## The frontier")[1].split("## Limits")[0]
    assert "with 2 seeds" in told and "arpo-paper" in told and "lucky" not in told
    assert "lucky answers 99.0%" in text


def test_grpo_is_compared_with_also_where_it_is_not_asked_for(two_methods):
    assert "GRPO 75.0% [" in verdict.verdict(two_methods, ["arpo-paper"])


def test_without_grpo_there_are_no_differences(two_methods):
    del two_methods["methods"]["grpo"]
    assert verdict.figures(two_methods, "arpo-paper").difference["rollouts"] is None
    assert len(verdict.tables(two_methods, ["arpo-paper"])) == 1
    assert "At equal rollouts" not in verdict.verdict(two_methods, ["arpo-paper"])


# ---- running ------------------------------------------------------------------------------

# Plays a run: argv is its slot, log of trainings, how it fails.
FAKE = """
import json, pathlib, sys, time
slot, log, failing = pathlib.Path(sys.argv[1]), *sys.argv[2:]
settings = json.loads((slot / "settings.json").read_text())
steps, seed, rule = (settings[k] for k in ("steps", "seed", "branch_rule"))
folder = slot / "run"
open(log, "a").write(f"{rule} {seed}\\n")
folder.mkdir(exist_ok=True)
def write(name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\\n" for row in rows))
spent = {"tool_calls": 10, "generated_tokens": 300, "prefill_tokens": 200, "forks": 24, "groups": 8}
seconds = {"seconds_rollout": 1.5, "seconds_update": 0.5}
write("metrics.jsonl", [{"step": i + 1, **spent, **seconds} for i in range(steps)])
if failing == f"{rule} {seed}":
    print("some line"); sys.exit("out of luck")
if failing == "sleep":
    (folder / "checkpoints").mkdir()
    time.sleep(60)
wishes = [1] * (seed + 1) + [0] * 3  # 1 of 4, 2 of 5, ..
nodes = [{"decision": {"forks": forks}} for forks in wishes] + [{"decision": None}]
write("rollouts.jsonl", [{"step": 1, "nodes": nodes}])
rows = [{"step": step, "decoding": d, "accuracy": 0.4 + 0.01 * step + 0.001 * seed}
        for step in range(0, steps + 1, 2) for d in ("sampled", "greedy")]
write("evaluations.jsonl", rows)
final = {"sampled": {"accuracy": 0.9 + 0.001 * seed}}
(slot / "final.json").write_text(json.dumps(final))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """main(args) with a fake trainer; `.trained()` lists what was trained since the last call."""

    class Fake:
        failing = ""
        folder = tmp_path / "out"

        def __call__(self, *args):
            flags = ["--steps", "4", "--output_dir", str(self.folder), "--jobs", "2", *args]
            return compare.main(flags)

        def command(self, slot):
            return [sys.executable, "-S", "-c", FAKE, str(slot), str(self.log), self.failing]

        log = tmp_path / "trainings"

        def trained(self):
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            self.log.unlink(missing_ok=True)
            return sorted(lines)

        def results(self):
            return json.loads((self.folder / "results.json").read_text())

    it = Fake()
    monkeypatch.setattr(compare, "run_command", it.command)
    monkeypatch.setattr(compare, "POLL", 0.01)
    monkeypatch.setattr(compare, "report", lambda *_: None)
    return it


def test_a_finished_run_is_not_repeated(fake):
    assert fake("--methods", "grpo,arpo-paper", "--seeds", "1") == 0
    assert fake.trained() == ["none 0", "paper 0"]
    assert fake("--methods", "grpo,arpo-paper", "--seeds", "2") == 0
    assert fake.trained() == ["none 1", "paper 1"]
    assert fake("--methods", "grpo,arpo-paper", "--seeds", "2") == 0
    assert fake.trained() == []
    run = fake.results()["methods"]["grpo"]["runs"]["1"]
    assert run["points"] == {
        "step": [0, 2, 4],
        "sampled": [0.401, 0.421, 0.901],  # the last one of more samples
        "greedy": [0.401, 0.421, 0.441],
        "tool_calls": [0, 20, 40],
        "generated_tokens": [0, 600, 1200],
        "prefill_tokens": [0, 400, 800],
        "seconds": [0, 4.0, 8.0],
    }
    assert run["forks_per_question"] == 3 and run["wish_rate"] == 0.4


def test_a_run_that_outlived_its_comparison_is_taken_as_it_is(fake):
    """results.json is lost, the folders are there: whole ones count, a torn one is run again."""
    assert fake("--methods", "grpo", "--seeds", "2") == 0
    fake.trained()
    (fake.folder / "results.json").unlink()
    torn = fake.folder / "runs" / "grpo" / "1" / "run" / "evaluations.jsonl"
    torn.write_text(torn.read_text()[:-20])
    assert fake("--methods", "grpo", "--seeds", "2") == 0
    assert fake.trained() == ["none 1"]
    (fake.folder / "results.json").unlink()
    (fake.folder / "runs" / "grpo" / "0" / "final.json").unlink()  # killed while it evaluated
    assert fake("--methods", "grpo", "--seeds", "2") == 0
    assert fake.trained() == ["none 0"]


def test_what_is_trained_already_is_only_evaluated(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(arpo_mini, "main", lambda args: commands.append(args) or 0)
    settings = dataclasses.asdict(Config(steps=2)) | {"final_samples": 5, "files": {}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    folder = tmp_path / "run"
    assert compare.play(tmp_path) == 0
    (train, *rest), (evaluate, *flags) = commands
    assert (train, evaluate) == ("train", "eval") and "--resume" not in rest
    at = {word: flags[i + 1] for i, word in enumerate(flags) if word.startswith("--")}
    assert at["--adapter"] == str(folder / "adapter") and at["--samples"] == "5"
    assert at["--json"] == str(tmp_path / "final.json") and "--dataset_path" not in at
    commands.clear()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("{}\n{}\n")
    (folder / "evaluations.jsonl").write_text('{"step": 1, "decoding": "greedy"}\n')
    assert compare.play(tmp_path) == 0
    assert [command[0] for command in commands] == ["train", "eval"]
    assert commands[0][1:] == ["--resume", str(folder)]
    commands.clear()
    (folder / "evaluations.jsonl").write_text('{"step": 2, "decoding": "greedy"}\n')
    assert compare.play(tmp_path) == 0
    assert [command[0] for command in commands] == ["eval"]
    monkeypatch.setattr(arpo_mini, "main", lambda args: 130)
    (folder / "metrics.jsonl").write_text("{}\n")
    assert compare.play(tmp_path) == 130  # stopped: no evaluation


def test_the_control_forks_as_often_as_the_paper_with_the_same_seed(fake):
    assert fake("--methods", "arpo-random,arpo-paper", "--seeds", "2") == 0
    for seed, rate in (("0", 1 / 4), ("1", 2 / 5)):
        slot = fake.folder / "runs" / "arpo-random" / seed
        settings = json.loads((slot / "settings.json").read_text())
        assert settings["branch_probability"] == rate
        paper = json.loads((slot.parent.parent / "arpo-paper" / seed / "settings.json").read_text())
        assert paper["branch_probability"] == Config().branch_probability


def test_a_run_that_dies_is_reported_and_stops_no_other(fake, capsys):
    fake.failing = "paper 0"
    methods = ("--methods", "grpo,arpo-paper,arpo-random", "--seeds", "2")
    assert fake(*methods) == 1
    out, error = capsys.readouterr()
    assert "arpo-paper, seed 0: died with exit code 1: out of luck" in out.replace("\n", " ")
    assert len(error.strip().splitlines()) == 2  # the dead one, and the control that needs it
    assert "error: arpo-paper, seed 0: exit code 1: out of luck" in error
    assert "error: arpo-random, seed 0: arpo-paper" in error
    assert fake.trained() == ["none 0", "none 1", "paper 0", "paper 1", "random 1"]
    fake.failing = ""
    assert fake(*methods) == 0
    assert fake.trained() == ["paper 0", "random 0"]


def test_other_settings_do_not_mix(fake, capsys, monkeypatch):
    assert fake("--methods", "grpo", "--seeds", "1") == 0
    fake.trained()
    before = (fake.folder / "results.json").read_text()

    def refused(*args, words):
        assert fake("--methods", "grpo", "--seeds", "1", *args) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        for word in (*words, "--output_dir"):
            assert word in error

    refused("--learning_rate", "0.5", words=["learning_rate 0.001, now 0.5"])
    monkeypatch.setitem(compare.METHODS, "grpo", {**compare.GRPO, "temperature": 0.9})
    refused(words=["temperature None, now 0.9"])
    monkeypatch.setitem(compare.METHODS, "grpo", compare.GRPO)
    monkeypatch.setattr(compare, "fingerprints", lambda settings: {"model_name": "another"})
    refused(words=["files", "now {'model_name': 'another'}"])
    (fake.folder / "results.json").rename(fake.folder / "kept.json")
    refused(words=[str(Path("runs", "grpo", "0")), "now {'model_name': 'another'}"])
    assert fake.trained() == []
    assert (fake.folder / "kept.json").read_text() == before


def test_a_remade_cold_start_has_another_fingerprint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    settings = {**dataclasses.asdict(Config()), "model_name": str(tmp_path)}
    before = compare.fingerprints(settings)
    assert set(before) == {"model_name", "dataset_path", "eval_path", "documents_path"}
    (tmp_path / "model.safetensors").write_bytes(b"two")
    after = compare.fingerprints(settings)
    assert [k for k in before if before[k] != after[k]] == ["model_name"]


def test_control_c_stops_the_children_and_keeps_what_is_finished(fake, monkeypatch):
    assert fake("--methods", "grpo", "--seeds", "1") == 0
    fake.trained()
    fake.failing = "sleep"
    pids = []

    def interrupt():
        while len(fake.log.read_text().splitlines() if fake.log.exists() else []) < 2:
            time.sleep(0.01)
        _thread.interrupt_main()

    started, start = time.monotonic(), compare.start

    def remember(*args):
        pids.append((process := start(*args)).pid)
        return process

    monkeypatch.setattr(compare, "start", remember)
    threading.Thread(target=interrupt, daemon=True).start()
    assert fake("--methods", "grpo", "--seeds", "3") == 130
    assert time.monotonic() - started < 10 and len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert list(fake.results()["methods"]["grpo"]["runs"]) == ["0"]


def test_an_unfinished_run_goes_on_unless_its_settings_changed(fake):
    settings = {"steps": 4, "seed": 0, "branch_rule": "none", "files": {}}
    settings |= dict.fromkeys(compare.PATHS, "")
    slot = fake.folder / "runs" / "grpo" / "0"
    with compare.locked(fake.folder) as lock:
        for change, goes_on in (({}, False), ({}, True), ({"seed": 1}, False), ({"seed": 1}, True)):
            process = compare.start({**settings, **change}, slot, 1, lock)
            process.wait()
            marker = slot / "run" / "checkpoints" / "of an earlier process"
            assert marker.exists() == goes_on
            marker.parent.mkdir(exist_ok=True)
            marker.touch()


def test_one_comparison_at_a_time_in_a_folder(fake, capsys):
    """The runs of a comparison that was killed hold the lock until they end."""
    settings = {"steps": 4, "seed": 0, "branch_rule": "none", "files": {}}
    settings |= dict.fromkeys(compare.PATHS, "")
    fake.failing = "sleep"
    with compare.locked(fake.folder) as lock:
        assert fake("--methods", "grpo", "--seeds", "1") == 2
        process = compare.start(settings, fake.folder / "runs" / "grpo" / "0", 1, lock)
    assert fake("--methods", "grpo", "--seeds", "1") == 2
    compare.stop([process])
    assert capsys.readouterr().err.count("is at work there") == 2
    fake.failing, _ = "", fake.trained()
    assert fake("--methods", "grpo", "--seeds", "1") == 0
    assert fake.trained() == ["none 0"]


def test_inputs_that_change_meanwhile_stop_the_comparison(fake, capsys, monkeypatch):
    known = compare.fingerprints
    answers = iter([{}, {"model_name": "before"}])  # of the settings in common, and at a start
    monkeypatch.setattr(compare, "fingerprints", lambda s: next(answers, None) or known(s))
    assert fake("--methods", "grpo", "--seeds", "2") == 2
    assert "changed since the comparison began: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "ppo"], ["ppo", "grpo", "arpo-paper", "rules", "all"]),
        (["--methods", "grpo,arpo-random"], ["arpo-random", "arpo-paper"]),
        (["--seeds", "0"], ["--seeds 0", "at least 1"]),
        (["--jobs", "0"], ["--jobs 0", "at least 1"]),
        (["run"], ["run"]),
        (["--final_samples", "0"], ["--final_samples 0", "at least 1"]),
        (["--record_every", "0"], ["--record_every 0"]),
        (["--group_size", "4"], ["--group_size", "--methods", "--learning_rate"]),
        (["--learning_rate", "-1"], ["--learning_rate -1", "above 0"]),
        (["--dataset_path", "no/such.jsonl"], ["no/such.jsonl", "No such file"]),
        (["entropy", "--continuations", "1"], ["--continuations 1", "at least 2"]),
        (["entropy", "--adapter", "no/such/adapter"], ["no/such/adapter"]),
    ],
)
def test_bad_input_is_one_line(args, words, capsys, tmp_path):
    assert compare.main([*args, "--output_dir", str(tmp_path / "out")]) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_a_slot_without_settings_is_no_run(tmp_path, capsys):
    assert compare.main(["run", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere: no settings.json" in error and len(error.splitlines()) == 1


def test_every_method_is_a_legal_training():
    for name in compare.choose("all"):
        config = Config(**compare.METHODS[name], seed=3)
        assert config.group_size == 8
        assert (config.initial_rollouts == 8) == name.startswith("grpo")
    for control, controlled in compare.CONTROLS.items():
        assert compare.METHODS[control] == {
            **compare.METHODS[controlled], "branch_rule": "random"
        }  # fmt: skip
    main = ["grpo", "arpo-paper", "arpo-adaptive", "arpo-random", "arpo-1-of-8-z4"]
    assert compare.choose("main") == main
    assert compare.choose("arpo-hard,grpo") == ["grpo", "arpo-hard"]
    assert set(compare.METHODS) == {m for names in compare.FAMILIES.values() for m in names}


def test_the_flags_of_a_run_are_its_settings(tmp_path, monkeypatch):
    """What the child parses is what the parent records: None, booleans and paths included."""
    values = {**dataclasses.asdict(Config()), **compare.DEFAULTS}
    results = {"settings": compare.shared_settings(values, 8), "methods": {}}
    settings = compare.settings_of(compare.Run("arpo-mixed", 7), results)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    commands = []
    monkeypatch.setattr(arpo_mini, "main", lambda args: commands.append(args) or 0)
    assert compare.play(tmp_path) == 0
    parser = arpo_mini.Parser(prog="train")
    for item in dataclasses.fields(Config):
        parser.add_field(item)
    config = Config(**parser.parse(commands[0][1:]))
    assert settings == {
        **{k: v for k, v in dataclasses.asdict(config).items() if k != "output_dir"},
        "final_samples": 8,
        "files": settings["files"],
    }
    assert config.output_dir == str(tmp_path / "run")
    assert (config.seed, config.shared_weight, config.adapter) == (7, 0.3, None)
    assert not any(str(ROOT) in str(value) for value in settings.values())  # can be published


# ---- what is written ----------------------------------------------------------------------


def test_figures_and_text_are_written_and_the_same_again(two_methods, tmp_path, capsys):
    compare.save_results(tmp_path / "results.json", two_methods)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == two_methods
    assert '"step": [0, 10, 20]' in (tmp_path / "results.json").read_text()
    names = {"summary.md", "accuracy-chosen.svg", "accuracy-chosen.png"}
    names |= {"frontier.svg", "frontier.png"}
    compare.report(kept, ["grpo", "arpo-paper", "arpo-hard"], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert {path.name for path in tmp_path.iterdir()} == names | {"results.json"}
    figures.frontier(kept, ["grpo", "arpo-paper"], tmp_path / "frontier")
    assert before == {name: (tmp_path / name).read_bytes() for name in names}
    svg = before["accuracy-chosen.svg"].decode()
    assert svg.count('<g id="axes_') == 4
    out = capsys.readouterr().out
    assert re.search(r"arpo-paper +2 +74.5 ±69.9", out)


def test_the_band_is_drawn_as_far_as_every_seed_went():
    runs = {"0": a_run([0.4, 0.6, 0.8], [0, 50, 100]), "1": a_run([0.4, 0.5, 0.6], [0, 100, 200])}
    x, e = figures.band(runs, "tool_calls")
    assert x[0] == 0 and x[-1] == 100
    assert e[-1, 0] == pytest.approx((0.8 + 0.5) / 2)
    assert e[-1, 2] - e[-1, 0] == pytest.approx(12.706 * 0.15)
    x, e = figures.band({"0": runs["0"]}, "step")
    assert list(x) == [0, 10, 20] and e[:, 1].tolist() == [0.4, 0.6, 0.8]  # no band


def test_without_matplotlib_the_results_stay(two_methods, tmp_path, capsys, monkeypatch):
    import lab

    monkeypatch.delattr(lab, "figures")
    monkeypatch.delitem(sys.modules, "lab.figures")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    compare.report(two_methods, ["grpo", "arpo-paper"], tmp_path)
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["summary.md"]


# ---- the entropy study --------------------------------------------------------------------


def test_a_continuation_goes_on_where_the_trajectory_stood(policy, config, tools):
    """Greedy from the prompt, and greedy again from its tool results: the same tokens."""
    greedy = dataclasses.replace(config, temperature=0.0, branch_rule="none")
    questions = part_of(load_questions(config.eval_path), 2)
    roots = [forking.Segment("prompt", policy.prompt(q.text)) for q in questions]
    paths = [
        leaves[0].path() for leaves in forking.continue_from(policy, roots, 1, greedy, tools, 0)
    ]
    nodes = [(path, s) for path in paths for s in path[:-1] if s.author == "tool"]
    assert len(nodes) >= 4
    groups = forking.continue_from(policy, [node for _, node in nodes], 2, greedy, tools, 0)
    for (path, node), leaves in zip(nodes, groups, strict=True):
        assert len(set(map(id, leaves))) == 2
        for leaf in leaves:
            assert node in leaf.path()
            assert [s.token_ids for s in leaf.path()] == [s.token_ids for s in path]


def planted_nodes(spread):
    """[question, call, H, H_initial, spread, right]: two calls of 40 questions."""
    rng = np.random.default_rng(0)
    H = rng.random((40, 2))
    return [[q, c + 1, H[q, c], 0.5, spread(H[q, c], rng), 0.5] for q in range(40) for c in (0, 1)]


def test_a_planted_answer_is_found():
    found = forking.answers(planted_nodes(lambda H, rng: H**3))
    assert found["Spearman of H and spread"] == pytest.approx((1, 1, 1))
    assert found["high minus low"][1] > 0
    assert found["spread, gain > 0"][0] > 0.125 > found["spread, gain <= 0"][0]
    assert "tells where the rewards of forks differ: Spearman +1.00" in forking.interpret(found)
    found = forking.answers(planted_nodes(lambda H, rng: rng.random()))
    low, high = found["Spearman of H and spread"][1:]
    assert low < 0 < high
    assert "was not found to tell" in forking.interpret(found)
    found = forking.answers(planted_nodes(lambda H, rng: 0.0))
    assert found["Spearman of H and spread"] is None
    assert "no answer" in forking.interpret(found)
    assert forking.answers([]) == {}


@pytest.mark.slow
def test_two_methods_two_seeds_two_steps(tmp_path):
    """The real command, from the first process to the last figure; and again, without training."""
    flags = "--methods grpo,arpo-paper --seeds 2 --steps 2 --questions_per_step 1 --jobs 2".split()
    few = write_questions(tmp_path / "few.jsonl")
    flags += ["--eval_path", few, "--eval_every", "1", "--output_dir", str(tmp_path)]
    for trained in (4, 0):
        command = [sys.executable, "-m", "lab.compare", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("of the samples right") == trained
    final = json.loads((tmp_path / "runs" / "grpo" / "0" / "final.json").read_text())
    assert len(final["sampled"]["records"][0]["accuracy"]) == 8
    results = json.loads((tmp_path / "results.json").read_text())
    for name, method in results["methods"].items():
        for run in method["runs"].values():
            assert run["points"]["step"] == [0, 1, 2]
            assert run["points"]["tool_calls"][-1] > 0
            assert (run["forks_per_question"] == 0) == (name == "grpo")
    assert "arpo-paper answers" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "accuracy-chosen.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_entropy_study_from_end_to_end(tmp_path, capsys):
    flags = ["--questions", "2", "--continuations", "4", "--output_dir", str(tmp_path)]
    assert compare.main(["entropy", *flags]) == 0
    result = json.loads((tmp_path / "cold-start.json").read_text())
    assert result["settings"] == {"questions": 6, "continuations": 4, "seed": 0}
    assert len(result["nodes"]) >= 6
    for question, call, H, H_initial, spread, right in result["nodes"]:
        assert 0 <= question < 6 and call >= 1 and 0 <= H <= 1 and 0 <= H_initial <= 1
        assert spread >= 0 and 0 <= right <= 1
        assert spread > 0 or right in (0, 1)  # some right, some wrong: rewards differ
    start, after = (result["figure_1"][place] for place in ("start", "result"))
    assert max(e[0] for e in after) > max(e[0] for e in start)
    assert "Spearman" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".svg", ".png"}
