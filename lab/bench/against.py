"""One training step of ours beside another's, in turn, on the same questions and one policy.

`plain`: course/one_page.py, the same algorithm with plain `generate`, nothing cached or packed.

`trl`: TRL's GRPOTrainer speaks through a chat template and parses calls out of an assistant
message; both are written for our transcript grammar (trl.jinja, trl_response.json), so that either
side samples from one policy, stops at the same tags, runs the same tools and reads the same
results. TRL's limit on a trajectory is left wide; a turn has ours. Neither side quantises.
"""

import dataclasses
import json
import re
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

import tools as toolbox
from advantage import reward
from app.config import Config, check_training
from arpo_mini import load_agent
from course import one_page
from data.files import UserError
from data.formats import Question, load_questions
from engine.judge import judge_answer
from engine.memory import GIB
from engine.model import chat_frame

from . import job as jobs
from .job import Job, Size, clock, force, made_on, watched

# ---- plain --------------------------------------------------------------------------------


def plain(config: Config, own) -> dict:
    """Medians of steps taken in turn, after a first one of each that is watched for its memory."""
    check_training(config)
    names = ("kl_coefficient", "dual_clip", "official_rewards")
    odd = [name for name in names if getattr(config, name) != getattr(Config, name)]
    odd += ["branch_rule"] * (config.branch_rule in ("step", "official"))
    if odd:
        raise UserError(f"--{odd[0]} {getattr(config, odd[0])}: course/one_page.py does without it")
    job = Job(load_agent(config, trainable=True), load_questions(config.dataset_path))
    job.agent.refuse_long(job.questions, config.dataset_path)
    policy, tools = job.agent.policy, job.agent.tools

    def on_one_page(n: int) -> dict:
        return one_page.train_step(policy, job.optimizer, job.asked(n), config, tools, n)

    ways = (on_one_page, job.step)
    figures = {"peak GiB": [jobs.peak_bytes(partial(step, 1)) / GIB for step in ways]}
    numbers = range(2, own.repeats + 2)
    runs = [[watched(policy, partial(step, n)) for step in ways] for n in numbers]
    for key in runs[0][0]:
        figures[key] = [median(run[key] for run in side) for side in zip(*runs, strict=True)]
    rows = {key: {"one page": a, "ours": b, "share": b / a} for key, (a, b) in figures.items()}
    return made_on(config, repeats=own.repeats) | {"figures": rows}


# ---- TRL ----------------------------------------------------------------------------------

# The chat template, and how an assistant message is read: every turn begins after the last result.
TURNS = Path(__file__).with_name("trl.jinja").read_text(encoding="utf-8")
RESPONSE = json.loads(Path(__file__).with_name("trl_response.json").read_text(encoding="utf-8"))
STOPS = ("<|im_end|>", "</answer>", "</search>", "</calculator>")

# forced: every trajectory is scripted; described: our system prompt describes the tools; schemas:
# TRL's describes them as JSON, else it has the same prompt as ours.
MATCHES = {  # name: (forced, described, schemas)
    "mini-world, short prompt": (False, False, False),
    "forced, short prompt": (True, False, False),
    "forced, our long prompt on both sides": (True, True, False),
    "forced, our long prompt, TRL's JSON schemas": (True, True, True),
}
FORCED = Size(turns=2, segment=18, result=20)  # about the mini-world's mean trajectory


class StepByStep(TrainerCallback):
    """Times each step of TRL, generation included, and takes one of ours after it."""

    def __init__(self, job: Job, folder: str):
        self.job, self.folder, self.trl, self.ours = job, folder, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = clock()

    def on_step_end(self, args, state, control, **kwargs):
        self.trl.append(clock() - self.started)
        self.ours.append(self.job.step(state.global_step)["seconds"])


def our_job(config: Config, forced: bool, described: bool) -> Job:
    if forced:  # it forks at every second call, like the policy does on the mini-world
        half = {"branch_rule": "random", "branch_probability": 0.5}
        config = dataclasses.replace(config, **half)
    job = Job(load_agent(config, trainable=True), load_questions(config.dataset_path))
    policy = job.agent.policy
    if described:
        policy.tokenizer.chat_template = TURNS  # the model's own drops a system message
        policy.frame = chat_frame(policy.tokenizer, policy.system_prompt, config, {})
    if forced:
        job.agent.tools |= {"search": jobs.search_of(policy, FORCED.result)}
        job.questions = [Question("Where does it lie?", ["1"])]
        prompt = len(policy.prompt(job.questions[0].text))
        force(policy.lm, prompt, jobs.script_of(policy, FORCED))
    return job


def trl_trainer(job: Job, system: str | None, schemas: bool, times: StepByStep, steps: int):
    """TRL's trainer of the same job and the same kind of adapter, with `system` as its prompt."""
    from datasets import Dataset
    from trl import GRPOTrainer

    c, policy = job.agent.config, job.agent.policy
    tokenizer = AutoTokenizer.from_pretrained(c.model_name, padding_side="left")
    tokenizer.chat_template = TURNS
    tokenizer.eos_token = "</answer>"  # TRL cuts what follows a call at the last one of these
    tokenizer.response_template = RESPONSE
    lm = AutoModelForCausalLM.from_pretrained(c.model_name, dtype=policy.lm.dtype)
    lm.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(STOPS))
    first = [{"role": "system", "content": system}] if system else []
    asked = [q for step in range(1, steps + 1) for q in job.asked(step)]
    prompts = [[*first, {"role": "user", "content": q.text}] for q in asked]
    rows = {"prompt": prompts, "answers": [q.answers for q in asked]}
    trainer = GRPOTrainer(
        lm,
        reward_function(tokenizer, {*job.agent.tools}),
        trl_settings(c, times.folder, schemas, steps),
        Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=policy.model.peft_config["default"],
        callbacks=[times],
        tools=[tool_of(job, name) for name in job.agent.tools],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_settings(c: Config, folder: str, schemas: bool, steps: int):
    """Those of ours, at a learning rate of 0: one policy at every step."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        num_generations=c.group_size,
        per_device_train_batch_size=c.questions_per_step * c.group_size,
        max_completion_length=c.max_total_tokens,
        max_tool_calling_iterations=c.max_tool_calls,
        generation_kwargs={"max_new_tokens": c.max_segment_tokens},
        chat_template_kwargs={"schemas": schemas},
        learning_rate=0.0,
        beta=0.0,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        shuffle_dataset=False,
        seed=c.seed,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def tool_of(job: Job, name: str):
    """A tool as TRL wants it: a function with its name, annotations and a docstring."""

    def run(text: str) -> str:
        return toolbox.result_text(toolbox.run_one(toolbox.ToolCall(name, text), job.agent.tools))

    description = job.agent.tools[name].description
    run.__name__, run.__doc__ = name, f"Call it.\n\nArgs:\n    text: {description}\n"
    return run


def reward_function(tokenizer, tools: set[str]):
    def right(completion_ids, answers, **kwargs) -> list[float]:
        rewards = []
        for ids, gold in zip(completion_ids, answers, strict=True):
            texts = re.split(r"(<result>.*?</result>)", tokenizer.decode(ids), flags=re.DOTALL)
            turns = [("tool" if i % 2 else "policy", text) for i, text in enumerate(texts) if text]
            used = len({name for name in tools for text in texts if f"</{name}>" in text})
            rewards.append(reward(turns, gold, judge=judge_answer, tools_used=used).total)
        return rewards

    return right


def play(config: Config, forced: bool, described: bool, schemas: bool, repeats: int) -> dict:
    """Medians over the steps but the first of each side, which pays for what is made once."""
    job = our_job(config, forced, described)
    policy = job.agent.policy
    system = policy.system_prompt if described and not schemas else None
    with tempfile.TemporaryDirectory() as folder:
        times = StepByStep(job, folder)
        trainer = trl_trainer(job, system, schemas, times, repeats + 1)
        prompt = len(trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]])[0][0])
        if forced:
            force(trainer.model.get_base_model(), prompt, jobs.script_of(policy, FORCED))
        trainer.train()
    trl, ours = median(times.trl[1:]), median(times.ours[1:])
    prompts = {"prompt, TRL": prompt, "ours": len(policy.prompt(job.questions[0].text))}
    return {**prompts, "seconds, TRL": trl, "seconds, ours": ours, "times as fast": trl / ours}


def trl(config: Config, own) -> dict:
    try:
        import trl as library
    except ImportError:
        raise UserError("trl is missing; install it with: pip install trl") from None
    config = dataclasses.replace(config, load_in_4bit=False)
    rows = {name: play(config, *match, own.repeats) for name, match in MATCHES.items()}
    return made_on(config, trl=library.__version__, repeats=own.repeats) | {"figures": rows}
