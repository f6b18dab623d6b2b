"""A recorded rollout tree -> what the page draws: plain data, checked, every decision in words."""

from __future__ import annotations

import re
from html import escape
from unicodedata import category

AUTHORS = ("prompt", "policy", "tool")


def number(value) -> float | None:
    """The value if it is a number that a picture can hold, else None: a gap and not nan."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 1e100 else None


def words(value, form: str = ".4f") -> str:
    """A number as text; what is no number is a dash."""
    return "–" if number(value) is None else format(value, form).replace("-", "−")


UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # of Unicode: they act, and are not seen


def visible(text: str) -> str:
    r"""Control, formatting, surrogate and such characters as \u{..}; newlines and tabs stay."""
    if text.isprintable():
        return text
    unseen = (category(c) in UNSEEN and c not in "\n\t" for c in text)
    return "".join(f"\\u{{{ord(c):x}}}" if odd else c for c, odd in zip(text, unseen, strict=True))


def html_text(value) -> str:
    """Text of any origin for the page itself: escaped, and with nothing in it that acts unseen."""
    return escape(visible(str(value)))


def tree(record: dict, config: dict) -> dict:
    """A line of rollouts.jsonl, as `tree_record` of app/records.py makes it, ready to be drawn.

    Raises ValueError, KeyError or TypeError for what is no tree.
    """
    nodes = [node_data(record, i, config) for i in range(len(record["nodes"]))]
    if not nodes:
        raise ValueError("a tree has at least its question")
    known = bool(record["answers"])
    leaves = [leaf_data(leaf, nodes, known) for leaf in record["leaves"]]
    for i, leaf in enumerate(leaves):
        at = leaf["node"]
        while at is not None:
            nodes[at]["below"].append(i)
            at = nodes[at]["parent"]
    return {
        "step": number(record.get("step")),
        "question": visible(str(record["question"])),
        "answers": [visible(str(answer)) for answer in record["answers"]],
        "domain": visible(str(record.get("domain", ""))),
        "nodes": nodes,
        "leaves": leaves,
    }


HEADS = {"prompt": "question", "tool": "tool result"}
STOPS = {"tool": "calls", "answer": "answers", "eos": "stops", "length": "cut off"}


def node_data(record: dict, i: int, config: dict) -> dict:
    node = record["nodes"][i]
    parent, author, tokens, H = (node[k] for k in ("parent", "author", "tokens", "token_entropy"))
    is_root = i == 0 and parent is None
    if not is_root and not (type(parent) is int and 0 <= parent < i):
        raise ValueError(f"node {i}: its parent is {parent!r}, not a node before it")
    if author not in AUTHORS:
        raise ValueError(f"node {i}: author {author!r} is not one of {', '.join(AUTHORS)}")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"node {i}: tokens must be a list of texts")
    if H is not None and len(H) != len(tokens):
        raise ValueError(f"node {i}: {len(tokens)} tokens, {len(H)} entropies")
    return {
        "parent": parent,
        "author": author,
        "head": HEADS.get(author) or f"policy {STOPS.get(node['stop'], '')}",
        "tokens": [visible(token) for token in tokens],
        "H": [number(h) for h in H] if H else None,  # of every token, divided by ln V
        "A": number(node["advantage"]),  # mean over the trajectories through it
        "action": action_start(tokens) if author == "policy" else None,
        "calls": node["stop"] == "tool",
        "fork": fork_data(node["decision"], config) if node["decision"] else None,
        "goes_on": goes_on(record["nodes"], i),
        "below": [],  # the trajectories through it, by number
    }


ACTION = re.compile(r"<(?!think>|result>)([\w-]+)>(?:(?!</\1>).)*</\1>\s*$", re.DOTALL)


def action_start(tokens: list[str]) -> int | None:
    """Index of the token that opens the call or the answer which ends a policy segment."""
    found = ACTION.search("".join(tokens))
    before = 0
    for i, token in enumerate(tokens if found else []):
        before += len(token)
        if before > found.start():
            return i
    return None


def goes_on(nodes: list[dict], i: int) -> bool:
    """Whether node i is the path that was measured at its tool result; its siblings are forks."""
    decision = nodes[nodes[i]["parent"]]["decision"] if i else None
    if not decision:
        return False
    siblings = [n for n in nodes if n["parent"] == nodes[i]["parent"]]
    measured = [n for n in siblings if n["entropy"] == decision["H"]]
    return nodes[i] is (measured or siblings)[0]


def leaf_data(leaf: dict, nodes: list[dict], known: bool) -> dict:
    """A leaf: its answer, whether that is right, its reward and its advantage."""
    at = leaf["node"]
    if not (type(at) is int and 0 <= at < len(nodes)):
        raise ValueError(f"a leaf stands at node {at!r} of {len(nodes)}")
    accuracy = number(leaf["accuracy"]) or 0
    verdict = "right" if accuracy == 1 else "partly right" if accuracy > 0 else "wrong"
    if not known:
        verdict = "answer not known"
    if not leaf["well_formed"]:
        verdict = "badly formed"
    return {
        "node": at,
        "answer": answer("".join(nodes[at]["tokens"])),
        "verdict": verdict,
        "reward": number(leaf["total"]),
        "A": number(leaf["advantage"]),
    }


def answer(text: str) -> str | None:
    r"""What stands in the last <answer>, without the \boxed{} around it."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, re.DOTALL)
    if not found:
        return None
    text = visible(found[-1].strip())
    box = re.fullmatch(r"\\boxed\{(.*)\}", text, re.DOTALL)
    return box[1] if box else text


# ---- the decision at a tool result --------------------------------------------------------


def fork_data(decision: dict, config: dict) -> dict:
    """The branch decision taken after a tool result: figures, rule, and what came of it."""
    wanted, granted = int(decision["forks"]), int(decision.get("granted", 0))
    if granted:
        outcome = f"Fork: {granted} more {'path starts' if granted == 1 else 'paths start'} here"
    elif wanted:
        outcome = "Fork wanted, but no place is left"
    else:
        outcome = "No fork"
    return {
        "H": words(decision["H"]),
        "H_initial": words(decision["H_initial"]),
        "gain": words(decision["gain"], "+.4f"),
        "P": words(decision["probability"]),
        "wanted": wanted,
        "granted": granted,
        "outcome": outcome,
        "rule": rule(decision, config),
        "story": story(decision, config, wanted, granted),
    }


RULE_NUMBERS = "branch_probability", "entropy_weight", "entropy_threshold", "entropy_sigma"


def rule(decision: dict, config: dict) -> str:
    """The rule of --branch_rule with its numbers, in one line."""
    alpha, beta, tau, sigma = (config.get(key) for key in RULE_NUMBERS)
    wanted = int(decision["forks"])
    dice = "yes" if wanted else "no"
    above = ">" if (number(decision["probability"]) or 0) > (number(tau) or 0) else "≤"
    risen = ">" if (number(decision["gain"]) or 0) > 0 else "≤"
    return {
        "paper": f"P = {alpha} + {beta} × gain {above} τ = {tau}",
        "official": f"P = {alpha} + {beta} × gain, and the dice said {dice}",
        "adaptive": f"H {risen} mean + {sigma} σ of all H so far",
        "threshold": f"H {risen} {tau}, then H × Z forks",
        "step": f"score {words(decision.get('score'))} {'>' if wanted else '≤'} the threshold of "
        "the last steps; what is left of the step's budget goes to its highest scores",
        "random": f"P = {alpha} whatever H is, and the dice said {dice}",
        "none": "this rule never forks (GRPO)",
    }.get(config.get("branch_rule"), "not known")


def story(decision: dict, config: dict, wanted: int, granted: int) -> str:
    """The same in whole sentences, for a reader who meets it for the first time."""
    k, name = config.get("entropy_tokens", "few"), config.get("branch_rule", "unknown")
    H, H_initial = words(decision["H"]), words(decision["H_initial"])
    gain = number(decision["gain"]) or 0
    surer = "less sure" if gain > 0 else "surer" if gain < 0 else "as sure"
    if name == "official":
        sentences = [f"Measured on the segment that made the call, the entropy is H = {H}."]
    else:
        sentences = [f"The first {k} tokens written after this result have entropy H = {H}."]
    if name in ("adaptive", "threshold"):
        sentences.append(f"That differs from the threshold by {words(gain, '+.4f')} (the gain).")
    else:
        sentences.append(
            f"At the start of this trajectory it was H_initial = {H_initial}: the policy is "
            f"{surer} here, gain {words(gain, '+.4f')}."
        )
    P = words(decision["probability"])
    sentences.append(f"Rule “{name}”: {rule(decision, config)}. Here P = {P}.")
    if granted:
        paths = "another trajectory starts" if granted == 1 else f"{granted} trajectories start"
        sentences.append(f"So {paths} right here and shares everything before this point.")
    elif wanted:
        sentences.append(
            "So a fork was wanted, but all places of this question were taken already."
        )
    else:
        sentences.append("So this path goes on alone.")
    return " ".join(sentences)
