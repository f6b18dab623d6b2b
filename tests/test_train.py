"""A training with the real policy: what it leaves, and that a stopped one ends like a whole one."""

import json
import re

import pytest
import torch
from common import ROOT, arpo, lines_of
from test_run_folder import ADAPTER, ctrl_c, spoil, state_of

import tools

# Steps of a fraction of a second, with everything a step can have: forks, evaluations, trees.
TINY = (
    "--steps 4 --questions_per_step 1 --group_size 3 --initial_rollouts 2 --save_every 2"
    " --eval_every 3 --eval_part 1 --max_segment_tokens 40"
).split()
WAYS = {  # and after how many uses of which function step 3 is interrupted
    "in an optimizer step": ([], (torch.optim.AdamW, "step", 1)),
    "between two updates": (["--updates_per_rollout", "3"], (torch.optim.AdamW, "step", 2)),
    "in a rollout": (["--branch_rule", "step"], (tools, "run_calls", 2)),
    "in float16": (["--dtype", "float16"], (torch.optim.AdamW, "step", 1)),
}


@pytest.fixture(scope="module", params=WAYS)
def whole(request, few, tmp_path_factory, every_tree):
    """An uninterrupted run, its flags, and where to interrupt one like it."""
    more, place = WAYS[request.param]
    flags = [*TINY, "--eval_path", few, *more]
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert arpo("train", "--output_dir", folder, *flags) == 0
    return folder, flags, place


@pytest.mark.slow
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(whole, tmp_path, monkeypatch, capsys):
    """Bit for bit, but for the seconds."""
    folder, flags, (owner, name, call) = whole
    with monkeypatch.context() as patch:
        spoil(patch, owner, name, ctrl_c, done=2, call=call, after=True)
        assert arpo("train", "--output_dir", tmp_path / "run", *flags) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert arpo("train", "--resume", tmp_path / "run") == 0
    assert "going on after step 2 " in capsys.readouterr().out
    assert state_of(tmp_path / "run") == state_of(folder)


def documented_keys():
    """The keys of metrics.jsonl that the documentation explains."""
    page = (ROOT / "docs/using.md").read_text(encoding="utf-8")
    rows = page.split("Keys of `metrics.jsonl`")[1].split("\n\n")[1].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.slow
def test_a_run_leaves_what_the_documentation_says_and_evaluating_changes_none(whole, tmp_path):
    folder, flags, _ = whole
    assert json.loads((folder / "config.json").read_text())["steps"] == 4
    metrics = lines_of(folder, "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and set(metrics[0]) == documented_keys()
    evaluations = lines_of(folder, "evaluations.jsonl")
    expected = {(step, how) for step in (0, 4) for how in ("sampled", "greedy")}
    assert {(e["step"], e["decoding"]) for e in evaluations} == expected | {(3, "sampled")}
    tree = lines_of(folder, "rollouts.jsonl")[0]
    assert len(tree["leaves"]) == 3 and tree["nodes"][0]["author"] == "prompt"
    assert arpo("train", *flags, "--output_dir", tmp_path / "unseen", "--eval_part", "0") == 0
    assert not (tmp_path / "unseen/evaluations.jsonl").exists()
    assert (tmp_path / "unseen" / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
