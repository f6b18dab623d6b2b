"""Train several methods from one cold start over several seeds, and say how sure a difference is.

    python -m lab.compare [--methods main] [--seeds 8] [--steps 100] [--jobs N] [--output_dir DIR]
    python -m lab.compare draw [DIR]                 the table and the figures of results.json again
    python -m lab.compare entropy [--forced FILE]    does the policy hesitate after a result?

Every run is an `arpo_mini.py train`, and an `eval` of what it trained with more samples, in a
process of its own. A run that is finished is not trained again: results.json holds what it takes to
draw everything, runs/ the folders of the runs.
"""

from __future__ import annotations

import _thread
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

import arpo_mini
from app import cli
from app.config import Config, check_training, option
from app.run_folder import VERSION, digest, put, to_json
from app.screen import say
from data.files import BAD_ROW, UserError, local_files, reason
from data.formats import load_questions
from lab import controls, figures, forking, verdict
from lab.command import TRAIN, exit_code, parse, print_rows

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "lab/results/compare"

# ---- what is compared ---------------------------------------------------------------------

# A method is a name and what it changes in Config; `control` names what lab/controls.py changes in
# the code. All return 64 trajectories a step.
STEP = {"branch_rule": "step", "questions_per_step": 16, "group_size": 4, "max_leaves": 8}
GRPO = {"branch_rule": "none", "initial_rollouts": 8}
DEFAULT = {"branch_rule": "paper", "initial_rollouts": 1, "max_branches": 4}
SIXTEEN = {"questions_per_step": 16, "group_size": 4}
SETTINGS: dict[str, dict] = {  # other values of one setting each: what app/config.py speaks of
    "official": {**DEFAULT, "branch_rule": "official", "entropy_tokens": 20},
    "adaptive": {**DEFAULT, "branch_rule": "adaptive"},
    "n2-z1": {**DEFAULT, "initial_rollouts": 2, "max_branches": 1},
    "k5": {**DEFAULT, "entropy_tokens": 5},
    "k20": {**DEFAULT, "entropy_tokens": 20},
    "lr-5e-4": {**DEFAULT, "learning_rate": 5e-4},
    "lr-2e-3": {**DEFAULT, "learning_rate": 2e-3},
    "soft-x4": {**DEFAULT, "updates_per_rollout": 4, "shared_weight": 0.0},
    "hard-x4": {**DEFAULT, "updates_per_rollout": 4, "shared_weight": 1.0},
}
SHAPES: dict[str, dict] = {  # of one budget for a step
    "step-8x8": {**STEP, "questions_per_step": 8, "group_size": 8, "max_leaves": 16},
    "step-24x3": {**STEP, "questions_per_step": 24, "group_size": 3},
    "step-32x2": {**STEP, "questions_per_step": 32, "group_size": 2},
    "step-leaves-6": {**STEP, "max_leaves": 6},
    "step-leaves-12": {**STEP, "max_leaves": 12},
    "step-z2": {**STEP, "max_branches": 2},
    "step-z8": {**STEP, "max_branches": 8},
    "step-n2": {**STEP, "initial_rollouts": 2},
}
METHODS: dict[str, dict] = {
    "grpo": GRPO,
    "arpo-1-of-8-z4": DEFAULT,
    "step": STEP,
    "step-random": {**STEP, "branch_score": "random"},
    "step-gain": {**STEP, "branch_score": "gain"},
    "step-after": {**STEP, "control": "after"},
    "step-after-random": {**STEP, "branch_score": "random", "control": "after"},
    "step-shuffled": {**STEP, "control": "shuffled"},
    "step-oracle": {**STEP, "control": "oracle"},
    "step-sigma": {**STEP, "control": "sigma"},
    "16x4": SIXTEEN,
    "grpo-live": {**GRPO, **SIXTEEN, "initial_rollouts": 2, "control": "live"},
    **SHAPES,
    **SETTINGS,
}
FAMILIES: dict[str, tuple[str, ...]] = {  # a question each, and a figure each
    "main": ("grpo", "arpo-1-of-8-z4", "step", "step-random"),
    "when": ("step-after", "step-after-random", "step-shuffled", "16x4"),
    "ceiling": ("step-oracle", "grpo-live"),
    "shape": ("step", *SHAPES, "step-gain", "step-sigma"),
    "settings": ("arpo-1-of-8-z4", *SETTINGS),
}
# What a comparison sets otherwise than a training: all test questions at every evaluation, so that
# the points of a curve are comparable.
DEFAULTS = {"eval_every": 5, "eval_part": 100_000}
PATHS = "model_name adapter system_prompt dataset_path eval_path documents_path".split()
OF_THE_RUNS = {"seed", "output_dir", "branch_score", *STEP, *GRPO, *DEFAULT}


def choose(text: str) -> list[str]:
    """The methods that names of methods and families, or `all`, stand for; in METHODS' order."""
    known = {**{name: (name,) for name in METHODS}, **FAMILIES, "all": tuple(METHODS)}
    names = text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--methods {name}: choose, between commas, from {', '.join(known)}")
    return [method for method in METHODS if any(method in known[name] for name in names)]


class Run(NamedTuple):
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


def shared_settings(values: dict, samples: int) -> dict:
    """What all runs have in common: a Config, paths relative to the project where possible."""
    config = Config(**values)
    check_training(config)
    load_questions(config.dataset_path), load_questions(config.eval_path)
    arpo_mini.make_tools(config)
    shared = {k: v for k, v in dataclasses.asdict(config).items() if k not in OF_THE_RUNS}
    for name in PATHS:
        path = Path(shared[name] or "no such path").resolve()
        if path.exists():
            shared[name] = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return shared | {"version": VERSION, "final_samples": samples, "files": fingerprints(shared)}


def fingerprints(settings: dict) -> dict[str, str]:
    """A digest of each input: a cold start made again under the same name is another one."""
    found = {}
    for name in PATHS:
        path = ROOT / (settings[name] or "no such path")
        files = [path, *sorted(path.glob("*"))]  # a file, or a folder and what is in it
        if name.endswith("_path") and not path.exists():  # a data set of the hub
            files = map(Path, local_files(settings[name]))
        contents = [file.name.encode() + file.read_bytes() for file in files if file.is_file()]
        if contents:
            found[name] = digest(b"".join(contents))[:12]
    return found


# ---- what a run leaves --------------------------------------------------------------------


def read_json(path: Path, check: Callable[[dict], None] = dict) -> dict:
    """What is in a file that a comparison has written; UserError where it cannot be used."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        check(found)
    except (OSError, *BAD_ROW) as error:
        raise UserError(f"{path}: {reason(error)}; choose another --output_dir") from None
    return found


def read_run(slot: Path) -> dict | None:
    """The accuracy curve of a run and what it spent up to each point; None if it is not whole.

    The last point of the samples is that of final.json, which has more of them and is written last.
    """
    try:
        final = read_json(slot / "final.json")
        metrics, rows = (
            [json.loads(line) for line in (slot / f"run/{name}.jsonl").open(encoding="utf-8")]
            for name in ("metrics", "evaluations")
        )
    except (OSError, ValueError, UserError):
        return None
    accuracy = {(row["step"], row["decoding"]): row["accuracy"] for row in rows}
    accuracy[len(metrics), "sampled"] = final["sampled"]["accuracy"]
    points = {"step": sorted({step for step, _ in accuracy})}
    points["sampled"] = [round(accuracy[step, "sampled"], 6) for step in points["step"]]
    for row in metrics:
        row["seconds"] = row["seconds_rollout"] + row["seconds_update"]
        row["live_groups"] = row["groups"] - row["equal_groups"]
    for name in verdict.COLUMNS[2:]:
        spent = [row[name] for row in metrics]
        points[name] = [round(sum(spent[:step]), 1) for step in points["step"]]
    # the share of tool results at which the rule wanted a fork, slots left or not
    wishes = [row["wishes"] for row in metrics if row["wishes"] is not None]
    return {"wish_rate": round(sum(wishes) / max(1, len(wishes)), 4), "points": points}


def has_begun(slot: Path) -> bool:
    """A run counts from its first whole checkpoint on; before, there is nothing to go on with."""
    return any(slot.glob("run/checkpoints/*/checkpoint.json"))


def refuse_changed(path: Path, before: dict, now: dict) -> None:
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        pairs = ", ".join(f"{k} {before.get(k)}, now {now.get(k)}" for k in changed[:3])
        raise UserError(f"{path} was made with {pairs}; choose another --output_dir or remove it")


# ---- running one --------------------------------------------------------------------------


def stop_with_parent() -> None:
    """Ctrl-C in this process once the comparison closes our stdin or is gone, even by kill -9."""
    os.read(0, 1)  # nothing is ever written there
    _thread.interrupt_main()


def play(slot: Path) -> None:
    """Train, or go on with what is there; then evaluate what was trained."""
    settings, folder = read_json(slot / "settings.json"), slot / "run"
    if "control" in settings:
        getattr(controls, settings["control"])()
    values = {name: value for name, value in settings.items() if name in TRAIN}
    config = Config(**values, output_dir=str(folder))
    arpo_mini.train(config, resume=folder if folder.exists() else None)
    # at the temperature of the evaluations on the way, whatever trains
    trained = dataclasses.replace(config, adapter=str(folder / "adapter"), temperature=1.0)
    algorithm = cli.Algorithm(arpo_mini.train, arpo_mini.load_agent)
    cli.eval_command(algorithm, trained, settings["final_samples"], None, str(slot / "final.json"))


# ---- all of them --------------------------------------------------------------------------

POLL = 0.5  # seconds between two looks at the processes
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Comparison:
    """The results so far, {"settings", "methods": {name: {"overrides", "runs": {seed: run}}}}."""

    def __init__(self, folder: Path, settings: dict | None = None):
        """Those in the folder; with `settings`, only what was made with the same, or new ones."""
        self.folder, self.path = folder.resolve(), folder / "results.json"
        self.results: dict = {"settings": settings, "methods": {}}
        self.failed: dict[Run, str] = {}
        if settings and not self.path.exists():
            return
        self.results = read_json(self.path, verdict.check)
        refuse_changed(self.path, self.results["settings"], settings or self.results["settings"])

    def slot(self, run: Run) -> Path:
        return self.folder / "runs" / run.method / str(run.seed)

    def settings_of(self, run: Run) -> dict:
        """Its Config but for output_dir, and its input files."""
        return {**self.results["settings"], **METHODS[run.method], "seed": run.seed}

    def figures(self, run: Run) -> dict | None:
        """Of a finished run, from results.json or else from its folder; then they are kept."""
        new = {"overrides": METHODS[run.method], "runs": {}}
        method, slot = self.results["methods"].setdefault(run.method, new), self.slot(run)
        refuse_changed(self.path, method["overrides"], METHODS[run.method])
        if str(run.seed) not in method["runs"] and has_begun(slot):
            refuse_changed(slot, read_json(slot / "settings.json"), self.settings_of(run))
            if found := read_run(slot):
                method["runs"][str(run.seed)] = found
                self.save()
        return method["runs"].get(str(run.seed))

    def save(self) -> None:
        """Whole or not at all; a line for each list of numbers."""
        text = json.dumps(self.results, indent=1)
        text = re.sub(r"\[[^\[\]{}]*\]", lambda x: json.dumps(json.loads(x[0])), text)
        put(self.path, text.encode() + b"\n")

    def start(self, run: Run, threads: int) -> subprocess.Popen:
        """A training in a process of its own; it stops when its stdin is closed: by us, or with us.

        Its session is its own, too: Ctrl-C in a terminal comes to us alone.
        """
        settings, slot = self.settings_of(run), self.slot(run)
        refuse_changed(self.folder, settings["files"], fingerprints(settings))
        if not has_begun(slot):
            shutil.rmtree(slot, ignore_errors=True)
            slot.mkdir(parents=True)
            put(slot / "settings.json", to_json(settings))
        # Threads that wait by spinning slow down every other process on their cores, 5 to 50 times.
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        limits |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
        alone = {"cwd": ROOT, "env": {**os.environ, **limits}, "start_new_session": True}
        alone |= {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}
        command = [sys.executable, "-m", "lab.compare", "run", str(slot)]
        with (slot / "log.txt").open("w", encoding="utf-8") as log:
            return subprocess.Popen(command, stdout=log, **alone)

    def train(self, runs: list[Run], jobs: int) -> None:
        """Every run that is not finished, `jobs` of them at a time."""
        waiting = [run for run in runs if not self.figures(run)]
        running: dict[Run, subprocess.Popen] = {}
        with tqdm(total=len(runs), initial=len(runs) - len(waiting), disable=None) as bar:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs:
                        run = waiting.pop(0)
                        running[run] = self.start(run, max(1, CORES // jobs))
                    time.sleep(POLL)
                    for run in [r for r, process in running.items() if process.poll() is not None]:
                        bar.write(self.outcome(run, running.pop(run).returncode))
                        bar.update()
            finally:
                for process in running.values():  # each saves what it has
                    process.stdin.close()
                for process in running.values():
                    process.wait()

    def outcome(self, run: Run, code: int) -> str:
        """Record a process that has ended; a line about it."""
        found = self.figures(run) if code == 0 else None
        if found:
            right, seconds = (found["points"][name][-1] for name in ("sampled", "seconds"))
            return f"{run}: {right:.1%} of the samples right, trained for {seconds:.0f} seconds"
        log = self.slot(run) / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self.failed[run] = f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"
        said = f"{run}: died with {self.failed[run]} (all of it in {log})"
        if code == 2 and not self.path.exists():  # bad input, that of all runs
            raise UserError(said)
        return said

    def report(self, methods: list[str]) -> None:
        """The table on the screen, and the figures; the table of all methods in the folder."""
        stored = [name for name in METHODS if verdict.runs_of(self.results, name)]
        methods = [name for name in stored if name in methods]
        if not methods:
            return
        second = self.folder.parent / "second_world"
        beside = self.folder != second and (second / "results.json").exists()
        world = Comparison(second).results if beside else {"methods": {}}
        for head, *lines in verdict.tables(self.results, methods):
            print_rows(head, lines)
        verdict.write(self.results, stored, world, self.folder)
        say(f"{self.folder}: results.json, table.md, summary.json")
        families = {f: names for f, names in FAMILIES.items() if set(names) <= set(methods)}
        for family, names in families.items() or [("chosen", methods)]:
            figures.accuracy(self.results, list(names), self.folder / f"accuracy-{family}")


# ---- command line -------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:  # beside those of `train`
    methods: str = option("main", f"of {', '.join([*METHODS, *FAMILIES])}, all")
    seeds: int = option(8, "runs of each method, with seeds that follow each other", 1, 1000)
    first_seed: int = option(0, "the first of them", 0, 2**31)
    final_samples: int = option(8, "of each test question, when a run is trained", 1, 10_000)
    jobs: int | None = option(None, "side by side; none: one a core, at most 8; one on a GPU", 1)
    output_dir: str = option(str(RESULTS), "folder of the results")


def compare(args: list[str]) -> int:
    own, values = parse("lab.compare", __doc__, args, Flags, TRAIN - OF_THE_RUNS, **DEFAULTS)
    methods, folder = choose(own.methods), Path(own.output_dir).resolve()
    if values["eval_part"] == 0:
        raise UserError("--eval_part 0: a comparison is made of evaluations; legal: at least 1")
    jobs = own.jobs or (1 if torch.cuda.is_available() else min(8, CORES))
    settings = shared_settings(values, own.final_samples)
    seeds = range(own.first_seed, own.first_seed + own.seeds)
    try:
        with FileLock(folder / "runs/lock", timeout=0):  # released however we end
            comparison = Comparison(folder, settings)
            # seed by seed, so that whatever is there when it is stopped can be compared
            comparison.train([Run(m, seed) for seed in seeds for m in methods], jobs)
    except Timeout:
        raise UserError(f"--output_dir {folder}: a comparison is at work there") from None
    comparison.report(methods)
    for run, why in comparison.failed.items():
        print(f"error: {run}: {why}", file=sys.stderr)
    return 1 if comparison.failed else 0


def draw(args: list[str]) -> None:
    """The table and the figures of results.json again."""
    parser = cli.Parser(prog="lab.compare draw", description=draw.__doc__)
    parser.add_argument("folder", nargs="?", default=RESULTS, help="with a results.json")
    Comparison(Path(parser.parse(args)["folder"])).report([*METHODS])


def run_one(slot: Path) -> None:
    """What a comparison starts for each run: `play`, until it ends or we are left alone."""
    threading.Thread(target=stop_with_parent, daemon=True).start()
    play(slot)


def main(args: list[str]) -> int:
    command, *rest = args or [""]
    if command == "run" and len(rest) == 1:
        return exit_code(lambda: run_one(Path(rest[0])))
    other = {"draw": draw, "entropy": forking.study}.get(command)
    return exit_code(lambda: other(rest) if other else compare(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
