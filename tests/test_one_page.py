"""The one page against arpo_mini: the same trees, gradient and step; and it learns."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import ECHO, TINY, TINY_QUESTIONS, roll_out
from tokenizers import Tokenizer, models
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedTokenizerFast

import arpo_mini
from advantage import shared_by
from course import one_page
from data.formats import Question
from entropy import RULES, Decision

PAGE = Path(one_page.__file__)


@pytest.fixture
def padded(restored):
    """The tiny model, with a tokenizer that pads on the left."""
    words = Tokenizer(models.WordLevel({"0": 0}, "0"))
    left = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", padding_side="left")
    return replace(restored, tokenizer=left)


def segments_of(groups):
    return list(shared_by([leaf for leaves in groups for leaf in leaves]))


@pytest.mark.parametrize("shared_weight", [0.0, 0.3, 1.0])
def test_a_whole_step_on_the_same_trees(padded, shared_weight, monkeypatch):
    """Reward, credit, two updates (the second is off-policy and clipped), and the figures."""
    changes = {"updates_per_rollout": 2, "clip_low": 0.01, "clip_high": 0.01, "temperature": 0.8}
    config = replace(TINY, shared_weight=shared_weight, **changes)
    start = parameters_to_vector(padded.parameters).detach().clone()
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(0.0))

    def step(train_step):
        optimizer = torch.optim.SGD(padded.parameters, lr=0.01)
        out = train_step(padded, optimizer, TINY_QUESTIONS, config, ECHO, 4)
        moved = parameters_to_vector(padded.parameters).detach() - start
        vector_to_parameters(start.clone(), padded.parameters)
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
    assert ours["forks"] == sum(s.decision.granted for s in calls) > 0
    assert ours["tokens"] == 3 * sum(s.depth() for s in segments_of(groups) if s.logp)
    assert ours["reward"] == pytest.approx(sum(r.total for r in rewards) / len(rewards))
    assert ours["accuracy"] == pytest.approx(sum(r.accuracy for r in rewards) / len(rewards))


# ---- the rollout --------------------------------------------------------------------------


def plain(segment, segments):
    """A tree as plain data, whatever the order of equal forks."""
    forks = segment.decision.forks if segment.decision else 0
    below = sorted(plain(child, segments) for child in segments if child.parent is segment)
    return segment.author, segment.token_ids, segment.tool or "", forks, below


def by_luck(H, H_initial, *, u, history, **_):
    """In the place of `adaptive`: it forks as it never would by itself."""
    return Decision(H, H_initial, gain=u, probability=u, forks=(int(4 * u) + len(history)) % 4)


@pytest.mark.parametrize(
    "rule, N, most", [("paper", 3, 99), ("random", 2, 17), ("none", 1, 99), ("adaptive", 3, 99)]
)
def test_the_same_draws_grow_the_same_trees(padded, monkeypatch, rule, N, most):
    """With the same log-probs and entropies, which test_rollout.py compares with the model's."""

    def draw(p, num_samples):
        """Depends on the distribution alone, not on the order in which rows are drawn."""
        u = (71 * p.argmax(dim=-1, keepdim=True) + 43) % 100 / 100  # (R, 1)
        return (p.cumsum(dim=-1) < u).sum(dim=-1, keepdim=True).clamp(max=p.shape[-1] - 1)

    monkeypatch.setattr(torch, "multinomial", draw)
    monkeypatch.setitem(RULES, "adaptive", by_luck)
    config = replace(TINY, branch_rule=rule, initial_rollouts=N, temperature=1.5)
    config = replace(config, max_total_tokens=most)
    asked = [Question(text, ["7"]) for text in ("abc", "how many?", "who")]
    groups = one_page.rollout(padded, asked, config, ECHO, seed=3)
    assert [len(set(leaves)) for leaves in groups] == [config.group_size] * 3
    right = segments_of(roll_out(padded, config, ECHO, asked, seed=3))
    assert any(s.decision and s.decision.granted for s in right) == (rule != "none")
    assert max(s.depth() for s in right) == most or most == 99
    some = segments_of(groups), right
    mine, theirs = ([plain(s, g) for s in g if s.author == "prompt"] for g in some)
    assert mine == theirs
    decided = [sorted((s.decision.H, s.decision.H_initial) for s in g if s.decision) for g in some]
    assert torch.allclose(*map(torch.tensor, decided), atol=1e-5)
    mine, theirs = (sorted((s.path_tokens(), s.entropy, s.logp) for s in g if s.logp) for g in some)
    for (_, H, logp), (_, H_there, logp_there) in zip(mine, theirs, strict=True):
        assert [H, *logp] == pytest.approx([H_there, *logp_there], abs=1e-4)


# ---- the command, and the file ------------------------------------------------------------


def run_page(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["one_page", *flags])
    runpy.run_path(str(PAGE), run_name="__main__")


def test_a_bad_flag_is_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_page(monkeypatch, "--steps", "0")
    assert "--steps 0: it must be" in capsys.readouterr().err.splitlines()[-1]


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
