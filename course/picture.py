"""Draws rollout trees as an SVG: calls, results, H, gain, forks, rewards, advantages.

    python -m course.picture [--output docs/tree.svg] [--question TEXT] [--seed N]
    python -m course.picture --compare grpo --group_size 4 --output docs/grpo-and-arpo.svg

The text is plain SVG, readable on a projector; its colours follow the reader's light or dark mode.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from html import escape

import arpo_mini
from app.cli import exit_code, refuse_unwritable, write_text
from app.config import Config
from app.page.show import Shown, grow_trees, to_show
from data.files import UserError
from data.formats import load_questions

WIDTH, ROW, GAP = 250, 78, 34  # of a box and its row, and between columns, in SVG units
HEAD = 40  # of a heading
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1c1c1c }
.head { font-size: 18px; font-weight: 600 }
.small { font-size: 12px; fill: #555 } .fork { fill: #b3261e; font-weight: 600 }
.box { fill: #f6f6f6; stroke: #999 } .tool { fill: #e3eefc; stroke: #5b8def }
.right { fill: #e2f4e5; stroke: #2e8b47 } .wrong { fill: #fbe6e4; stroke: #b3261e }
.edge { fill: none; stroke: #888; stroke-width: 1.5 } .new { stroke: #b3261e; stroke-width: 2.5 }
.page { fill: #fff }
@media (prefers-color-scheme: dark) {
  text { fill: #eee } .small { fill: #bbb } .fork { fill: #ff8a80 }
  .box { fill: #2b2b2b } .tool { fill: #1d2b44 } .right { fill: #173d20 } .wrong { fill: #4a1f1b }
  .new { stroke: #ff8a80 } .page { fill: #161616 }
}"""


@dataclasses.dataclass
class Turn:
    """What is drawn as one box: a call with its result, or an answer."""

    lines: list[tuple[str, str]]  # (class, text)
    style: str
    forked: bool = False  # begun by a fork at the box before it
    next: list[Turn] = dataclasses.field(default_factory=list)


def turns_of(record: dict) -> Turn:
    """The boxes of a recorded tree; the question is the root."""
    nodes = record["nodes"]
    leaves = {leaf["node"]: leaf for leaf in record["leaves"]}
    known = f"right answer: {', '.join(record['answers'])}"
    root = Turn([*wrapped(record["question"]), ("small", known)], "box")
    turns = {0: root}
    for i, node in enumerate(nodes):
        if node["author"] == "tool" or i == 0:
            continue
        before = turns[node["parent"]]
        text = "".join(node["tokens"])
        decision = nodes[node["parent"]]["decision"]
        forked = bool(before.next) and bool(decision)
        turn = answer_box(text, leaves[i]) if i in leaves else call_box(text)
        turn.forked = forked
        before.next.append(turn)
        for j, result in enumerate(nodes):
            if result["parent"] == i and result["author"] == "tool":
                turns[j] = add_result(turn, result)
    return root


def call_box(text: str) -> Turn:
    name, argument = re.findall(r"<([\w-]+)>([^<]*)</\1>\s*$", text)[-1]
    return Turn([("", short(f"{name}: {argument}"))], "tool")


def add_result(turn: Turn, node: dict) -> Turn:
    text = re.sub(r"\s*</?result>\s*", "", "".join(node["tokens"]))
    turn.lines.append(("small", short(text)))
    decision = node["decision"]
    if decision:
        forks = decision["granted"]
        words = f"H {decision['H']:.3f}, gain {decision['gain']:+.3f}"
        turn.lines.append(
            ("fork" if forks else "small", words + (f": {forks} forks" if forks else ""))
        )
    return turn


def answer_box(text: str, leaf: dict) -> Turn:
    found = re.search(r"\\boxed\{(.*)\}", text)
    answer = f"answer: {found[1]}" if found else "no answer"
    figures = f"reward {leaf['total']:.1f}, advantage {leaf['advantage']:+.2f}"
    return Turn(
        [("", short(answer)), ("small", figures)], "right" if leaf["accuracy"] == 1 else "wrong"
    )


def short(text: str, most: int = 36) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 2].rstrip() + " …"


def wrapped(text: str, width: int = 34) -> list[tuple[str, str]]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [("", line) for line in lines]


def draw(trees: dict[str, Turn], title: str) -> str:
    """Trees one under the other, each below its heading; one without a heading has none."""
    parts: list[str] = []
    columns, y = 0, 16.0
    for heading, root in trees.items():
        if heading:
            y += HEAD / 2 * bool(parts)
            parts.append(f'<text class="head" x="16" y="{y + 20:.0f}">{escape(heading)}</text>')
            y += HEAD
        boxes, wide, rows = draw_tree(root, y)
        parts += boxes
        columns, y = max(columns, wide), y + rows * ROW
    width, height = 32 + columns * (WIDTH + GAP) - GAP, round(y) + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    page = f'<rect class="page" width="{width}" height="{height}"/>'
    return (
        f"{head}<title>{escape(title)}</title><style>{STYLE}</style>{page}{''.join(parts)}</svg>\n"
    )


def draw_tree(root: Turn, upper: float) -> tuple[list[str], int, int]:
    """The boxes of a tree below `upper`, each at its column, in the middle of the rows of its
    leaves; how many columns and rows that takes."""
    parts: list[str] = []
    columns = 0

    def place(turn: Turn, column: int, top: int) -> tuple[float, int]:
        """Draws a box and all after it from row `top`; its middle, and the first free row."""
        nonlocal columns
        columns = max(columns, column + 1)
        x, row, middles = 16 + column * (WIDTH + GAP), top, []
        for after in turn.next:
            middle, row = place(after, column + 1, row)
            middles.append((middle, after.forked))
        row = max(row, top + 1)
        y = sum(m for m, _ in middles) / len(middles) if middles else upper + (top + 0.5) * ROW
        for middle, forked in middles:
            a, b, style = x + WIDTH, x + WIDTH + GAP, "edge new" if forked else "edge"
            curve = f"M{a} {y:.0f}C{b} {y:.0f} {a} {middle:.0f} {b} {middle:.0f}"
            parts.append(f'<path class="{style}" d="{curve}"/>')
        height = 12 + 17 * len(turn.lines)
        where = f'x="{x}" y="{y - height / 2:.0f}" width="{WIDTH}" height="{height}"'
        parts.append(f'<rect class="{turn.style}" {where} rx="6"/>')
        for i, (style, text) in enumerate(turn.lines):
            line = y - height / 2 + 18 + 17 * i
            parts.append(f'<text class="{style}" x="{x + 9}" y="{line:.0f}">{escape(text)}</text>')
        return y, row

    _, rows = place(root, 0, 0)
    return parts, columns, rows


def picture(shown: list[Shown]) -> str:
    """The SVG of one tree, or of several, each with what it took above it."""
    several = len(shown) > 1
    trees = {
        f"{NAMES.get(each.name, each.name)}: {each.costs}" if several else "": turns_of(each.record)
        for each in shown
    }
    names = " and ".join(NAMES.get(each.name, each.name) for each in shown)
    return draw(trees, f"A rollout of {names}")


NAMES = {"paper": "ARPO", "grpo": "GRPO"}


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="course.picture", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="docs/tree.svg", help="file to write")
    asked = "How many years after the home of Della Ebner was founded was Della Ebner born?"
    parser.add_argument("--question", default=asked, help="one of the test questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group_size", type=int, default=8, help="trajectories of a tree")
    parser.add_argument("--compare", metavar="RULE", help="a second tree; the choices: show --help")
    wanted = parser.parse_args(args)
    try:
        config = Config(seed=wanted.seed, group_size=wanted.group_size)
        configs = to_show(config, wanted.compare)
    except UserError as error:
        parser.error(str(error))
    questions = load_questions(config.eval_path)
    question = next((q for q in questions if q.text == wanted.question), None)
    if question is None:
        parser.error(f"--question {wanted.question}: it is none of {config.eval_path}")
    refuse_unwritable("--output", wanted.output)
    agent = arpo_mini.load_agent(config)
    shown = grow_trees(agent, question, dict(reversed(configs.items())))  # GRPO first
    write_text("--output", wanted.output, picture(shown))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
