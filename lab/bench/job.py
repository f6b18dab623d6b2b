"""What is timed: real forward passes of a real model, on trajectories of a given size.

A forced policy says what a script holds, whatever its weights, so that runs are comparable: every
trajectory has the same turns and tokens. Only the last digit of its answer differs from row to row,
and so do the rewards of a group: else there would be nothing to train.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import bitsandbytes
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

import arpo_mini
from data.formats import Question, load_questions
from engine.model import Policy, load_policy
from app.config import DATA, Config
from app.screen import UserError
from tools import Tool, ToolResult, result_text

CALL = ("<think>", "</think><search>town</search>")  # before and after what is filled in
ANSWER = ("<think>", "</think><answer>\\boxed{1}</answer>")


@dataclass(frozen=True)
class Size:
    """Tokens of every trajectory: prompt, (segment, result) a turn, and a last segment."""

    turns: int
    segment: int
    prompt: int
    result: int

    @property
    def context(self) -> int:
        return self.prompt + self.turns * (self.segment + self.result) + self.segment


def size_of(turns: int, context: int, segment: int) -> Size:
    """`context` tokens in all: what the segments leave goes to the prompt and the results."""
    rest = context - (turns + 1) * segment
    result = rest // (turns + 1)
    if result < 16:
        least = (turns + 1) * (segment + 16)
        raise UserError(f"--context {context}: {turns} turns of {segment} need at least {least}")
    return Size(turns, segment, prompt=rest - turns * result, result=result)


def filler(policy: Policy) -> int:
    """A token of ordinary text that stays one token when it is repeated."""
    return policy.encode(" the the the")[-1]


def filled(policy: Policy, around: tuple[str, str], tokens: int) -> list[int]:
    """A segment of exactly so many tokens."""
    head, tail = (policy.encode(text) for text in around)
    if len(head) + len(tail) > tokens:
        raise UserError(f"--max_segment_tokens {tokens}: at least {len(head) + len(tail)} here")
    return head + [filler(policy)] * (tokens - len(head) - len(tail)) + tail


def search_of(policy: Policy, tokens: int) -> Tool:
    """A search whose result has exactly so many tokens, tags included."""
    word = policy.decode([filler(policy)])
    rest = tokens - len(policy.encode(result_text(ToolResult("", ok=True))))
    text = word * rest
    found = len(policy.encode(result_text(ToolResult(text, ok=True))))
    if found != tokens:
        raise ValueError(f"a result has {found} tokens, {tokens} were asked for")
    return Tool("search", lambda query: text, "words to look for in the documents")


def script_of(policy: Policy, size: Size) -> list[tuple[int, int]]:
    """What follows the prompt, for even rows and for odd ones: they differ in the answer only."""
    call, answer = filled(policy, CALL, size.segment), filled(policy, ANSWER, size.segment)
    tokens = (call + [0] * size.result) * size.turns + answer  # nobody samples a result
    script = [(token, token) for token in tokens]
    digits = [policy.encode(digit)[0] for digit in "12"]
    last = max(i for i, token in enumerate(tokens) if token == digits[0])
    script[last] = tuple(digits)
    return script


def force(lm: PreTrainedModel, prompt: int, script: list[tuple[int, int]]) -> None:
    """From now on `generate` samples the script after the `prompt` tokens of every row."""
    said = torch.tensor(script, device=lm.device)  # (S, 2)
    original = lm.forward

    @functools.wraps(original)
    def forward(*args, position_ids=None, **kwargs):
        out = original(*args, position_ids=position_ids, **kwargs)
        if not torch.is_grad_enabled():
            at = (position_ids[:, -1] + 1 - prompt).clamp(0, len(said) - 1)  # (R)
            odd = torch.arange(len(out.logits), device=at.device) % 2  # (R)
            out.logits[:, -1].scatter_(1, said[at, odd][:, None], 1e4)
        return out

    lm.forward = forward


# ---- random weights of a published shape --------------------------------------------------


def random_model(
    shape: PretrainedConfig, dtype: torch.dtype, device: str, quantization_config=None
) -> PreTrainedModel:
    """The real class with random weights, quantised a layer at a time: never whole in `dtype`."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    for module in list(lm.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and quantization_config is not None:
                setattr(module, name, quantised(child, dtype, device, quantization_config))
    for module in lm.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=dtype, device=device)
                value = value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.02)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    with torch.device(device):
        lm.model.rotary_emb = type(lm.model.rotary_emb)(shape)  # its buffers are computed
    lm.tie_weights()
    lm.is_loaded_in_4bit = quantization_config is not None
    lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)  # the tiny tokenizer's
    return lm.eval()


def quantised(linear: nn.Linear, dtype: torch.dtype, device: str, how) -> nn.Module:
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
    with torch.device("meta"):
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        quant_type=how.bnb_4bit_quant_type,
        compress_statistics=how.bnb_4bit_use_double_quant,
        module=layer,
    ).to(device)  # which quantises it, also where it already is on that device
    return layer


@contextmanager
def random_weights(
    shape: PretrainedConfig, computed_in: torch.dtype | None = None
) -> Iterator[None]:
    """Within it `load_policy` gets a random model of this shape, and keeps its own tokenizer.

    It computes in the dtype of the device (policy.load_model), unless another is asked for.
    """

    def from_pretrained(name, dtype, device_map, quantization_config=None, **kwargs):
        lm = random_model(shape, computed_in or dtype, device_map, quantization_config)
        return lm, {"missing_keys": []}

    with mock.patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained):
        yield


# ---- jobs ---------------------------------------------------------------------------------


@dataclass
class Job:
    """A policy with an optimizer, and what it is asked."""

    config: Config
    policy: Policy
    tools: dict[str, Tool]
    questions: list[Question]
    optimizer: torch.optim.Optimizer

    def asked(self, step: int) -> list[Question]:
        return arpo_mini.questions_of_step(self.questions, step, self.config)


def make_job(config: Config, policy: Policy, tools: dict, questions: list[Question]) -> Job:
    """Its steps cost what they cost, but change nothing: every run meets the same policy."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    return Job(config, policy, tools, questions, optimizer)


def mini_world(config: Config) -> Job:
    """What `train` asks with this configuration."""
    tools = arpo_mini.make_tools(config)
    torch.manual_seed(config.seed)
    policy = load_policy(config, tools, trainable=True)
    return make_job(config, policy, tools, load_questions(config.dataset_path))


def forced(config: Config, size: Size, shape: PretrainedConfig | None = None) -> Job:
    """Trajectories of this size; random weights of a `shape`, else the model of `config`.

    A tree forks at every tool result while slots are left.
    """
    config = dataclasses.replace(
        config,
        model_name=str(DATA / "tiny-qwen3") if shape else config.model_name,  # its tokenizer
        branch_rule="random",
        branch_probability=1.0,
        max_tool_calls=size.turns,
        max_segment_tokens=size.segment,
        max_total_tokens=size.context,
    )
    torch.manual_seed(config.seed)
    with random_weights(shape) if shape else nullcontext():
        policy = load_policy(config, {}, trainable=True)
    prompt = [filler(policy)] * size.prompt
    policy.prompt = lambda question: prompt
    force(policy.lm, size.prompt, script_of(policy, size))
    tools = {"search": search_of(policy, size.result)}
    return make_job(config, policy, tools, [Question("forced", ["1"])] * config.questions_per_step)
