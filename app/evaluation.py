"""How good are the answers: exact match, F1, mathematical equality, pass@k, per domain.

`judge` is for one answer; `summary` for the records of many. By default an answer counts when its
transcript is well-formed, and numbers are compared as numbers. The `official_` functions score as
the released evaluation does (evaluation/src of RUC-NLPIR/ARPO), quirks included:

                 released evaluation                     default
    answer       the last box of the last answer, else   the box of a well-formed transcript
                 its text, else the last five lines
    em, f1       lower case, single spaces; no articles  SQuAD: no punctuation either; numbers are
                 outside math; "1,000" is not "1000"     equal or not; "1,000" is "1000"
    math_equal   one spelling (`simplify_math`) of the   the same, then exact values: "-3/4" is
                 lower case text; "0.50" is not "1/2"    "-\\frac{3}{4}" and "0.50" is "1/2"
    gold "[a]"   a list of answers, outside math         one answer
    tool         accuracy * calls / (calls + 0.1) * 100  right answers per tool call
    productivity (more calls score more)
"""

from __future__ import annotations

import math
import re
from collections import Counter

from advantage import boxed
from engine.judge import judge_answer as answer_accuracy, as_number, normalize_answer

# ---- one answer ---------------------------------------------------------------------------


def judge(turns: list[tuple[str, str]], answers: list[str], well_formed: bool) -> dict:
    """Prediction, em, f1 and math_equal of a trajectory: (author, text) turns without its prompt.

    `well_formed` is the reward's verdict; an answer in a bad transcript counts as none.
    """
    prediction = boxed(turns[-1][1]) if well_formed else None
    if prediction is None:
        return {"prediction": None, "em": 0.0, "f1": 0.0, "math_equal": 0.0}
    return {
        "prediction": prediction,
        "em": float(any(exact_match(prediction, answer) for answer in answers)),
        "f1": answer_accuracy(prediction, answers),
        "math_equal": float(any(math_equal(prediction, answer) for answer in answers)),
    }


def exact_match(prediction: str, answer: str) -> bool:
    """Equal numbers, or equal texts without case, punctuation and articles."""
    numbers = as_number(prediction), as_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    texts = normalize_answer(prediction), normalize_answer(answer)
    return texts[0] == texts[1] != "" or prediction.strip().lower() == answer.strip().lower()


def math_equal(prediction: str, answer: str) -> bool:
    r"""The same value, or the same expression: "x = 1/2" and "\frac12", "(1, 2)" and "(1,2)"."""
    p, a = plain_math(prediction), plain_math(answer)
    values = as_number(p), as_number(a)
    return p == a or (None not in values and values[0] == values[1])


def plain_math(text: str) -> str:
    """`simplify_math` in lower case, and without dollar signs, thin spaces and text boxes."""
    text = re.sub(r"\\[,;:]|\$", "", text.strip().rstrip("."))
    try:
        text = simplify_math(text)
    except ValueError:
        text = text.replace(" ", "")
    return re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text).lower()


def simplify_math(text: str) -> str:
    r"""One spelling for the common ones of LaTeX, as in the released math_equivalence.py:

        \tfrac12, \dfrac{1}{2}, 1/2, .5   \frac{1}{2}        \sqrt3               \sqrt{3}
        \left( \right)                    ( )                 x = 3                3
        90^\circ, \$5, 50\%, 12\text{ cm} 90, 5, 50, 12       spaces               none

    ValueError where it gives up: a \frac or \sqrt with nothing after it, two units.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub("[td]frac", "frac", text)
    text = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", text)
    if text.count("\\text{ ") > 1:
        raise ValueError("two units")
    text = text.partition("\\text{ ")[0].replace("\\%", "")
    text = re.sub(r"^\.", "0.", re.sub(r"([ {])\.", r"\g<1>0.", text))
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = braces(text, "sqrt", r"\\sqrt([^{])", r"\\sqrt{\1}").replace(" ", "")
    if not re.search(r"\\frac[^{](?:$|(?=\\frac))", text):  # quirk: then all of it stays
        text = braces(text, "frac", r"\\frac([^{])([^{])", r"\\frac{\1}{\2}")
        text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"\A(0|-?[1-9]\d*)/(0|-?[1-9]\d*)\Z", r"\\frac{\1}{\2}", text)


def braces(text: str, command: str, pattern: str, replacement: str) -> str:
    if re.search(rf"\\{command}(?:$|(?=\\{command}))", text):
        raise ValueError(f"\\{command} of nothing")
    return re.sub(pattern, replacement, text)


# ---- one answer, as the released evaluation scores it -------------------------------------


def official_judge(text: str, answers: list[str], is_math: bool) -> dict:
    """`judge` by the released code: `text` is the whole transcript, results included."""
    answer = answers[0] if len(answers) == 1 else answers
    return official_scores(official_prediction(text), text, answer, is_math)


def official_scores(prediction: str, text: str, answer: str | list[str], is_math: bool) -> dict:
    """Prediction, em, acc (the answer stands in the prediction), f1 and math_equal."""
    if not prediction:  # quirk: then whatever was said last is the answer
        prediction = "\n".join(text.replace("\n\n", "\n").strip().split("\n")[-5:])
    if not prediction:
        return {"prediction": "", "em": 0, "acc": 0, "f1": 0.0, "math_equal": 0}
    return {
        "prediction": prediction,
        **(official_math if is_math else official_qa)(prediction, answer),
    }


def official_prediction(text: str) -> str:
    r"""The last \boxed in the last <answer>..</answer>, or what stands there; without tags, any."""
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    within = found[-1] if found else text
    box = official_boxed(within)
    if box.startswith("\\boxed{") and box.endswith("}"):
        box = box[len("\\boxed{") : -1]
    if box.startswith("\\text{") and box.endswith("}"):
        box = box[len("\\text{") : -1]
    return box or (within if found else "")


def official_boxed(text: str) -> str:
    r"""The last \boxed with its braces; quirk: everything to the end where they do not close."""
    _, found, rest = text.rpartition("\\boxed")
    depth = 0
    for i, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return found + rest[: i + 1]
    return found + rest if found else ""


def official_math(prediction: str, answer: str | list[str]) -> dict:
    return best(prediction, [answer] if isinstance(answer, str) else answer, squeeze)


def official_qa(prediction: str, answers: str | list[str]) -> dict:
    if isinstance(answers, str):  # quirk: a text in brackets is taken for a list
        listed = answers.startswith("[")
        answers = re.split(r",\s*", answers.strip("[]")) if listed else [answers]
    return best(prediction, answers, lambda text: squeeze(re.sub(r"\b(a|an|the)\b", " ", text)))


def squeeze(text: str) -> str:
    return " ".join(text.split())


def best(prediction: str, answers: list[str], normalise) -> dict:
    """The highest of each score over the answers."""
    p = normalise(prediction.lower())
    scores = {"em": 0, "acc": 0, "f1": 0.0, "math_equal": 0}
    for answer in answers:
        a = normalise(answer.lower())
        shared = (Counter(p.split()) & Counter(a.split())).total()
        now = {
            "em": int(p == a),
            "acc": int(a in p),  # quirk: any text holds an answer that is an article
            "f1": 2 * shared / max(len(p.split()) + len(a.split()), 1),
            "math_equal": int(official_math_equal(p, a)),
        }
        scores = {name: max(scores[name], now[name]) for name in scores}
    return scores


def official_math_equal(a: str | None, b: str | None) -> bool:
    try:
        return simplify_math(a) == simplify_math(b)
    except (ValueError, AttributeError):
        return a == b


def official_calls(text: str, tag: str) -> int:
    """Pairs of <tag> and </tag>, wherever they stand."""
    return len(re.findall(f"<{tag}>.*?</{tag}>", text, re.DOTALL))


def without_results(text: str) -> str:
    """What the policy wrote of a transcript."""
    return re.sub(r"<result>.*?</result>", "", text, flags=re.DOTALL).strip()


def official_productivity(accuracy: float, calls: float) -> float:
    """`tool_productivity` of evaluator.py: near the accuracy in percent, unless calls are rare."""
    return 100 * accuracy * calls / (calls + 0.1)


# ---- many answers -------------------------------------------------------------------------


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that k of n samples hold a right one, unbiased (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p seen on n questions (Wilson 1927)."""
    z = 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def summary(records: list[dict], k: int | None = None) -> dict:
    """Shares over all records and for each domain, each record with n trajectories of a question.

    A trajectory is right when its accuracy is 1 or its answer is mathematically equal.
    `tool_productivity` is right answers per tool call (None without calls), and
    `official_productivity` the released code's, from math_equal in the domain math, else from F1.
    """

    def figures(some: list[dict]) -> dict:
        n = len(some[0]["accuracy"])
        right = [sum(map(is_right, record["accuracy"], record["math_equal"])) for record in some]
        accuracy = mean([count / n for count in right])
        calls = mean([record["tool_calls"] / n for record in some])
        official = mean([mean(r["math_equal" if r["domain"] == "math" else "f1"]) for r in some])
        return {
            "questions": len(some),
            "accuracy": accuracy,
            "interval": wilson(accuracy, len(some)),
            "pass@1": mean([pass_at_k(count, n, 1) for count in right]),
            f"pass@{k or n}": mean([pass_at_k(count, n, k or n) for count in right]),
            **{name: mean([mean(r[name]) for r in some]) for name in ("em", "f1", "math_equal")},
            "well_formed": mean([mean(record["well_formed"]) for record in some]),
            "tool_calls": calls,
            "tool_productivity": accuracy / calls if calls else None,
            "official_productivity": official_productivity(official, calls),
            "entropy_initial": mean([record["entropy_initial"] for record in some]),
            "entropy_after_tool": mean([record["entropy_after_tool"] for record in some]),
        }

    domains = sorted({record["domain"] for record in records})
    by_domain = {d: figures([r for r in records if r["domain"] == d]) for d in domains}
    return {**figures(records), "domains": by_domain}


def is_right(accuracy: float, equal: float) -> bool:
    return accuracy == 1 or equal == 1

def evaluate_midway(*a): pass
