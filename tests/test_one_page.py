"""The one page against arpo_mini: the same trees, loss, gradient and step; and it learns."""

import dataclasses
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import arpo_mini
from advantage import Reward, group_advantages, shared_by
from course import one_page
from engine.packing import make_batch, token_logprobs
from entropy import RULES, Decision, normalised_entropy, token_entropy

PAGE = Path(one_page.__file__)
SHORT, ONE_CALL = {"max_total_tokens": 55}, {"max_tool_calls": 1}


def segments_of(groups):
    return list(shared_by([leaf for leaves in groups for leaf in leaves]))


# ---- credit, loss and update --------------------------------------------------------------


@pytest.fixture(scope="module")
def trees(policy, config, tools, questions):
    """Trees that arpo_mini has grown, and a reward for each leaf."""
    config = dataclasses.replace(config, temperature=0.8)
    writer = arpo_mini.open_writer(policy, config)
    groups = arpo_mini.rollout(writer, questions[1:3], config, tools, seed=0)
    assert any(s.decision and s.decision.granted for s in segments_of(groups))
    values = torch.rand(2, config.group_size, generator=torch.Generator().manual_seed(0)).tolist()
    return groups, [[Reward(r, r, True, 1) for r in some] for some in values]


@pytest.mark.parametrize("noise", [0.0, 0.5])  # of the old log-probs; 0.5: clipped on both sides
@pytest.mark.parametrize("shared_weight", [0.0, 0.3, 1.0])
def test_loss_and_gradient(policy, config, trees, monkeypatch, shared_weight, noise):
    config = dataclasses.replace(config, shared_weight=shared_weight, temperature=0.8)
    generator = torch.Generator().manual_seed(1)
    for segment in segments_of(trees[0]):
        moved = noise * torch.randn(len(segment.logp), generator=generator)
        monkeypatch.setattr(segment, "logp", (torch.tensor(segment.logp) + moved).tolist())
    rows, credits = [], {}
    for leaves, rewards in zip(*trees, strict=True):
        rows += arpo_mini.credit(leaves, rewards, config)
        A = group_advantages([r.total for r in rewards])
        below = shared_by(leaves).items()
        own = {segment: A[some] for segment, some in below if segment.author == "policy"}  # (d)
        credits |= {s: (1 - shared_weight) * a + shared_weight * a.mean() for s, a in own.items()}
    total = sum(sum(row.weight) for row in rows)
    batch = make_batch(rows, policy.pad_id, policy.device)
    logp, old = token_logprobs(policy, batch, config.temperature), batch.sampled_logp.nan_to_num(0)
    right, clipped = arpo_mini.policy_loss(logp, old, batch, config, total)
    assert (clipped > 0) == (noise > 0)
    loss = sum(one_page.loss(policy, *credit, config) for credit in credits.items()) / total
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    gradients = [torch.autograd.grad(x, policy.parameters) for x in (loss, right)]
    ours, theirs = (torch.cat([g.flatten() for g in some]) for some in gradients)
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_a_whole_step_on_the_same_trees(policy, config, tools, questions, monkeypatch):
    """Reward, credit, two updates (the second is off-policy and clipped), and the figures."""
    changes = {"updates_per_rollout": 2, "shared_weight": 1.0, "clip_low": 0.01, "clip_high": 0.01}
    config = dataclasses.replace(config, **changes)
    start = parameters_to_vector(policy.parameters).detach().clone()

    def step(train_step):
        optimizer = torch.optim.SGD(policy.parameters, lr=3.0)
        out = train_step(policy, optimizer, questions[1:3], config, tools, 4)
        moved = parameters_to_vector(policy.parameters).detach() - start
        vector_to_parameters(start.clone(), policy.parameters)
        optimizer.zero_grad()
        return out, moved

    (figures, groups, rewards), right = step(arpo_mini.train_step)
    monkeypatch.setattr(one_page, "rollout", lambda *_: groups)
    ours, moved = step(one_page.train_step)
    assert figures["clip_fraction"] > 0 and right.norm() > 0
    assert (moved - right).norm() < 1e-4 * right.norm()
    calls = [s for s in segments_of(groups) if s.author == "tool"]
    rewards = [r for some in rewards for r in some]
    assert ours["tool_calls"] == len(calls)
    assert ours["forks"] == sum(s.decision.granted for s in calls)
    assert ours["tokens"] == 3 * sum(s.depth() for s in segments_of(groups) if s.logp)
    assert ours["reward"] == pytest.approx(sum(r.total for r in rewards) / len(rewards))
    assert ours["accuracy"] == pytest.approx(sum(r.accuracy for r in rewards) / len(rewards))


# ---- the rollout --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, changes", [*((r, ONE_CALL) for r in RULES if r != "step"), ("random", SHORT)]
)
def test_M_leaves_that_fork_right_after_results(policy, config, tools, questions, rule, changes):
    config = dataclasses.replace(config, branch_rule=rule, **changes)
    groups = one_page.rollout(policy, questions[1:3], config, tools, seed=1)
    assert [len(set(leaves)) for leaves in groups] == [config.group_size] * 2
    for leaf in (leaf for leaves in groups for leaf in leaves):
        authors = [segment.author for segment in leaf.path()]
        assert authors == ["prompt", "policy", *["tool", "policy"] * ((len(authors) - 2) // 2)]
        assert authors.count("tool") <= config.max_tool_calls
        assert leaf.depth() <= config.max_total_tokens
    assert "tool" in {leaf.stop for leaves in groups for leaf in leaves}  # no call or room left
    segments = segments_of(groups)
    calls = [s for s in segments if s.author == "tool"]
    children = {s: sum(child.parent is s for child in segments) for s in segments}
    assert all(s.parent.stop == "tool" and 1 <= children[s] <= 1 + s.decision.forks for s in calls)
    assert all(children[s] <= 1 for s in segments if s.author == "policy")
    forks = sum(children[s] - 1 for s in calls)
    assert forks <= 2 * (config.group_size - config.initial_rollouts)
    assert (forks > 0) == (rule != "none") or rule in ("adaptive", "threshold")  # not here


def test_recorded_is_what_a_clean_pass_gives(policy, config, tools, questions):
    """Of a left-padded batch, cut where each row ended: log-probs, and entropies of k tokens."""
    config = dataclasses.replace(config, temperature=0.7, entropy_tokens=7)
    groups = one_page.rollout(policy, questions[1:3], config, tools, seed=2)
    written = [s for s in segments_of(groups) if s.author == "policy"]
    assert len({len(segment.token_ids) for segment in written}) > 1
    for segment in written:
        tokens, n = torch.tensor(segment.path_tokens()), len(segment.token_ids)
        with torch.no_grad():
            logits = policy.lm(tokens[None]).logits[0, -n - 1 : -1] / config.temperature
        logp = torch.distributions.Categorical(logits=logits).log_prob(tokens[-n:])
        assert segment.logp == pytest.approx(logp.tolist(), abs=1e-4)
        H = normalised_entropy(token_entropy(logits[:7]).tolist(), policy.vocab_size)
        assert segment.entropy == pytest.approx(H, abs=1e-4)


def plain(segment, segments):
    """A tree as plain data, whatever the order of equal forks."""
    forks = segment.decision.forks if segment.decision else 0
    below = sorted(plain(child, segments) for child in segments if child.parent is segment)
    return segment.author, segment.token_ids, segment.tool or "", forks, below


def by_luck(H, H_initial, *, u, history, **_):
    """In the place of `adaptive`: it forks as it never would by itself."""
    return Decision(H, H_initial, gain=u, probability=u, forks=(int(4 * u) + len(history)) % 4)


@pytest.mark.parametrize("rule, N", [("paper", 3), ("random", 2), ("none", 1), ("adaptive", 3)])
def test_the_same_draws_grow_the_same_trees(policy, config, tools, questions, monkeypatch, rule, N):
    def draw(p, num_samples):
        """Depends on the distribution alone, not on the order in which rows are drawn."""
        u = (37 * p.argmax(dim=-1, keepdim=True) + 11) % 100 / 100  # (R, 1)
        return (p.cumsum(dim=-1) < u).sum(dim=-1, keepdim=True).clamp(max=p.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", draw)
    monkeypatch.setitem(RULES, "adaptive", by_luck)
    changes = {"initial_rollouts": N, "max_branches": 2, "max_segment_tokens": 20}
    config = dataclasses.replace(config, branch_rule=rule, temperature=1.5, **changes)
    writer, asked = arpo_mini.open_writer(policy, config), questions[3:]
    right = segments_of(arpo_mini.rollout(writer, asked, config, tools, seed=3))
    some = segments_of(one_page.rollout(policy, asked, config, tools, seed=3)), right
    assert any(s.decision and s.decision.granted for s in right) == (rule != "none")
    mine, theirs = ([plain(s, g) for s in g if s.author == "prompt"] for g in some)
    assert mine == theirs
    measured = [sorted((s.decision.H, s.decision.H_initial) for s in g if s.decision) for g in some]
    assert torch.allclose(*map(torch.tensor, measured), atol=1e-5)


# ---- the command, and the file ------------------------------------------------------------


def run_page(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["one_page", *flags])
    runpy.run_path(str(PAGE), run_name="__main__")


@pytest.mark.parametrize("flags", [("--steps", "0"), ("--steps", "x"), ("--branch_rule", "best")])
def test_a_bad_flag_is_one_line(monkeypatch, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        run_page(monkeypatch, *flags)
    last = capsys.readouterr().err.splitlines()[-1]
    assert flags[0] in last and flags[1] in last


@pytest.mark.slow
def test_it_learns(monkeypatch, capsys):
    """The command as it stands, with quantised weights. Without learning it stays near 0.45."""
    run_page(monkeypatch, "--steps", "20")
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    accuracy = [float(line[line.index("accuracy") + 1]) for line in words]
    assert len(accuracy) == 20 and sum(accuracy[:4]) / 4 < 0.6 < 0.65 < sum(accuracy[12:]) / 8


def test_it_is_one_page_that_needs_no_cache():
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 170 and sum("# " in line for line in lines) >= 0.2 * len(lines)
    imported = set(re.findall(r"^ *(?:from|import) (\S+)", text, re.MULTILINE))
    ours = {"entropy", "advantage", "tools", "engine.judge", "engine.model"}
    assert imported - sys.stdlib_module_names == ours | {"torch", "app.config", "data.formats"}
