"""Measures one GPU in 9 minutes, the most important first: goals, a training under the 8 GB preset,
a decoded token profiled, the fast tests, the default run, presets, dtypes.

Models have weights of no meaning and forced trajectories of three tool turns, one question a step.
"""

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import product
from statistics import median

import torch
from accelerate.utils.memory import clear_device_cache

from app.cli import refuse_unwritable, write_text
from app.config import PRESETS, Config
from app.screen import say
from arpo_mini import rollout
from data.files import UserError
from engine.memory import GIB, OutOfMemory, weight_bytes
from engine.writer import Writer

from . import plan
from .job import Size, forced, made_on, peak_bytes

TURNS, SEGMENT = 3, 64  # of a trajectory
FEW = {"initial_rollouts": 2, "questions_per_step": 1}
REPEATS = 2  # timed steps, after one that is watched for its peak
SHAPES = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-0.6b")
CHECKS = {
    "fast tests": [*"-m pytest -q -p no:cacheprovider -n 8 -m".split(), "not slow"],
    "default run": "arpo_mini.py train --output_dir runs/gpu".split(),
}
# shape, trajectories, tokens of each, GiB that the run must stay within
GOALS = [("qwen3-1.7b", 16, 1024, 6), ("qwen3-4b", 8, 1024, 8), ("qwen3-8b", 8, 2048, 12)]


def cases() -> dict[str, tuple[str, dict]]:
    """Name -> shape and settings: a training, the goals, the presets, 4-bit beside bfloat16."""
    found = {"qwen3-1.7b, --preset 8gb": ("qwen3-1.7b", PRESETS["8gb"])}
    for shape, group, tokens, gib in GOALS:
        name = f"{shape} 4-bit, {group} paths of {tokens} tokens, within {gib} GiB"
        sizes = {"group_size": group, "max_total_tokens": tokens, "memory_gb": gib}
        found[name] = (shape, sizes | {"load_in_4bit": True})
    for card, shape in product(plan.CARDS, SHAPES):
        found[f"{shape}, --preset {card}"] = (shape, PRESETS[card])
    for shape, bits in product(SHAPES, ("4-bit", "bf16")):
        sizes = {"group_size": 8, "max_total_tokens": 1024, "load_in_4bit": bits == "4-bit"}
        found[f"{shape} {bits}, 8 paths of 1024 tokens"] = (shape, sizes)
    return found


def measure(name: str, settings: dict, config: Config) -> dict:
    """A step that is watched for its peak, beside the predicted one; then medians of others."""
    config = dataclasses.replace(config, **FEW | settings)
    shape = plan.model_config(name)
    result = config.max_total_tokens // (TURNS + 1) - SEGMENT  # the prompt is about as long
    job = forced(config, Size(TURNS, SEGMENT, result), shape)
    lm, limits = job.agent.policy.lm, job.agent.policy.limits
    held = torch.cuda.memory_allocated() or weight_bytes(lm)  # on a CPU: 0
    peak = held + peak_bytes(lambda: job.step(1))
    rows = min(limits.fitted(config).rollout_rows, config.questions_per_step * config.group_size)
    sizes = (rows, limits.in_use[1], limits.recompute, lm.dtype.itemsize)  # of the last, long pass
    predicted = plan.predict(plan.empty(shape), config, *sizes)
    steps = [job.step(number) for number in range(2, REPEATS + 2)]
    figures = {"peak GiB": peak / GIB, "plan GiB": predicted["peak GiB"]}
    figures["seconds"] = median(step["seconds"] for step in steps)
    figures["written/s"] = median(s["generated_tokens"] / s["seconds_rollout"] for s in steps)
    figures["trained/s"] = median(s["train_tokens"] / s["seconds_update"] for s in steps)
    return figures


def measured(name: str, settings: dict, config: Config) -> dict:
    """`measure`, then the GPU as it was before; that the memory ran out is a figure, too."""
    try:
        return measure(name, settings, config)
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        clear_device_cache(garbage_collection=True)
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def run(config: Config, own) -> dict:
    if not torch.cuda.is_available():
        raise UserError("no GPU was found; the other commands of `python -m lab.bench` need none")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = own.json or f"lab/results/gpu-{name}.json"
    refuse_unwritable("--json", path)
    return whole(cases(), config, 60 * own.minutes, path)


def whole(some: dict, config: Config, seconds: float, path: str) -> dict:
    """Part after part while there is time; what was found so far is written after each.

    The first cases, which matter most, then profile and checks, then the other cases.
    """
    end, longest, report = time.monotonic() + seconds, 0.0, made_on(config) | {"figures": {}}
    work = {name: partial(measured, *case, config) for name, case in some.items()}
    first, *others = some
    order = [first, *others[: len(GOALS)], "a decoded token", *CHECKS, *others[len(GOALS) :]]
    work["a decoded token"] = partial(decoding, *some[first], config)
    work |= {name: partial(check, command, end) for name, command in CHECKS.items()}
    for name in order:
        began = time.monotonic()
        if began + longest > end:
            say(f"the time is over before {name}")
            break
        found = work[name]()
        (report["figures"] if name in some else report)[name] = found
        write_text("--json", path, json.dumps(report, indent=1) + "\n")
        say(f"{name}: {found}")
        longest = max(longest, time.monotonic() - began)
    return report


def decoding(name: str, settings: dict, config: Config) -> dict:
    """What one token of all rows asks for: kernels launched, times that the CPU waits for it."""
    config = dataclasses.replace(config, **FEW | settings)
    job = forced(config, Size(1, 16, 16), plan.model_config(name))
    writer = Writer(job.agent.policy, job.agent.config)
    with torch.profiler.profile() as seen:  # of the CPU, and of a GPU where there is one
        rollout(writer, job.asked(1), job.agent.config, job.agent.tools, seed=1)
    events = Counter(event.name for event in seen.events()).items()
    kinds = {"launches": "LaunchKernel", "waits": "Synchronize", ".item()": "_local_scalar_dense"}
    totals = {kind: sum(n for e, n in events if part in e) for kind, part in kinds.items()}
    return {kind: round(n / writer.decode_steps, 1) for kind, n in totals.items()}


def check(command: list[str], end: float) -> str:
    """The last lines that it printed. It may take half of the time that is left."""
    seconds = (end - time.monotonic()) / 2
    try:
        how = {"capture_output": True, "text": True, "timeout": seconds}
        done = subprocess.run([sys.executable, *command], **how)
        return " | ".join(done.stdout.splitlines()[-20:])
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} seconds"
