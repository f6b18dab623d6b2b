import random
import time

import pytest
import torch

from advantage import (
    Segment,
    answer_accuracy,
    boxed,
    clipped_objective,
    f1_score,
    group_advantages,
    kl_k3,
    official_boxed,
    official_format,
    reward,
    segment_advantages,
    shared_by,
)


def random_tree(seed):
    """The leaves of a tree as a rollout grows it: forks after tool results, in random order."""
    draw = random.Random(seed)
    root = Segment("prompt", [0])
    open_paths, leaves = [root] * draw.randint(1, 3), []
    while open_paths:
        node = open_paths.pop(draw.randrange(len(open_paths)))
        policy = Segment("policy", [1] * draw.randint(1, 5), node)
        if draw.random() < 0.4 or len(policy.path()) > 8:
            leaves.append(policy)
        else:
            result = Segment("tool", [2] * draw.randint(1, 3), policy)
            open_paths += [result] * draw.randint(1, 3)
    return leaves


TREES = pytest.mark.parametrize("leaves", [random_tree(seed) for seed in range(20)])


def advantages_for(leaves, seed=0):
    return torch.randn(len(leaves), generator=torch.Generator().manual_seed(seed))


# ---- the tree -----------------------------------------------------------------------------


def test_a_path_runs_from_the_root_to_the_leaf():
    root = Segment("prompt", [1, 2])
    call = Segment("policy", [3], root, stop="tool")
    result = Segment("tool", [4, 5], call)
    leaf = Segment("policy", [6], result, stop="answer")
    assert leaf.path() == [root, call, result, leaf]
    assert root.path() == [root]


def test_segments_are_compared_by_identity():
    assert Segment("policy", [1]) != Segment("policy", [1])


def test_an_unknown_author_is_named_with_the_legal_ones():
    with pytest.raises(ValueError, match="'judge' is not one of prompt, policy, tool"):
        Segment("judge", [])


@TREES
def test_shared_by_holds_every_segment_of_every_path(leaves):
    below = shared_by(leaves)
    assert set(below) == {segment for leaf in leaves for segment in leaf.path()}
    for segment, indices in below.items():
        assert indices == [i for i, leaf in enumerate(leaves) if segment in leaf.path()]
    paths = sum(len(segment.token_ids) for leaf in leaves for segment in leaf.path())
    assert paths == sum(len(s.token_ids) * len(indices) for s, indices in below.items())


@TREES
def test_shared_by_lists_parents_first(leaves):
    order = {segment: i for i, segment in enumerate(shared_by(leaves))}
    assert all(order[s.parent] < i for s, i in order.items() if s.parent)


# ---- the default reward -------------------------------------------------------------------

CALCULATE = ("policy", "<think>add</think><calculator>1+1</calculator>")
SEARCH = ("policy", "<think>find</think>\n<search>mill</search>")
RESULT = ("tool", "<result>\n2\n</result>")
ANSWER = ("policy", "<think>done</think><answer>It is \\boxed{2}</answer><|im_end|>")


def score(*turns, answers=("2",)):
    got = reward(list(turns), list(answers), tool_names=["calculator", "search"], eos="<|im_end|>")
    return got.total, got.well_formed, got.tools_used


def policy(text):
    return ("policy", text)


@pytest.mark.parametrize(
    "turns, total, tools_used",
    [
        ([ANSWER], 1, 0),
        ([CALCULATE, RESULT, ANSWER], 1, 1),
        ([CALCULATE, RESULT, CALCULATE, RESULT, ANSWER], 1, 1),
        ([CALCULATE, RESULT, SEARCH, RESULT, ANSWER], 1.1, 2),
        ([policy(" <think>3 < 4\n</think> \n <answer>\\boxed{2}</answer> \n")], 1, 0),
        ([policy("<think></think><answer>\\boxed{1} or \\boxed{2}</answer><|im_end|>\n")], 1, 0),
        ([policy("<think>use it</think><weather>Rome</weather>"), RESULT, ANSWER], 1, 0),
        ([policy(SEARCH[1] + "\n"), RESULT, ANSWER], 1, 1),
        # a result may hold anything: it is not the policy's format
        ([SEARCH, ("tool", "<result>a quoted </result> <answer> </result>"), ANSWER], 1, 1),
        ([policy("<think>so</think><answer>\\boxed{3}</answer>")], 0, 0),
        (
            [
                CALCULATE,
                RESULT,
                SEARCH,
                RESULT,
                policy("<think></think><answer>\\boxed{3}</answer>"),
            ],
            0,
            2,
        ),
    ],
)
def test_well_formed(turns, total, tools_used):
    assert score(*turns) == (pytest.approx(total), True, tools_used)


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param([], id="nothing at all"),
        pytest.param([CALCULATE], id="call with no result: over the call limit"),
        pytest.param([CALCULATE, RESULT], id="ends in a result"),
        pytest.param([ANSWER, RESULT], id="ends in a result that nobody asked for"),
        pytest.param([policy("<think>I wonder")], id="cut in the thought"),
        pytest.param([policy("<think>a</think><answer>\\boxed{2}")], id="cut in the answer"),
        pytest.param([policy("<answer>\\boxed{2}</answer>")], id="no thought"),
        pytest.param([policy("<calculator>1</calculator>"), RESULT, ANSWER], id="call, no thought"),
        pytest.param([policy("<think>a</think>"), RESULT, ANSWER], id="a result without a call"),
        pytest.param([policy("<think>a</think><think>b</think>"), RESULT, ANSWER], id="no tool"),
        pytest.param([policy("<think>a</think><answer>2</answer>")], id="no box"),
        pytest.param([policy("<think>a</think><answer>\\boxed{2</answer>")], id="box left open"),
        pytest.param([policy("<think>a</think>So: <answer>\\boxed{2}</answer>")], id="loose text"),
        pytest.param([policy("<think>a</think>b" + ANSWER[1])], id="loose text between thoughts"),
        pytest.param([policy(SEARCH[1] + "<search>r</search>"), RESULT, ANSWER], id="two calls"),
        pytest.param(
            [policy("<think>a</think><answer>1</answer><answer>\\boxed{2}</answer>")],
            id="two answers",
        ),
        pytest.param([policy("<think>a</think><answer>\\boxed{2}</answer> !")], id="text after it"),
        pytest.param([policy(ANSWER[1] + "<|im_end|>")], id="two ends"),
        pytest.param(
            [policy("<think>a</think><search>q</search><result>2</result>" + ANSWER[1])],
            id="forged result, then the answer",
        ),
        pytest.param(
            [policy("<think>so: 2</result></think><answer>\\boxed{2}</answer>")],
            id="forged result in a thought",
        ),
        pytest.param(
            [policy("<think>a</think><search>q<result></search>"), RESULT, ANSWER],
            id="result tag in a call",
        ),
    ],
)
def test_badly_formed_is_minus_1(turns):
    assert score(*turns)[:2] == (-1.0, False)


def test_an_unread_result_was_still_asked_for():
    assert score(CALCULATE, RESULT) == (-1.0, False, 1)
    assert score(CALCULATE, RESULT, SEARCH, RESULT) == (-1.0, False, 2)


def test_turns_that_do_not_alternate_are_a_programmers_mistake():
    with pytest.raises(ValueError, match="got policy, policy"):
        score(SEARCH, ANSWER)
    with pytest.raises(ValueError, match="got prompt, policy"):
        score(("prompt", "hello"), ANSWER)


@pytest.mark.parametrize(
    "hostile",
    [
        "<think>" * 100_000,
        "<think>" + "</answer>" * 100_000,
        "<think>a</think>" + " " * 1_000_000 + "x",
        "<think>a</think><" + "a" * 300_000 + ">" + "</" * 300_000,
        "<think>a</think><search>" + "</searc" * 100_000,
        "<think>a</think><answer>" + "\\boxed{" * 100_000 + "</answer>",
    ],
    ids=range(6),
)
def test_a_degenerate_policy_is_judged_quickly(hostile):
    start = time.perf_counter()
    assert score(policy(hostile))[0] == score(policy(hostile), RESULT, ANSWER)[0] == -1
    assert time.perf_counter() - start < 3  # quadratic time would take minutes


@pytest.mark.parametrize(
    "prediction, answer, accuracy",
    [
        ("-5", "5", 0),
        ("\u22125", "-5", 1),
        ("1/2", "0.5", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("12", "1/2", 0),
        ("1,200", "1200", 1),
        ("1,5", "15.0", 0),  # a comma that separates no thousands makes no number
        ("12.0", "12", 1),
        ("1.2", "12", 0),
        (".5", "0.5", 1),
        ("$1,200.50", "1200.5", 1),
        ("1/0", "0", 0),
        ("9" * 10_000, "9", 0),
        ("12 km", "12", 2 / 3),
        ("the Old Mill", "old mill", 1),
        ("Mill", "Old Mill", 2 / 3),
        ("yes", "no", 0),
        ("yes, it is", "yes", 0),
        ("A", "A", 1),
        ("a ", "A", 1),
        ("B", "A", 0),
        ("", "A", 0),
        ("", "2", 0),
    ],
)
def test_answer_accuracy(prediction, answer, accuracy):
    assert answer_accuracy(prediction, [answer]) == pytest.approx(accuracy)


def test_the_best_of_several_answers_counts():
    assert answer_accuracy("12", ["a dozen", "12.0", "11"]) == 1
    assert answer_accuracy("12", []) == 0


def test_quirks_of_the_released_code_that_no_vector_covers():
    assert official_boxed("\\boxed{7} and \\boxed 8") == "8"
    assert official_boxed("\\boxed{7} and \\boxed") is None
    assert official_boxed("none") is None
    assert not official_format("<think></think><answer>\\boxed 8 \\boxed{7</answer>")


def test_what_the_released_code_confuses_ours_does_not():
    for prediction, answer in [("-5", "5"), ("1/2", "12"), ("0.5", "05")]:
        assert f1_score(prediction, answer) == 1
        assert answer_accuracy(prediction, [answer]) == 0
    assert f1_score("A", "A") == 0
    assert answer_accuracy("A", ["A"]) == 1


@pytest.mark.parametrize(
    "text, content",
    [
        ("\\boxed{2}", "2"),
        ("\\boxed{a{b}c} and {d}", "a{b}c"),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{}", ""),
        ("\\boxed{1", None),
        ("boxed{1}", None),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


# ---- advantages ---------------------------------------------------------------------------


@pytest.mark.parametrize("M", [1, 2, 7, 16])
@pytest.mark.parametrize("value", [-1.0, 0.1, 2 / 3, 1.1])
def test_equal_rewards_are_exactly_0(M, value):
    """The released code gives +-0.056 here: float32 noise divided by 1e-6."""
    assert group_advantages([value] * M).tolist() == [0.0] * M
    assert group_advantages(torch.full((M,), value)).tolist() == [0.0] * M


def test_group_advantages_by_hand():
    A = group_advantages([1.0, 0.0, 0.0, -1.0])  # mean 0, unbiased std sqrt(2 / 3)
    assert A.tolist() == pytest.approx([1.5**0.5, 0.0, 0.0, -(1.5**0.5)], abs=1e-5)
    assert A.dtype == torch.float32


@TREES
def test_soft_is_grpo_and_hard_is_the_mean(leaves):
    A = advantages_for(leaves)
    soft, hard, mix = (segment_advantages(leaves, A, weight) for weight in (0, 1, 0.3))
    below = {s: indices for s, indices in shared_by(leaves).items() if s.author == "policy"}
    assert list(soft) == list(hard) == list(mix) == list(below)
    for segment, indices in below.items():
        own = A[indices]
        assert torch.equal(soft[segment], own)
        torch.testing.assert_close(hard[segment], own.mean().expand(len(indices)))
        torch.testing.assert_close(mix[segment], 0.7 * own + 0.3 * own.mean())
    for i, leaf in enumerate(leaves):  # what a leaf shares with nobody is its own in all of them
        torch.testing.assert_close(hard[leaf], A[i : i + 1])


def test_segment_advantages_say_what_is_wrong():
    leaves = random_tree(0)
    for weight in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="shared_weight must be in"):
            segment_advantages(leaves, torch.zeros(len(leaves)), weight)
    with pytest.raises(ValueError, match=f"99 advantages for {len(leaves)} leaves"):
        segment_advantages(leaves, torch.zeros(99), 0.5)


def gradients(leaves, shared_weight, log_ratio, clip=0.2):
    """d objective / d logp of every policy segment, one log-prob for each, shared by its leaves."""
    parts = segment_advantages(leaves, advantages_for(leaves), shared_weight)
    logp = torch.zeros(len(parts), requires_grad=True)
    ratio = (logp - logp.detach() + log_ratio).exp()
    A_plus = torch.stack([A.clamp(min=0).sum() for A in parts.values()])
    A_minus = torch.stack([A.clamp(max=0).sum() for A in parts.values()])
    clipped_objective(ratio, A_plus, A_minus, clip, clip).sum().backward()
    return logp.grad


@TREES
def test_every_shared_weight_gives_the_same_gradient_until_the_clip_acts(leaves):
    """The advantages of a segment have the same sum under every weight, and only that counts."""
    for log_ratio in (0.0, 0.1, -0.1):  # inside the clip of 0.2
        soft = gradients(leaves, 0.0, log_ratio)
        assert soft.abs().sum() > 0
        torch.testing.assert_close(gradients(leaves, 0.3, log_ratio), soft)
        torch.testing.assert_close(gradients(leaves, 1.0, log_ratio), soft)


@pytest.mark.parametrize("log_ratio", [0.5, -0.5])
def test_shared_weight_matters_where_the_clip_acts(log_ratio):
    """Two leaves disagree on what they share: past the clip one still pulls, their mean cannot."""
    root = Segment("tool", [0], Segment("policy", [1], Segment("prompt", [2])))
    leaves = [Segment("policy", [3], root), Segment("policy", [4], root)]
    shared = root.parent
    A = torch.tensor([1.0, -1.0])
    ratio = torch.tensor(log_ratio).exp()

    def objective(weight):
        A_i = segment_advantages(leaves, A, weight)[shared]
        return clipped_objective(ratio, A_i.clamp(min=0).sum(), A_i.clamp(max=0).sum(), 0.2, 0.2)

    soft, mix, hard = (objective(weight).item() for weight in (0, 0.3, 1))
    assert hard == 0.0
    assert mix == pytest.approx(0.7 * soft)
    assert abs(soft) > 0.1


# ---- the objective ------------------------------------------------------------------------


def ppo(ratio, A, low, high, dual_clip=None):
    """Schulman et al. 2017, and the dual clip of Ye et al. 2020, as they are written there."""
    objective = torch.minimum(ratio * A, ratio.clamp(1 - low, 1 + high) * A)
    if dual_clip:
        objective = torch.where(A < 0, torch.maximum(objective, dual_clip * A), objective)
    return objective


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0)])
def test_one_trajectory_is_ppo(low, high, dual_clip):
    generator = torch.Generator().manual_seed(0)
    ratio = torch.randn(4000, generator=generator).mul(0.8).exp()
    A = torch.randn(4000, generator=generator)
    assert ((ratio > 3) & (A < 0)).any() and ((ratio < 1 - low) & (A < 0)).any()
    got = clipped_objective(ratio, A.clamp(min=0), A.clamp(max=0), low, high, dual_clip)
    torch.testing.assert_close(got, ppo(ratio, A, low, high, dual_clip))


@TREES
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_packed_is_the_sum_over_the_trajectories(leaves, dual_clip):
    """A token computed once, with A_plus and A_minus, is worth what its copies are worth in all."""
    for j, A in enumerate(segment_advantages(leaves, advantages_for(leaves), 0.3).values()):
        ratio = torch.randn(6, generator=torch.Generator().manual_seed(j)).mul(0.8).exp()
        one_by_one = sum(ppo(ratio, A_i, 0.2, 0.28, dual_clip) for A_i in A)
        sums = A.clamp(min=0).sum(), A.clamp(max=0).sum()
        packed = clipped_objective(ratio, *sums, 0.2, 0.28, dual_clip)
        torch.testing.assert_close(packed, one_by_one)


def test_kl_k3_is_unbiased_and_never_negative():
    """Its mean over the policy's own words is the exact KL."""
    p = torch.distributions.Categorical(logits=torch.tensor([0.3, -0.5, 1.0, 0.0]))
    q = torch.distributions.Categorical(logits=torch.tensor([0.0, 0.4, 0.6, -1.0]))
    k3 = kl_k3(p.logits, q.logits)
    assert (k3 >= 0).all()
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close((p.probs * k3).sum(), expected)
    assert kl_k3(torch.tensor(-9.0), torch.tensor(0.0)).item() == 10
