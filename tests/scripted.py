"""A policy and a training without a language model: what app/ needs of them, in milliseconds."""

import dataclasses
import random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig

import app.cli
from advantage import Reward, Segment
from app.config import Config, check_training
from app.evaluation import evaluate_midway, first_per_domain
from app.health import remarks
from app.records import questions_of_step, record_trees, short_answers, step_metrics
from app.run_folder import RunFolder
from app.screen import comparison, print_log_head, print_log_line, print_table, progress_bar, say
from data.formats import load_questions
from entropy import Decision

# ---- an agent -----------------------------------------------------------------------------


class Letters:
    """Every character is a token."""

    vocab_size = 1000

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


LETTERS = Letters()


def policy_segment(text, parent, stop, entropy=0.2):
    ids = LETTERS.encode(text)
    H = [entropy] * len(ids)
    return Segment("policy", ids, parent, stop=stop, entropy=entropy, token_entropy=H)


def small_tree(question="2 + 2?", leaves=2, answer="4", result="<result>\n4\n</result>"):
    """One call, and `leaves` answers after its result: all but the first are forks."""
    root = Segment("prompt", LETTERS.encode(question))
    call = "<think>I add.</think><calculator>2+2</calculator>"
    tool = Segment("tool", LETTERS.encode(result), policy_segment(call, root, "tool", 0.1))
    tool.decision = Decision(0.2, 0.1, 0.1, 0.52, forks=4, granted=leaves - 1)
    text = f"<think>So.</think><answer>\\boxed{{{answer}}}</answer>"
    return [policy_segment(text, tool, "answer") for _ in range(leaves)]


class Agent:
    """Answers right or wrong by chance, the same for the same seed."""

    policy, prefill_tokens = LETTERS, 1234

    def __init__(self, config=None):
        self.asked = []

    def roll_out(self, questions, config, seed):
        self.asked.append((len(questions), config.group_size, config.temperature, seed))
        rng = random.Random(seed)
        groups = [small_tree(q.text, config.group_size) for q in questions]
        rewards = [
            [Reward(r, r, True, 1) for r in rng.choices([0.0, 1.0], k=len(g))] for g in groups
        ]
        return groups, rewards

    def examine(self, leaf, question, reward, config):
        return {"prediction": "4", "em": reward.accuracy, "f1": reward.accuracy, "math_equal": 0.0}

    def refuse_long(self, questions, path):
        pass


# ---- a training ---------------------------------------------------------------------------


class Net(torch.nn.Module):
    """A matrix, which gets an adapter."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.config = torch.nn.Linear(4, 4), PretrainedConfig()

    def forward(self, x):
        return self.linear(x)


@dataclasses.dataclass
class Limits:
    rollout_rows: float = float("inf")


def load_net(config, adapter):
    if adapter:
        return PeftModel.from_pretrained(Net(), adapter, is_trainable=True)
    torch.manual_seed(config.seed)
    return get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"]))


def step_of_net(model, optimizer, scaler, limits, config, step):
    """It depends on the seed, the step, and what was computed before."""
    torch.manual_seed(1000 * config.seed + step)
    if step == 1:
        limits.rollout_rows = 64
    for _ in range(config.updates_per_rollout):
        loss = model(torch.randn(8, 4)).square().mean() * limits.rollout_rows
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {"loss": loss.item(), "clip_fraction": 0.0, "drift_mean": None, "drift_max": None}


def train(config, resume=None):
    """As `train` of arpo_mini.py, with a matrix for a policy."""
    check_training(config)
    questions, test = load_questions(config.dataset_path), load_questions(config.eval_path)
    with RunFolder(config, resume) as run:
        agent, limits, model = Agent(), Limits(), load_net(config, run.adapter)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        run.start(model, optimizer, scaler, limits, [1, 2, 3])
        with progress_bar() as bar:
            before = evaluate_midway(run, agent, test, bar, 0)
            print_log_head()
            for step in range(run.step + 1, config.steps + 1):
                if step > 1 and config.eval_every and (step - 1) % config.eval_every == 0:
                    some = first_per_domain(test, config.eval_part)
                    evaluate_midway(run, agent, some, bar, step - 1)
                asked = questions_of_step(questions, step, config)
                groups, rewards = agent.roll_out(asked, config, step)
                metrics = step_of_net(model, optimizer, scaler, limits, config, step)
                metrics |= step_metrics(groups, rewards)
                metrics |= {"short_answers": short_answers(agent.policy, groups)}
                metrics |= {"train_tokens": 10, "prefill_tokens": 10}
                run.log({"step": step, **metrics, "seconds_rollout": 0.0, "seconds_update": 0.0})
                print_log_line(step, run.metrics[-1], remarks(run.metrics))
                record_trees(run, agent.policy, step, asked, groups, rewards)
                run.complete(step)
            after = evaluate_midway(run, agent, test, bar, config.steps)
        if after:
            print_table(comparison(before, after))
        say(run.in_words())


def main(*args):
    """The command line with this agent and this training."""
    return app.cli.main([str(arg) for arg in args], train, lambda config: Agent(config))


def adapter_of(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


__all__ = ["LETTERS", "Agent", "Config", "adapter_of", "main", "small_tree", "train"]
