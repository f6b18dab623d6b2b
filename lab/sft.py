"""Cold start of any model: a LoRA adapter, fine-tuned on demonstrations. The learning rate falls
to 0 in a line; demonstrations of more than --max_total_tokens tokens are left out.

    python -m lab.coldstart --model_name M [--data sharegpt.jsonl]      (--help lists the settings)

The loss is next-token prediction on what the policy writes; prompts and tool results are only
read. Without --data the demonstrations are the mini-world's, always right. The adapter is a
starting point: `arpo_mini.py train --adapter DIR/adapter`.

A demonstration is spelled as a rollout would spell it: with the prompt of train and eval, not that
of the file, and results between <result> tags. The released data calls <python>: code that is one
expression becomes a <calculator> call. What is left out: data/demonstrations.py.

Demonstrations that all go on in one way after a tool result teach a policy to be surer there than
at the start (a 135M model: at 16 of 16 questions), and the gain is never above 0. --hesitation
mixes in what the tiny model of data/ learnt: the demonstrator also misreads a result, guesses,
stops early or looks again (data/demonstrator.py), so that some answers are wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from random import Random

import torch
from tqdm import tqdm

import arpo_mini
from advantage import Segment
from app.config import Config, option
from app.run_folder import new_folder, put, to_json
from app.screen import say
from data.demonstrations import from_file
from data.demonstrator import demonstrations_of_the_world
from data.files import UserError
from data.formats import Demonstration
from engine.memory import snapshot
from engine.model import RESULT_FRAME, Policy, load_policy
from engine.packing import Row, make_row
from lab.command import parse

SHARED = (  # settings of `train` that it has, too
    "model_name adapter trust_remote_code load_in_4bit dtype lora_rank system_prompt thinking "
    "max_total_tokens learning_rate micro_batch_tokens memory_gb seed output_dir"
).split()
DEFAULTS = {"model_name": "", "max_total_tokens": 4096, "learning_rate": 2e-4}
DEFAULTS |= {"micro_batch_tokens": 2048, "output_dir": "runs/coldstart"}


@dataclass(frozen=True)
class Settings:  # beside those
    data: str | None = option(None, "sharegpt JSONL (default: demonstrations of the mini-world)")
    demonstrations: int = option(1000, "of the mini-world, where there is no --data", low=1)
    hesitation: float = option(
        0.0, "of its demonstrator after a result: 0 never, 1 as for the tiny model", low=0, high=1
    )
    epochs: float = option(1.0, "times that each demonstration is read", above=0)
    demonstrations_per_step: int = option(16, "of one optimizer step", low=1)

    def __post_init__(self):
        if self.data and self.hesitation:
            words = "only the mini-world's demonstrator hesitates"
            raise UserError(f"--hesitation {self.hesitation} --data {self.data}: {words}")


# ---- training -----------------------------------------------------------------------------


def demonstration_row(policy: Policy, demonstration: Demonstration) -> Row:
    """Every token with its author: those of the policy weigh 1, its eos among them; others 0.

    The row of a rollout with an advantage of 1, by somebody who was sure: each log-prob was 0.
    """
    node = Segment("prompt", policy.prompt(demonstration.question))
    for author, text in demonstration.turns:
        frame = RESULT_FRAME if author == "tool" else ()
        node = Segment(author, policy.encode(text, frame), parent=node)
    node.token_ids.append(policy.turn_end)
    row = make_row([node], {s: {node: 1.0} for s in node.path() if s.author == "policy"})
    row.sampled_logp = [0.0 if weight else math.nan for weight in row.weight]
    return row


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> float:
    """One optimizer step: the mean of -log p over the policy's tokens of all rows, in nats.

    Where every advantage is 1, ARPO's update has the gradient of this mean; and this mean is its
    drift, the distance from the log-probs of the row. Out of memory: again, with less at once.
    """

    def work(fitted: Config) -> float:
        return arpo_mini.update(policy, optimizer, rows, fitted)["drift_mean"]

    return policy.limits.retry(config, work, snapshot(policy, optimizer))


def fine_tune(args: list[str]) -> None:
    settings, values = parse("lab.coldstart", __doc__, args, Settings, SHARED, **DEFAULTS)
    config = Config(**values)
    if not config.model_name:
        raise UserError("--model_name is missing: a folder or hub id of a causal LM")
    tools = arpo_mini.make_tools(config)
    if settings.data:
        demonstrations, left_out = from_file(settings.data, tools)
    else:
        which = (settings.demonstrations, tools, config.seed, settings.hesitation)
        demonstrations, left_out = demonstrations_of_the_world(*which), Counter()
    torch.manual_seed(config.seed)  # the fresh adapter
    policy = load_policy(config, tools, trainable=True)
    rows = [demonstration_row(policy, demonstration) for demonstration in demonstrations]
    kept = [row for row in rows if len(row) <= config.max_total_tokens]
    left_out[f"have more than {config.max_total_tokens} tokens"] = len(rows) - len(kept)
    whys = "; ".join(f"{n} {why}" for why, n in left_out.items() if n)
    if not kept:
        raise UserError(f"{settings.data or 'the mini-world'}: no demonstration is left: {whys}")
    folder = new_folder(config.output_dir)
    say(f"{folder}: {len(kept)} demonstrations{whys and f'; left out: {whys}'}")
    shared = {name: getattr(config, name) for name in SHARED}
    put(folder / "config.json", to_json(shared | dataclasses.asdict(settings)))
    try:
        train(policy, kept, settings, config, folder / "metrics.jsonl")
    finally:  # whatever ended it, the steps that were made are kept; no frozen weights
        policy.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        say(f"the adapter is in {folder / 'adapter'}")


def train(policy: Policy, rows: list, settings: Settings, config: Config, log: Path) -> None:
    """Every demonstration in a random order, again and again."""
    optimizer = torch.optim.AdamW(policy.parameters, lr=config.learning_rate, weight_decay=0.0)
    n, rng = min(settings.demonstrations_per_step, len(rows)), Random(config.seed)
    steps = math.ceil(settings.epochs * len(rows) / n)
    asked = chain.from_iterable(rng.sample(rows, len(rows)) for _ in count())  # without end
    with log.open("w", encoding="utf-8") as file:
        for step in (bar := tqdm(range(1, steps + 1), desc="cold start", disable=None)):
            started = time.perf_counter()
            some = list(islice(asked, n))
            optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - (step - 1) / steps)
            metrics = {"step": step, "loss": update(policy, optimizer, some, config)}
            metrics |= {"tokens": sum(map(len, some)), "seconds": time.perf_counter() - started}
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            if step == 1 or step == steps or step % max(1, steps // 10) == 0:
                bar.write(f"step {step:5d} of {steps}  loss {metrics['loss']:.4f}")
