"""ARPO on one page (arXiv 2507.19849): python -m course.one_page --steps 20

GRPO samples M trajectories for a question and learns which of them were better than the others.
ARPO begins only N of them at the question. The other M - N are forks: they begin at a tool result
after which the policy (the model) is more uncertain, and share everything before that point.
Shapes: Q questions, R rows (paths), T or S tokens, V tokens in the vocabulary. Left out, see
arpo_mini.py: KL, checks, files, evaluation, speed (every turn reads a path from its beginning).
"""

import argparse
import random

import torch

import tools as toolbox
from advantage import Segment, group_advantages, reward, segment_advantages
from app.config import Config
from data.formats import load_questions
from engine.judge import judge_answer
from engine.model import load_policy
from entropy import RULES, normalised_entropy, token_entropy


def train_step(policy, optimizer, questions, config, tools, seed):
    """One step: M trajectories a question, a reward for each, advantages for tokens, an update."""
    groups = rollout(policy, questions, config, tools, seed)  # Q groups of M leaves
    rewards, credits = [], {}  # segment -> (d), one advantage from each leaf below it
    for leaves, question in zip(groups, questions, strict=True):
        judged = [judge(policy, leaf, question) for leaf in leaves]  # M
        A = group_advantages([r.total for r in judged])  # (M)    > 0: better than the group's mean
        credits |= segment_advantages(leaves, A.to(policy.device), config.shared_weight)
        rewards += judged
    for _ in range(config.updates_per_rollout):
        update(policy, optimizer, credits, config)
    return {
        "reward": sum(r.total for r in rewards) / len(rewards),
        "accuracy": sum(r.accuracy for r in rewards) / len(rewards),
        "tool_calls": len({s.parent for s in credits if s.parent.author == "tool"}),
        "forks": len(rewards) - sum(s.parent.author == "prompt" for s in credits),
        "tokens": (1 + config.updates_per_rollout) * sum(s.depth() for s in credits),  # computed
    }


def rollout(policy, questions, config, tools, seed):
    """M different leaves for each question. The path to a leaf is a trajectory."""
    torch.manual_seed(seed)  # every token is drawn from this generator
    M, N = config.group_size, config.initial_rollouts
    budgets = {}  # root -> slots: paths still to begin; what its branch rule needs
    for i, question in enumerate(questions):
        root = Segment("prompt", policy.prompt(question.text))  # all M paths share it
        budgets[root] = {"slots": M - N, "rng": random.Random(f"{seed} {i}"), "history": []}
    leaves = grow(policy, list(budgets) * N, budgets, config, tools)  # Q * N begin, Q * M end
    return [[leaf for leaf in leaves if leaf.path()[0] is root] for root in budgets]


def grow(policy, nodes, budgets, config, tools):
    """All leaves below these nodes (questions or tool results). Each call is one level deeper."""
    for root, budget in budgets.items():
        if root not in [node.path()[0] for node in nodes]:  # all paths have ended: none can fork
            nodes = nodes + [root] * budget["slots"]  # the missing ones begin at the question
            budget["slots"] = 0
    if not nodes:
        return []
    drafts = write(policy, nodes, config)  # what the policy writes after each node
    forked = decide_forks(drafts, budgets, config)  # tool results, once for each fork
    drafts += write(policy, forked, config) if forked else []  # a fork begins right after a result
    results = {draft: call_tool(policy, draft, config, tools) for draft in drafts}
    leaves = [draft for draft in drafts if results[draft] is None]  # these paths end here
    return leaves + grow(policy, [r for r in results.values() if r], budgets, config, tools)


def write(policy, nodes, config):
    """A policy segment after each node, to its end. Every token may be drawn (top_k = 0)."""
    paths = [node.path_tokens() for node in nodes]
    inputs = policy.tokenizer.pad({"input_ids": paths}, return_tensors="pt").to(policy.device)
    W = inputs["input_ids"].shape[1]  # (R, W)    a row for each node, padded on the left
    rooms = [min(config.max_segment_tokens, config.max_total_tokens - len(path)) for path in paths]

    def complete(tokens, scores, **_):  # asked after each new token: which rows may stop?
        ended = [bool(policy.why_ended(row[W:])) for row in tokens.tolist()]
        return torch.tensor(ended, device=tokens.device)  # (R)

    sampling = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    limits = {"max_new_tokens": max(rooms), "stopping_criteria": [complete], "output_scores": True}
    out = policy.lm.generate(**inputs, **sampling, **limits, return_dict_in_generate=True)
    new, scores = out.sequences[:, W:], torch.stack(out.scores, dim=1)  # (R, S), (R, S, V)
    logp = scores.log_softmax(dim=-1).gather(2, new[:, :, None])[:, :, 0].tolist()  # (R, S)
    H = token_entropy(scores).tolist()  # (R, S)    in nats
    drafts = []
    for i, row in enumerate(new.tolist()):  # a row that ended early is padded: cut that off
        n = next((n for n in range(1, rooms[i]) if policy.why_ended(row[:n])), rooms[i])
        stop = policy.why_ended(row[:n]) or "length"  # else: tool, answer or eos
        H_k = normalised_entropy(H[i][:n][: config.entropy_tokens], policy.vocab_size)  # in [0, 1]
        drafts.append(Segment("policy", row[:n], nodes[i], stop, H_k, logp[i][:n]))
    return drafts


def decide_forks(drafts, budgets, config):
    """The tool results to fork, once for each fork: the largest gain first, while slots last."""
    rule, forked = RULES[config.branch_rule], []  # it takes what it needs of config
    read = [draft for draft in drafts if draft.parent.author == "tool"]
    for draft in read:
        budget, H_initial = budgets[draft.path()[0]], draft.path()[1].entropy  # its start
        u, history = budget["rng"].random(), budget["history"]
        draft.parent.decision = rule(draft.entropy, H_initial, u=u, history=history, **vars(config))
    for draft in sorted(read, key=lambda draft: -draft.parent.decision.gain):
        budget = budgets[draft.path()[0]]
        budget["history"].append(draft.entropy)  # only now: decisions of a level are independent
        granted = min(draft.parent.decision.forks, budget["slots"])
        budget["slots"] -= granted
        forked += [draft.parent] * granted
    return forked


def call_tool(policy, draft, config, tools):
    """The result of the call in `draft`, as a new segment; None where the path ends."""
    used = sum(segment.author == "tool" for segment in draft.path())
    if draft.stop != "tool" or used == config.max_tool_calls:
        return None
    call = toolbox.read_call(policy.decode(draft.token_ids))
    output = toolbox.run_one(call, tools)  # a bad call: an error is the result
    token_ids = policy.encode_result(output, config.max_result_tokens)
    result = Segment("tool", token_ids, draft, tool=call.name if output.ok else None)
    return result if result.depth() < config.max_total_tokens else None  # None: no room to answer


def judge(policy, leaf, question):
    """-1 for a broken format, else how right the answer is, and a bonus for two kinds of tools."""
    kinds = {segment.tool for segment in leaf.path() if segment.tool}  # of tools that answered
    return reward(policy.turns(leaf), question.answers, judge=judge_answer, tools_used=len(kinds))


def loss(policy, segment, A, config):
    """PPO's clipped loss of the n tokens of a policy segment that d trajectories share."""
    n = len(segment.logp)
    tokens = torch.tensor(segment.path_tokens(), device=policy.device)  # (T)
    logits = policy.lm(tokens[None]).logits[0, -n - 1 : -1].float()  # (n, V)    t - 1 is for t
    logp = (logits / config.temperature).log_softmax(dim=-1).gather(1, tokens[-n:, None])  # (n, 1)
    ratio = torch.exp(logp - logp.new_tensor(segment.logp)[:, None])  # (n, 1)    1 at first
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)  # outside: no gradient
    return -torch.min(ratio * A, clipped * A).sum()  # A (d), so (n, d) -> ()


def update(policy, optimizer, credits, config):
    """A step down the loss: a mean over the tokens that the policy wrote in all trajectories."""
    total = sum(len(segment.logp) * len(A) for segment, A in credits.items())
    optimizer.zero_grad()
    for segment, A in credits.items():  # policy segments only: prompts and results are not trained
        (loss(policy, segment, A, config) / total).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters, 1.0)  # of the adapter, all else is frozen
    optimizer.step()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    rules = sorted({*RULES} - {"step", "official"})  # they need more than this page
    parser.add_argument("--branch_rule", choices=rules, default="paper", help="none: GRPO")
    flags = parser.parse_args()
    flags.steps >= 1 or parser.error(f"--steps {flags.steps}: it must be at least 1")
    config = Config(branch_rule=flags.branch_rule)
    tools = toolbox.default_tools(config.documents_path, config.search_results, 200)
    torch.manual_seed(config.seed)  # of the new adapter
    policy = load_policy(config, tools, trainable=True)
    optimizer = torch.optim.AdamW(policy.parameters, lr=config.learning_rate, weight_decay=0.0)
    questions, rng = load_questions(config.dataset_path), random.Random(config.seed)
    for step in range(1, flags.steps + 1):
        asked = rng.sample(questions, config.questions_per_step)  # Q
        figures = train_step(policy, optimizer, asked, config, tools, seed=step)
        print(f"step {step:3}", *(f" {name} {round(value, 3)}" for name, value in figures.items()))
