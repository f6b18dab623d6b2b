"""The same job with TRL's GRPOTrainer: the tiny Qwen3, the two tools, LoRA, a step of each in turn.

TRL speaks through a chat template and parses calls out of an assistant message; both are written
here for our transcript grammar, so that either side samples from one policy, stops at the same
tags, runs the same tools and reads the same results. TRL's own limit on a trajectory is left wide;
a turn has ours. Neither side quantises, checkpoints or has a reference model.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
import tempfile
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig
from rich import box
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import arpo_mini
import tools as toolbox
from advantage import reward
from data.formats import Question
from app.config import Config
from app.screen import UserError, console

from .job import Job, Size, force, mini_world, script_of, search_of
from .measure import machine

# The tools as JSON schemas, in the words of Qwen3's published chat template.
SCHEMAS = r"""
{%- if tools -%}
{{ '<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user' }}
{{- ' query.\n\nYou are provided with function signatures within <tools></tools> XML tags:' }}
{{- '\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments' }}
{{- ' within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, ' }}
{{- '"arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif -%}
"""
# A turn: the question, then what the policy writes and the results in between, as they are.
TURNS = r"""
{%- for m in messages -%}
{%- if m.role == 'tool' -%}{{ m.content }}
{%- elif m.role == 'assistant' -%}
{{ '<|im_start|>assistant\n' if loop.previtem.role == 'user' }}{{ m.content }}
{%- for call in m.tool_calls or [] -%}
{{ '<' + call.function.name + '>' }}{{ call.function.arguments | tojson }}
{{- '</' + call.function.name + '>' }}
{%- endfor -%}
{%- else -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role == 'user' -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""
STOPS = ("<|im_end|>", "</answer>", "</search>", "</calculator>")
RESPONSE = {  # how an assistant message is read; every turn begins after the last result
    "defaults": {"role": "assistant"},
    "start_anchor_pattern": r"<\|im_start\|>assistant\n|</result>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"<(?P<name>search|calculator)>",
            "close_pattern": r"</(?:search|calculator)>",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": {"text": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


@dataclass(frozen=True)
class Match:
    """What both sides do, and where they differ."""

    name: str
    forced: bool  # every trajectory is scripted: 2 calls, the tokens of a mean one
    described: bool  # our system prompt describes the tools
    schemas: bool  # TRL's describes them as JSON; else it has the same prompt as ours


MATCHES = (
    Match("mini-world, short prompt", forced=False, described=False, schemas=False),
    Match("forced, short prompt", forced=True, described=False, schemas=False),
    Match("forced, our long prompt on both sides", forced=True, described=True, schemas=False),
    Match("forced, our long prompt, TRL's JSON schemas", forced=True, described=True, schemas=True),
)
FORCED = Size(turns=2, segment=18, prompt=0, result=20)  # about the mini-world's mean trajectory


def import_trl():
    try:
        import datasets
        import trl
    except ImportError as error:
        raise UserError(f"{error.name} is missing; install it with: pip install trl") from None
    return trl, datasets


# ---- our side -----------------------------------------------------------------------------


def our_job(config: Config, match: Match) -> Job:
    job = mini_world(config)
    if match.forced:  # it forks at every second call, like the policy does on the mini-world
        forced = {"branch_rule": "random", "branch_probability": 0.5}
        job.config = dataclasses.replace(job.config, **forced)
        job.tools = job.tools | {"search": search_of(job.policy, FORCED.result)}
        job.questions = [Question("Where does it lie?", ["1"])] * len(job.questions)
    if match.described:
        job.policy.tokenizer.chat_template = TURNS  # the model's own drops a system message
    if match.forced:
        prompt = len(job.policy.prompt(job.questions[0].text))
        force(job.policy.lm, prompt, script_of(job.policy, FORCED))
    return job


# ---- TRL's side ---------------------------------------------------------------------------


def trl_trainer(job: Job, match: Match, steps: int, callback: TrainerCallback, folder: str):
    trl, datasets = import_trl()
    c, asked = job.config, [q for step in range(steps) for q in job.asked(step + 1)]
    tokenizer = AutoTokenizer.from_pretrained(c.model_name, padding_side="left")
    tokenizer.chat_template = SCHEMAS * match.schemas + TURNS
    tokenizer.eos_token = "</answer>"  # TRL cuts what follows a call at the last one of these
    tokenizer.response_template = RESPONSE
    lm = AutoModelForCausalLM.from_pretrained(c.model_name, dtype=job.policy.lm.dtype)
    lm.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(STOPS))
    ours = match.described and not match.schemas
    system = [{"role": "system", "content": job.policy.system_prompt}] if ours else []
    rows = [
        {"prompt": [*system, {"role": "user", "content": q.text}], "answers": q.answers}
        for q in asked
    ]
    trainer = trl.GRPOTrainer(
        model=lm,
        processing_class=tokenizer,
        reward_funcs=reward_function(job, tokenizer),
        args=trl.GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=c.questions_per_step * c.group_size,
            num_generations=c.group_size,
            max_completion_length=c.max_total_tokens,
            max_tool_calling_iterations=c.max_tool_calls,
            generation_kwargs={"max_new_tokens": c.max_segment_tokens},
            learning_rate=0.0,  # the same policy at every step, on both sides
            lr_scheduler_type="constant",
            beta=0.0,
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=torch.cuda.is_available(),
            seed=c.seed,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        tools=tools_of(job),
        peft_config=LoraConfig(
            r=c.lora_rank,
            lora_alpha=2 * c.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[callback],
    )
    prompt = len(trainer._tokenize_prompts([rows[0]["prompt"]])[0][0])
    if match.forced:
        force(lm, prompt, script_of(job.policy, FORCED))
    return trainer, prompt


def tools_of(job: Job) -> list:
    def run(name: str, text: str) -> str:
        return toolbox.result_text(toolbox.run_one(toolbox.ToolCall(name, text), job.tools))

    def search(text: str) -> str:
        """Search the documents.

        Args:
            text: words to look for in the documents
        """
        return run("search", text)

    def calculator(text: str) -> str:
        """Calculate the value of an expression.

        Args:
            text: an expression such as (12 + 3) * 4
        """
        return run("calculator", text)

    return [search, calculator]


def reward_function(job: Job, tokenizer):
    def right(completion_ids, answers, **kwargs) -> list[float]:
        rewards = []
        for ids, gold in zip(completion_ids, answers, strict=True):
            texts = re.split(r"(<result>.*?</result>)", tokenizer.decode(ids), flags=re.DOTALL)
            turns = [("tool" if i % 2 else "policy", text) for i, text in enumerate(texts)]
            turns = turns if texts[-1] else turns[:-1]  # it ended with a result
            rewards.append(reward(turns, gold, tool_names=list(job.tools)).total)
        return rewards

    return right


# ---- both, in turn ------------------------------------------------------------------------


class InTurn(TrainerCallback):
    """Times each step of TRL, generation included, and takes one of ours after it."""

    def __init__(self, job: Job):
        self.job, self.trl, self.ours, self.metrics = job, [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trl.append(time.perf_counter() - self.started)
        job, step = self.job, state.global_step
        started = time.perf_counter()
        metrics, *_ = arpo_mini.train_step(
            job.policy, job.optimizer, job.asked(step), job.config, job.tools, step
        )
        self.ours.append(time.perf_counter() - started)
        self.metrics.append(metrics)


def play(config: Config, match: Match, repeats: int) -> dict:
    """Medians over the steps but the first of each side, which pays for what is made once."""
    job = our_job(config, match)
    in_turn = InTurn(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer, trl_prompt = trl_trainer(job, match, repeats + 1, in_turn, folder)
        trainer.train()
    means = trainer.state.log_history[-1]  # TRL's, over all steps
    rollouts = config.questions_per_step * config.group_size
    trl, ours = in_turn.trl[1:], in_turn.ours[1:]
    metrics = in_turn.metrics[1:]
    return {
        "trl": {
            "seconds": statistics.median(trl),
            "trajectories_per_second": rollouts / statistics.median(trl),
            "prompt_tokens": trl_prompt,
            "policy_tokens_per_trajectory": means["completions/mean_length"],
        },
        "ours": {
            "seconds": statistics.median(ours),
            "seconds_rollout": statistics.median(m["seconds_rollout"] for m in metrics),
            "seconds_update": statistics.median(m["seconds_update"] for m in metrics),
            "trajectories_per_second": rollouts / statistics.median(ours),
            "prompt_tokens": len(job.policy.prompt(job.questions[0].text)),
            "generated_tokens": statistics.mean(m["generated_tokens"] for m in metrics),
            "train_tokens": statistics.mean(m["train_tokens"] for m in metrics),
            "train_tokens_unpacked": statistics.mean(m["train_tokens_unpacked"] for m in metrics),
        },
        "times_as_fast": statistics.median(t / o for t, o in zip(trl, ours, strict=True)),
    }


def run(config: Config, repeats: int) -> dict:
    trl, _ = import_trl()
    config = dataclasses.replace(config, load_in_4bit=False)
    return {
        "machine": machine() | {"trl": trl.__version__},
        "settings": dataclasses.asdict(config) | {"repeats": repeats},
        "matches": {match.name: play(config, match, repeats) for match in MATCHES},
    }


def show(report: dict) -> None:
    heads = ("", "prompt tokens", "s a step", "trajectories/s", "times as fast")
    table = Table(*heads, box=box.SIMPLE_HEAD)
    for name, match in report["matches"].items():
        table.add_row(f"[bold]{name}[/]")
        for side in ("trl", "ours"):
            figures = match[side]
            table.add_row(
                f"  {'TRL ' + report['machine']['trl'] if side == 'trl' else 'arpo_mini'}",
                f"{figures['prompt_tokens']}",
                f"{figures['seconds']:.2f}",
                f"{figures['trajectories_per_second']:.1f}",
                "" if side == "trl" else f"{match['times_as_fast']:.2f}",
            )
    console.print(table)
