"""Does the entropy of a policy tell where forking pays?

    python -m lab.compare entropy [--adapter DIR] [--questions N] [--continuations K] [--name NAME]
    python -m lab.compare entropy --forced FILE --model_name M

A trajectory for every question, and K more from each of its tool results. The spread of a result is
the variance of their rewards; 0 teaches nothing. Do H or the gain (H - H_initial), as the branch
rule reads them off that trajectory, predict the spread? (Bootstrap over questions.)

With --forced, for a policy that does not know the format yet, the call is given: a row of FILE has
a question and, if you like, a call and a result; else the question's own text is searched. H of K
beginnings at the start, of K after the result, and the gain between them.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from tqdm import tqdm

from advantage import Segment
from app.config import Config, option
from app.evaluation import first_per_domain
from app.screen import say
from arpo_mini import Agent, Budget, grow, judge, load_agent
from data.files import UserError, read_rows
from data.formats import Question, asked, domain_of, load_questions
from engine.model import Policy
from engine.writer import Writer
from lab.command import make_folder, parse, print_rows
from lab.intervals import Estimate, bootstrap, spearman, t_interval
from tools import ToolResult, policy_stop, read_call, run_calls

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 16  # questions rolled out side by side
COLUMNS = ("question", "call", "H", "H_initial", "spread")  # of a tool result


# ---- rolling out --------------------------------------------------------------------------


def continued(writer: Writer, nodes, k: int, config, tools, kept=()) -> dict[Segment, list]:
    """Node (prompt or tool result) -> the leaves of k paths that go on from it, without forks.

    Prompts among the nodes, and what is in `kept`, stay in the writer's cache.
    """
    budget = Budget(1, random.Random(0), most=0, places=dict.fromkeys(kept, 0.0))  # never spent
    repeated, found = [node for node in nodes for _ in range(k)], {node: [] for node in nodes}
    for leaf in grow(writer, repeated, {n.path()[0]: budget for n in nodes}, config, tools):
        # nodes may stand on one path: a leaf belongs to the last of them
        found[[segment for segment in leaf.path() if segment in found][-1]].append(leaf)
    return found


def continue_from(agent: Agent, nodes, k: int, config: Config, seed: int) -> list[list[Segment]]:
    """The k leaves that go on from each prompt or tool result."""

    def work(fitted: Config) -> dict[Segment, list]:
        transformers.set_seed(seed)
        return continued(Writer(agent.policy, fitted), nodes, k, fitted, agent.tools)

    return [*agent.policy.limits.retry(config, work).values()]


def rewards(policy: Policy, leaves: list[Segment], question: Question, config) -> list[float]:
    return [judge(policy, leaf, question, config).total for leaf in leaves]


def measure(agent: Agent, questions: list[Question], k: int, config: Config) -> list[list]:
    """Rows of COLUMNS, one for each tool result of a trajectory of every question."""
    nodes = []
    for at in tqdm(range(0, len(questions), AT_ONCE), unit_scale=AT_ONCE, disable=None):
        seed, some = config.seed + 1000 * at, questions[at : at + AT_ONCE]
        roots = [Segment("prompt", agent.policy.prompt(question.text)) for question in some]
        paths = [leaves[0].path() for leaves in continue_from(agent, roots, 1, config, seed)]
        results = {  # result -> what the branch rule would see there
            draft.parent: (i, draft.entropy, path[1].entropy)
            for i, path in enumerate(paths, start=at)
            for draft in path[3::2]  # prompt, policy, tool, policy, ..
        }
        forks = continue_from(agent, list(results), k, config, seed + 1)
        for (node, (i, *seen)), leaves in zip(results.items(), forks, strict=True):
            call = sum(segment.author == "tool" for segment in node.path())
            spread = statistics.variance(rewards(agent.policy, leaves, questions[i], config))
            nodes.append([i, call, *seen, spread])
    return nodes


# ---- calls that are given -----------------------------------------------------------------

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


def measure_forced(agent: Agent, questions: list[Forced], k: int, config: Config) -> list[list]:
    """[question, H at the start, H after the result] of each, means of k."""

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


def forced_answers(nodes: list[list[float]]) -> dict[str, Estimate | None]:
    """Means over the questions with Student's t; the share by bootstrap."""
    _, start, after = np.array(nodes).T
    gain = after - start
    return {
        "H at the start": t_interval(start),
        "H after the result": t_interval(after),
        "gain: after - start": t_interval(gain),
        "share of gains > 0": bootstrap(lambda g: (g > 0).mean(), list(gain[:, None])),
    }


# ---- what it says -------------------------------------------------------------------------


def answers(nodes: list[list[float]]) -> dict[str, Estimate | None]:
    """The question put in several ways; every value with its interval, None where undefined."""
    table = np.array(nodes, dtype=float).reshape(-1, len(COLUMNS))
    if not len(table):
        return {}
    of, _, H, H_initial, spread = table.T
    rows = np.stack([H, H - H_initial, spread], axis=1)  # (nodes, 3)
    clusters = [rows[of == question] for question in np.unique(of)]

    def spread_where(chosen):
        return lambda r: r[chosen(r), 2].mean() if chosen(r).any() else np.nan

    wanted = {
        "Spearman of H and spread": lambda r: spearman(r[:, 0], r[:, 2]),
        "Spearman of gain and spread": lambda r: spearman(r[:, 1], r[:, 2]),
        "share of results with gain > 0: the paper's rule": lambda r: (r[:, 1] > 0).mean(),
        "spread, gain > 0": spread_where(lambda r: r[:, 1] > 0),
        "spread, gain <= 0": spread_where(lambda r: r[:, 1] <= 0),
    }
    return {words: bootstrap(statistic, clusters) for words, statistic in wanted.items()}


def cells(words: str, e: Estimate | None) -> list[str]:
    interval = f"{e[1]:.4f} to {e[2]:.4f}" if e and e[1] is not None else "--"
    return [words, f"{e[0]:.4f}" if e else "--", interval]


# ---- command line -------------------------------------------------------------------------

TAKEN = (  # the settings of `train` that matter here
    "model_name adapter load_in_4bit dtype system_prompt thinking eval_path documents_path "
    "memory_gb search_results tool_time_limit max_tool_calls max_result_tokens "
    "max_segment_tokens max_total_tokens entropy_tokens rollout_rows seed"
).split()


@dataclass(frozen=True)
class Flags:
    questions: int = option(120, "how many of each domain", 1, 10**6)
    continuations: int = option(8, "K: trajectories from every tool result", 2, 10_000)
    forced: str | None = option(None, "file of questions whose first call is given, not its own")
    name: str | None = option(None, "of the files; none: cold-start, or the adapter's run")
    output_dir: str = option(str(ROOT / "lab/results/entropy"), "folder of the results")


def study(args: list[str]) -> None:
    own, values = parse("lab.compare entropy", __doc__, args, Flags, TAKEN)
    config = Config(**values, branch_rule="none")
    if own.forced:
        rows = [row for _, row in read_rows(own.forced, read_forced, FORCED)]
        work, answer, columns = measure_forced, forced_answers, ("question", "start", "after")
    else:
        rows = load_questions(config.eval_path)
        work, answer, columns = measure, answers, COLUMNS
    if not rows:
        raise UserError(f"--forced {own.forced} holds no questions; legal: {FORCED}")
    name = Path(config.adapter).resolve().parent.name if config.adapter else "cold-start"
    path = Path(own.output_dir, f"{own.name or name + '-forced' * bool(own.forced)}.json")
    if path.exists():
        raise UserError(f"{path} is there already; choose another --name or remove it")
    questions, agent = first_per_domain(rows, own.questions), load_agent(config)
    make_folder(path.parent)
    nodes = work(agent, questions, own.continuations, config)
    found = answer(nodes)
    settings = {"questions": len(questions), "continuations": own.continuations}
    result = {"settings": {**settings, "seed": config.seed}, "answers": found, "columns": columns}
    result["nodes"] = [[round(value, 5) for value in row] for row in nodes]
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print_rows(("", "value", "95 % interval"), [cells(*item) for item in found.items()])
    say(str(path))
