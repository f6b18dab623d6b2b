"""Does a policy hesitate after a tool result, more than at the start?

    python -m lab.compare entropy [--forced FILE] [--model_name M] [--questions N] [--name NAME]

A policy that does not know the format yet makes no call by itself, so the call is given: a row of
FILE has a question and, if you like, a call and a result; else the question's own text is searched.
H of K beginnings at the start, of K after the result, and the gain between them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from tqdm import tqdm

from advantage import Segment
from app.config import Config, option
from app.evaluation import first_per_domain, wilson
from app.screen import say
from arpo_mini import Agent, load_agent
from data.files import UserError, read_rows
from data.formats import asked, domain_of
from engine.writer import Writer
from lab.command import make_folder, parse, print_rows
from lab.intervals import Estimate, t_interval
from tools import ToolResult, policy_stop, read_call, run_calls

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 16  # questions measured side by side
COLUMNS = ("question", "start", "after")  # means of H
SEARCH = "<think>I need to look this up.</think><search>{}</search>"
FORCED = '{"question": ".."}, if you like with "call": "<search>..</search>" and "result": ".."'


class Forced(NamedTuple):
    text: str
    domain: str
    call: str
    result: str | None  # none: what the tool returns


def read_forced(row: dict) -> Forced:
    text, result = asked(row), row.get("result")
    call = row.get("call") or SEARCH.format(text)
    texts = all(isinstance(each, str) for each in (text, call, result or ""))
    if not texts or policy_stop(call) != "tool":
        raise ValueError("question and result are texts, a call is one that ends in </its tool>")
    return Forced(text, domain_of(row) or "all", call, result)


def given_nodes(agent: Agent, one: Forced, config: Config) -> tuple[Segment, Segment]:
    """The prompt, and the result of the given call."""
    policy = agent.policy
    root = Segment("prompt", policy.prompt(one.text))
    call = Segment("policy", policy.encode(one.call), root, stop="tool")
    (answer,) = run_calls([read_call(one.call)], agent.tools, config.tool_time_limit)
    answer = answer if one.result is None else ToolResult(one.result, ok=True)
    result = Segment("tool", policy.encode_result(answer, config.max_result_tokens), call)
    n = result.depth() + config.entropy_tokens
    if n > min(config.max_total_tokens, policy.context):
        words = f"the result of {one.text[:40]!r} and --entropy_tokens need {n}"
        raise UserError(f"--max_total_tokens {config.max_total_tokens}: {words}")
    return root, result


def measure(agent: Agent, questions: list[Forced], k: int, config: Config) -> list[list]:
    """A row of COLUMNS for each question: H at the start and after the result, means of k."""

    def work(fitted: Config) -> list[Segment]:
        transformers.set_seed(config.seed)
        return Writer(agent.policy, fitted).begin(nodes, fitted.entropy_tokens)

    H = []
    for at in tqdm(range(0, len(questions), AT_ONCE), unit_scale=AT_ONCE, disable=None):
        pairs = [given_nodes(agent, one, config) for one in questions[at : at + AT_ONCE]]
        nodes = [node for pair in pairs for node in pair for _ in range(k)]
        H += [draft.entropy for draft in agent.policy.limits.retry(config, work)]
    means = np.array(H).reshape(len(questions), 2, k).mean(axis=2)
    return [[i, *pair] for i, pair in enumerate(means.tolist())]


def answers(rows: list[list[float]]) -> dict[str, Estimate]:
    """Means over the questions with Student's interval; the share with Wilson's."""
    _, start, after = np.array(rows).T
    gain = after - start
    share = float((gain > 0).mean())
    return {
        "H at the start": t_interval(start),
        "H after the result": t_interval(after),
        "gain: after - start": t_interval(gain),
        "share of gains > 0": (share, *wilson(share, len(gain))),
    }


def cells(words: str, e: Estimate) -> list[str]:
    mean, low, high = e
    return [words, f"{mean:.4f}", "--" if low is None else f"{low:.4f} to {high:.4f}"]


# ---- command line -------------------------------------------------------------------------

TAKEN = (  # the settings of `train` that matter here
    "model_name adapter load_in_4bit dtype system_prompt thinking documents_path memory_gb "
    "search_results tool_time_limit max_result_tokens max_total_tokens entropy_tokens "
    "rollout_rows seed"
).split()


@dataclass(frozen=True)
class Flags:
    questions: int = option(120, "how many of each domain", 1, 10**6)
    continuations: int = option(8, "K: beginnings at each place", 2, 10_000)
    forced: str = option(Config.eval_path, "file of questions whose first call is given")
    name: str | None = option(None, "of the files; none: cold-start, or the adapter's run")
    output_dir: str = option(str(ROOT / "lab/results/entropy"), "folder of the results")


def study(args: list[str]) -> None:
    own, values = parse("lab.compare entropy", __doc__, args, Flags, TAKEN)
    config = Config(**values, branch_rule="none")
    rows = [row for _, row in read_rows(own.forced, read_forced, FORCED)]
    if not rows:
        raise UserError(f"--forced {own.forced} holds no questions; legal: {FORCED}")
    policy = Path(config.adapter).resolve().parent.name if config.adapter else "cold-start"
    path = Path(own.output_dir, f"{own.name or policy + '-forced'}.json")
    if path.exists():
        raise UserError(f"{path} is there already; choose another --name or remove it")
    questions, agent = first_per_domain(rows, own.questions), load_agent(config)
    make_folder(path.parent)
    found = measure(agent, questions, own.continuations, config)
    sizes = {"questions": len(questions), "continuations": own.continuations}
    result = {"settings": sizes | {"seed": config.seed}, "answers": answers(found)}
    result |= {"columns": COLUMNS, "nodes": [[round(x, 5) for x in row] for row in found]}
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print_rows(("", "value", "95 % interval"), [cells(*item) for item in result["answers"].items()])
    say(str(path))
