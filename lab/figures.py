"""The figure of a comparison, as SVG and PNG."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lab import verdict
from lab.intervals import t_interval

# of Okabe and Ito, which stay apart for colour-blind readers
COLOURS = "#000000 #E69F00 #0072B2 #009E73 #D55E00 #CC79A7 #56B4E9 #8C6D31".split()
CURVES = matplotlib.cycler(linestyle=["-", "--", ":"]) * matplotlib.cycler(color=COLOURS)
AXES = {
    "step": "training steps (equal rollouts)",
    "tool_calls": "tool calls executed",
    "tokens": "tokens generated and read",
    "seconds": "seconds of training",
}
GRID = 60  # points on a curve whose seeds were not evaluated at the same place
LOOK = {"svg.hashsalt": "arpo_mini", "font.size": 10, "axes.prop_cycle": CURVES, "grid.alpha": 0.25}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}


def band(runs: dict[str, dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """x (n,) and mean, low, high of the accuracy (n, 3), as far as every seed went."""
    spent = [verdict.column(run, name) for run in runs.values()]
    right = [verdict.column(run, "sampled") for run in runs.values()]
    same = all(xs == spent[0] for xs in spent)
    x = np.array(spent[0]) if same else np.linspace(0, min(xs[-1] for xs in spent), GRID)
    curves = np.array([np.interp(x, xs, ys) for xs, ys in zip(spent, right, strict=True)])
    estimates = np.array([t_interval(column) for column in curves.T], dtype=float)  # None: nan
    return x, np.where(np.isnan(estimates), estimates[:, :1], estimates)


def accuracy(results: dict, methods: list[str], stem: Path) -> None:
    """Accuracy against steps, tool calls, tokens and seconds: mean, 95 % band.

    The same numbers give the same files.
    """
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharey=True).flat
        for ax, (name, label) in zip(axes, AXES.items(), strict=True):
            for method in methods:
                x, e = band(verdict.runs_of(results, method), name)
                mean, low, high = 100 * e.T.clip(0, 1)
                (line,) = ax.plot(x, mean, label=method, lw=1.8)
                ax.fill_between(x, low, high, alpha=0.15, lw=0, color=line.get_color())
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("test accuracy of samples, %")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
        figure.savefig(stem.with_suffix(".png"), dpi=150, facecolor="white")
