"""Long conversations: they end at the limits with a reward, and cost no more than their length."""

import dataclasses
import functools
import gc
import json
import time

import pytest
import torch
from conftest import roll_out
from test_any_model import recite, save_model, save_tokenizer

from advantage import shared_by
from app.config import Config
from arpo_mini import UserError, main, score
from data.formats import Question
from engine.model import load_policy, refuse_long
from tools import Tool, ToolResult, result_text

RESULT = "<result>\n4\n</result>"


def replace(config, **changes):
    return dataclasses.replace(config, **changes)


def tokens_of(leaf):
    return sum(len(segment.token_ids) for segment in leaf.path())


# ---- the limits ---------------------------------------------------------------------------


def assert_ends_as_length(policy, config, tools, questions, limit):
    """No path is longer than `limit`; those that reach it say so, and have a reward."""
    groups = roll_out(policy, config, tools, questions)
    ends = {}
    for question, leaves in zip(questions, groups, strict=True):
        assert len(set(leaves)) == config.group_size
        for leaf in leaves:
            assert leaf.author == "policy" and tokens_of(leaf) <= limit
            reward = score(policy, leaf, question, config, tools)
            assert reward.total == -1 if leaf.stop == "length" else -1 <= reward.total <= 1.1
            ends.setdefault(leaf.stop, []).append(tokens_of(leaf))
    return ends


def test_a_path_that_reaches_max_total_tokens_ends_as_length(policy, config, tools, questions):
    longest = max(len(policy.prompt(q.text)) for q in questions)
    ends = assert_ends_as_length(
        policy, replace(config, max_total_tokens=longest + 60), tools, questions, longest + 60
    )
    assert max(ends["length"]) == longest + 60  # in the middle of what it writes
    assert min(ends["length"]) < longest + 60  # or because the next result would not fit
    assert assert_ends_as_length(
        policy, replace(config, max_total_tokens=longest + 1), tools, questions[:1], longest + 1
    )


def test_a_path_that_reaches_the_models_context_ends_as_length(
    policy, config, tools, questions, monkeypatch
):
    longest = max(len(policy.prompt(q.text)) for q in questions)
    monkeypatch.setattr(policy.lm.config, "max_position_embeddings", longest + 60)
    ends = assert_ends_as_length(policy, config, tools, questions[:3], longest + 60)
    assert config.max_total_tokens > longest + 60 and max(ends["length"]) == longest + 60


def test_a_result_that_leaves_no_room_is_not_read(policy, config, questions):
    """Its call is the end of the path: nothing is trained or scored on what nobody could answer."""
    tools = {
        name: Tool(name, lambda argument: "long " * 400, "") for name in ("search", "calculator")
    }
    longest = max(len(policy.prompt(q.text)) for q in questions[:2]) + 100
    config = replace(config, max_total_tokens=longest, max_result_tokens=200)
    leaves = [leaf for group in roll_out(policy, config, tools, questions[:2]) for leaf in group]
    read = [policy.decode(s.token_ids) for s in shared_by(leaves) if s.author == "tool"]
    assert not any("long" in text for text in read)  # an error is short enough
    assert any(leaf.stop == "length" and tokens_of(leaf) < longest for leaf in leaves)


def test_more_tokens_than_the_model_knows_are_said_in_one_line(config, capsys):
    load_policy(replace(config, max_total_tokens=1025), {}, trainable=False)
    said = capsys.readouterr().out
    assert "--max_total_tokens 1025" in said and "1024 tokens" in said
    assert len(said.splitlines()) == 1
    load_policy(replace(config, max_total_tokens=1024), {}, trainable=False)
    assert capsys.readouterr().out == ""


def test_a_question_that_leaves_no_room_is_named_before_the_work(tmp_path, capsys):
    path, folder = tmp_path / "questions.jsonl", tmp_path / "run"
    rows = [
        {"question": "What is 2 plus 2?", "answer": 4},
        {"question": "why? " * 300, "answer": 5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for flag in ("--dataset_path", "--eval_path"):
        assert main(["train", flag, str(path), "--output_dir", str(folder)]) == 2
        error = capsys.readouterr().err
        assert f"{path}, question 2" in error and "(512)" in error and len(error.splitlines()) == 1
    assert not folder.exists()


def test_a_prompt_of_exactly_the_limit_is_too_long(policy, config):
    question = Question("What is 2 plus 2?", ["4"])
    n = len(policy.prompt(question.text))
    refuse_long(policy, [question], "x.jsonl", replace(config, max_total_tokens=n + 1))
    with pytest.raises(UserError, match=rf"x\.jsonl, question 1: a prompt of {n} tokens"):
        refuse_long(policy, [question], "x.jsonl", replace(config, max_total_tokens=n))


# ---- results ------------------------------------------------------------------------------


def test_a_long_result_is_cut_and_the_conversation_goes_on(policy, config, questions):
    text = "Na\u00efve caf\u00e9 \u6771\u4eac \U0001f600 " * 40  # a character may be four tokens
    tools = {name: Tool(name, lambda argument: text, "") for name in ("search", "calculator")}
    for most in (33, 60):
        config = replace(config, max_result_tokens=most, max_tool_calls=2, group_size=2)
        groups = roll_out(policy, config, tools, questions[2:3])
        results = {s for leaves in groups for s in shared_by(leaves) if s.author == "tool"}
        assert results
        for segment in results:
            read = policy.decode(segment.token_ids)
            kept = read.removeprefix("<result>\n").removesuffix(" [cut]\n</result>")
            assert most - 5 < len(segment.token_ids) <= most  # not less than there is room for
            assert kept and len(kept) < len(read) and text.startswith(kept)
        assert all(leaf.author == "policy" for leaf in groups[0])  # it was answered


def test_a_result_that_fits_is_not_cut(policy):
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


def live_bytes():
    """What all tensors hold that exist now and are in use, each storage once."""
    gc.collect()  # what is garbage already is chance: it goes when Python finds the time
    storages = {}
    for x in gc.get_objects():
        if type(x) in (torch.Tensor, torch.nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(folder, "qwen3", len(save_tokenizer(folder, "other")))
    return folder


def converse(folder, calls, rows=4):
    """What `calls` calls in every one of `rows` trajectories cost, and their leaves."""
    cost = {"steps": 0, "columns": 0, "computed": 0, "bytes": 0}

    def ask(argument):  # runs once a level
        cost["bytes"] = max(cost["bytes"], live_bytes())
        return "4"

    tools = {"ask": Tool("ask", ask, "a number")}
    config = Config(
        model_name=str(folder), load_in_4bit=False, max_tool_calls=calls, max_total_tokens=8000,
        group_size=rows, initial_rollouts=2, branch_rule="random", branch_probability=1.0,
    )  # fmt: skip
    policy = load_policy(config, tools, trainable=False)
    question = Question("why?", ["4"])
    turn = [policy.encode(text) for text in ("<think>x</think><ask>4</ask>", RESULT)]
    answer = policy.encode("<think>so</think> <answer>\\boxed{4}</answer>")
    script = [policy.prompt(question.text), *turn * calls, answer]
    recite(policy, [token for part in script for token in part])
    forward = policy.lm.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        cost["steps"] += 1
        cost["computed"] += kwargs["input_ids"].numel()
        out = forward(*args, **kwargs)
        cost["columns"] = max(cost["columns"], out.past_key_values.get_seq_length())
        return out

    policy.lm.forward = counted
    began = time.process_time()
    (leaves,) = roll_out(policy, config, tools, [question])
    cost["seconds"] = time.process_time() - began
    for leaf in leaves:
        assert [s.token_ids for s in leaf.path()[1:]] == script[1:]
        assert score(policy, leaf, question, config, tools).total == 1.0
    cost["tokens"] = tokens_of(leaves[0])
    return cost


@pytest.mark.slow
def test_fifty_tool_calls_stay_linear(model):
    """Steps, cache columns and computed tokens exactly; memory and time with room for the rest."""
    few, some, many = (converse(model, calls) for calls in (10, 30, 50))
    for name in ("tokens", "steps", "columns", "computed"):
        assert many[name] - some[name] == some[name] - few[name], name
    assert many["columns"] <= many["tokens"]  # no column but those of the path itself
    assert many["bytes"] - some["bytes"] < 1.2 * (some["bytes"] - few["bytes"])
    assert many["seconds"] < 10 * few["seconds"]  # five times the calls
