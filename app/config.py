"""Every setting of a run, its default and what is legal; and the presets."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import UserError
from entropy import RULES

DATA = Path(__file__).resolve().parent.parent / "data"
STEPS = 999_999  # the most: the folders of checkpoints have six digits
TOKENS = 10_000_000  # more than any model can read
DTYPES = ("auto", "bfloat16", "float16", "float32")


def option(default: Any, help: str, low=None, high=None, **legal) -> Any:
    """A field: its help text, and what is legal (bounds; `also`: a value outside them; choices)."""
    legal |= {name: bound for name, bound in (("low", low), ("high", high)) if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, **legal})


@dataclass(frozen=True)
class Config:
    # the policy
    model_name: str = option(str(DATA / "tiny-qwen3"), "folder or hub id of a causal LM")
    adapter: str | None = option(None, "folder of a LoRA adapter to start from")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    load_in_4bit: bool = option(True, "quantise the frozen weights to NF4 (bitsandbytes)")
    dtype: str = option("auto", "of activations: auto, bfloat16, float16, float32", choices=DTYPES)
    lora_rank: int = option(16, "rank of the LoRA adapter, on all linear layers", 1, 1024)
    system_prompt: str | None = option(None, "file instead of data/system_prompt.txt, with {tools}")
    thinking: bool = option(True, "false: ask the chat template for an empty think block (Qwen3)")
    # the task; the forms of its files: data/formats.py
    dataset_path: str = option(str(DATA / "train.jsonl"), "questions to train on")
    eval_path: str = option(str(DATA / "test.jsonl"), "questions to evaluate on")
    documents_path: str = option(str(DATA / "documents.jsonl"), "documents to search (JSONL)")
    search_results: int = option(1, "documents a search returns (3 is usual elsewhere)", 1, 1000)
    tool_time_limit: float = option(5.0, "seconds a tool may take", 0.01, 86_400)
    max_result_tokens: int = option(256, "tokens of a tool result; the rest is cut", 32, TOKENS)
    max_tool_calls: int = option(6, "calls a trajectory may make", 0, 300)
    max_segment_tokens: int = option(64, "tokens of a policy segment (one turn)", 1, TOKENS)
    max_total_tokens: int = option(512, "tokens of a trajectory, prompt included", 1, TOKENS)
    # the rollout; N = 1: 8 seeds; other comparisons in these comments: 3 seeds (docs/results.md)
    group_size: int = option(8, "M: trajectories returned for each question", 1, 10_000)
    # N = 1, Z = 4: 52 % of GRPO's tool calls, accuracy +0.1 points [-1.4, +1.7] from GRPO's.
    # N = 2, Z = 1: 60 % of them, and -0.5 [-2.4, +1.4] from N = 1's.
    initial_rollouts: int = option(1, "N: of M, begun at the question; the others fork", 1, 10_000)
    # none is measurably more accurate; official: 81 % of GRPO's calls, adaptive 99 %, paper 52 %
    branch_rule: str = option(
        "paper", "paper, official, adaptive, threshold, step, random or none", choices=RULES
    )
    branch_score: str = option(
        "entropy", "rule step: entropy, gain, random", choices=("entropy", "gain", "random")
    )
    max_leaves: int | None = option(None, "rule step: most leaves a question; none: 2 M", 1, 10_000)
    branch_probability: float = option(0.5, "alpha of paper, tau of official, P of random", 0, 1)
    entropy_weight: float = option(0.2, "beta of rule paper, w of official", -1000, 1000)
    entropy_threshold: float = option(0.5, "tau of rule paper; H of rule threshold", -1000, 1000)
    entropy_sigma: float = option(1.5, "k_sigma of rule adaptive", -1000, 1000)
    # 5, 10 and 20 end within a point of each other
    entropy_tokens: int = option(10, "k: tokens measured after a tool result", 1, TOKENS)
    max_branches: int = option(4, "Z: most forks at one tool result", 0, 10_000)
    temperature: float = option(1.0, "of sampling and training; 0: greedy", 0.001, 1000, also=0)
    rollout_rows: int = option(128, "most paths decoded at the same time", 1, 1_000_000)
    top_p: float = option(1.0, "sample from the likeliest tokens; train: only 1", above=0, high=1)
    # the update
    steps: int = option(100, "training steps: a rollout and its update each", 1, STEPS)
    questions_per_step: int = option(8, "questions of a training step", 1, 100_000)
    updates_per_rollout: int = option(1, "optimizer steps on a rollout; >1: off-policy", 1, 1000)
    # 5e-4 and 2e-3 ended lower in each of three seeds, by 1.5 points in the mean
    learning_rate: float = option(1e-3, "of AdamW; in train constant", above=0, high=1)
    # with one update a rollout it changes nothing; with four, 0 and 1 ended lower in each seed
    shared_weight: float = option(0.0, "credit of shared tokens: 0 soft, 1 hard", 0, 1)
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low", 0, 1)
    clip_high: float = option(0.2, "and above 1 + clip_high (larger: clip-higher)", 0, 10**6)
    dual_clip: float | None = option(None, "cap on the ratio where A < 0", above=1, high=10**6)
    kl_coefficient: float = option(0.0, "weight of KL(policy, adapter switched off)", 0, 1000)
    official_rewards: bool = option(False, "score as the released code does, errors included")
    micro_batch_tokens: int = option(8192, "tokens of one forward and backward pass", 1, 10**9)
    # the run
    memory_gb: float | None = option(None, "GiB to use; none: all there is", 0.01, 10**6)
    seed: int = option(0, "of all random numbers", 0, 2**32 - 1)
    output_dir: str = option("runs/arpo", "folder of the run; an existing one is not touched")
    save_every: int = option(10, "steps between checkpoints; --resume needs one", 1, STEPS)
    eval_every: int = option(50, "steps between evaluations while training; 0: none", 0, STEPS)
    # before and after training: all questions, sampled and greedy; on the way: sampled only
    eval_part: int = option(20, "--eval_every: questions a domain; 0: never evaluate", 0, 10**9)

    def __post_init__(self):
        check(self)
        if self.initial_rollouts > self.group_size:
            limit = f"at most group_size ({self.group_size})"
            raise UserError(f"--initial_rollouts {self.initial_rollouts}: it must be {limit}")
        if self.branch_rule == "step" and (self.max_leaves or self.group_size) < self.group_size:
            limit = f"at least group_size ({self.group_size})"
            raise UserError(f"--max_leaves {self.max_leaves}: it must be {limit}")


TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}
BOUNDS = {
    "low": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "high": ("at most", lambda value, bound: value <= bound),
}


def check(config) -> None:
    """Raises UserError, naming the value and the legal ones, for a field out of its range."""
    for item in dataclasses.fields(config):
        value, legal = getattr(config, item.name), item.metadata
        name, _, none = item.type.partition(" | ")
        given = f"--{item.name} {value if isinstance(value, str) else reprlib.repr(value)}"
        if none and value is None:
            continue
        if not isinstance(value, TYPES[name]):
            raise UserError(f"--{item.name} {value!r}: it must be of type {item.type}")
        if "choices" in legal and value not in legal["choices"]:
            raise UserError(f"{given}: choose one of {', '.join(legal['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{given}: it must be a finite number")
        if none and value == "":
            raise UserError(f"{given}: leave it out, or say none")
        if isinstance(value, str) and not can_be_a_path(value):
            raise UserError(f"{given}: no path can hold such a character")
        for bound, (words, holds) in BOUNDS.items():
            also = legal.get("also")
            if bound in legal and value != also and not holds(value, legal[bound]):
                words = words if also is None else f"{also} or {words}"
                raise UserError(f"{given}: it must be {words} {legal[bound]}")


def can_be_a_path(text: str) -> bool:
    """Whether the system could be asked for it: no NUL, no half of a character."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def check_training(config: Config) -> None:
    """UserError for what is legal to evaluate with and not to train with."""
    if config.temperature == 0:
        raise UserError("--temperature 0: training needs samples that differ; it must be above 0")
    if config.top_p != 1:
        raise UserError(f"--top_p {config.top_p}: training scores the whole distribution; legal: 1")


# Settings by name: `--preset NAME`; a flag beside it wins. The first two are the published values
# (arXiv 2507.19849; RUC-NLPIR/ARPO), meant for a full fine-tune of 3B to 14B models. The others are
# lengths and groups for a card, whatever the model: `memory_gb` cuts the rest to what fits.
PUBLISHED = {
    "group_size": 16, "initial_rollouts": 8, "branch_probability": 0.5, "entropy_weight": 0.2,
    "entropy_threshold": 0.5, "temperature": 1.0, "learning_rate": 1e-6, "clip_low": 0.2,
    "clip_high": 0.2, "kl_coefficient": 0.0, "questions_per_step": 128, "search_results": 3,
    "max_segment_tokens": 4096, "max_total_tokens": 6144, "max_branches": 1,
}  # fmt: skip
CARD = {
    "group_size": 8, "initial_rollouts": 4, "entropy_tokens": 20, "learning_rate": 1e-5,
    "questions_per_step": 4, "search_results": 3, "max_tool_calls": 3, "max_branches": 1,
}  # fmt: skip
PRESETS = {
    "paper": PUBLISHED | {"branch_rule": "paper", "max_tool_calls": 6},
    "official": PUBLISHED | {"branch_rule": "official", "max_tool_calls": 3, "entropy_tokens": 20,
                             "dual_clip": 3.0, "official_rewards": True},
    "8gb": CARD | {"memory_gb": 7.5, "max_segment_tokens": 256, "max_total_tokens": 1024},
    "12gb": CARD | {"memory_gb": 11.5, "max_segment_tokens": 512, "max_total_tokens": 2048},
    "16gb": CARD | {"memory_gb": 15.5, "max_segment_tokens": 512, "max_total_tokens": 2048,
                    "group_size": 16, "initial_rollouts": 8},
    "24gb": CARD | {"memory_gb": 23.0, "max_segment_tokens": 1024, "max_total_tokens": 4096,
                    "group_size": 16, "initial_rollouts": 8},
}  # fmt: skip
