"""What fits which card, from the shapes of a model alone: nothing is loaded, no GPU is needed.

A run is planned as engine/memory plans it: how many paths are decoded side by side, and how many
tokens one backward pass takes. In bytes, b of them for a number (4 with --dtype float32, else 2),
and with an adapter of rank r:

    weights   0.5 + 4 / 64 a parameter of a linear layer (NF4, a float32 scale for every 64; else
              b), b for embedding, head and norms; a tied head is no second copy
    adapter   16 r (in + out) of every linear layer: float32 weight, gradient, two moments of AdamW
    rollout   memory.path_bytes of every path, and the scores that one call of `generate` returns
    update    what memory.token_bytes keeps of every token, b T T for the mask of a tree of T
              tokens, and the larger of what a layer takes in passing and the logits of one chunk
    peak      weights + adapter + max(rollout, update)
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, Qwen3Config

from app.config import PRESETS, Config
from data.files import UserError, reason
from engine import memory
from engine.memory import GIB
from engine.writer import STEPS

PUBLISHED = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
NAMES = [name for name in PUBLISHED if "/" in name]
SHORT = {name.partition("/")[2].lower(): name for name in NAMES}  # qwen3-4b -> Qwen/Qwen3-4B
CARDS = ("8gb", "12gb", "16gb", "24gb")


def model_config(name: str) -> PretrainedConfig:
    """Of a published shape (either spelling) or of a folder; ValueError names the legal ones."""
    published = SHORT.get(name.lower(), name)
    if published in NAMES:
        return Qwen3Config(**PUBLISHED["common"], **PUBLISHED[published])
    if not (Path(name) / "config.json").is_file():
        raise ValueError(f"choose one of {', '.join(NAMES)}, or a folder with config.json")
    return AutoConfig.from_pretrained(name, local_files_only=True)


def empty(shape: PretrainedConfig) -> nn.Module:
    """A model of this shape without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape)


def linear_layers(lm: nn.Module) -> list[nn.Linear]:
    """Every layer that is quantised and adapted: all linear ones but the head."""
    head = lm.get_output_embeddings()
    return [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]


def weight_bytes(lm: nn.Module, load_in_4bit: bool, b: int) -> int:
    """b bytes a parameter; NF4: two parameters a byte, a scale for every 64."""
    sizes = [layer.weight.numel() for layer in linear_layers(lm)]
    other = sum(p.numel() for p in lm.parameters()) - sum(sizes)  # a tied head is there once
    nf4 = sum(math.ceil(size / 2) + 4 * math.ceil(size / 64) for size in sizes)
    return b * other + (nf4 if load_in_4bit else b * sum(sizes))


def adapter_size(lm: nn.Module, rank: int) -> int:
    """Parameters of a LoRA adapter."""
    return sum(rank * (layer.in_features + layer.out_features) for layer in linear_layers(lm))


def predict(lm, config: Config, rows: int, tokens: int, recompute: bool, b: int = 2) -> dict:
    """GiB by part: `rows` paths side by side, `tokens` a backward pass, b bytes a number."""
    shape, V = lm.config, lm.config.vocab_size
    kept, passing = memory.token_bytes(shape, b, recompute)
    logits = memory.LOGITS * 4 * V * min(tokens, max(1, memory.HEAD_BYTES // (4 * V)))
    weights = weight_bytes(lm, config.load_in_4bit, b)
    adapter = 16 * adapter_size(lm, config.lora_rank)
    scores = min(memory.SCORES_BYTES, STEPS * 4 * rows * V)  # of one call of `generate`
    rollout = rows * memory.path_bytes(shape, b, config.max_total_tokens) + scores
    # the head is done when the layers pass back
    update = tokens * kept + b * tokens**2 + max(logits, tokens * passing)
    parts = {"weights": weights, "adapter": adapter, "rollout": rollout, "update": update}
    parts["peak"] = weights + adapter + max(rollout, update)
    return {f"{part} GiB": size / GIB for part, size in parts.items()}


def planned(lm: nn.Module, config: Config) -> dict:
    """What a run with these settings computes at once, and the memory that takes."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16  # as on a GPU
    b, longest = dtype.itemsize, config.max_total_tokens
    size = weight_bytes(lm, config.load_in_4bit, b)
    frozen = torch.empty(size, dtype=torch.uint8, device="meta")
    adapter = torch.empty(adapter_size(lm, config.lora_rank), device="meta", requires_grad=True)
    cpu = {"device": torch.device("cpu"), "dtype": dtype}  # no GPU is asked
    loaded = SimpleNamespace(parameters=lambda: [frozen, adapter], config=lm.config, **cpu)
    limits = memory.fit(config, loaded)
    fitted, rollouts = limits.fitted(config), config.questions_per_step * config.group_size
    rows = min(fitted.rollout_rows, rollouts)
    # a trajectory is never cut
    tokens = max(longest, min(fitted.micro_batch_tokens, rollouts * longest))
    at_once = {"paths": rows, "tokens a pass": tokens, "recomputed": limits.recompute}
    parts = predict(lm, config, *at_once.values(), b)
    fits = config.memory_gb is None or parts["peak GiB"] <= config.memory_gb
    return {**at_once, **parts, "limit GiB": config.memory_gb, "fits": fits}


def run(config: Config, typed: dict) -> dict:
    """The plan of the settings as they are, and of each card's preset with what was typed."""
    try:
        lm = empty(model_config(config.model_name))
        plans = {"as set": planned(lm, config)}
    except Exception as error:  # deliberately everything: a config.json may hold anything
        raise UserError(f"--model_name {config.model_name}: {reason(error)}") from None
    for card in CARDS:
        cap = {"memory_gb": PRESETS[card]["memory_gb"]}
        plans[card] = planned(lm, Config(**PRESETS[card] | typed | cap))
    return {"model_name": config.model_name, "figures": plans}
