"""The predicted peak memory of a model, part by part, from its configuration alone.

b bytes a number is computed in (2: bfloat16), D hidden size, F width of the MLP, L layers, V words,
r rank of the adapter, R rows decoded side by side, C columns of their cache, W tokens that each
reads at once (a result), T tokens of one backward pass. Bytes:

    weights   linear layers     0.5 + 4 / 64 a parameter: NF4, a float32 scale for every 64; else b
              embedding, head   b V D, twice where the head is not tied to it
              norms             b a parameter
    adapter   LoRA and AdamW    16 r (in + out) of every linear layer: float32 weight, gradient and
                                two moments
    rollout   KV cache          R C 2 L (key-value heads) (head size) b, and a layer of it twice
              scores            R V 4, as often as memory.SCORES says: one step is sampled
              reading           R W ((4 b + 4) F + 4 b D): the MLP of one layer; R W C for the mask
    update    activations       T memory.kept_bytes: all layers, or (gradient checkpointing) the
                                inputs of all
              mask of the tree  T T (b + 1)
              head or layer     the larger of memory.LOGITS 4 V (chunk), the head applied to one
                                chunk of what the policy wrote, and T memory.passing_bytes, the
                                backward pass in one layer
              one weight        b (in) (out) of the largest linear layer, dequantised

    peak = weights + adapter + max(rollout, update)

Beside it the CUDA context and fragmentation need room: RESERVE_GIB of a card is left to them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from rich import box
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

import engine.memory as memory
from app.config import PRESETS, Config
from app.screen import console

from .shapes import model_config

CARDS = ("8gb", "12gb", "16gb", "24gb")
RESERVE_GIB = 0.4  # CUDA context, libraries, fragmentation
BLOCK = 64  # weights that share a scale, which is a float32 number


@dataclass(frozen=True)
class Sizes:
    """What is computed at once."""

    rows: int  # R
    columns: int  # C
    read: int  # W
    tokens: int  # T
    scored: int  # those among them that the policy wrote
    recompute: bool  # gradient checkpointing


@dataclass(frozen=True)
class Counts:
    """Parameters by the way they are stored, counted on the real class without its weights."""

    linear: list[tuple[int, int]]  # (in, out) of every layer that is quantised and adapted
    embedding: int  # embedding and head; a tied head is not counted again
    other: int  # norms

    @property
    def total(self) -> int:
        return sum(a * b for a, b in self.linear) + self.embedding + self.other


def count(shape: PretrainedConfig) -> Counts:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(shape)
    head = lm.get_output_embeddings()
    modules = [m for m in lm.modules() if isinstance(m, nn.Linear) and m is not head]
    linear = [(m.in_features, m.out_features) for m in modules]
    outer = {id(w): w.numel() for w in (lm.get_input_embeddings().weight, head.weight)}
    total = sum(p.numel() for p in lm.parameters())
    quantised = sum(m.weight.numel() for m in modules)
    return Counts(linear, sum(outer.values()), total - quantised - sum(outer.values()))


def nf4_bytes(parameters: int) -> int:
    """Two parameters a byte, and the scale of every block, without double quantisation."""
    return -(-parameters // 2) + 4 * -(-parameters // BLOCK)


def weights(counts: Counts, load_in_4bit: bool, b: int) -> dict[str, int]:
    sizes = [a * c for a, c in counts.linear]
    return {
        "linear layers": sum(map(nf4_bytes, sizes)) if load_in_4bit else b * sum(sizes),
        "embedding, head": b * counts.embedding,
        "norms": b * counts.other,
    }


def adapter_parameters(counts: Counts, rank: int) -> int:
    return sum(rank * (a + c) for a, c in counts.linear)


def rollout(shape: PretrainedConfig, sizes: Sizes, b: int) -> dict[str, int]:
    D, F, V = shape.hidden_size, shape.intermediate_size, shape.vocab_size
    cache = sizes.rows * sizes.columns * memory.cache_bytes(shape, b)
    layer = (4 * b + 4) * F + 4 * b * D
    return {
        "KV cache": cache + cache // shape.num_hidden_layers,
        "scores of a step": memory.SCORES * 4 * sizes.rows * V,
        "reading a result": sizes.rows * sizes.read * (layer + sizes.columns),
    }


def update(
    shape: PretrainedConfig, counts: Counts, sizes: Sizes, b: int, load_in_4bit: bool
) -> dict[str, int]:
    V, T = shape.vocab_size, sizes.tokens
    chunk = min(sizes.scored, memory.head_chunk(V))
    how = "checkpointed" if sizes.recompute else "all kept"
    head = memory.LOGITS * 4 * V * chunk
    return {
        f"activations, {how}": T * memory.kept_bytes(shape, b, sizes.recompute),
        "mask of the tree": T * T * (b + 1),
        "head or layer": max(head, T * memory.passing_bytes(shape, b, sizes.recompute)),
        "one weight": b * max(a * c for a, c in counts.linear) if load_in_4bit else 0,
    }


def predict(
    shape: PretrainedConfig, counts: Counts, config: Config, sizes: Sizes, b: int = 2
) -> dict[str, dict[str, int]]:
    """Bytes by part; `peak` is what they come to at most at one time."""
    parts = {
        "weights": weights(counts, config.load_in_4bit, b),
        "adapter": {"LoRA and AdamW": 16 * adapter_parameters(counts, config.lora_rank)},
        "rollout": rollout(shape, sizes, b),
        "update": update(shape, counts, sizes, b, config.load_in_4bit),
    }
    sums = {name: sum(part.values()) for name, part in parts.items()}
    always = sums["weights"] + sums["adapter"]
    peaks = {name: always + sums[name] for name in ("rollout", "update")}
    return parts | {"peak": peaks | {"both": max(peaks.values())}}


# ---- what a configuration asks for, and what a card takes ---------------------------------


def sizes_asked(config: Config) -> Sizes:
    """The most that these settings compute at once."""
    rollouts = config.questions_per_step * config.group_size
    tokens = min(int(config.micro_batch_tokens), rollouts * config.max_total_tokens)
    return Sizes(
        rows=min(int(config.rollout_rows), rollouts),
        columns=config.max_total_tokens,
        # about 4 characters a token
        read=min(config.search_results * config.search_chars // 4 + 16, config.max_total_tokens),
        tokens=tokens,
        scored=tokens,
        recompute=bool(config.gradient_checkpointing),
    )


def weightless(shape: PretrainedConfig, counts: Counts, config: Config) -> SimpleNamespace:
    """What memory.fit asks of a model, without its weights."""
    size = sum(weights(counts, config.load_in_4bit, b=2).values())
    frozen = torch.empty(size, dtype=torch.uint8, device="meta")
    adapter = torch.empty(adapter_parameters(counts, config.lora_rank), device="meta")
    return SimpleNamespace(
        parameters=lambda: [frozen, adapter.requires_grad_()],
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        config=shape,
    )


def settled(
    shape: PretrainedConfig, counts: Counts, config: Config, memory_gb: float, usable: float
) -> Sizes:
    """What a run comes to: memory.fit within `memory_gb`, then halves while `usable` is too little.

    Both in GiB. A trajectory is never cut, so the result may still not fit.
    """
    config = dataclasses.replace(config, memory_gb=memory_gb)
    chunks = memory.fit(config, weightless(shape, counts, config))
    while True:
        chunks.micro_batch_tokens = max(chunks.micro_batch_tokens, config.max_total_tokens)
        sizes = sizes_asked(chunks.fitted(config))
        peak = predict(shape, counts, config, sizes)["peak"]
        if peak["rollout"] > usable * memory.GIB and sizes.rows > 1:
            chunks.rollout_rows = sizes.rows // 2
        elif peak["update"] > usable * memory.GIB and sizes.tokens > config.max_total_tokens:
            chunks.micro_batch_tokens = sizes.tokens // 2
        else:
            return sizes


def on_card(shape: PretrainedConfig, counts: Counts, config: Config, card: str) -> dict:
    usable = int(card.removesuffix("gb")) - RESERVE_GIB
    sizes = settled(shape, counts, config, PRESETS[card]["memory_gb"], usable)
    peak = predict(shape, counts, config, sizes)["peak"]["both"]
    found = {"usable_gib": usable, "fits": peak <= usable * memory.GIB, "peak_bytes": peak}
    return found | dataclasses.asdict(sizes)


def run(config: Config) -> dict:
    """The plan of the settings as they are, cut to --memory_gb where that is given."""
    shape = model_config(config.model_name)
    counts, limit = count(shape), config.memory_gb
    sizes = settled(shape, counts, config, limit, limit) if limit else sizes_asked(config)
    either = {
        name: sizes.tokens * memory.kept_bytes(shape, 2, recompute)
        for name, recompute in (("all kept", False), ("checkpointed", True))
    }
    return {
        "model_name": config.model_name,
        "parameters": counts.total,
        "load_in_4bit": config.load_in_4bit,
        "sizes": dataclasses.asdict(sizes),
        "parts": predict(shape, counts, config, sizes),
        "activations": either,
        "cards": {card: on_card(shape, counts, config, card) for card in CARDS},
    }


def show(report: dict) -> None:
    sizes, parts = report["sizes"], dict(report["parts"])
    peak = parts.pop("peak")
    bits = "4-bit" if report["load_in_4bit"] else "bfloat16"
    console.print(
        f"{report['model_name']}, {report['parameters'] / 1e9:.2f}B parameters in {bits}: "
        f"{sizes['rows']} rows of {sizes['columns']} tokens, {sizes['tokens']} tokens a backward "
        "pass",
        markup=False,
    )
    table = Table("", "GiB", box=box.SIMPLE_HEAD)
    for name, part in parts.items():
        for line, size in part.items():
            table.add_row(f"{name}: {line}", f"{size / memory.GIB:8.3f}")
    for name, size in report["activations"].items():
        if f"activations, {name}" not in parts["update"]:
            table.add_row(f"[dim](activations, {name})[/]", f"[dim]{size / memory.GIB:8.3f}[/]")
    for name, size in peak.items():
        words = "peak" if name == "both" else f"peak of the {name}"
        table.add_row(f"[bold]{words}[/]", f"[bold]{size / memory.GIB:8.3f}[/]")
    console.print(table)
    for card, figures in report["cards"].items():
        console.print(f"{card:>5}: {card_words(figures)}", markup=False)


def card_words(figures: dict) -> str:
    peak = f"{figures['peak_bytes'] / memory.GIB:.2f} of {figures['usable_gib']:g} GiB"
    recompute = ", gradient checkpointing" if figures["recompute"] else ""
    at_once = f"{figures['rows']} rows, {figures['tokens']} tokens a backward pass{recompute}"
    return f"{'fits' if figures['fits'] else 'does not fit'}: {peak} with {at_once}"
