"""Lives of a run that is killed again and again: `lives.py FOLDER EVAL_PATH`, a JSON line each.

Every life is a fork of this process, which has imported everything and holds one thread. It tells
through a pipe which phase of a step it enters and leaves; somewhere in the phase that is due it is
killed, and the next life resumes. A run that ends is followed by another one with another seed.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import GenerationMixin

sys.path.insert(0, str(Path(__file__).parent.parent))
import app.cli
import arpo_mini
from app.run_folder import RunFolder

PHASES = {  # where a life can be killed: (owner, function, its use at most, seconds in it at most)
    "rollout": (GenerationMixin, "generate", 60, 0.05),
    "update": (torch.Tensor, "backward", 4, 0.04),
    "checkpoint": (RunFolder, "save", 4, 0.02),
}
SAVE_EVERY, KILLS_EACH = 2, 8
SMALL = (
    f"--steps 16 --save_every {SAVE_EVERY} --questions_per_step 1 --group_size 3"
    " --initial_rollouts 1 --eval_every 6 --max_segment_tokens 40"
).split()


def announce(pipe):
    for phase, (owner, name, *_) in PHASES.items():
        real = getattr(owner, name)

        def wrapped(*args, phase=phase, real=real, **kwargs):
            os.write(pipe, f"{phase}\n".encode())
            result = real(*args, **kwargs)
            os.write(pipe, b"\n")
            return result

        setattr(owner, name, wrapped)


def live(folder, seed, eval_path):
    """A child that trains or goes on: its process id and the pipe that it tells its phases to."""
    told, telling = os.pipe()
    child = os.fork()
    if child:
        os.close(telling)
        return child, told
    os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    announce(telling)
    new = ["--output_dir", str(folder), "--seed", str(seed), "--eval_path", eval_path, *SMALL]
    args = ["train", *(["--resume", str(folder)] if folder.exists() else new)]
    code = app.cli.main(args, arpo_mini.train, arpo_mini.load_agent)
    sys.stdout.flush()
    os._exit(code)


def end(child, told, phase=None, times=0, delay=0.0):
    """Kills the child `delay` seconds after it entered the phase so often: (phase, exit code)."""
    text, sent = "", False
    while chunk := os.read(told, 1000).decode():
        text += chunk
        if phase and not sent and text.count(f"{phase}\n") >= times:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            sent = True
    os.close(told)
    _, status = os.waitpid(child, 0)
    last = text.split("\n")[-2:][0]
    return (last or "between") if sent else None, os.waitstatus_to_exitcode(status)


def lost_steps(folder):
    """Steps that were logged and are not in a checkpoint."""
    log = folder / "metrics.jsonl"
    logged = log.read_bytes().count(b"\n") if log.exists() else 0
    saved = [int(p.parent.name[5:]) for p in folder.glob("checkpoints/step-??????/checkpoint.json")]
    return logged - max(saved, default=0)


def main(place, eval_path):
    torch.set_num_threads(1)
    rng, killed, number = random.Random(0), [], 0
    while number < 9 and (number == 0 or min(map(killed.count, PHASES)) < KILLS_EACH):
        number += 1
        assert end(*live(place / f"whole-{number}", number, eval_path)) == (None, 0)
        folder, code = place / f"killed-{number}", None
        while code != 0:
            due = min(PHASES, key=killed.count)
            due = due if killed.count(due) < KILLS_EACH else None
            _, _, most, longest = PHASES[due] if due else (0, 0, 1, 0)
            times, delay = rng.randint(1, most), rng.uniform(0, longest)
            phase, code = end(*live(folder, number, eval_path), due, times, delay)
            killed += [phase] if code else []
            life = {"run": number, "ended_in": phase, "code": code, "lost": lost_steps(folder)}
            print(json.dumps({**life, "save_every": SAVE_EVERY}), flush=True)
            assert code in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
