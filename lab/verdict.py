"""From the results of a comparison to its table and summary: means over seeds, paired differences.

A run is {"wish_rate", "points": {"step": [..], "sampled": [..], ..}}; a point is an evaluation, and
what was spent on training up to it. Runs of one seed draw their questions in one order.
"""

import json
import re
from operator import add, truediv
from pathlib import Path
from statistics import fmean

from lab.intervals import Estimate, paired, t_interval

COLUMNS = "step sampled tool_calls generated_tokens prefill_tokens seconds live_groups".split()
BASELINE = "grpo"
TARGETS = (0.85, 0.9)  # accuracies: what does it take to get there?
LAST = 5  # evaluations: their mean swings less than the final accuracy does
OURS, BESIDE = "step", {"random": "step-random", "default": "arpo-1-of-8-z4", "grpo": "grpo"}
PAIRS = [(OURS, theirs) for theirs in BESIDE.values()]  # whose differences are in the table
PAIRS += [("step-after", theirs) for theirs in ("step-after-random", "step-shuffled")]
PAIRS += [(OURS, theirs) for theirs in ("step-after", "16x4", "grpo-live")]
PAIRS += [("step-oracle", "step-after")]


def check(results: dict) -> None:
    """ValueError, or another of BAD_ROW, for what no comparison has written."""
    objects = [results["settings"], *(m["overrides"] for m in results["methods"].values())]
    if not all(isinstance(each, dict) for each in objects):
        raise ValueError("settings and overrides are objects")
    if not any(method["runs"] for method in results["methods"].values()):
        raise ValueError("it holds no runs")
    for name, method in results["methods"].items():
        for seed, run in method["runs"].items():
            steps, right, *_ = columns = [run["points"][each] for each in COLUMNS]
            numbers, shares = sum(columns, [run["wish_rate"]]), [run["wish_rate"], *right]
            whole = len({*map(len, columns)}) == 1 and steps == sorted({*steps}) and steps[1:]
            whole = whole and all(0 <= n < 1e15 for n in numbers) and max(shares) <= 1
            if not whole or not re.fullmatch("0|[1-9][0-9]*", seed):
                words = "a seed is 0, 1, .., columns have one length, shares are in [0, 1]"
                raise ValueError(f"{name}, seed {seed}: {words}")


def column(run: dict, name: str) -> list[float]:
    """A column of the points; "tokens" are the generated and the prefilled ones."""
    points = run["points"]
    if name != "tokens":
        return points[name]
    return [*map(add, points["generated_tokens"], points["prefill_tokens"])]


def runs_of(results: dict, method: str) -> dict[str, dict]:
    return results["methods"].get(method, {"runs": {}})["runs"]


def until(run: dict, name: str, target: float) -> float | None:
    """What was spent at the first of two successive evaluations that reach an accuracy."""
    right = [value >= target for value in column(run, "sampled")]
    places = [i for i in range(len(right) - 1) if right[i] and right[i + 1]]
    return column(run, name)[places[0]] if places else None


def share_until(ours: dict, theirs: dict, name: str, target: float) -> Estimate | None:
    """Of what the others spent until then, by seed, where both got there."""
    spent = [{s: until(run, name, target) for s, run in r.items()} for r in (ours, theirs)]
    reached = [{s: value for s, value in some.items() if value} for some in spent]
    return paired(*reached, truediv)


def last(runs: dict[str, dict], name: str) -> dict[str, float]:
    """What was spent in all, by seed: the last value of a column."""
    return {seed: column(run, name)[-1] for seed, run in runs.items()}


def accuracy(runs: dict[str, dict], count: int = 1) -> dict[str, float]:
    """In %, by seed: the mean of so many last evaluations; no seed that has fewer in training."""
    found = {s: column(run, "sampled")[1:] for s, run in runs.items()}
    return {s: 100 * fmean(each[-count:]) for s, each in found.items() if len(each) >= count}


def difference(results: dict, ours: str, theirs: str, count: int = 1) -> Estimate | None:
    """Of the accuracies after training, in points, paired by seed."""
    return paired(*(accuracy(runs_of(results, method), count) for method in (ours, theirs)))


# ---- the table ----------------------------------------------------------------------------


def interval(e: Estimate | None, form: str) -> str:
    """A mean with the half width of Student's interval."""
    if e is None:
        return "-"
    mean, _, high = e
    return format(mean, form) + ("" if high is None else f" ±{high - mean:.1f}")


def row(results: dict, method: str) -> dict[str, str]:
    """What a method reached and what it took, by the heads of the table."""
    runs, base = runs_of(results, method), runs_of(results, BASELINE)
    cells = {"method": method, "seeds": str(len(runs))}
    for count, words in ((1, "accuracy, %"), (LAST, f"of the last {LAST} evaluations, %")):
        found = [*accuracy(runs, count).values()]
        cells[words] = interval(t_interval(found) if found else None, ".1f")
    beside = None if method == BASELINE else difference(results, method, BASELINE)
    cells["minus GRPO"] = interval(beside, "+.1f")
    for name, words in (("tool_calls", "calls"), ("tokens", "tokens")):
        spent = {seed: value for seed, value in last(base, name).items() if value}
        share = paired(last(runs, name), spent, truediv)
        of = f" ({share[0]:.0%})" if share and method != BASELINE else ""
        cells[f"{words} (of GRPO's)"] = f"{fmean(last(runs, name).values()):,.0f}{of}"
        for target in TARGETS:
            spent = [until(run, name, target) for run in runs.values()]
            there = [value for value in spent if value is not None]
            some = f" ({len(there)} of {len(spent)})" if len(there) < len(spent) else ""
            cells[f"{words} until {target:.0%}"] = f"{fmean(there):,.0f}{some}" if there else "-"
    names = ("live_groups", "step", "tool_calls")
    live, steps, calls = (sum(last(runs, name).values()) for name in names)
    cells["live groups a step"] = f"{live / steps:.1f}"
    cells["live per 100 calls"] = f"{100 * live / calls:.1f}" if calls else "-"
    cells["seconds"] = f"{fmean(last(runs, 'seconds').values()):,.0f}"
    return cells | {"forks wanted": f"{fmean(run['wish_rate'] for run in runs.values()):.0%}"}


def tables(results: dict, methods: list[str]) -> list[list[list[str]]]:
    """The table and, where there are any, the differences: a head and lines of cells each."""
    rows = [row(results, method) for method in methods]
    found = [[[*rows[0]], *([*cells.values()] for cells in rows)]]
    lines = []
    for pair in PAIRS:
        if {*pair} <= {*methods} and difference(results, *pair):
            both = (difference(results, *pair, count) for count in (1, LAST))
            lines.append([" minus ".join(pair), *(interval(e, "+.1f") for e in both)])
    if lines:
        words = f"last {LAST} evaluations"
        found.append([["difference, by seed, in points", "final", words], *lines])
    return found


def summary(results: dict) -> dict:
    """For a reader that is a program: what the table says of the budget of a step, by H."""
    runs, found = runs_of(results, OURS), {}
    for name, theirs in BESIDE.items():
        e = difference(results, OURS, theirs)
        found[f"h_minus_{name}"] = e and dict(zip(("mean", "low", "high"), e, strict=True))
    for words, name in (("calls", "tool_calls"), ("tokens", "tokens")):
        e = share_until(runs, runs_of(results, BASELINE), name, TARGETS[-1])
        found[f"{words}_to_90_share_of_grpo"] = e and e[0]
    final = fmean(accuracy(runs).values()) if runs else None
    return {"seeds": sorted(map(int, runs)), **found, "final": final}


def write(results: dict, methods: list[str], second_world: dict, folder: Path) -> None:
    """The tables as Markdown, and summary.json."""
    texts = []
    for head, *lines in tables(results, methods):
        marked = [head, ["---"] * len(head), *lines]
        texts.append("".join(f"| {' | '.join(line)} |\n" for line in marked))
    (folder / "table.md").write_text("\n".join(texts), encoding="utf-8")
    whole = {**summary(results), "second_world": summary(second_world)}
    (folder / "summary.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
