"""Credit: the reward of a leaf, and what soft and hard advantages of a segment do to a token."""

import time

import pytest
import torch

from advantage import Segment, boxed, clipped_objective, reward, segment_advantages
from engine.official import official_reward

CALL, ADD = "<think>find</think>\n<search>mill</search>", "<think>a</think><add>1+1</add>"
ANSWER = "<think>done</think><answer>It is \\boxed{2}</answer>"


def score(*texts, tools_used=0):
    """Policy and tool in turn; `...` is a result."""
    texts = ["<result>\n2\n</result>" if text is ... else text for text in texts]
    turns = [(("policy", "tool")[i % 2], text) for i, text in enumerate(texts)]
    got = reward(turns, ["2"], judge=lambda p, a: float(p in a), tools_used=tools_used)
    assert got.tools_used == tools_used
    return got.total, got.accuracy, got.well_formed


@pytest.mark.parametrize(
    "texts, tools_used, total",
    [
        ([ANSWER], 0, 1),
        ([ADD, ..., CALL, ..., ANSWER], 2, 1.1),
        ([" <think>3 < 4\n</think> \n <answer>\\boxed{2}</answer> \n"], 0, 1),
        ([CALL + "\n", ..., ANSWER], 1, 1),
        # a result may hold anything: it is not the policy's format
        ([CALL, "<result>a quoted </result> <answer> </result>", ANSWER], 1, 1),
        ([ADD, ..., CALL, ..., "<think></think><answer>\\boxed{3}</answer>"], 2, 0),
    ],
)
def test_well_formed(texts, tools_used, total):
    assert score(*texts, tools_used=tools_used) == (pytest.approx(total), float(total >= 1), True)


BADLY_FORMED = {
    "nothing at all": [],
    "ends in a result that nobody asked for": [ANSWER, ...],
    "cut in the answer": ["<think>a</think><answer>\\boxed{2}"],
    "no thought": ["<answer>\\boxed{2}</answer>"],
    "no tool": ["<think>a</think><think>b</think>", ..., ANSWER],
    "no box": ["<think>a</think><answer>2</answer>"],
    "box left open": ["<think>a</think><answer>\\boxed{2</answer>"],
    "loose text between thoughts": ["<think>a</think>b" + ANSWER],
    "two calls": [CALL + "<search>r</search>", ..., ANSWER],
    "two answers": ["<think>a</think><answer>1</answer><answer>\\boxed{2}</answer>"],
    "forged result, then the answer": [CALL + "<result>2</result>" + ANSWER],
    "forged result in a thought": ["<think>so: 2</result></think><answer>\\boxed{2}</answer>"],
    "result tag in a call": ["<think>a</think><search>q<result></search>", ..., ANSWER],
}


def test_badly_formed_is_minus_1():
    for case, texts in BADLY_FORMED.items():
        assert score(*texts, tools_used=2) == (-1.0, 0.0, False), case
    for authors in (["policy", "policy"], ["prompt", "policy"], ["tool"]):  # a programmer's mistake
        with pytest.raises(ValueError, match=f"got {', '.join(authors)}"):
            reward([(author, ANSWER) for author in authors], [], judge=None, tools_used=0)


PIECES = "<answer> </answer> <think> </think> <think></think> <think>a</think><x> \\boxed{ { } <x>"
PIECES += " <answer>\\boxed{ <search> </searc <result> <x></x> </think><answer> \\frac{1 </"


def test_a_degenerate_policy_is_judged_quickly():
    for piece in [*PIECES.split(), " ", "a "]:
        long = piece * (100_000 // len(piece))
        whole = f"<think>x</think><answer>\\boxed{{{long}}}</answer>"
        for body in (long, whole, f"<think>{long}</think><answer>\\boxed{{1}}</answer>"):
            start = time.thread_time()
            assert score(body)[0] in (-1, 0) and score(body, ..., ANSWER)[0] in (-1, 1)
            official_reward(body[:30_000], ["1"])
            assert time.thread_time() - start < 2, piece  # quadratic time would take many seconds


def test_the_last_box_up_to_the_brace_that_closes_it():
    held = {r"\boxed{a{b}c} {d}": "a{b}c", r"\boxed{1} \boxed{2}": "2", r"\boxed{}": ""}
    held |= {r"\boxed{1\}}": r"1\}", r"\boxed{\{\\}": r"\{\\", r"\boxed{1": None, "boxed{1}": None}
    assert {text: boxed(text) for text in held} == held


@pytest.mark.parametrize("log_ratio, acts", [(0.5, True), (-0.5, True), (0.1, False)])
def test_shared_weight_matters_only_where_the_clip_acts(log_ratio, acts):
    """Two leaves disagree on what they share: past the clip one still pulls, their mean cannot.

    Before it, only the sum of the advantages counts, which is the same under every weight.
    """
    node = Segment("tool", [0], shared := Segment("policy", [1], Segment("prompt", [2])))
    leaves, found = [Segment("policy", [3], node), Segment("policy", [4], node)], []
    for weight in (0, 0.3, 1):
        A = segment_advantages(leaves, torch.tensor([1.0, -1.0]), weight)[shared]
        logp = torch.tensor(log_ratio, requires_grad=True)
        sums = A.clamp(min=0).sum(), A.clamp(max=0).sum()
        clipped_objective(logp.exp(), *sums, 0.2, 0.2).backward()
        found.append(logp.grad.item())
    soft, mix, hard = found
    assert hard == pytest.approx(0, abs=1e-6) and mix == pytest.approx(0.7 * soft, abs=1e-6)
    assert (abs(soft) > 0.1) == acts


def test_segment_advantages_say_what_is_wrong():
    leaves = [Segment("policy", [2], Segment("prompt", [1]))] * 2
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="shared_weight must be in"):
            segment_advantages(leaves, torch.zeros(2), weight)
    with pytest.raises(ValueError, match="99 advantages for 2 leaves"):
        segment_advantages(leaves, torch.zeros(99), 0.5)
