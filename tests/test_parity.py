"""Our functions against numeric outputs of the official code; parity/README.md says which."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from advantage import clipped_objective, group_advantages, kl_k3
from engine import official
from entropy import RULES, official_entropy, token_entropy


def load(name):
    return json.loads((Path(__file__).parent / "parity" / f"{name}.json").read_text())


def cases(name):
    """One test per case, named after what the case is about."""
    some = [pytest.param(case, id="-".join(case["tags"])) for case in load(name)]
    return pytest.mark.parametrize("case", some)


def assert_close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@cases("entropy_branch")
def test_branch_decision(case):
    now = official_entropy(case["topk_logprobs"], case["vocab_size"])
    initial = now if case["H_initial"] is None else case["H_initial"]
    settings = {key: case[key] for key in ("u", "branch_probability", "entropy_weight")}
    decision = RULES["official"](now, initial, **settings)
    rate = decision.probability if case["branch_rate"] is None else case["branch_rate"]
    expected = case["H_now"], case["delta"], int(case["branch"]), rate
    found = now, decision.gain, decision.forks, decision.probability
    assert found == pytest.approx(expected, abs=1e-9)


def test_token_entropy():
    for case in load("entropy_from_logits"):
        assert_close(token_entropy(torch.tensor(case["logits"])), case["expected"])


@cases("reward_transcripts")
def test_reward(case):
    assert (official.official_answer(case["solution"]) is not None) == case["format_ok"]
    text = case["solution"].removesuffix(case["eos_token"] or "")  # as in `Policy.turns`
    got = official.official_reward(text, case["ground_truth"])
    assert got.total == pytest.approx(case["score"], abs=1e-12)
    assert got.accuracy == pytest.approx(case["f1_score"], abs=1e-12)
    assert got.well_formed == (case["category"] not in ("bad_format", "no_answer", "box_error"))


def test_reward_units():
    units = load("reward_units")
    for case in units["normalize_answer"]:
        assert official.normalize_answer(case["text"]) == case["expected"]
    for case in units["boxed"]:
        assert official.official_boxed(case["text"]) == case["expected"]
    for case in units["get_f1_score"]:
        got = official.f1_score(case["prediction"], case["ground_truths"])
        assert got == pytest.approx(case["expected"], abs=1e-12)
    # Quirks that no vector covers.
    assert official.official_boxed("\\boxed{7} and \\boxed 8") == "8"
    assert official.official_boxed("\\boxed{7} and \\boxed") is None
    assert official.official_boxed("\\boxed{[0,1\\}}") == "[0,1\\"
    assert not official.official_answer("<think></think><answer>\\boxed 8 \\boxed{7</answer>")


@cases("grpo_advantages")
def test_group_advantages(case):
    """Equal rewards: there the official numbers are float32 noise over 1e-6, and ours exactly 0."""
    groups = defaultdict(list)
    for name, *pair in zip(case["index"], case["scores"], case["expected"], strict=True):
        groups[name].append(pair)
    close = 0.2 if "pair_close" in case["tags"] else 1e-4
    for scores, expected in (zip(*members, strict=True) for members in groups.values()):
        equal = len(set(scores)) == 1
        for found, value in zip(group_advantages(scores).tolist(), expected, strict=True):
            value = 0.0 if equal else value  # None: empty mask
            assert value is None or found == pytest.approx(value, abs=0 if equal else close)


@cases("policy_loss")
def test_policy_loss(case):
    logp = torch.tensor(case["log_prob"], requires_grad=True)  # (B, T)
    ratio = (logp - torch.tensor(case["old_log_prob"])).exp()
    A = torch.tensor(case["advantages"])
    mask = torch.tensor(case["response_mask"], dtype=torch.float32)
    limits = (case["clip_low"], case["clip_high"], case["dual_clip"])
    objective = clipped_objective(ratio, A.clamp(min=0), A.clamp(max=0), *limits)
    # We average over tokens. The official cases that clip average per sequence first: the same
    # objective under other weights.
    weight = mask / mask.sum()
    if case["loss_agg_mode"] != "token-mean":
        weight = mask / mask.sum(dim=1, keepdim=True) / len(mask)
    loss = -(objective * weight).sum()
    loss.backward()
    assert_close(loss.detach(), case["pg_loss"])
    if not any("exact_clip_edges" in tag for tag in case["tags"]):  # a tie there: no derivative
        assert_close(logp.grad, case["grad_log_prob"])


def test_kl_k3():
    for case in load("kl_penalty"):
        logp = torch.tensor(case["logprob"], requires_grad=True)
        kl = kl_k3(logp, torch.tensor(case["ref_logprob"]))
        kl.sum().backward()
        assert_close(kl.detach(), case["expected"])
        assert_close(logp.grad, case["grad_logprob"])
    far = torch.tensor([-100.0, -1.0], requires_grad=True)
    kl_k3(far, torch.tensor([-1.0, -100.0])).sum().backward()
    assert far.grad.tolist() == [0, 0]  # and not nan


# ---- the released evaluation --------------------------------------------------------------

SCORES = ("em", "acc", "f1", "math_equal")
EVALUATION, EQUIVALENCE = load("evaluation"), load("math_equivalence")
TEXTS = [(official.official_prediction, EVALUATION["extract_answer"])]
TEXTS += [(official.last_boxed, EVALUATION["last_boxed_only_string"])]
TEXTS += [(official.simplify_math, EQUIVALENCE["strip_string"])]


@pytest.mark.parametrize(("function", "pairs"), TEXTS)
def test_texts_of_the_evaluation(function, pairs):
    for text, expected in pairs:
        if expected is None:
            with pytest.raises(ValueError):
                function(text)
        else:
            assert function(text) == expected


def test_mathematical_equality_of_the_evaluation():
    for a, b, expected in EQUIVALENCE["is_equiv"]:
        assert official.official_math_equal(a, b) is expected, (a, b)


@pytest.mark.parametrize("scored", ["qa_metrics", "math_metrics"])
def test_scores_of_an_answer(scored):
    assert len(EVALUATION[scored]) > 250
    for prediction, answers, *expected in EVALUATION[scored]:
        answers = [answers] if isinstance(answers, str) else answers
        got = official.compare(prediction, answers, scored == "math_metrics")
        assert [got[key] for key in SCORES] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", EVALUATION["end_to_end"], ids=lambda case: case["task"])
def test_the_evaluation_end_to_end(case):
    for (text, said, answer), expected in zip(case["items"], case["per_item"], strict=True):
        got = official.compare(said or official.last_lines(text), [answer], case["task"] == "math")
        assert [got[key] for key in SCORES] == pytest.approx(expected[:4], abs=1e-12)
