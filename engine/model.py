"""The policy: a causal language model in 4-bit with a LoRA adapter, and its tokenizer.

How a model is loaded without running its code, what it is told about the tools, and which models
are refused because they would train silently wrong. Nothing here is the algorithm.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import warnings
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# It reports a missing optional kernel while it is imported (by peft).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

import tools as toolbox
from advantage import Segment
from data.files import UserError, reason
from engine.memory import Limits, OutOfMemory, fit

# What the libraries say about themselves is not for the reader of this screen: loading bars,
# deprecations, a padding warning that takes left padding for right padding.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

SYSTEM_PROMPT = """\
Answer the question. Think first; then either call one tool and wait for its result, or answer.
To call a tool, write <think>why</think> and then one of
{tools}
Its result follows between <result> and </result>. You may call tools several times.
To answer, write <think>why</think><answer>\\boxed{the answer alone}</answer> and stop."""

CHARS_A_TOKEN = 32  # more than a text has on average: what is longer is cut before it is counted

log = logging.getLogger("arpo_mini")


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
    limits: Limits = field(default_factory=Limits)  # how much of it is computed at once

    def __post_init__(self) -> None:
        self.lm = self.model.get_base_model()  # the adapter's layers sit inside it and stay live
        self.device = self.lm.device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]  # the adapter
        shape = self.lm.config.get_text_config()
        self.vocab_size = shape.vocab_size
        # Tokens of the longest text that the model was made for.
        self.context = getattr(shape, "max_position_embeddings", None) or math.inf

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

    def why_ended(self, token_ids: list[int]) -> str | None:
        """Why a policy segment is complete: eos, tool or answer; None: it is not."""
        if token_ids[-1] in self.eos_ids:
            return "eos"
        closed = token_ids[-1] in self.closers
        return toolbox.policy_stop(self.decode(token_ids)) if closed else None

    def turns(self, leaf: Segment) -> list[tuple[str, str]]:
        """(author, text) of every segment of a trajectory after its prompt, without the eos."""
        turns = []
        for segment in leaf.path()[1:]:
            token_ids = segment.token_ids[:-1] if segment.stop == "eos" else segment.token_ids
            turns.append((segment.author, self.decode(token_ids)))
        return turns


# ---- loading ------------------------------------------------------------------------------


def load_policy(config, tools: dict[str, toolbox.Tool], trainable: bool) -> Policy:
    """The frozen model in 4-bit NF4 (or plain), with a fresh or a saved LoRA adapter on top."""
    system_prompt = read_system_prompt(config.system_prompt, tools)
    try:
        lm, tokenizer = load_model(config)
        saved = load_adapter(lm, config.adapter, trainable) if config.adapter else None
    except torch.OutOfMemoryError as error:
        words = f"does not fit into memory ({reason(error)})"
        lighter = "--load_in_4bit true or a smaller model takes less"
        raise OutOfMemory(f"--model_name {config.model_name} {words}; {lighter}") from None
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
        limits=fit(config, lm),
    )
    if config.max_total_tokens > policy.context:
        words = f"the model's context ends at {policy.context} tokens, and so do trajectories"
        log.warning("--max_total_tokens %d: %s", config.max_total_tokens, words)
    return policy


def load_model(config) -> tuple[transformers.PreTrainedModel, Any]:
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


def refuse_long(policy: Policy, questions: list, path: str, config) -> None:
    """A prompt that leaves no room to answer is named before the work begins: UserError."""
    room = min(config.max_total_tokens, policy.context)
    for number, question in enumerate(questions, start=1):
        tokens = len(policy.prompt(question.text))
        if tokens >= room:
            limit = "no room to answer within --max_total_tokens and the model's context"
            raise UserError(
                f"{path}, question {number}: a prompt of {tokens} tokens leaves {limit} ({room})"
            )


def read_system_prompt(path: str | None, tools: dict[str, toolbox.Tool]) -> str:
    """Ours, or that of the user's file, with the registered tools in the place of {tools}."""
    text = SYSTEM_PROMPT
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
    if odd:  # log-probs come from the bare head, and a tree is longer than one path
        raise UserError(f"--model_name {name} has {', '.join(odd)}, which is not supported here")
