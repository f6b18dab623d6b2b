"""Train several methods from one cold start over several seeds, and say how sure a difference is.

    python -m lab.compare [--methods main] [--seeds 5] [--steps 100] [--jobs N] [--output_dir DIR]
    python -m lab.compare entropy [--adapter DIR]    does it pay to fork where the policy hesitates?

Every run is an `arpo_mini.py train`, and an `eval` of what it trained with more samples, in a
process of its own. A run that is finished is not trained again: results.json holds what it takes to
draw everything, runs/ the folders of the runs.
"""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import arpo_mini
from arpo_mini import make_tools
from data.formats import load_questions
from lab.verdict import drawing, tables, verdict
from app.config import Config
from app.screen import Parser, UserError, console, kind, progress_bar, reason

ROOT = Path(__file__).resolve().parent.parent

# ---- what is compared ---------------------------------------------------------------------

# A method is a name and what it changes in Config. All return 8 trajectories a question.
GRPO = {"branch_rule": "none", "initial_rollouts": 8}
PAPER = {"branch_rule": "paper", "initial_rollouts": 2, "max_branches": 1, "shared_weight": 0.0}
OFF_POLICY = {"updates_per_rollout": 4}
METHODS: dict[str, dict] = {
    "grpo": GRPO,
    "arpo-paper": PAPER,
    "arpo-official": {**PAPER, "branch_rule": "official", "entropy_tokens": 20},
    "arpo-adaptive": {**PAPER, "branch_rule": "adaptive"},
    "arpo-random": {**PAPER, "branch_rule": "random"},
    "arpo-random-adaptive": {**PAPER, "branch_rule": "random"},
    "arpo-1-of-8": {**PAPER, "initial_rollouts": 1},
    "arpo-4-of-8": {**PAPER, "initial_rollouts": 4},
    "arpo-mixed": {**PAPER, "shared_weight": 0.3},
    "arpo-hard": {**PAPER, "shared_weight": 1.0},
    "grpo-x4": {**GRPO, **OFF_POLICY},
    "arpo-soft-x4": {**PAPER, **OFF_POLICY},
    "arpo-mixed-x4": {**PAPER, **OFF_POLICY, "shared_weight": 0.3},
    "arpo-hard-x4": {**PAPER, **OFF_POLICY, "shared_weight": 1.0},
    "arpo-z2": {**PAPER, "max_branches": 2},
    "arpo-z4": {**PAPER, "max_branches": 4},
    "arpo-1-of-8-z4": {**PAPER, "initial_rollouts": 1, "max_branches": 4},
    "arpo-k5": {**PAPER, "entropy_tokens": 5},
    "arpo-k20": {**PAPER, "entropy_tokens": 20},
    "arpo-lr-5e-4": {**PAPER, "learning_rate": 5e-4},
    "arpo-lr-2e-3": {**PAPER, "learning_rate": 2e-3},
}
FAMILIES: dict[str, tuple[str, ...]] = {  # a question each, and a figure each
    "main": ("grpo", "arpo-paper", "arpo-adaptive", "arpo-random", "arpo-1-of-8-z4"),
    "rules": (
        *("grpo", "arpo-paper", "arpo-official", "arpo-adaptive"),
        *("arpo-random", "arpo-random-adaptive"),
    ),
    "initial_rollouts": ("grpo", "arpo-1-of-8", "arpo-paper", "arpo-4-of-8"),
    "credit": ("arpo-paper", "arpo-mixed", "arpo-hard"),
    "off_policy": ("grpo-x4", "arpo-soft-x4", "arpo-mixed-x4", "arpo-hard-x4"),
    "max_branches": ("arpo-paper", "arpo-z2", "arpo-z4", "arpo-1-of-8-z4"),
    "entropy_tokens": ("arpo-k5", "arpo-paper", "arpo-k20"),
    "learning_rate": ("arpo-lr-5e-4", "arpo-paper", "arpo-lr-2e-3"),
}
# Forks at random with a probability: the share of results at which the other, with the same seed,
# wished to fork. A rule that always wishes to has a control that does the very same.
CONTROLS = {"arpo-random": "arpo-paper", "arpo-random-adaptive": "arpo-adaptive"}
# What a comparison sets otherwise than a training: all test questions at every evaluation, so that
# the points of a curve are comparable, and enough trees to measure the rate of forking.
DEFAULTS = {"eval_every": 20, "eval_part": 100_000, "record_every": 2}
PATHS = "model_name adapter system_prompt dataset_path eval_path documents_path".split()
OF_THE_METHODS = {
    *("seed", "output_dir", "group_size", "initial_rollouts", "branch_rule", "max_branches")
}


def choose(text: str) -> list[str]:
    """The methods that names of methods and families, or `all`, stand for; in METHODS' order."""
    chosen = set()
    for name in text.split(","):
        if name == "all":
            chosen |= set(METHODS)
        elif name in FAMILIES or name in METHODS:
            chosen |= set(FAMILIES.get(name, (name,)))
        else:
            legal = ", ".join([*METHODS, *FAMILIES, "all"])
            raise UserError(f"--methods {name}: choose, separated by commas, from {legal}")
    for control, controlled in CONTROLS.items():
        if control in chosen and controlled not in chosen:
            words = f"{control} forks as often as {controlled}; name that too"
            raise UserError(f"--methods {text}: {words}")
    return [name for name in METHODS if name in chosen]


@dataclass(frozen=True)
class Run:
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


def settings_of(run: Run, results: dict) -> dict | None:
    """Its Config but for output_dir, and its input files; None while it waits for another run."""
    settings = {**results["settings"], **METHODS[run.method], "seed": run.seed}
    if run.method in CONTROLS:
        controlled = stored(results, Run(CONTROLS[run.method], run.seed))
        if controlled is None:
            return None
        settings["branch_probability"] = controlled["wish_rate"]
    return settings


def shared_settings(values: dict, final_samples: int) -> dict:
    """What all runs have in common: a Config, paths relative to the project where possible."""
    config = Config(**values)
    settings = dataclasses.asdict(config)
    for name in PATHS:
        if settings[name] and Path(settings[name]).exists():
            path = Path(settings[name]).resolve()
            inside = path.is_relative_to(ROOT)
            settings[name] = str(path.relative_to(ROOT) if inside else path)
    for name in OF_THE_METHODS - {"group_size"}:
        del settings[name]
    load_questions(config.dataset_path), load_questions(config.eval_path), make_tools(config)
    return {**settings, "final_samples": final_samples, "files": fingerprints(settings)}


def fingerprints(settings: dict) -> dict[str, str]:
    """A digest of each input: a cold start made again under the same name is another one."""
    found = {}
    for name in PATHS:
        path = ROOT / (settings[name] or "")
        if settings[name] and path.exists():
            digest = hashlib.sha256()
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                if file.is_file():
                    digest.update(file.name.encode() + file.read_bytes())
            found[name] = digest.hexdigest()[:12]
    return found


# ---- what is finished ---------------------------------------------------------------------


def stored(results: dict, run: Run) -> dict | None:
    method = results["methods"].get(run.method)
    return method["runs"].get(str(run.seed)) if method else None


def load_results(path: Path, settings: dict, methods: list[str]) -> dict:
    """What is known already; UserError where it was made with other settings."""
    if not path.exists():
        return {"settings": settings, "methods": {}}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        refuse_changed(path, results["settings"], settings)
        for name in methods:
            if name in results["methods"]:
                refuse_changed(path, results["methods"][name]["overrides"], METHODS[name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"cannot use {path}: {reason(error)}; remove it or choose another"
        ) from None
    return results


def refuse_changed(path: Path, before: dict, now: dict) -> None:
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    if changed:
        pairs = ", ".join(f"{k} {before.get(k)}, now {now.get(k)}" for k in changed[:3])
        raise UserError(f"{path} was made with {pairs}; choose another --output_dir or remove it")


def save_results(path: Path, results: dict) -> None:
    """Whole or not at all; a line for each list of numbers."""
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", flat, json.dumps(results, indent=1))
    draft = path.with_suffix(".tmp")
    draft.write_text(text + "\n", encoding="utf-8")
    draft.replace(path)


def flat(numbers: re.Match) -> str:
    return "[" + " ".join(numbers[1].split()) + "]"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def is_trained(folder: Path, steps: int) -> bool:
    """Whether a run is at its end, the evaluation after training included."""
    try:
        metrics, evaluations = (rows_of(folder / f"{n}.jsonl") for n in ("metrics", "evaluations"))
    except (OSError, ValueError):
        return False
    looks = {(row["step"], row["decoding"]) for row in evaluations}
    return len(metrics) == steps and (steps, "greedy") in looks


def read_run(slot: Path, steps: int) -> dict | None:
    """The accuracy curve of a run and what it spent up to each point; None if it is not whole.

    The last point of the samples is that of final.json, which has more of them.
    """
    folder = slot / "run"
    if not is_trained(folder, steps):
        return None
    try:
        final = json.loads((slot / "final.json").read_text(encoding="utf-8"))
        metrics, trees = rows_of(folder / "metrics.jsonl"), rows_of(folder / "rollouts.jsonl")
    except (OSError, ValueError):
        return None
    evaluations = rows_of(folder / "evaluations.jsonl")
    accuracy = {(row["step"], row["decoding"]): row["accuracy"] for row in evaluations}
    accuracy[steps, "sampled"] = final["sampled"]["accuracy"]
    points: dict[str, list] = {"step": [], "sampled": [], "greedy": []}
    for step in sorted({step for step, _ in accuracy}):
        points["step"].append(step)
        for decoding in ("sampled", "greedy"):
            points[decoding].append(round(accuracy[step, decoding], 6))
        for name in ("tool_calls", "generated_tokens", "prefill_tokens"):
            points.setdefault(name, []).append(sum(row[name] for row in metrics[:step]))
        seconds = sum(row["seconds_rollout"] + row["seconds_update"] for row in metrics[:step])
        points.setdefault("seconds", []).append(round(seconds, 1))
    nodes = [node for tree in trees for node in tree["nodes"]]
    wishes = [node["decision"]["forks"] > 0 for node in nodes if node["decision"]]
    forks, groups = sum(m["forks"] for m in metrics), sum(m["groups"] for m in metrics)
    return {
        # the share of tool results at which the rule wished to fork, slots left or not
        "wish_rate": round(sum(wishes) / max(1, len(wishes)), 4),
        "forks_per_question": round(forks / groups, 4),
        "points": points,
    }


def settings_in(slot: Path) -> dict | None:
    try:
        return json.loads((slot / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def finished(slot: Path, settings: dict) -> dict | None:
    """The run in this folder if it is whole; UserError if it is whole and has other settings."""
    run, before = read_run(slot, settings["steps"]), settings_in(slot)
    if run is None or before is None:
        return None
    refuse_changed(slot, before, settings)
    return run


# ---- running ------------------------------------------------------------------------------

POLL = 0.5  # seconds between two looks at the processes
PATIENCE = 15  # seconds that a process has to stop by itself


def run_command(slot: Path) -> list[str]:
    return [sys.executable, "-m", "lab.compare", "run", str(slot)]


def play(slot: Path) -> int:
    """Train, a new run or the one that is there to its end; then evaluate what was trained."""
    settings, folder = settings_in(slot), slot / "run"
    if settings is None:
        raise UserError(f"{slot}: no settings.json of a comparison there")
    values = {k: v for k, v in settings.items() if k not in ("files", "final_samples")}
    if not is_trained(folder, settings["steps"]):
        resume = ["--resume", str(folder)]
        code = arpo_mini.main(
            ["train", *(resume if folder.exists() else flags(values | {"output_dir": folder}))]
        )
        if code:
            return code
    del values["dataset_path"]  # there, what is evaluated on
    final = ["--samples", str(settings["final_samples"]), "--json", str(slot / "final.json")]
    return arpo_mini.main(["eval", *flags(values | {"adapter": folder / "adapter"}), *final])


def flags(values: dict) -> list[str]:
    return [word for k, v in values.items() for word in (f"--{k}", str(v))]


def start(settings: dict, slot: Path, threads: int, lock: int) -> subprocess.Popen:
    """A training in a process and a session of its own, so that only we pass Ctrl-C on to it.

    It holds the lock as well: should we be killed, nobody trains into its folder.
    """
    changed = [k for k, v in fingerprints(settings).items() if v != settings["files"].get(k)]
    if changed:
        raise UserError(f"changed since the comparison began: {', '.join(changed)}")
    if not (settings_in(slot) == settings and (slot / "run" / "checkpoints").is_dir()):
        shutil.rmtree(slot / "run", ignore_errors=True)  # nothing in it that can be gone on with
        (slot / "final.json").unlink(missing_ok=True)  # of what was trained there before
    slot.mkdir(parents=True, exist_ok=True)
    (slot / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    # Threads that wait by spinning slow down every other process on their cores, 5 to 50 times.
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env = {**os.environ, **limits, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with (slot / "log.txt").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            run_command(slot),
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
        )


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask all to stop, wait, and kill those that do not."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Comparison:
    """The runs that are asked for, the results so far, and the folder that holds both."""

    def __init__(self, folder: Path, settings: dict, methods: list[str], seeds: int):
        self.folder = folder
        self.results = load_results(folder / "results.json", settings, methods)
        self.failed: dict[Run, str] = {}
        # seed by seed, so that whatever is there when it is stopped can be compared
        self.runs = [Run(method, seed) for seed in range(seeds) for method in methods]

    def slot(self, run: Run) -> Path:
        return self.folder / "runs" / run.method / str(run.seed)

    def record(self, run: Run, found: dict) -> None:
        methods = self.results["methods"]
        method = methods.setdefault(run.method, {"overrides": METHODS[run.method], "runs": {}})
        method["runs"][str(run.seed)] = found
        save_results(self.folder / "results.json", self.results)

    def is_finished(self, run: Run) -> bool:
        """In results.json, or whole in its folder (the comparison was killed, not the run)."""
        settings = settings_of(run, self.results)
        if stored(self.results, run) is None and settings is not None:
            found = finished(self.slot(run), settings)
            if found:
                self.record(run, found)
        return stored(self.results, run) is not None

    def train(self, jobs: int, lock: int, bar) -> None:
        """Every run that is not finished, `jobs` of them at a time."""
        steps = self.results["settings"]["steps"]
        waiting = [run for run in self.runs if not self.is_finished(run)]
        words = f"steps of {len(waiting)} runs ({len(self.runs) - len(waiting)} finished before)"
        task, done = bar.add_task(words, total=len(waiting) * steps), 0
        running: dict[Run, subprocess.Popen] = {}
        try:
            while waiting or running:
                self.start_some(waiting, running, jobs, lock, bar)
                time.sleep(POLL)
                for run in [run for run, process in running.items() if process.poll() is not None]:
                    code = running.pop(run).returncode
                    bar.console.print(self.outcome(run, code), markup=False, soft_wrap=True)
                    done += 1
                ahead = sum(steps_done(self.slot(run)) for run in running)
                bar.update(task, completed=done * steps + ahead)
        finally:
            stop(list(running.values()))

    def start_some(self, waiting: list[Run], running: dict, jobs: int, lock: int, bar) -> None:
        threads = max(1, cores() // jobs)
        for run in list(waiting):
            settings = settings_of(run, self.results)
            controlled = CONTROLS.get(run.method)
            if settings is None and Run(controlled, run.seed) in self.failed:
                self.failed[run] = f"{controlled}, which it takes its rate from, has failed"
                bar.console.print(f"{run}: not started, {self.failed[run]}", soft_wrap=True)
                waiting.remove(run)
            elif settings is not None and len(running) < jobs:
                waiting.remove(run)
                running[run] = start(settings, self.slot(run), threads, lock)

    def outcome(self, run: Run, code: int) -> str:
        """Record a process that has ended; a line about it."""
        settings = settings_of(run, self.results)
        found = read_run(self.slot(run), settings["steps"]) if code == 0 else None
        if found:
            self.record(run, found)
            points = found["points"]
            right, seconds = points["sampled"][-1], points["seconds"][-1]
            return f"{run}: {right:.1%} of the samples right, trained for {seconds:.0f} seconds"
        log = self.slot(run) / "log.txt"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        words = lines[-1] if lines else "it said nothing"
        self.failed[run] = f"exit code {code}: {words}"
        return f"{run}: died with {self.failed[run]} (all of it in {log})"


def steps_done(slot: Path) -> int:
    try:
        return (slot / "run" / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """One comparison at a time in a folder; the lock goes with the last process that holds it."""
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
        lock = (folder / "runs" / "lock").open("w")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {reason(error)}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            words = "a comparison, or a run of one that was killed, is at work there"
            raise UserError(f"--output_dir {folder}: {words}") from None
        yield lock.fileno()


# ---- command line -------------------------------------------------------------------------


def report(results: dict, methods: list[str], folder: Path) -> None:
    """Tables on the screen, text and figures in the folder, of the methods that have results."""
    methods = [name for name in methods if name in results["methods"]]
    if not methods:
        return
    for table in tables(results, methods):
        console.print(table)
    (folder / "summary.md").write_text(verdict(results, methods), encoding="utf-8")
    figures = drawing()
    words = "results.json, summary.md" + ", figures" * bool(figures)
    console.print(f"{folder}: {words}", markup=False, soft_wrap=True)
    if not figures:
        return
    families = {f: names for f, names in FAMILIES.items() if set(names) <= set(methods)}
    for family, names in families.items() or [("chosen", methods)]:
        figures.accuracy(results, list(names), folder / f"accuracy-{family}")
    figures.frontier(results, methods, folder / "frontier")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def parse(args: list[str]) -> dict:
    parser = Parser(prog="lab.compare", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    own = {
        "--methods": ("str", "main", f"of {', '.join([*METHODS, *FAMILIES])}, all"),
        "--seeds": ("int", 5, "runs of each method, with the seeds 0, 1, .."),
        "--final_samples": ("int", 8, "of each test question, when a run is trained"),
        "--jobs": ("int", None, "runs side by side (default: one a core, at most 8; one on a GPU)"),
        "--output_dir": ("str", str(ROOT / "lab/results/compare"), "folder of the results"),
    }
    for flag, (annotation, default, words) in own.items():
        parser.add_argument(flag, type=kind(annotation), default=default, help=words)
    for item in dataclasses.fields(Config):
        if item.name not in OF_THE_METHODS:
            here = copy.copy(item)
            here.default = DEFAULTS.get(item.name, item.default)
            parser.add_field(here)
    values = {**DEFAULTS, **parser.parse(args)}
    for name in ("seeds", "jobs", "final_samples"):
        if values[name] is not None and values[name] < 1:
            raise UserError(f"--{name} {values[name]}: it must be at least 1")
    if not values["record_every"]:
        raise UserError("--record_every 0: the rate of forking is measured on recorded trees")
    return values


def compare(args: list[str]) -> int:
    values = parse(args)
    methods, seeds = choose(values.pop("methods")), values.pop("seeds")
    folder, jobs = Path(values.pop("output_dir")).resolve(), values.pop("jobs")
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else min(8, cores())
    final_samples = values.pop("final_samples")
    settings = shared_settings(values, final_samples)
    with locked(folder) as lock, progress_bar() as bar:
        comparison = Comparison(folder, settings, methods, seeds)
        try:
            comparison.train(jobs, lock, bar)
        except KeyboardInterrupt:
            words = "stopped; the same command goes on with the runs that are not finished"
            bar.console.print(words)
            return 130
    report(comparison.results, methods, folder)
    for run, why in comparison.failed.items():
        print(f"error: {run}: {why}", file=sys.stderr)
    return 1 if comparison.failed else 0


def main(args: list[str]) -> int:
    try:
        if args[:1] == ["run"] and len(args) == 2:  # what a comparison starts for each run
            return play(Path(args[1]))
        if args[:1] == ["entropy"]:
            from lab.forking import study

            return study(args[1:])
        return compare(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    # In the background of a script SIGINT is ignored, also by children; and a kill is a stop too.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
