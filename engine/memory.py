"""What fits: how much is computed at once, and what happens when that was too much.

An estimate from the shapes of the model says how many paths can be decoded side by side and how
many tokens one backward pass can hold (`fit`). Where the estimate is wrong, `Limits.retry` halves
what is computed at once and repeats the work. Nothing here changes what is computed.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch.utils._pytree import tree_map_only

from data.files import UserError

GIB = 2**30
SCORES_BYTES = 2**28  # of the (R, V) float32 scores that one call of `generate` returns
HEAD_BYTES = 2**27  # of the float32 logits that exist at the same time in the update
SCORES = 6  # (R, V) float32 tensors alive while one step is sampled and measured
LOGITS = 3  # (chunk, V) float32 tensors alive while the head is applied to a chunk, either way
USABLE = 0.9  # of the memory: blocks of different sizes leave gaps

log = logging.getLogger("arpo_mini")


class OutOfMemory(UserError):
    """Not even the smallest amount of work fits."""


# ---- the estimate -------------------------------------------------------------------------


def head_dim(shape) -> int:
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def path_bytes(shape, dtype_bytes: int, columns: int) -> int:
    """One row of the rollout: its cache (a layer of it twice, where it grows) and its scores.

    `shape` is the config of the model, or of the text model in it.
    """
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    layer = 2 * columns * heads * head_dim(shape) * dtype_bytes  # keys and values
    return (shape.num_hidden_layers + 1) * layer + SCORES * 4 * shape.vocab_size


def token_bytes(shape, dtype_bytes: int, recompute: bool) -> tuple[int, int]:
    """One token of the update: what the backward pass keeps, and what passing a layer takes beside.

    A layer is the float32 inputs of the norms, q, k, v and the output of the attention, three
    products of the MLP, and the inputs of seven LoRA adapters, copies unless all is float32. With
    `recompute` only the input of each is kept, and the layer being passed is made again; half of it
    are gradients, either way.
    """
    D, F = shape.hidden_size, getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    heads = shape.num_attention_heads * head_dim(shape)
    copies = 5 if dtype_bytes < 4 else 2
    norms, adapters = 4 * (2 * D + 2 * heads), 4 * (copies * D + heads + F)
    layer = norms + dtype_bytes * (4 * heads + 3 * F) + adapters
    kept = shape.num_hidden_layers * (dtype_bytes * D if recompute else layer)
    return kept, layer // 2 + (layer if recompute else 0)


def weight_bytes(lm: torch.nn.Module) -> int:
    """All weights. Two of NF4 are a byte, and 64 of them have a float32 scale: an eighth more."""
    return sum(p.nbytes * 9 // 8 if p.dtype == torch.uint8 else p.nbytes for p in lm.parameters())


# ---- what is computed at once -------------------------------------------------------------


@dataclasses.dataclass
class Limits:
    """The most that is computed at once: caps on two settings; are layers computed twice?

    Whoever computes says in `in_use` which of the two it stands under, and how much it takes.
    """

    rollout_rows: float = math.inf
    micro_batch_tokens: float = math.inf
    recompute: bool = False
    in_use: tuple[str, int] = ("rollout_rows", 1)

    def fitted(self, config):
        """The same settings, with what is computed at once no larger than fits."""
        rows = min(config.rollout_rows, self.rollout_rows)
        tokens = min(config.micro_batch_tokens, self.micro_batch_tokens)
        return dataclasses.replace(config, rollout_rows=rows, micro_batch_tokens=tokens)

    def retry(self, config, work: Callable[[Any], Any], undo: Callable[[], None] = lambda: None):
        """work(fitted settings). When the memory runs out: `undo`, half at once, the same again.

        The smaller limit is kept for what follows. OutOfMemory where nothing smaller is left.
        """
        while True:
            try:
                return work(self.fitted(config))
            except RuntimeError as error:  # a CPU's allocator has no error of its own
                words = str(error).partition("\n")[0]
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in words:
                    raise
            undo()
            # Here the frames of the failed attempt, and their tensors, are gone.
            clear_device_cache(garbage_collection=True)
            self.shrink(words)

    def shrink(self, words: str) -> None:
        name, size = self.in_use
        if size > 1 and size <= getattr(self, name):  # else it is one trajectory already
            setattr(self, name, size // 2)
            log.warning("out of memory: --%s %d -> %d, and the same again", name, size, size // 2)
        elif name == "micro_batch_tokens" and not self.recompute:
            self.recompute = True
            log.warning("out of memory: layers are computed twice from here on, and the same again")
        else:
            least = f"out of memory with --{name} {size}, the smallest there is ({words})"
            smaller = "--max_total_tokens, --max_segment_tokens, --lora_rank or --model_name"
            raise OutOfMemory(f"{least}; it takes a smaller {smaller}")


def fit(config, lm: torch.nn.Module) -> Limits:
    """How much to compute at once, so that the run stays within `memory_gb`.

    What is left beside the weights is shared out by the shapes: to the rollout in rows of
    `max_total_tokens` columns, to the update in tokens, each with its line of the (T, T) mask.
    """
    total = memory_limit(config.memory_gb, lm.device)
    if total is None:
        return Limits()
    # Of each parameter of the adapter, in float32: its gradient and AdamW's two moments.
    trained = 12 * sum(p.numel() for p in lm.parameters() if p.requires_grad)
    b, shape = lm.dtype.itemsize, lm.config.get_text_config()
    left = USABLE * total - weight_bytes(lm) - trained
    rows = (left - SCORES_BYTES) // path_bytes(shape, b, config.max_total_tokens)
    logits = 4 * shape.vocab_size  # of a token
    left -= LOGITS * logits * min(config.micro_batch_tokens, max(1, HEAD_BYTES // logits))

    def tokens(recompute: bool) -> int:
        """The largest T with T * each + b * T * T <= left."""
        each = sum(token_bytes(shape, b, recompute))
        return int((math.sqrt(each * each + 4 * b * max(0, left)) - each) / (2 * b))

    # Recomputing costs a third more time: only where a whole trajectory would not fit without.
    recompute = tokens(recompute=False) < config.max_total_tokens
    return Limits(max(1, int(rows)), max(1, tokens(recompute)), recompute)


def memory_limit(memory_gb: float | None, device: torch.device) -> float | None:
    """Bytes this process may use; None: no limit. On a GPU the limit is also enforced."""
    if device.type != "cuda":
        return None if memory_gb is None else memory_gb * GIB
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)  # other programs have the rest
    if memory_gb is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory_gb * GIB / total), device)
        there = min(there, memory_gb * GIB)
    return min(there, total * torch.cuda.get_per_process_memory_fraction(device))


# ---- to try again -------------------------------------------------------------------------


def snapshot(policy, optimizer) -> Callable[[], None]:
    """Keeps what an update changes on the CPU, the scale of the loss too: call it to restore it.

    An update that runs out of memory may have taken some of its optimizer steps already.
    """
    both = policy.parameters, optimizer.state_dict()
    weights, state = tree_map_only(torch.Tensor, lambda x: x.detach().to("cpu", copy=True), both)
    scaler = copy.deepcopy(vars(policy.scaler))

    def restore() -> None:
        optimizer.zero_grad()
        for parameter, value in zip(policy.parameters, weights, strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(state))  # it takes what it is given as its own
        vars(policy.scaler).update(copy.deepcopy(scaler))

    return restore
