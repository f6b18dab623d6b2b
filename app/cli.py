"""The command line: flags in, one of four commands, an exit code out."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from safetensors import SafetensorError
from tqdm import tqdm

from app.config import PRESETS, Config
from app.evaluation import evaluate, summary
from app.page.read import report
from app.page.show import EXAMPLES, grow_trees, print_trees, question_to_show, to_show, trees_page
from app.run_folder import Terminated, resumed
from app.screen import evaluation_tables, one_line, print_table, say
from data.files import UserError, reason
from data.formats import load_questions


class Algorithm(NamedTuple):
    """What arpo_mini.py hands in: nothing here imports it."""

    train: Callable  # train(config, resume=folder)
    load_agent: Callable  # load_agent(config): see evaluation.py


# ---- flags --------------------------------------------------------------------------------


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: choose true or false")
    return text.lower() == "true"


def kind(annotation: str) -> Callable[[str], Any]:
    """The converter of a field's type, e.g. of "float | None"."""
    name, _, none = annotation.partition(" | ")
    convert = {"str": str, "int": int, "float": float, "bool": boolean}[name]

    def optional(text: str):
        return None if none and text.lower() == "none" else convert(text)

    optional.__name__ = name  # argparse names it: "invalid int value"
    return optional


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, and list the flags there are for an unknown one."""

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")

    def add_field(self, item: dataclasses.Field, *more_names: str) -> None:
        words = f"{item.metadata['help']} (default: {item.default})".replace("%", "%%")
        self.add_argument(
            f"--{item.name}", *more_names, dest=item.name, type=kind(item.type),
            default=argparse.SUPPRESS, metavar=item.type.split()[0], help=words,
        )  # fmt: skip

    def parse(self, args: list[str]) -> dict[str, Any]:
        """What was typed; a field that was not is not in it."""
        for arg in args:
            if arg.startswith("--") and arg.partition("=")[2] == "--":  # argparse drops it
                raise UserError(f"{arg}: a value is missing; see {self.prog} --help")
        values, unknown = self.parse_known_args(args)
        if unknown:
            flags = " ".join(sorted(self._option_string_actions))
            raise UserError(f"unknown: {' '.join(unknown)}; the flags of {self.prog} are {flags}")
        return vars(values)


# ---- files that a flag names --------------------------------------------------------------


def refuse_unwritable(flag: str, path: str) -> None:
    """Better refused now than after the work. A file that was not there is not left behind."""
    new = not os.path.lexists(path)
    write_text(flag, path, "", mode="a")
    if new:
        Path(path).unlink()


def write_text(flag: str, path: str, text: str, mode: str = "w") -> None:
    """What a flag asked to be written; a lone surrogate in it becomes a question mark."""
    try:
        with open(path, mode, encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: {reason(error)}") from None


# ---- the commands -------------------------------------------------------------------------


def train_command(algorithm: Algorithm, config: Config, resume: Path | None) -> None:
    """Train a policy: evaluate, roll out and update step by step, evaluate again."""
    algorithm.train(config, resume=resume)


def eval_command(
    algorithm: Algorithm, config: Config, samples: int, pass_k: int | None, json_path: str | None
) -> None:
    """Answer a file of questions, sampled and greedy: how many are right, and what they took.

    Settings of the paper: --temperature 0.6 --top_p 0.95 --samples 5. Measures: app/evaluation.py.
    """
    k = samples if pass_k is None else pass_k
    if not 1 <= k <= samples <= 10_000:
        raise UserError(f"--samples {samples} --pass_k {k}; legal: 1 <= pass_k <= samples <= 10000")
    if json_path is not None:
        refuse_unwritable("--json", json_path)
    questions = load_questions(config.eval_path)
    agent = algorithm.load_agent(config)
    agent.refuse_long(questions, config.eval_path)
    figures = {}
    for name, temperature, n in (("sampled", config.temperature, samples), ("greedy", 0.0, 1)):
        asked = dataclasses.replace(config, temperature=temperature)
        with tqdm(total=len(questions), desc=name, leave=False, disable=None) as bar:
            records = evaluate(agent, questions, asked, n, bar.update)
        figures[name] = {**summary(records, min(k, n)), "records": records}
    try:
        if json_path is not None:  # before anything is printed: a pipe may be closed
            value = {"config": dataclasses.asdict(config), **figures}
            write_text("--json", json_path, json.dumps(value, indent=2) + "\n")
    finally:  # the disk may have become full: then they are on the screen
        for name, values in figures.items():
            for table in evaluation_tables(name, values):
                print_table(table)


def show_command(
    algorithm: Algorithm, config: Config, text: str | None, answer: str | None,
    example: str | None, compare: str | None, html: str | None,
) -> None:  # fmt: skip
    """Roll out one question and draw its tree: entropy, tool results, decisions, rewards."""
    question, configs = question_to_show(config, text, answer, example), to_show(config, compare)
    if html is not None:
        refuse_unwritable("--html", html)
    shown = grow_trees(algorithm.load_agent(config), question, configs)
    if html is not None:
        write_text("--html", html, trees_page(shown))
    print_trees(shown)
    say(f"answer: {one_line(', '.join(question.answers) or 'unknown; name it with --answer')}")


def report_command(algorithm: Algorithm, folders: list[str], html: str | None) -> None:
    """Write one HTML page about one or more runs: figures, curves and rollout trees.

    Several runs are laid over each other. The file needs no network and no server.
    """
    text, target = report(list(map(Path, folders))), html or str(Path(folders[0], "report.html"))
    write_text("--html", target, text)
    say(f"{target} ({len(text) / 1e6:.2f} MB): open it in a browser")


COMMANDS = {  # name: (function, its flags beside those of Config)
    "train": (train_command, {
        "--resume": {"nargs": "?", "const": True, "metavar": "DIR", "help":
                     "go on with the run in this folder (default: the newest of --output_dir)"},
    }),
    "eval": (eval_command, {
        "--samples": {"type": int, "default": 1, "help": "trajectories for each question"},
        "--pass_k": {"type": int, "help": "k of pass@k (default: samples)"},
        "--json": {"help": "write the figures and every question's record to this file"},
    }),
    "show": (show_command, {
        "--question": {"help": "the question (default: a deep search of the mini-world)"},
        "--answer": {"help": "its right answer, where the question is your own"},
        "--example": {"choices": tuple(EXAMPLES), "help": "a question that is ready"},
        "--compare": {"metavar": "RULE", "help":
                      "a second tree of the same seed, under this rule or grpo (none, N = M)"},
        "--html": {"help": "write the tree to this file too, as a page for a browser"},
    }),
    "report": (report_command, {
        "folders": {"nargs": "+", "help": "--output_dir of a run; several are compared"},
        "--html": {"help": "file to write (default: report.html in the first folder)"},
    }),
}  # fmt: skip


def parse_command(args: list[str]) -> Callable[[Algorithm], None]:
    """The command that was asked for, with its settings, ready to run."""
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print("arpo_mini: ARPO (arXiv 2507.19849) in four files, to read and to run.\n")
        for each, (command, _) in COMMANDS.items():
            print(f"    python arpo_mini.py {each:8}{command.__doc__.splitlines()[0]}")
        print("\n--help after one of them lists its flags.")
        raise SystemExit(0 if args else 2)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    command, own_flags = COMMANDS[name]
    parser = Parser(prog=f"arpo_mini.py {name}", description=command.__doc__, allow_abbrev=False)
    for flag, options in own_flags.items():
        parser.add_argument(flag, **options)
    if name == "report":
        values = parser.parse(args[1:])
        return lambda algorithm: command(algorithm, **values)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from")
    for item in dataclasses.fields(Config):
        if name == "train":
            parser.add_field(item)
        elif item.name != "dataset_path":  # there, --dataset_path names what is evaluated on
            parser.add_field(item, *(["--dataset_path"] if item.name == "eval_path" else []))
    values = parser.parse(args[1:])
    values = {**PRESETS.get(values.pop("preset"), {}), **values}  # what was typed stays
    if values.get("resume") is not None:
        values = resumed(values)
    own = [values.pop(flag.removeprefix("--")) for flag in own_flags]
    config = Config(**values)
    return lambda algorithm: command(algorithm, config, *own)


# ---- from arguments to an exit code -------------------------------------------------------


def main(args: list[str], train: Callable, load_agent: Callable) -> int:
    """Run a command: its exit code."""
    gc.freeze()  # no garbage collection looks through what was imported, not even the last
    return exit_code(lambda: parse_command(args)(Algorithm(train, load_agent)))


def exit_code(work: Callable[[], int | None]) -> int:
    """How it ended: what it returns, or

    0    done                                  1    a number was inf or nan (FloatingPointError)
    2    a UserError, a file, a full disk      130  Ctrl-C, 143 SIGTERM, 141 a closed pipe
    """
    for stream in (sys.stdout, sys.stderr):  # a screen without a character shows its escape
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = work() or 0
        print(end="", flush=True)
        return code
    except (UserError, SafetensorError, FloatingPointError) as error:
        code = 1 if isinstance(error, FloatingPointError) else 2
        return complain(f"error: {one_line(str(error))}", code)
    except KeyboardInterrupt as stop:
        return complain("stopped", 143 if isinstance(stop, Terminated) else 130)
    except OSError as error:  # of a file that has a name, else of the screen or a full disk
        if error.filename is None:
            leave(sys.stdout)
        if isinstance(error, BrokenPipeError):  # who read it wants no more
            return 141
        where = "" if error.filename is None else f"{one_line(str(error.filename))}: "
        return complain(f"error: {where}{reason(error)}", 2)


def complain(words: str, code: int) -> int:
    try:
        print(words, file=sys.stderr, flush=True)
    except OSError:
        leave(sys.stderr)
    return code


def leave(stream: TextIO) -> None:
    """What is still to be written there goes nowhere: Python would complain of it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
