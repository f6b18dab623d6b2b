"""Where is the policy unsure, and does its entropy tell where forking pays?

    python -m lab.compare entropy [--adapter DIR] [--questions N] [--continuations K] [--name NAME]

1. Entropy of every token by its distance to the last tool result, and to the question (the
   paper's Figure 1).
2. K trajectories from every question; at each tool result of the first of them, K more from there.
   The spread of a node is the variance of their rewards: what a group of forks there would be
   compared on, and 0 where it teaches nothing. Do H or the gain (H - H_initial), as the branch rule
   reads them off the first trajectory alone, predict the spread?

Intervals come from a bootstrap over questions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.table import Table

from advantage import Segment, shared_by
from arpo_mini import Rollout, make_tools, part_of, score
from data.formats import Question, load_questions
from lab.intervals import Estimate, bootstrap, bootstrap_ratio, spearman, t_interval
from lab.verdict import drawing
from engine.model import Policy, load_policy
from app.config import Config
from app.screen import Parser, UserError, advance, console, kind, progress_bar, reason

ROOT = Path(__file__).resolve().parent.parent
ROWS = 128  # trajectories side by side
FAR = 30  # tokens after a result that Figure 1 looks at
COLUMNS = ("question", "call", "H", "H_initial", "spread", "right")  # of a node
H, H_INITIAL, SPREAD, CALL = (COLUMNS.index(c) for c in ("H", "H_initial", "spread", "call"))


# ---- rolling out --------------------------------------------------------------------------


def continue_from(policy: Policy, nodes: list[Segment], k: int, config: Config, tools, seed: int):
    """k independent continuations of every node to their ends, as leaves: [[Segment] * k] * n.

    A node is a prompt or a tool result.
    """
    torch.manual_seed(seed)
    rollout = Rollout(policy, config, tools, random.Random(seed))
    waiting = [(i, node) for i, node in enumerate(nodes) for _ in range(k)]
    with torch.no_grad():
        leaves = rollout.grow(rollout.read(list(enumerate(nodes))), None, waiting, [0] * len(nodes))
    return [[leaf for owner, leaf in leaves if owner == i] for i in range(len(nodes))]


def spread_of(policy: Policy, leaves: list[Segment], question: Question, config, tools):
    """Variance of the rewards (with n - 1), and the share of right answers."""
    rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
    variance = float(np.var([r.total for r in rewards], ddof=1))
    return variance, sum(r.accuracy == 1 for r in rewards) / len(rewards)


def look(policy: Policy, questions: list[Question], k: int, config: Config, tools, seed: int):
    """Some questions at once: (index, spread at the question, leaves, rows of COLUMNS) of each."""
    roots = [Segment("prompt", policy.prompt(q.text)) for q in questions]
    groups = continue_from(policy, roots, k, config, tools, seed)
    nodes, owners = [], []
    for i, leaves in enumerate(groups):
        path = leaves[0].path()
        found = [s for s in path[:-1] if s.author == "tool"]  # one that was read
        nodes += found
        owners += [i] * len(found)
    # what the branch rule would see: the first trajectory's own entropies, not the forks'
    after = {s.parent: s.entropy for leaves in groups for s in leaves[0].path()[1:]}
    rows: dict[int, list] = defaultdict(list)
    most = max(1, ROWS // k)
    for at in range(0, len(nodes), most):
        some, whose = nodes[at : at + most], owners[at : at + most]
        forks = continue_from(policy, some, k, config, tools, seed + 1 + at)
        for node, i, leaves in zip(some, whose, forks, strict=True):
            variance, right = spread_of(policy, leaves, questions[i], config, tools)
            path = node.path()
            call = sum(s.author == "tool" for s in path)
            rows[i].append([call, after[node], path[1].entropy, variance, right])
    for i, leaves in enumerate(groups):
        yield i, spread_of(policy, leaves, questions[i], config, tools), leaves, rows[i]


def measure(policy: Policy, questions: list[Question], k: int, config: Config, tools, bar) -> dict:
    """All questions: nodes, the spreads at the questions, and sums for Figure 1."""
    nodes, roots = [], []
    figure_1 = {place: np.zeros((len(questions), FAR, 2)) for place in ("start", "result")}
    done = advance(bar, "questions", questions)
    at_once, V = max(1, ROWS // k), policy.lm.config.vocab_size
    for at in range(0, len(questions), at_once):
        some = questions[at : at + at_once]
        for i, root, leaves, rows in look(policy, some, k, config, tools, config.seed + 1000 * at):
            roots.append([at + i, *root])
            nodes += [[at + i, *row] for row in rows]
            for segment in (s for s in shared_by(leaves) if s.author == "policy"):
                place = "start" if segment.parent.author == "prompt" else "result"
                values = np.array(segment.token_entropy[:FAR]) / math.log(V)
                figure_1[place][at + i, : len(values)] += np.stack([values, values * 0 + 1], axis=1)
        done(len(some))
    return {"nodes": nodes, "roots": roots, "figure_1": figure_1}


# ---- what it says -------------------------------------------------------------------------


def by_distance(sums: np.ndarray) -> list[list[float]]:
    """(questions, FAR, 2) sums and counts -> [mean, low, high, tokens] at each distance seen."""
    seen = [at for at in range(FAR) if sums[:, at, 1].any()]
    return [[*bootstrap_ratio(sums[:, at]), int(sums[:, at, 1].sum())] for at in seen]


def gain(rows: np.ndarray) -> np.ndarray:
    return rows[:, H] - rows[:, H_INITIAL]


def answers(nodes: list[list[float]]) -> dict[str, Estimate | None]:
    """The question put in several ways; every value with its interval, None where undefined."""
    table = np.array(nodes, dtype=float).reshape(-1, len(COLUMNS))
    if not len(table):
        return {}
    clusters = [table[table[:, 0] == question] for question in np.unique(table[:, 0])]
    middle = np.median(table[:, H])

    def mean_where(chosen):
        def mean(rows):
            values = rows[chosen(rows), SPREAD]
            return values.mean() if len(values) else np.nan

        return mean

    high = mean_where(lambda rows: rows[:, H] > middle)
    low = mean_where(lambda rows: rows[:, H] <= middle)
    statistics = {
        "Spearman of H and spread": lambda r: spearman(r[:, H], r[:, SPREAD]),
        "Spearman of gain and spread": lambda r: spearman(gain(r), r[:, SPREAD]),
        "Spearman of call (1st, 2nd, ..) and spread": lambda r: spearman(r[:, CALL], r[:, SPREAD]),
        "spread, H above its median": high,
        "spread, H below its median": low,
        "high minus low": lambda r: high(r) - low(r),
        "share of nodes with gain > 0: the paper's rule": lambda r: (gain(r) > 0).mean(),
        "spread, gain > 0": mean_where(lambda rows: gain(rows) > 0),
        "spread, gain <= 0": mean_where(lambda rows: gain(rows) <= 0),
    }
    for call in sorted({int(c) for c in table[:, CALL]}):
        statistics[f"spread after call {call}"] = mean_where(lambda r, c=call: r[:, CALL] == c)
    return {words: bootstrap(statistic, clusters) for words, statistic in statistics.items()}


def interpret(found: dict[str, Estimate | None]) -> str:
    """One sentence on the main question."""
    e = found.get("Spearman of H and spread")
    if e is None:
        return "Nothing varies here: the question has no answer."
    if e[1] <= 0 <= e[2]:
        words = "was not found to tell"
    else:
        words = "tells" if e[0] > 0 else "tells the wrong way round"
    return (
        f"The entropy after a tool result {words} where the rewards of forks differ: Spearman "
        f"{e[0]:+.2f} [{e[1]:+.2f}, {e[2]:+.2f}]."
    )


def show(found: dict[str, Estimate | None]) -> Table:
    table = Table("", "value", "95 % interval", box=box.SIMPLE_HEAD)
    for words, e in found.items():
        cells = ("-", "-") if e is None else (f"{e[0]:.3f}", f"{e[1]:.3f} to {e[2]:.3f}")
        table.add_row(words, *cells)
    return table


# ---- command line -------------------------------------------------------------------------

TAKEN = {  # the settings of Config that matter here
    *("model_name", "adapter", "load_in_4bit", "system_prompt", "thinking", "eval_path"),
    *("documents_path", "search_results", "search_chars", "tool_time_limit", "max_tool_calls"),
    *("max_segment_tokens", "max_total_tokens", "entropy_tokens", "rollout_rows", "seed"),
}


def parse(args: list[str]) -> dict:
    parser = Parser(prog="lab.compare entropy", description=__doc__, allow_abbrev=False)
    own = {
        "--questions": ("int", 120, "how many of each domain"),
        "--continuations": ("int", 8, "K: trajectories from every question and tool result"),
        "--name": ("str", None, "of the files (default: cold-start, or the adapter's run)"),
        "--output_dir": ("str", str(ROOT / "lab/results/entropy"), "folder of the results"),
    }
    for flag, (annotation, default, words) in own.items():
        parser.add_argument(flag, type=kind(annotation), default=default, help=words)
    for item in dataclasses.fields(Config):
        if item.name in TAKEN:
            parser.add_field(item)
    values = parser.parse(args)
    for name, least in (("questions", 1), ("continuations", 2)):
        if values[name] < least:
            raise UserError(f"--{name} {values[name]}: it must be at least {least}")
    return values


def study(args: list[str]) -> int:
    values = parse(args)
    per_domain, k = values.pop("questions"), values.pop("continuations")
    name, folder = values.pop("name"), Path(values.pop("output_dir"))
    config = Config(**values, branch_rule="none")
    questions, tools = part_of(load_questions(config.eval_path), per_domain), make_tools(config)
    policy = load_policy(config, tools, trainable=False)
    if name is None:
        name = Path(config.adapter).resolve().parent.name if config.adapter else "cold-start"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {reason(error)}") from None
    with progress_bar() as bar:
        measured = measure(policy, questions, k, config, tools, bar)
    found = answers(measured["nodes"])
    result = {
        "settings": {"questions": len(questions), "continuations": k, "seed": config.seed},
        "answers": found,
        "in_words": interpret(found),
        "at_the_question": t_interval([row[1] for row in measured["roots"]]),
        "figure_1": {place: by_distance(sums) for place, sums in measured["figure_1"].items()},
        "columns": COLUMNS,
        "nodes": [[round(value, 5) for value in row] for row in measured["nodes"]],
    }
    (folder / f"{name}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    console.print(show(found))
    console.print(result["in_words"], markup=False, soft_wrap=True)
    figures = drawing()
    if figures:
        figures.entropy(result, folder / name)
    console.print(f"{folder / name}: .json" + ", .svg, .png" * bool(figures), markup=False)
    return 0
