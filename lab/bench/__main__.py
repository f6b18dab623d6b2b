"""What arpo_mini costs, measured: memory and speed, of the parts and beside others.

    python -m lab.bench            every shortcut against the plain way; --shape for a real size
    python -m lab.bench plan       the predicted peak memory of a model, without its weights
    python -m lab.bench weights    what 4-bit weights save and cost, size by size
    python -m lab.bench trl        the same job with TRL's GRPOTrainer (to be installed by you)
    python -m lab.bench gpu        peak memory and speed of every shape on this GPU, resumable

Each takes --help, the flags of `arpo_mini.py train`, and --json FILE.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# The profiler, which counts a CPU's allocations, would talk to the screen.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from arpo_mini import write_text
from app.config import PRESETS, Config
from app.screen import Parser, UserError, console, kind

SHAPES = "qwen3-0.6b,qwen3-1.7b,qwen3-4b,qwen3-8b"


def at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{flag} {value}: it must be at least 1")


def compare_command(config: Config, shape: str, turns: int, context: int, repeats: int) -> dict:
    """Every shortcut against the plain way, in one run: the tiny model, or --shape qwen3-4b."""
    from . import compare

    at_least_one("--repeats", repeats)
    report = compare.run(config, shape, turns, context, repeats)
    compare.show(report)
    return report


def plan_command(config: Config) -> dict:
    """The predicted peak memory of --model_name, by part, from its configuration alone."""
    from . import plan

    report = plan.run(config)
    plan.show(report)
    return report


def weights_command(config: Config, shapes: str, rows: int, context: int, repeats: int) -> dict:
    """4-bit against bfloat16, size by size: bytes of the weights, seconds of a decode step."""
    from . import weights

    for flag, value in (("--rows", rows), ("--context", context), ("--repeats", repeats)):
        at_least_one(flag, value)
    report = weights.run(config, shapes.split(","), rows, context, repeats)
    weights.show(report)
    return report


def trl_command(config: Config, repeats: int) -> dict:
    """The same job with TRL's GRPOTrainer, step by step in turn with ours."""
    from . import against_trl

    at_least_one("--repeats", repeats)
    report = against_trl.run(config, repeats)
    against_trl.show(report)
    return report


def gpu_command(config: Config, shapes: str, minutes: float, results: str) -> dict:
    """Peak memory, seconds and tokens per second of every shape; what was measured is kept."""
    from . import gpu

    return gpu.run(config, shapes.split(","), minutes, Path(results))


COMMANDS = {  # name: (function, its own flags)
    "": (
        compare_command,
        {
            "--shape": ("str", "tiny", "tiny, qwen3-0.6b, qwen3-1.7b, qwen3-4b, qwen3-8b, ..."),
            "--turns": ("int", 3, "tool calls of every trajectory, where a --shape is forced"),
            "--context": ("int", 1024, "tokens of every trajectory, where a --shape is forced"),
            "--repeats": ("int", 5, "alternating runs of each way"),
        },
    ),
    "plan": (plan_command, {}),
    "weights": (
        weights_command,
        {
            "--shapes": ("str", SHAPES, "shapes to measure, one after the other"),
            "--rows": ("int", 8, "paths that a decode step continues"),
            "--context": ("int", 256, "tokens before it in the cache"),
            "--repeats": ("int", 5, "timed steps, after one that is not"),
        },
    ),
    "trl": (trl_command, {"--repeats": ("int", 8, "steps of each, in turn")}),
    "gpu": (
        gpu_command,
        {
            "--shapes": ("str", SHAPES, "shapes to measure"),
            "--minutes": ("float", 7.0, "begin nothing new after this time; call again to go on"),
            "--results": ("str", "lab/results", "folder of the figures"),
        },
    ),
}


def parse_command(args: list[str]) -> Callable[[], int]:
    """The command that was asked for, with its settings, ready to run."""
    name = args[0] if args and not args[0].startswith("-") else ""
    if name not in COMMANDS:
        commands = ", ".join(filter(None, COMMANDS))
        raise UserError(f"unknown command {name}; the commands are {commands}, or none")
    command, own_flags = COMMANDS[name]
    title = f"python -m lab.bench {name}".strip()
    parser = Parser(prog=title, description=command.__doc__, allow_abbrev=False)
    for flag, (annotation, default, words) in own_flags.items():
        parser.add_argument(
            flag, type=kind(annotation), default=default, help=f"{words} (default: {default})"
        )
    parser.add_argument("--json", help="write the figures to this file")
    for item in dataclasses.fields(Config):
        parser.add_field(item)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from")
    rest = args[1:] if name else args
    if preset := parser.parse(rest)["preset"]:
        parser.set_defaults(**PRESETS[preset])
    values = parser.parse(rest)
    del values["preset"]
    own = [values.pop(flag.removeprefix("--")) for flag in own_flags]
    json_path = values.pop("json")
    config = Config(**values)

    def run() -> int:
        if json_path:
            write_text("--json", json_path, "", mode="a")  # better refused now than after the work
        report = command(config, *own)
        if json_path:
            write_text("--json", json_path, json.dumps(report, indent=2) + "\n")
        return 0

    return run


def main(args: list[str]) -> int:
    try:
        return parse_command(args)()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        console.print(__doc__, markup=False)
    sys.exit(main(sys.argv[1:]))
