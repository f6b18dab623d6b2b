"""Demonstrations that call <python>, as the released SFT data does, in the grammar of our tools."""

import re

from engine.judge import as_number
from tools import ToolError, calculate

PYTHON = re.compile(r"<python>((?:(?!<python>).)*)</python>\s*$", re.DOTALL)


def with_calculator(turns: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
    """<python> calls as <calculator> calls; None where one of them is no single expression.

    The calculator must come to the number that python printed.
    """
    turns = list(turns)
    for i, (author, text) in enumerate(turns):
        code = PYTHON.search(text) if author == "policy" else None
        if code is None:
            continue
        expression = re.sub(r"^print\((.*)\)$", r"\1", code[1].strip())
        printed = turns[i + 1][1].strip() if i + 1 < len(turns) else None
        try:
            value = calculate(expression)
        except ToolError:
            return None
        if printed is None or as_number(value) is None or as_number(value) != as_number(printed):
            return None
        turns[i] = ("policy", f"{text[: code.start()]}<calculator>{expression}</calculator>")
        turns[i + 1] = ("tool", value)
    return turns
