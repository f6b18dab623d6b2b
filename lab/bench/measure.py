"""Instruments: medians over alternating runs, peak memory, bandwidth, where the seconds go."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import bitsandbytes
import torch
import transformers
from transformers import PreTrainedModel

import engine.memory as memory
import tools as toolbox
from engine.model import Policy


def now() -> float:
    """Seconds on a clock, after the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternately(ways: dict[str, Callable[[int], dict]], repeats: int) -> dict[str, list[dict]]:
    """The figures of every run of each way: run i of all of them, then run i + 1.

    A first run of each is thrown away: it pays for what is made once.
    """
    runs: dict[str, list[dict]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            figures = way(i)
            if i:
                runs[name].append(figures)
    return runs


def compared(runs: dict[str, list[dict]], plain: str, ours: str) -> dict:
    """Medians of both ways, and the median over the pairs of runs of ours / plain."""
    names = [name for name in runs[plain][0] if name in runs[ours][0]]
    figures = {}
    for name in names:
        pairs = [(p[name], o[name]) for p, o in zip(runs[plain], runs[ours], strict=True)]
        figures[name] = {
            "plain": statistics.median(p for p, _ in pairs),
            "ours": statistics.median(o for _, o in pairs),
            "ratio": statistics.median(o / p for p, o in pairs)
            if all(p for p, _ in pairs)
            else None,
        }
    return {"plain": plain, "ours": ours, "figures": figures}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors took at a time while it ran, beyond what was there before.

    On a GPU as its allocator counted it; on a CPU from the allocations the profiler recorded.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes, the best of several."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        started = now()
        target.copy_(source)
        seconds.append(now() - started)
    return 2 * size / min(seconds)


def frozen_bytes(lm: PreTrainedModel) -> int:
    """The frozen weights, with the scales of quantised ones: all but the adapter."""
    return memory.weight_bytes(lm) - sum(p.nbytes for p in lm.parameters() if p.requires_grad)


def decode_bytes(lm: PreTrainedModel) -> int:
    """Bytes of weights that one decode step reads: all but the rows of a separate embedding."""
    embedding = lm.get_input_embeddings().weight
    skipped = 0 if embedding is lm.get_output_embeddings().weight else embedding.nbytes
    return memory.weight_bytes(lm) - skipped


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@contextmanager
def watched(policy: Policy) -> Iterator[Counter]:
    """Counts, within it, the seconds of prefill passes, decode passes and tools.

    Also the decode steps and the bytes they could not do without: weights and cache, once a step.
    """
    seen, original, run_calls = Counter(), policy.lm.forward, toolbox.run_calls
    weights = decode_bytes(policy.lm)

    @functools.wraps(original)
    def forward(*args, **kwargs):
        started = now()
        out = original(*args, **kwargs)
        took = now() - started
        if kwargs.get("past_key_values") is None:
            return out
        if kwargs["input_ids"].shape[1] > 1:
            seen["prefill"] += took
        else:
            seen["decode_passes"] += took
            seen["decode_steps"] += 1
            seen["decode_bytes"] += weights + cache_bytes(out.past_key_values)
        return out

    def timed_calls(*args, **kwargs):
        started = now()
        results = run_calls(*args, **kwargs)
        seen["tools"] += now() - started
        return results

    policy.lm.forward = forward
    try:
        with mock.patch.object(toolbox, "run_calls", timed_calls):
            yield seen
    finally:
        policy.lm.forward = original


def machine() -> dict:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        text = info.read_text(encoding="utf-8") if info.exists() else ""
        names = [line.partition(":")[2] for line in text.splitlines() if "model name" in line]
        device = names[0].strip() if names else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }
