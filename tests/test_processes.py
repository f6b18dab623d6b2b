"""Two processes over gloo on a CPU train as one does; one that ends takes the other with it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import common
import pytest
import torch
from common import ECHO, ROOT, TINY, TINY_QUESTIONS, TinyPolicy, lines_of, roll_out, small_policy
from test_update import flat_gradient, some_rewards

from app.config import Config
from app.run_folder import RunFolder
from arpo_mini import credit, update
from data.files import UserError
from engine import processes

QUESTIONS = TINY_QUESTIONS * 2 + TINY_QUESTIONS[:1]  # three for one process, two for the other
FEW = (
    "--questions_per_step 3 --group_size 3 --max_segment_tokens 40 --eval_every 2 --eval_part 1"
    " --save_every 2 --steps"
).split()


def of_a_step(share=slice(None)):
    """Figures and gradient of an update on these trees, and the adapter after a second one."""
    policy = small_policy(TinyPolicy)
    groups = list(enumerate(roll_out(policy, TINY, ECHO, QUESTIONS)))[share]
    rows = [row for i, g in groups for row in credit(g, some_rewards(g, i), TINY)]

    def train(lr):
        def work(some, seed):
            optimizer = torch.optim.SGD(policy.parameters, lr=lr)
            return update(policy, optimizer, rows, TINY), [[]] * len(some), some

        return policy.processes.shared(work, QUESTIONS, 0)[0]

    figures, gradient = train(0.0), flat_gradient(policy)
    train(1.0)
    return {"figures": figures, "grad": gradient, "after": [p.data for p in policy.parameters]}


def launch(*args):
    """Two processes that know of each other, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    env = os.environ | there | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    command = [sys.executable, *map(str, args)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    return [subprocess.Popen(command, env=env | rank, **both) for rank in ranks]


def ended(started):
    found = [(process.communicate(timeout=300), process.returncode) for process in started]
    # peft's import says that a kernel is missing, before `engine` can silence it
    lines = [[x for x in err.splitlines() if "gemm_4bit" not in x] for (_, err), _ in found]
    return [(code, out, err) for ((out, _), code), err in zip(found, lines, strict=True)]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_and_the_same_adapter(tmp_path):
    for code, _, error in ended(launch(__file__, "step", tmp_path)):
        assert code == 0, error
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    alone = of_a_step()
    for each in (one, two):
        assert (each["grad"] - alone["grad"]).norm() < 1e-6 * alone["grad"].norm()
        assert each["figures"] == pytest.approx(alone["figures"], rel=1e-5, abs=2e-6)
    assert all(map(torch.equal, one["after"], two["after"]))


def stopped(started, log, number, whom):
    """After one more step is logged, in the middle of the next one."""
    lines = log.read_bytes().count(b"\n") if log.exists() else 0
    while not log.exists() or log.read_bytes().count(b"\n") == lines:
        time.sleep(0.05)
        assert started[0].poll() is None
    for process in started[whom]:
        process.send_signal(number)
    return ended(started)


@pytest.mark.slow
def test_a_run_of_two_processes_from_its_beginning_to_its_end(tmp_path, tmp_path_factory):
    """Killed, interrupted, resumed; the same adapters after every step; process 0 writes alone."""
    run, resume = tmp_path / "run", ["--resume", tmp_path / "run"]
    train, log = (__file__, "train", tmp_path), run / "metrics.jsonl"
    data = common.write_questions(tmp_path_factory.mktemp("data") / "few.jsonl", each=2)
    started = launch(*train, *FEW, 50, "--eval_path", data, "--output_dir", run)
    (code, out, error), killed = stopped(started, log, signal.SIGKILL, slice(1, None))
    assert (code, killed[0], killed[1]) == (2, -signal.SIGKILL, "")
    assert error == ["error: another process of this run has ended, and so does this one"]
    assert f"is saved; go on with: train --resume {run}" in out
    for code, out, error in stopped(launch(*train, *resume), log, signal.SIGINT, slice(None)):
        assert (code, error) == (130, ["stopped"]), out
    steps = len(lines_of(run, log.name)) + 2
    one, two = ended(launch(*train, *resume, "--steps", steps))
    assert (one[0], two[0], two[1]) == (0, 0, ""), [*one, *two]
    sums = [lines_of(tmp_path, f"{rank}.jsonl") for rank in (0, 1)]
    assert sums[0][1:] == sums[1] and len({*map(str, sums[0])}) == len(sums[0]) > 2
    found = [(m["step"], m["groups"], m["rollouts"]) for m in lines_of(run, log.name)]
    assert found == [(step, 3, 9) for step in range(1, steps + 1)]
    assert lines_of(run, "evaluations.jsonl")[-1]["questions"] == 6
    assert {path.name for path in tmp_path.iterdir()} == {"run", "0.jsonl", "1.jsonl"}
    refused = common.python("arpo_mini.py", "train", "--resume", run, "--steps", "99")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "processes is 2 there and 1 here" in refused.stderr


# ---- in one process -----------------------------------------------------------------------


def test_one_process_meets_nobody_and_a_gpu_is_not_shared(monkeypatch):
    alone, given = processes.Processes(), object()
    assert alone.shared(lambda some, seed: (some, seed, given), [1, 2], 3) == ([1, 2], 3, given)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"^process 1 has no GPU of its own: this machine has 1$"):
        processes.Processes()


def test_out_of_memory_is_repeated_alone_until_it_has_met_the_others(monkeypatch):
    some = processes.Processes()
    some.count = 2

    def work(questions, seed):
        some.met = questions == [5]
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        some.shared(work, [7, 8], 0)
    with pytest.raises(UserError, match=r"^no memory; it takes a smaller --micro_batch_tokens$"):
        some.shared(work, [5, 8], 0)
    monkeypatch.setattr(some, "exchange", lambda mine: [mine, (3, mine[1])])
    policy = small_policy(TinyPolicy)
    with pytest.raises(UserError, match=r"^the processes of this run differ in settings, versions"):
        RunFolder(Config(), processes=some).start(policy.model, None, policy.scaler, None, [1])
    with pytest.raises(UserError, match=r"^--questions_per_step 1: each of 2 processes needs a"):
        RunFolder(Config(questions_per_step=1), processes=some)


if __name__ == "__main__":
    what, folder, *args = sys.argv[1:]
    rank = processes.joined().rank
    if what == "step":
        torch.save(of_a_step(slice(rank, None, 2)), Path(folder) / f"{rank}.pt")
        sys.exit()
    remember = RunFolder.remember
    (Path(folder) / f"{rank}.jsonl").unlink(missing_ok=True)

    def told(run, step):
        remember(run, step)
        sums = [p.double().sum().item() for p in run.model.parameters() if p.requires_grad]
        with (Path(folder) / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(sums) + "\n")

    RunFolder.remember = told
    sys.exit(common.arpo("train", *args))
