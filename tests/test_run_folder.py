"""A run that was stopped or damaged goes on as if it had not been, and nothing good is lost.

A matrix learns instead of a policy (scripted.py); test_train.py does some of it with a real one.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
import scripted
import torch
from common import lines_of, write_questions
from scripted import main

import app.evaluation
import app.run_folder as run_folder

LOGS = run_folder.LOGS
ADAPTER = "adapter/adapter_model.safetensors"
pytestmark = pytest.mark.usefixtures("every_tree")


def train(folder, few, *more):
    """6 steps; checkpoints after 2, 4 and 6, of which the last two stay; evaluations after them."""
    flags = "--steps 6 --save_every 2 --eval_every 2 --eval_part 1 --group_size 2".split()
    flags += ["--questions_per_step", 1, "--dataset_path", few, "--eval_path", few]
    return main("train", "--output_dir", folder, *flags, *more)


def resume(folder, *more):
    return main("train", "--resume", folder, *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, few, every_tree):
    """The uninterrupted run, to compare with."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train(folder, few) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def state_of(folder):
    """All that a run leaves, but for the seconds."""
    newest = max((folder / "checkpoints").glob("step-??????"))
    state = json.loads((newest / "state.json").read_text())
    files = [*LOGS[1:], ADAPTER, f"checkpoints/{newest.name}/optimizer.safetensors"]
    contents = {name: (folder / name).read_bytes() for name in files}
    rows = lines_of(folder, LOGS[0])
    metrics = [{name: row[name] for name in row if "seconds_" not in name} for row in rows]
    return contents | {"state": state | {"seconds": 0}, "newest": newest.name, "metrics": metrics}


# ---- stopped, and gone on with ------------------------------------------------------------


def spoil(patch, owner, name, stop, done, call=1, after=False):
    """`stop()` once: at the `call`-th use of the function since step `done` was completed."""
    real, remember, uses = getattr(owner, name), run_folder.RunFolder.remember, itertools.count(1)

    def spoiled(*args, **kwargs):
        now = next(uses) == call
        if now and stop is killed and name == "write":  # in the middle of it
            real(args[0], args[1][: len(args[1]) // 2], *args[2:])
        stop() if now and not after else None
        result = real(*args, **kwargs)
        stop() if now and after else None
        return result

    def remembered(run, step):
        remember(run, step)
        patch.setattr(owner, name, spoiled) if step == done else None

    patch.setattr(run_folder.RunFolder, "remember", remembered)


PLACES = {  # what is spoilt, where, the last step that is complete then
    "rollout": (scripted.Agent, "roll_out", {"done": 3}),
    "optimizer step": (torch.optim.AdamW, "step", {"done": 3, "after": True}),
    "second update": (torch.optim.AdamW, "step", {"done": 3, "call": 2, "after": True}),
    "evaluation": (app.evaluation, "evaluate", {"done": 6, "call": 2}),  # one decoding is there
    "log": (run_folder.RunFolder, "log", {"done": 3, "after": True}),
    "trees": (run_folder.RunFolder, "append", {"done": 3, "call": 2}),
    "checkpoint": (run_folder, "write", {"done": 4, "call": 5}),
    "adapter": (run_folder, "put", {"done": 4, "call": 2}),
}


SIGNALS = [getattr(signal, f"SIG{name}", signal.SIGTERM) for name in "INT TERM HUP KILL".split()]
ctrl_c, sigterm, sighup, killed = (partial(signal.raise_signal, number) for number in SIGNALS)
STOPS = {  # how it ends: what does it, the exit code
    "Ctrl-C": (ctrl_c, 130),
    "SIGTERM": (sigterm, 143),
    "SIGHUP": (sighup, 143),
    "nan": (Mock(side_effect=FloatingPointError("step 4: the loss is nan")), 1),
    "lost device": (Mock(side_effect=RuntimeError("the device is lost")), None),
}


@pytest.mark.parametrize(
    ("place", "end"),
    [*((place, "Ctrl-C") for place in PLACES), *(("optimizer step", e) for e in [*STOPS][1:])],
)
def test_stopped_anywhere_and_resumed_it_equals_the_uninterrupted_run(
    place, end, whole, few, tmp_path, monkeypatch, capsys
):
    (owner, name, when), (stop, code) = PLACES[place], STOPS[end]
    folder, more = tmp_path / "a run", ["--updates_per_rollout", "2"] * ("second" in place)
    if more:
        assert train(whole := tmp_path / "whole", few, *more) == 0
    signal.signal(SIGNALS[2], signal.SIG_DFL)  # nohup has it ignored, and a run leaves it so
    with monkeypatch.context() as patch:
        spoil(patch, owner, name, stop, **when)
        with contextlib.nullcontext() if code else pytest.raises(RuntimeError, match="lost"):
            assert train(folder, few, *more) == code
    shown = capsys.readouterr()
    assert shown.err == {1: "error: step 4: the loss is nan\n", None: ""}.get(code, "stopped\n")
    assert f'step {when["done"]} is saved; go on with: train --resume "{folder}"' in shown.out
    newest = max((folder / "checkpoints").glob("step-??????"))
    assert newest.name == f"step-{when['done']:06d}" and run_folder.read_checkpoint(newest)
    assert (folder / ADAPTER).read_bytes() == (newest / ADAPTER).read_bytes()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert resume(folder) == 0
    assert state_of(folder) == state_of(whole)
    assert len(state_of(folder)["state"]["scores"]) == 5  # STEPS_BACK, and not six


def test_a_folder_that_was_moved_gets_no_other_in_its_place(few, tmp_path, monkeypatch, refused):
    def moved_and_stopped():
        (tmp_path / "run").rename(tmp_path / "moved")
        ctrl_c()

    spoil(monkeypatch, torch.optim.AdamW, "step", moved_and_stopped, done=3)
    refused(train(tmp_path / "run", few), "cannot write to", "run: No such file")
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


def test_a_second_signal_does_not_wait(whole, few, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, scripted.Agent, "roll_out", sigterm, done=3)
        spoil(patch, run_folder, "write", sigterm, done=3, call=4)
        assert train(folder, few) == 143
    assert checkpoints(folder) == ["step-000000", "step-000002", "step-000003"]
    assert not run_folder.read_checkpoint(folder / "checkpoints/step-000003")
    assert resume(folder) == 0
    out = capsys.readouterr().out
    assert "going on after step 2" in out and "set aside" not in out
    assert state_of(folder) == state_of(whole) and checkpoints(folder) == checkpoints(whole)


KILLED = [(run_folder, "write", 0, n) for n in (1, 3)]  # in the first checkpoint
KILLED += [(run_folder, "write", 4, n) for n in (3, 4, 7, 8, 9)]  # logs, checkpoint, adapter
KILLED += [(run_folder, "write", 3, 2), (scripted.Agent, "roll_out", 3, 1)]
KILLED += [(torch.optim.AdamW, "step", 3, 1)]


@pytest.mark.parametrize(("owner", "name", "done", "call"), KILLED)
def test_killed_with_9_it_ends_like_the_uninterrupted_run(
    owner, name, done, call, whole, few, tmp_path, monkeypatch
):
    folder, child = tmp_path / "run", os.fork()
    if not child:
        signal.alarm(60)
        monkeypatch.delattr(signal, "SIGTERM")  # not every system has it
        spoil(monkeypatch, owner, name, killed, done, call)
        os._exit(train(folder, few))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert resume(folder) == 0
    assert state_of(folder) == state_of(whole) and checkpoints(folder) == checkpoints(whole)


def test_a_finished_run_can_be_extended_and_looked_at_again(whole, few, tmp_path, capsys):
    files = {path.suffix for path in whole.glob("checkpoints/**/*") if path.is_file()}
    assert files == {".json", ".safetensors"}  # nothing is pickled
    made_by = json.loads((whole / SIX / "checkpoint.json").read_text())["made_by"]
    assert made_by.keys() >= {"arpo_mini", "torch", "transformers", "peft", "bitsandbytes"}
    folder = tmp_path / "run"
    assert train(folder, few, "--steps", "4", "--save_every", "9") == 0
    before, old = state_of(folder), tmp_path / "old"
    (folder / "checkpoints/step-000000").rename(old).joinpath("here").touch()
    (folder / "checkpoints/step-000000").symlink_to(old)
    assert resume(folder) == 0  # it has nothing left to do, and shows its figures again
    assert "before (95 %)" in capsys.readouterr().out and state_of(folder) == before
    assert resume(folder, "--steps", "6", "--save_every", "5") == 0
    assert checkpoints(folder) == ["step-000005", "step-000006"] and (old / "here").exists()
    assert state_of(folder)[ADAPTER] == state_of(whole)[ADAPTER]
    assert json.loads((folder / "config.json").read_text())["steps"] == 6


def test_no_run_overwrites_another_and_the_newest_is_resumed(few, tmp_path, capsys, refused):
    refused(main("train", "--output_dir", tmp_path / "x", "--resume"), "no run in")
    for name in ("x", "x", "x", "x-other"):
        assert train(tmp_path / name, few, "--steps", "1", "--eval_part", "0") == 0
    for number, name in enumerate(("x-2", "x", "x-3")):
        os.utime(tmp_path / name / "config.json", (number, number))
    (tmp_path / "x-4").mkdir()  # of no run
    assert main("train", "--output_dir", tmp_path / "x", "--resume", "--steps", "2") == 0
    assert f"going on after step 1 in {tmp_path / 'x-3'}" in capsys.readouterr().out


# ---- damaged ------------------------------------------------------------------------------

JUNK = ["", "junk", "[1]", "null", "{}", "\x00", "[" * 100_000, '{"step":' * 9999, '{"step": 2']
JUNK += [  # all that a tree needs, but for the step
    f'{{"step": {step}, "question": "", "nodes": [], "leaves": []}}'
    for step in ("null", "true", "1.5", "-1", '"2"', "1e999")
]


@pytest.mark.parametrize("name", LOGS)
def test_a_line_that_cannot_be_read_is_left_out_and_the_others_stay(name, copy, capsys):
    """Whatever it is: the file as it was stays beside, and what was left out is said."""
    good, junk = (copy / name).read_bytes().splitlines(keepends=True), [x for x in JUNK if x]
    if name != "rollouts.jsonl":  # in which two trees of a step may be equal
        junk.append(good[0].decode().strip())
    for some, aside in ((junk[:1], f"{name}.damaged"), (junk, f"{name}.damaged2")):
        damaged = b"".join([good[0], *(line.encode() + b"\n" for line in some), *good[1:]])
        (copy / name).write_bytes(damaged)
        assert resume(copy) == 0
        out = capsys.readouterr().out
        more = f", and {len(junk) - 1} more lines" if len(some) > 1 else ""
        assert f"{name}, line 2: " in out and f"{more}; left out here and kept in {aside}" in out
        assert (copy / aside).read_bytes() == damaged
        assert (copy / name).read_bytes() == b"".join(good) and "Traceback" not in out
    (copy / name).write_bytes(b"".join(sorted(good, key=lambda line: -json.loads(line)["step"])))
    assert resume(copy) == 0 and (copy / name).read_bytes() == b"".join(good)


def edited(name, change):
    """Damage: a file of the folder, whose bytes are changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def cut(name, lines):
    return edited(name, lambda data: b"".join(data.splitlines(keepends=True)[:-lines]))


def write(name, content):
    return edited(name, lambda data: content.encode())


def changed(name, **values):
    return edited(name, lambda data: json.dumps(json.loads(data) | values).encode())


def bit_flipped(name):
    return edited(name, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])


def without(name, then=lambda path: None):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        then(path)

    return damage


SIX = "checkpoints/step-000006"
FALLS_BACK = [  # to step 4, and ends like the uninterrupted run
    *(edited(name, lambda data: data[:-20]) for name in LOGS),
    edited("metrics.jsonl", lambda data: data[:-1]),
    *(cut("metrics.jsonl", lines) for lines in (1, 2)),
    without(f"{SIX}/checkpoint.json", then=Path.mkdir),
    bit_flipped(f"{SIX}/{ADAPTER}"),
    without(SIX),
    without(SIX, then=Path.touch),
]


@pytest.mark.parametrize("damage", FALLS_BACK)
def test_the_older_checkpoint_takes_over(damage, copy, whole, capsys):
    damage(copy)
    assert resume(copy) == 0
    assert "going on after step 4" in capsys.readouterr().out
    assert state_of(copy) == state_of(whole)


ODD = [
    *(write("checkpoint.json", junk) for junk in JUNK),
    *(changed("checkpoint.json", sha256=x) for x in (None, 7, [], {}, {"../x": 1}, "x")),
    *(changed("checkpoint.json", step=x) for x in (None, 5, "6", [6])),
    changed("checkpoint.json", made_by=[1]),
    *(bit_flipped(name) for name in run_folder.CHECKPOINT),
    *(without(name, then=Path.mkdir) for name in ("checkpoint.json", *run_folder.CHECKPOINT)),
]


def test_a_checkpoint_is_whole_or_does_not_count(whole, tmp_path):
    for number, damage in enumerate(ODD):
        checkpoint = tmp_path / str(number) / "step-000006"
        shutil.copytree(whole / SIX, checkpoint)
        assert run_folder.read_checkpoint(checkpoint)["step"] == 6
        damage(checkpoint)
        assert run_folder.read_checkpoint(checkpoint) is None, number


GOES_ON = {  # after step 6, with a word
    "metrics.jsonl has no line of 3 steps, the first is 4": cut("metrics.jsonl", 3),
    "metrics.jsonl has no line of 6 steps": without("metrics.jsonl"),
    "metrics.jsonl, line 1: groups: it must be a number": edited(
        "metrics.jsonl", lambda data: data.replace(b'"groups":', b'"groups": true, "was":', 1)
    ),
    "metrics.jsonl, line 0: Is a directory": without("metrics.jsonl", then=Path.mkdir),
    "the evaluation after step 0 is not": without("evaluations.jsonl"),
    "line 1: no figures": write("evaluations.jsonl", '{"step": 0, "decoding": "greedy", "domains":'
        '{}, "questions": 3, "accuracy": 1, "well_formed": 1, "tool_calls": 1}\n'),
    "going on after step 6": without("adapter"),
}  # fmt: skip


@pytest.mark.parametrize("words", GOES_ON)
def test_it_goes_on_without_what_is_lost(words, copy, whole, capsys):
    GOES_ON[words](copy)
    assert resume(copy, "--steps", "7") == 0
    out = capsys.readouterr().out
    assert words in out and "going on after step 6" in out
    assert lines_of(copy, "metrics.jsonl")[-1]["step"] == 7
    known = {(e["step"], e["decoding"]) for e in lines_of(copy, "evaluations.jsonl")}
    if "evaluation" in words or "figures" in words:  # with the trained adapter they would be wrong
        assert min(known)[0] == 6 and " -  " in out
    else:
        assert (0, "sampled") in known


REFUSED = {
    "none of its checkpoints is whole": lambda folder: [
        bit_flipped(f"checkpoints/{name}/state.json")(folder) for name in checkpoints(folder)
    ],
    "its checkpoints are gone": without("checkpoints"),
    "config.json: No such file": without("config.json"),
    "config.json: Is a directory": without("config.json", then=Path.mkdir),
    "is not a run": write("config.json", "[" * 100_000),
    "config.json: 'list'": write("config.json", "[]"),
    "--steps None: it must be of type int": changed("config.json", steps=None),
    f"not of version {run_folder.VERSION}, which does not have the settings keep, packed": changed(
        "config.json", keep=2, packed=True
    ),
    "cannot write to": without("lock", then=Path.mkdir),
    "peft is 0.3 there and": edited(
        f"{SIX}/checkpoint.json", lambda data: re.sub(rb'"peft": "[^"]*"', b'"peft": "0.3"', data)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_gone_on_with_is_one_line_and_is_left_as_it_is(words, copy, refused):
    REFUSED[words](copy)
    before = contents(copy)
    refused(resume(copy), words)
    assert contents(copy) == before


def contents(folder):
    return sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


OTHERS = {
    "--learning_rate 0.5": "learning_rate is 0.001 there and 0.5 here",
    "--seed 1 --group_size 4": "group_size is 2 there and 4 here; seed is 0 there and 1 here",
    "--adapter elsewhere": "adapter is None there and elsewhere here",
    "--eval_path OTHER": "content of eval_path is",
    "--steps 3": "--steps 3: the run has made 6 steps already",
    "--output_dir elsewhere": "leave --output_dir out",
    "--eval_path no/such.jsonl": "no/such.jsonl",
}


@pytest.mark.parametrize("more", OTHERS)
def test_other_settings_and_data_are_refused_by_name(more, whole, tmp_path, refused):
    other, before = write_questions(tmp_path / "other.jsonl", domains=2), contents(whole)
    refused(resume(whole, *more.replace("OTHER", other).split()), OTHERS[more])
    assert contents(whole) == before


def test_another_model_and_a_folder_in_use_are_refused(whole, copy, monkeypatch, refused):
    def other_net(net, real=scripted.Net.__init__):
        real(net)
        net.linear.weight.data[0, 0] += 0.01

    with filelock.FileLock(copy / "lock"):
        refused(resume(copy), f"{copy} is in use by another process")
    monkeypatch.setattr(scripted.Net, "__init__", other_net)
    refused(resume(copy), "weights of model_name is", "there and")


# ---- a machine that does not play along ---------------------------------------------------


def test_a_full_disk(whole, few, tmp_path, monkeypatch, capsys, refused):
    folder, full = tmp_path / "run", Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
    with monkeypatch.context() as patch:
        spoil(patch, run_folder, "write", full, done=4, call=6)
        refused(train(folder, few), f"cannot write to {folder}: No space")
    assert [m["step"] for m in lines_of(folder, "metrics.jsonl")] == [1, 2, 3, 4]
    assert resume(folder) == 0 and "going on after step 2" in capsys.readouterr().out
    assert state_of(folder) == state_of(whole)


@pytest.mark.parametrize("function", ["open", "fsync"])
def test_a_folder_that_cannot_be_synced_is_no_disk_that_fails(function, tmp_path, monkeypatch):
    """Windows opens none, and some systems sync none."""
    for number in (errno.EACCES, errno.EINVAL, errno.EIO, errno.ENOSPC):
        fails = number in (errno.EIO, errno.ENOSPC)
        monkeypatch.setattr(os, function, Mock(side_effect=OSError(number, "broken")))
        with pytest.raises(OSError, match="broken") if fails else contextlib.nullcontext():
            run_folder.sync_folder(tmp_path)


@pytest.mark.parametrize("wanted", ["/dev/null/x", "x" * 5000, "loop/x"])
def test_a_folder_that_cannot_be(wanted, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    refused(main("train", "--output_dir", wanted, "--eval_part", "0"), "--output_dir")
