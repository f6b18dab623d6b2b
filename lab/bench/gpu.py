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
from statistics import median

import torch

from app.cli import refuse_unwritable, write_text
from app.config import PRESETS, Config
from app.screen import say
from arpo_mini import rollout
from data.files import UserError
from engine.memory import GIB, OutOfMemory, free_memory, weight_bytes
from engine.writer import Writer

from . import plan
from .job import Size, clock, counted, forced, made_on, peak_bytes

FIGURES = "seconds seconds_rollout seconds_update generated_tokens train_tokens".split()
TURNS, SEGMENT = 3, 64  # of a trajectory
FEW = {"initial_rollouts": 2, "questions_per_step": 1}
REPEATS = 2  # timed steps, after one that is watched for its peak
SHAPES = ("qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-0.6b")
CHECKS = {  # each may take a quarter of the time
    "fast tests": [*"-m pytest -q -p no:cacheprovider -n 8 -m".split(), "not slow"],
    "default run": "arpo_mini.py train --output_dir runs/gpu".split(),
}
# shape, trajectories, tokens of each, GiB that the run must stay within
GOALS = [("qwen3-1.7b", 16, 1024, 6), ("qwen3-4b", 8, 1024, 8), ("qwen3-8b", 8, 2048, 12)]


def cases() -> dict[str, tuple[str, dict]]:
    """Name -> shape and settings: the goals, the presets, then 4-bit beside bfloat16."""
    names = ("group_size", "max_total_tokens", "memory_gb", "load_in_4bit")
    wanted = [(*goal, True) for goal in GOALS]
    for preset in (PRESETS[card] for card in plan.CARDS):
        wanted += [(shape, *(preset[k] for k in names[:3]), True) for shape in SHAPES]
    wanted += [(shape, 8, 1024, None, four) for shape in SHAPES for four in (True, False)]
    found = {"qwen3-1.7b, --preset 8gb": ("qwen3-1.7b", dict(PRESETS["8gb"]))}
    for shape, group, tokens, gib, four in wanted:
        name = f"{shape} {'4-bit' if four else 'bf16'}, {group} paths of {tokens} tokens"
        name += f", within {gib:g} GiB" if gib else ""
        found[name] = (shape, dict(zip(names, (group, tokens, gib, four), strict=True)))
    return found


def measure(name: str, settings: dict, config: Config) -> dict:
    """A step that is watched for its peak, beside the predicted one; then medians of others."""
    config = dataclasses.replace(config, **FEW | settings)
    shape, steps = plan.model_config(name), []
    # the results, and a prompt of about their length
    result = config.max_total_tokens // (TURNS + 1) - SEGMENT
    job = forced(config, Size(TURNS, SEGMENT, result), shape)
    policy = job.agent.policy
    held = torch.cuda.memory_allocated() if torch.cuda.is_available() else weight_bytes(policy.lm)
    with counted(policy) as seen:
        peak = held + peak_bytes(lambda: job.step(1))
    for number in range(2, REPEATS + 2):
        started = clock()
        steps.append(job.step(number) | {"seconds": clock() - started})
    m = {name: median(step[name] for step in steps) for name in FIGURES}
    limits, rollouts = policy.limits, config.questions_per_step * config.group_size
    at_once = (min(limits.fitted(config).rollout_rows, rollouts), seen["largest"], limits.recompute)
    predicted = plan.predict(plan.empty(shape), config, *at_once, policy.lm.dtype.itemsize)
    figures = {"peak GiB": peak / GIB, "plan GiB": predicted["peak GiB"], "seconds": m["seconds"]}
    figures["written/s"] = m["generated_tokens"] / m["seconds_rollout"]
    return figures | {"trained/s": m["train_tokens"] / m["seconds_update"]}


def measured(name: str, settings: dict, config: Config) -> dict:
    """`measure`, then the GPU as it was before; that the memory ran out is a figure, too."""
    try:
        return measure(name, settings, config)
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        free_memory()
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
    """First the cases that matter most, then profile and checks, then the other cases."""
    end, items = time.monotonic() + seconds, [*some.items()]
    report = sweep(dict(items[: len(GOALS) + 1]), config, 0.4 * seconds, path)
    report["a decoded token"] = decoding(*items[0][1], config)
    say(f"a decoded token: {report['a decoded token']}")
    for name, command in CHECKS.items():
        report[name] = check(command, seconds / 4)
        say(f"{name}: {' | '.join(report[name])}")
    write_text("--json", path, json.dumps(report, indent=1) + "\n")
    return sweep(dict(items[len(GOALS) + 1 :]), config, end - time.monotonic(), path, report)


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


def check(command: list[str], seconds: float) -> list[str]:
    """The last lines that it printed."""
    try:
        how = {"capture_output": True, "text": True, "timeout": seconds}
        return subprocess.run([sys.executable, *command], **how).stdout.splitlines()[-20:]
    except subprocess.TimeoutExpired:
        return [f"not done in {seconds:.0f} seconds"]


def sweep(some: dict, config: Config, seconds: float, path: str, report=None) -> dict:
    """The cases in turn while there is time; the figures so far are written after each."""
    report = report or made_on(config) | {"figures": {}}
    figures, started, longest = report["figures"], time.monotonic(), 0.0
    for name, case in some.items():
        began = time.monotonic()
        if began - started + longest > seconds:
            say(f"the time is over before {name}")
            break
        figures[name] = measured(*case, config)
        write_text("--json", path, json.dumps(report, indent=1) + "\n")
        say(f"{name}: {figures[name].get('error', 'measured')}")
        longest = max(longest, time.monotonic() - began)
    return report
