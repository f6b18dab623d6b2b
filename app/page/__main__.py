"""Look at a run: one HTML file with its figures, its curves and its rollout trees.

    python -m lab.report runs/arpo                        -> runs/arpo/report.html
    python -m lab.report runs/arpo runs/grpo --html both.html

Several runs are laid over each other. The file needs no network and no server.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from app.screen import Parser, UserError
from app.page.page import MOST_RUNS, Run, page
from app.page.trees import tree

# What a line of each file must hold to be one.
FILES = {
    "metrics.jsonl": ("step",),
    "evaluations.jsonl": ("step", "decoding", "questions", "accuracy", "domains"),
    "rollouts.jsonl": ("step", "question", "nodes", "leaves"),
}


def read_run(folder: Path, name: str) -> Run:
    """A run folder, also of a run that goes on or was interrupted. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name the --output_dir of a run")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is no run; a run's folder has one")
    config = parse(read(folder / "config.json"), folder / "config.json")
    notes: list[str] = []
    metrics, evaluations, trees = (read_lines(folder / file, notes) for file in FILES)
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


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def parse(text: str, where) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: it must be an object, {{...}}, not {text[:20]!r}")
    return value


def read_lines(path: Path, notes: list[str]) -> list[dict]:
    """The rows of a JSONL file; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    *lines, rest = read(path).split("\n")
    if rest:
        notes.append(f"The last line of {path.name} is not complete; it was left out.")
    rows = []
    for number, line in enumerate(lines, start=1):
        row = parse(line, f"{path}, line {number}")
        if wrong := problem(row, FILES[path.name]):
            raise UserError(f"{path}, line {number}: {wrong}")
        rows.append(row)
    return rows


def problem(row: dict, keys: tuple[str, ...]) -> str | None:
    """What keeps this from being a row of its file."""
    if missing := [key for key in keys if key not in row]:
        return f"{', '.join(missing)} is missing"
    if type(row["step"]) is not int or not 0 <= row["step"] < 10**12:
        return f"step {row['step']!r}: it must be a whole number"
    domains = row.get("domains", {})
    if not isinstance(domains, dict) or not all(isinstance(d, dict) for d in domains.values()):
        return f"domains {domains!r}: it must hold figures by domain"
    return None


def names_of(folders: list[Path]) -> list[str]:
    """The last part of each path, or as many of its last parts as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(some[-n:]) for some in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]  # one folder twice


def main(args: list[str]) -> int:
    """Write one HTML page about one or more runs."""
    parser = Parser(prog="python -m lab.report", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", help="--output_dir of a run; several are compared")
    parser.add_argument("--html", help="file to write (default: report.html in the first folder)")
    try:
        values = parser.parse(args)
        folders = [Path(folder) for folder in values["folders"]]
        if len(folders) > MOST_RUNS:
            raise UserError(f"{len(folders)} runs: at most {MOST_RUNS} can be told apart")
        target = Path(values["html"] or folders[0] / "report.html")
        runs = [read_run(f, name) for f, name in zip(folders, names_of(folders), strict=True)]
        write(target, page("arpo_mini: " + ", ".join(run.name for run in runs), runs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{target} ({target.stat().st_size / 1e6:.2f} MB): open it in a browser")
    return 0


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate becomes ?
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
