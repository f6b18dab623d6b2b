"""ARPO in one file: roll out, branch where uncertain, credit, update (arXiv 2507.19849).

    python arpo_mini.py train | eval | show      (--help lists the flags of each)

Read `train` first: it is the algorithm, a line a step. Then `Rollout.grow`, the recursion that
branches; then `make_row` and `policy_loss`, what is trained on. The three lessons it stands on are
entropy.py (where to branch), advantage.py (who gets the credit) and tools.py (what can be called);
runs.py keeps what a run leaves on the disk, memory.py decides how much is computed at once,
alarms.py says when the figures of a run go wrong, terminal.py makes the flags and the tables.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import re
import sys
import time
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# It reports a missing optional kernel while it is imported (by peft).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import tools as toolbox
from advantage import (
    Reward,
    Segment,
    clipped_objective,
    group_advantages,
    kl_k3,
    official_reward,
    reward,
    segment_advantages,
    shared_by,
)
from alarms import remarks
from data.formats import Question, load_questions
from entropy import RULES, normalised_entropy, official_scalar, segment_entropy, token_entropy
from memory import Chunks, fit, head_chunk, snapshot
from metrics import judge, mean, official_judge, summary
from runs import NonFinite, RunFolder, Terminated, resumed, watched
from terminal import (
    LOG_HEAD,
    Parser,
    UserError,
    advance,
    check,
    comparison,
    console,
    draw_tree,
    effort_table,
    log_line,
    one_line,
    option,
    progress_bar,
    reason,
    report_table,
)
from view.page import Run, page
from view.trees import tree

DATA = Path(__file__).resolve().parent / "data"
# What the libraries say about themselves is not for the reader of this screen: loading bars,
# deprecations, a padding warning that takes a hole for right padding.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


# ---- settings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # the policy
    model_name: str = option(str(DATA / "tiny-qwen3"), "folder or hub id of a causal LM")
    adapter: str | None = option(None, "folder of a LoRA adapter to start from")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    load_in_4bit: bool = option(True, "quantise the frozen weights to NF4 (bitsandbytes)")
    lora_rank: int = option(16, "rank of the LoRA adapter, on all linear layers", low=1)
    system_prompt: str | None = option(None, "file with another one; {tools} stands for the tools")
    thinking: bool = option(True, "false: ask the chat template for an empty think block (Qwen3)")
    # the task
    dataset_path: str = option(
        str(DATA / "train.jsonl"), "questions to train on (forms: data/formats.py)"
    )
    eval_path: str = option(
        str(DATA / "test.jsonl"), "questions to evaluate on (forms: data/formats.py)"
    )
    documents_path: str = option(str(DATA / "documents.jsonl"), "what is searched (JSONL)")
    search_results: int = option(1, "documents a search returns (3 is usual elsewhere)", low=1)
    search_chars: int = option(200, "characters of each document returned", low=10)
    tool_time_limit: float = option(5.0, "seconds a tool may take", above=0)
    max_result_tokens: int = option(256, "tokens of a tool result; the rest is cut off", low=32)
    max_tool_calls: int = option(6, "calls a trajectory may make", low=0, high=500)
    max_segment_tokens: int = option(64, "tokens the policy may write at a time", low=1)
    max_total_tokens: int = option(512, "tokens of a trajectory, prompt included", low=1)
    # the rollout
    group_size: int = option(8, "M: trajectories returned for each question", low=1)
    initial_rollouts: int = option(2, "N: begun at the question; M - N may branch off", low=1)
    branch_rule: str = option("paper", "when to fork after a tool result", choices=tuple(RULES))
    branch_probability: float = option(0.5, "paper's alpha, official tau", low=0, high=1)
    entropy_weight: float = option(0.2, "paper's beta, official w")
    entropy_threshold: float = option(0.5, "paper's tau")
    entropy_sigma: float = option(1.5, "k_sigma of the adaptive rule")
    entropy_tokens: int = option(10, "k: tokens measured after a tool result", low=1)
    max_branches: int = option(1, "Z: most forks at one tool result", low=0)
    temperature: float = option(1.0, "of sampling, and of what is trained; 0: greedy", low=0)
    rollout_rows: int = option(128, "paths decoded side by side; more wait their turn", low=1)
    top_p: float = option(1.0, "share of the likeliest tokens; < 1: not to train", above=0, high=1)
    # the update
    steps: int = option(100, "training steps: a rollout and its update each", low=1)
    questions_per_step: int = option(8, "questions rolled out side by side", low=1)
    updates_per_rollout: int = option(1, "optimizer steps on a rollout; >1: off-policy", low=1)
    learning_rate: float = option(1e-3, "of AdamW, constant", above=0)
    shared_weight: float = option(
        0.0, "of shared tokens' advantages: 0 soft, 1 hard, 0.3 the seed's mix", low=0, high=1
    )
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = option(0.2, "and above 1 + clip_high (larger: clip-higher)", low=0)
    dual_clip: float | None = option(None, "cap on the ratio where A < 0, e.g. 3", above=1)
    kl_coefficient: float = option(0.0, "weight of KL(policy, adapter switched off)", low=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    official_rewards: bool = option(False, "score like the official code, quirks included")
    packed: bool = option(True, "train each token of a tree once; false: a row a trajectory")
    micro_batch_tokens: int = option(8192, "tokens of one forward and backward pass", low=1)
    gradient_checkpointing: bool | None = option(
        None, "compute activations twice, keep few; none: where a trajectory would not fit"
    )
    # the run
    memory_gb: float | None = option(
        None, "GiB that the run may use; none: what the GPU has, no limit on a CPU", above=0
    )
    seed: int = option(0, "of everything that is drawn", low=0, high=2**32 - 1)
    output_dir: str = option("runs/arpo", "folder of the run; an existing one is not touched")
    save_every: int = option(10, "steps between checkpoints; --resume goes on from one", low=1)
    keep: int = option(2, "checkpoints that are kept, the newest", low=1)
    eval_every: int = option(50, "steps between looks at a part of eval_path; 0: none", low=0)
    eval_part: int = option(20, "questions of each domain in such a look", low=1)
    record_every: int = option(10, "steps between trees in rollouts.jsonl; 0: none", low=0)

    def __post_init__(self):
        check(self)
        if self.initial_rollouts > self.group_size:
            limit = f"at most group_size ({self.group_size})"
            raise UserError(f"--initial_rollouts {self.initial_rollouts}: it must be {limit}")


# Settings by name: `--preset NAME`; a flag beside it wins. The first two are the published values
# (arXiv 2507.19849; RUC-NLPIR/ARPO), meant for a full fine-tune of 3B to 14B models. The others are
# lengths and groups for a card, whatever the model: `memory_gb` cuts the rest to what fits.
PUBLISHED = {
    "group_size": 16, "initial_rollouts": 8, "branch_probability": 0.5, "entropy_weight": 0.2,
    "entropy_threshold": 0.5, "temperature": 1.0, "learning_rate": 1e-6, "clip_low": 0.2,
    "clip_high": 0.2, "kl_coefficient": 0.0, "questions_per_step": 128, "search_results": 3,
    "max_segment_tokens": 4096, "max_total_tokens": 6144,
}  # fmt: skip
CARD = {
    "group_size": 8, "initial_rollouts": 4, "entropy_tokens": 20, "learning_rate": 1e-5,
    "questions_per_step": 4, "search_results": 3, "max_tool_calls": 3,
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


# ---- the policy ---------------------------------------------------------------------------


SYSTEM_PROMPT = """\
Answer the question. Think first; then either call one tool and wait for its result, or answer.
To call a tool, write <think>why</think> and then one of
{tools}
Its result follows between <result> and </result>. You may call tools several times.
To answer, write <think>why</think><answer>\\boxed{the answer alone}</answer> and stop."""


CHARS_A_TOKEN = 32  # more than a text has on average: what is longer is cut before it is counted


@dataclass
class Policy:
    """A causal language model with a LoRA adapter, its tokenizer, and what both need to speak."""

    model: PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    system_prompt: str
    eos_ids: list[int]
    pad_id: int
    closers: set[int]  # tokens whose text holds a '>': only they can complete a tag
    thinking: bool = True  # what the chat template is told; most ignore it
    chunks: Chunks = field(default_factory=Chunks)  # how much of it is computed at once

    @property
    def lm(self) -> transformers.PreTrainedModel:
        """The language model itself; the adapter's layers sit inside it and stay live."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def context(self) -> float:
        """Tokens of the longest text that the model was made for."""
        text_config = self.lm.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or math.inf

    def prompt(self, question: str) -> list[int]:
        question = toolbox.readable(question)
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special or "<" in token.content:  # a question cannot end its own turn
                question = question.replace(token.content, toolbox.broken(token.content))
        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": question},
        ]
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, enable_thinking=self.thinking
        )
        # Some templates open the think block for the model: here it is the policy's to write.
        text = re.sub(r"<think>\s*\Z", "", text)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """A tool's text: the spelling of a special token in it is no special token."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def encode_result(self, result: toolbox.ToolResult, most: int) -> list[int]:
        """A result in its tags, at most `most` tokens; " [cut]" stands where the rest was cut."""
        longest = CHARS_A_TOKEN * most
        if len(result.text) <= longest:
            token_ids = self.encode(toolbox.result_text(result))
            if len(token_ids) <= most:
                return token_ids

        def beginning(n: int) -> list[int]:
            cut = dataclasses.replace(result, text=result.text[:n] + " [cut]")
            return self.encode(toolbox.result_text(cut))

        lengths = range(min(longest, len(result.text)))
        too_long = bisect_right(lengths, most, key=lambda n: len(beginning(n)))
        return beginning(max(0, too_long - 1))

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def load_policy(config: Config, tools: dict[str, toolbox.Tool], trainable: bool) -> Policy:
    """The frozen model in 4-bit NF4 (or plain), with a fresh or a saved LoRA adapter on top."""
    system_prompt = read_system_prompt(config, tools)
    try:
        lm, tokenizer = load_model(config)
        saved = load_adapter(lm, config.adapter, trainable) if config.adapter else None
    except Exception as error:  # deliberately everything: a folder may hold anything
        names = f"--model_name {config.model_name} --adapter {config.adapter}"
        legal = "; --trust_remote_code true runs it" if "trust_remote_code" in str(error) else ""
        raise UserError(f"cannot load {names}: {reason(error)}{legal}") from None
    model = saved or fresh_adapter(lm, config.lora_rank)
    model.eval()  # no dropout anywhere: what is sampled is what is scored
    for layer in lm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes would repack the weights for inference, and the packed
            # product has no backward: every gradient below it would silently be missing.
            layer.support_avx512bf16_for_cpu = False
    eos = lm.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A model's own generation settings (Qwen3: top_k 20) would sample from another policy.
    lm.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=pad_id)
    refuse_unsupported(config.model_name, lm, tokenizer)
    lm.gradient_checkpointing_enable({"use_reentrant": False})  # while `recomputed` says so
    policy = Policy(
        model=model,
        tokenizer=tokenizer,
        system_prompt=system_prompt,
        eos_ids=sorted(eos_ids),
        pad_id=pad_id,
        closers={i for token, i in tokenizer.get_vocab().items() if ">" in token},
        thinking=config.thinking,
        chunks=fit(config, lm),
    )
    if config.max_total_tokens > policy.context:
        words = f"the model's context ends at {policy.context} tokens, and so do trajectories"
        console.print(f"--max_total_tokens {config.max_total_tokens}: {words}", soft_wrap=True)
    return policy


def load_model(config: Config) -> tuple[transformers.PreTrainedModel, Any]:
    """The model and its tokenizer. What comes with them runs only with `trust_remote_code`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    name, trust = config.model_name, config.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=trust)
    lm, found = AutoModelForCausalLM.from_pretrained(
        name,
        trust_remote_code=trust,
        config=AutoConfig.from_pretrained(name, trust_remote_code=trust),
        attn_implementation="sdpa",  # and not a kernel of the hub, which a config can name
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
        dtype=dtype,
        device_map=device,
        quantization_config=nf4 if config.load_in_4bit else None,
    )
    if found["missing_keys"]:
        raise ValueError(f"the model has no {', '.join(sorted(found['missing_keys'])[:3])}")
    return lm, tokenizer


def fresh_adapter(lm, rank: int) -> PeftModel:
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(lm, lora)
    lora.target_modules = sorted(lora.target_modules)  # a set: its order would change each run
    return model


def load_adapter(lm, folder: str, trainable: bool) -> PeftModel:
    """A LoRA adapter of all the weights that it names; its folder runs no code."""
    config = PeftConfig.from_pretrained(folder)
    if not isinstance(config, LoraConfig) or config.megatron_config:  # that names code to import
        raise ValueError("the adapter is not a plain LoRA")
    if Path(folder).is_dir() and not Path(folder, "adapter_model.safetensors").exists():
        raise ValueError("the adapter has no adapter_model.safetensors")  # a .bin is a pickle
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(lm, folder, config=config, is_trainable=trainable)


def refuse_long(policy: Policy, questions: list[Question], path: str, config: Config) -> None:
    """A prompt that leaves no room to answer is named before the work begins: UserError."""
    room = min(config.max_total_tokens, policy.context)
    for number, question in enumerate(questions, start=1):
        tokens = len(policy.prompt(question.text))
        if tokens >= room:
            limit = "no room to answer within --max_total_tokens and the model's context"
            raise UserError(
                f"{path}, question {number}: a prompt of {tokens} tokens leaves {limit} ({room})"
            )


def read_system_prompt(config: Config, tools: dict[str, toolbox.Tool]) -> str:
    """Ours, or that of the user's file, with the registered tools in the place of {tools}."""
    text, path = SYSTEM_PROMPT, config.system_prompt
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--system_prompt {path}: {reason(error)}") from None
    described = "\n".join(f"<{t.name}>{t.description}</{t.name}>" for t in tools.values())
    return text.replace("{tools}", described)


def refuse_unsupported(name: str, lm, tokenizer) -> None:
    """Models that would train silently wrong, or cannot be asked: UserError."""
    if not tokenizer.chat_template:
        wanted = "an instruct model, or a folder with a chat_template.jinja, has one"
        raise UserError(f"--model_name {name} has no chat template; {wanted}")
    try:
        roles = [{"role": role, "content": role} for role in ("system", "user")]
        tokenizer.apply_chat_template(roles, tokenize=False)
    except Exception as error:  # deliberately everything: a template is a program
        raise UserError(f"--model_name {name}: its chat template says: {reason(error)}") from None
    scaled = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    odd = [key for key in scaled if getattr(lm.config, key, None) not in (None, 1)]
    odd += sorted({*(getattr(lm.config, "layer_types", None) or [])} - {"full_attention"})
    if odd:  # log-probs come from the bare head, and any column of the cache may be a hole
        raise UserError(f"--model_name {name} has {', '.join(odd)}, which is not supported here")


# ---- the rollout --------------------------------------------------------------------------


@dataclass
class Paths:
    """The open paths of one level, a row each, over one KV cache of C columns.

    A column that means nothing for a row (padding, what a finished row went on to generate, the
    sibling's tokens in a fork) is a hole: mask 0. Positions come from the running sum of the mask,
    so a row's tokens are contiguous for the model whatever holes lie between them.
    """

    drafts: list[Segment]  # (R) the segment that each path writes; its parent is where it stands
    owners: list[int]  # (R) the question it belongs to
    cache: DynamicCache  # keys and values (R, heads, C, d) of every layer
    mask: Tensor | None  # (R, C); None: used up
    pending: list[list[int]]  # (R) tokens that the cache has not seen yet

    def __len__(self) -> int:
        return len(self.drafts)

    def select(self, rows: list[int], mask: Tensor | None = None, keep: bool = False) -> Paths:
        """The named rows (again, to fork them) on a cache of their own, squeezed free of holes."""
        (selected,) = self.split([rows], mask, keep)
        return selected

    def split(
        self, parts: list[list[int]], mask: Tensor | None = None, keep: bool = False
    ) -> list[Paths]:
        """The rows of each part on a cache of its own, squeezed free of holes.

        These paths are used up, a layer at a time, so that the cache never exists twice; unless
        they are to `keep`. `mask` replaces that of the rows of all parts, one after the other.
        """
        rows = [row for part in parts for row in part]
        masks = (self.mask[rows] if mask is None else mask).split([len(part) for part in parts])
        caches = [DynamicCache() for _ in parts]
        picks = [torch.tensor(part, device=self.mask.device)[:, None] for part in parts]
        columns = []
        for seen in masks:  # (R', C)
            width = int(seen.sum(dim=1).max())
            holes_first = seen.argsort(dim=1, stable=True)
            columns.append(holes_first[:, seen.shape[1] - width :])  # (R', C')
        for i, layer in enumerate(self.cache.layers):
            for cache, pick, column in zip(caches, picks, columns, strict=True):
                kept = (x[pick, :, column].transpose(1, 2) for x in (layer.keys, layer.values))
                cache.update(*kept, i)
            if not keep:
                layer.keys = layer.values = None
        if not keep:
            self.mask = None  # `grow` holds the paths of every level until it returns
        return [
            Paths(
                [self.drafts[row] for row in part],
                [self.owners[row] for row in part],
                cache,
                seen.gather(1, column),
                [list(self.pending[row]) for row in part],
            )
            for part, cache, seen, column in zip(parts, caches, masks, columns, strict=True)
        ]

    @staticmethod
    def join(parts: list[Paths]) -> Paths | None:
        """The rows of all parts on one cache, with holes on the left of the shorter ones."""
        if len(parts) < 2:
            return parts[0] if parts else None
        width = max(part.mask.shape[1] for part in parts)

        def widened(x: Tensor, dim: int) -> Tensor:
            shape = list(x.shape)
            shape[dim] = width - shape[dim]
            return torch.cat([x.new_zeros(shape), x], dim=dim)

        cache = DynamicCache()
        for i in range(len(parts[0].cache.layers)):
            layers = [part.cache.layers[i] for part in parts]
            keys = torch.cat([widened(layer.keys, 2) for layer in layers])
            values = torch.cat([widened(layer.values, 2) for layer in layers])
            for layer in layers:
                layer.keys = layer.values = None
            cache.update(keys, values, i)
        mask = torch.cat([widened(part.mask, 1) for part in parts])
        for part in parts:
            part.mask = None  # as in `split`
        return Paths(
            [draft for part in parts for draft in part.drafts],
            [owner for part in parts for owner in part.owners],
            cache,
            mask,
            [tokens for part in parts for tokens in part.pending],
        )


class SegmentEnd(StoppingCriteria):
    """Gives every sampled token to its segment, and ends a row when its segment is complete.

    By text and not by token id, because a tag may be split over several tokens. With `leave`, the
    whole call ends when that share of its rows has ended, so that they can be dropped.
    """

    def __init__(
        self, policy: Policy, drafts: list[Segment], limits: list[int], leave: float = 1.0
    ):
        self.policy, self.drafts, self.limits, self.leave = policy, drafts, limits, leave

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        newest = input_ids[:, -1].tolist()
        for draft, limit, token in zip(self.drafts, self.limits, newest, strict=True):
            if draft.stop is None:
                draft.token_ids.append(token)
                draft.stop = self.why(draft.token_ids, limit)
        ended = [draft.stop is not None for draft in self.drafts]
        enough = sum(ended) >= self.leave * len(ended)
        return torch.tensor([enough or end for end in ended], device=input_ids.device)

    def why(self, token_ids: list[int], limit: int) -> str | None:
        if token_ids[-1] in self.policy.eos_ids:
            return "eos"
        closed = token_ids[-1] in self.policy.closers
        stop = toolbox.policy_stop(self.policy.decode(token_ids)) if closed else None
        return stop or ("length" if len(token_ids) >= limit else None)


class FiniteLogits(LogitsProcessor):
    """Nothing is sampled from logits that are no numbers."""

    def __init__(self, drafts: list[Segment]):
        self.drafts = drafts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = (~scores.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if wrong:
            rows = [make_row([self.drafts[row]], {}) for row in wrong]
            raise NonFinite("the sampler's log-probs are not finite", rows, {"logits": scores})
        return scores


class Meter(LogitsProcessor):
    """The entropy of every step and the log-prob of every token, while the scores pass by.

    So one step of (R, V) is held, never the k steps of a probe.
    """

    def __init__(self, entropy: Callable[[Tensor, Tensor], Tensor], temperature: float):
        self.entropy, self.temperature = entropy, temperature
        self.H: list[Tensor] = []  # (R) a step
        self.logp: list[Tensor] = []  # (R) a step
        self.latest: Tensor | None = None  # (R, V) log-probs of the step whose token is not known

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.latest is not None:
            self.pick(input_ids[:, -1])
        scaled = scores.float() / self.temperature  # (R, V)
        self.H.append(self.entropy(scaled[:, None], scaled.new_ones(len(scaled), 1).bool()))
        self.latest = scaled.log_softmax(dim=-1)
        return scores

    def pick(self, tokens: Tensor) -> None:
        self.logp.append(self.latest.gather(1, tokens[:, None])[:, 0])


LEAVE = 0.25  # share of rows that ends a call of `generate`, to go on without them


class Rollout:
    """Rolls out questions with one policy and counts what that took.

    `prefill_tokens` are the prompt and result tokens that were computed, each once but for the last
    one of a node where paths start, and for forks that had to wait: they read all before them.
    """

    def __init__(self, policy: Policy, config: Config, tools: dict, rng: random.Random):
        self.policy, self.config, self.tools, self.rng = policy, config, tools, rng
        self.longest = min(config.max_total_tokens, policy.context)  # a trajectory, in tokens
        self.history: list[float] = []  # entropies measured so far, for the adaptive rule
        self.prefill_tokens = 0

    @torch.no_grad()
    def run(self, questions: list[Question]) -> list[list[Segment]]:
        """Exactly `group_size` distinct leaves for each question; together as many as fit."""
        n = max(1, self.config.rollout_rows // self.config.group_size)
        parts = [questions[i : i + n] for i in range(0, len(questions), n)]
        return [leaves for part in parts for leaves in self.run_together(part)]

    def run_together(self, questions: list[Question]) -> list[list[Segment]]:
        M, N = self.config.group_size, self.config.initial_rollouts
        n = len(questions)
        roots = [Segment("prompt", self.policy.prompt(question.text)) for question in questions]
        start = self.read(list(enumerate(roots)))
        waiting = [(q, root) for q, root in enumerate(roots) for _ in range(N)]
        leaves = self.grow(start, None, waiting, [M - N] * n)
        return [[leaf for owner, leaf in leaves if owner == q] for q in range(n)]

    def read(self, nodes: list[tuple[int, Segment]]) -> Paths:
        """A row for each (question, node): all before it but its last token, which is pending."""
        texts = [[t for segment in node.path() for t in segment.token_ids] for _, node in nodes]
        longest = max(map(len, texts))
        if longest >= self.longest:
            limit = f"--max_total_tokens {self.config.max_total_tokens}"
            context = f"the model's context {self.policy.context}"
            raise UserError(f"{limit}, {context}: a prompt has {longest} tokens already")
        input_ids, mask = self.left_pad([text[:-1] for text in texts])
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.policy.lm(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        self.prefill_tokens += int(mask.sum())
        drafts = [Segment("policy", [], parent=node) for _, node in nodes]
        owners = [owner for owner, _ in nodes]
        return Paths(drafts, owners, cache, mask, [text[-1:] for text in texts])

    def grow(
        self,
        start: Paths,
        paths: Paths | None,
        waiting: list[tuple[int, Segment]],
        slots: list[int],
    ) -> list[tuple[int, Segment]]:
        """Continue every open path to its end: (question, leaf) of each.

        One policy segment for every path, forks where the rule says so (`slots[q]` are left to
        question q), a tool result for every call, and the same again for the paths still open and
        for those that begin: at a (question, node) that was `waiting` for room, or fresh from the
        question where too few forks can come to fill its slots.
        """
        fresh = self.fresh(paths, waiting, slots)
        slots = [left - taken for left, taken in zip(slots, fresh, strict=True)]
        roots = [(q, start.drafts[q].parent) for q, count in enumerate(fresh) for _ in range(count)]
        paths, waiting = self.begin(start, paths, waiting + roots)
        if paths is None:
            return []
        paths, later, slots = self.branch(paths, slots)
        called, ended = self.write(paths)
        called, unread = self.call_tools(called)
        return ended + unread + self.grow(start, called, waiting + later, slots)

    def fresh(
        self, paths: Paths | None, waiting: list[tuple[int, Segment]], slots: list[int]
    ) -> list[int]:
        """How many slots of each question are certain to stay open, whatever its paths do."""
        c = self.config
        Z = {"none": 0, "official": 1}.get(c.branch_rule, c.max_branches)
        most = [0] * len(slots)  # forks that can still come

        def count(owner: int, node: Segment, decided: bool) -> None:
            used = sum(segment.author == "tool" for segment in node.path())
            decisions = c.max_tool_calls - used + (node.author == "tool" and not decided)
            most[owner] += (1 + Z) ** decisions - 1

        for owner, draft in zip(paths.owners, paths.drafts, strict=True) if paths else ():
            count(owner, draft.parent, decided=False)
        for owner, node in waiting:
            count(owner, node, decided=True)
        return [max(0, left - forks) for left, forks in zip(slots, most, strict=True)]

    def begin(
        self, start: Paths, paths: Paths | None, waiting: list[tuple[int, Segment]]
    ) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """A row for each path that waits while there is room, and those that go on waiting."""
        room = self.config.rollout_rows - (len(paths) if paths else 0)
        now, later = waiting[:room], waiting[room:]
        roots = [owner for owner, node in now if node.author == "prompt"]
        forks = [(owner, node) for owner, node in now if node.author == "tool"]
        parts = [paths] if paths else []
        if roots:
            begun = start.select(roots, keep=True)
            begun.drafts = [Segment("policy", [], parent=draft.parent) for draft in begun.drafts]
            parts.append(begun)
        if forks:
            parts.append(self.read(forks))
        self.prefill_tokens += len(now)
        return Paths.join(parts), later

    def branch(
        self, paths: Paths, slots: list[int]
    ) -> tuple[Paths, list[tuple[int, Segment]], list[int]]:
        """Probe k tokens and fork where they are uncertain: the paths, forks that must wait for
        room, and the slots that are left."""
        k = self.config.entropy_tokens
        node_end = paths.mask.shape[1] + max(map(len, paths.pending)) - 1  # the node's last column
        self.sample(paths, k, measure=True)
        forked, slots = self.decisions(paths, slots)
        room = self.config.rollout_rows - len(paths)
        later = [(paths.owners[row], paths.drafts[row].parent) for row in forked[room:]]
        if forked[:room]:
            paths = self.fork(paths, forked[:room], node_end)
            self.sample(paths, k, measure=True)
        return paths, later, slots

    def decisions(self, paths: Paths, slots: list[int]) -> tuple[list[int], list[int]]:
        """The rows to fork, once for each fork, and the slots that are left."""
        slots, forked = list(slots), []
        history = [*self.history]
        self.history += [draft.entropy for draft in paths.drafts]
        nodes = [draft.parent for draft in paths.drafts]
        asked = [row for row, node in enumerate(nodes) if node.author == "tool"]
        asked = [row for row in asked if nodes[row].decision is None]
        for row in asked:
            nodes[row].decision = self.decide(paths.drafts[row], history)
        for row in sorted(asked, key=lambda row: -nodes[row].decision.gain):
            node, owner = nodes[row], paths.owners[row]
            granted = min(node.decision.forks, slots[owner])
            node.decision = dataclasses.replace(node.decision, granted=granted)
            slots[owner] -= granted
            forked += [row] * granted
        return forked, slots

    def decide(self, draft: Segment, history: list[float]):
        """What the rule says at the tool result that `draft` has just read."""
        c, path = self.config, draft.path()
        first = next(segment for segment in path if segment.author == "policy")
        # The official code measures the segment that ends in the call: one call too early.
        measured = draft.parent.parent if c.branch_rule == "official" else draft
        return RULES[c.branch_rule](
            measured.entropy,
            first.entropy,
            u=self.rng.random(),
            history=history,
            branch_probability=c.branch_probability,
            entropy_weight=c.entropy_weight,
            entropy_threshold=c.entropy_threshold,
            entropy_sigma=c.entropy_sigma,
            max_branches=c.max_branches,
        )

    def fork(self, paths: Paths, forked: list[int], node_end: int) -> Paths:
        """The same paths, and after them a row for each fork, which stands right after its node."""
        n = len(paths)
        rows = [*range(n), *forked]
        mask = paths.mask[rows]
        # Not the sibling's probe, and not the node's last token: it is read again for its logits.
        mask[n:, node_end:] = 0
        both = paths.select(rows, mask)
        for row in range(n, len(rows)):
            node = both.drafts[row].parent
            both.drafts[row] = Segment("policy", [], parent=node)
            both.pending[row] = node.token_ids[-1:]
        self.prefill_tokens += len(forked)
        return both

    def write(self, paths: Paths | None) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """Finish every segment: the paths that call a tool, and the leaves, (question, leaf) each.

        Rows that have ended leave the batch, those that call a tool until it has answered.
        """
        called, ended = [], []
        while paths:
            drafts, parts = paths.drafts, {"call": [], "leaf": [], "writing": []}
            for row, draft in enumerate(drafts):
                called_now = "call" if self.may_call(draft) else "leaf"
                parts[called_now if draft.stop else "writing"].append(row)
            ended += [(paths.owners[row], drafts[row]) for row in parts["leaf"]]
            if len(parts["writing"]) < len(paths):
                some = [part for part in (parts["call"], parts["writing"]) if part]
                split = paths.split(some)
                paths = split.pop() if parts["writing"] else None
                called += split
            if paths:
                self.sample(paths, self.config.max_segment_tokens, measure=False)
        return Paths.join(called), ended

    def sample(self, paths: Paths, steps: int, measure: bool) -> None:
        """One `generate` call: up to `steps` more tokens for every segment that is not complete."""
        drafts = paths.drafts
        limits = [self.room(draft) for draft in drafts]
        written = [len(draft.token_ids) for draft in drafts]
        left = [a - b for a, b, d in zip(limits, written, drafts, strict=True) if not d.stop]
        if not left:
            return
        steps = min(steps, max(left))
        input_ids, fresh = self.left_pad(paths.pending)  # (R, W)
        paths.mask = torch.cat([paths.mask, fresh], dim=1)  # (R, C + W)
        meter = Meter(self.step_entropy, self.config.temperature or 1.0) if measure else None
        out = self.policy.lm.generate(
            input_ids,
            attention_mask=paths.mask,
            past_key_values=paths.cache,
            generation_config=self.sampling(steps),
            logits_processor=[FiniteLogits(drafts), *([meter] if measure else [])],
            stopping_criteria=[
                SegmentEnd(self.policy, drafts, limits, leave=1.0 if measure else LEAVE)
            ],
        )
        added = [len(d.token_ids) - n for d, n in zip(drafts, written, strict=True)]
        S = out.shape[1] - input_ids.shape[1]
        columns = torch.arange(S, device=paths.mask.device)
        kept = columns < torch.tensor(added, device=paths.mask.device)[:, None]  # (R, S)
        # The cache has not seen the token sampled last: it is still to be read.
        paths.mask = torch.cat([paths.mask, kept[:, :-1].long()], dim=1)  # (R, C + W + S - 1)
        paths.pending = [
            d.token_ids[-1:] if n == S else [] for d, n in zip(drafts, added, strict=True)
        ]
        if measure:
            meter.pick(out[:, -1])
            self.measure(meter, kept, drafts, written)

    @property
    def step_entropy(self) -> Callable[[Tensor, Tensor], Tensor]:
        return official_scalar if self.config.branch_rule == "official" else normalised_entropy

    def measure(
        self, meter: Meter, kept: Tensor, drafts: list[Segment], written: list[int]
    ) -> None:
        """Entropy of the segments that began here, and the log-probs of their tokens."""
        H = torch.stack(meter.H, dim=1)  # (R, S)
        logp = torch.stack(meter.logp, dim=1).tolist()
        if self.config.branch_rule == "official":  # a sum over the first 20, not a mean
            H = (H * kept)[:, :20].sum(dim=1)
        else:
            H = segment_entropy(H, kept)
        for row, (draft, before) in enumerate(zip(drafts, written, strict=True)):
            if before == 0:
                draft.entropy = H[row].item()
                draft.logp = logp[row][: len(draft.token_ids)]

    def room(self, draft: Segment) -> int:
        """Tokens that this segment may have."""
        before = sum(len(segment.token_ids) for segment in draft.parent.path())
        return min(self.config.max_segment_tokens, self.longest - before)

    def sampling(self, steps: int) -> GenerationConfig:
        """One temperature and no top_k; training: the whole distribution, the one it scores."""
        greedy = self.config.temperature == 0
        return GenerationConfig(
            max_new_tokens=steps,
            do_sample=not greedy,
            temperature=None if greedy else self.config.temperature,
            top_k=None if greedy else 0,
            top_p=None if greedy else self.config.top_p,
            eos_token_id=self.policy.eos_ids,
            pad_token_id=self.policy.pad_id,
        )

    def call_tools(self, paths: Paths | None) -> tuple[Paths | None, list[tuple[int, Segment]]]:
        """Run the calls of a level: the paths that go on, and the leaves that end here."""
        if paths is None:
            return None, []
        results = self.results(paths.drafts)
        open_rows = [row for row, result in enumerate(results) if self.fits(result)]
        ended = []
        for owner, draft, result in zip(paths.owners, paths.drafts, results, strict=True):
            if not self.fits(result):
                draft.stop = "length"
                ended.append((owner, draft))
        if not open_rows:
            return None, ended
        if ended:
            paths = paths.select(open_rows)
        for row, pending in enumerate(paths.pending):
            result = results[open_rows[row]]
            paths.drafts[row] = Segment("policy", [], parent=result)
            pending += result.token_ids
            self.prefill_tokens += len(result.token_ids)
        return paths, ended

    def results(self, drafts: list[Segment]) -> list[Segment]:
        """The result of each draft's call."""
        texts = [self.policy.decode(draft.token_ids) for draft in drafts]
        calls = [toolbox.read_call(text, self.tools) for text in texts]
        results = toolbox.run_calls(calls, self.tools, self.config.tool_time_limit)
        most = self.config.max_result_tokens
        token_ids = [self.policy.encode_result(result, most) for result in results]
        pairs = zip(drafts, token_ids, strict=True)
        return [Segment("tool", ids, parent=draft) for draft, ids in pairs]

    def may_call(self, draft: Segment) -> bool:
        used = sum(segment.author == "tool" for segment in draft.path())
        return draft.stop == "tool" and used < self.config.max_tool_calls

    def fits(self, node: Segment) -> bool:
        """Whether the trajectory still has room to answer after this result."""
        return sum(len(s.token_ids) for s in node.path()) < self.longest

    def left_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (R, W) each, of rows of different lengths."""
        W = max(1, *map(len, rows))
        ids = [[self.policy.pad_id] * (W - len(row)) + row for row in rows]
        mask = [[0] * (W - len(row)) + [1] * len(row) for row in rows]
        device = self.policy.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---- what is trained on -------------------------------------------------------------------


@dataclass
class Row:
    """Some trajectories of one question, every token of their tree once. Lists of T values."""

    input_ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)  # depth in the tree
    parent: list[int] = field(default_factory=list)  # index of the token before it
    weight: list[int] = field(default_factory=list)  # trajectories it counts for; 0: not sampled
    A_plus: list[float] = field(default_factory=list)  # sum of their positive advantages
    A_minus: list[float] = field(default_factory=list)  # sum of their negative advantages
    n_plus: list[int] = field(default_factory=list)  # how many of them are positive
    n_minus: list[int] = field(default_factory=list)  # how many are negative
    drawn: list[float] = field(default_factory=list)  # log-prob it was drawn with; nan: not kept

    def __len__(self) -> int:
        return len(self.input_ids)

    def sees(self) -> Tensor:
        """(T, T): True where a token (row) attends to a token (column): itself, its ancestors."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for t, parent in enumerate(self.parent):
            if parent >= 0:
                mask[t] |= mask[parent]
        return mask


def make_row(leaves: list[Segment], advantages: dict[Segment, dict[Segment, float]]) -> Row:
    """The tree of these leaves, parents first; `advantages[segment][leaf]` for policy segments."""
    row, last = Row(), {}  # last: segment -> index of its last token
    for segment, below in shared_by(leaves).items():
        credit = [advantages[segment][leaves[i]] for i in below] if segment in advantages else []
        plus, minus = [a for a in credit if a > 0], [a for a in credit if a < 0]
        parent = last.get(segment.parent, -1)
        depth = row.position[parent] + 1 if parent >= 0 else 0
        for i, token in enumerate(segment.token_ids):
            row.input_ids.append(token)
            row.position.append(depth + i)
            row.parent.append(parent if i == 0 else len(row) - 2)
            row.weight.append(len(credit))
            row.A_plus.append(sum(plus, 0.0))
            row.A_minus.append(sum(minus, 0.0))
            row.n_plus.append(len(plus))
            row.n_minus.append(len(minus))
            row.drawn.append(segment.logp[i] if i < len(segment.logp) else math.nan)
        last[segment] = len(row) - 1
    return row


def cut(leaves: list[Segment], limit: int) -> list[list[Segment]]:
    """Groups of leaves whose trees hold at most `limit` tokens each, or one trajectory.

    A tree is cut at its forks: depth first, a leaf joins the group of the one before it while there
    is room. What both sides share is in both rows, each time for the leaves of its row alone, so
    that loss and gradient, which are sums over leaves, stay the same.
    """
    order = {segment: i for i, segment in enumerate(shared_by(leaves))}
    if sum(len(segment.token_ids) for segment in order) <= limit:
        return [leaves]
    groups, inside, size = [], set(), limit
    for leaf in sorted(leaves, key=lambda leaf: [order[segment] for segment in leaf.path()]):
        size += sum(len(segment.token_ids) for segment in leaf.path() if segment not in inside)
        if size > limit:
            groups.append([])
            inside = set()
            size = sum(len(segment.token_ids) for segment in leaf.path())
        inside.update(leaf.path())
        groups[-1].append(leaf)
    return groups


@dataclass
class Batch:
    """Rows padded to one length. Index t of every (B, T) tensor describes token t."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), or additive (B, 1, T, T) where a row holds a whole tree
    position_ids: Tensor  # (B, T)
    parent: Tensor  # (B, T) index of the token whose logits score token t
    weight: Tensor  # (B, T) trajectories that token t counts for; 0: prompt, tool or padding
    A_plus: Tensor  # (B, T)
    A_minus: Tensor  # (B, T)
    n_plus: Tensor  # (B, T)
    n_minus: Tensor  # (B, T)
    drawn: Tensor  # (B, T) log-prob the sampler drew token t with; nan where it was not kept


def make_batch(rows: list[Row], pad_id: int, device, dtype=torch.float32) -> Batch:
    T = max(map(len, rows))

    def padded(name: str, fill: float) -> Tensor:
        values = [getattr(row, name) + [fill] * (T - len(row)) for row in rows]
        return torch.tensor(values, device=device)

    chains = all(row.parent == list(range(-1, len(row) - 1)) for row in rows)
    if chains:  # causal rows need no more than their padding
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    else:
        mask = torch.full((len(rows), 1, T, T), torch.finfo(dtype).min, dtype=dtype)
        mask.diagonal(dim1=2, dim2=3).zero_()  # padding sees itself
        for i, row in enumerate(rows):
            mask[i, 0, : len(row), : len(row)].masked_fill_(row.sees(), 0.0)
        mask = mask.to(device)
    return Batch(
        input_ids=padded("input_ids", pad_id),
        attention_mask=mask,
        position_ids=padded("position", 0),
        parent=padded("parent", 0).clamp(min=0),
        weight=padded("weight", 0),
        A_plus=padded("A_plus", 0.0),
        A_minus=padded("A_minus", 0.0),
        n_plus=padded("n_plus", 0),
        n_minus=padded("n_minus", 0),
        drawn=padded("drawn", math.nan),
    )


def micro_batches(rows: list[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most `token_budget` tokens (padding included) a batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    yield batch


@contextmanager
def recomputed(policy: Policy, on: bool | None) -> Iterator[None]:
    """Gradient checkpointing: layers keep their input only and compute the rest again.

    transformers does it for layers in training mode; nothing else enters it, so no dropout acts.
    """
    layers = [m for m in policy.lm.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = bool(on)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob (with gradient) and entropy in nats of every counted token, (B, T) each, else 0.

    Logits are made chunk by chunk from the hidden states of those tokens and made again in the
    backward pass: (B, T, V) never exists.
    """
    hidden = policy.lm.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state  # (B, T, D)
    b, t = batch.weight.nonzero(as_tuple=True)  # (n,)
    hidden = hidden[b, batch.parent[b, t]]  # (n, D) what predicts token t: the only shift there is
    target = batch.input_ids[b, t]  # (n,)

    def score(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.lm.get_output_embeddings()(hidden).float() / temperature  # (n, V)
        logp = logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        return logp, token_entropy(logits.detach())

    size = head_chunk(policy.lm.config.vocab_size)
    chunks = zip(hidden.split(size), target.split(size), strict=True)
    scored = [checkpoint(score, h, y, use_reentrant=False) for h, y in chunks]
    logp, H = (torch.cat(column) for column in zip(*scored, strict=True))  # (n,) each
    zeros = logp.new_zeros(batch.weight.shape)
    return zeros.index_put((b, t), logp), zeros.index_put((b, t), H)


def policy_loss(
    logp: Tensor, old_logp: Tensor, batch: Batch, config: Config, total: float, ref_logp=None
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, a mean over the `total` policy tokens of the whole batch (official code).

    Also returns for how many of those tokens the clip took the gradient away.
    """
    ratio = torch.exp(logp - old_logp)  # (B, T)
    objective = clipped_objective(
        ratio, batch.A_plus, batch.A_minus, config.clip_low, config.clip_high, config.dual_clip
    )
    loss = -objective.sum() / total  # A is 0 where nothing counts
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp)  # (B, T)
        loss = loss + config.kl_coefficient * (batch.weight * kl).sum() / total
    clipped = batch.n_plus * (ratio > 1 + config.clip_high)
    clipped = clipped + batch.n_minus * (ratio < 1 - config.clip_low)
    return loss, clipped.sum()


def reference_logprobs(policy: Policy, batches: list[Batch], config: Config) -> list:
    """Log-probs with the adapter switched off; no pass where nothing asks for them."""
    if not config.kl_coefficient:
        return [None for _ in batches]
    with policy.model.disable_adapter():
        return [token_logprobs(policy, batch, config.temperature)[0] for batch in batches]


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> dict[str, float]:
    """`updates_per_rollout` optimizer steps on one rollout; one normaliser however it is split."""
    groups = list(micro_batches(rows, config.micro_batch_tokens))
    batches = [make_batch(some, policy.pad_id, policy.device, policy.lm.dtype) for some in groups]
    total = sum(sum(row.weight) for row in rows)
    with torch.no_grad():
        ref_logps = reference_logprobs(policy, batches, config)
        several = config.updates_per_rollout > 1  # with one update the ratio is 1, no extra pass
        old_logps = [
            token_logprobs(policy, batch, config.temperature)[0] if several else None
            for batch in batches
        ]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    sums, drifts = Counter(), []
    for i in range(config.updates_per_rollout):
        optimizer.zero_grad()
        for some, batch, old_logp, ref_logp in zip(
            groups, batches, old_logps, ref_logps, strict=True
        ):
            with recomputed(policy, config.gradient_checkpointing):
                logp, H = token_logprobs(policy, batch, config.temperature)
            require_finite("a log-prob", logp, some, batch, logp)
            drifts += drift(logp.detach(), batch) if i == 0 else []
            old_logp = logp.detach() if old_logp is None else old_logp
            loss, clipped = policy_loss(logp, old_logp, batch, config, total, ref_logp)
            require_finite("the loss", loss, some, batch, logp)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            require_finite("the gradient norm", norm, some, batch, logp)
            sums["loss"] += loss.item()
            sums["clipped"] += clipped.item()
            sums["H"] += (batch.weight * H).sum().item()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
    tokens = total * config.updates_per_rollout
    return {
        "loss": sums["loss"] / config.updates_per_rollout,
        "clip_fraction": sums["clipped"] / tokens,
        "grad_norm": grad_norm.item(),
        "entropy": sums["H"] / tokens,
        "drift_mean": mean(drifts),
        "drift_max": max(drifts),
    }


def drift(logp: Tensor, batch: Batch) -> list[float]:
    """How far the trainer's log-probs are from those that the sampler drew its tokens with."""
    return (logp - batch.drawn)[~batch.drawn.isnan()].abs().tolist()


def require_finite(name: str, value: Tensor, rows: list[Row], batch: Batch, logp: Tensor) -> None:
    """NonFinite unless all of `value` is finite; it names the rows that are not, where it can."""
    wrong = ~value.isfinite()
    if wrong.any():
        if value is logp:  # (B, T)
            rows = [row for row, bad in zip(rows, wrong.any(dim=1).tolist(), strict=True) if bad]
        words = f"{name} is {value[wrong].flatten()[0].item()}"
        raise NonFinite(words, rows, {**vars(batch), "logp": logp})


# ---- reward and credit --------------------------------------------------------------------


def score(policy: Policy, leaf: Segment, question: Question, config: Config, tools: dict) -> Reward:
    """The reward of one trajectory, judged on its text and on who wrote which part of it."""
    turns = read_turns(policy, leaf)
    if config.official_rewards:
        return official_reward(official_transcript(turns), question.answers)
    return reward(turns, question.answers, tool_names=list(tools))


def read_turns(policy: Policy, leaf: Segment) -> list[tuple[str, str]]:
    """(author, text) of every segment after the prompt, without the eos."""
    turns = []
    for segment in leaf.path()[1:]:
        token_ids = segment.token_ids[:-1] if segment.stop == "eos" else segment.token_ids
        turns.append((segment.author, policy.decode(token_ids)))
    return turns


def official_transcript(turns: list[tuple[str, str]]) -> str:
    """One text; the official tool is called python where ours is a calculator."""
    return "".join(text for _, text in turns).replace("calculator>", "python>")


def credit(leaves: list[Segment], rewards: list[Reward], config: Config) -> list[Row]:
    """Rewards of one question -> advantages of its leaves -> of its segments -> rows to train."""
    A = group_advantages([reward.total for reward in rewards])  # (M,)
    below = shared_by(leaves)
    advantages = {
        segment: dict(zip((leaves[i] for i in below[segment]), values.tolist(), strict=True))
        for segment, values in segment_advantages(leaves, A, config.shared_weight).items()
    }
    alone = [[leaf] for leaf in leaves]
    together = cut(leaves, config.micro_batch_tokens) if config.packed else alone
    return [make_row(some, advantages) for some in together]


def seed_all(number: int) -> None:
    """torch, and python's and numpy's global generators, which a tool may draw from."""
    transformers.set_seed(number % 2**32)


# ---- evaluation ---------------------------------------------------------------------------


def evaluate(
    policy: Policy,
    questions: list[Question],
    config: Config,
    tools: dict,
    samples: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """`samples` independent trajectories for each question: one record a question.

    It seeds itself: the same policy, questions and settings give the same records.
    """
    alone = dataclasses.replace(
        config, group_size=samples, initial_rollouts=samples, branch_rule="none"
    )
    records = []
    while len(records) < len(questions):
        left = questions[len(records) :]

        def roll_out(config: Config, left=left) -> tuple[list, list]:
            some = left[: max(1, config.rollout_rows // samples)]
            seed_all(config.seed * 1_000_003 + len(records))
            return some, Rollout(policy, config, tools, random.Random(config.seed)).run(some)

        most = len(left) * samples
        some, groups = policy.chunks.retry("rollout_rows", alone, roll_out, largest=most)
        for question, leaves in zip(some, groups, strict=True):
            rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
            pairs = zip(leaves, rewards, strict=True)
            judged = [judge_leaf(policy, leaf, question, r, config) for leaf, r in pairs]
            records.append(
                {
                    "question": question.text,
                    "domain": question.domain,
                    "accuracy": [r.accuracy for r in rewards],
                    "well_formed": [r.well_formed for r in rewards],
                    **{name: [scores[name] for scores in judged] for name in judged[0]},
                    **tree_counts(leaves),
                }
            )
        on_progress(len(some))
    return records


def judge_leaf(policy: Policy, leaf: Segment, question: Question, r: Reward, config: Config):
    """What it answers, and how good that is by each measure of metrics.py."""
    turns = read_turns(policy, leaf)
    if config.official_rewards:
        is_math = question.domain == "math"
        return official_judge(official_transcript(turns), question.answers, is_math)
    return judge(turns, question.answers, r.well_formed)


def tree_counts(leaves: list[Segment]) -> dict[str, float | None]:
    """What the trees over these leaves took: each segment counts once, however many share it."""
    segments = list(shared_by(leaves))
    policy = [segment for segment in segments if segment.author == "policy"]
    calls = [segment for segment in segments if segment.author == "tool"]
    first = [s.entropy for s in policy if s.parent.author == "prompt"]
    after = [s.entropy for s in policy if s.parent.author == "tool"]
    return {
        "tool_calls": len(calls),
        "forks": sum(segment.decision.granted for segment in calls if segment.decision),
        "generated_tokens": sum(len(segment.token_ids) for segment in policy),
        # what the prefixes cost if every turn read them again
        "reread_tokens": sum(len(s.token_ids) for segment in policy for s in segment.path()[:-1]),
        "entropy_initial": mean(first),
        "entropy_after_tool": mean(after),
    }


# ---- training -----------------------------------------------------------------------------


def questions_of_step(questions: list[Question], step: int, config: Config) -> list[Question]:
    """What step 1, 2, .. asks: every question once in a random order, then again in another."""
    asked, orders, n = [], {}, config.questions_per_step
    for i in range((step - 1) * n, step * n):
        epoch, at = divmod(i, len(questions))
        if epoch not in orders:
            rng = random.Random(f"order {config.seed} {epoch}")
            orders[epoch] = rng.sample(questions, len(questions))
        asked.append(orders[epoch][at])
    return asked


def train_step(
    policy: Policy, optimizer, questions: list[Question], config: Config, tools, step: int
) -> tuple[dict, list[list[Segment]], list[list[Reward]]]:
    """One step of ARPO: its metrics, and the leaves and their rewards for each question.

    All that it draws depends on the seed and the number of the step alone.
    """
    started = time.perf_counter()

    def roll_out(config: Config) -> tuple[Rollout, list[list[Segment]]]:
        seed_all(config.seed * 1_000_003 + step)
        rollout = Rollout(policy, config, tools, random.Random(f"rollout {config.seed} {step}"))
        return rollout, rollout.run(questions)  # M leaves for each question

    most = len(questions) * config.group_size
    rollout, groups = policy.chunks.retry("rollout_rows", config, roll_out, largest=most)
    rewards = [
        [score(policy, leaf, question, config, tools) for leaf in leaves]
        for question, leaves in zip(questions, groups, strict=True)
    ]
    rolled_out = time.perf_counter()

    def learn(config: Config) -> tuple[list[Row], dict[str, float]]:
        rows = [row for pair in zip(groups, rewards, strict=True) for row in credit(*pair, config)]
        return rows, update(policy, optimizer, rows, config)

    lengths = [sum(len(s.token_ids) for s in leaf.path()) for group in groups for leaf in group]
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    rows, stats = policy.chunks.retry(
        "micro_batch_tokens",
        config,
        learn,
        smallest=max(lengths),
        largest=sum(lengths),
        undo=snapshot(parameters, optimizer),
    )
    metrics = {
        **step_metrics(groups, rewards),
        "short_answers": short_answers(policy, groups),
        "prefill_tokens": rollout.prefill_tokens,
        "train_tokens": sum(map(len, rows)),
        **stats,
        "seconds_rollout": rolled_out - started,
        "seconds_update": time.perf_counter() - rolled_out,
    }
    return metrics, groups, rewards


def step_metrics(groups: list[list[Segment]], rewards: list[list[Reward]]) -> dict:
    """What the trees of one step, and their rewards, look like."""
    leaves = [leaf for group in groups for leaf in group]
    all_rewards = [r for some in rewards for r in some]
    return {
        "reward": mean([r.total for r in all_rewards]),
        "accuracy": mean([r.accuracy == 1 for r in all_rewards]),
        "well_formed": mean([r.well_formed for r in all_rewards]),
        "groups": len(groups),
        "equal_groups": sum(len({r.total for r in some}) == 1 for some in rewards),
        "rollouts": len(leaves),
        **tree_counts(leaves),
        "train_tokens_unpacked": sum(len(s.token_ids) for leaf in leaves for s in leaf.path()),
    }


def short_answers(policy: Policy, groups: list[list[Segment]]) -> float:
    """Share of the trajectories that end with fewer tokens than an empty answer in its tags has."""
    empty = "<think></think><answer>\\boxed{}</answer>"
    least = len(policy.tokenizer.encode(empty, add_special_tokens=False))
    ended = [leaf for leaves in groups for leaf in leaves]
    return mean([leaf.stop in ("answer", "eos") and len(leaf.token_ids) < least for leaf in ended])


def train(
    config: Config, tools: dict[str, toolbox.Tool] | None = None, resume: Path | None = None
) -> int:
    """Roll out, reward, credit, update, log; evaluate before, now and then, and after."""
    if config.temperature == 0:
        raise UserError("--temperature 0: training needs samples that differ; it must be above 0")
    if config.top_p != 1:
        raise UserError(f"--top_p {config.top_p}: training scores the whole distribution; legal: 1")
    questions, test = load_questions(config.dataset_path), load_questions(config.eval_path)
    tools = tools or make_tools(config)
    with RunFolder(config, resume) as run:
        torch.manual_seed(config.seed)  # the fresh adapter
        policy = load_policy(dataclasses.replace(config, adapter=run.adapter), tools, True)
        refuse_long(policy, questions, config.dataset_path, config)
        refuse_long(policy, test, config.eval_path, config)
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
        run.start(policy.model, optimizer, policy.chunks, policy.prompt("question"))
        with progress_bar() as bar:
            before = look(run, policy, test, tools, bar, step=0)
            task = bar.add_task("train", total=config.steps, completed=run.step)
            bar.console.print(LOG_HEAD)
            for step in range(run.step + 1, config.steps + 1):
                if step > 1 and config.eval_every and (step - 1) % config.eval_every == 0:
                    look(run, policy, part_of(test, config.eval_part), tools, bar, step - 1)
                asked = questions_of_step(questions, step, config)
                with watched(run, policy, asked, step):
                    metrics, *trees = train_step(policy, optimizer, asked, config, tools, step)
                run.log({"step": step, **metrics})
                bar.console.print(log_line(step, metrics, remarks(run.metrics)))
                if config.record_every and (step - 1) % config.record_every == 0:
                    record(run, policy, step, asked, *trees)
                run.complete(step)
                bar.advance(task)
            bar.remove_task(task)
            after = look(run, policy, test, tools, bar, step=config.steps)
        console.print(comparison(before, after))
        console.print(run.in_words(), markup=False, soft_wrap=True)
    return 0


def look(run: RunFolder, policy: Policy, questions: list[Question], tools, bar, step: int) -> dict:
    """Accuracy sampled at temperature 1, and greedy; a resumed run may have it already."""
    figures = {}
    for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        which = {"step": step, "decoding": name}
        figures[name] = run.evaluated(**which, questions=len(questions))
        if figures[name] is None:
            config = dataclasses.replace(run.config, temperature=temperature)
            on_progress = advance(bar, f"evaluate, {name}", questions)
            with watched(run, policy, questions, step):
                records = evaluate(policy, questions, config, tools, on_progress=on_progress)
            figures[name] = summary(records)
            run.log_evaluation({**which, **figures[name]})
    sampled, greedy = figures["sampled"], figures["greedy"]
    bar.console.print(
        f"[bold]step {step}: test accuracy {sampled['accuracy']:.1%} sampled, "
        f"{greedy['accuracy']:.1%} greedy[/] ({sampled['questions']} questions)"
    )
    return figures


def part_of(questions: list[Question], per_domain: int) -> list[Question]:
    """The first few questions of every domain, for a quick look while training."""
    seen: Counter = Counter()
    some = []
    for question in questions:
        seen[question.domain] += 1
        if seen[question.domain] <= per_domain:
            some.append(question)
    return some


RECORDED = 2  # questions of a recorded step whose trees are kept


def record(run: RunFolder, policy: Policy, step: int, questions, groups, rewards) -> None:
    """The trees of some questions, to draw them later."""
    for each in list(zip(questions, groups, rewards, strict=True))[:RECORDED]:
        run.append("rollouts.jsonl", {"step": step, **tree_record(policy, *each, run.config)})


def tree_record(
    policy: Policy, question: Question, leaves: list[Segment], rewards: list[Reward], config: Config
) -> dict:
    """A question's tree as plain data: nodes name their parent by index, leaves name their node."""
    A = group_advantages([r.total for r in rewards]).tolist()
    credits = segment_advantages(leaves, torch.tensor(A), config.shared_weight)
    entropies = token_entropies(policy, leaves, config)
    index = {segment: i for i, segment in enumerate(shared_by(leaves))}
    nodes = [
        {
            "parent": index.get(segment.parent),
            "author": segment.author,
            "tokens": [policy.decode([token]) for token in segment.token_ids],
            "stop": segment.stop,
            "entropy": segment.entropy,
            "token_entropy": entropies.get(segment),
            "advantage": credits[segment].mean().item() if segment in credits else None,
            "decision": dataclasses.asdict(segment.decision) if segment.decision else None,
        }
        for segment in index
    ]
    return {
        "question": question.text,
        "answers": question.answers,
        "domain": question.domain,
        "nodes": nodes,
        "leaves": [
            {"node": index[leaf], "advantage": a, **dataclasses.asdict(r)}
            for leaf, r, a in zip(leaves, rewards, A, strict=True)
        ],
    }


@torch.no_grad()
def token_entropies(policy: Policy, leaves: list[Segment], config: Config) -> dict:
    """Entropy of every policy token in the tree, divided by ln V: segment -> list."""
    counted = {s: dict.fromkeys(leaves, 0.0) for s in shared_by(leaves) if s.author == "policy"}
    row = make_row(leaves, counted)
    batch = make_batch([row], policy.pad_id, policy.device, policy.lm.dtype)
    H = token_logprobs(policy, batch, config.temperature or 1.0)[1][0]  # (T,)
    H = (H / math.log(policy.lm.config.vocab_size)).tolist()
    found, at = {}, 0
    for segment in shared_by(leaves):
        if segment in counted:
            found[segment] = [round(h, 4) for h in H[at : at + len(segment.token_ids)]]
        at += len(segment.token_ids)
    return found


# ---- command line -------------------------------------------------------------------------


def make_tools(config: Config) -> dict[str, toolbox.Tool]:
    """The built-in tools, by name."""
    c = config
    try:
        return toolbox.default_tools(c.documents_path, c.search_results, c.search_chars)
    except (OSError, ValueError) as error:
        raise UserError(f"--documents_path {c.documents_path}: {reason(error)}") from None


def eval_command(config: Config, samples: int, pass_k: int | None, json_path: str | None) -> int:
    """Answers to a file of questions, sampled and greedy: how many are right, and what they took.

    Settings of the paper: --temperature 0.6 --top_p 0.95 --samples 5. The measures: metrics.py.
    """
    k = samples if pass_k is None else pass_k
    if not 1 <= k <= samples:
        raise UserError(f"--samples {samples} --pass_k {k}: it must be 1 <= pass_k <= samples")
    questions, tools = load_questions(config.eval_path), make_tools(config)
    policy = load_policy(config, tools, trainable=False)
    refuse_long(policy, questions, config.eval_path, config)
    if json_path:
        write_text("--json", json_path, "", mode="a")  # better refused now than after the work
    figures = {}
    with progress_bar() as bar:
        for name, temperature, n in (("sampled", config.temperature, samples), ("greedy", 0.0, 1)):
            asked = dataclasses.replace(config, temperature=temperature)
            records = evaluate(policy, questions, asked, tools, n, advance(bar, name, questions))
            figures[name] = {**summary(records, min(k, n)), "records": records}
            console.print(report_table(name, figures[name]), effort_table(figures[name]))
    if json_path:
        value = {"config": dataclasses.asdict(config), **figures}
        write_text("--json", json_path, json.dumps(value, indent=2) + "\n")
    return 0


def write_text(flag: str, path: str, text: str, mode: str = "w") -> None:
    """What a flag asked to be written; a lone surrogate in it becomes a question mark."""
    try:
        with open(path, mode, encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{flag} {path}: {reason(error)}") from None


EXAMPLES = {
    "deep_search": Question(  # four searches and the calculator
        "How many workers do the workshop of Orla Ulver and the workshop of Hilde Nyberg employ "
        "together?",
        ["63"],
        "deep_search",
    ),
    "divisible": Question(
        "What is the smallest positive whole number n for which 2^n + 3^n is divisible by 7?",
        ["3"],
        "math",
    ),
}


def show_command(
    config: Config, text: str | None, answer: str | None, example: str | None, html: str | None
) -> int:
    """Roll out one question and draw its tree: entropy, tool results, decisions, rewards."""
    question = question_to_show(config, text, answer, example)
    tools = make_tools(config)
    torch.manual_seed(config.seed)
    policy = load_policy(config, tools, trainable=False)
    if html:
        write_text("--html", html, "", mode="a")  # better refused now than after the work

    def roll_out(config: Config) -> list[list[Segment]]:
        return Rollout(policy, config, tools, random.Random(config.seed)).run([question])

    (leaves,) = policy.chunks.retry("rollout_rows", config, roll_out, largest=config.group_size)
    rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
    record = tree_record(policy, question, leaves, rewards, config)
    console.print(draw_tree(record))
    if html:
        settings = dataclasses.asdict(config)
        run = Run("show", settings, trees=[tree(record, settings)])
        write_text("--html", html, page("arpo_mini: a rollout", [run]))
    answer = ", ".join(question.answers) or "unknown; name it with --answer"
    console.print(f"answer: {one_line(answer)}", markup=False)
    return 0


def question_to_show(
    config: Config, text: str | None, answer: str | None, example: str | None
) -> Question:
    """One's own question, an example, or the deep search among the questions of eval_path."""
    if example is not None and text is not None:
        raise UserError(f"--example {example} --question {text}: name one of the two")
    if example is not None:
        return EXAMPLES[example]
    known = load_questions(config.eval_path)
    if text is not None:
        own = Question(text, [answer] if answer else [])
        return next((q for q in known if q.text == text), own)
    ready = [q for q in known if q == EXAMPLES["deep_search"]]
    return next(iter(ready + [q for q in known if q.domain == "deep_search"] + known))


def train_command(config: Config, resume: Path | None) -> int:
    """Train a policy: evaluate, roll out and update step by step, evaluate again."""
    return train(config, resume=resume)


COMMANDS = {  # name: (function, flags it has beside those of Config)
    "train": (
        train_command,
        {
            "--resume": {
                "nargs": "?",
                "const": "",
                "metavar": "DIR",
                "help": "go on with the run in this folder (default: the newest of --output_dir)",
            }
        },
    ),
    "eval": (
        eval_command,
        {
            "--samples": {"type": int, "default": 1, "help": "trajectories for each question"},
            "--pass_k": {"type": int, "help": "k of pass@k (default: samples)"},
            "--json": {"help": "write the figures and every question's record to this file"},
        },
    ),
    "show": (
        show_command,
        {
            "--question": {"help": "the question (default: a deep search of the mini-world)"},
            "--answer": {"help": "its right answer, where the question is your own"},
            "--example": {"choices": tuple(EXAMPLES), "help": "a question that is ready"},
            "--html": {"help": "write the tree to this file too, as a page for a browser"},
        },
    ),
}


def parse_command(args: list[str]) -> Callable[[], int]:
    """The command that was asked for, with its settings, ready to run."""
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if args else 2)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    command, own_flags = COMMANDS[name]
    parser = Parser(prog=f"arpo_mini.py {name}", description=command.__doc__, allow_abbrev=False)
    for flag, options in own_flags.items():
        parser.add_argument(flag, **options)
    parser.add_argument("--preset", choices=PRESETS, help="settings to start from")
    for item in dataclasses.fields(Config):
        if name == "train":
            parser.add_field(item)
        elif item.name != "dataset_path":  # there, --dataset_path names what is evaluated on
            parser.add_field(item, *(["--dataset_path"] if item.name == "eval_path" else []))
    values = parser.parse(args[1:])
    values = {**PRESETS.get(values.pop("preset"), {}), **values}  # what was typed stays
    if values.get("resume") is not None:
        values = resumed(values, Config)
    own = [values.pop(flag.removeprefix("--")) for flag in own_flags]
    config = Config(**values)
    return lambda: command(config, *own)


def main(args: list[str]) -> int:
    try:
        return parse_command(args)()
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 2
    except NonFinite as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
