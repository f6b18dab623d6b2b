"""The policy: a causal language model in 4-bit with a LoRA adapter, and its tokenizer.

How a model is loaded without running its code, what it is told about the tools, and which models
are refused because they would train silently wrong. Nothing here is the algorithm.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import cached_file

import tools as toolbox
from advantage import Segment
from data.files import UserError, reason
from engine.checks import refuse_overflow, refuse_windows, require_same_logprobs
from engine.memory import Limits, OutOfMemory, fit
from engine.processes import joined

# What the libraries say about themselves is not for the reader of this screen: loading bars,
# deprecations, a padding warning that takes left padding for right padding.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)

PROMPT = Path(__file__).parent.parent / "data/system_prompt.txt"
NOTHING = "(?!)"  # a pattern that nothing has
# Stands before a chat template: one that asks for today's date gets the same prompt every day.
TODAY = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}\n"
HERE = "\ue000"  # stands in a chat template for the text that comes there
RESULT_FRAME = toolbox.result_text(toolbox.ToolResult("", ok=True)).split()
CHARS_A_TOKEN = 32  # more than a text has on average: what is longer is cut before it is counted

log = logging.getLogger("arpo_mini")


@dataclass
class Policy:
    """A causal language model with a LoRA adapter, its tokenizer, and what both need to speak."""

    model: peft.PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    system_prompt: str
    eos_ids: list[int]  # each ends what is written; first the one that the chat template writes
    closers: set[int]  # tokens whose text holds a '>': only they can complete a tag
    markers: set[int] = field(default_factory=set)  # what begins or ends something: tags and such
    spelled: re.Pattern = re.compile(NOTHING)  # the same as text, token or not
    frame: Sequence[str] = ("", "")  # the chat before and after a question
    limits: Limits = field(default_factory=Limits)  # how much of it is computed at once

    def __post_init__(self) -> None:
        self.lm = self.model.get_base_model()  # the adapter's layers sit inside it and stay live
        self.device, self.processes = self.lm.device, joined()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]  # the adapter
        self.turn_end = self.pad_id = self.eos_ids[0]  # ends a demonstration; fills up its row
        shape = self.lm.config.get_text_config()
        self.vocab_size = shape.vocab_size
        half = self.lm.dtype == torch.float16  # else its methods hand through what they are given
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if half:
            self.scaler.scale(torch.zeros(1, device=self.device))  # a step may have no gradient
            self.lm.get_output_embeddings().register_forward_hook(refuse_overflow)
        self.context = getattr(shape, "max_position_embeddings", None) or math.inf  # in tokens

    def prompt(self, question: str) -> list[int]:
        text = self.spelled.sub(toolbox.broken, toolbox.readable(question))  # its turn goes on
        return self.encode(text.join(self.frame), self.frame, special=True)

    def encode(self, text: str, frame: Sequence[str] = (), special: bool = False) -> list[int]:
        """Token ids; the spelling of a special token is one only where it may be `special`.

        Between the two parts of a `frame` no marker stays. Ids are looked at: a tokenizer that
        normalises makes a marker of other letters, too.
        """
        split = {"add_special_tokens": False, "split_special_tokens": not special}
        token_ids, *parts = [self.tokenizer.encode(part, **split) for part in (text, *frame)]
        if not frame:
            return token_ids
        before, after = [sum(token in self.markers for token in part) for part in parts]
        marks = [i for i, token in enumerate(token_ids) if token in self.markers]
        forged = {*marks[before : len(marks) - after]}
        return [token for i, token in enumerate(token_ids) if i not in forged]

    def encode_result(self, result: toolbox.ToolResult, most: int) -> list[int]:
        """A result in its tags, at most `most` tokens; " [cut]" stands where the rest was cut."""

        def beginning(n: int) -> list[int]:
            text = self.spelled.sub(toolbox.broken, result.text[:n])
            text += " [cut]" * (n < len(result.text))
            return self.encode(toolbox.result_text(replace(result, text=text)), RESULT_FRAME)

        longest = min(len(result.text), CHARS_A_TOKEN * most)
        if len(token_ids := beginning(longest)) <= most:
            return token_ids
        too_long = bisect_right(range(longest), most, key=lambda n: len(beginning(n)))
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
        """(author, text) of every segment after the prompt: no eos, nothing after a closed tag."""
        turns = []
        for segment in leaf.path()[1:]:
            text = self.decode(segment.token_ids[: -1 if segment.stop == "eos" else None])
            if segment.stop in ("tool", "answer") and (closed := toolbox.last_closed(text)):
                # One token may be `><`: what it carries beside the tag was never decided on.
                text = "".join(text.rpartition(f"</{closed[0]}>")[:2])
            turns.append((segment.author, text))
        return turns


# ---- loading ------------------------------------------------------------------------------


def load_policy(config, tools: dict[str, toolbox.Tool], trainable: bool) -> Policy:
    """The frozen model in 4-bit NF4 (or plain), with a fresh or a saved LoRA adapter on top."""
    system_prompt, doing = read_system_prompt(config.system_prompt, tools), "load"
    try:
        lm, tokenizer = load_model(config)
        ends = end_tokens(lm, tokenizer)
        refuse_windows(lm, config.max_total_tokens)
        model = add_adapter(lm, config, trainable)
        model.eval()  # no dropout anywhere: what is sampled is what is scored
        for layer in lm.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                # On such a CPU bitsandbytes would repack the weights for inference, and the packed
                # product has no backward: every gradient below it would silently be missing.
                layer.support_avx512bf16_for_cpu = False
        # A model's own generation settings (Qwen3: top_k 20) would sample from another policy.
        lm.generation_config = transformers.GenerationConfig(eos_token_id=ends)
        lm.gradient_checkpointing_enable({"use_reentrant": False})  # while `recomputed` says so
        closers = {i for token, i in tokenizer.get_vocab().items() if ">" in token}
        frame = chat_frame(tokenizer, system_prompt, config, tools)
        added = tokenizer.added_tokens_decoder.items()
        marks = {t.content: i for i, t in added if i in ends or t.special or is_tag(t.content)}
        words = " ".join(frame).replace(system_prompt, "")  # [INST] need not be a token
        words = [*marks, *re.findall(r"\[/?[A-Z_]+\]|<</?[A-Z_]+>>", words)]
        spelled = re.compile("|".join(map(re.escape, words)) or NOTHING)
        markers = {*ends, *marks.values()}
        policy = Policy(model, tokenizer, system_prompt, ends, closers, markers, spelled, frame)
        doing = "compute trees with"
        require_same_logprobs(policy, config)
        policy.limits = fit(config, lm)
    except torch.OutOfMemoryError as error:
        words = f"--model_name {config.model_name} does not fit into memory ({reason(error)})"
        raise OutOfMemory(f"{words}; --load_in_4bit true or a smaller model takes less") from None
    except Exception as error:  # deliberately everything: a folder may hold anything
        names = f"--model_name {config.model_name} --adapter {config.adapter}"
        legal = "; --trust_remote_code true runs it" if "trust_remote_code" in str(error) else ""
        if re.search("Repo id|couldn't connect|does not appear to have", str(error)):
            legal = "; legal: a folder, or owner/name on the hub"
        if config.load_in_4bit and re.search("bitsandbytes|4.?bit", str(error)):
            legal = "; --load_in_4bit false does without it"  # as on some systems' CPUs
        raise UserError(f"cannot {doing} {names}: {reason(error)}{legal}") from None
    if config.max_total_tokens > policy.context:
        words = f"the model's context ends at {policy.context} tokens, and so do trajectories"
        log.warning("--max_total_tokens %d: %s", config.max_total_tokens, words)
    return policy


def load_model(config) -> tuple:
    """The model and its tokenizer. What comes with them runs only with `trust_remote_code`."""
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    dtype = number_type(config.dtype, device)
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    name, trust = config.model_name, {"trust_remote_code": config.trust_remote_code}
    lm, found = transformers.AutoModelForCausalLM.from_pretrained(
        name,
        **trust,
        config=transformers.AutoConfig.from_pretrained(name, **trust),
        attn_implementation="sdpa",  # and not a kernel of the hub, which a config can name
        use_safetensors=True,  # nothing is unpickled
        output_loading_info=True,
        dtype=dtype,
        device_map=device,
        quantization_config=nf4 if config.load_in_4bit else None,
    )
    if found["missing_keys"]:
        raise ValueError(f"the model has no {', '.join(sorted(found['missing_keys'])[:3])}")
    return lm, transformers.AutoTokenizer.from_pretrained(name, padding_side="left", **trust)


def number_type(name: str, device: str) -> torch.dtype:
    """Of --dtype. The adapter and all that is made of the logits are float32 whatever it says."""
    if name == "auto" and device != "cpu":  # older cards only emulate bfloat16, slowly
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float16"
    return getattr(torch, name.replace("auto", "float32"))


# What an adapter may say of itself and add no more than B A x to the W x of a layer.
PLAIN_LORA = """r lora_alpha lora_dropout use_rslora use_dora rank_pattern alpha_pattern task_type
    target_modules target_parameters exclude_modules modules_to_save layers_to_transform revision
    layers_pattern fan_in_fan_out inference_mode auto_mapping base_model_name_or_path peft_version
"""


def add_adapter(lm, config, trainable: bool) -> peft.PeftModel:
    """A fresh LoRA adapter, or a folder's with all the weights that it names; it runs no code."""
    if not (folder := config.adapter):
        sizes = {"r": config.lora_rank, "lora_alpha": 2 * config.lora_rank}
        lora = peft.LoraConfig(**sizes, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(lm, lora)
        lora.target_modules = sorted(lora.target_modules)  # a set: its order would change each run
        return model
    said = peft.LoraConfig.from_json_file(cached_file(folder, "adapter_config.json"))
    usual = vars(peft.LoraConfig())
    odd = {k for k, v in said.items() if v and v not in (usual.get(k), "gaussian")}
    if odd := odd - {*PLAIN_LORA.split()}:
        raise ValueError(f"the adapter is not a plain LoRA but has {', '.join(sorted(odd))}")
    known = {k: v for k, v in said.items() if k in usual}  # a newer peft writes more
    lora = peft.LoraConfig(**known | {"inference_mode": not trainable})
    if not all(alpha > 0 for alpha in (lora.lora_alpha, *(lora.alpha_pattern or {}).values())):
        raise ValueError("its lora_alpha must be above 0: else the adapter adds nothing")
    weights = load_file(cached_file(folder, "adapter_model.safetensors"))
    model = peft.PeftModelForCausalLM(lm, lora)
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or foreign:  # peft would write a foreign one over the base model, or drop it
        raise ValueError(f"missing adapter keys: {missing[:3]}, foreign ones: {foreign[:3]}")
    peft.set_peft_model_state_dict(model, weights)
    return model


def is_tag(text: str) -> bool:
    """A bracket of any script, but no plain one, or a bar, and a word after it: [INST], |x|."""
    signs, kinds = "<|\uff5c\u25c1", ("Ps", "Pi")
    opens = [x in signs or (x != "(" and unicodedata.category(x) in kinds) for x in text]
    return True in opens and re.search(r"\w", text[opens.index(True) :]) is not None


def read_system_prompt(path: str | None, tools: dict[str, toolbox.Tool]) -> str:
    """Ours, or that of the user's file, with the registered tools in the place of {tools}."""
    described = "\n".join(f"<{t.name}>{t.description}</{t.name}>" for t in tools.values())
    try:
        text = (PROMPT if path is None else Path(path)).read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--system_prompt {path}: {reason(error)}") from None
    return text.replace("{tools}", described)


# ---- the chat template ------------------------------------------------------


def end_tokens(lm, tokenizer) -> list[int]:
    """All tokens that end a turn, first the one that the chat template writes."""
    V, ids = lm.config.get_text_config().vocab_size, lm.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])]
    ids = [token for token in ids if token is not None]
    turns = [{"role": role, "content": HERE} for role in ("user", "assistant")]
    text = "".join(tokenizer.apply_chat_template(turns, tokenize=False).split(HERE)[2:])
    special = [*ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)]
    after = [t for t in tokenizer.encode(text, add_special_tokens=False) if t in special]
    ids = after[:1] + ids
    if not ids or not all(type(token) is int and token in range(V) for token in ids):
        raise ValueError(f"its eos_token_id is {ids}; legal: tokens from 0 to {V - 1}")
    return list(dict.fromkeys(ids))


def chat_frame(tokenizer, system_prompt: str, config, tools: dict[str, toolbox.Tool]) -> list[str]:
    """The chat before a question, and after it up to where the policy begins to write.

    Where the template drops or refuses the system role, its text begins the user's turn. Not so for
    our text and a tokenizer with all its tags as tokens: that model was made for it.
    """

    def render(**said: str) -> list[str]:
        chat = [{"role": role, "content": text} for role, text in said.items()]
        given = {"add_generation_prompt": True, "enable_thinking": config.thinking}
        given |= {"chat_template": TODAY + tokenizer.get_chat_template()}
        text = tokenizer.apply_chat_template(chat, tokenize=False, **given)
        # Some templates open the think block for the model: here it is the policy's to write.
        return re.sub(r"<think>\s*\Z", "", text).split(HERE)

    tags = {f"<{slash}{name}>" for name in (*toolbox.RESERVED, *tools) for slash in ("", "/")}
    try:
        frame = render(system=system_prompt, user=HERE)
        heard = " ".join(system_prompt.split()) in " ".join("".join(frame).split())
        heard |= config.system_prompt is None and tags <= tokenizer.get_vocab().keys()
    except Exception:  # deliberately everything: a template is a program
        heard = False
    if not heard:
        words = "its chat template leaves the system prompt out: it begins the user's turn"
        log.warning("--model_name %s: %s", config.model_name, words)
        frame = render(user=f"{system_prompt}\n\n{HERE}")
    if len(frame) != 2:
        raise ValueError("its chat template does not hold the question once")
    return frame
