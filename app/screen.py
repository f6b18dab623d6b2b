"""The screen: plain figures become log lines and tables. Nothing here is the algorithm.

A narrow terminal wraps lines, but nothing is cut off: a figure without its last digits is wrong.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


class Screen(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError, for `exit_code` of cli.py; by default the program ends here


console = Screen(highlight=False)
if console.width < 1:  # COLUMNS=0: nothing would be shown
    console.width = 80

# What a terminal obeys or cannot show: control characters, bidirectional ones, lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: str) -> str:
    r"""Text from outside as it may be printed: an escape character is shown, as \x1b."""
    return UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """`plain` text without line ends: an error is one line, whatever it quotes."""
    return plain(text).replace("\n", "\\n")


def say(text: str) -> None:
    """A message, whatever it quotes."""
    console.print(plain(text), markup=False, soft_wrap=True)


class Says(logging.Handler):
    """Prints what the engine and the run folder report to the logger "arpo_mini"."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


logger = logging.getLogger("arpo_mini")
logger.setLevel(logging.INFO)
logger.addHandler(Says())


# ---- progress -----------------------------------------------------------------------------


def progress_bar() -> Progress:
    """The live view of a training; what is printed meanwhile stands above it."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


# ---- log lines ----------------------------------------------------------------------------


# trained: tokens of the update, and those of every trajectory as a row of its own
LOG_HEAD = "step  reward  right  calls  forks  H start  H tool  clipped    trained  seconds"


def print_log_head() -> None:
    console.print(LOG_HEAD, style="dim", soft_wrap=True)


def print_log_line(step: int, m: dict, remarks: Iterable[str] = ()) -> None:
    """The figures of a step, and below them what needs to be said about it."""
    H_tool = "     -" if m["entropy_after_tool"] is None else f"{m['entropy_after_tool']:6.4f}"
    trained = "/".join(f"{m[k] / 1000:.1f}k" for k in ("train_tokens", "train_tokens_unpacked"))
    console.print(
        f"{step:4d}  {m['reward']:6.3f}  {m['accuracy']:5.0%}  {m['tool_calls']:5d}  "
        f"{m['forks']:5d}  {m['entropy_initial']:7.4f}  {H_tool}  {m['clip_fraction']:7.1%}  "
        f"{trained:>9}  {m['seconds_rollout'] + m['seconds_update']:7.2f}",
        soft_wrap=True,
    )
    for words in remarks:
        console.print(f"      {words}", style="yellow", markup=False, soft_wrap=True)


# ---- tables -------------------------------------------------------------------------------


def print_table(table: Table) -> None:
    """Cells are wrapped between words and never inside a figure, however narrow the terminal."""
    for column in table.columns:
        words = " ".join(map(str, [column.header, *column.cells])).split()
        column.min_width = min(14, max(map(len, words)))  # a name may be longer, a figure is not
    table.columns[0].overflow = "fold"
    console.print(table, crop=False)


def with_interval(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['accuracy']:.1%} ({low:.0%} to {high:.0%})"


def comparison(before: dict | None, after: dict) -> Table:
    """Test figures before and after training; {"sampled": .., "greedy": ..} each.

    None before: that evaluation was lost.
    """
    both = [before or {"sampled": None, "greedy": None}, after]
    table = Table("test questions", "before (95 %)", "after (95 %)", box=box.SIMPLE_HEAD)

    def add(name: str, decoding: str, cell: Callable[[dict], str]) -> None:
        table.add_row(Text(name), *(cell(x[decoding]) if x[decoding] else "-" for x in both))

    for decoding in ("sampled", "greedy"):
        add(f"accuracy, {decoding}", decoding, with_interval)
        for domain in after[decoding]["domains"]:
            add(f"  {plain(domain)}", decoding, lambda x, d=domain: share(x["domains"].get(d)))
    add("well-formed", "sampled", lambda x: f"{x['well_formed']:.1%}")
    add("tool calls a question", "sampled", lambda x: f"{x['tool_calls']:.2f}")
    return table


def share(figures: dict | None) -> str:
    return f"{figures['accuracy']:.1%}" if figures else "-"


def evaluation_tables(name: str, figures: dict) -> list[Table]:
    """How good the answers of one evaluation are, and what they took; a row a domain."""
    at_k = [key for key in figures if key.startswith("pass@") and key != "pass@1"]
    good = {"n": ("questions", "d"), "accuracy (95 %)": (None, ""), **{k: (k, ".1%") for k in at_k}}
    good |= {"EM": ("em", ".1%"), "F1": ("f1", ".1%"), "math": ("math_equal", ".1%")}
    effort = {
        "well-formed": ("well_formed", ".1%"),
        "calls a question": ("tool_calls", ".2f"),
        "right a call": ("tool_productivity", ".2f"),
        "H start": ("entropy_initial", ".4f"),
        "H tool": ("entropy_after_tool", ".4f"),
    }
    tables = []
    for columns in (good, effort):
        table = Table(name, *columns, box=box.SIMPLE_HEAD)
        for domain, values in [*figures["domains"].items(), ("all", figures)]:
            cells = (
                with_interval(values) if key is None else
                "-" if values[key] is None else f"{values[key]:{form}}"
                for key, form in columns.values()
            )  # fmt: skip
            table.add_row(Text(plain(domain)), *cells)
        tables.append(table)
    return tables
