"""Long conversations: they end at the limits with a reward, and cost no more than their length."""

import dataclasses
import logging
import time

import pytest
from conftest import roll_out

from advantage import shared_by
from app import cli
from app.config import Config
from arpo_mini import Agent, judge, load_agent, open_writer, rollout, train
from data.files import UserError
from data.formats import Question
from engine.checks import refuse_long
from engine.model import load_policy
from lab.bench.job import Size, counted, force, script_of, search_of
from tools import Tool, ToolResult, result_text

# ---- the limits ---------------------------------------------------------------------------


def test_a_question_that_leaves_no_room_is_named_before_the_work(
    tmp_path, capsys, caplog, policy, config
):
    path, folder = tmp_path / "questions.jsonl", tmp_path / "run"
    path.write_text(
        '{"question": "What is 2 plus 2?", "answer": 4}\n'
        f'{{"question": "{"why? " * 300}", "answer": 5}}\n'
    )
    for flag in ("--dataset_path", "--eval_path"):
        args = ["train", flag, str(path), "--output_dir", str(folder)]
        assert cli.main(args, train, load_agent) == 2
        error = capsys.readouterr().err
        assert f"{path}, question 2" in error and "(512)" in error and error.count("\n") == 1
    assert not folder.exists()
    question = Question("What is 2 plus 2?", ["4"])
    n = len(policy.prompt(question.text))
    refuse_long(policy, [question], "x", dataclasses.replace(config, max_total_tokens=n + 1))
    with pytest.raises(UserError, match=f"x, question 1: a prompt of {n} tokens"):
        refuse_long(policy, [question], "x", dataclasses.replace(config, max_total_tokens=n))
    for most, said in ((1025, 1), (1024, 0)):  # more tokens than the model knows
        caplog.clear()
        with caplog.at_level(logging.WARNING, "arpo_mini"):
            load_policy(dataclasses.replace(config, max_total_tokens=most), {}, trainable=False)
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == said
        assert all("--max_total_tokens 1025" in x and "1024 tokens" in x for x in lines)


# ---- results ------------------------------------------------------------------------------


def test_a_long_result_is_cut_and_the_conversation_goes_on(policy, config, questions):
    text = "Na\u00efve caf\u00e9 \u6771\u4eac \U0001f600 " * 40  # a character may be four tokens
    tools = {name: Tool(name, lambda argument: text, "") for name in ("search", "calculator")}
    config = dataclasses.replace(config, max_result_tokens=33, group_size=2)
    (leaves,) = roll_out(policy, config, tools, questions[2:3])
    assert all(leaf.author == "policy" for leaf in leaves)  # it was answered
    results = [s.token_ids for s in shared_by(leaves) if s.author == "tool"]
    for most, token_ids in (
        (33, results[0]),
        (60, policy.encode_result(ToolResult(text, True), 60)),
    ):
        read = policy.decode(token_ids)
        kept = read.removeprefix("<result>\n").removesuffix(" [cut]\n</result>")
        assert most - 5 < len(token_ids) <= most  # not less than there is room for
        assert kept and len(kept) < len(read) and text.startswith(kept)
    result = ToolResult("Mira Holt is a weaver. " * 8, True)
    n = len(policy.encode(result_text(result)))
    assert policy.decode(policy.encode_result(result, n)) == result_text(result)
    assert "[cut]" in policy.decode(policy.encode_result(result, n - 1))


def test_a_result_of_ten_megabytes_costs_no_more_than_what_is_read_of_it(policy):
    for text in ("x" * 10**7, "a b " * 2_500_000, "\u6771" * 10**7, " " * 10**7, "<a>" * 3_000_000):
        began = time.thread_time()
        assert len(policy.encode_result(ToolResult(text, True), 256)) <= 256
        assert time.thread_time() - began < 0.5


# ---- fifty calls --------------------------------------------------------------------------


@pytest.mark.slow
def test_fifty_tool_calls_stay_linear(policy, config, monkeypatch):
    """Tokens and passes exactly, and every one of the calls is made."""
    question, costs = Question("why?", ["1"]), []
    prompt = len(policy.prompt(question.text))
    for calls in (10, 30, 50):
        size = Size(calls, segment=9, result=8)
        monkeypatch.setattr(policy.lm, "forward", type(policy.lm).forward.__get__(policy.lm))
        force(policy.lm, prompt, script_of(policy, size))
        limits = {"max_tool_calls": calls, "max_segment_tokens": 9, "max_total_tokens": 1000}
        config = dataclasses.replace(config, **limits, group_size=2, initial_rollouts=2)
        agent = Agent(policy, {"search": search_of(policy, size.result)}, config)
        writer = open_writer(policy, config)
        with counted(policy) as seen:
            (leaves,) = rollout(writer, [question], config, agent.tools, seed=0)
        assert [leaf.depth() for leaf in leaves] == [prompt + calls * 17 + 9] * 2
        assert {judge(policy, leaf, question, config).total for leaf in leaves} == {0.0, 1.0}
        costs.append((seen["rollout"], writer.decode_steps, writer.prefill_tokens))
    few, some, many = costs
    assert all(c - b == b - a for a, b, c in zip(few, some, many, strict=True))
    assert Config().max_tool_calls < 50
