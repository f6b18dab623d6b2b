"""What the user sees: the log line of a step, tables, one rollout drawn as a tree.

Plain figures in, rich renderables out. Nothing here is part of the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

console = Console(highlight=False)


LOG_HEAD = "[dim]step  reward  right  calls  forks  H start  H tool  clipped  seconds[/]"


def log_line(step: int, m: dict) -> str:
    H_tool = m["entropy_after_tool"]
    line = (
        f"{step:4d}  {m['reward']:6.3f}  {m['accuracy']:5.0%}  {m['tool_calls']:5d}  {m['forks']:5d}  "
        f"{m['entropy_initial']:7.4f}  {'     -' if H_tool is None else f'{H_tool:6.4f}'}  "
        f"{m['clip_fraction']:7.1%}  {m['seconds_rollout'] + m['seconds_update']:7.2f}"
    )
    return line + "".join(f"\n[yellow]      {words}[/]" for words in remarks(m))


def remarks(m: dict) -> Iterator[str]:
    """What needs words, each with what it means."""
    groups = m["groups"]
    if m["equal_groups"] == groups:
        yield f"all {groups} groups had identical rewards: no gradient in this step"
    elif m["equal_groups"] > groups / 2:
        yield f"{m['equal_groups']} of {groups} groups had identical rewards: no gradient from them"
    if m["well_formed"] < 0.5:
        yield f"only {m['well_formed']:.0%} of the trajectories are well-formed: they score -1"


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def comparison(before: dict, after: dict) -> Table:
    table = Table("", "before", "after", title="test questions", title_justify="left")
    for decoding in ("sampled", "greedy"):
        b, a = before[decoding], after[decoding]
        table.add_row(f"accuracy, {decoding}", with_interval(b), with_interval(a))
        for domain in b["domains"]:
            rows = (x["domains"][domain] for x in (b, a))
            table.add_row(f"  {domain}", *(f"{row['accuracy']:.1%}" for row in rows))
    b, a = before["sampled"], after["sampled"]
    table.add_row("well-formed", f"{b['well_formed']:.1%}", f"{a['well_formed']:.1%}")
    table.add_row("tool calls a question", f"{b['tool_calls']:.2f}", f"{a['tool_calls']:.2f}")
    return table


def with_interval(figures: dict) -> str:
    low, high = figures["interval"]
    return f"{figures['accuracy']:.1%}  ({low:.0%} to {high:.0%})"


def draw_tree(record: dict) -> Tree:
    """One question's rollout: tokens shaded by entropy, every decision in words, every reward."""
    nodes = record["nodes"]
    children: dict[int | None, list[int]] = {}
    for i, node in enumerate(nodes):
        children.setdefault(node["parent"], []).append(i)
    leaves = {leaf["node"]: (i, leaf) for i, leaf in enumerate(record["leaves"])}
    top = max((h for n in nodes for h in n["token_entropy"] or []), default=0) or 1
    tree = Tree(Text(record["question"], style="bold"))

    def grow(branch: Tree, i: int) -> None:
        for child in children.get(i, []):
            node = nodes[child]
            grown = branch.add(shaded(node, top) if node["author"] == "policy" else result(node))
            if child in leaves:
                grown.add(outcome(*leaves[child], record))
            grow(grown, child)

    grow(tree, 0)
    return tree


def shaded(node: dict, top: float) -> Text:
    text = Text()
    for token, h in zip(node["tokens"], node["token_entropy"], strict=True):
        heat = int(255 * (1 - min(1.0, h / top)))
        style = f"black on rgb(255,{heat},{heat})" if h > 0.1 * top else ""
        text.append(token.replace("\n", "⏎"), style=style)
    return text


def result(node: dict) -> Text:
    text = Text("".join(node["tokens"]).replace("\n", " ").strip(), style="cyan")
    d = node["decision"]
    if d:
        verdict = f"{d['forks']} forks" if d["forks"] != 1 else "1 fork"
        text.append(
            f"\nH {d['H']:.3f}  H_initial {d['H_initial']:.3f}  gain {d['gain']:+.3f}  "
            f"P {d['probability']:.2f}  -> {verdict if d['forks'] else 'no fork'}",
            style="magenta",
        )
    return text


def outcome(number: int, leaf: dict, record: dict) -> Text:
    right = leaf["accuracy"] == 1
    words = "right" if right else "wrong" if leaf["well_formed"] else "not well-formed"
    return Text(
        f"leaf {number}: {words}, reward {leaf['total']:.2f}, advantage {leaf['advantage']:+.2f}",
        style="bold green" if right else "bold red",
    )


def report_table(decoding: str, figures: dict) -> Table:
    k = next(name for name in reversed(figures) if name.startswith("pass@"))
    columns = ("accuracy (95 %)", *dict.fromkeys(("pass@1", k)), "well-formed", "calls")
    table = Table(decoding, "questions", *columns, "H start", "H tool")
    for domain, values in [*figures["domains"].items(), ("all", figures)]:
        if domain == "all" and len(figures["domains"]) < 2 and table.row_count:
            continue
        shares = [f"{values[name]:.1%}" for name in (*columns[1:-2], "well_formed")]
        H = [values["entropy_initial"], values["entropy_after_tool"]]
        table.add_row(
            domain,
            str(values["questions"]),
            with_interval(values),
            *shares,
            f"{values['tool_calls']:.2f}",
            *("-" if h is None else f"{h:.4f}" for h in H),
        )
    return table
