"""What is timed: real training steps; and the instruments that watch them.

A forced policy says what a script holds, whatever its weights, so that runs are comparable: every
trajectory has the same turns and tokens. Only the last digit of its answer differs from one to the
next, and so do the rewards of a group: else there would be nothing to train.
"""

import dataclasses
import platform
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from app.config import DATA, Config
from app.records import questions_of_step
from arpo_mini import Agent, safe_step
from data.formats import Question
from engine.model import Policy, load_policy
from tools import Tool, ToolResult, result_text

from . import plan


@dataclass
class Job:
    """What an agent is asked. It learns at a rate of 0: every step meets the same policy."""

    agent: Agent
    questions: list[Question]

    def __post_init__(self):
        parameters = self.agent.policy.parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)

    def asked(self, step: int) -> list[Question]:
        return questions_of_step(self.questions, step, self.agent.config)

    def step(self, number: int) -> dict:
        """The figures of a training step, "seconds" by `clock` among them."""
        started, config = clock(), self.agent.config
        figures = safe_step(self.agent, self.optimizer, self.asked(number), config, number)[0]
        return figures | {"seconds": clock() - started}


# ---- a forced policy ----------------------------------------------------------------------


class Size(NamedTuple):
    """Tokens of a forced trajectory: (segment, result) a turn, and a last segment."""

    turns: int
    segment: int
    result: int


def forced(config: Config, size: Size, shape: PretrainedConfig) -> Job:
    """Trajectories of `max_total_tokens`, forks wherever there can be one; any model of a shape."""
    rule = {"branch_rule": "random", "branch_probability": 1.0, "max_tool_calls": size.turns}
    model = {"model_name": str(DATA / "tiny-qwen3"), "max_segment_tokens": size.segment}
    config = dataclasses.replace(config, **rule, **model)
    with any_weights(shape):
        policy = load_policy(config, {}, trainable=True)
    rest = config.max_total_tokens - size.segment - size.turns * (size.segment + size.result)
    prompt = [filler(policy)] * rest
    policy.prompt = lambda question: prompt
    force(policy.lm, len(prompt), script_of(policy, size))
    tools = {"search": search_of(policy, size.result)}
    return Job(Agent(policy, tools, config), [Question("forced", ["1"])])


def any_weights(shape: PretrainedConfig) -> AbstractContextManager:
    """Within it `load_policy` loads a model of this shape: weights that are all the same number."""
    empty = plan.empty(shape)
    weights = {k: torch.tensor(0.01).expand(v.shape) for k, v in empty.state_dict().items()}

    def from_pretrained(name, config, trust_remote_code, **kwargs):
        return type(empty).from_pretrained(None, config=shape, state_dict=weights, **kwargs)

    return mock.patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def filler(policy: Policy) -> int:
    """A token of ordinary text that stays one token when it is repeated."""
    return policy.encode(" the the the")[-1]


def search_of(policy: Policy, tokens: int) -> Tool:
    """A search whose result has exactly so many tokens, tags included."""
    tags = policy.encode(result_text(ToolResult("", ok=True)))
    text = policy.decode([filler(policy)]) * (tokens - len(tags))
    return Tool("search", lambda query: text, "words to look for in the documents")


def script_of(policy: Policy, size: Size) -> list[list[int]]:
    """What follows the prompt, for even and odd trajectories: the answer's digit differs."""

    def segment(end: str) -> list[int]:
        head, tail = policy.encode("<think>"), policy.encode(f"</think>{end}")
        return head + [filler(policy)] * (size.segment - len(head) - len(tail)) + tail

    turn = segment("<search>town</search>") + [0] * size.result  # nobody samples a result
    answers = [segment(f"<answer>\\boxed{{{digit}}}</answer>") for digit in "12"]
    return [turn * size.turns + answer for answer in answers]


def force(lm: PreTrainedModel, prompt: int, script: list[list[int]]) -> None:
    """From now on `generate` samples the script after the `prompt` tokens of every row."""
    said = torch.tensor(script, device=lm.device)  # (2, S)
    last, answered = (said[0] != said[1]).nonzero().item(), 0

    def say(module, args, kwargs, out) -> None:
        nonlocal answered
        if torch.is_grad_enabled():  # an update scores what it is given
            return
        at = (kwargs["position_ids"][:, -1] + 1 - prompt).clamp(0, said.shape[1] - 1)  # (R)
        odd = (torch.arange(len(at), device=at.device) + answered) % 2  # (R)
        out.logits[:, -1].scatter_(1, said[odd, at][:, None], 1e4)
        answered += (at == last).sum().item()

    lm.register_forward_hook(say, with_kwargs=True)


# ---- instruments --------------------------------------------------------------------------


def clock() -> float:
    """Seconds: of this process alone on a CPU; on a GPU when it has done what it was told."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def watched(policy: Policy, work: Callable[[], object]) -> dict:
    """Seconds by `clock`, and the tokens that went through the model in rollout and update."""
    seen = {"seconds": 0.0, "tokens, rollout": 0, "tokens, update": 0}

    def count(module, args, kwargs) -> None:
        part = "update" if torch.is_grad_enabled() else "rollout"
        seen[f"tokens, {part}"] += kwargs["input_ids"].numel()

    with policy.lm.get_decoder().register_forward_pre_hook(count, with_kwargs=True):
        started = clock()
        work()
        return seen | {"seconds": clock() - started}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors took at a time while it ran, beyond what was there before.

    On a GPU as its allocator counted it; on a CPU from the allocations the profiler recorded.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def made_on(config: Config, **more) -> dict:
    """What the figures were measured on, and with which settings other than the defaults."""
    info, device = Path("/proc/cpuinfo"), platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    elif info.exists() and (found := re.search("model name.*: (.*)", info.read_text())):
        device = found[1]
    machine = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    changed = {k: v for k, v in vars(config).items() if v != getattr(Config, k)}
    return {"machine": machine, "settings": changed | more}
