"""The layout: what imports what, how large it is, and how much of it runs in one training step."""

import ast
import dataclasses
import io
import subprocess
import sys
import threading
import tokenize
from pathlib import Path

import pytest
import torch
from common import load

from app.config import Config
from arpo_mini import make_tools, train_step
from data.formats import load_questions

ROOT = Path(__file__).resolve().parent.parent
PURE = ["entropy", "advantage", "tools"]
OURS = {  # file or folder -> what it may import of our own; course, lab and tests: all of it
    **{"entropy": [], "advantage": [], "tools": ["data"], "data": [*PURE, "data"]},
    **{"engine": [*PURE, "data", "engine"], "app": [*PURE, "data", "app"]},
    "arpo_mini": [*PURE, "data", "engine", "app"],
}
JUDGED = ["engine/judge", "engine/expressions", "engine/checks"]  # what is refused and accepted
EVERYTHING = [*OURS, "course", "lab", "tests"]
OTHERS = {"entropy": {"torch"}, "advantage": {"torch"}, "tools": {"numpy", "mpmath", "tqdm"}}


def sources(place):
    return [*ROOT.glob(f"{place}.py"), *(ROOT / place).rglob("*.py")]


def lines(*places, without=()):
    left_out = {file for place in without for file in sources(place)}
    files = {file for place in places for file in sources(place)} - left_out
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def nodes(file, *kinds):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


@pytest.mark.parametrize("place", OURS)
def test_imports_point_one_way(place):
    for file in sources(place):
        found = {alias.name for node in nodes(file, ast.Import) for alias in node.names}
        found |= {node.module or "" for node in nodes(file, ast.ImportFrom)}
        found = {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)
        assert found & set(EVERYTHING) <= set(OURS[place]), file
        assert found <= OTHERS.get(place, found) | set(OURS[place])
        if place in ("entropy", "advantage"):  # no printing, no files, no clock, no global state
            used = {node.id for node in nodes(file, ast.Name)}
            assert not used & {"print", "open", "input", "random", "time", "os", "sys"}


def test_what_there_is_and_how_large():
    assert {file.stem for file in ROOT.glob("*.py")} == {*PURE, "arpo_mini"}
    limits = {
        "arpo_mini.py": (lines("arpo_mini"), 450),
        "top level": (lines("arpo_mini", *PURE), 1380),
        "engine": (lines("engine", without=JUDGED), 1182),
        "app without the page": (lines("app", without=["app/page"]), 1498),
        "lab": (lines("lab"), 2199),
        "tests": (lines("tests"), 6924),
        "settings": (len(dataclasses.fields(Config)), 50),
        "words of the README": (len((ROOT / "README.md").read_text().split()), 900),
    }
    assert not {name: pair for name, pair in limits.items() if pair[0] > pair[1]}
    text = (ROOT / "arpo_mini.py").read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    assert len(comments) >= 0.12 * len([line for line in text.splitlines() if line.strip()])


def test_a_function_fits_on_a_screen():
    for file in (file for place in EVERYTHING for file in sources(place)):
        for function in nodes(file, ast.FunctionDef):
            assert function.end_lineno - function.lineno < 55, f"{file}: {function.name}"


def test_no_path_of_somebodys_machine_is_committed():
    """Nor of the folder beside the repository, which its users do not have."""
    paths = r"(?<![\w.:/])/(home|root|Users|work|mnt|tmp/w)/|\.\./shar" + "ed"
    command = ["git", "grep", "-lIP", paths, "--", ".", ":!tests/test_project.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")  # 1: nothing found


def test_one_training_step_can_be_followed():
    """Functions and lines of ours that run in a step with 4 questions, each counted once.

    Lines with a line event, and def lines; no function is <listcomp>, <genexpr> or <lambda>.
    """
    config = Config(questions_per_step=4)
    tools, functions, ran = make_tools(config), set(), set()
    policy, questions = load(config, tools), load_questions(config.dataset_path)[:4]
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-3)
    folders = tuple(str(ROOT / place) for place in (*PURE, "arpo_mini", "data", "engine", "app"))

    def trace(frame, event, argument):
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not file.startswith(folders):
            return None
        ran.add((file, frame.f_lineno))
        if event == "call" and not name.startswith("<"):
            functions.add((file, name, frame.f_code.co_firstlineno))
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        train_step(policy, optimizer, questions, config, tools, 1)
    finally:
        sys.settrace(before)
        threading.settrace(None)
    files = [file for file, *_ in functions]
    counted = files.count(str(ROOT / "arpo_mini.py")), len(files), len(set(files)), len(ran)
    assert all(n <= most for n, most in zip(counted, (16, 84, 8, 600), strict=True)), counted
