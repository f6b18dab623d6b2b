"""Every shortcut against the plain way, in one run: ratios, and where the time goes."""

from __future__ import annotations

import dataclasses
import random

import torch
from rich import box
from rich.table import Table
from transformers import GenerationConfig, LogitsProcessor

import arpo_mini
import tools as toolbox
from advantage import Reward, Segment
from arpo_mini import Rollout, credit, update
from engine.memory import OutOfMemory
from engine.model import Policy
from app.config import Config
from app.screen import console

from .job import Job, forced, mini_world, size_of
from .measure import (
    alternately,
    bandwidth,
    compared,
    frozen_bytes,
    machine,
    now,
    peak_bytes,
    watched,
)
from .shapes import model_config

Groups = list[list[Segment]]


def with_config(job: Job, **changes) -> Job:
    return dataclasses.replace(job, config=dataclasses.replace(job.config, **changes))


def grpo(job: Job) -> Job:
    """The same job with every path begun at the question."""
    return with_config(job, initial_rollouts=job.config.group_size, branch_rule="none")


def roll_out(job: Job, step: int) -> tuple[Groups, Rollout]:
    torch.manual_seed(step)
    rollout = Rollout(job.policy, job.config, job.tools, random.Random(step))
    return rollout.run(job.asked(step)), rollout


def train_step(job: Job, step: int) -> dict:
    arguments = (job.policy, job.optimizer, job.asked(step), job.config, job.tools, step)
    return arpo_mini.train_step(*arguments)[0]


# ---- 1. the cache is kept over turns ------------------------------------------------------


class Recite(LogitsProcessor):
    """Leaves no choice but the recorded token."""

    def __init__(self, target: torch.Tensor, width: int):
        self.target, self.width = target, width  # (R, S)

    def __call__(self, input_ids, scores):
        said = self.target[:, input_ids.shape[1] - self.width, None]  # (R, 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, said, 0.0)


@torch.no_grad()
def reread(job: Job, groups: Groups) -> int:
    """The same trajectories the plain way: every turn reads its whole prefix with a new cache.

    One row a trajectory, its recorded tokens in place of what is sampled, its tools run again.
    Returns the tokens that were read. (What `Rollout` does for every token in Python, looking for
    tags, is left out here: that favours the plain way.)
    """
    policy, read = job.policy, 0
    paths = [leaf.path() for leaves in groups for leaf in leaves]
    for turn in range(1, max(map(len, paths)), 2):
        open_paths = [path for path in paths if len(path) > turn]
        prefixes = [[t for s in path[:turn] for t in s.token_ids] for path in open_paths]
        input_ids, mask = left_padded(policy, prefixes)
        segments = [path[turn].token_ids for path in open_paths]
        longest = max(map(len, segments))
        target = [segment + [policy.pad_id] * (longest - len(segment)) for segment in segments]
        target = torch.tensor(target, device=policy.device)
        policy.lm.generate(
            input_ids,
            attention_mask=mask,
            generation_config=plain_sampling(policy, longest),
            logits_processor=[Recite(target, input_ids.shape[1])],
        )
        read += sum(map(len, prefixes))
        calls = [
            toolbox.read_call(policy.decode(path[turn].token_ids), job.tools)
            for path in open_paths
            if len(path) > turn + 1
        ]
        for result in toolbox.run_calls(calls, job.tools, job.config.tool_time_limit):
            policy.encode(toolbox.result_text(result))
    return read


def left_padded(policy: Policy, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = [[policy.pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=policy.device), torch.tensor(mask, device=policy.device)


def plain_sampling(policy: Policy, steps: int) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=steps, pad_token_id=policy.pad_id, **sampling)


def cache_reuse(job: Job, repeats: int) -> dict:
    """Both without forks, so that nothing but the cache differs."""
    job, recorded = grpo(job), {}

    def reused(i: int) -> dict:
        started = now()
        recorded[i], rollout = roll_out(job, i + 1)
        return {"seconds": now() - started, "prefill_tokens": rollout.prefill_tokens}

    def plain(i: int) -> dict:
        started = now()
        read = reread(job, recorded[i])
        return {"seconds": now() - started, "prefill_tokens": read}

    runs = alternately({"cache kept": reused, "prefix read every turn": plain}, repeats)
    return compared(runs, plain="prefix read every turn", ours="cache kept")


# ---- 2. forks -----------------------------------------------------------------------------

TOKENS = ("tool_calls", "generated_tokens", "prefill_tokens", "train_tokens")


def forks(job: Job, repeats: int) -> dict:
    def step(job: Job):
        def run(i: int) -> dict:
            metrics = train_step(job, i + 1)
            seconds = metrics["seconds_rollout"] + metrics["seconds_update"]
            unpacked = {"train_tokens_unpacked": metrics["train_tokens_unpacked"]}
            return {name: metrics[name] for name in TOKENS} | unpacked | {"seconds": seconds}

        return run

    runs = alternately({"GRPO": step(grpo(job)), "ARPO": step(job)}, repeats)
    result = compared(runs, plain="GRPO", ours="ARPO")
    plain = sum(run["train_tokens_unpacked"] for run in runs["GRPO"])
    ours = sum(run["train_tokens"] for run in runs["ARPO"])
    result["trained_tokens_of_unpacked_grpo"] = ours / plain
    return result


# ---- 3. packing ---------------------------------------------------------------------------


def packing(job: Job, repeats: int) -> dict:
    """The same trees, a row a question or a row a trajectory."""
    groups, _ = roll_out(job, 1)
    rewards = [Reward(float(i % 2), 0.0, True, 1) for i in range(job.config.group_size)]

    def step(job: Job):
        rows = [row for leaves in groups for row in credit(leaves, rewards, job.config)]
        peak = peak_bytes(lambda: update(job.policy, job.optimizer, rows, job.config))

        def run(i: int) -> dict:
            started = now()
            update(job.policy, job.optimizer, rows, job.config)
            seconds = now() - started
            return {"train_tokens": sum(map(len, rows)), "seconds": seconds, "peak_bytes": peak}

        return run

    ways = {"unpacked": with_config(job, packed=False), "packed": with_config(job, packed=True)}
    runs = alternately({name: step(job) for name, job in ways.items()}, repeats)
    return compared(runs, plain="unpacked", ours="packed")


# ---- 4. quantisation ----------------------------------------------------------------------


def quantisation(plain: Job, quantised: Job, repeats: int) -> dict:
    def step(job: Job):
        def run(i: int) -> dict:
            metrics = train_step(job, i + 1)
            seconds = {name: metrics[name] for name in ("seconds_rollout", "seconds_update")}
            return {"weight_bytes": frozen_bytes(job.policy.lm), **seconds}

        return run

    runs = alternately({"plain weights": step(plain), "4-bit": step(quantised)}, repeats)
    return compared(runs, plain="plain weights", ours="4-bit")


# ---- 5. the split of a step ---------------------------------------------------------------


def split(job: Job, repeats: int) -> dict:
    """Seconds of one step by part, medians; decode is what a rollout takes beside the others."""

    def run(i: int) -> dict:
        with watched(job.policy) as seen:
            metrics = train_step(job, i + 1)
        decode = metrics["seconds_rollout"] - seen["prefill"] - seen["tools"]
        return {
            "decode": decode,
            "prefill": seen["prefill"],
            "tools": seen["tools"],
            "update": metrics["seconds_update"],
            "decode_passes": seen["decode_passes"],
            "decode_steps": seen["decode_steps"],
            "ideal": seen["decode_bytes"] / speed,
        }

    speed = bandwidth(job.policy.device)
    runs = alternately({"step": run}, repeats)
    figures = compared(runs, "step", "step")["figures"]
    seconds = {name: figure["ours"] for name, figure in figures.items()}
    ideal, steps = seconds.pop("ideal"), seconds.pop("decode_steps")
    return {
        "seconds": seconds,
        "decode_steps": steps,
        "bandwidth_bytes_per_second": speed,
        "decode_share_of_limit": ideal / seconds["decode"],
        "decode_passes_share_of_limit": ideal / seconds["decode_passes"],
    }


# ---- all of them --------------------------------------------------------------------------


def run(config: Config, shape: str, turns: int, context: int, repeats: int) -> dict:
    """All comparisons on one model: the mini-world's own, or a random one of a published shape."""

    def job(load_in_4bit: bool) -> Job:
        asked = dataclasses.replace(config, load_in_4bit=load_in_4bit)
        if shape == "tiny":
            return mini_world(asked)
        size = size_of(turns, context, config.max_segment_tokens)
        return forced(asked, size, model_config(shape, "--shape"))

    ours = job(config.load_in_4bit)
    comparisons = {
        "cache reuse": cache_reuse(ours, repeats),
        "forks": forks(ours, repeats),
        "packing": packing(ours, repeats),
    }
    parts = split(ours, repeats)
    try:
        other = job(not config.load_in_4bit)
        plain, quantised = (other, ours) if config.load_in_4bit else (ours, other)
        comparisons["quantisation"] = quantisation(plain, quantised, repeats)
    except (torch.OutOfMemoryError, OutOfMemory):
        console.print("4-bit and plain weights do not fit side by side: not compared")
    return {
        "machine": machine(),
        "settings": dataclasses.asdict(ours.config) | {"shape": shape, "repeats": repeats},
        "comparisons": comparisons,
        "split": parts,
    }


def show(report: dict) -> None:
    table = Table("", "plain", "ours", "ours / plain", box=box.SIMPLE_HEAD)
    for result in report["comparisons"].values():
        table.add_row(f"[bold]{result['ours']}[/] against {result['plain']}")
        for name, figure in result["figures"].items():
            ratio = "-" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
            both = (amount(figure[way]) for way in ("plain", "ours"))
            table.add_row(f"  {name.replace('_', ' ')}", *both, ratio)
    console.print(table)
    share = report["comparisons"]["forks"]["trained_tokens_of_unpacked_grpo"]
    console.print(f"ARPO, packed, trains on {share:.2f} of the tokens of unpacked GRPO")
    part = report["split"]
    total = sum(part["seconds"][name] for name in ("decode", "prefill", "tools", "update"))
    shares = [f"{name} {part['seconds'][name] / total:.0%}" for name in list(part["seconds"])[:4]]
    console.print(f"a step of {total:.2f} s: {', '.join(shares)}")
    console.print(
        f"decode reaches {part['decode_share_of_limit']:.1%} of the machine's limit (weights and "
        f"cache read once a step at {part['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s); its "
        f"forward passes alone {part['decode_passes_share_of_limit']:.1%}"
    )


def amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
