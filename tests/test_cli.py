"""The command line: what a user types, right and wrong, and the screen that it is shown on."""

import dataclasses
import errno
import inspect
import json
import logging
import math
import os
import random
import re
import subprocess
import sys
from unittest.mock import Mock

import pytest
import scripted
from common import ROOT
from safetensors import SafetensorError
from scripted import main, small_tree

import app.cli
from advantage import Reward
from app.cli import EXAMPLES, parse_command, question_to_show
from app.config import PRESETS, Config, UserError
from app.page.show import IN_WORDS, to_show
from app.page.text_tree import draw_tree, print_tree
from app.records import tree_record
from app.screen import console, plain, print_log_head, print_log_line
from data.formats import Question, load_questions
from entropy import RULES

OBEYED = "\x1b]0;evil\x07\x1b[2J\x9b31m\u202e[bold]\ud800"  # by a terminal


# ---- what is typed ------------------------------------------------------------------------


BAD = {  # what is typed, and words of the complaint
    "train --group_sise 4": ["--group_sise", "--group_size", "--learning_rate"],
    "trian": ["trian", "train", "eval", "show", "report"],
    "train --branch_rule best": ["best", "paper", "official", "adaptive", "random"],
    "train --group_size four": ["--group_size", "four", "int"],
    "train --initial_rollouts 9": ["--initial_rollouts 9", "group_size (8)"],
    "train --temperature 0": ["--temperature 0", "above 0"],
    "train --top_p 0.95": ["--top_p 0.95", "whole distribution", "legal: 1"],
    "train --load_in_4bit maybe": ["maybe", "true or false"],
    "train --resume no/such/run": ["no/such/run", "config.json", "No such file"],
    "train --dataset_path no/such.jsonl": ["no/such.jsonl", "No such file"],
    "eval --json no/such/figures.json": ["no/such/figures.json", "No such file"],
    "show --html no/such/tree.html": ["--html no/such/tree.html", "No such file"],
    "eval --samples 0": ["--samples 0"],
    "eval --samples 2 --pass_k 3": ["--pass_k 3", "--samples 2"],
    "show --example nobel": ["--example", "nobel", "deep_search", "divisible"],
    "show --compare gpro": ["--compare gpro", "grpo", "official", "random", "none"],
    "show --compare paper": ["--compare paper", "choose one of grpo"],
    "show --example divisible --question q": ["--example divisible", "one of"],
    "show --example divisible --answer 4": ["--answer 4", "a --question"],
    "train --resume=--": ["--resume=--", "a value is missing"],
    "train --output_dir=": ["--output_dir : it must name a folder"],
    "train --output_dir x/..": ["--output_dir x/..: it must name a folder"],
    "train --resume=": ["is not a run"],
    "show --question=": ["--question ''", "must not be empty"],
    "show --question q --answer=": ["--answer ''", "must not be empty"],
    "eval --adapter=": ["--adapter : leave it out, or say none"],
    "report": ["folders"],
    "report a b c d e f g h i": ["9 runs: at most 8"],
}


@pytest.mark.parametrize("args", BAD)
def test_bad_input_is_one_line_and_exit_code_2(args, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(main(*args.split()), *BAD[args]) == ""
    assert list(tmp_path.iterdir()) == []


def test_a_number_has_two_legal_ends_and_they_are_named():
    """No accepted value is so large or small that something else gives up on it."""
    for item in (item for item in dataclasses.fields(Config) if re.match("int|float", item.type)):
        kind, legal = {"int": int, "float": float}[item.type.split()[0]], item.metadata
        low, high = legal.get("low", legal.get("above")), legal["high"]
        edge = 1e-9 * ("above" in legal)
        for good in (kind(low + edge), kind(high), *([0] if "also" in legal else [])):
            Config(**{"group_size": 10_000, item.name: good})
        bad = [low - 1, high + 1, 10**30, -(10**30), 10**4000]
        bad += [float("nan"), float("inf"), 1e308, -1e308] if kind is float else []
        bad += [legal["above"]] if "above" in legal else []
        bad += [1e-320] if "also" in legal else []
        for value in bad:
            with pytest.raises(UserError, match=f"^--{item.name} .{{1,60}}: it must be ") as error:
                Config(**{"group_size": 10_000, item.name: value})
            assert len(str(error.value)) < 150
            if isinstance(value, float) and not math.isfinite(value):
                assert "a finite number" in str(error.value)


def test_a_value_of_another_kind_is_refused():
    legal = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for item in dataclasses.fields(Config):
        kind, _, none = item.type.partition(" | ")
        for value in (None, "4", True, [4], {}, 0.5, 4, "a\0b", "\udfff"):
            right = isinstance(value, legal[kind]) or (none and value is None)
            if not right or value == "\udfff":
                with pytest.raises(UserError, match=f"^--{item.name} "):
                    Config(**{item.name: value})


def test_a_preset_is_legal_and_what_is_typed_wins():
    for name, values in PRESETS.items():
        args, train = ["train", "--preset", name, "--max_branches", "3"], Mock()
        assert app.cli.main(args, train, None) == 0
        train.assert_called_once_with(Config(**values | {"max_branches": 3}), resume=None)


def test_help_names_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(Config):
        assert f"--{item.name}" in text and f"(default: {item.default})" in text
    with pytest.raises(SystemExit, match=r"^0$"):
        main("--help")
    usage = capsys.readouterr().out
    assert all(f"arpo_mini.py {name} " in usage for name in app.cli.COMMANDS)


def test_every_setting_is_read_somewhere():
    files = [*ROOT.glob("*.py"), *ROOT.glob("app/*.py"), *ROOT.glob("engine/*.py")]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    of_rules = {name for rule in RULES.values() for name in inspect.signature(rule).parameters}
    for item in dataclasses.fields(Config):
        read = rf"\b(config|c|self)\.{item.name}\b"
        assert item.name in of_rules or re.search(read, source), item.name


ODD = "nan inf -inf 1e999 -1 0 1 2 1_0 0x1 true None none paper \uff11 -- %s @x = [/]".split()
ODD += ["--help", "9" * 5000, "", "a\nb", OBEYED, *OBEYED]
ODD += [f"--{item.name}" for item in dataclasses.fields(Config)] * 3


def test_odd_arguments(capsys):
    """A command ready to run, or a UserError in a line; `Config` has seen every value."""
    rng = random.Random(0)
    for _ in range(200):
        args = [rng.choice([*app.cli.COMMANDS]), *rng.choices(ODD, k=rng.randint(0, 6))]
        try:
            assert callable(parse_command(args))
        except UserError as error:
            assert app.cli.one_line(str(error)).splitlines()
        except SystemExit as ended:
            assert "--help" in args and ended.code == 0


def test_show_draws_trees_one_under_the_other(tmp_path, capsys):
    path, asked = tmp_path / "both.html", ("--question", "2 plus 2?", "--answer", "4")
    assert main("show", *asked, "--compare", "grpo", "--html", path) == 0
    *trees, costs, more, answer = capsys.readouterr().out.splitlines()
    for words in ("2 plus 2?", "H_initial", "gain", "P 0.5", "fork", "leaf 7", "advantage"):
        assert words in "\n".join(trees)
    assert answer == "answer: 4"
    heads = [line for line in trees if line.startswith("----")]
    paper = "---- paper: forks where P = 0.5 + 0.2 gain > 0.5 ----"
    assert heads == [paper, "---- grpo: never forks ----"]
    for name, line in (("paper", costs), ("grpo ", more)):
        words = r"  1 tool calls, \d+ tokens generated, 1,234 prefilled; \d of 8 answers right"
        assert re.fullmatch(name + words, line)
        assert line.split(None, 1)[1] in path.read_text()
    own, grpo = Config(entropy_tokens=3), {"branch_rule": "none", "initial_rollouts": 8}
    assert to_show(own, "grpo") == {"paper": own, "grpo": dataclasses.replace(own, **grpo)}
    assert to_show(Config(), "random")["random"] == Config(branch_rule="random")
    assert IN_WORDS.keys() == RULES.keys()


# ---- what the commands do -----------------------------------------------------------------


def test_eval_prints_also_what_it_cannot_write(few, tmp_path, monkeypatch, refused, capsys):
    path = tmp_path / "figures.json"
    command = "eval", "--dataset_path", few, "--samples", 4, "--pass_k", 2, "--json", path
    assert main(*command) == 0
    values = json.loads(path.read_text())
    assert values["config"]["eval_path"] == few and len(values["greedy"]["records"]) == 3
    printed = capsys.readouterr().out
    assert f"{values['sampled']['pass@2']:.1%}" in printed
    monkeypatch.setattr(app.cli, "write_text", Mock(side_effect=[None, UserError("it is full")]))
    assert refused(main(*command), "it is full") == printed


def test_a_file_is_not_left_empty(few, tmp_path, monkeypatch):
    """Neither by Ctrl-C while the work goes on nor by a reader that wants no more."""
    path = tmp_path / "figures.json"
    with monkeypatch.context() as patch:
        patch.setattr(scripted.Agent, "roll_out", Mock(side_effect=KeyboardInterrupt))
        assert main("eval", "--dataset_path", few, "--json", path) == 130 and not path.exists()
    closed = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(console, "print", Mock(side_effect=closed))
    assert main("eval", "--dataset_path", few, "--json", path) == 141
    assert json.loads(path.read_text())["greedy"]["questions"] == 3
    assert main("show", "--html", tmp_path / "tree.html") == 141
    assert "</html>" in (tmp_path / "tree.html").read_text()


def test_the_question_to_show(few):
    default = question_to_show(Config(), None, None, None)
    assert default == EXAMPLES["deep_search"] in load_questions(Config().eval_path)
    assert question_to_show(Config(eval_path=few), None, None, None).domain == "deep_search"
    known = load_questions(few)[0]
    assert question_to_show(Config(eval_path=few), known.text, None, None) == known
    assert question_to_show(Config(), "q", "a", None) == Question("q", ["a"])
    assert question_to_show(Config(eval_path=few), known.text, "a", None).answers == ["a"]
    assert question_to_show(Config(), None, None, "divisible").answers == ["3"]


def test_an_error_of_the_system_is_one_line_and_a_bug_keeps_its_traceback(refused):
    def ended_by(error):
        return app.cli.main(["train"], Mock(side_effect=error), None)

    refused(ended_by(OSError(errno.ENOSPC, "No space left")), "error: No space left")
    refused(ended_by(FileNotFoundError(errno.ENOENT, "No such file", "x")), "error: x: No such")
    refused(ended_by(SafetensorError("I/O error: No space left")), "error: I/O error: No space")
    with pytest.raises(ValueError, match="a bug"):
        ended_by(ValueError("a bug"))


SHELL = {  # command line after `python -c ..`: (exit codes of main, its stderr)
    "| head -0": (141, ""),
    "| head -1": (141, ""),
    "> /dev/full": (2, "error: No space left on device\n"),
    "2> /dev/full --nonsense": (2, ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", SHELL)
def test_a_screen_that_takes_no_more(end, few, tmp_path):
    code = "import engine, scripted, sys; sys.exit(scripted.main(*sys.argv[1:]))"
    run = f"{sys.executable} -c '{code}' train --output_dir {tmp_path}/run --eval_path {few}"
    shell = f"{run} --steps 500 --eval_part 0 --save_every 99 {end}; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == SHELL[end]
    if end == "| head -1":  # what was made is saved
        assert list((tmp_path / "run").glob("checkpoints/step-*/checkpoint.json"))


# ---- what is shown ------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [40, 20])
def test_no_figure_is_cut_off(narrow, few, tmp_path, capsys, monkeypatch):
    def figures(width, *command):
        monkeypatch.setattr(console, "_width", width)
        assert main(*command) == 0
        shown = capsys.readouterr().out
        assert "…" not in shown or width == 200
        untimed = re.sub(r"(seconds|\d+\.\d\d$)", "", shown, flags=re.MULTILINE)
        return sorted(re.findall(r"\d+\.\d+%?|\d+%", untimed))

    for command in [
        ("eval", "--dataset_path", few, "--samples", 4),
        ("show", "--question", "2 + 2?"),
        ("train", "--eval_path", few, "--steps", 2, "--output_dir", tmp_path / "run"),
    ]:
        wide = figures(200, *command)
        assert figures(narrow, *command) == wide and len(wide) > 10


def test_a_step_is_a_line_and_its_remarks_stand_below(monkeypatch, capsys):
    """Whole, also on a narrower screen."""
    monkeypatch.setattr(console, "_width", 20)
    figures = {"reward": 0.5, "accuracy": 0.5, "tool_calls": 9, "forks": 3, "clip_fraction": 0.4}
    figures |= {"entropy_initial": 0.1234, "entropy_after_tool": None, "train_tokens": 2000}
    figures |= {"train_tokens_unpacked": 3000, "seconds_rollout": 1.0, "seconds_update": 0.5}
    print_log_head()
    print_log_line(7, figures, ["[/] one", "two"])
    head, line, *remarks = capsys.readouterr().out.splitlines()
    assert line.split() == "7 0.500 50% 9 3 0.1234 - 40.0% 2.0k/3.0k 1.50".split()
    assert len(head) == len(line) and remarks == ["      [/] one", "      two"]


def test_nothing_that_a_terminal_obeys_reaches_it(capsys):
    # No lone surrogate: pytest's own log, which several processes exchange, cannot hold one.
    logging.getLogger("arpo_mini").info(f"[/] {OBEYED[:-1]}")
    assert capsys.readouterr().out == f"[/] {plain(OBEYED[:-1])}\n"
    leaves = small_tree(OBEYED, answer=OBEYED, result=OBEYED)
    rewards = [Reward(1.0, 1.0, True, 1)] * 2
    question = Question(OBEYED, [OBEYED], OBEYED)
    print_tree(draw_tree(tree_record(scripted.LETTERS, question, leaves, rewards, Config())))
    assert main("show", "--question", f"why {OBEYED} so?", "--answer", OBEYED) == 0
    assert main("train", "--branch_rule", f"{OBEYED}\nsecond line") == 2
    assert main(f"{OBEYED}\n") == 2
    out, error = capsys.readouterr()
    for shown in (out, error):
        assert plain(shown) == shown and "\\x1b[2J\\x9b31m\\u202e[bold]\\ud800" in shown
    assert len(error.splitlines()) == 2


def test_a_screen_that_lacks_a_character_shows_its_escape(few, monkeypatch, capfdbinary):
    with open(1, "w", encoding="ascii", closefd=False) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main("show", "--question", "wie groß? 北京", "--answer", "−1") == 0
    assert rb"wie gro\xdf? \u5317\u4eac" in capfdbinary.readouterr().out
