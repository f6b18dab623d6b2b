"""A policy and a training without a language model: what app/ needs of them, in milliseconds."""

import random
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig

import app.cli
import arpo_mini
from advantage import Reward, Segment
from app.records import short_answers, step_metrics
from engine.memory import Limits
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

    prefill_tokens = 1234

    def __init__(self, config=None, tools=None, trainable=False):
        self.asked, self.policy = [], Learner(config) if trainable else LETTERS

    def roll_out(self, questions, config, seed):
        self.asked.append((len(questions), config.group_size, config.temperature, seed))
        rng = random.Random(seed)
        groups = [small_tree(q.text, config.group_size) for q in questions]
        draws = [rng.choices([0.0, 1.0], k=len(leaves)) for leaves in groups]
        return groups, [[Reward(r, r, True, 1) for r in some] for some in draws]

    def examine(self, leaf, question, reward, config):
        return {"prediction": "4", "em": reward.accuracy, "f1": reward.accuracy, "math_equal": 0.0}

    def refuse_long(self, questions, path):
        pass


class Learner(Letters):
    """It has a matrix to train."""

    def __init__(self, config):
        torch.manual_seed(config.seed)
        if config.adapter:
            self.model = PeftModel.from_pretrained(Net(), config.adapter, is_trainable=True)
        else:
            self.model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["linear"]))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.limits = Limits()

    def prompt(self, question):
        return [1, 2, 3]


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


def step_of_net(agent, optimizer, questions, config, step, scores):
    """It depends on the seed, the step, and what was computed before."""
    policy, (groups, rewards) = agent.policy, agent.roll_out(questions, config, step)
    torch.manual_seed(1000 * config.seed + step)
    if step == 1:
        policy.limits.rollout_rows = 64
    for _ in range(config.updates_per_rollout):
        loss = policy.model(torch.randn(8, 4)).square().mean() * policy.limits.rollout_rows
        optimizer.zero_grad()
        policy.scaler.scale(loss).backward()
        policy.scaler.step(optimizer)
        policy.scaler.update()
    figures = {"loss": loss.item(), "clip_fraction": 0.0, "drift_mean": None, "drift_max": None}
    figures |= {"short_answers": short_answers(policy, groups), "train_tokens": 10}
    figures |= {"prefill_tokens": 10, "seconds_rollout": 0.0, "seconds_update": 0.0}
    return step_metrics(groups, rewards) | figures, groups, rewards


def train(config, resume=None):
    """`train` of arpo_mini.py, with a matrix for a policy."""
    with mock.patch.multiple(arpo_mini, load_agent=Agent, safe_step=step_of_net):
        arpo_mini.train(config, resume=resume)


def main(*args):
    """The command line with this agent and this training."""
    return app.cli.main([str(arg) for arg in args], train, Agent)
