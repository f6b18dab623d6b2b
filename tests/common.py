"""What several tests need: the embedded Qwen3, a tiny random one, their tools and questions."""

import engine  # noqa: F401, I001  first: it silences what bitsandbytes says at its import

import contextlib
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

import app.cli
import app.records
import arpo_mini
from advantage import Segment
from app.config import Config
from app.evaluation import first_per_domain
from arpo_mini import make_tools, rollout
from data.formats import Question, load_questions
from engine.model import Policy, load_policy
from engine.writer import Writer
from tools import Tool, ToolResult

ROOT = Path(__file__).resolve().parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, whose threads would only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that a test starts

# A shell's & has it ignored, here and in all children: then no test could press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # not in the repository
quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("the same cases every time", derandomize=True, **quiet)
settings.load_profile("the same cases every time")


def roll_out(policy, config, tools, questions, seed=0):
    return rollout(Writer(policy, config), questions, config, tools, seed)


def with_random_adapter(policy):
    """A fresh adapter adds nothing (its B is 0); tests want one that does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


# ---- the embedded model -------------------------------------------------------------------


@pytest.fixture(scope="session")
def config():
    few = {"initial_rollouts": 2, "max_branches": 1, "max_tool_calls": 2}  # soon over
    return Config(load_in_4bit=False, dtype="float32", entropy_tokens=64, **few)  # on a GPU, too


@pytest.fixture(scope="session")
def tools(config):
    return make_tools(config)


def load(config, tools):
    torch.manual_seed(0)
    return with_random_adapter(load_policy(config, tools, trainable=True))


@pytest.fixture(scope="session")
def policy(config, tools):
    return load(config, tools)


@pytest.fixture(scope="session")
def policy_4bit(config, tools):
    return load(dataclasses.replace(config, load_in_4bit=True), tools)


@pytest.fixture(scope="session")
def questions():
    """Two of each domain, of different lengths."""
    return first_per_domain(load_questions(Config().eval_path), 2)


@pytest.fixture(scope="session")
def groups_4bit(policy_4bit, config, tools, questions):
    """The leaves of two questions, with forks, written by the embedded model as it is shipped."""
    return roll_out(policy_4bit, dataclasses.replace(config, group_size=4), tools, questions[2:4])


def write_questions(path, domains=3, each=1):
    """Test questions of some domains as a file, so that an evaluation takes a moment."""
    some = first_per_domain(load_questions(Config().eval_path), each)[: domains * each]
    lines = [{"question": q.text, "answer": q.answers, "domain": q.domain} for q in some]
    write_lines(path, lines)
    return str(path)


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("data") / "few.jsonl")


@pytest.fixture(scope="module")
def every_tree():
    """Of every step the trees are recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.records, "RECORD_EVERY", 1)
        yield


@pytest.fixture
def refused(capsys):
    def check(code, *words):  # 2, and one line of error with these words; returns the output
        out, error = capsys.readouterr()
        assert code == 2 and error.count("\n") == 1 and "Traceback" not in error
        assert all(word in error for word in words)
        return out

    return check


def arpo(*args):
    """The command line of arpo_mini.py, with the real policy: its exit code."""
    return app.cli.main([str(arg) for arg in args], arpo_mini.train, arpo_mini.load_agent)


def python(*args, timeout=1800):
    """How a process ended that was started at the root of the project."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- a tiny model without text ------------------------------------------------------------
# Its tokens are the grammar: 0 is eos, some complete a call and some an answer. So a random model
# calls, answers and stops, and a rollout takes a tenth of a second.

ENDS = {0: "eos", **dict.fromkeys(range(1, 9), "tool"), **dict.fromkeys(range(9, 12), "answer")}
ECHO = {"echo": Tool("echo", lambda text: {0: text}[int(text) % 2], "an even number")}


class TinyPolicy(Policy):
    def prompt(self, question: str) -> list[int]:
        return [30 + ord(character) % 20 for character in question]

    def encode_result(self, result: ToolResult, most: int) -> list[int]:
        n = sum(map(ord, result.text))
        return [50 + (n + i) % 10 for i in range(1 + n % 4)]

    def why_ended(self, token_ids: list[int]) -> str | None:
        return ENDS.get(token_ids[-1])

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)

    def decode(self, token_ids: list[int]) -> str:
        answers = ENDS.get((token_ids or [0])[-1]) == "answer"
        text = "<answer>\\boxed{%d}</answer>" if answers else "<echo>%d</echo>"
        return "<think>a</think>" + text % sum(token_ids)


def small_policy(kind=Policy, vocab_size=60, layers=2, **changes):
    """A random Qwen3 with a random adapter; large weights, so that what it reads matters."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
    shape |= {"num_key_value_heads": 1, "num_hidden_layers": layers, "vocab_size": vocab_size}
    lm = Qwen3ForCausalLM(Qwen3Config(initializer_range=0.3, **{**shape, **changes}))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(lm, lora).eval()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    return with_random_adapter(kind(model, None, "", eos_ids=[0], closers=set()))


@pytest.fixture(scope="session")
def tiny():
    return small_policy(TinyPolicy)


TINY = Config(entropy_tokens=3, max_segment_tokens=12, max_tool_calls=3, max_branches=2)
TINY_QUESTIONS = [Question("abc", ["141"]), Question("a longer one", ["7"])]  # left padding


@pytest.fixture(scope="session")
def tiny_groups(tiny):
    """The leaves of one rollout of the tiny model, with forks wherever one is possible."""
    eager = dataclasses.replace(TINY, branch_probability=0.9, initial_rollouts=3)
    return roll_out(tiny, eager, ECHO, TINY_QUESTIONS)


@pytest.fixture
def writing(monkeypatch):
    """The drafts of the call of `generate` that is under way, in the order of its rows."""
    now, batch = [], Writer.batch

    def watched(self, drafts, steps):
        now[:] = drafts
        return batch(self, drafts, steps)

    monkeypatch.setattr(Writer, "batch", watched)
    return now


@contextlib.contextmanager
def kept(parameters):
    """Their values are afterwards what they were before."""
    values = [p.detach().clone() for p in parameters]
    yield
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data, parameter.grad = value, None


@pytest.fixture
def restored(tiny):
    """A copy of the tiny model, which a test may train."""
    return copy.deepcopy(tiny)


@st.composite
def random_trees(draw):
    """The leaves of a tree: forks at the question and after results, segments of any length."""
    token = st.integers(1, 59)
    root = Segment("prompt", draw(st.lists(token, min_size=1, max_size=4)))
    nodes, leaves = [root], []
    for _ in range(draw(st.integers(2, 7))):
        node = nodes[draw(st.integers(0, len(nodes) - 1))]
        policy = Segment("policy", draw(st.lists(token, min_size=1, max_size=5)), node)
        if draw(st.booleans()):
            nodes.append(Segment("tool", draw(st.lists(token, min_size=1, max_size=3)), policy))
        else:
            leaves.append(policy)
    read = {segment for leaf in leaves for segment in leaf.path()}
    return leaves + [Segment("policy", [7, 0], n) for n in nodes if n not in read or n is root]
