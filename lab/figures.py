"""Figures of a comparison, each as SVG and PNG. Needs matplotlib; nothing else here imports it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lab import verdict
from lab.intervals import t_interval

# of Okabe and Ito, which stay apart for colour-blind readers
COLOURS = "#000000 #E69F00 #0072B2 #009E73 #D55E00 #CC79A7 #56B4E9 #8C6D31".split()
STYLES = ("-", "--", ":")
AXES = {
    "step": "training steps (equal rollouts)",
    "tool_calls": "tool calls executed",
    "tokens": "tokens generated and read",
    "seconds": "seconds of training",
}
GRID = 60  # points on a curve whose seeds were not evaluated at the same place
LOOK = {"svg.hashsalt": "arpo_mini", "font.size": 10, "axes.spines.top": False}
LOOK |= {"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


@contextmanager
def drawn(stem: Path, size: tuple[float, float], shape: tuple[int, int], **more) -> Iterator:
    """A figure and its axes to draw on, saved at the end; the same numbers give the same files."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(*shape, **more).flat
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
        figure.savefig(stem.with_suffix(".png"), dpi=150, facecolor="white")


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
    """Accuracy against steps, tool calls, generated tokens and seconds: mean, 95 % band."""
    with drawn(stem, (9, 7), (2, 2), sharey=True) as (figure, axes):
        for ax, (name, label) in zip(axes, AXES.items(), strict=True):
            for i, method in enumerate(methods):
                x, e = band(verdict.runs_of(results, method), name)
                colour = COLOURS[i % len(COLOURS)]
                style = STYLES[i // len(COLOURS) % len(STYLES)]
                ax.plot(x, 100 * e[:, 0], style, label=method, lw=1.8, color=colour)
                ax.fill_between(x, 100 * e[:, 1], 100 * e[:, 2], alpha=0.15, lw=0, color=colour)
            ax.set_xlabel(label)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            if ax.get_subplotspec().is_first_col():
                ax.set_ylabel("test accuracy of samples, %")
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)


def entropy(result: dict, stem: Path) -> None:
    """The paper's Figure 1, and the entropy of every node against the spread of its rewards."""
    with drawn(stem, (9, 4), (1, 2)) as (_, axes):
        by_distance(axes[0], result["figure_1"])
        by_entropy(axes[1], result)


def by_distance(ax, figure_1: dict) -> None:
    for name, colour in (("result", "#D55E00"), ("start", "#0072B2")):
        e = np.array(figure_1[name]).reshape(-1, 4)
        e = e[e[:, 3] >= 0.05 * e[:1, 3]]  # the few segments that are longer are noise
        x = np.arange(1, len(e) + 1)
        words = "after a tool result" if name == "result" else "after the question"
        ax.plot(x, e[:, 0], color=colour, label=words)
        ax.fill_between(x, e[:, 1], e[:, 2], color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="distance in tokens", ylabel="entropy of the token / ln V", ylim=(0, None))
    ax.legend(frameon=False)


def by_entropy(ax, result: dict) -> None:
    nodes = np.array(result["nodes"], dtype=float).reshape(-1, len(result["columns"]))
    H, spread = (nodes[:, result["columns"].index(name)] for name in ("H", "spread"))
    ax.plot(H, spread, "o", color="#56B4E9", alpha=0.3, ms=4, mew=0)
    rho = result["answers"].get("Spearman of H and spread")
    title = f"Spearman {rho[0]:+.2f} [{rho[1]:+.2f}, {rho[2]:+.2f}]" if rho else "nothing varies"
    ax.set(xlabel="H of the first k tokens after a result", title=title, ylim=(0, None))
    ax.set_ylabel("spread: variance of the rewards of forks")
