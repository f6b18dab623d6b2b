"""The files of a run folder, read line by line: for the page, and for a run that goes on."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from app.page.page import MOST_RUNS, Run, page
from app.page.trees import tree
from app.screen import with_interval
from data.files import UserError, reason

LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
# What a line of each must hold to be drawn, beside its step.
DRAWN = ((), ("decoding", "questions", "accuracy", "domains"), ("question", "nodes", "leaves"))
# Numbers that it must hold to be summed up and shown again when a run goes on.
SUMMED = (
    (
        *("groups", "equal_groups", "accuracy", "well_formed", "entropy", "clip_fraction"),
        *("short_answers", "prefill_tokens", "reread_tokens"),
        *("train_tokens", "train_tokens_unpacked"),
    ),
    ("questions", "accuracy", "well_formed", "tool_calls"),
    (),
)
# What only one line of each may say. Trees of a step may be equal.
ONCE = (("step",), ("step", "decoding", "questions"), ())
TWICE = "it is there twice"

# ---- a log --------------------------------------------------------------------------------


class Line(NamedTuple):
    number: int
    text: bytes
    row: dict | None
    wrong: str = ""  # why there is no row
    cut_short: float | None = None  # a last line without an end: its step, inf if that is lost too


def read_log(path: Path, problem: Callable[[str, dict], str]) -> list[Line]:
    """The lines of a log. `problem(name, row)` says what is wrong; no file has no lines."""
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:  # a folder, or not ours to read
        return [Line(0, b"", None, reason(error))]
    check = partial(problem, path.name)
    lines = [read_line(n, text, check) for n, text in enumerate(whole, 1) if text.strip()]
    lines = without_repeats(lines, ONCE[LOGS.index(path.name)])
    if rest:
        step = re.match(rb'{"step": (\d{1,12})\b', rest)
        at = int(step[1]) if step else math.inf
        lines.append(Line(len(whole) + 1, rest, None, "it is not complete", at))
    return lines


def read_line(number: int, text: bytes, problem: Callable[[dict], str]) -> Line:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, text, None, f"no JSON: {reason(error).removeprefix('no JSON: ')}")
    if not isinstance(row, dict):
        wrong = f"it must be an object, {{...}}, not {reprlib.repr(row)}"
    elif "step" not in row:
        wrong = "step is missing"
    elif type(row["step"]) is not int or not 0 <= row["step"] < 10**12:
        wrong = f"step {reprlib.repr(row['step'])}: it must be a whole number"
    else:
        wrong = problem(row)
    return Line(number, text, None if wrong else row, wrong)


def without_repeats(lines: list[Line], keys: tuple[str, ...]) -> list[Line]:
    """The first line that says a thing has a row, the others have none."""
    found: list[Line] = []
    seen = set()
    for line in lines:
        said = json.dumps([line.row.get(key) for key in keys]) if line.row and keys else None
        again = said in seen
        seen |= {said} - {None}
        found.append(line._replace(row=None, wrong=TWICE) if again else line)
    return found


def lacks_parts(name: str, row: dict) -> str:
    """What keeps this from being drawn as a row of its log."""
    keys = DRAWN[LOGS.index(name)]
    if missing := [key for key in keys if key not in row]:
        return f"{', '.join(missing)} is missing"
    domains = row.get("domains", {})
    if not isinstance(domains, dict) or not all(isinstance(d, dict) for d in domains.values()):
        return f"domains {domains!r}: it must hold figures by domain"
    return ""


def lacks_figures(name: str, row: dict) -> str:
    """What keeps this from being summed up and shown again."""
    if wrong := lacks_parts(name, row):
        return wrong
    keys = SUMMED[LOGS.index(name)]
    if missing := [key for key in keys if type(row.get(key)) not in (int, float)]:
        return f"{', '.join(missing)}: it must be a number"
    if name == "evaluations.jsonl":
        try:
            for figures in (row, *row["domains"].values()):
                with_interval(figures)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return f"no figures of an evaluation: {reason(error)}"
    return ""


# ---- a run, to be drawn -------------------------------------------------------------------


def read_run(folder: Path, name: str) -> Run:
    """A run folder, also of a run that goes on or was interrupted. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the --output_dir of a run")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is no run; a run's folder has one")
    config = read_config(folder / "config.json")
    notes: list[str] = []
    metrics, evaluations, trees = (read_rows(folder / log, notes) for log in LOGS)
    path = folder / "rollouts.jsonl"
    drawn = [draw(record, config, f"{path}, line {i}") for i, record in enumerate(trees, start=1)]
    if not metrics:
        notes.append(f"{name}: no training step has been logged yet.")
    return Run(name, config, metrics, evaluations, drawn, notes)


def draw(record: dict, config: dict, where: str) -> dict:
    try:
        return tree(record, config)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{where}: no rollout tree: {error}") from None


def read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no JSON: {reason(error).removeprefix('no JSON: ')}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: it must be an object, {{...}}, not {reprlib.repr(config)}")
    return config


def read_rows(path: Path, notes: list[str]) -> list[dict]:
    """The rows of a log; what is there twice or still being written is left out."""
    lines = read_log(path, lacks_parts)
    if lines and lines[-1].cut_short is not None:
        notes.append(f"The last line of {path.name} is not complete; it was left out.")
        lines.pop()
    for line in lines:
        if line.wrong == TWICE:
            notes.append(f"Line {line.number} of {path.name} is there twice; it was left out.")
        elif line.wrong:
            raise UserError(f"{path}, line {line.number}: {line.wrong}")
    return [line.row for line in lines if line.row]


def names_of(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many of its last parts as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-n:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]  # one folder twice


def report(folders: list[Path]) -> str:
    """One page about one or more runs, laid over each other."""
    if len(folders) > MOST_RUNS:
        raise UserError(f"{len(folders)} runs: at most {MOST_RUNS} can be told apart")
    try:
        runs = [read_run(f, name) for f, name in zip(folders, names_of(folders), strict=True)]
    except (OSError, RuntimeError) as error:  # not ours to read, a name too long, links in a circle
        raise UserError(f"{', '.join(map(str, folders))}: {reason(error)}") from None
    return page("arpo_mini: " + ", ".join(run.name for run in runs), runs)
