"""The exercises from both sides: solutions hold, stubs do not, and typical mistakes are caught."""

import importlib
import json
import re
from collections import Counter

import nbformat
import pytest
from common import ROOT, lines_of, python
from nbclient import NotebookClient

from app.cli import exit_code
from app.page.show import Shown
from course import grade
from course.picture import main as draw
from course.picture import picture

SOLUTIONS, STUBS = ROOT / "course/solutions", ROOT / "course/exercises"
MOST = ["1", "7", *(pytest.param(n, marks=pytest.mark.slow) for n in "23456")]  # 8 has its own


def wrong_answers():
    """(exercise, the check that catches it, part of its hint, text of the solution, wrong text)."""
    text = (ROOT / "tests/wrong_answers.txt").read_text()
    for section in text.split("\n# exercise ")[1:]:
        number, *cases = section.split("\n")
        for case in filter(None, cases):
            parts = re.fullmatch(r"(\w+) \((.*?)\): `(.*)` => `(.*)`", case).groups()
            yield number, *(part.replace("\\n", "\n") for part in parts)


def checks(number):
    module = importlib.import_module(f"course.checks.{grade.NAMES[number]}")
    return {name: f for name, f in vars(module).items() if hasattr(f, "points")}


def written(folder, number, text):
    path = folder / f"{grade.NAMES[number]}.py"
    path.write_text(text, errors="surrogateescape")
    return path


def solution(number):
    return (SOLUTIONS / f"{grade.NAMES[number]}.py").read_text()


def test_there_are_eight_exercises_of_ten_points_each():
    for part in ("exercises", "solutions", "checks"):
        names = {path.stem for path in (ROOT / "course" / part).glob("*.py")}
        assert names == set(grade.NAMES.values()) and len(names) == 8
    for number in grade.NAMES:
        assert sum(check.points for check in checks(number).values()) == 10
    caught = {(number, name) for number, name, *_ in wrong_answers()}
    all_checks = {(number, name) for number in grade.NAMES for name in checks(number)}
    assert all_checks - caught == {("8", "laboratory")}  # its test is below


@pytest.mark.parametrize("number", MOST)
def test_a_solution_has_all_points_and_its_stub_none(number):
    assert [o for o in grade.grade(number, SOLUTIONS) if not o.points] == []
    assert {o.text for o in grade.grade(number, STUBS)} == {"not written yet"}


@pytest.mark.slow
def test_the_laboratory_shortened(tmp_path):
    outcomes = grade.grade("8", SOLUTIONS, steps=1)
    assert [o for o in outcomes if not o.points] == []
    assert outcomes[-1].text.count("points [") == 2  # two differences with their intervals
    stub = grade.grade("8", STUBS, steps=1)
    assert {o.text for o in stub} == {"not written yet", "not run: first the checks above"}
    written(tmp_path, "8", solution("8").replace("if gain > 0 else 0", "if H > 1 - 1e-9 else 0"))
    outcomes = grade.grade("8", tmp_path, steps=1)
    assert [o.check for o in outcomes if not o.points] == ["laboratory"]
    assert "wished to fork at 0%" in outcomes[-1].text


@pytest.mark.filterwarnings("ignore:std")  # of what students write
@pytest.mark.slow
@pytest.mark.parametrize(("number", "name", "hint", "right", "wrong"), [*wrong_answers()])
def test_a_typical_mistake_is_caught_by_its_check(tmp_path, number, name, hint, right, wrong):
    text = solution(number)
    assert text.count(right) == 1
    path = written(tmp_path, number, text.replace(right, wrong))
    holds, words = grade.judge(path, 1, checks(number)[name])
    assert holds == (hint == "holds") and (holds or hint in words), words


DEF = "def token_entropy(logits):\n    "


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEF + "return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        (DEF + "raise SystemExit", "line 2: SystemExit"),
        (DEF + "import os; os._exit(0)", "ended the whole program"),
        (DEF + "return token_entropy(logits)", "line 2: RecursionError"),
        (DEF + "input('?')", "line 2: EOFError"),
        (DEF + "x = []\n    while True:\n        x += [bytes(2**26)]", "line 4: MemoryError"),
        (DEF + "while 1:\n        try:\n            1 / 0\n        except BaseException: 0",
         "stopped after"),
        ("def token_entropy(:", "line 1: SyntaxError"),
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError"),
        ("\0", "ex1_entropy.py is no UTF-8 text: save it as UTF-8"),
        ("# caf\udce9", "ex1_entropy.py is no UTF-8 text: save it as UTF-8"),  # Latin-1
        ("", "there is no token_entropy in ex1_entropy.py"),
    ],
)  # fmt: skip
def test_broken_code_costs_points_and_gives_one_line(tmp_path, text, words):
    path = written(tmp_path, "1", text)
    seconds = 0.5 if words == "stopped after" else 10
    holds, hint = grade.apart(path, 1, checks("1")["natural_log"], seconds)
    assert not holds and words in hint and "\n" not in hint


def test_a_file_that_is_not_there_has_no_points(tmp_path):
    (tmp_path / "ex1_entropy.py").mkdir()
    for number in "13":
        outcomes = {(o.points, o.text) for o in grade.grade(number, tmp_path)}
        assert outcomes == {(0, f"there is no file {grade.NAMES[number]}.py in {tmp_path}")}


@pytest.mark.slow
def test_one_endless_function_does_not_cost_the_points_of_another(tmp_path, monkeypatch):
    for check in checks("1").values():
        monkeypatch.setattr(check, "seconds", 0.3)
    endless = "    while True:\n        pass\n    logp = logits"
    written(tmp_path, "1", solution("1").replace("    logp = logits", endless))
    outcomes = grade.grade("1", tmp_path)
    assert [o.check for o in outcomes if o.points] == ["mean_over_tokens", "nothing_written"]
    monkeypatch.setattr(grade, "SECONDS", 0.3)
    assert "seconds of this exercise are over" in grade.grade("1", tmp_path)[-1].text


def test_the_command(tmp_path, monkeypatch, capsys, refused):
    worse = solution("3").replace("r.std()", "r.var().sqrt() * 2")
    for number, text in (("1", solution("1")), ("3", "print('<' * 100)\n" + worse)):
        written(tmp_path, number, text)
    done = python("-m", "course.grade", *"3 1 --json --folder".split(), tmp_path)
    result = json.loads(done.stdout)
    assert (done.returncode, done.stderr, result["of"]) == (1, "", 20)
    assert 10 < result["points"] < 20
    first = {"check": "natural_log", "holds": "V equal logits give ln V", "points": 1, "of": 1}
    assert result["exercises"]["1"][0] == first | {"text": ""}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the command sets
    assert grade.main(["1", "--folder", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("10 of 10 points\n")
    written(tmp_path, "2", "raise ValueError('\\x1b[2J')")
    assert grade.main(["2", "--folder", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().out
    refused(exit_code(lambda: draw(["--output", "no/such/x"])), "--output no/such/x: No such file")
    for args, words in ((["9"], ["'9'", "'8', 'all'"]), (["1", "--folder", "no"], ["no is not a"])):
        with pytest.raises(SystemExit, match="2"):
            grade.main(args)
        assert refused(2, *words) == ""


@pytest.mark.slow
def test_the_lecture_runs_and_its_outputs_are_stored():
    """Its own asserts compare what is computed by hand with what the project computes."""
    lecture = nbformat.read(ROOT / "course/lecture.ipynb", as_version=4)
    for again in (False, True):
        if again:
            where = {"metadata": {"path": ROOT / "course"}}
            NotebookClient(lecture, timeout=900, kernel_name="python3", resources=where).execute()
        cells = [cell for cell in lecture.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        outputs = [output for cell in cells for output in cell.outputs]
        assert {out.get("name", "stdout") for out in outputs} == {"stdout"}  # no warnings
        kinds = Counter(kind for out in outputs for kind in out.get("data", {}))
        assert kinds["image/png"] >= 7 and kinds["image/svg+xml"] == 2


def test_a_picture_has_a_box_for_every_turn():
    first, second, _ = lines_of(ROOT / "tests/run", "rollouts.jsonl")
    both = [Shown("grpo", None, first, "9 tool calls"), Shown("paper", None, second, "5")]
    turns = [node for tree in (first, second) for node in tree["nodes"] if node["author"] != "tool"]
    assert picture(both).count("<rect ") == 1 + len(turns) < picture(both).count("<text ")
    assert ">GRPO: 9 tool calls<" in picture(both) and "GRPO" not in picture(both[1:])
