"""Every setting of a run, its default and what is legal; and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entropy import RULES
from data.files import UserError
from app.screen import check, option

DATA = Path(__file__).resolve().parent.parent / "data"


@dataclass(frozen=True)
class Config:
    # the policy
    model_name: str = option(str(DATA / "tiny-qwen3"), "folder or hub id of a causal LM")
    adapter: str | None = option(None, "folder of a LoRA adapter to start from")
    trust_remote_code: bool = option(False, "run Python code that comes with the model")
    load_in_4bit: bool = option(True, "quantise the frozen weights to NF4 (bitsandbytes)")
    lora_rank: int = option(16, "rank of the LoRA adapter, on all linear layers", low=1)
    system_prompt: str | None = option(None, "file with another one; {tools} stands for the tools")
    thinking: bool = option(True, "false: ask the chat template for an empty think block (Qwen3)")
    # the task
    dataset_path: str = option(
        str(DATA / "train.jsonl"), "questions to train on (forms: data/formats.py)"
    )
    eval_path: str = option(
        str(DATA / "test.jsonl"), "questions to evaluate on (forms: data/formats.py)"
    )
    documents_path: str = option(str(DATA / "documents.jsonl"), "what is searched (JSONL)")
    search_results: int = option(1, "documents a search returns (3 is usual elsewhere)", low=1)
    search_chars: int = option(200, "characters of each document returned", low=10)
    tool_time_limit: float = option(5.0, "seconds a tool may take", above=0)
    max_result_tokens: int = option(256, "tokens of a tool result; the rest is cut off", low=32)
    max_tool_calls: int = option(6, "calls a trajectory may make", low=0, high=500)
    max_segment_tokens: int = option(64, "tokens the policy may write at a time", low=1)
    max_total_tokens: int = option(512, "tokens of a trajectory, prompt included", low=1)
    # the rollout; what is said of accuracy: lab/results/compare, 5 seeds; k, N = 4, rate, weight: 2
    group_size: int = option(8, "M: trajectories returned for each question", low=1)
    # With Z = 4: GRPO's accuracy (-0.2 points [-1.3, +0.8]) for 53 % of its tool calls. N = 2 and
    # Z = 1: -0.4 [-4.0, +3.3] for 61 %; N = 4: 73 %.
    initial_rollouts: int = option(1, "N: begun at the question; M - N may branch off", low=1)
    # no rule is more accurate than another; adaptive takes 85 % of the calls where paper takes 61
    branch_rule: str = option("paper", "when to fork after a tool result", choices=tuple(RULES))
    branch_probability: float = option(0.5, "paper's alpha, official tau", low=0, high=1)
    entropy_weight: float = option(0.2, "paper's beta, official w")
    entropy_threshold: float = option(0.5, "paper's tau")
    entropy_sigma: float = option(1.5, "k_sigma of the adaptive rule")
    # 5, 10 and 20 end within a point of each other
    entropy_tokens: int = option(10, "k: tokens measured after a tool result", low=1)
    max_branches: int = option(4, "Z: most forks at one tool result", low=0)
    temperature: float = option(1.0, "of sampling, and of what is trained; 0: greedy", low=0)
    rollout_rows: int = option(128, "paths decoded side by side; more wait their turn", low=1)
    top_p: float = option(1.0, "share of the likeliest tokens; < 1: not to train", above=0, high=1)
    # the update
    steps: int = option(100, "training steps: a rollout and its update each", low=1)
    questions_per_step: int = option(8, "questions rolled out side by side", low=1)
    updates_per_rollout: int = option(1, "optimizer steps on a rollout; >1: off-policy", low=1)
    # 5e-4 and 2e-3 end 2 to 3 points lower
    learning_rate: float = option(1e-3, "of AdamW, constant", above=0)
    # with one update a rollout all weights have one gradient; with four all end 1 to 5 points lower
    shared_weight: float = option(
        0.0, "of shared tokens' advantages: 0 soft, 1 hard, 0.3 the seed's mix", low=0, high=1
    )
    clip_low: float = option(0.2, "the ratio is clipped below 1 - clip_low", low=0, high=1)
    clip_high: float = option(0.2, "and above 1 + clip_high (larger: clip-higher)", low=0)
    dual_clip: float | None = option(None, "cap on the ratio where A < 0, e.g. 3", above=1)
    kl_coefficient: float = option(0.0, "weight of KL(policy, adapter switched off)", low=0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", above=0)
    official_rewards: bool = option(False, "score like the official code, quirks included")
    packed: bool = option(True, "train each token of a tree once; false: a row a trajectory")
    micro_batch_tokens: int = option(8192, "tokens of one forward and backward pass", low=1)
    gradient_checkpointing: bool | None = option(
        None, "compute activations twice, keep few; none: where a trajectory would not fit"
    )
    # the run
    memory_gb: float | None = option(
        None, "GiB that the run may use; none: what the GPU has, no limit on a CPU", above=0
    )
    seed: int = option(0, "of everything that is drawn", low=0, high=2**32 - 1)
    output_dir: str = option("runs/arpo", "folder of the run; an existing one is not touched")
    save_every: int = option(10, "steps between checkpoints; --resume goes on from one", low=1)
    keep: int = option(2, "checkpoints that are kept, the newest", low=1)
    eval_every: int = option(50, "steps between looks at a part of eval_path; 0: none", low=0)
    eval_part: int = option(20, "questions of each domain in such a look", low=1)
    record_every: int = option(10, "steps between trees in rollouts.jsonl; 0: none", low=0)

    def __post_init__(self):
        check(self)
        if self.initial_rollouts > self.group_size:
            limit = f"at most group_size ({self.group_size})"
            raise UserError(f"--initial_rollouts {self.initial_rollouts}: it must be {limit}")


# Settings by name: `--preset NAME`; a flag beside it wins. The first two are the published values
# (arXiv 2507.19849; RUC-NLPIR/ARPO), meant for a full fine-tune of 3B to 14B models. The others are
# lengths and groups for a card, whatever the model: `memory_gb` cuts the rest to what fits.
PUBLISHED = {
    "group_size": 16, "initial_rollouts": 8, "branch_probability": 0.5, "entropy_weight": 0.2,
    "entropy_threshold": 0.5, "temperature": 1.0, "learning_rate": 1e-6, "clip_low": 0.2,
    "clip_high": 0.2, "kl_coefficient": 0.0, "questions_per_step": 128, "search_results": 3,
    "max_segment_tokens": 4096, "max_total_tokens": 6144, "max_branches": 1,
}  # fmt: skip
CARD = {
    "group_size": 8, "initial_rollouts": 4, "entropy_tokens": 20, "learning_rate": 1e-5,
    "questions_per_step": 4, "search_results": 3, "max_tool_calls": 3, "max_branches": 1,
}  # fmt: skip
PRESETS = {
    "paper": PUBLISHED | {"branch_rule": "paper", "max_tool_calls": 6},
    "official": PUBLISHED | {"branch_rule": "official", "max_tool_calls": 3, "entropy_tokens": 20,
                             "dual_clip": 3.0, "official_rewards": True},
    "8gb": CARD | {"memory_gb": 7.5, "max_segment_tokens": 256, "max_total_tokens": 1024},
    "12gb": CARD | {"memory_gb": 11.5, "max_segment_tokens": 512, "max_total_tokens": 2048},
    "16gb": CARD | {"memory_gb": 15.5, "max_segment_tokens": 512, "max_total_tokens": 2048,
                    "group_size": 16, "initial_rollouts": 8},
    "24gb": CARD | {"memory_gb": 23.0, "max_segment_tokens": 1024, "max_total_tokens": 4096,
                    "group_size": 16, "initial_rollouts": 8},
}  # fmt: skip
