"""A recorded rollout tree in a terminal: entropy, tool results, decisions, rewards."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from app.screen import console, plain


class Wide:
    """Something drawn `width` columns wide at least, even where the terminal has fewer."""

    def __init__(self, content: RenderableType, width: int):
        self.content, self.width = content, width

    def __rich_console__(self, console, options):
        width = max(self.width, options.max_width)
        yield from console.render(self.content, options.update(width=width))


def print_tree(tree: Tree) -> None:
    def depth(tree: Tree) -> int:
        return 1 + max(map(depth, tree.children), default=0)

    console.print(Wide(tree, 4 * depth(tree) + 30), crop=False)


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
