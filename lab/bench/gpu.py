"""Peak memory and speed of every shape on one GPU, and a proof of the presets under a cap.

Random weights, forced trajectories of three tool turns, one question a step, one trajectory's
tokens or more a backward pass with gradient checkpointing. Every case begins with nothing on the
GPU and its figures are written at once: the command goes on where an earlier call stopped.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from transformers import PretrainedConfig

import arpo_mini
import engine.memory as memory
from advantage import shared_by
from arpo_mini import write_text
from engine.memory import GIB
from engine.packing import cut, micro_batches
from app.config import PRESETS, Config
from app.screen import UserError, console

from . import plan
from .job import Job, Size, forced, size_of
from .measure import machine, now, peak_bytes
from .shapes import SHORT, model_config

TURNS, SEGMENT = 3, 64
BACKWARD_TOKENS = 4096  # of one backward pass: the longest trajectory fits
CONTEXTS, GROUPS = (1024, 4096), (8, 16)


@dataclass(frozen=True)
class Case:
    shape: str
    load_in_4bit: bool
    group_size: int
    context: int
    preset: str | None = None  # under the cap of this card, with its settings

    @property
    def name(self) -> str:
        bits = "4-bit" if self.load_in_4bit else "bf16"
        capped = f", preset {self.preset}" if self.preset else ""
        return f"{self.shape} {bits}, group {self.group_size}, {self.context} tokens{capped}"


GOALS = {  # GiB that these are to stay within
    Case("qwen3-1.7b", True, 16, 1024): 6,
    Case("qwen3-4b", True, 8, 1024): 8,
    Case("qwen3-8b", True, 8, 2048): 12,
}


def cases_of(shape: str) -> list[Case]:
    sizes = [(four, g, c) for four in (True, False) for g in GROUPS for c in CONTEXTS]
    capped = [
        Case(shape, True, PRESETS[card]["group_size"], PRESETS[card]["max_total_tokens"], card)
        for card in plan.CARDS
    ]
    cases = [Case(shape, *size) for size in sizes] + capped
    return cases + [goal for goal in GOALS if goal.shape == shape and goal not in cases]


def in_order(shapes: list[str]) -> list[Case]:
    """What a goal asks first, then the presets, then the rest: time on a GPU may be short."""
    cases = [case for shape in shapes for case in cases_of(shape)]
    return sorted(cases, key=lambda case: (case not in GOALS, case.preset is None))


def config_of(case: Case, config: Config) -> Config:
    changes = {
        "load_in_4bit": case.load_in_4bit,
        "group_size": case.group_size,
        "initial_rollouts": 2,
        "questions_per_step": 1,
        "max_segment_tokens": SEGMENT,
    }
    if case.preset:  # its memory_gb decides what is computed at once
        changes |= PRESETS[case.preset] | {"max_segment_tokens": SEGMENT, "questions_per_step": 1}
    else:
        changes |= {"gradient_checkpointing": True, "micro_batch_tokens": BACKWARD_TOKENS}
    return dataclasses.replace(config, **changes)


def measure(case: Case, config: Config) -> dict:
    config, shape = config_of(case, config), model_config(case.shape)
    size = size_of(TURNS, case.context, config.max_segment_tokens)
    return measured(forced(config, size, shape), shape, size, repeats=2)


def largest_batch(groups: list, limit: float) -> int:
    """Tokens of the largest backward pass, padding included: a tree beyond the limit is cut."""
    parts = [part for leaves in groups for part in cut(leaves, limit)]
    rows = [range(sum(len(s.token_ids) for s in shared_by(part))) for part in parts]
    return max(len(some) * max(map(len, some)) for some in micro_batches(rows, limit))


def measured(job: Job, shape: PretrainedConfig, size: Size, repeats: int) -> dict:
    """A warm-up step that is watched for its peak, beside the predicted one; then timed ones."""
    config, policy = job.config, job.policy
    steps = []

    def step(number: int) -> dict:
        started = now()
        asked = job.asked(number)
        metrics, groups, _ = arpo_mini.train_step(
            policy, job.optimizer, asked, config, job.tools, number
        )
        steps.append(groups)
        return metrics | {"seconds": now() - started}

    on_gpu = torch.cuda.is_available()
    held = torch.cuda.memory_allocated() if on_gpu else memory.weight_bytes(policy.lm)
    peak = held + peak_bytes(lambda: step(1))
    timed = sorted((step(i + 2) for i in range(repeats)), key=lambda figures: figures["seconds"])
    figures = timed[len(timed) // 2]
    fitted = policy.chunks.fitted(config)  # as it was, also after running out of memory
    sizes = plan.Sizes(
        rows=int(min(fitted.rollout_rows, config.questions_per_step * config.group_size)),
        columns=size.context,
        read=size.result,
        tokens=largest_batch(steps[0], fitted.micro_batch_tokens),
        scored=int(min(fitted.micro_batch_tokens, figures["generated_tokens"])),
        recompute=bool(fitted.gradient_checkpointing),
    )
    b = policy.lm.dtype.itemsize
    predicted = plan.predict(shape, plan.count(shape), config, sizes, b)["peak"]["both"]
    return {
        "peak_bytes": peak,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "predicted_bytes": predicted,
        "predicted_over_measured": predicted / peak,
        "seconds": figures["seconds"],
        "seconds_rollout": figures["seconds_rollout"],
        "seconds_update": figures["seconds_update"],
        "generated_tokens_per_second": figures["generated_tokens"] / figures["seconds_rollout"],
        "trained_tokens_per_second": figures["train_tokens"] / figures["seconds_update"],
        "generated_tokens": figures["generated_tokens"],
        "train_tokens": figures["train_tokens"],
        "train_tokens_unpacked": figures["train_tokens_unpacked"],
        **dataclasses.asdict(sizes),
    }


def under_cap(case: Case, config: Config) -> dict:
    """`measure`, where a preset is to prove itself with its card's memory and no more."""
    if case.preset and torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        card = int(case.preset.removesuffix("gb")) * GIB
        if card > whole:
            return {"error": f"this GPU has less than {case.preset}"}
        torch.cuda.set_per_process_memory_fraction(card / whole)
    try:
        return measure(case, config)
    except (torch.OutOfMemoryError, memory.OutOfMemory) as error:
        return {"error": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def sweep(cases: list[Case], config: Config, seconds: float, path: Path) -> dict:
    """Every case that `path` does not hold yet, until the time is over; written after each."""
    started = time.monotonic()
    report = {"machine": machine(), "cases": {}}
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
    missing = [case for case in cases if case.name not in report["cases"]]
    for i, case in enumerate(missing):
        if time.monotonic() - started > seconds:
            console.print(f"{len(missing) - i} of {len(cases)} cases are left: call again")
            break
        report["cases"][case.name] = figures = under_cap(case, config)
        goal = GOALS.get(case)
        if goal and "error" not in figures:
            figures |= {"goal_gib": goal, "goal_met": figures["peak_bytes"] <= goal * GIB}
        write_text("--output_dir", str(path), json.dumps(report, indent=2) + "\n")
        console.print(f"{case.name}: {words(figures)}", markup=False)
    return report


def words(figures: dict) -> str:
    if "error" in figures:
        return figures["error"]
    return (
        f"{figures['peak_bytes'] / GIB:.2f} GiB (plan: {figures['predicted_over_measured']:.2f} of "
        f"it), {figures['seconds']:.1f} s a step"
    )


def run(config: Config, shapes: list[str], minutes: float, folder: Path) -> dict:
    unknown = [shape for shape in shapes if shape not in SHORT]
    if unknown:
        raise UserError(f"--shapes {unknown[0]}: choose from {', '.join(SHORT)}")
    if not torch.cuda.is_available():
        raise UserError("no GPU was found; `python -m lab.bench` measures on a CPU")
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu-{name}.json"
    report = sweep(in_order(shapes), config, 60 * minutes, path)
    show(report)
    console.print(f"figures: {path}", markup=False)
    return report


def show(report: dict) -> None:
    heads = ("", "peak GiB", "plan GiB", "s a step", "written/s", "trained/s")
    table = Table(*heads, title=report["machine"]["device"], box=box.SIMPLE_HEAD)
    for name, f in report["cases"].items():
        if "error" in f:
            table.add_row(name, f["error"])
            continue
        table.add_row(
            name,
            *(f"{f[key] / GIB:.2f}" for key in ("peak_bytes", "predicted_bytes")),
            f"{f['seconds']:.1f}",
            *(f"{f[k]:,.0f}" for k in ("generated_tokens_per_second", "trained_tokens_per_second")),
        )
    console.print(table)
