"""What several tests need: the tiny Qwen3 in float32 and NF4, the tools, questions."""

import dataclasses
import json
import os
import random
import signal

import pytest
import torch

import arpo_mini
from arpo_mini import Rollout, make_tools
from data.formats import load_questions
from engine.model import load_policy
from app.config import Config

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, whose threads would only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that a test starts

# A shell's & has it ignored, here and in all children: then no test could press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def config():
    """Two paths of eight begun, no quantisation; a whole segment is measured (k = 64).

    Two calls at most: a rollout takes as long as its paths are deep. `groups` has deep ones.
    """
    few = {"initial_rollouts": 2, "max_branches": 1, "max_tool_calls": 2}
    return Config(load_in_4bit=False, entropy_tokens=64, **few)


@pytest.fixture(scope="session")
def tools(config):
    return make_tools(config)


@pytest.fixture(scope="session")
def policy(config, tools):
    torch.manual_seed(0)
    return with_random_adapter(load_policy(config, tools, trainable=True))


@pytest.fixture(scope="session")
def policy_4bit(config, tools):
    torch.manual_seed(0)
    nf4 = dataclasses.replace(config, load_in_4bit=True)
    return with_random_adapter(load_policy(nf4, tools, trainable=True))


def with_random_adapter(policy):
    """A fresh adapter adds nothing (its B is 0); tests want one that does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


@pytest.fixture(scope="session")
def questions():
    """Two of each domain, of different lengths."""
    return arpo_mini.part_of(load_questions(Config().eval_path), per_domain=2)


@pytest.fixture(scope="session")
def groups(policy, config, tools, questions):
    """The leaves of one rollout with forks and several turns."""
    return roll_out(policy, dataclasses.replace(config, max_tool_calls=6), tools, questions)


def roll_out(policy, config, tools, questions, seed=0):
    torch.manual_seed(seed)
    return Rollout(policy, config, tools, random.Random(seed)).run(questions)


def write_questions(path, domains=3):
    """A test question of each of some domains as a file, so that an evaluation takes a moment."""
    some = arpo_mini.part_of(load_questions(Config().eval_path), per_domain=1)[:domains]
    lines = [{"question": q.text, "answer": q.answers, "domain": q.domain} for q in some]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
