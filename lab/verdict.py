"""From the results of a comparison to its figures: estimates, tables, and a text to quote.

A run is {"wish_rate", "forks_per_question", "points": {"step": [..], "sampled": [..], ..}}; a point
is an evaluation, and what was spent on training up to it. Every difference is one to GRPO with the
same seed, that is the same questions in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from lab.intervals import Estimate, at_budget, paired, t_interval
from app.screen import console

BASELINE = "grpo"
# The goal at equal rollouts: how far below GRPO the interval may reach, and the shares of what GRPO
# spends that ARPO may spend.
MARGIN, MOST_CALLS, MOST_TOKENS = -0.02, 0.60, 0.70
BUDGETS = {"tool calls": "tool_calls", "generated tokens": "generated_tokens"}


@dataclass(frozen=True)
class Figures:
    """One method over its seeds; what needs GRPO is None without it."""

    seeds: int
    start: Estimate  # accuracy of samples before training
    sampled: Estimate  # and at the end
    greedy: Estimate
    spent: dict[str, Estimate]  # in all: tool_calls, generated_tokens, tokens, seconds
    share: dict[str, Estimate | None]  # of what GRPO spent
    difference: dict[str, Estimate | None]  # in accuracy, at equal "rollouts" and BUDGETS
    gained: Estimate | None  # as a share of what GRPO gained over the cold start
    wish_rate: float
    forks_per_question: float


def column(run: dict, name: str) -> list[float]:
    """A column of the points; "tokens" are the generated and the prefilled ones."""
    points = run["points"]
    if name == "tokens":
        pairs = zip(points["generated_tokens"], points["prefill_tokens"], strict=True)
        return [a + b for a, b in pairs]
    return points[name]


def runs_of(results: dict, method: str) -> dict[str, dict]:
    return results["methods"].get(method, {"runs": {}})["runs"]


def figures(results: dict, method: str) -> Figures:
    runs, base = runs_of(results, method), runs_of(results, BASELINE)
    base = {} if method == BASELINE else base

    def all_ends(name: str, at: int = -1) -> list[float]:
        return [column(run, name)[at] for run in runs.values()]

    def mean(name: str) -> float:
        return sum(run[name] for run in runs.values()) / len(runs)

    names = ("tool_calls", "generated_tokens", "tokens", "seconds")
    return Figures(
        seeds=len(runs),
        start=t_interval(all_ends("sampled", 0)),
        sampled=t_interval(all_ends("sampled")),
        greedy=t_interval(all_ends("greedy")),
        spent={name: t_interval(all_ends(name)) for name in names},
        share={name: paired(runs, base, share_of(name)) for name in names},
        difference={
            "rollouts": paired(runs, base, final_difference),
            **{words: paired(runs, base, difference_at(key)) for words, key in BUDGETS.items()},
        },
        gained=paired(runs, base, gain_share) if gains(base) else None,
        wish_rate=mean("wish_rate"),
        forks_per_question=mean("forks_per_question"),
    )


def share_of(name: str):
    return lambda ours, theirs: column(ours, name)[-1] / max(column(theirs, name)[-1], 1e-9)


def final_difference(ours: dict, theirs: dict) -> float:
    return column(ours, "sampled")[-1] - column(theirs, "sampled")[-1]


def difference_at(name: str):
    """Difference in accuracy where both have spent what the cheaper one spent in all."""

    def difference(ours: dict, theirs: dict) -> float:
        budget = min(column(run, name)[-1] for run in (ours, theirs))
        a, b = (at_budget(column(r, name), column(r, "sampled"), budget) for r in (ours, theirs))
        return a - b

    return difference


def gain(run: dict) -> float:
    return column(run, "sampled")[-1] - column(run, "sampled")[0]


def gains(runs: dict) -> bool:
    return bool(runs) and all(gain(run) > 0 for run in runs.values())


def gain_share(ours: dict, theirs: dict) -> float:
    return gain(ours) / gain(theirs)


def goal(f: Figures) -> dict[str, bool]:
    """Each part of the goal and whether it is met; an interval that is not known meets nothing."""
    low = f.difference["rollouts"][1]
    return {
        f"interval within {-100 * MARGIN:.0f} points": low is not None and low >= MARGIN,
        f"at most {MOST_CALLS:.0%} of the calls": f.share["tool_calls"][0] <= MOST_CALLS,
        f"at most {MOST_TOKENS:.0%} of the tokens": f.share["tokens"][0] <= MOST_TOKENS,
    }


def best_known(all_figures: dict[str, Figures]) -> dict[str, Figures]:
    """The methods with the most seeds: a mean over fewer is not put beside theirs."""
    most = max(f.seeds for f in all_figures.values())
    return {method: f for method, f in all_figures.items() if f.seeds == most}


def frontier(all_figures: dict[str, Figures], name: str) -> list[str]:
    """Methods that no other beats: as accurate on average and cheaper, or better for the same."""

    def place(f: Figures) -> tuple[float, float]:
        return f.sampled[0], -f.spent[name][0]

    def beaten(f: Figures) -> bool:
        a, c = place(f)
        others = [place(g) for g in all_figures.values()]
        return any(b >= a and d >= c and (b, d) != (a, c) for b, d in others)

    return [method for method, f in all_figures.items() if not beaten(f)]


def drawing():
    """The module that draws; None, and a line that says how to get it, without matplotlib."""
    try:
        from lab import figures
    except ImportError as error:
        words = f"no figures ({error}): pip install matplotlib, then the same command again"
        console.print(words, markup=False, soft_wrap=True)
        return None
    return figures


# ---- in words -----------------------------------------------------------------------------


def percent(e: Estimate | None) -> str:
    if e is None:
        return "-"
    mean, low, high = e
    return f"{mean:.1%}" + ("" if low is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def points(e: Estimate | None) -> str:
    """A difference of shares, in percentage points."""
    if e is None:
        return "-"
    mean, low, high = (None if x is None else 100 * x for x in e)
    return f"{mean:+.1f}" + ("" if low is None else f" [{low:+.1f}, {high:+.1f}]")


def plus_minus(e: Estimate | None, sign: str = "") -> str:
    """Percent or points, short enough for a terminal's table; Student's interval is symmetric."""
    if e is None:
        return "-"
    mean, _, high = e
    return f"{100 * mean:{sign}.1f}" + ("" if high is None else f" ±{100 * (high - mean):.1f}")


def count(e: Estimate) -> str:
    return f"{e[0]:,.0f}"


def tables(results: dict, methods: list[str]) -> list[Table]:
    """Two for the terminal: what came out and what it took, and the differences at budgets."""
    all_figures = {method: figures(results, method) for method in methods}
    outcome = Table("method", "n", "sampled, %", "greedy", "calls", "tokens", "seconds")
    budgets = Table("minus GRPO, points, at equal", "rollouts", *BUDGETS)
    outcome.box = budgets.box = box.SIMPLE_HEAD
    for method, f in all_figures.items():
        spent = [count(f.spent[name]) for name in ("tool_calls", "tokens", "seconds")]
        right = [plus_minus(f.sampled), plus_minus(f.greedy)]
        outcome.add_row(method, str(f.seeds), *right, *spent)
        if method != BASELINE and BASELINE in methods:
            budgets.add_row(method, *(plus_minus(e, "+") for e in f.difference.values()))
    return [outcome, budgets] if budgets.row_count else [outcome]


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sentence(method: str, f: Figures, base: Figures, settings: dict) -> str:
    """What a lecturer can quote."""
    gained = f" (of what GRPO gains over the cold start: {percent(f.gained)})" if f.gained else ""
    return (
        f"At equal rollouts ({settings['group_size']} a question, {settings['steps']} steps, "
        f"{f.seeds} seeds) {method} answers {percent(f.sampled)} of the test questions right and "
        f"GRPO {percent(base.sampled)}: {points(f.difference['rollouts'])} points{gained}, with "
        f"{percent(f.share['tool_calls'])} of the tool calls and {percent(f.share['tokens'])} of "
        "the generated plus prefilled tokens."
    )


def verdict(results: dict, methods: list[str]) -> str:
    """The whole text, in Markdown: sentences, goal, tables, frontier, limits."""
    all_figures = {method: figures(results, method) for method in methods}
    others = {m: f for m, f in all_figures.items() if f.share["tokens"]}
    parts = ["# What the comparison says", how(results["settings"])]
    parts += [outcome_table(all_figures)]
    if others:
        base, settings = figures(results, BASELINE), results["settings"]
        parts += [f"- {sentence(m, f, base, settings)}" for m, f in others.items()]
        parts += ["## Less for the same?", goal_text(others), "## At equal budgets"]
        parts += [budget_text(), budget_table(others)]
    parts += [
        "## The frontier",
        frontier_text(all_figures),
        "## Limits",
        limits(results["settings"]),
    ]
    return "\n\n".join(parts) + "\n"


def how(settings: dict) -> str:
    return (
        f"{settings['steps']} steps of {settings['questions_per_step']} questions, "
        f"{settings['group_size']} trajectories each, from one cold start: "
        f"{settings['model_name']}, adapter {settings['adapter'] or 'none'}. Accuracy is that of "
        f"{settings['final_samples']} samples at temperature 1 for each test question, and of one "
        "along the way; mean and 95 % interval over seeds (Student's t), differences paired by "
        "seed. Written by `python -m lab.compare`."
    )


ALWAYS = (
    "wherever it can, because the rule it controls for does: the two are (nearly) one method, and "
    "say nothing about what the entropy is good for."
)


def outcome_table(all_figures: dict[str, Figures]) -> str:
    head = "method|seeds|start|sampled|greedy|tool calls|generated|generated + prefilled|seconds"
    head = [*head.split("|"), "wishes to fork", "forks a question"]
    rows = [
        [
            *(method, str(f.seeds), f"{f.start[0]:.1%}", percent(f.sampled), percent(f.greedy)),
            *(count(f.spent[name]) for name in f.spent),
            *(f"{f.wish_rate:.1%}", f"{f.forks_per_question:.2f}"),
        ]
        for method, f in all_figures.items()
    ]
    note = (
        "A rule wishes to fork at this share of the tool results; the slots of a question limit "
        "how often it does. A random control wishes with the probability that the method it "
        "controls for measured, seed by seed. Seconds are those of training, without evaluations."
    )
    for method, f in all_figures.items():
        if "random" in method and f.wish_rate > 0.99:
            note += f" **{method} forks {ALWAYS}**"
    return markdown(head, rows) + "\n\n" + note


def goal_text(others: dict[str, Figures]) -> str:
    parts = list(goal(next(iter(others.values()))))
    met = {method: list(goal(f).values()) for method, f in others.items()}
    rows = [
        [method, *("yes" if part else "no" for part in met[method]), *shares(others[method])]
        for method in others
    ]
    winners = [method for method in others if all(met[method])]
    words = f"The goal is met by {', '.join(winners)}." if winners else "No method meets the goal."
    head = ["method", *parts, "difference", "calls", "tokens"]
    return markdown(head, rows) + "\n\n" + words


def shares(f: Figures) -> list[str]:
    return [
        points(f.difference["rollouts"]), percent(f.share["tool_calls"]), percent(f.share["tokens"])
    ]  # fmt: skip


def budget_text() -> str:
    return (
        "Accuracy minus GRPO's in percentage points, where both have spent what the cheaper of the "
        "two spent in all; between two evaluations a curve is a straight line."
    )


def budget_table(others: dict[str, Figures]) -> str:
    head = ["method", *(f"equal {name}" for name in ("rollouts", *BUDGETS))]
    return markdown(head, [[m, *map(points, f.difference.values())] for m, f in others.items()])


def frontier_text(all_figures: dict[str, Figures]) -> str:
    names = {"tool calls": "tool_calls", "generated plus prefilled tokens": "tokens"}
    all_figures, lines = best_known(all_figures), []
    for words, name in names.items():
        best = sorted(frontier(all_figures, name), key=lambda m: all_figures[m].spent[name][0])
        told = (
            f"{m} ({count(all_figures[m].spent[name])}: {all_figures[m].sampled[0]:.1%})"
            for m in best
        )
        lines.append(f"- {words}, cheapest first: {', '.join(told)}")
    seeds = next(iter(all_figures.values())).seeds
    note = (
        f"What no other method with {seeds} seeds equals or beats, on average, for less "
        "(intervals: see above):"
    )
    return note + "\n\n" + "\n".join(lines)


MINIATURE = (
    "A planted miniature: a policy of a million parameters in a small fictional world, whose cold "
    "start was taught to hesitate after tool results. It shows how the methods work and what they "
    "cost, not which one wins elsewhere. "
)


def limits(settings: dict) -> str:
    return (MINIATURE if settings["model_name"] == "data/tiny-qwen3" else "") + (
        "The intervals are over seeds (order of the questions, adapter, sampling), not over cold "
        "starts or worlds; each stands for one difference alone, however many there are."
    )
