"""The terminal: flags in, figures out. Nothing here is part of the algorithm.

Flags are made from the fields of a Config; plain figures become log lines, tables and a tree.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from data.files import UserError, reason
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

console = Console(highlight=False)

# What a terminal obeys or cannot show: control characters, bidirectional ones, lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


# ---- flags in -----------------------------------------------------------------------------


def option(default: Any, help: str, **legal) -> Any:
    """A field of Config with its help text and what is legal: choices, low, above, high."""
    return dataclasses.field(default=default, metadata={"help": help, **legal})


TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}


def check(config) -> None:
    """Raises UserError, naming the value and the legal ones, for a field out of its range."""
    for item in dataclasses.fields(config):
        value, legal = getattr(config, item.name), item.metadata
        name, _, none = item.type.partition(" | ")
        if not isinstance(value, TYPES[name]) and not (none and value is None):
            raise UserError(f"--{item.name} {value!r}: it must be of type {item.type}")
        if "choices" in legal and value not in legal["choices"]:
            raise UserError(f"--{item.name} {value}: choose one of {', '.join(legal['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{item.name} {value}: it must be a finite number")
        bounds = {
            "low": ("at least", lambda value, bound: value >= bound),
            "above": ("above", lambda value, bound: value > bound),
            "high": ("at most", lambda value, bound: value <= bound),
        }
        for name, (words, holds) in bounds.items():
            if value is not None and name in legal and not holds(value, legal[name]):
                raise UserError(f"--{item.name} {value}: it must be {words} {legal[name]}")


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
        values, unknown = self.parse_known_args(args)
        if unknown:
            flags = " ".join(sorted(self._option_string_actions))
            raise UserError(f"unknown: {' '.join(unknown)}; the flags of {self.prog} are {flags}")
        return vars(values)


# ---- figures out --------------------------------------------------------------------------


def plain(text: str) -> str:
    r"""Text from outside as it may be printed: an escape character is shown, as \x1b."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """`plain` text without line ends: an error is one line, whatever it quotes."""
    return plain(text).replace("\n", "\\n")


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def advance(bar: Progress, name: str, items: list) -> Callable[[int], None]:
    """A new line of the bar, as a function that moves it by n and removes it when it is full."""
    task, left = bar.add_task(name, total=len(items)), len(items)

    def move(n: int) -> None:
        nonlocal left
        left -= n
        bar.advance(task, n)
        if left <= 0:
            bar.remove_task(task)

    return move


# trained: tokens of the update, and those of every trajectory as a row of its own
LOG_HEAD = "[dim]step  reward  right  calls  forks  H start  H tool  clipped    trained  seconds[/]"


def log_line(step: int, m: dict, words: Iterable[str] = ()) -> str:
    """The figures of a step, and below them what needs to be said."""
    H_tool = "     -" if m["entropy_after_tool"] is None else f"{m['entropy_after_tool']:6.4f}"
    trained = "/".join(f"{m[k] / 1000:.1f}k" for k in ("train_tokens", "train_tokens_unpacked"))
    line = (
        f"{step:4d}  {m['reward']:6.3f}  {m['accuracy']:5.0%}  {m['tool_calls']:5d}  "
        f"{m['forks']:5d}  {m['entropy_initial']:7.4f}  {H_tool}  {m['clip_fraction']:7.1%}  "
        f"{trained:>9}  {m['seconds_rollout'] + m['seconds_update']:7.2f}"
    )
    return line + "".join(f"\n      [yellow]{each}[/]" for each in words)


def with_interval(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['accuracy']:.1%} ({low:.0%} to {high:.0%})"


def comparison(before: dict, after: dict) -> Table:
    """Test figures before and after training; {"sampled": .., "greedy": ..} each."""
    table = Table("test questions", "before (95 %)", "after (95 %)", box=box.SIMPLE_HEAD)
    for decoding in ("sampled", "greedy"):
        b, a = before[decoding], after[decoding]
        table.add_row(f"accuracy, {decoding}", with_interval(b), with_interval(a))
        for domain in b["domains"]:
            shares = (f"{x['domains'][domain]['accuracy']:.1%}" for x in (b, a))
            table.add_row(Text(f"  {plain(domain)}"), *shares)
    b, a = before["sampled"], after["sampled"]
    table.add_row("well-formed", f"{b['well_formed']:.1%}", f"{a['well_formed']:.1%}")
    table.add_row("tool calls a question", f"{b['tool_calls']:.2f}", f"{a['tool_calls']:.2f}")
    return table


def report_table(decoding: str, figures: dict) -> Table:
    """How good the answers of one evaluation are, a row a domain."""
    k = next(name for name in reversed(figures) if name.startswith("pass@"))
    at_k = [k] if k != "pass@1" else []  # pass@1 is the accuracy
    table = Table(decoding, "n", "accuracy (95 %)", *at_k, "EM", "F1", "math")
    table.box = box.SIMPLE_HEAD
    for domain, values in [*figures["domains"].items(), ("all", figures)]:
        shares = (*at_k, "em", "f1", "math_equal")
        table.add_row(
            Text(plain(domain)),
            str(values["questions"]),
            with_interval(values),
            *(f"{values[name]:.1%}" for name in shares),
        )
    return table


def effort_table(figures: dict) -> Table:
    """What the answers took, and how uncertain the policy was, a row a domain."""
    columns = {
        "well-formed": ("well_formed", ".1%"),
        "calls a question": ("tool_calls", ".2f"),
        "right a call": ("tool_productivity", ".2f"),
        "H start": ("entropy_initial", ".4f"),
        "H tool": ("entropy_after_tool", ".4f"),
    }
    table = Table("", *columns, box=box.SIMPLE_HEAD)
    for domain, values in [*figures["domains"].items(), ("all", figures)]:
        shown = [(values[name], form) for name, form in columns.values()]
        cells = ("-" if v is None else f"{v:{form}}" for v, form in shown)
        table.add_row(Text(plain(domain)), *cells)
    return table


def draw_tree(record: dict) -> Tree:
    """One question's rollout: tokens shaded by entropy, every decision in words, every reward."""
    nodes = record["nodes"]
    leaves = {leaf["node"]: (i, leaf) for i, leaf in enumerate(record["leaves"])}
    hottest = max((h for node in nodes for h in node["token_entropy"] or []), default=0) or 1
    drawn = {0: Tree(Text(plain(record["question"]), style="bold"), guide_style="dim")}
    for i, node in enumerate(nodes[1:], start=1):  # parents come before children
        text = tool_text(node) if node["author"] == "tool" else policy_text(node, hottest)
        drawn[i] = drawn[node["parent"]].add(text)
        if i in leaves:
            drawn[i].add(leaf_text(*leaves[i], known=bool(record["answers"])))
    return drawn[0]


def policy_text(node: dict, hottest: float) -> Text:
    text = Text()
    for token, h in zip(node["tokens"], node["token_entropy"], strict=True):
        pale = int(255 * (1 - min(1.0, h / hottest)))
        style = f"black on rgb(255,{pale},{pale})" if h > 0.05 * hottest else ""
        text.append(plain(token.replace("\n", " ")), style=style)
    return text


def tool_text(node: dict) -> Text:
    text = Text(plain("".join(node["tokens"]).replace("\n", " ")), style="cyan")
    d = node["decision"]
    if d:
        forks = f"{d['granted']} of {d['forks']} forks" if d["forks"] else "no fork"
        figures = f"H {d['H']:.3f}  H_initial {d['H_initial']:.3f}  gain {d['gain']:+.3f}"
        text.append(f"\n{figures}  P {d['probability']:.3f}  -> {forks}", style="magenta")
    return text


def leaf_text(number: int, leaf: dict, known: bool) -> Text:
    right = leaf["accuracy"] == 1
    words = "right" if right else "wrong" if known else "its right answer is not known"
    words = words if leaf["well_formed"] else "not well-formed"
    style = "bold green" if right else "bold red" if known else "bold"
    figures = f"reward {leaf['total']:.2f}, advantage {leaf['advantage']:+.2f}"
    return Text(f"leaf {number}: {words}, {figures}", style=style)
