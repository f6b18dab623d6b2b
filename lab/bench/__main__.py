"""What arpo_mini costs, measured: memory and speed.

    python -m lab.bench plan     what fits which card, from a model's shapes alone, without a GPU
    python -m lab.bench plain    our step beside course/one_page.py, which has no cache or packing
    python -m lab.bench trl      a training step beside TRL's GRPOTrainer (to be installed by you)
    python -m lab.bench gpu      peak memory and speed on this GPU: goals, presets, 4-bit and bf16

Each takes --help, the flags of `arpo_mini.py train`, and --json FILE.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

# The profiler, which counts a CPU's allocations, would talk to the screen.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from app.cli import refuse_unwritable, write_text
from app.config import PRESETS, Config, option
from data.files import UserError
from lab.command import exit_code, parse, print_rows

from . import against, gpu, plan


@dataclass(frozen=True)
class Flags:  # beside those of `train`
    preset: str | None = option(None, "settings to start from", choices=tuple(PRESETS))
    json: str | None = option(None, "write the figures to this file")


@dataclass(frozen=True)
class InTurn(Flags):
    repeats: int = option(5, "timed steps of each, in turn", 1)


@dataclass(frozen=True)
class OnGPU(Flags):
    minutes: float = option(9.0, "in all", above=0)


COMMANDS = {  # name: (what measures, its own flags)
    "plan": (plan.run, Flags),
    "plain": (against.plain, InTurn),
    "trl": (against.trl, InTurn),
    "gpu": (gpu.run, OnGPU),
}


def measured(args: list[str]) -> None:
    """Parse, measure, write, show."""
    name = args[0] if args else "none"
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    run, flags = COMMANDS[name]
    own, typed = parse(f"python -m lab.bench {name}", __doc__, args[1:], flags)
    config = Config(**{**PRESETS.get(own.preset, {}), **typed})
    if own.json:
        refuse_unwritable("--json", own.json)
    report = plan.run(config, typed) if run is plan.run else run(config, own)
    if own.json:
        write_text("--json", own.json, json.dumps(report, indent=1) + "\n")
    show(report["figures"])


def show(figures: dict[str, dict]) -> None:
    """A row for each name; one that could not be measured says why."""
    heads = [*next((row for row in figures.values() if "error" not in row), {"error": ""})]
    print_rows(["", *heads], [[name, *map(cell, row.values())] for name, row in figures.items()])


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return {"True": "yes", "False": "no", "None": "-"}.get(str(value), str(value))


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(print(__doc__))
    sys.exit(exit_code(lambda: measured(sys.argv[1:])))
