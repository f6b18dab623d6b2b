"""From the results of a comparison to its table: means over seeds, differences to GRPO by seed.

A run is {"wish_rate", "points": {"step": [..], "sampled": [..], ..}}; a point is an evaluation, and
what was spent on training up to it. Runs of one seed are asked the same questions in one order.
"""

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from app.screen import print_table, say
from lab.intervals import Estimate, at_budget, paired, t_interval

BASELINE = "grpo"
SPENT = ("tool_calls", "tokens", "seconds")
BUDGETS = ("step", "tool_calls", "generated_tokens")  # equal steps are equal rollouts


@dataclass(frozen=True)
class Figures:
    """One method over its seeds; what needs GRPO is None without it."""

    seeds: int
    sampled: Estimate  # accuracy of samples after training
    spent: dict[str, Estimate]  # in all, by the names of SPENT
    share: dict[str, Estimate | None]  # of what GRPO spent
    difference: dict[str, Estimate | None]  # accuracy minus GRPO's, by the names of BUDGETS
    wish_rate: float  # share of tool results at which the rule wanted a fork


def column(run: dict, name: str) -> list[float]:
    """A column of the points; "tokens" are the generated and the prefilled ones."""
    points = run["points"]
    if name != "tokens":
        return points[name]
    pairs = zip(points["generated_tokens"], points["prefill_tokens"], strict=True)
    return [a + b for a, b in pairs]


def runs_of(results: dict, method: str) -> dict[str, dict]:
    return results["methods"].get(method, {"runs": {}})["runs"]


def figures(results: dict, method: str) -> Figures:
    runs = runs_of(results, method)
    base = {} if method == BASELINE else runs_of(results, BASELINE)

    def at_end(name: str) -> Estimate:
        return t_interval([column(run, name)[-1] for run in runs.values()])

    def share(name: str) -> Estimate | None:
        return paired(runs, base, lambda a, b: column(a, name)[-1] / column(b, name)[-1])

    def difference(name: str) -> Estimate | None:
        return paired(runs, base, lambda a, b: difference_at(name, a, b))

    return Figures(
        seeds=len(runs),
        sampled=at_end("sampled"),
        spent={name: at_end(name) for name in SPENT},
        share={name: share(name) for name in SPENT},
        difference={name: difference(name) for name in BUDGETS},
        wish_rate=t_interval([run["wish_rate"] for run in runs.values()])[0],
    )


def difference_at(name: str, ours: dict, theirs: dict) -> float:
    """Difference in accuracy where both have spent what the cheaper one spent in all."""
    budget = min(column(run, name)[-1] for run in (ours, theirs))
    a, b = (at_budget(column(r, name), column(r, "sampled"), budget) for r in (ours, theirs))
    return a - b


# ---- the table ----------------------------------------------------------------------------


def percent(e: Estimate | None, sign: str = "") -> str:
    """Percent, or percentage points, with the half width of Student's interval."""
    if e is None:
        return "-"
    mean, _, high = e
    return f"{100 * mean:{sign}.1f}" + ("" if high is None else f" ±{100 * (high - mean):.1f}")


def spent(f: Figures, name: str) -> str:
    share = f.share[name]
    return f"{f.spent[name][0]:,.0f}" + (f" ({share[0]:.0%})" if share else "")


COLUMNS = {
    "seeds": lambda f: str(f.seeds),
    "sampled, %": lambda f: percent(f.sampled),
    "minus GRPO": lambda f: percent(f.difference["step"], "+"),
    "at equal calls": lambda f: percent(f.difference["tool_calls"], "+"),
    "at equal tokens": lambda f: percent(f.difference["generated_tokens"], "+"),
    "calls (of GRPO's)": lambda f: spent(f, "tool_calls"),
    "tokens (of GRPO's)": lambda f: spent(f, "tokens"),
    "seconds": lambda f: f"{f.spent['seconds'][0]:,.0f}",
    "forks wanted": lambda f: f"{f.wish_rate:.0%}",
}


def show(results: dict, methods: list[str], path: Path) -> None:
    """The table on the screen, and as Markdown in a file."""
    table = Table("method", *COLUMNS, box=box.SIMPLE_HEAD)
    lines = [["method", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    for method in methods:
        f = figures(results, method)
        lines.append([method, *(cell(f) for cell in COLUMNS.values())])
        table.add_row(*lines[-1])
    print_table(table)
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")


def drawing():
    """The module that draws; None, and a line that says how to get it, without matplotlib."""
    try:
        from lab import figures
    except ImportError as error:
        say(f"no figures ({error}): pip install matplotlib, then the same command again")
        return None
    return figures
