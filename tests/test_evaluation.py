"""Figures of steps, of trees and of many answers."""

import dataclasses
import json
from itertools import combinations
from unittest.mock import Mock

import pytest
from common import lines_of, write_questions
from scripted import LETTERS, Agent, main, small_tree

import arpo_mini
from advantage import Reward, Segment
from app.config import Config
from app.evaluation import evaluate, first_per_domain, pass_at_k, summary, wilson
from app.records import questions_of_step, record_trees, short_answers, step_metrics, tree_record
from data.formats import Question

QUESTIONS = [Question(f"{i} + 2?", ["4"], domain) for i, domain in enumerate("aabbbac")]

# ---- many answers -------------------------------------------------------------------------


def record(domain, accuracy, math_equal=None, calls=0):
    fixed = {"entropy_initial": 0.25, "entropy_after_tool": None, "tool_calls": calls}
    fixed |= {"em": [float(a == 1) for a in accuracy], "well_formed": [True] * len(accuracy)}
    equal = math_equal or [0.0] * len(accuracy)
    return fixed | {"domain": domain, "accuracy": accuracy, "f1": accuracy, "math_equal": equal}


def test_summary_counts_by_domain_what_is_right_and_what_it_took():
    records = [record("math", [1.0, 0.0], [1.0, 1.0], calls=4)]  # the second has another spelling
    records += [record("math", [0.0, 0.0], calls=2), record("knowledge", [0.5, 1.0])]
    figures = summary(records, k=2)
    expected = {
        **{"accuracy": 1.5 / 3, "pass@1": 1.5 / 3, "pass@2": 2 / 3, "f1": 1.25 / 3, "em": 1 / 3},
        **{"questions": 3, "math_equal": 1 / 3, "tool_calls": 1, "entropy_initial": 0.25},
        "tool_productivity": 3 / 6,  # three right answers, six calls
        # math_equal in math, F1 elsewhere: (1 + 0 + 0.75) / 3
        "official_productivity": 100 * 1.75 / 3 * 1 / 1.1,
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["entropy_after_tool"] is None
    math, knowledge = figures["domains"]["math"], figures["domains"]["knowledge"]
    assert math["accuracy"] == 0.5 and math["tool_productivity"] == pytest.approx(2 / 6)
    assert knowledge["tool_productivity"] is None and knowledge["official_productivity"] == 0


def test_pass_at_k_and_wilson():
    for n, c, k in ((6, 2, 3), (5, 0, 2), (5, 5, 1), (4, 3, 2)):
        draws = list(combinations(range(n), k))
        expected = sum(any(i < c for i in draw) for draw in draws) / len(draws)
        assert pass_at_k(c, n, k) == pytest.approx(expected)
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)


def test_questions_are_asked_in_parts_and_each_has_its_seed():
    agent, told = Agent(), []
    config = Config(rollout_rows=7, seed=2, branch_rule="paper", temperature=0.5)
    records = evaluate(agent, QUESTIONS, config, samples=3, on_progress=told.append)
    assert told == [2, 2, 2, 1] and [r["question"] for r in records] == [q.text for q in QUESTIONS]
    assert agent.asked == [(n, 3, 0.5, 2_000_006 + 2 * i) for i, n in enumerate(told)]
    assert records == evaluate(Agent(), QUESTIONS, config, samples=3)
    assert len(records[0]["accuracy"]) == len(records[0]["em"]) == 3
    assert {r["domain"] for r in records} == set("abc") and records[0]["tool_calls"] == 1
    assert [q.text[0] for q in first_per_domain(QUESTIONS, 2)] == list("01236")


# Flags -> step: how many questions. All before and after, one a domain between.
ASKED = {"": {0: 6, 2: 3, 4: 6}, "--eval_every 0": {0: 6, 4: 6}}
ASKED |= {"--eval_part 2": {0: 6, 2: 6, 4: 6}, "--eval_part 0": {}}


@pytest.mark.parametrize("flags", ASKED)
def test_what_is_evaluated_while_training(flags, tmp_path, capsys):
    asked = ASKED[flags]
    six = write_questions(tmp_path / "six.jsonl", each=2)
    args = ["train", "--steps", 4, "--eval_every", 2, "--eval_part", 1, "--eval_path", six]
    assert main(*args, *flags.split(), "--output_dir", tmp_path / "run") == 0
    assert ("before (95 %)" in capsys.readouterr().out) == bool(asked)
    rows = lines_of(tmp_path / "run", "evaluations.jsonl") if asked else []
    assert {row["step"]: row["questions"] for row in rows} == asked
    assert len(rows) == len(asked) + 2 * bool(asked)  # greedy at both ends only


@pytest.mark.parametrize("official", [True, False])
def test_an_answer_is_scored_by_every_measure(policy, config, official):
    """Badly formed, it is one to the released evaluation alone."""
    config = dataclasses.replace(config, official_rewards=official)
    agent, question = arpo_mini.Agent(policy, {}, config), Question("2 + 2?", ["4"], "math")

    def examined(text, well_formed):
        leaf = Segment("policy", policy.encode(text), Segment("prompt", policy.prompt("q")))
        return agent.examine(leaf, question, Reward(0, 0, well_formed, 0), config)

    right = examined("<think>a</think><answer>\\boxed{4}</answer>", True)
    assert right["math_equal"] == 1 and (official or right["em"] == right["f1"] == 1)
    odd = examined("<think>Is it \\boxed{5}?", False)
    assert odd["prediction"] == ("5" if official else None)
    assert ("acc" in odd) == official


# ---- steps and trees ----------------------------------------------------------------------


def test_every_question_is_asked_once_before_any_is_asked_again():
    config = Config(questions_per_step=3)
    asked = [q.text for step in range(1, 8) for q in questions_of_step(QUESTIONS, step, config)]
    for epoch in (asked[:7], asked[7:14], asked[14:]):
        assert sorted(epoch) == sorted(q.text for q in QUESTIONS)
    assert asked[:7] != asked[7:14]
    other = questions_of_step(QUESTIONS, 1, dataclasses.replace(config, seed=1))
    assert [q.text for q in other] != asked[:3]


def test_figures_of_a_step():
    """Shared segments count once; a wish to fork counts whether it was granted or not."""
    groups = [small_tree(leaves=2), small_tree(leaves=1, answer="44")]
    rewards = [[Reward(1.1, 1.0, True, 2), Reward(0, 0, True, 1)], [Reward(-1, 0, False, 0)]]
    prompt, call, tool, leaf = (len(s.token_ids) for s in groups[0][0].path())
    expected = {
        **{"reward": 0.1 / 3, "accuracy": 1 / 3, "well_formed": 2 / 3},
        **{"groups": 2, "equal_groups": 1, "rollouts": 3},
        **{"tool_calls": 2, "forks": 1, "wishes": 1.0},  # 4 wanted in each, 1 granted
        "generated_tokens": 2 * call + 3 * leaf + 1,
        "reread_tokens": 2 * prompt + 3 * (prompt + call + tool),
        "train_tokens_unpacked": 3 * (prompt + call + tool + leaf) + 1,
        **{"entropy_initial": 0.1, "entropy_after_tool": 0.2},
    }
    figures = step_metrics(groups, rewards)
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert 0.11 < figures["entropy"] < 0.19
    assert step_metrics([[groups[0][0].path()[1]]], [[rewards[0][1]]])["wishes"] is None
    tool = groups[1][0].parent
    tool.decision = dataclasses.replace(tool.decision, forks=0)
    assert step_metrics(groups, rewards)["wishes"] == 0.5


def test_short_answers_have_no_room_for_their_tags():
    (leaf,) = small_tree(leaves=1)
    assert short_answers(LETTERS, [[leaf]]) == 0
    leaf.token_ids = leaf.token_ids[:39]  # an empty answer in its tags has 40
    assert short_answers(LETTERS, [[leaf], small_tree(leaves=1)]) == 0.5
    leaf.stop = "length"
    assert short_answers(LETTERS, [[leaf]]) == 0


def test_a_tree_as_plain_data():
    rewards = [Reward(1.0, 1.0, True, 1), Reward(0.0, 0.0, True, 1)]
    record = tree_record(LETTERS, QUESTIONS[0], small_tree(), rewards, Config())
    assert json.loads(json.dumps(record)) == record
    assert [node["parent"] for node in record["nodes"]] == [None, 0, 1, 2, 2]
    assert [leaf["node"] for leaf in record["leaves"]] == [3, 4]
    assert "".join(record["nodes"][2]["tokens"]) == "<result>\n4\n</result>"
    assert record["nodes"][2]["decision"]["granted"] == 1
    assert record["nodes"][1]["token_entropy"][0] == pytest.approx(0.1 / 6.9078, abs=1e-4)
    up, down = (leaf["advantage"] for leaf in record["leaves"])
    assert up == -down > 0 and record["nodes"][1]["advantage"] == pytest.approx(0)
    assert record["nodes"][3]["advantage"] == pytest.approx(up)


def test_trees_of_every_tenth_step_are_kept():
    groups, rewards = Agent().roll_out(QUESTIONS, Config(group_size=2), 0)
    run = Mock(config=Config())
    for step in range(1, 13):
        record_trees(run, LETTERS, step, QUESTIONS, groups, rewards)
    calls = [call.args for call in run.append.mock_calls]
    kept = [(name, row["step"], row["question"]) for name, row in calls]
    assert kept == [("rollouts.jsonl", step, q.text) for step in (1, 11) for q in QUESTIONS[:2]]
