"""Grade the exercises: what holds, a hint for what does not, and points.

    python -m course.grade 3                    exercise 3, as it stands in course/exercises
    python -m course.grade all --json           all eight, for a program to read
    python -m course.grade all --folder DIR     somebody else's: DIR/ex1_entropy.py and so on

Each check runs in a process of its own. What is endless, crashes or ends the program costs the
points of that check only. Seconds are those of computing: a busy machine costs nobody points.
Exit code 0: all points; 1: not all; 2: a command that cannot be run.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from app.cli import exit_code
from app.screen import plain
from course.checking import KINDS, Missing, Wrong, watched

HERE = Path(__file__).resolve().parent
NAMES = {path.stem[2]: path.stem for path in sorted(HERE.glob("checks/ex?_*.py"))}  # "1": ex1_..
SECONDS = 30.0  # of computing, for all checks of an exercise but the laboratory of the eighth
PATIENCE = 10  # a busy machine may take so many times as long
STEPS = 30  # the laboratory trains so long with each rule
MEMORY = 4 * 2**30  # bytes that an answer may take


@dataclass
class Outcome:
    check: str
    holds: str  # the sentence that should hold
    points: int
    of: int
    text: str  # a hint where it does not hold, else what there is to show


def grade(number: str, folder: Path, steps: int = STEPS) -> list[Outcome]:
    """The outcome of every check of an exercise."""
    path = folder / f"{NAMES[number]}.py"
    checks = [
        function
        for function in vars(importlib.import_module(f"course.checks.{NAMES[number]}")).values()
        if hasattr(function, "points")
    ]
    deadline = time.monotonic() + PATIENCE * SECONDS
    readable, problem = apart(path, steps, lambda answer: None, seconds=5.0)
    outcomes: list[Outcome] = []
    for function in checks:
        laboratory = function.seconds > SECONDS
        left = function.seconds if laboratory else (deadline - time.monotonic()) / PATIENCE
        if not readable:
            passed, text = False, problem
        elif laboratory and not all(outcome.points for outcome in outcomes):
            passed, text = False, "not run: first the checks above"
        elif left <= 0:
            passed, text = False, f"not run: the {SECONDS:.0f} seconds of this exercise are over"
        else:
            passed, text = apart(path, steps, function, min(left, function.seconds))
        points = function.points if passed else 0
        outcomes.append(Outcome(function.__name__, function.__doc__, points, function.points, text))
    return outcomes


def load(path: Path, steps: int) -> types.ModuleType:
    """The student's file as a module: always from its source, never from a cache."""
    if not path.is_file():
        raise Wrong(f"there is no file {path.name} in {path.parent}")
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look up the module that they stand in
    try:
        source = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        source = "\0"
    if "\0" in source:  # UTF-16, as some editors save; compile would name no line
        raise Wrong(f"{path.name} is no UTF-8 text: save it as UTF-8")
    exec(compile(source, str(path), "exec"), vars(module))
    names = vars(module) | {"STEPS": steps}

    def found(name: str):
        if name not in names:
            raise Missing(f"there is no {name} in {path.name}")
        return partial(watched, name, names[name]) if name in KINDS else names[name]

    answer = types.ModuleType("answer")
    answer.__getattr__ = found
    return answer


def apart(path: Path, steps: int, check: Callable, seconds: float) -> tuple[bool, str]:
    """Load and check an answer in a process of its own: whether it holds, and a text to show.

    It may compute so many seconds, and wait some more for others who compute beside it.
    """
    stopped = False, f"stopped after {seconds:.0f} seconds: is there a loop without an end?"
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    wanted = path, steps, check, seconds, sender
    process = context.Process(target=report, args=wanted, daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(PATIENCE * seconds):
            return stopped
        message = receiver.recv_bytes().decode()
        return message[0] == "1", message[1:]
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            return stopped
        return False, "your code ended the whole program (an exit, or a crash below Python)"
    finally:
        process.kill()
        process.join()


def report(path: Path, steps: int, check: Callable, seconds: float, sender) -> None:
    """In the new process: silent, within the seconds and the memory, on one thread."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
    torch.set_num_threads(1)  # the threads of the process that was copied are not here
    holds, text = judge(path, steps, check)
    sender.send_bytes(f"{int(holds)}{text}".encode(errors="replace"))


def judge(path: Path, steps: int, check: Callable) -> tuple[bool, str]:
    """Whether the check holds, and what there is to show or to hint at."""
    try:
        return True, check(load(path, steps)) or ""
    except BaseException as error:  # deliberately everything: also SystemExit, also our own
        return False, in_words(error, path)


def in_words(error: BaseException, path: Path) -> str:
    """One line about what went wrong in the student's file."""
    if isinstance(error, Wrong):
        return str(error)
    if isinstance(error, NotImplementedError) and not error.args:
        return "not written yet"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines.append(error.lineno)
    where = f"line {lines[-1]}" if lines else "what it returned cannot be used"
    return f"{where}: {type(error).__name__}: {' '.join(str(error).split())}"[:300]


# ---- the command --------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return int(text)


def main(args: list[str]) -> int:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same points on every machine
    parser = Parser(prog="python -m course.grade", description="Grade exercises.")
    parser.add_argument("exercise", nargs="+", choices=[*NAMES, "all"], help="1 to 8, or all")
    parser.add_argument("--folder", type=folder, default=HERE / "exercises", help="of the answers")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of exercise 8's laboratory")
    given = parser.parse_args(args)
    numbers = list(NAMES) if "all" in given.exercise else sorted(set(given.exercise))
    results = {}
    for number in numbers:
        results[number] = grade(number, given.folder, given.steps)
        if not given.json:
            print_outcomes(number, given.folder, results[number])
    outcomes = [outcome for some in results.values() for outcome in some]
    points, of = sum(o.points for o in outcomes), sum(o.of for o in outcomes)
    if given.json:
        exercises = {n: [dataclasses.asdict(o) for o in some] for n, some in results.items()}
        print(json.dumps({"points": points, "of": of, "exercises": exercises}, indent=1))
    elif len(numbers) > 1:
        print(f"\nin all {points} of {of} points")
    return 0 if points == of else 1


def print_outcomes(number: str, folder: Path, outcomes: list[Outcome]) -> None:
    print(f"\nexercise {number}, {folder / NAMES[number]}.py")
    said = ""
    for outcome in outcomes:
        word = "holds" if outcome.points else "fails"
        print(f"  {word}  {outcome.points}/{outcome.of}  {outcome.holds}")
        for line in outcome.text.splitlines() if outcome.text != said else []:  # not ten times
            print(f"              {plain(line)}")
        said = outcome.text
    points, of = sum(o.points for o in outcomes), sum(o.of for o in outcomes)
    print(f"  {points} of {of} points", flush=True)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
