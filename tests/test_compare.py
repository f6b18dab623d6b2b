"""The comparison: its statistics, its runs (played by a fake process), what it writes and says."""

import dataclasses
import itertools
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import mpmath
import pytest
import torch
from common import ECHO, ROOT, TINY, TINY_QUESTIONS, python, write_lines, write_questions

import arpo_mini
from advantage import Reward, Segment
from app import cli
from app.config import Config
from data.files import UserError
from entropy import Decision
from lab import compare, controls, figures, forking, verdict
from lab.intervals import t_interval

# ---- statistics ---------------------------------------------------------------------------


def test_an_interval_is_that_of_student():
    """P(|t| > q) is a regularised incomplete beta function."""
    for df in range(1, 31):
        values = range(df + 1)
        mean, low, high = t_interval(values)
        q = (high - mean) / (statistics.stdev(values) / math.sqrt(df + 1))
        p = mpmath.betainc(df / 2, 0.5, 0, df / (df + q * q), regularized=True)
        assert float(p) == pytest.approx(0.05, abs=5e-5), df  # q has three decimals
        assert mean == df / 2 and high - mean == pytest.approx(mean - low)
    assert t_interval([0.7]) == (0.7, None, None)  # one seed says nothing about its spread


# ---- what the table says ------------------------------------------------------------------


def a_run(accuracy, calls, tokens=(0, 100, 200)):
    points = {"step": [0, 10, 20], "sampled": accuracy, "tool_calls": calls, "seconds": [0, 5, 10]}
    points |= {key: [*tokens] for key in ("generated_tokens", "prefill_tokens")}
    return {"wish_rate": 0.5, "points": points | {"live_groups": [0, 20, 30]}}


@pytest.fixture
def results():
    """ARPO ends where GRPO does, or 1 point below, with half the calls and 0.6 of the tokens."""
    calls, less = [0, 100, 200], ([0, 50, 100], (0, 60, 120))
    base = {"0": a_run([0.4, 0.9, 0.95], calls), "1": a_run([0.4, 0.86, 0.89], calls)}
    ours = {"0": a_run([0.9, 0.91, 0.95], *less), "1": a_run([0.4, 0.92, 0.94], *less)}
    methods = {"grpo": {"overrides": {}, "runs": base}, "step": {"overrides": {}, "runs": ours}}
    return {"settings": {}, "methods": methods}


def test_what_it_takes_by_hand(results):
    assert verdict.until(a_run([0.9, 0.8, 0.9], [0, 1, 2]), "step", 0.85) is None  # one above alone
    grpo = verdict.runs_of(results, "grpo")  # two evaluations after the one before training
    assert verdict.accuracy(grpo, 2) == {"0": 92.5, "1": 87.5} and verdict.accuracy(grpo, 3) == {}
    found = verdict.summary(results)
    assert found["seeds"] == [0, 1] and found["final"] == pytest.approx(94.5)
    assert found["h_minus_grpo"]["high"] == pytest.approx(2.5 + 12.706 * 2.5)
    assert found["h_minus_random"] is found["h_minus_default"] is None  # not run
    results["methods"]["grpo"]["runs"]["1"] = a_run([0.4, 0.9, 0.93], [0, 200, 300])
    assert verdict.summary(results)["calls_to_90_share_of_grpo"] == 0.25  # of seed 1 alone
    for run, share in (("1", "100 (50%)"), ("0", "100")):  # a baseline without calls has no share
        grpo[run]["points"]["tool_calls"] = [0, 0, 0]
        assert verdict.row(results, "step")["calls (of GRPO's)"] == share


def test_a_row_of_the_table(results, tmp_path):
    verdict.write(results, ["grpo", "step"], {"methods": {}}, tmp_path)
    _, _, grpo, step, _, _, _, line = (tmp_path / "table.md").read_text("utf-8").splitlines()
    cells = "- | 200 | 100 | 100 (1 of 2) | 400 | 200 | 200 (1 of 2) | 1.5 | 15.0 | 10 | 50% |"
    assert grpo == f"| grpo | 2 | 92.0 ±38.1 | - | {cells}"
    cells = "+2.5 ±31.8 | 100 (50%) | 25 | 25 | 240 (60%) | 60 | 60 | 1.5 | 30.0 | 10 | 50% |"
    assert step == f"| step | 2 | 94.5 ±6.4 | - | {cells}"
    assert line == "| step minus grpo | +2.5 ±31.8 | - |"


# ---- running ------------------------------------------------------------------------------


class Fake:
    """`main(args)`; its processes have played their run, in the files of its slot, when started."""

    failing, code = "", 1

    def __init__(self, folder):
        self.folder, self.started = folder, []

    def __call__(self, *args):
        flags = "--steps 4 --jobs 2 --dataset_path data/test.jsonl --output_dir".split()
        return compare.main([*flags, str(self.folder), *args])

    def trained(self):
        """The runs since the last call."""
        names, self.started = sorted(self.started), []
        return names

    def results(self):
        return json.loads((self.folder / "results.json").read_text())

    def start(self, command, stdout, env, **_):
        slot = Path(command[-1])
        run, seed = slot / "run", int(slot.name)
        self.started.append(f"{slot.parent.name} {seed}")
        (run / "checkpoints" / "step").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "step" / "checkpoint.json").touch()
        spent = {"tool_calls": 10, "generated_tokens": 300, "prefill_tokens": 200}
        spent |= {"seconds_rollout": 1.5, "seconds_update": 0.5, "groups": 8, "equal_groups": 5}
        rates = [None, 0.25 + 0.1 * seed, 0.25, 0.25]  # no tool result in the first step
        write_lines(run / "metrics.jsonl", [{**spent, "wishes": rate} for rate in rates])
        if self.failing == self.started[-1]:
            stdout.write("some line\nout of luck\n")
            return mock.Mock(returncode=self.code)
        looks = [(step, d) for step in (0, 2, 4) for d in ("sampled", "greedy")]
        rows = [{"step": step, "decoding": d, "accuracy": 0.4 + 0.01 * step} for step, d in looks]
        write_lines(run / "evaluations.jsonl", rows)
        (slot / "final.json").write_text(json.dumps({"sampled": {"accuracy": 0.9 + 0.001 * seed}}))
        return mock.Mock(returncode=0)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Fake(tmp_path / "out")
    monkeypatch.setattr(compare.subprocess, "Popen", fake.start)
    monkeypatch.setattr(compare, "POLL", 0)
    monkeypatch.setattr(compare.Comparison, "report", lambda *_: None)
    return fake


def test_a_finished_run_is_not_repeated(fake):
    """Also where results.json is lost: whole folders count, a torn one is run again."""
    methods = ("--methods", "grpo,adaptive", "--seeds")
    for seeds, trained in (("1", ["adaptive 0", "grpo 0"]), ("2", ["adaptive 1", "grpo 1"])):
        assert fake(*methods, seeds) == 0
        assert fake.trained() == trained
    assert fake(*methods, "2") == 0
    assert fake.trained() == []
    before = fake.results()
    run = before["methods"]["grpo"]["runs"]["1"]
    step, sampled, *spent = run["points"].values()
    assert (step, sampled) == ([0, 2, 4], [0.4, 0.42, 0.901])  # the last one of more samples
    calls, *_, live = spent
    assert calls == [0, 20, 40] and live == [0, 6, 12] and run["wish_rate"] == 0.2833
    assert [column[-1] for column in spent[1:-1]] == [1200, 800, 8.0]  # tokens, seconds
    (fake.folder / "results.json").unlink()
    torn = fake.folder / "runs" / "grpo" / "1" / "final.json"  # killed while it was written
    torn.write_text(torn.read_text()[:-10])
    assert fake(*methods, "2") == 0
    assert fake.trained() == ["grpo 1"] and fake.results() == before


def test_a_run_that_dies_is_reported_and_stops_no_other(fake, capsys):
    fake.failing = "adaptive 0"
    methods = ("--methods", "grpo,adaptive", "--seeds", "2")
    assert fake(*methods) == 1
    out, error = capsys.readouterr()
    assert "adaptive, seed 0: died with exit code 1: out of luck" in out
    assert error == "error: adaptive, seed 0: exit code 1: out of luck\n"
    assert fake.trained() == ["adaptive 0", "adaptive 1", "grpo 0", "grpo 1"]
    fake.failing = ""
    assert fake(*methods) == 0
    assert fake.trained() == ["adaptive 0"]


def test_bad_input_is_that_of_all_runs(fake, refused):
    fake.failing, fake.code = "grpo 0", 2
    words = "error: grpo, seed 0: died with exit code 2: out of luck"
    refused(fake("--methods", "grpo,adaptive", "--seeds", "2", "--jobs", "1"), words)
    assert fake.trained() == ["grpo 0"]


def test_other_settings_do_not_mix(fake, refused, monkeypatch):
    one = ("--methods", "grpo", "--seeds", "1")
    assert fake(*one) == 0 and fake.trained()
    path = fake.folder / "results.json"
    before = path.read_text()

    def check(*words, flags=()):
        refused(fake(*one, *flags), *words, "--output_dir")

    check("learning_rate 0.001, now 0.5", flags=("--learning_rate", "0.5"))
    with monkeypatch.context() as patch:
        patch.setitem(compare.METHODS, "grpo", {**compare.GRPO, "temperature": 0.9})
        check("temperature None, now 0.9")
    monkeypatch.setattr(compare, "fingerprints", lambda settings: {"model_name": "another"})
    check("files", "now {'model_name': 'another'}")
    path.rename(fake.folder / "kept.json")
    check(str(Path("runs", "grpo", "0")), "now {'model_name': 'another'}")
    damages = [('"0": {', f'"{seed}": {{') for seed in ("x", "03", "-1")]
    damages += [("0.42, ", each) for each in ("", "85.0, ", "NaN, ", "-1, ", '"a", ')]
    damages += [('"settings"', '"settings": null, "_"'), ('"sampled"', '"_"')]
    for text in ("[]", *(before.replace(*damage) for damage in damages)):
        path.write_text(text)
        assert text != before and check("results.json: ", "choose another") is None
    path.write_text('{"settings": {}, "methods": {"grpo": {"overrides": {}, "runs": {}}}}')
    refused(compare.main(["draw", str(fake.folder)]), f"{path}: it holds no runs")
    assert fake.trained() == [] and (fake.folder / "kept.json").read_text() == before


def test_a_run_goes_on_unless_its_settings_or_files_changed(fake, tmp_path, monkeypatch):
    model, run = tmp_path / "model.safetensors", compare.Run("grpo", 0)
    model.write_bytes(b"one")
    settings = dict.fromkeys(compare.PATHS, "") | {"model_name": str(tmp_path)}
    settings |= {"steps": 4, "files": compare.fingerprints(settings)}
    comparison = compare.Comparison(tmp_path, settings)
    marker = comparison.slot(run) / "run" / "checkpoints" / "of an earlier process"
    for goes_on in (False, True):
        comparison.start(run, threads=1)
        assert marker.exists() == goes_on
        marker.touch()
    with pytest.raises(UserError, match="made with steps 4, now 5"):
        compare.Comparison(tmp_path, {**settings, "steps": 5}).figures(run)
    assert marker.exists()
    (comparison.slot(run) / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"grpo/0/settings\.json: .*; choose another"):
        comparison.figures(run)
    model.write_bytes(b"a cold start made again")
    with pytest.raises(UserError, match=r"made with model_name .*, now"):
        comparison.start(run, threads=1)
    monkeypatch.setattr(compare, "local_files", {"owner/set:train": [model]}.__getitem__)
    found = compare.fingerprints(dataclasses.asdict(Config(dataset_path="owner/set:train")))
    assert {*found} == {"model_name", "dataset_path", "eval_path", "documents_path"}


def test_one_process_at_a_time(fake, refused):
    with compare.FileLock(fake.folder / "runs" / "lock"):
        refused(fake("--methods", "grpo", "--seeds", "1"), "is at work there")
    assert fake("--methods", "grpo", "--seeds", "1") == 0
    assert fake.trained() == ["grpo 0"]


def test_what_a_process_does(tmp_path, monkeypatch):
    values = {**compare.DEFAULTS, "temperature": 0.9}
    comparison = compare.Comparison(tmp_path, compare.shared_settings(values, 5))
    settings = comparison.settings_of(compare.Run("hard-x4", 7))
    assert not any(str(ROOT) in str(value) for value in settings.values())  # can be published
    typed = compare.shared_settings(compare.DEFAULTS | {"shared_weight": 0.5}, 5)
    ours = compare.Comparison(tmp_path, typed).settings_of(compare.Run("arpo-1-of-8-z4", 7))
    assert ours["shared_weight"] == 0.5
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    train, evaluate = mock.Mock(side_effect=[None, KeyboardInterrupt]), mock.Mock()
    monkeypatch.setattr(arpo_mini, "train", train)
    monkeypatch.setattr(cli, "eval_command", evaluate)
    compare.play(tmp_path)
    config = dataclasses.asdict(train.call_args.args[0])
    own = {"version": compare.VERSION, "final_samples": 5, "files": settings["files"]}
    assert config["output_dir"] == str(tmp_path / "run") and config["shared_weight"] == 1
    assert settings.items() <= (config | own).items() and config["seed"] == 7
    assert config.keys() - settings.keys() <= compare.OF_THE_RUNS
    end = {"adapter": str(tmp_path / "run" / "adapter"), "temperature": 1.0}
    algorithm, trained, *others = evaluate.call_args.args
    assert dataclasses.asdict(trained) == config | end and algorithm.train == train
    assert others == [5, None, str(tmp_path / "final.json")]
    (tmp_path / "run").mkdir()  # it was begun before, and is stopped now: no evaluation
    with pytest.raises(KeyboardInterrupt):
        compare.play(tmp_path)
    resumed = [call.kwargs["resume"] for call in train.mock_calls]
    assert resumed == [None, tmp_path / "run"] and evaluate.call_count == 1


BAD = {
    "--methods ppo": ["ppo", "grpo", "adaptive", "settings", "all"],
    "--seeds 0": ["--seeds 0", "at least 1"],
    "--jobs 0": ["--jobs 0", "at least 1"],
    "run": ["run"],
    "--branch_rule none": ["--branch_rule", "--methods", "--learning_rate"],
    "--learning_rate -1": ["--learning_rate -1", "above 0"],
    "--temperature 0": ["--temperature 0", "training"],
    "--final_samples 100000": ["--final_samples 100000", "at most 10000"],
    "--dataset_path no/such.jsonl": ["no/such.jsonl", "No such file"],
    "entropy --continuations 1": ["--continuations 1", "at least 2"],
    "entropy --forced data/test.jsonl --adapter no/such/adapter": ["no/such/adapter"],
    "entropy --forced /dev/null": ["--forced /dev/null", "legal: "],
    "draw a": ["unknown: --output_dir", "lab.compare draw"],
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line(args, refused, tmp_path):
    out = tmp_path / "out"
    assert refused(compare.main([*args.split(), "--output_dir", str(out)]), *BAD[args]) == ""
    assert not out.exists()


def test_every_method_is_a_legal_training():
    for name in compare.choose("all"):
        values = {k: v for k, v in compare.METHODS[name].items() if k != "control"}
        config = Config(**values, seed=3)
        assert 64 <= config.group_size * config.questions_per_step <= 72
        assert (config.branch_rule == "none") == name.startswith("grpo")
    assert compare.choose("main") == [*compare.FAMILIES["main"]]
    assert compare.choose("hard-x4,grpo") == ["grpo", "hard-x4"]
    assert set(compare.METHODS) == {m for names in compare.FAMILIES.values() for m in names}


@pytest.mark.parametrize(
    "control", sorted({m.get("control", "live") for m in compare.METHODS.values()})
)
def test_a_control_spends_the_same_budget(tiny, control, monkeypatch):
    judged = itertools.count()
    monkeypatch.setattr(controls, "judge", lambda *_: Reward(next(judged) % 2, 1.0, True, 1))
    for name in ("rollout", "running_threshold", "spend_rest"):  # put back at the end
        monkeypatch.setattr(arpo_mini, name, getattr(arpo_mini, name))
    config = dataclasses.replace(TINY, **{**compare.STEP, "questions_per_step": 2})
    if control == "live":
        config = dataclasses.replace(config, branch_rule="none", initial_rollouts=2)
    getattr(controls, control)()
    writer, scores = arpo_mini.Writer(tiny, config), [[-1.0] * 50] * 2
    groups = arpo_mini.rollout(writer, TINY_QUESTIONS, config, ECHO, 3, scores)
    leaves = [leaf for group in groups for leaf in group]
    assert len(set(leaves)) == 8 and max(map(len, groups)) <= 8
    decided = [s.decision for leaf in leaves for s in leaf.path() if s.decision]
    assert {d.forks > 0 for d in decided} == {control == "sigma"}  # of equal scores: T = -1
    assert any(d.granted for d in decided) == (control != "live")
    assert (next(judged) > 0) == (control in ("oracle", "live"))


def test_the_oracle_breaks_ties_at_random(monkeypatch):
    """Nine results of one spread: the forks begin neither at the first ones nor at the question."""
    monkeypatch.setattr(controls, "spreads", lambda _, nodes, *__: dict.fromkeys(nodes, 0.5))
    for name in ("rollout", "running_threshold", "spend_rest"):  # put back at the end
        monkeypatch.setattr(arpo_mini, name, getattr(arpo_mini, name))
    controls.oracle()
    root = Segment("prompt", [1])
    results = [Segment("tool", [i], root, decision=Decision(0, 0, 0, 0, 0)) for i in range(9)]
    budget = arpo_mini.Budget(4, random.Random(0), places=dict.fromkeys([root, *results], 0.0))
    first = arpo_mini.spend_rest(budget, TINY)  # two of each
    assert set(first) < set(results) and first[::2] != results[:2]


# ---- what is written ----------------------------------------------------------------------


def test_results_are_drawn_again_the_same(results, tmp_path, capsys, refused):
    folder, second = tmp_path / "first", tmp_path / "second_world"
    for comparison in map(compare.Comparison, (folder, second), [{"steps": 20}] * 2):
        comparison.folder.mkdir()
        comparison.results = results
        comparison.save()
    assert '"step": [0, 10, 20]' in (folder / "results.json").read_text()

    def drawn(folder=folder):
        assert compare.main(["draw", str(folder)]) == 0
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first, words = drawn(), {"results.json", "table.md", "summary.json"}
    pictures = {"accuracy-chosen.svg", "accuracy-chosen.png"}
    assert first == drawn() and set(first) == words | pictures
    assert first["accuracy-chosen.svg"].decode().count('<g id="axes_') == 4
    one, beside = (json.loads(each["summary.json"]) for each in (first, drawn(second)))
    assert one["second_world"]["final"] == one["final"] == beside["final"] == pytest.approx(94.5)
    assert beside["second_world"]["final"] is None  # it is not beside itself
    capsys.readouterr(), compare.Comparison(folder).report(["grpo"])
    assert "94.5" not in capsys.readouterr().out  # but in the file
    assert (folder / "table.md").read_bytes() == first["table.md"]
    (second / "results.json").write_text("[]")
    refused(compare.main(["draw", str(folder)]), f"error: {second / 'results.json'}: ")


def test_the_band_is_drawn_as_far_as_every_seed_went():
    runs = {"0": a_run([0.4, 0.6, 0.8], [0, 50, 100]), "1": a_run([0.4, 0.5, 0.6], [0, 100, 200])}
    x, e = figures.band(runs, "tool_calls")
    assert x[0] == 0 and x[-1] == 100
    assert e[-1, 0] == pytest.approx((0.8 + 0.5) / 2)
    assert e[-1, 2] - e[-1, 0] == pytest.approx(12.706 * 0.15)
    x, e = figures.band({"0": runs["0"]}, "step")
    assert list(x) == [0, 10, 20] and e[:, 1].tolist() == [0.4, 0.6, 0.8]  # no band


# ---- the entropy study --------------------------------------------------------------------


def test_a_continuation_goes_on_where_the_trajectory_stood(policy, config, tools, questions):
    """Greedy from the prompt, and greedy again from its tool results: the same tokens."""
    greedy = dataclasses.replace(config, temperature=0.0, branch_rule="none")
    roots = [Segment("prompt", policy.prompt(q.text)) for q in questions[3:5]]

    def go_on(nodes, k):
        writer = arpo_mini.Writer(policy, greedy)
        return [*controls.continued(writer, nodes, k, greedy, tools).values()]

    paths = [leaves[0].path() for leaves in go_on(roots, 1)]
    nodes = [(path, s) for path in paths for s in path[:-1] if s.author == "tool"]
    assert len(nodes) >= 3  # some stand on one path
    groups = go_on([node for _, node in nodes], 2)
    for (path, node), leaves in zip(nodes, groups, strict=True):
        assert len(set(leaves)) == 2
        for leaf in leaves:
            assert node in leaf.path()
            assert [s.token_ids for s in leaf.path()] == [s.token_ids for s in path]


def test_entropies_at_given_calls_are_those_of_the_model(policy, config, tools):
    """With k = 1 H is the entropy of one distribution: after the prompt, and after the result;
    a high temperature makes it large."""
    call = "<think>a</think><calculator>1+1</calculator>"
    rows = [{"question": "Who is the mayor of Tarnholm?"}]
    rows += [{"problem": "Why?", "result": "So.", "call": call}]
    spelled = ["<search>Who is the mayor of Tarnholm?</search>", call]
    one = dataclasses.replace(config, entropy_tokens=1, temperature=8.0)
    agent = arpo_mini.Agent(policy, tools, one)
    asked = [forking.read_forced(row) for row in rows]
    found = forking.measure(agent, asked, 2, one)
    for i, answer in enumerate(("mayor is", "\nSo.\n")):
        nodes = forking.given_nodes(agent, asked[i], one)
        read = policy.decode(nodes[1].path_tokens())
        assert spelled[i] in read and answer in read and read.endswith("\n</result>")
        for H, node in zip(found[i][1:], nodes, strict=True):
            with torch.inference_mode():
                logits = policy.lm(torch.tensor([node.path_tokens()])).logits[0, -1]
            expected = torch.distributions.Categorical(logits=logits / 8).entropy()
            assert H * math.log(policy.vocab_size) == pytest.approx(expected.item(), rel=1e-4)
            assert H > 0.01
    start, after, gain, share = forking.answers([[0, 0.1, 0.4], [1, 0.2, 0.1]]).values()
    assert (start[0], after[0]) == pytest.approx((0.15, 0.25)) and share[0] == 0.5 > share[1] > 0
    assert gain == pytest.approx(t_interval([0.3, -0.1]))


@pytest.mark.parametrize(
    "row, flags, words",
    [
        ('{"question": "a", "call": "look it up"}', [], "one that ends in </its tool>; legal: "),
        ('{"question": "a", "result": 3}', [], "question and result are texts"),
        ("", [], "holds no questions; legal: "),
        ('{"question": "a"}', ["--max_total_tokens", "30"], "--max_total_tokens 30: the result"),
        ('{"question": "a"}', ["--name", "f"], "f.json is there already; choose another --name"),
    ],
)
def test_calls_that_cannot_be_given_are_refused(row, flags, words, tmp_path, refused):
    (tmp_path / "f.json").write_text(row)
    where = ["--forced", str(tmp_path / "f.json"), "--output_dir", str(tmp_path)]
    refused(compare.main(["entropy", *where, *flags]), words)


# ---- processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_methods_two_seeds_two_steps(tmp_path):
    """The real command: killed, stopped by Ctrl-C, to the last figure, again without training."""
    command = "-m lab.compare --methods grpo,adaptive --seeds 2 --steps 2 --jobs 2".split()
    command += ["--eval_path", write_questions(tmp_path / "few.jsonl"), "--eval_every", "1"]
    command += ["--output_dir", str(tmp_path / "out")]
    logs = [tmp_path / "out" / "runs" / name / "0" / "log.txt" for name in ("grpo", "adaptive")]

    def wait_for(words):
        while not all(log.exists() and words in log.read_text() for log in logs):
            time.sleep(0.1)

    for number, code, words in ((signal.SIGKILL, -9, "step 0"), (signal.SIGINT, 130, "step 1")):
        stopped = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE)
        wait_for(words)
        stopped.send_signal(number)
        stopped.communicate(timeout=60)
        assert stopped.returncode == code
        wait_for("is saved"), wait_for("stopped")  # the children save what they have, and go
    for trained in (4, 0):
        done = python(*command, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("of the samples right") == trained
    final = json.loads((logs[0].parent / "final.json").read_text())
    assert len(final["sampled"]["records"][0]["accuracy"]) == 8
    for method in json.loads((tmp_path / "out" / "results.json").read_text())["methods"].values():
        for run in method["runs"].values():
            assert run["points"]["step"] == [0, 1, 2] and run["points"]["tool_calls"][-1] > 0
            assert (run["wish_rate"] == 0) == (method["overrides"] == compare.GRPO)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table.md", "accuracy-chosen.png"} <= names and "results.json.tmp" not in names


@pytest.mark.slow
def test_the_entropy_study_from_end_to_end(tmp_path, capsys):
    flags = ["--forced", "data/test.jsonl", "--questions", "2", "--continuations", "4"]
    assert compare.main(["entropy", *flags, "--output_dir", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cold-start-forced.json").read_text())
    assert result["settings"] == {"questions": 6, "continuations": 4, "seed": 0}
    assert [question for question, *_ in result["nodes"]] == [*range(6)]
    assert all(0 <= start < after <= 1 for _, start, after in result["nodes"])
    assert "share of gains > 0" in capsys.readouterr().out
