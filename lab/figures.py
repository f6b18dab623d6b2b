"""Figures of a comparison, each as SVG and PNG. Needs matplotlib; nothing else here imports it.

The colours are those of Okabe and Ito, which stay apart for colour-blind readers.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lab import verdict
from lab.intervals import t_interval

COLOURS = "#000000 #E69F00 #0072B2 #009E73 #D55E00 #CC79A7 #56B4E9 #8C6D31".split()
STYLES = ("-", "--", ":")
AXES = {
    "step": "training steps (equal rollouts)",
    "tool_calls": "tool calls executed",
    "generated_tokens": "tokens generated",
    "seconds": "seconds of training",
}
GRID = 60  # points on a curve whose seeds were not evaluated at the same place
LOOK = {"svg.hashsalt": "arpo_mini", "font.size": 10, "axes.spines.top": False}
LOOK = {**LOOK, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


def save(figure: Figure, stem: Path) -> None:
    """The same figures give the same files: no date in them."""
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
    figure.savefig(stem.with_suffix(".png"), dpi=150, facecolor="white")


def band(runs: dict[str, dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """x (n,) and mean, low, high of the accuracy (n, 3), as far as every seed went."""
    spent = [verdict.column(run, name) for run in runs.values()]
    right = [verdict.column(run, "sampled") for run in runs.values()]
    same = all(xs == spent[0] for xs in spent)
    x = np.array(spent[0]) if same else np.linspace(0, min(xs[-1] for xs in spent), GRID)
    curves = np.array([np.interp(x, xs, ys) for xs, ys in zip(spent, right, strict=True)])
    estimates = [t_interval(column) for column in curves.T]
    return x, np.array(
        [[mean, *(mean if e is None else e for e in ends)] for mean, *ends in estimates]
    )


def accuracy(results: dict, methods: list[str], stem: Path) -> None:
    """Accuracy against steps, tool calls, generated tokens and seconds: mean, 95 % band."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharey=True)
        for ax, (name, label) in zip(axes.flat, AXES.items(), strict=True):
            for i, method in enumerate(methods):
                x, e = band(verdict.runs_of(results, method), name)
                look = {"color": COLOURS[i % len(COLOURS)]}
                style = STYLES[i // len(COLOURS) % len(STYLES)]
                ax.plot(x, 100 * e[:, 0], style, label=method, lw=1.8, **look)
                ax.fill_between(x, 100 * e[:, 1], 100 * e[:, 2], alpha=0.15, lw=0, **look)
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(short))
        for ax in axes[:, 0]:
            ax.set_ylabel("test accuracy of samples, %")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        save(figure, stem)


def short(value: float, _) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def frontier(results: dict, methods: list[str], stem: Path) -> None:
    """Difference to GRPO against the shares of its tool calls and tokens; the goal is shaded."""
    found = verdict.best_known({m: verdict.figures(results, m) for m in methods})
    found = {m: f for m, f in found.items() if f.share["tokens"]}
    if not found:
        return
    shares = {
        "tool_calls": ("tool calls, % of GRPO's", verdict.MOST_CALLS),
        "tokens": ("generated + prefilled tokens, % of GRPO's", verdict.MOST_TOKENS),
    }
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (name, (label, most)) in zip(axes, shares.items(), strict=True):
            ax.axhline(0, color="black", lw=1)
            ax.plot([100], [0], "k*", ms=11)
            ax.annotate("GRPO", (100, 0), (0, -16), textcoords="offset points", ha="center")
            for i, (method, f) in enumerate(found.items()):
                place(ax, f.share[name], f.difference["rollouts"], method, i)
            ax.set_xlabel(label)
            ax.set_xlim(0, max(110, ax.get_xlim()[1]))
            low, high = ax.get_ylim()
            ax.fill_between([0, 100 * most], 100 * verdict.MARGIN, 1000, color="#009E73", alpha=0.1)
            ax.set_ylim(min(low, -5), max(high, 2))
            words = "shaded: where the whole bar must lie"
            ax.text(0.01, 0.98, words, transform=ax.transAxes, fontsize=8, va="top")
        axes[0].set_ylabel("accuracy minus GRPO's, points")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
        save(figure, stem)


def place(ax, share, difference, method: str, i: int) -> None:
    """A method as a point with the intervals of both its figures."""
    (x, *xs), (y, *ys) = (
        [100 * value for value in e if value is not None] for e in (share, difference)
    )
    bars = [np.abs(np.array(ends)[:, None] - v) if ends else None for v, ends in ((x, xs), (y, ys))]
    colours = COLOURS[1:]  # black is GRPO's
    marker, colour = "osD^vP"[i // len(colours) % 6], colours[i % len(colours)]
    ax.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt=marker, color=colour, label=method, lw=1.2)


def entropy(result: dict, stem: Path) -> None:
    """The paper's Figure 1; H against the spread of rewards; the spread after each call."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(12, 4), layout="constrained")
        axes = figure.subplots(1, 3)
        by_distance(axes[0], result["figure_1"])
        high_and_low(axes[1], result)
        by_call(axes[2], result)
        save(figure, stem)


def by_distance(ax, figure_1: dict) -> None:
    names = {
        "result": ("after a tool result", "#D55E00"),
        "start": ("after the question", "#0072B2"),
    }
    for name, (label, colour) in names.items():
        e = np.array(figure_1[name]).reshape(-1, 4)
        e = e[e[:, 3] >= 0.05 * e[:1, 3]]  # the few segments that are longer are noise
        x = np.arange(1, len(e) + 1)
        ax.plot(x, e[:, 0], color=colour, label=label)
        ax.fill_between(x, e[:, 1], e[:, 2], color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="distance in tokens", ylabel="entropy of the token / ln V", ylim=(0, None))
    ax.legend(frameon=False)


def high_and_low(ax, result: dict) -> None:
    """Every node, and the mean spread of the halves below and above the median of H."""
    nodes = np.array(result["nodes"], dtype=float).reshape(-1, len(result["columns"]))
    H, spread = (nodes[:, result["columns"].index(name)] for name in ("H", "spread"))
    ax.plot(H, spread, "o", color="#56B4E9", alpha=0.3, ms=4, mew=0)
    above = np.median(H) < H if len(H) else H > 0
    halves = {"below": (H[~above], "#0072B2"), "above": (H[above], "#D55E00")}
    for half, (values, colour) in halves.items():
        e = result["answers"].get(f"spread, H {half} its median")
        if e:
            ends = [values.min(), values.max()]
            ax.plot(ends, [e[0]] * 2, color=colour, lw=2.5, label=f"mean, H {half} its median")
            ax.fill_between(ends, e[1], e[2], color=colour, alpha=0.25, lw=0)
    rho = result["answers"].get("Spearman of H and spread")
    title = f"Spearman {rho[0]:+.2f} [{rho[1]:+.2f}, {rho[2]:+.2f}]" if rho else "nothing varies"
    ax.set(xlabel="H of the first k tokens after a result", title=title, ylim=(0, None))
    ax.set_ylabel("spread: variance of the rewards of forks")
    ax.legend(frameon=False)


def by_call(ax, result: dict) -> None:
    after = {k: e for k, e in result["answers"].items() if k.startswith("spread after call") and e}
    rows = {"question": result["at_the_question"], **{k.split()[-1]: e for k, e in after.items()}}
    e = np.array(list(rows.values()))  # (rows, 3)
    ends = np.abs(e[:, 1:] - e[:, :1]).T
    ax.errorbar(range(len(rows)), e[:, 0], yerr=ends, fmt="o", color="#009E73", capsize=3)
    ax.set_xticks(range(len(rows)), list(rows))
    ax.set(xlabel="where the fork stands: after this call", ylim=(0, None))
    ax.set_ylabel("spread: variance of the rewards")
