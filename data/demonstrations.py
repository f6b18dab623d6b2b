"""Demonstrations of a file, spelled as a rollout of ours would spell them."""

import re
from collections import Counter
from decimal import Decimal

from advantage import reward
from data.formats import Demonstration, load_demonstrations
from tools import ToolError, ToolResult, calculate, read_call, readable, result_text

# How others mark a result; a policy trained on that would write its results itself.
FOREIGN = re.compile(
    r"</(interpreter|observation|output|information|tool_response|documents?)>"
    r"|```output|<\|begin_of_documents\|>"
)


def from_file(path: str, tools: dict) -> tuple[list[Demonstration], Counter]:
    """Those of a file as a rollout would spell them, and why others were left out."""
    kept, left_out = [], Counter()
    unjudged = {"judge": lambda *_: 0.0, "tools_used": 0}
    spelled = {"policy": readable, "tool": lambda text: result_text(ToolResult(text.strip(), True))}
    for demonstration in load_demonstrations(path):
        turns = with_calculator(demonstration.turns) or []
        turns = [(author, spelled[author](text)) for author, text in turns]
        written = [text for _, text in turns[::2]]
        if not turns:
            left_out["call python for more than one expression"] += 1
        elif any(call.name not in tools for call in map(read_call, written) if call):
            left_out[f"call another tool than {' and '.join(tools)}"] += 1
        elif not written[-1].strip():
            left_out["end in a tool result"] += 1
        elif any(map(FOREIGN.search, written)) or reward(turns, [], **unjudged).total < 0:
            left_out["are badly formed, or hold results that the policy writes"] += 1
        else:
            kept.append(Demonstration(demonstration.question, turns))
    return kept, left_out


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
        printed = turns[i + 1][1] if i + 1 < len(turns) else ""
        try:
            value = calculate(expression)
            if Decimal(value) != Decimal(printed.replace(",", "")):
                return None
        except (ToolError, ArithmeticError):  # not one value, or no number
            return None
        turns[i] = ("policy", f"{text[: code.start()]}<calculator>{expression}</calculator>")
        turns[i + 1] = ("tool", value)
    return turns
