"""Metrics: parity with the released evaluation, the sane defaults, pass@k and intervals."""

import json
from itertools import combinations
from pathlib import Path

import pytest

import app.evaluation as metrics
from data.formats import gsm8k_answer
from app.evaluation import exact_match, judge, math_equal, pass_at_k, summary, wilson

SCORES = ("em", "acc", "f1", "math_equal")


def load(name):
    return json.loads((Path(__file__).parent / "parity" / f"{name}.json").read_text())


EVALUATION, EQUIVALENCE = load("evaluation"), load("math_equivalence")


# ---- parity with the released evaluation --------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), EVALUATION["extract_answer"])
def test_extracted_answer(text, expected):
    assert metrics.official_prediction(text) == expected


@pytest.mark.parametrize(("text", "expected"), EVALUATION["last_boxed_only_string"])
def test_last_box(text, expected):
    assert metrics.official_boxed(text) == expected


@pytest.mark.parametrize(("text", "expected"), EVALUATION["extract_solution_gsm8k"])
def test_gsm8k_solution(text, expected):
    """Where the released code fails, for it knows of no other kind of answer, the text stays."""
    assert gsm8k_answer(text) == (text if expected is None else expected)


@pytest.mark.parametrize(("name", "scored"), [("qa", "qa_metrics"), ("math", "math_metrics")])
def test_scores_of_an_answer(name, scored):
    function = {"qa": metrics.official_qa, "math": metrics.official_math}[name]
    assert len(EVALUATION[scored]) > 250
    for prediction, answers, *expected in EVALUATION[scored]:
        got = function(prediction, answers)
        assert [got[key] for key in SCORES] == pytest.approx(expected, abs=1e-12), (
            prediction,
            answers,
        )


@pytest.mark.parametrize(("text", "expected"), EQUIVALENCE["strip_string"])
def test_simplified_math(text, expected):
    if expected is None:
        with pytest.raises(ValueError):
            metrics.simplify_math(text)
    else:
        assert metrics.simplify_math(text) == expected


@pytest.mark.parametrize(("a", "b", "expected"), EQUIVALENCE["is_equiv"])
def test_equivalence(a, b, expected):
    assert metrics.official_math_equal(a, b) is expected


def test_calls_and_text_without_results():
    for text, search, python, rest in EVALUATION["tags"]:
        assert metrics.official_calls(text, "search") == search
        assert metrics.official_calls(text, "python") == python
        assert metrics.without_results(text) == rest


@pytest.mark.parametrize("case", EVALUATION["end_to_end"], ids=lambda case: case["task"])
def test_end_to_end(case):
    overall = case["overall"]
    rows = []
    for (output, prediction, answer), expected in zip(case["items"], case["per_item"], strict=True):
        got = metrics.official_scores(prediction, output, answer, case["task"] == "math")
        calls = [metrics.official_calls(output, tag) for tag in ("search", "python")]
        length = len(metrics.without_results(output))
        row = [*(got[key] for key in SCORES), *calls, length]
        assert row == pytest.approx(expected, abs=1e-12)
        rows.append(row)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert means[:4] == pytest.approx([overall[key] for key in SCORES], abs=1e-12)
    accuracy = overall["math_equal" if case["task"] == "math" else "f1"]
    productivity = metrics.official_productivity(accuracy, means[4] + means[5])
    assert productivity == pytest.approx(overall["tool_productivity"], abs=1e-9)


# ---- the default --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("-3/4", "-\\frac{3}{4}"),
        ("\\frac{-3}{4}", "-\\frac{3}{4}"),
        ("0.50", "1/2"),
        ("1,000", "1000"),
        ("1\\,000", "1000"),
        ("$5", "5"),
        ("50\\%", "50"),
        ("12\\text{ cm}", "12"),
        ("\\text{Paris}", "paris"),
        ("x = \\dfrac{1}{2}", "0.5"),
        ("(1, 2)", "\\left(1,2\\right)"),
        ("3\\sqrt3 - 6", "3\\sqrt{3}-6"),
        ("2.0", "2"),
        ("$\\frac12$", ".5"),
    ],
)
def test_mathematically_equal(a, b):
    assert math_equal(a, b) and math_equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("-5", "5"),
        ("1/2", "12"),
        ("", "5"),
        ("3", "3.1"),
        ("\\frac", "\\sqrt"),
        ("(1,2)", "(2,1)"),
        ("1/0", "2/0"),
    ],
)
def test_not_mathematically_equal(a, b):
    assert not math_equal(a, b) and not math_equal(b, a)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The Paris!", "paris", True),
        ("1,000", "1000", True),
        ("-5", "5", False),
        ("York New", "New York", False),
        ("A", "a", True),
        ("the", "a", False),
        ("", "a", False),
    ],
)
def test_exact_match(prediction, answer, expected):
    assert exact_match(prediction, answer) is expected


def transcript(answer):
    call = "<think>I add.</think><calculator>2+2</calculator>"
    end = f"<think>So.</think><answer>\\boxed{{{answer}}}</answer>"
    return [("policy", call), ("tool", "<result>\n4\n</result>"), ("policy", end)]


def test_an_answer_counts_when_its_transcript_is_well_formed():
    turns = transcript("New York City")
    got = judge(turns, ["York", "the New York City"], well_formed=True)
    assert got == {"prediction": "New York City", "em": 1.0, "f1": 1.0, "math_equal": 0.0}
    got = judge(turns, ["New York"], well_formed=True)
    assert got["em"] == 0 and got["f1"] == pytest.approx(0.8)
    none = {"prediction": None, "em": 0.0, "f1": 0.0, "math_equal": 0.0}
    assert judge(turns, ["New York City"], well_formed=False) == none


def test_the_official_answer_of_a_transcript_without_tags_is_what_was_said_last():
    got = metrics.official_judge("some thoughts\n\n4", ["4"], is_math=True)
    assert got["prediction"] == "some thoughts\n4" and got["acc"] == 1 and got["em"] == 0
    assert metrics.official_judge("  \n", ["4"], is_math=True)["prediction"] == ""


# ---- many answers -------------------------------------------------------------------------


def record(domain, accuracy, math_equal=None, calls=0):
    return {
        "domain": domain,
        "accuracy": accuracy,
        "em": [float(a == 1) for a in accuracy],
        "f1": accuracy,
        "math_equal": math_equal or [0.0] * len(accuracy),
        "well_formed": [True] * len(accuracy),
        "tool_calls": calls,
        "entropy_initial": 0.25,
        "entropy_after_tool": None,
    }


def test_summary_counts_by_domain_what_is_right_and_what_it_took():
    records = [
        record("math", [1.0, 0.0], [1.0, 1.0], calls=4),  # the second is equal, not the same text
        record("math", [0.0, 0.0], calls=2),
        record("knowledge", [0.5, 1.0], calls=0),
    ]
    figures = summary(records, k=2)
    assert figures["questions"] == 3
    assert figures["accuracy"] == figures["pass@1"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert figures["pass@2"] == pytest.approx(2 / 3)
    assert figures["f1"] == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert figures["em"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert figures["math_equal"] == pytest.approx(1 / 3)
    assert figures["tool_calls"] == pytest.approx(1)
    assert figures["tool_productivity"] == pytest.approx(3 / 6)  # three right answers, six calls
    # math_equal in math, F1 elsewhere: (1 + 0 + 0.75) / 3
    assert figures["official_productivity"] == pytest.approx(100 * 1.75 / 3 * 1 / 1.1)
    assert figures["entropy_initial"] == 0.25 and figures["entropy_after_tool"] is None
    math, knowledge = figures["domains"]["math"], figures["domains"]["knowledge"]
    assert math["accuracy"] == 0.5 and math["tool_productivity"] == pytest.approx(2 / 6)
    assert knowledge["tool_productivity"] is None and knowledge["official_productivity"] == 0


def test_pass_at_k_and_wilson():
    for n, c, k in ((6, 2, 3), (5, 0, 2), (5, 5, 1), (4, 3, 2)):
        draws = list(combinations(range(n), k))
        expected = sum(any(i < c for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(c, n, k) == pytest.approx(expected)
    low, high = wilson(0.5, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
