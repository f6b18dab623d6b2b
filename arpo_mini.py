"""The algorithm of ARPO: roll out, fork where uncertain, advantages, update (arXiv 2507.19849).

    python arpo_mini.py train | eval | show | report      (--help lists the flags of each)

GRPO samples M trajectories of a question from its beginning and compares their rewards. ARPO begins
only N of them there. The other M - N fork off at a tool result, where the policy is more uncertain
than it was at the start. They share every token, tool call and cache entry before that point.

Read from top to bottom: `train_step` is the algorithm, `grow` the recursion that forks; then come
rewards and advantages, the update, the training loop. Other files: entropy.py (where to fork),
advantage.py (rewards, advantages), tools.py (what can be called). Not here: how a model is loaded,
how caches, packed rows and memory work (engine/), flags, files and tables (app/).
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor

import tools as toolbox
from advantage import (
    Reward,
    Segment,
    boxed,
    clipped_objective,
    group_advantages,
    kl_k3,
    reward,
    segment_advantages,
    shared_by,
)
from app import cli
from app.config import Config, check_training
from app.evaluation import evaluate_midway, first_per_domain
from app.health import remarks
from app.records import questions_of_step, record_trees, scores_of, short_answers, step_metrics
from app.run_folder import RunFolder
from app.screen import comparison, print_log_head, print_log_line, print_table, progress_bar, say
from data.formats import Question, load_questions
from engine import official
from engine.checks import refuse_long
from engine.judge import judge_answer, measures
from engine.memory import snapshot
from engine.model import Policy, load_policy
from engine.packing import (
    Batch,
    NonFinite,
    Row,
    make_batch,
    make_row,
    micro_batches,
    require_finite,
    split_tree,
    take_step,
    token_logprobs,
)
from engine.processes import joined
from engine.writer import Writer
from entropy import RULES, Decision, running_threshold

SEARCH_CHARS = 200  # of each document that a search returns
STEPS_BACK = 5  # whose scores give the threshold of rule step

# ---- one step ------------------------------------------------------------------------------
# Q questions, M trajectories (leaves) each, d of them below a segment; R paths; B rows, T tokens.


def train_step(
    policy: Policy, optimizer, questions: list[Question], config: Config, tools: dict, step: int,
    scores: Sequence[list[float]] = (),
) -> tuple[dict, list[list[Segment]], list[list[Reward]]]:  # fmt: skip
    """One step of ARPO: figures of the update, and for each question its leaves and rewards.

    Random draws depend only on seed and step. `scores`: of the last steps' results, for rule step.
    """
    started = time.perf_counter()
    writer, seed = Writer(policy, config), config.seed * 1_000_003 + step
    groups = rollout(writer, questions, config, tools, seed, scores)  # Q x M leaves in all
    asked = zip(questions, groups, strict=True)
    rewards = [[judge(policy, leaf, q, config) for leaf in leaves] for q, leaves in asked]  # Q x M
    writer.kv.clear()  # free the cache: the update needs the memory
    rolled_out = time.perf_counter()
    rows = [row for pair in zip(groups, rewards, strict=True) for row in credit(*pair, config)]
    figures = update(policy, optimizer, rows, config)
    figures |= {"seconds_rollout": rolled_out - started, "prefill_tokens": writer.prefill_tokens}
    return figures | {"seconds_update": time.perf_counter() - rolled_out}, groups, rewards


def grow(
    writer: Writer, nodes: list[Segment], budgets: dict[Segment, Budget], config: Config,
    tools: dict,
) -> list[Segment]:  # fmt: skip
    """All leaves below these nodes (prompts or tool results). Each call goes one level deeper."""
    growing = {budgets[node.path()[0]] for node in nodes}
    for budget in dict.fromkeys(budgets.values()):  # each once: with rule step all share one
        if budget not in growing:  # all its paths have ended: none can fork
            nodes = nodes + spend_rest(budget, config)
    if not nodes:
        return []
    # A policy segment after each node: its first k tokens, and their entropy.
    drafts = writer.begin(nodes, config.entropy_tokens)
    forked = decide_forks(drafts, budgets, config)  # tool results, once for each fork
    # A fork begins right after the result: the measured tokens belong to the path that goes on.
    drafts += writer.begin(forked, config.entropy_tokens)  # (R + forks) segments
    writer.finish(drafts, [node for some in budgets.values() if some.slots for node in some.places])
    results, leaves = call_tools(writer, drafts, config, tools)
    return leaves + grow(writer, results, budgets, config, tools)


# ---- the rollout ---------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)  # identity, not value
class Budget:
    """Paths that are still to begin: of one question, or of all questions of a step."""

    slots: int  # how many: forks first; the rest begins when all paths have ended
    rng: random.Random  # what the branch rule draws from
    most: float = math.inf  # slots that one question may use
    threshold: float = math.inf  # rule step: fork at once where the score is above it
    taken: Counter = dataclasses.field(default_factory=Counter)  # question -> slots
    history: list[float] = dataclasses.field(default_factory=list)  # entropies, rule adaptive
    # Where what is left may begin -> score: the question; with rule step also every result.
    places: dict[Segment, float] = dataclasses.field(default_factory=dict)


def rollout(
    writer: Writer, questions: list[Question], config: Config, tools: dict, seed: int,
    scores: Sequence[list[float]] = (),
) -> list[list[Segment]]:  # fmt: skip
    """The leaves of each question, all distinct: M of them, with rule step M on average."""
    transformers.set_seed(seed % 2**32)  # of torch, and of random and numpy for tools
    M, N, leaves = config.group_size, config.initial_rollouts, []
    roots = [Segment("prompt", writer.policy.prompt(question.text)) for question in questions]
    if config.branch_rule == "step":
        forks, most = (M - N) * len(roots), (config.max_leaves or 2 * M) - N
        wanted = config.questions_per_step * (M - N) / max(1, config.max_branches)
        T = running_threshold(scores, wanted)  # of all processes together
        budgets = dict.fromkeys(roots, Budget(forks, random.Random(seed), most, T))
        together = len(roots)
    else:
        # A generator for each: decisions in one tree do not depend on the other trees.
        budgets = {r: Budget(M - N, random.Random(f"{seed} {i}")) for i, r in enumerate(roots)}
        together = max(1, config.rollout_rows // M)  # questions that are rolled out together
    for i in range(0, len(roots), together):
        some = roots[i : i + together]
        nodes = [root for root in some for _ in range(N)]
        leaves += grow(writer, nodes, {root: budgets[root] for root in some}, config, tools)
    return [[leaf for leaf in leaves if leaf.path()[0] is root] for root in roots]


def decide_forks(
    drafts: list[Segment], budgets: dict[Segment, Budget], config: Config
) -> list[Segment]:
    """The tool results to fork, once for each fork: the highest score first, while slots last."""
    read, forked = [], []
    for draft in drafts:
        node, budget = draft.parent, budgets[draft.path()[0]]
        if node.author == "prompt":
            drawn = config.branch_score == "random"
            budget.places[node] = budget.rng.random() if drawn else draft.entropy
        elif node.decision is None:  # else it was decided: what is left begins here
            node.decision = apply_rule(draft, budget, config)
            read.append(draft)
    for node in sorted((draft.parent for draft in read), key=lambda node: -node.decision.rank):
        budget = budgets[node.path()[0]]
        budget.history.append(node.decision.H)  # not earlier: decisions of a level are independent
        forked += grant(budget, node, node.decision.forks)
        if config.branch_rule == "step":
            budget.places[node] = node.decision.rank
    return forked


def apply_rule(draft: Segment, budget: Budget, config: Config) -> Decision:
    """What the branch rule says at the tool result that `draft` has just read."""
    first = draft.path()[1]  # the start of the same trajectory
    # The released code measures the segment that ends with the call, before the result.
    measured = draft.parent.parent if config.branch_rule == "official" else draft
    known = {"u": budget.rng.random(), "history": budget.history, "threshold": budget.threshold}
    return RULES[config.branch_rule](measured.entropy, first.entropy, **known, **vars(config))


def grant(budget: Budget, node: Segment, wanted: int) -> list[Segment]:
    """The node, once for each path that begins there: `wanted`, or as many as there are slots."""
    root = node.path()[0]
    granted = min(wanted, budget.slots, budget.most - budget.taken[root])
    budget.slots -= granted
    budget.taken[root] += granted
    made = node.decision  # None at a question
    node.decision = made and dataclasses.replace(made, granted=made.granted + granted)
    return [node] * granted


def spend_rest(budget: Budget, config: Config) -> list[Segment]:
    """Where what is left begins: with rule step at the highest scores, then at the questions."""
    nodes = []
    for node in sorted(budget.places, key=lambda n: (n.author == "prompt", -budget.places[n])):
        made = node.decision
        nodes += grant(budget, node, config.max_branches - made.granted if made else budget.slots)
    return nodes


def call_tools(
    writer: Writer, drafts: list[Segment], config: Config, tools: dict
) -> tuple[list[Segment], list[Segment]]:
    """Run the calls of a level: the results that paths go on from, and the paths that end here."""
    calling, leaves, results = [], [], []
    for draft in drafts:
        used = sum(segment.author == "tool" for segment in draft.path())
        may_call = draft.stop == "tool" and used < config.max_tool_calls
        (calling if may_call else leaves).append(draft)
    calls = [toolbox.read_call(writer.policy.decode(d.token_ids)) for d in calling]
    answers = toolbox.run_calls(calls, tools, config.tool_time_limit)
    for draft, call, answer in zip(calling, calls, answers, strict=True):
        # Ids are appended, text is never tokenized again: each token keeps its author.
        token_ids = writer.policy.encode_result(answer, config.max_result_tokens)
        result = Segment("tool", token_ids, parent=draft, tool=call.name if answer.ok else None)
        if result.depth() < writer.longest:
            results.append(result)
        else:  # no room left to answer: the result is dropped, the trajectory ends with its call
            draft.stop = "length"
            leaves.append(draft)
    return results, leaves


# ---- reward and credit ---------------------------------------------------------------------


def judge(policy: Policy, leaf: Segment, question: Question, config: Config) -> Reward:
    """The reward of a trajectory, judged on its text and on who wrote which part of it."""
    turns = policy.turns(leaf)  # (author, text), ..
    if config.official_rewards:
        return official.official_reward(official.transcript(turns), question.answers)
    kinds = {segment.tool for segment in leaf.path() if segment.tool}  # of tools that answered
    return reward(turns, question.answers, judge=judge_answer, tools_used=len(kinds))


def credit(leaves: list[Segment], rewards: list[Reward], config: Config) -> list[Row]:
    """Rewards of one question -> advantages of its leaves -> of segments -> rows of the update."""
    A = group_advantages([reward.total for reward in rewards])  # (M)
    below = shared_by(leaves)  # segment -> the leaves that pass through it
    advantages = {
        segment: dict(zip((leaves[i] for i in below[segment]), values.tolist(), strict=True))
        for segment, values in segment_advantages(leaves, A, config.shared_weight).items()  # (d)
    }
    # One row for the whole tree, each token once; a tree too large is cut at a fork.
    return [make_row(some, advantages) for some in split_tree(leaves, config.micro_batch_tokens)]


# ---- the update ----------------------------------------------------------------------------


def policy_loss(
    logp: Tensor, old_logp: Tensor, batch: Batch, config: Config, total: float, ref_logp=None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss, a mean over the `total` policy tokens of the whole step (as released).

    Also returns how many of those tokens have no gradient because of the clip.
    """
    ratio = torch.exp(logp - old_logp)  # (B, T)
    objective = clipped_objective(  # (B, T)   0 where A is: prompts, results, padding
        ratio, batch.A_plus, batch.A_minus, config.clip_low, config.clip_high, config.dual_clip
    )
    loss = -objective.sum() / total
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp)  # (B, T)
        loss = loss + config.kl_coefficient * (batch.weight * kl).sum() / total
    above = ratio > 1 + config.clip_high  # (B, T)
    below = ratio != ratio.clamp(1 - config.clip_low, config.dual_clip)  # (B, T)
    return loss, (batch.n_plus * above + batch.n_minus * below).sum()


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> dict:
    """`updates_per_rollout` optimizer steps on one rollout; `total`: policy tokens of all parts.

    A row without a gradient (its group has equal rewards) counts in the mean, but is not computed.
    """
    # A token that d trajectories share counts d times, as if each had a row of its own.
    total = sum(sum(row.weight) for row in rows)
    if not config.kl_coefficient:
        rows = [row for row in rows if any(row.A_plus) or any(row.A_minus)]
    parts = micro_batches(rows, config.micro_batch_tokens)
    batches = [make_batch(some, policy.pad_id, policy.device, policy.lm.dtype) for some in parts]
    old, reference = fixed_logprobs(policy, batches, config)
    n, loss_sum, clipped_sum, norms, drifts = config.updates_per_rollout, 0.0, 0.0, [], []
    for i in range(n):
        for p in policy.parameters:
            p.grad = torch.zeros_like(p)  # not None: AdamW's momentum acts also without rows
        for some, batch, old_logp, ref_logp in zip(parts, batches, old, reference, strict=True):
            texts = [row.input_ids for row in some]
            logp = token_logprobs(policy, batch, config.temperature)  # (B, T)
            require_finite("a log-prob", logp, texts)
            if i == 0:  # difference of the log-probs here and in sampling
                drifts.append((logp.detach() - batch.sampled_logp)[~batch.sampled_logp.isnan()])
            old_logp = logp.detach() if old_logp is None else old_logp
            loss, clipped = policy_loss(logp, old_logp, batch, config, total, ref_logp)
            require_finite("the loss", loss, texts)
            policy.scaler.scale(loss).backward()  # scaled in float16 only, against underflow
            loss_sum, clipped_sum = loss_sum + loss.item(), clipped_sum + clipped.item()
        norms.append(take_step(policy, optimizer, total, rows))  # scaled down to 1; None: skipped
    drift = torch.cat(drifts).abs().tolist() if drifts else []
    figures = {"loss": loss_sum / n, "clip_fraction": clipped_sum / (total * n)}
    figures |= {"grad_norm": norms[-1], "skipped_updates": norms.count(None)}
    figures |= {"train_tokens": sum(map(len, rows)), "drift_max": max(drift, default=None)}
    return figures | {"drift_mean": sum(drift) / len(drift) if drift else None}


@torch.no_grad()
def fixed_logprobs(policy: Policy, batches: list[Batch], config: Config) -> tuple[list, list]:
    """Log-probs before the update, and with the adapter off; None where they are not needed."""
    old, reference = [None] * len(batches), [None] * len(batches)
    if config.updates_per_rollout > 1:  # with one update the ratio is 1
        old = [token_logprobs(policy, batch, config.temperature) for batch in batches]
    if config.kl_coefficient:
        with policy.model.disable_adapter():
            reference = [token_logprobs(policy, batch, config.temperature) for batch in batches]
    return old, reference


# ---- the loop around it --------------------------------------------------------------------


def train(config: Config, tools: dict | None = None, resume: Path | None = None) -> None:
    """Evaluate, train step by step (evaluating now and then), and evaluate again."""
    check_training(config)
    questions, test = load_questions(config.dataset_path), load_questions(config.eval_path)
    with RunFolder(config, resume, joined()) as run:
        start = dataclasses.replace(config, adapter=run.adapter)
        agent = load_agent(start, tools, trainable=True)
        agent.refuse_long(questions, config.dataset_path)
        agent.refuse_long(test, config.eval_path)
        policy = agent.policy
        optimizer = torch.optim.AdamW(policy.parameters, lr=config.learning_rate, weight_decay=0.0)
        run.start(policy.model, optimizer, policy.scaler, policy.limits, policy.prompt("question"))
        with progress_bar() as bar:
            before = evaluate_midway(run, agent, test, bar, step=0)
            task = bar.add_task("train", total=config.steps, completed=run.step)
            print_log_head()
            for step in range(run.step + 1, config.steps + 1):
                if config.eval_every and step > 1 and (step - 1) % config.eval_every == 0:
                    some = first_per_domain(test, config.eval_part)
                    evaluate_midway(run, agent, some, bar, step - 1)
                asked = questions_of_step(questions, step, config)
                done = safe_step(agent, optimizer, asked, config, step, run.scores)
                metrics, groups, rewards = done
                run.scores = [*run.scores, scores_of(groups)][-STEPS_BACK:]
                run.log({"step": step, **metrics})
                print_log_line(step, metrics, remarks(run.metrics))
                record_trees(run, policy, step, asked, groups, rewards)
                run.complete(step)
                bar.advance(task)
            after = evaluate_midway(run, agent, test, bar, config.steps)
        if after:
            print_table(comparison(before, after))
        say(run.in_words())


def safe_step(
    agent: Agent, optimizer, questions: list[Question], config: Config, step: int,
    scores: Sequence[list[float]] = (),
) -> tuple[dict, list[list[Segment]], list[list[Reward]]]:  # fmt: skip
    """`train_step` and its figures; out of memory: the same step again, less at a time."""
    policy = agent.policy

    def work(fitted: Config):
        def of_some(some: list[Question], number: int):
            return train_step(policy, optimizer, some, fitted, agent.tools, number, scores)

        figures, groups, rewards = policy.processes.shared(of_some, questions, step)
        short = {"short_answers": short_answers(policy, groups)}
        return {**step_metrics(groups, rewards), **short, **figures}, groups, rewards

    # A repeated step begins with the same seed: only the update has to be undone.
    undo = snapshot(policy, optimizer)  # some optimizer steps may have been taken
    try:
        return policy.limits.retry(config, work, undo)
    except NonFinite as wrong:
        prompts = {question.text: policy.prompt(question.text) for question in questions}
        raise wrong.within(step, prompts) from None


@dataclasses.dataclass
class Agent:
    """A policy and its tools: what evaluation and display ask of this file."""

    policy: Policy
    tools: dict[str, toolbox.Tool]
    config: Config
    prefill_tokens: int = 0  # prompt and result tokens that the last rollout read

    def roll_out(self, questions: list[Question], config: Config, seed: int) -> tuple[list, list]:
        """Leaves and rewards of each question; out of memory: again, fewer rows at a time."""

        def work(fitted: Config):
            def of_some(some: list[Question], number: int):
                writer = Writer(self.policy, fitted)
                groups = rollout(writer, some, fitted, self.tools, number)
                self.prefill_tokens = writer.prefill_tokens
                asked = zip(some, groups, strict=True)
                return {}, groups, [[judge(self.policy, x, q, fitted) for x in g] for q, g in asked]

            return self.policy.processes.shared(of_some, questions, seed)[1:]

        return self.policy.limits.retry(config, work)

    def examine(self, leaf: Segment, question: Question, reward: Reward, config: Config) -> dict:
        """The answer of a trajectory, and its score by each measure of an evaluation."""
        turns = self.policy.turns(leaf)
        if config.official_rewards:
            text, is_math = official.transcript(turns), question.domain == "math"
            return official.official_judge(text, question.answers, is_math)
        return measures(boxed(turns[-1][1]) if reward.well_formed else None, question.answers)

    def refuse_long(self, questions: list[Question], path: str) -> None:
        """UserError where a prompt leaves no room to answer."""
        refuse_long(self.policy, questions, path, self.config)


def make_tools(config: Config) -> dict[str, toolbox.Tool]:
    """The built-in tools, by name."""
    return toolbox.default_tools(config.documents_path, config.search_results, SEARCH_CHARS)


def load_agent(config: Config, tools: dict | None = None, trainable: bool = False) -> Agent:
    """The model of the settings with its adapter, and the built-in tools or one's own."""
    tools = make_tools(config) if tools is None else {tool.name: tool for tool in tools.values()}
    torch.manual_seed(config.seed)  # a new adapter has random weights
    return Agent(load_policy(config, tools, trainable), tools, config)


if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:], train, load_agent))
