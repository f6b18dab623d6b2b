"""Cold start of any model: a LoRA adapter, fine-tuned on demonstrations.

    python -m lab.coldstart --model_name M [--data sharegpt.jsonl]      (--help lists the settings)

The loss is next-token prediction on what the policy writes; prompts and tool results are only
read. Without --data the demonstrations are the mini-world's, always right. The adapter is a
starting point: `arpo_mini.py train --adapter DIR/adapter`.

A demonstration is spelled as a rollout would spell it: the prompt that train and eval use (the
file's own system prompt is left out, its tools are others), and results between <result> tags. The
released data calls <python> where we have a <calculator>: code that is one expression becomes a
calculator call; demonstrations with other code are left out, or kept by --python_calls keep, for a
policy with a python tool of one's own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from advantage import Segment, as_number
from arpo_mini import make_tools, recomputed, token_logprobs
from data.formats import Demonstration, load_demonstrations
from data.make_world import DOMAINS, Maker, make
from lab.coldstart import Demonstrator, Hesitation
from engine.memory import snapshot
from engine.packing import Row, make_batch, make_row, micro_batches
from engine.model import Policy, load_policy
from app.run_folder import new_folder
from app.config import Config
from app.screen import Parser, UserError, check, console, option, progress_bar
from tools import ToolError, ToolResult, calculate, result_text


def same(name: str) -> dataclasses.Field:
    """The field of train's Config: one default and one help text for both."""
    item = Config.__dataclass_fields__[name]
    return option(item.default, **item.metadata)


@dataclass(frozen=True)
class Settings:
    # the policy, as for train
    model_name: str = option("", "folder or hub id of a causal LM")
    adapter: str | None = same("adapter")
    trust_remote_code: bool = same("trust_remote_code")
    load_in_4bit: bool = same("load_in_4bit")
    lora_rank: int = same("lora_rank")
    system_prompt: str | None = same("system_prompt")
    thinking: bool = same("thinking")
    # what it learns from
    data: str | None = option(None, "sharegpt JSONL (default: demonstrations of the mini-world)")
    python_calls: str = option(
        "calculator", "<python> becomes <calculator> or is left out", choices=("calculator", "keep")
    )
    demonstrations: int = option(1000, "of the mini-world, where there is no --data", low=1)
    max_total_tokens: int = option(4096, "longer demonstrations are left out", low=1)
    # the update
    epochs: float = option(1.0, "times that each demonstration is read", above=0)
    demonstrations_per_step: int = option(16, "of one optimizer step", low=1)
    learning_rate: float = option(2e-4, "of AdamW, falling to 0 in a line", above=0)
    max_grad_norm: float = same("max_grad_norm")
    micro_batch_tokens: int = same("micro_batch_tokens")
    gradient_checkpointing: bool | None = same("gradient_checkpointing")
    # the run
    memory_gb: float | None = same("memory_gb")
    seed: int = same("seed")
    output_dir: str = option("runs/coldstart", "folder of the run; an existing one is not touched")

    def __post_init__(self):
        check(self)
        if not self.model_name:
            raise UserError("--model_name is missing: a folder or hub id of a causal LM")

    def of_policy(self) -> Config:
        """The settings that it shares with train."""
        names = {item.name for item in dataclasses.fields(Config)}
        shared = {k: v for k, v in dataclasses.asdict(self).items() if k in names}
        return Config(**shared)


# ---- demonstrations -----------------------------------------------------------------------


def from_mini_world(count: int, tools: dict, seed: int) -> list[Demonstration]:
    """Right solutions with the real tools; none asks what a test question asks."""
    world, _, test = make()
    maker = Maker(world, Random(seed), taken={problem.key for problem in test})
    demonstrator = Demonstrator(world, tools, Random(seed))
    problems = [maker.draw(DOMAINS[i % len(DOMAINS)]) for i in range(count)]
    solved = [demonstrator.solve(problem, Hesitation()) for problem in problems]
    return [
        Demonstration(problem.text, [(turn.author, turn.text) for turn in turns])
        for problem, turns in zip(problems, solved, strict=True)
    ]


def from_file(path: str, python_calls: str) -> tuple[list[Demonstration], Counter]:
    """Those of a file as a rollout would spell them, and why others were left out."""
    kept, left_out = [], Counter()
    for demonstration in load_demonstrations(path):
        turns = demonstration.turns
        if not turns[-1][1].strip():
            left_out["end in a tool result"] += 1
            continue
        turns = turns if python_calls == "keep" else with_calculator(turns)
        if turns is None:
            left_out["call python for more than one expression"] += 1
            continue
        kept.append(Demonstration(demonstration.question, spelled(turns)))
    return kept, left_out


def spelled(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    result = {"tool": lambda text: result_text(ToolResult(text.strip(), ok=True))}
    return [(author, result.get(author, str)(text)) for author, text in turns]


PYTHON = re.compile(r"<python>((?:(?!<python>).)*)</python>\s*$", re.DOTALL)


def with_calculator(turns: list[tuple[str, str]]) -> list[tuple[str, str]] | None:
    """<python> calls as <calculator> calls; None where one of them is no single expression.

    The calculator must come to the number that python printed.
    """
    turns = list(turns)
    for i, (author, text) in enumerate(turns):
        code = PYTHON.search(text) if author == "policy" else None
        if code is None:
            continue
        expression = re.sub(r"^print\((.*)\)$", r"\1", code[1].strip())
        printed = turns[i + 1][1].strip() if i + 1 < len(turns) else None
        try:
            value = calculate(expression)
        except ToolError:
            return None
        if printed is None or as_number(value) is None or as_number(value) != as_number(printed):
            return None
        turns[i] = ("policy", f"{text[: code.start()]}<calculator>{expression}</calculator>")
        turns[i + 1] = ("tool", value)
    return turns


def make_rows(
    policy: Policy, demonstrations: list[Demonstration], limit: int
) -> tuple[list[Row], int]:
    """A row a demonstration, and how many have more than `limit` tokens."""
    rows = [demonstration_row(policy, d) for d in demonstrations]
    short = [row for row in rows if len(row) <= limit]
    return short, len(rows) - len(short)


def demonstration_row(policy: Policy, demonstration: Demonstration) -> Row:
    """Every token with its author: those of the policy weigh 1, its eos among them; others 0."""
    node = Segment("prompt", policy.prompt(demonstration.question))
    for author, text in demonstration.turns:
        node = Segment(author, policy.encode(text), parent=node)
    node.token_ids.append(policy.eos_ids[0])
    return make_row([node], {s: {node: 1.0} for s in node.path() if s.author == "policy"})


# ---- training -----------------------------------------------------------------------------


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> float:
    """One optimizer step: the mean of -log p over the policy's tokens of all rows, in nats."""
    total = sum(sum(row.weight) for row in rows)
    loss_sum = 0.0
    optimizer.zero_grad()
    for group in micro_batches(rows, config.micro_batch_tokens):
        batch = make_batch(group, policy.pad_id, policy.device, policy.lm.dtype)
        with recomputed(policy, config.gradient_checkpointing):
            logp = token_logprobs(policy, batch, temperature=1.0)  # (B, T), 0 if not counted
        loss = -logp.sum() / total
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} on {batch.input_ids.shape}")
        loss.backward()
        loss_sum += loss.item()
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    return loss_sum


def fitting_update(policy: Policy, optimizer, rows: list[Row], config: Config) -> float:
    """`update` with what is computed at once halved until it fits the memory."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    lengths = [len(row) for row in rows]
    return policy.chunks.retry(
        "micro_batch_tokens",
        config,
        lambda fitted: update(policy, optimizer, rows, fitted),
        smallest=max(lengths),
        largest=sum(lengths),
        undo=snapshot(parameters, optimizer),
    )


def fine_tune(settings: Settings) -> int:
    config = settings.of_policy()
    tools = make_tools(config)
    if settings.data:
        demonstrations, left_out = from_file(settings.data, settings.python_calls)
    else:
        demonstrations = from_mini_world(settings.demonstrations, tools, settings.seed)
        left_out = Counter()
    torch.manual_seed(settings.seed)  # the fresh adapter
    policy = load_policy(config, tools, trainable=True)
    rows, long = make_rows(policy, demonstrations, settings.max_total_tokens)
    left_out[f"have more than {settings.max_total_tokens} tokens"] = long
    whys = "; ".join(f"{n} {why}" for why, n in left_out.items() if n)
    if not rows:
        raise UserError(f"{settings.data or 'the mini-world'}: no demonstration is left: {whys}")
    folder = new_folder(settings.output_dir)
    console.print(f"writing to {folder}", markup=False, soft_wrap=True)
    text = json.dumps(dataclasses.asdict(settings), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"{len(rows)} demonstrations{whys and f'; left out: {whys}'}")
    try:
        finished = train(policy, rows, settings, folder / "metrics.jsonl")
    finally:  # whatever ended it, the steps that were made are kept
        policy.model.save_pretrained(folder / "adapter")
    words = "" if finished else "stopped; "
    console.print(f"{words}the adapter is in {folder / 'adapter'}", markup=False, soft_wrap=True)
    return 0 if finished else 130


def train(policy: Policy, rows: list[Row], settings: Settings, log: Path) -> bool:
    """Every demonstration in a random order, again and again; False when it was stopped."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    config = settings.of_policy()
    n, rng = min(settings.demonstrations_per_step, len(rows)), Random(settings.seed)
    steps = max(1, math.ceil(settings.epochs * len(rows) / n))
    waiting: list[Row] = []
    with progress_bar() as bar, log.open("w", encoding="utf-8") as file:
        try:
            for step in bar.track(range(1, steps + 1), description="cold start"):
                started = time.perf_counter()
                while len(waiting) < n:
                    waiting += rng.sample(rows, len(rows))
                some, waiting = waiting[:n], waiting[n:]
                optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 - (step - 1) / steps)
                loss = fitting_update(policy, optimizer, some, config)
                metrics = {
                    "step": step,
                    "loss": loss,
                    "tokens": sum(map(len, some)),
                    "seconds": time.perf_counter() - started,
                }
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                if step == 1 or step == steps or step % max(1, steps // 10) == 0:
                    bar.console.print(f"step {step:5d} of {steps}  loss {loss:.4f}")
        except KeyboardInterrupt:
            return False
    return True


def main(args: list[str]) -> int:
    parser = Parser(prog="lab.coldstart", description=__doc__.splitlines()[0], allow_abbrev=False)
    for item in dataclasses.fields(Settings):
        parser.add_field(item)
    try:
        return fine_tune(Settings(**parser.parse(args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"error: {error}; a lower --learning_rate may help", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
