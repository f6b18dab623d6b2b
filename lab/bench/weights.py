"""What 4-bit weights save and what they cost, size by size: bytes, seconds of a decode step.

The real classes of the published shapes with random weights, computed in bfloat16 on any machine,
and loaded one after the other, so that only one has to fit.
"""

from __future__ import annotations

import dataclasses
import statistics

import torch
from rich import box
from rich.table import Table
from transformers import DynamicCache, PretrainedConfig

import engine.memory as memory
from engine.memory import OutOfMemory, free_memory
from engine.model import Policy, load_policy
from app.config import Config
from app.screen import console

from .job import random_weights
from .measure import frozen_bytes, machine, now
from .shapes import model_config

WAYS = {"4-bit": True, "bf16": False}


@torch.inference_mode()
def decode_seconds(policy: Policy, rows: int, context: int, repeats: int) -> float:
    """One more token for `rows` paths, with `context` tokens of anything in their cache.

    The median over `repeats` steps, after a first one that pays for what is made once.
    """
    lm, shape = policy.lm, policy.lm.config
    size = (rows, shape.num_key_value_heads, context, memory.head_dim(shape))
    cache = DynamicCache()
    for layer in range(shape.num_hidden_layers):
        keys, values = torch.randn(2, *size, dtype=lm.dtype, device=lm.device)
        cache.update(keys, values, layer)
    newest = torch.zeros(rows, 1, dtype=torch.long, device=lm.device)
    seconds = []
    for _ in range(repeats + 1):
        started = now()
        lm(input_ids=newest, past_key_values=cache)
        seconds.append(now() - started)
    return statistics.median(seconds[1:])


def measure(
    shape: PretrainedConfig, config: Config, rows: int, context: int, repeats: int
) -> dict[str, float | str]:
    """One size in one way; an `error` in place of the figures where it does not fit."""
    free_memory()
    try:
        with random_weights(shape, torch.bfloat16):
            policy = load_policy(config, {}, trainable=True)
        return {
            "weight_bytes": frozen_bytes(policy.lm),
            "seconds": decode_seconds(policy, rows, context, repeats),
        }
    except (torch.OutOfMemoryError, OutOfMemory) as error:
        return {"error": str(error).splitlines()[0]}


def run(config: Config, shapes: list[str], rows: int, context: int, repeats: int) -> dict:
    known = {name: model_config(name, "--shapes") for name in shapes}
    sizes = {"rows": rows, "context": context, "repeats": repeats}
    report = {"machine": machine(), "sizes": sizes, "shapes": {}}
    for name, shape in known.items():
        report["shapes"][name] = figures = {}
        for way, four in WAYS.items():
            asked = dataclasses.replace(config, load_in_4bit=four)
            figures[way] = measure(shape, asked, rows, context, repeats)
            console.print(f"{name} {way}: {words(figures[way])}", markup=False)
        if not any("error" in figures[way] for way in WAYS):
            ratio = {key: figures["4-bit"][key] / value for key, value in figures["bf16"].items()}
            figures["4-bit / bf16"] = ratio
    return report


def words(figures: dict) -> str:
    if "error" in figures:
        return figures["error"]
    return f"{figures['weight_bytes'] / memory.GIB:.2f} GiB, {figures['seconds']:.3g} s a step"


def show(report: dict) -> None:
    table = Table("4-bit / bf16", "weights", "decode step", box=box.SIMPLE_HEAD)
    for name, figures in report["shapes"].items():
        ratio = figures.get("4-bit / bf16", {})
        table.add_row(name, *(f"{value:.2f}" for value in ratio.values()))
    console.print(table)
    device, sizes = report["machine"]["device"], report["sizes"]
    console.print(f"{device}: {sizes['rows']} rows, {sizes['context']} tokens before each")
