"""Stub until the merge."""

import re, string
from collections import Counter
from fractions import Fraction


def judge_answer(prediction: str, answers: list[str]) -> float:
    """Two numbers are equal or not, other answers score their F1; the best over the answers."""
    best = 0.0
    for answer in answers:
        numbers = as_number(prediction), as_number(answer)
        if None not in numbers:
            accuracy = float(numbers[0] == numbers[1])
        elif normalize_answer(answer):
            accuracy = f1_score(prediction, answer)
        else:  # "A" is an article, normalised to nothing: compare it as it stands
            accuracy = float(prediction.strip().lower() == answer.strip().lower())
        best = max(best, accuracy)
    return best


NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+|/\d+)?")


def as_number(text: str) -> Fraction | None:
    r"""The exact value of "-5", "1,200", "$0.50", "3/4", "\frac{3}{4}"; None for anything else."""
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text.replace("\u2212", "-"))
    text = text.strip(" \t\n\\$%")
    try:
        return Fraction(text.replace(",", "")) if NUMBER.fullmatch(text) else None
    except (ValueError, ZeroDivisionError):  # "", "1/0", more digits than Python converts
        return None


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces (SQuAD, deep_research.py)."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1_score(prediction: str, answers: str | list[str]) -> float:
    """2 |shared words| / (|prediction| + |answer|), the best over the answers; yes/no exactly."""
    best = 0.0
    for answer in [answers] if isinstance(answers, str) else answers:
        p, a = normalize_answer(prediction), normalize_answer(answer)
        if p != a and {p, a} & {"yes", "no", "noanswer"}:
            continue
        shared = (Counter(p.split()) & Counter(a.split())).total()
        best = max(best, 2 * shared / max(len(p.split()) + len(a.split()), 1))
    return best
