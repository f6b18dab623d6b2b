"""A run that was stopped goes on as if it had not been, and nothing on the disk is ever half."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import lines_of, write_questions
from safetensors.torch import load_file, save_file

import arpo_mini
import app.run_folder as runs
from arpo_mini import main
from data.formats import load_questions
from app.config import Config

# Steps of a fraction of a second, with everything a step can have: forks, evaluations, trees.
TINY = (
    "--questions_per_step 1 --group_size 3 --initial_rollouts 2 --record_every 1 --save_every 2"
    " --load_in_4bit false --max_segment_tokens 40"
).split()
STEPS = ["--steps", "4", "--eval_every", "2"]
TIMED = ("seconds_rollout", "seconds_update")
LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")


@pytest.fixture(scope="module")
def one_question(tmp_path_factory):
    """An evaluation of one question, so that it takes a moment."""
    return write_questions(tmp_path_factory.mktemp("data") / "one.jsonl", domains=1)


def train(folder, *more):
    return main(["train", "--output_dir", str(folder), *TINY, *STEPS, *more])


def resume(folder, *more):
    return main(["train", "--resume", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_question):
    """The uninterrupted run, to compare with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, "--eval_path", one_question) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def adapter_bytes(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def untimed(folder):
    return [
        {k: v for k, v in m.items() if k not in TIMED} for m in lines_of(folder, "metrics.jsonl")
    ]


def assert_equal_runs(one, two):
    """Bit for bit, but for the seconds."""
    assert untimed(one) == untimed(two)
    for name in ("evaluations.jsonl", "rollouts.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (two / "adapter" / name).read_bytes()
    newest = [max((folder / "checkpoints").iterdir()) for folder in (one, two)]
    assert newest[0].name == newest[1].name
    for name in ("optimizer.safetensors", "random.json"):
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ---- stopped, and gone on with ------------------------------------------------------------


def in_the_rollout(monkeypatch, stop):
    spoil(monkeypatch, arpo_mini.Rollout, "call_tools", stop, step=4)


def in_an_optimizer_step(monkeypatch, stop):
    """After it changed the weights: what is saved, step 3, must be older than that."""
    spoil(monkeypatch, torch.optim.AdamW, "step", stop, step=4, after=True)


def in_an_evaluation(monkeypatch, stop):
    """Between the two decodings of the one after step 2: one of them is written already."""
    spoil(monkeypatch, arpo_mini, "evaluate", stop, step=2, call=2)


def while_it_logs(monkeypatch, stop):
    spoil(monkeypatch, runs.RunFolder, "log", stop, step=4, after=True)


def while_it_saves(monkeypatch, stop):
    """With half of the checkpoint of step 2 on the disk."""
    spoil(monkeypatch, runs, "write", stop, step=2, call=3)


def spoil(monkeypatch, owner, name, stop, step, call=1, after=False):
    """`stop()` once: at the `call`-th use of the function since `step` was begun."""
    real, begun, calls = getattr(owner, name), [], []
    ask = arpo_mini.questions_of_step

    def begin(questions, number, config):
        begun.append(number)
        return ask(questions, number, config)

    def spoiled(*args, **kwargs):
        calls.append(1) if step in begun else None
        now = len(calls) == call
        if now and not after:
            stop()
        result = real(*args, **kwargs)
        if now and after:
            stop()
        return result

    monkeypatch.setattr(arpo_mini, "questions_of_step", begin)
    monkeypatch.setattr(owner, name, spoiled)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


PLACES = {  # and the last step that was completed before
    in_an_optimizer_step: 3,
    in_the_rollout: 3,
    while_it_logs: 3,
    in_an_evaluation: 2,
    while_it_saves: 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_ctrl_c_anywhere_and_resumed_equals_the_uninterrupted_run(
    place, whole, one_question, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        place(patch, ctrl_c)
        assert train(folder, "--eval_path", one_question) == 130
    out, error = capsys.readouterr()
    assert error == "stopped\n" and f"train --resume {folder}" in out
    done = int(re.search(r"step (\d) is saved", out)[1])
    assert done == PLACES[place] and checkpoints(folder)[-1] == f"step-{done:06d}"
    assert resume(folder) == 0
    assert f"going on after step {done} in {folder}" in capsys.readouterr().out
    assert_equal_runs(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--load_in_4bit", "true"], ["--updates_per_rollout", "3"]])
def test_so_does_one_in_4_bit_and_one_stopped_between_two_updates(
    more, one_question, tmp_path, monkeypatch
):
    assert train(tmp_path / "whole", "--eval_path", one_question, *more) == 0
    with monkeypatch.context() as patch:
        in_an_optimizer_step(patch, ctrl_c)
        assert train(tmp_path / "run", "--eval_path", one_question, *more) == 130
    assert resume(tmp_path / "run") == 0
    assert_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_ran_out_of_memory_goes_on_with_the_chunks_it_came_to(
    one_question, tmp_path, monkeypatch
):
    """Fewer rows at once draw other trees: the resumed run decodes as many as the whole one."""
    sample, calls = arpo_mini.Rollout.sample, []

    def crowded(rollout, paths, steps, measure):
        calls.append(len(paths))
        if len(paths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(rollout, paths, steps, measure)

    with monkeypatch.context() as memory_is_short:
        memory_is_short.setattr(arpo_mini.Rollout, "sample", crowded)
        assert train(tmp_path / "whole", "--eval_path", one_question) == 0
        assert train(tmp_path / "part", "--eval_path", one_question, "--steps", "2") == 0
    assert max(calls) > 1
    assert resume(tmp_path / "part", "--steps", "4") == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_an_error_saves_the_last_completed_step_too(whole, one_question, tmp_path, monkeypatch):
    def a_lost_device():
        raise torch.AcceleratorError("the device is lost")

    with monkeypatch.context() as patch:
        spoil(patch, arpo_mini, "update", a_lost_device, step=4)
        with pytest.raises(torch.AcceleratorError):
            train(tmp_path / "run", "--eval_path", one_question)
    assert checkpoints(tmp_path / "run")[-1] == "step-000003"
    assert resume(tmp_path / "run") == 0
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_sigterm_saves_and_a_second_signal_does_not_wait(
    whole, one_question, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        spoil(patch, arpo_mini, "update", sigterm, step=4)
        assert train(tmp_path / "once", "--eval_path", one_question) == 143
        assert checkpoints(tmp_path / "once") == ["step-000002", "step-000003"]
        patch.undo()
        spoil(patch, arpo_mini, "update", sigterm, step=4)
        spoil(patch, runs, "write", sigterm, step=4, call=2)
        assert train(tmp_path / "twice", "--eval_path", one_question) == 143
        left = checkpoints(tmp_path / "twice")
        assert left == ["step-000000", "step-000002", "step-000003.tmp"]
    assert capsys.readouterr().err == "stopped\n" * 2
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    for name in ("once", "twice"):
        assert resume(tmp_path / name) == 0
        assert_equal_runs(tmp_path / name, whole)


@pytest.mark.slow
def test_a_finished_run_can_be_extended(whole, one_question, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(folder, "--eval_path", one_question, "--steps", "2", "--save_every", "9") == 0
    before = {name: (folder / name).read_bytes() for name in LOGS}
    assert resume(folder) == 0  # it has nothing left to do, and shows its figures again
    assert "before (95 %)" in capsys.readouterr().out
    assert before == {name: (folder / name).read_bytes() for name in LOGS}
    assert resume(folder, "--steps", "4", "--keep", "1") == 0
    assert checkpoints(folder) == ["step-000004"]
    assert adapter_bytes(folder) == adapter_bytes(whole)
    assert untimed(folder) == untimed(whole)
    assert runs.saved_settings(folder)["steps"] == 4


# ---- what is on the disk ------------------------------------------------------------------


def test_old_checkpoints_are_pruned_and_nothing_is_pickled(whole):
    assert checkpoints(whole) == ["step-000002", "step-000004"]
    files = {path.suffix for path in whole.glob("checkpoints/**/*") if path.is_file()}
    assert files == {".json", ".safetensors"}
    newest = whole / "checkpoints" / "step-000004"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (newest / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert not re.search(r"\btorch\.load\(|pickle", Path(runs.__file__).read_text())


@pytest.mark.slow
def test_what_a_killed_process_leaves_is_cleared_away(copy, whole, capsys):
    """A torn line, lines of later steps, half a checkpoint, and one that the disk has spoilt."""
    shutil.copytree(copy / "checkpoints/step-000004", copy / "checkpoints/step-000005.tmp")
    (copy / "checkpoints/step-000005.tmp/random.json").unlink()
    with (copy / "checkpoints/step-000004/optimizer.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"spoilt"[:5])
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward": 0.')
    (copy / "adapter/adapter_model.safetensors.tmp").write_bytes(b"half")
    assert resume(copy) == 0
    out = capsys.readouterr().out
    assert "not whole and not used" in out and "going on after step 2" in out
    assert not list(copy.glob("**/*.tmp"))
    shutil.rmtree(copy / "checkpoints/step-000004.broken")
    assert_equal_runs(copy, whole)


def test_a_run_whose_checkpoints_are_all_spoilt_does_not_begin_anew(copy, capsys):
    for path in copy.glob("checkpoints/*/random.json"):
        path.write_text("{}")
    before = (copy / "metrics.jsonl").read_bytes()
    assert_refused(resume(copy), capsys, "none of its checkpoints is whole")
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_cutting_keeps_the_lines_of_the_steps_and_drops_a_torn_one(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "text": "a\u2028b"}) + "\n" for step in (1, 2, 2, 3)]
    path.write_text("".join(lines) + '{"step": 3')
    assert [row["step"] for row in runs.cut(path, 3)] == [1, 2, 2, 3]
    assert path.read_text() == "".join(lines)
    path.write_text("".join(lines)[:-1])  # whole, but for the end of the line
    assert [row["step"] for row in runs.cut(path, 3)] == [1, 2, 2]
    assert [row["step"] for row in runs.cut(path, 1)] == [1]
    assert path.read_text() == lines[0]
    assert runs.cut(tmp_path / "absent.jsonl", 1) == [] and not (tmp_path / "absent.jsonl").exists()


def test_random_states_survive_a_file():
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.normal(), torch.rand(1).item()

    draw()  # one gauss is kept back for the next call
    states = json.loads(json.dumps(runs.random_states()))
    first = draw()
    runs.set_random_states(states)
    assert draw() == first


# ---- what is refused ----------------------------------------------------------------------


def assert_refused(code, capsys, *words):
    error = capsys.readouterr().err
    assert code == 2 and len(error.strip().splitlines()) == 1 and "Traceback" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--learning_rate 0.5", "learning_rate is 0.001 there and 0.5 here"),
        ("--seed 1 --group_size 4", "group_size is 3 there and 4 here; seed is 0 there and 1 here"),
        ("--adapter elsewhere", "adapter is None there and elsewhere here"),
        ("--eval_path OTHER", "content of eval_path is"),
        ("--steps 3", "--steps 3: the run has made 4 steps already"),
        ("--output_dir elsewhere", "leave --output_dir out"),
        ("--keep 0", "--keep 0: it must be at least 1"),
        ("--eval_path no/such.jsonl", "no/such.jsonl"),
    ],
)
def test_other_settings_and_data_are_refused_by_name(more, words, whole, tmp_path, capsys):
    other = write_questions(tmp_path / "other.jsonl", domains=2)
    before = sorted((path, path.read_bytes()) for path in whole.rglob("*") if path.is_file())
    code = resume(whole, *more.replace("OTHER", other).split())
    assert_refused(code, capsys, words)
    after = sorted((path, path.read_bytes()) for path in whole.rglob("*") if path.is_file())
    assert [f for f in after if f[0].name != "lock"] == [f for f in before if f[0].name != "lock"]


@pytest.mark.parametrize("package", ["arpo_mini", "torch", "transformers", "peft", "bitsandbytes"])
def test_another_version_is_refused(package, copy, capsys):
    path = copy / "checkpoints/step-000004/checkpoint.json"
    about = json.loads(path.read_text())
    about["made_by"][package] = "0.0.1"
    path.write_text(json.dumps(about))
    assert_refused(resume(copy), capsys, f"{package} is 0.0.1 there and ", "step-000004")


def test_another_model_is_refused_wherever_it_is(copy, whole, tmp_path, capsys):
    model = Path(shutil.copytree(Config().model_name, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][3] += 0.01
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    code = resume(copy, "--model_name", str(model))
    assert_refused(code, capsys, "weights of model_name is", "there and")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "it is not a run"),
        ("config.json", "[]", "it is not a run"),
        ("config.json", '{"stepz": 3}', "settings of another version: stepz"),
        ("metrics.jsonl", '{"step": 1}\n', "has 1 lines for the 4 steps"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(name, content, words, copy, capsys):
    (copy / name).unlink() if content is None else (copy / name).write_text(content)
    assert_refused(resume(copy), capsys, words)


def test_the_newest_run_is_the_one_written_to_last(tmp_path, capsys):
    assert_refused(
        main(["train", "--output_dir", str(tmp_path / "x"), "--resume"]), capsys, "no run in"
    )
    for number, name in enumerate(("x-2", "x", "x-3", "x-other", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").write_text("")
        os.utime(tmp_path / name / "lock", (number, number))
    (tmp_path / "x-4").mkdir()  # of no run
    assert runs.newest_run(str(tmp_path / "x")).name == "x-3"
    code = main(["train", "--output_dir", str(tmp_path / "x"), "--resume"])
    assert_refused(code, capsys, "x-3: it is not a run")


# ---- a machine that does not play along ---------------------------------------------------


def test_two_processes_in_one_folder(whole, capsys):
    with (whole / "lock").open("a+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        held.write("4711\n")
        held.flush()
        assert_refused(resume(whole), capsys, f"{whole} is in use by process 4711")


@contextmanager
def full_disk(folder, monkeypatch):
    """A disk with room for the first checkpoint and not for a second; a file limit without root."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def more_room():
        if mounted:
            remount = ["mount", "-o", "remount,size=100m", str(folder)]
            subprocess.run(remount, check=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        yield more_room
    finally:
        more_room()
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk(whole, one_question, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "disk" / "run"
    with full_disk(tmp_path / "disk", monkeypatch) as more_room:
        code = train(folder, "--eval_path", one_question)
        assert_refused(code, capsys, f"cannot write to {folder}", "--resume")
        assert checkpoints(folder) == ["step-000000"]
        assert runs.read_checkpoint(folder / "checkpoints/step-000000")
        assert [m["step"] for m in lines_of(folder, "metrics.jsonl")] == [1, 2]
        more_room()
        assert resume(folder) == 0
        assert_equal_runs(folder, whole)


@contextmanager
def read_only(folder):
    """For everybody but root, so root becomes nobody."""
    writable = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in [*writable, *(path for path in folder.rglob("*") if path.is_file())]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        for path in writable:
            path.chmod(0o755)


def test_a_read_only_folder(whole, capsys):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(shutil.copytree(whole, Path(place) / "run"))
        before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
        with read_only(Path(place)):
            config = Config(**runs.saved_settings(folder))
            for wanted in (folder, None):
                with pytest.raises(runs.UserError, match="Permission denied"):
                    if wanted:
                        runs.RunFolder(config, folder).__enter__()
                    else:
                        runs.new_folder(str(Path(place) / "new"))
        after = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
        assert before == after


# ---- numbers that go wrong ----------------------------------------------------------------


def nan_log_prob(patch):
    change(patch, "token_logprobs", lambda logp: logp.index_fill(1, first(logp), torch.nan))


def first(logp):
    return (logp[0] != 0).nonzero()[0]


def infinite_loss(patch):
    change(patch, "policy_loss", lambda out: (out[0] * torch.inf, out[1]))


def nan_gradient(patch):
    """Of a finite loss: 0 times the infinite slope of the root."""
    change(patch, "policy_loss", lambda out: (out[0] + (0 * out[0]).abs().sqrt(), out[1]))


def change(patch, name, other):
    """The result of a function of arpo_mini, in step 3, which trains whatever its rewards are."""
    patch.setattr(arpo_mini.Row, "pulls", lambda row: True)
    real, ask, begun = getattr(arpo_mini, name), arpo_mini.questions_of_step, []
    patch.setattr(
        arpo_mini, "questions_of_step", lambda q, step, c: [begun.append(step), ask(q, step, c)][1]
    )
    patch.setattr(arpo_mini, name, lambda *args: other(real(*args)) if 3 in begun else real(*args))


def nan_weights(patch):
    real = arpo_mini.Rollout.run

    def spoilt(self, questions):
        self.policy.lm.model.norm.weight.data[0] = torch.nan
        return real(self, questions)

    def spoil_the_weights():
        patch.setattr(arpo_mini.Rollout, "run", spoilt)

    spoil(patch, arpo_mini, "train_step", spoil_the_weights, step=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (nan_log_prob, "a log-prob is nan"),
        (infinite_loss, "the loss is "),
        (nan_gradient, "the gradient norm is nan"),
        (nan_weights, "the sampler's log-probs are not finite"),
    ],
)
def test_a_number_that_goes_wrong_ends_the_run_and_spoils_nothing(
    wrong, words, whole, one_question, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        wrong(patch)
        assert train(folder, "--eval_path", one_question, "--steps", "5") == 1
    error = capsys.readouterr().err
    questions = load_questions(Config().dataset_path)
    (question,) = arpo_mini.questions_of_step(questions, 3, Config(questions_per_step=1))
    assert len(error.splitlines()) == 1 and f"step 3: {words}" in error
    assert re.search(re.escape(repr(question.text)) + r" \(\d+ tokens\)", error)
    evidence = folder / "non-finite-step-000003"
    assert str(evidence) in error
    facts = json.loads((evidence / "facts.json").read_text())
    assert facts["step"] == 3 and facts["rows"][0]["question"] == question.text
    assert any(not t.isfinite().all() for t in load_file(evidence / "tensors.safetensors").values())
    name = "adapter/adapter_model.safetensors"
    step_2 = (whole / "checkpoints/step-000002" / name).read_bytes()
    assert (folder / name).read_bytes() == step_2 and checkpoints(folder)[-1] == "step-000002"


# ---- kill -9 ------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_again_and_again_it_ends_like_the_uninterrupted_run(tmp_path, one_question):
    """kill -9 in rollouts, updates and while checkpoints are written, at least 20 times."""
    command = [sys.executable, Path(__file__).parent / "lives.py", tmp_path, one_question]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    lives = [json.loads(line) for line in done.stdout.splitlines()]
    killed = [life for life in lives if life["code"] == -signal.SIGKILL]
    assert len(killed) >= 20
    for phase in ("rollout", "update", "checkpoint"):
        assert sum(life["ended_in"] == phase for life in killed) >= 4, phase
    assert all(life["lost"] <= life["save_every"] for life in killed)
    interrupted = [life for life in lives if life["code"] == 130]
    assert len(interrupted) >= 3 and all(life["lost"] <= 1 for life in interrupted)
    for number in {life["run"] for life in lives}:
        assert_equal_runs(tmp_path / f"killed-{number}", tmp_path / f"whole-{number}")
