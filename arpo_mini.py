"""ARPO in one file: roll out, branch where uncertain, credit, update (arXiv 2507.19849).

    python arpo_mini.py train | eval | show      (--help lists the flags of each)

Read `train` first: it is the algorithm, a line a step. Then `Rollout.grow`, the recursion that
branches; then `make_row` and `policy_loss`, what is trained on. The three lessons it stands on are
entropy.py (where to branch), advantage.py (who gets the credit) and tools.py (what can be called);
terminal.py makes the flags and the tables.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# It reports a missing optional kernel while it is imported (by peft).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
import transformers
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DynamicCache,
    GenerationConfig,
    StoppingCriteria,
)

import tools as toolbox
from advantage import (
    Reward,
    Segment,
    clipped_objective,
    group_advantages,
    kl_k3,
    official_reward,
    reward,
    segment_advantages,
    shared_by,
)
from entropy import RULES, normalised_entropy, official_scalar, token_entropy
from terminal import (
    LOG_HEAD,
    Parser,
    UserError,
    advance,
    check,
    comparison,
    console,
    draw_tree,
    kind,
    log_line,
    option,
    progress_bar,
    report_table,
)

DATA = Path(__file__).resolve().parent / "data"
# What the libraries say about themselves is not for the reader of this screen: loading bars,
# deprecations, a padding warning that takes a hole for right padding.
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


# ---- settings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # the policy
    model_name: str = option(str(DATA / "tiny-qwen3"), "folder or hub id of a causal LM")
    adapter: str | None = option(None, "folder of a LoRA adapter to start from")
    load_in_4bit: bool = option(True, "quantise the frozen weights to NF4 (bitsandbytes)")
    lora_rank: int = option(16, "rank of the LoRA adapter, on all linear layers", low=1)
    # the task
    dataset_path: str = option(str(DATA / "train.jsonl"), "questions to train on (JSONL)")
    eval_path: str = option(str(DATA / "test.jsonl"), "questions to evaluate on (JSONL)")
    documents_path: str = option(str(DATA / "documents.jsonl"), "what is searched (JSONL)")
    search_results: int = option(1, "documents a search returns (3 is usual elsewhere)", low=1)
    search_chars: int = option(200, "characters of each document returned", low=10)
    tool_time_limit: float = option(5.0, "seconds a tool may take", above=0)
    max_tool_calls: int = option(6, "calls a trajectory may make", low=0)
    max_segment_tokens: int = option(64, "tokens the policy may write at a time", low=1)
    max_total_tokens: int = option(512, "tokens of a trajectory, prompt included", low=1)
    # the rollout
    group_size: int = option(8, "M: trajectories returned for each question", low=1)
    initial_rollouts: int = option(2, "N: begun at the question; M - N may branch off", low=1)
    branch_rule: str = option("paper", "when to fork after a tool result", choices=tuple(RULES))
    branch_probability: float = option(0.5, "paper's alpha, official tau", low=0, high=1)
    entropy_weight: float = option(0.2, "paper's beta, official w")
    entropy_threshold: float = option(0.5, "paper's tau")
    entropy_sigma: float = option(1.5, "k_sigma of the adaptive rule")
    entropy_tokens: int = option(10, "k: tokens measured after a tool result", low=1)
    max_branches: int = option(1, "Z: most forks at one tool result", low=0)
    temperature: float = option(1.0, "of sampling, and of what is trained; 0: greedy", low=0)
    # the update
    steps: int = option(100, "training steps: a rollout and its update each", low=1)
    questions_per_step: int = option(8, "questions rolled out side by side", low=1)
    updates_per_rollout: int = option(1, "optimizer steps on a rollout; >1: off-policy", low=1)
    learning_rate: float = option(1e-3, "of AdamW, constant", above=0)
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
    # the run
    seed: int = option(0, "of everything that is drawn", low=0)
    output_dir: str = option("runs/arpo", "folder of the run; an existing one is not touched")
    eval_every: int = option(50, "steps between looks at a part of eval_path; 0: none", low=0)
    record_every: int = option(10, "steps between trees in rollouts.jsonl; 0: none", low=0)

    def __post_init__(self):
        check(self)
        if self.initial_rollouts > self.group_size:
            limit = f"at most group_size ({self.group_size})"
            raise UserError(f"--initial_rollouts {self.initial_rollouts}: it must be {limit}")


@dataclass(frozen=True)
class Question:
    text: str
    answers: list[str]
    domain: str = "all"


def load_questions(path: str) -> list[Question]:
    """Questions of a JSONL file: {"question": .., "answer": text or list, "domain": ..} a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answer = row["answer"]
            answers = answer if isinstance(answer, list) else [answer]
            if not isinstance(row["question"], str) or not answers or None in answers:
                raise ValueError("a question is a text and has at least one answer")
        except (ValueError, KeyError, TypeError) as error:
            legal = '{"question": "...", "answer": "..."}'
            raise UserError(
                f"{path}, line {number}: {reason(error)}; a line reads {legal}"
            ) from None
        questions.append(
            Question(row["question"], [str(a) for a in answers], str(row.get("domain", "all")))
        )
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def reason(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


# ---- the policy ---------------------------------------------------------------------------


SYSTEM_PROMPT = """\
Answer the question. Think first; then either call one tool and wait for its result, or answer.
To call a tool, write <think>why</think> and then one of
{tools}
Its result follows between <result> and </result>. You may call tools several times.
To answer, write <think>why</think><answer>\\boxed{{the answer alone}}</answer> and stop."""


@dataclass
class Policy:
    """A causal language model with a LoRA adapter, its tokenizer, and what both need to speak."""

    model: PeftModel
    tokenizer: transformers.PreTrainedTokenizerBase
    system_prompt: str
    eos_ids: list[int]
    pad_id: int
    closers: set[int]  # tokens whose text holds a '>': only they can complete a tag

    @property
    def lm(self) -> transformers.PreTrainedModel:
        """The language model itself; the adapter's layers sit inside it and stay live."""
        return self.model.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def prompt(self, question: str) -> list[int]:
        for marker in map(str, self.tokenizer.added_tokens_decoder.values()):
            question = question.replace(marker, toolbox.escape(marker))  # it cannot end its turn
        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": question},
        ]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )

    def encode(self, text: str) -> list[int]:
        """A tool's text: the spelling of a special token in it is no special token."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)


def load_policy(config: Config, tools: dict[str, toolbox.Tool], trainable: bool) -> Policy:
    """The frozen model in 4-bit NF4 (or plain), with a fresh or a saved LoRA adapter on top."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name, padding_side="left")
        lm = AutoModelForCausalLM.from_pretrained(
            config.model_name,
            dtype=dtype,
            device_map=device,
            quantization_config=nf4 if config.load_in_4bit else None,
        )
        if config.adapter:
            model = PeftModel.from_pretrained(lm, config.adapter, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        names = f"--model_name {config.model_name} --adapter {config.adapter}"
        raise UserError(f"cannot load {names}: {reason(error)}") from None
    if not config.adapter:
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=2 * config.lora_rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(lm, lora)
        lora.target_modules = sorted(lora.target_modules)  # a set: its order would change each run
    model.eval()  # no dropout anywhere: what is sampled is what is scored
    for layer in lm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # On such a CPU bitsandbytes would repack the weights for inference, and the packed
            # product has no backward: every gradient below it would silently be missing.
            layer.support_avx512bf16_for_cpu = False
    eos = lm.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A model's own generation settings (Qwen3: top_k 20) would sample from another policy.
    lm.generation_config = GenerationConfig(eos_token_id=sorted(eos_ids), pad_token_id=pad_id)
    refuse_unsupported(config.model_name, lm, tokenizer)
    described = "\n".join(f"<{t.name}>{t.description}</{t.name}>" for t in tools.values())
    return Policy(
        model=model,
        tokenizer=tokenizer,
        system_prompt=SYSTEM_PROMPT.format(tools=described),
        eos_ids=sorted(eos_ids),
        pad_id=pad_id,
        closers={i for token, i in tokenizer.get_vocab().items() if ">" in token},
    )


def refuse_unsupported(name: str, lm, tokenizer) -> None:
    """Models that would train silently wrong, or cannot be asked: UserError."""
    if not tokenizer.chat_template:
        wanted = "an instruct model, or a folder with a chat_template.jinja, has one"
        raise UserError(f"--model_name {name} has no chat template; {wanted}")
    try:
        roles = [{"role": role, "content": role} for role in ("system", "user")]
        tokenizer.apply_chat_template(roles, tokenize=False)
    except TemplateError as error:
        raise UserError(f"--model_name {name}: its chat template says: {reason(error)}") from None
    scaled = ("final_logit_softcapping", "logits_scaling", "logit_scale")
    odd = [key for key in scaled if getattr(lm.config, key, None) not in (None, 1)]
    odd += sorted({*(getattr(lm.config, "layer_types", None) or [])} - {"full_attention"})
    if odd:  # log-probs come from the bare head, and any column of the cache may be a hole
        raise UserError(f"--model_name {name} has {', '.join(odd)}, which is not supported here")


# ---- the rollout --------------------------------------------------------------------------


@dataclass
class Paths:
    """The open paths of one level, a row each, over one KV cache of C columns.

    A column that means nothing for a row (padding, what a finished row went on to generate, the
    sibling's tokens in a fork) is a hole: mask 0. Positions come from the running sum of the mask,
    so a row's tokens are contiguous for the model whatever holes lie between them.
    """

    nodes: list[Segment]  # (R) where each path stands: its last complete segment
    owners: list[int]  # (R) the question it belongs to
    cache: DynamicCache  # keys and values (R, heads, C, d) of every layer
    mask: Tensor  # (R, C)
    pending: list[list[int]]  # (R) tokens that the cache has not seen yet

    def select(self, rows: list[int], mask: Tensor | None = None) -> Paths:
        """The named rows (again, to fork them) on a cache of their own, squeezed free of holes."""
        mask = self.mask[rows] if mask is None else mask  # (R', C)
        width = int(mask.sum(dim=1).max())
        columns = mask.argsort(dim=1, stable=True)[:, mask.shape[1] - width :]  # holes first
        picked = torch.tensor(rows, device=mask.device)[:, None]  # (R', 1)
        cache = DynamicCache()
        for i, layer in enumerate(self.cache.layers):
            kept = (x[picked, :, columns].transpose(1, 2) for x in (layer.keys, layer.values))
            cache.update(*kept, i)
        return Paths(
            [self.nodes[r] for r in rows],
            [self.owners[r] for r in rows],
            cache,
            mask.gather(1, columns),
            [list(self.pending[r]) for r in rows],
        )


class SegmentEnd(StoppingCriteria):
    """Gives every sampled token to its segment, and ends a row when its segment is complete.

    By text and not by token id, because a tag may be split over several tokens.
    """

    def __init__(self, policy: Policy, drafts: list[Segment], limits: list[int]):
        self.policy, self.drafts, self.limits = policy, drafts, limits

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        newest = input_ids[:, -1].tolist()
        for draft, limit, token in zip(self.drafts, self.limits, newest, strict=True):
            if draft.stop is None:
                draft.token_ids.append(token)
                draft.stop = self.why(draft.token_ids, limit)
        return torch.tensor([d.stop is not None for d in self.drafts], device=input_ids.device)

    def why(self, token_ids: list[int], limit: int) -> str | None:
        if token_ids[-1] in self.policy.eos_ids:
            return "eos"
        closed = token_ids[-1] in self.policy.closers
        stop = toolbox.policy_stop(self.policy.decode(token_ids)) if closed else None
        return stop or ("length" if len(token_ids) >= limit else None)


class Rollout:
    """Rolls out questions with one policy and counts what that took.

    `prefill_tokens` are the prompt and result tokens that were computed, each once but for the last
    one of a node where paths start; `generated_tokens` are sampled by the policy.
    """

    def __init__(self, policy: Policy, config: Config, tools: dict, rng: random.Random):
        self.policy, self.config, self.tools, self.rng = policy, config, tools, rng
        self.history: list[float] = []  # entropies measured so far, for the adaptive rule
        self.prefill_tokens = 0

    @torch.no_grad()
    def run(self, questions: list[Question]) -> list[list[Segment]]:
        """Exactly `group_size` distinct leaves for each question."""
        M, N = self.config.group_size, self.config.initial_rollouts
        start = self.read([Segment("prompt", self.policy.prompt(q.text)) for q in questions])
        n = len(questions)
        leaves = self.grow(self.begin(start, [N] * n), [M - N] * n)
        # Where too few forks were worth it, fresh paths from the question take their places.
        done = Counter(owner for owner, _ in leaves)
        missing = [M - done[q] for q in range(n)]
        leaves += self.grow(self.begin(start, missing), [0] * n)
        return [[leaf for owner, leaf in leaves if owner == q] for q in range(n)]

    def read(self, roots: list[Segment]) -> Paths:
        """One row a question: every prompt but its last token, which each path begins with."""
        longest, room = max(len(r.token_ids) for r in roots), self.config.max_total_tokens
        if longest >= room:
            raise UserError(f"--max_total_tokens {room}: a prompt has {longest} tokens already")
        prompts = [root.token_ids[:-1] for root in roots]
        input_ids, mask = self.left_pad(prompts)
        cache = DynamicCache()
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        self.policy.lm(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        self.prefill_tokens += int(mask.sum())
        pending = [[root.token_ids[-1]] for root in roots]
        return Paths(roots, list(range(len(roots))), cache, mask, pending)

    def begin(self, start: Paths, counts: list[int]) -> Paths | None:
        """`counts[q]` paths from question q; None when that is no path at all."""
        rows = [q for q, count in enumerate(counts) for _ in range(count)]
        self.prefill_tokens += len(rows)
        return start.select(rows) if rows else None

    def grow(self, paths: Paths | None, slots: list[int]) -> list[tuple[int, Segment]]:
        """Continue every open path to its end: (question, leaf) of each.

        One policy segment for every path, forks where the rule says so (`slots[q]` are left to
        question q), a tool result for every call, and the same again for the paths still open.
        """
        if paths is None:
            return []
        paths, drafts, slots = self.write(paths, slots)
        ended, still_open = self.call_tools(paths, drafts)
        return ended + self.grow(still_open, slots)

    def write(self, paths: Paths, slots: list[int]) -> tuple[Paths, list[Segment], list[int]]:
        """A level: probe k tokens, fork where they are uncertain, then finish every segment."""
        k = self.config.entropy_tokens
        node_end = paths.mask.shape[1] + max(map(len, paths.pending)) - 1  # the node's last column
        drafts = [Segment("policy", [], parent=node) for node in paths.nodes]
        self.sample(paths, drafts, k, measure=True)
        forked, slots = self.branch(paths, drafts, slots)
        if forked:
            paths = self.fork(paths, forked, node_end)
            drafts = drafts + [Segment("policy", [], parent=paths.nodes[row]) for row in forked]
            self.sample(paths, drafts, k, measure=True)
        self.sample(paths, drafts, self.config.max_segment_tokens, measure=False)
        return paths, drafts, slots

    def branch(
        self, paths: Paths, drafts: list[Segment], slots: list[int]
    ) -> tuple[list[int], list[int]]:
        """The rows to fork, once for each fork, and the slots that are left."""
        slots, forked = list(slots), []
        history = [*self.history]
        self.history += [draft.entropy for draft in drafts]
        asked = [row for row, node in enumerate(paths.nodes) if node.author == "tool"]
        for row in asked:
            paths.nodes[row].decision = self.decide(drafts[row], history)
        for row in sorted(asked, key=lambda row: -paths.nodes[row].decision.gain):
            node, owner = paths.nodes[row], paths.owners[row]
            granted = min(node.decision.forks, slots[owner])
            node.decision = dataclasses.replace(node.decision, granted=granted)
            slots[owner] -= granted
            forked += [row] * granted
        return forked, slots

    def decide(self, draft: Segment, history: list[float]):
        """What the rule says at the tool result that `draft` has just read."""
        c, path = self.config, draft.path()
        first = next(segment for segment in path if segment.author == "policy")
        # The official code measures the segment that ends in the call: one call too early.
        measured = draft.parent.parent if c.branch_rule == "official" else draft
        return RULES[c.branch_rule](
            measured.entropy,
            first.entropy,
            u=self.rng.random(),
            history=history,
            branch_probability=c.branch_probability,
            entropy_weight=c.entropy_weight,
            entropy_threshold=c.entropy_threshold,
            entropy_sigma=c.entropy_sigma,
            max_branches=c.max_branches,
        )

    def fork(self, paths: Paths, forked: list[int], node_end: int) -> Paths:
        """The same paths, and after them a row for each fork, which stands right after its node."""
        rows = [*range(len(paths.nodes)), *forked]
        mask = paths.mask[rows]
        # Not the sibling's probe, and not the node's last token: it is read again for its logits.
        mask[len(paths.nodes) :, node_end:] = 0
        both = paths.select(rows, mask)
        for row in range(len(paths.nodes), len(rows)):
            both.pending[row] = both.nodes[row].token_ids[-1:]
        self.prefill_tokens += len(forked)
        return both

    def sample(self, paths: Paths, drafts: list[Segment], steps: int, measure: bool) -> None:
        """One `generate` call: up to `steps` more tokens for every segment that is not complete."""
        limits = [self.room(draft) for draft in drafts]
        written = [len(draft.token_ids) for draft in drafts]
        left = [a - b for a, b, d in zip(limits, written, drafts, strict=True) if not d.stop]
        if not left:
            return
        steps = min(steps, max(left))
        input_ids, fresh = self.left_pad(paths.pending)  # (R, W)
        paths.mask = torch.cat([paths.mask, fresh], dim=1)  # (R, C + W)
        out = self.policy.lm.generate(
            input_ids,
            attention_mask=paths.mask,
            past_key_values=paths.cache,
            generation_config=self.sampling(steps, measure),
            stopping_criteria=[SegmentEnd(self.policy, drafts, limits)],
        )
        added = [len(d.token_ids) - n for d, n in zip(drafts, written, strict=True)]
        S = out.sequences.shape[1] - input_ids.shape[1]
        columns = torch.arange(S, device=paths.mask.device)
        kept = columns < torch.tensor(added, device=paths.mask.device)[:, None]  # (R, S)
        # The cache has not seen the token sampled last: it is still to be read.
        paths.mask = torch.cat([paths.mask, kept[:, :-1].long()], dim=1)  # (R, C + W + S - 1)
        paths.pending = [
            d.token_ids[-1:] if n == S else [] for d, n in zip(drafts, added, strict=True)
        ]
        if measure:
            self.measure(torch.stack(out.scores, dim=1), kept, drafts, written)

    def measure(
        self, scores: Tensor, kept: Tensor, drafts: list[Segment], written: list[int]
    ) -> None:
        """Entropy of the segments that began here, and the log-probs of their tokens."""
        official = self.config.branch_rule == "official"
        H = (official_scalar if official else normalised_entropy)(scores, kept).tolist()
        logp = scores.float().log_softmax(dim=-1)  # (R, S, V)
        for row, (draft, before) in enumerate(zip(drafts, written, strict=True)):
            if before == 0:
                new = torch.tensor(draft.token_ids, device=logp.device)  # (n,)
                draft.entropy = H[row]
                draft.logp = logp[row, : len(new)].gather(1, new[:, None])[:, 0].tolist()

    def room(self, draft: Segment) -> int:
        """Tokens that this segment may have."""
        before = sum(len(segment.token_ids) for segment in draft.parent.path())
        return min(self.config.max_segment_tokens, self.config.max_total_tokens - before)

    def sampling(self, steps: int, measure: bool) -> GenerationConfig:
        """Whole distribution, at one temperature: sample from the policy that is scored."""
        greedy = self.config.temperature == 0
        return GenerationConfig(
            max_new_tokens=steps,
            return_dict_in_generate=True,
            output_scores=measure,
            do_sample=not greedy,
            temperature=None if greedy else self.config.temperature,
            top_k=None if greedy else 0,
            top_p=None if greedy else 1.0,
            eos_token_id=self.policy.eos_ids,
            pad_token_id=self.policy.pad_id,
        )

    def call_tools(
        self, paths: Paths, drafts: list[Segment]
    ) -> tuple[list[tuple[int, Segment]], Paths | None]:
        """Run the calls of a level: (question, leaf) of those that end, and those that go on."""
        results = self.results(drafts)
        open_rows = [row for row, result in results.items() if self.fits(result)]
        ended = [
            (paths.owners[row], results.get(row, draft))
            for row, draft in enumerate(drafts)
            if row not in open_rows
        ]
        if not open_rows:
            return ended, None
        still_open = paths.select(open_rows)
        still_open.nodes = [results[row] for row in open_rows]
        for pending, node in zip(still_open.pending, still_open.nodes, strict=True):
            pending += node.token_ids
            self.prefill_tokens += len(node.token_ids)
        return ended, still_open

    def results(self, drafts: list[Segment]) -> dict[int, Segment]:
        """Row -> the result of its call, for the rows that made one they were allowed to make."""
        rows = [row for row, draft in enumerate(drafts) if self.may_call(draft)]
        texts = [self.policy.decode(drafts[row].token_ids) for row in rows]
        calls = [toolbox.read_call(text, self.tools) for text in texts]
        results = toolbox.run_calls(calls, self.tools, self.config.tool_time_limit)
        token_ids = [self.policy.encode(toolbox.result_text(result)) for result in results]
        pairs = zip(rows, token_ids, strict=True)
        return {row: Segment("tool", ids, parent=drafts[row]) for row, ids in pairs}

    def may_call(self, draft: Segment) -> bool:
        used = sum(segment.author == "tool" for segment in draft.path())
        return draft.stop == "tool" and used < self.config.max_tool_calls

    def fits(self, node: Segment) -> bool:
        """Whether the trajectory still has room to answer after this result."""
        return sum(len(s.token_ids) for s in node.path()) < self.config.max_total_tokens

    def left_pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, (R, W) each, of rows of different lengths."""
        W = max(1, *map(len, rows))
        ids = [[self.policy.pad_id] * (W - len(row)) + row for row in rows]
        mask = [[0] * (W - len(row)) + [1] * len(row) for row in rows]
        device = self.policy.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# ---- what is trained on -------------------------------------------------------------------


@dataclass
class Row:
    """Some trajectories of one question, every token of their tree once. Lists of T values."""

    input_ids: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)  # depth in the tree
    parent: list[int] = field(default_factory=list)  # index of the token before it
    weight: list[int] = field(default_factory=list)  # trajectories it counts for; 0: not sampled
    A_plus: list[float] = field(default_factory=list)  # sum of their positive advantages
    A_minus: list[float] = field(default_factory=list)  # sum of their negative advantages
    n_plus: list[int] = field(default_factory=list)  # how many of them are positive
    n_minus: list[int] = field(default_factory=list)  # how many are negative

    def __len__(self) -> int:
        return len(self.input_ids)

    def sees(self) -> Tensor:
        """(T, T): True where a token (row) attends to a token (column): itself, its ancestors."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for t, parent in enumerate(self.parent):
            if parent >= 0:
                mask[t] |= mask[parent]
        return mask


def make_row(leaves: list[Segment], advantages: dict[Segment, dict[Segment, float]]) -> Row:
    """The tree of these leaves, parents first; `advantages[segment][leaf]` for policy segments."""
    row, last = Row(), {}  # last: segment -> index of its last token
    for segment, below in shared_by(leaves).items():
        credit = [advantages[segment][leaves[i]] for i in below] if segment in advantages else []
        plus, minus = [a for a in credit if a > 0], [a for a in credit if a < 0]
        parent = last.get(segment.parent, -1)
        depth = row.position[parent] + 1 if parent >= 0 else 0
        for i, token in enumerate(segment.token_ids):
            row.input_ids.append(token)
            row.position.append(depth + i)
            row.parent.append(parent if i == 0 else len(row) - 2)
            row.weight.append(len(credit))
            row.A_plus.append(sum(plus, 0.0))
            row.A_minus.append(sum(minus, 0.0))
            row.n_plus.append(len(plus))
            row.n_minus.append(len(minus))
        last[segment] = len(row) - 1
    return row


@dataclass
class Batch:
    """Rows padded to one length. Index t of every (B, T) tensor describes token t."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), or additive (B, 1, T, T) where a row holds a whole tree
    position_ids: Tensor  # (B, T)
    parent: Tensor  # (B, T) index of the token whose logits score token t
    weight: Tensor  # (B, T) trajectories that token t counts for; 0: prompt, tool or padding
    A_plus: Tensor  # (B, T)
    A_minus: Tensor  # (B, T)
    n_plus: Tensor  # (B, T)
    n_minus: Tensor  # (B, T)


def make_batch(rows: list[Row], pad_id: int, device, dtype=torch.float32) -> Batch:
    T = max(map(len, rows))

    def padded(name: str, fill: float) -> Tensor:
        values = [getattr(row, name) + [fill] * (T - len(row)) for row in rows]
        return torch.tensor(values, device=device)

    chains = all(row.parent == list(range(-1, len(row) - 1)) for row in rows)
    if chains:  # causal rows need no more than their padding
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
    else:
        mask = torch.eye(T, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself
        for i, row in enumerate(rows):
            mask[i, : len(row), : len(row)] = row.sees()
        lowest = torch.finfo(dtype).min
        mask = torch.where(mask, 0.0, lowest).to(device, dtype)[:, None]  # (B, 1, T, T)
    return Batch(
        input_ids=padded("input_ids", pad_id),
        attention_mask=mask,
        position_ids=padded("position", 0),
        parent=padded("parent", 0).clamp(min=0),
        weight=padded("weight", 0),
        A_plus=padded("A_plus", 0.0),
        A_minus=padded("A_minus", 0.0),
        n_plus=padded("n_plus", 0),
        n_minus=padded("n_minus", 0),
    )


def micro_batches(rows: list[Row], token_budget: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most `token_budget` tokens (padding included) a batch."""
    batch: list[Row] = []
    for row in sorted(rows, key=len):
        if batch and len(row) * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(row)
    yield batch


HEAD_CHUNK = 1024  # tokens whose logits exist at the same time


def token_logprobs(policy: Policy, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-prob (with gradient) and entropy in nats of every counted token, (B, T) each, else 0.

    Logits are made chunk by chunk from the hidden states of those tokens and made again in the
    backward pass: (B, T, V) never exists.
    """
    hidden = policy.lm.get_decoder()(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state  # (B, T, D)
    b, t = batch.weight.nonzero(as_tuple=True)  # (n,)
    hidden = hidden[b, batch.parent[b, t]]  # (n, D) what predicts token t: the only shift there is
    target = batch.input_ids[b, t]  # (n,)

    def score(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.lm.get_output_embeddings()(hidden).float() / temperature  # (n, V)
        logp = logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0]
        return logp, token_entropy(logits.detach())

    chunks = zip(hidden.split(HEAD_CHUNK), target.split(HEAD_CHUNK), strict=True)
    scored = [checkpoint(score, h, y, use_reentrant=False) for h, y in chunks]
    logp, H = (torch.cat(column) for column in zip(*scored, strict=True))  # (n,) each
    zeros = logp.new_zeros(batch.weight.shape)
    return zeros.index_put((b, t), logp), zeros.index_put((b, t), H)


def policy_loss(
    logp: Tensor, old_logp: Tensor, batch: Batch, config: Config, total: float, ref_logp=None
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, a mean over the `total` policy tokens of the whole batch (official code).

    Also returns for how many of those tokens the clip took the gradient away.
    """
    ratio = torch.exp(logp - old_logp)  # (B, T)
    objective = clipped_objective(
        ratio, batch.A_plus, batch.A_minus, config.clip_low, config.clip_high, config.dual_clip
    )
    loss = -objective.sum() / total  # A is 0 where nothing counts
    if ref_logp is not None:
        kl = kl_k3(logp, ref_logp)  # (B, T)
        loss = loss + config.kl_coefficient * (batch.weight * kl).sum() / total
    clipped = batch.n_plus * (ratio > 1 + config.clip_high)
    clipped = clipped + batch.n_minus * (ratio < 1 - config.clip_low)
    return loss, clipped.sum()


def reference_logprobs(policy: Policy, batches: list[Batch], config: Config) -> list:
    """Log-probs with the adapter switched off; no pass where nothing asks for them."""
    if not config.kl_coefficient:
        return [None for _ in batches]
    with policy.model.disable_adapter():
        return [token_logprobs(policy, batch, config.temperature)[0] for batch in batches]


def update(policy: Policy, optimizer, rows: list[Row], config: Config) -> dict[str, float]:
    """`updates_per_rollout` optimizer steps on one rollout; one normaliser however it is split."""
    batches = [
        make_batch(group, policy.pad_id, policy.device, policy.lm.dtype)
        for group in micro_batches(rows, config.micro_batch_tokens)
    ]
    total = sum(sum(row.weight) for row in rows)
    with torch.no_grad():
        ref_logps = reference_logprobs(policy, batches, config)
        several = config.updates_per_rollout > 1  # with one update the ratio is 1, no extra pass
        old_logps = [
            token_logprobs(policy, batch, config.temperature)[0] if several else None
            for batch in batches
        ]
    sums = Counter()
    for _ in range(config.updates_per_rollout):
        optimizer.zero_grad()
        for batch, old_logp, ref_logp in zip(batches, old_logps, ref_logps, strict=True):
            logp, H = token_logprobs(policy, batch, config.temperature)
            old_logp = logp.detach() if old_logp is None else old_logp
            loss, clipped = policy_loss(logp, old_logp, batch, config, total, ref_logp)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()} on {batch.input_ids.shape}")
            loss.backward()
            sums["loss"] += loss.item()
            sums["clipped"] += clipped.item()
            sums["H"] += (batch.weight * H).sum().item()
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
    tokens = total * config.updates_per_rollout
    return {
        "loss": sums["loss"] / config.updates_per_rollout,
        "clip_fraction": sums["clipped"] / tokens,
        "grad_norm": grad_norm.item(),
        "entropy": sums["H"] / tokens,
    }


# ---- reward and credit --------------------------------------------------------------------


def score(policy: Policy, leaf: Segment, question: Question, config: Config, tools: dict) -> Reward:
    """The reward of one trajectory, judged on its text and on who wrote which part of it."""
    turns = []
    for segment in leaf.path()[1:]:
        token_ids = segment.token_ids[:-1] if segment.stop == "eos" else segment.token_ids
        turns.append((segment.author, policy.decode(token_ids)))
    if config.official_rewards:  # the official tool is called python where ours is a calculator
        transcript = "".join(text for _, text in turns).replace("calculator>", "python>")
        return official_reward(transcript, question.answers)
    return reward(turns, question.answers, tool_names=list(tools))


def credit(leaves: list[Segment], rewards: list[Reward], config: Config) -> list[Row]:
    """Rewards of one question -> advantages of its leaves -> of its segments -> rows to train."""
    A = group_advantages([reward.total for reward in rewards])  # (M,)
    below = shared_by(leaves)
    advantages = {
        segment: dict(zip((leaves[i] for i in below[segment]), values.tolist(), strict=True))
        for segment, values in segment_advantages(leaves, A, config.shared_weight).items()
    }
    together = [leaves] if config.packed else [[leaf] for leaf in leaves]
    return [make_row(some, advantages) for some in together]


# ---- evaluation ---------------------------------------------------------------------------

EVAL_ROWS = 128  # trajectories side by side


def evaluate(
    policy: Policy,
    questions: list[Question],
    config: Config,
    tools: dict,
    samples: int = 1,
    on_progress: Callable[[int], None] = lambda n: None,
) -> list[dict]:
    """`samples` independent trajectories for each question: one record a question.

    It seeds itself: the same policy, questions and settings give the same records.
    """
    torch.manual_seed(config.seed)
    alone = dataclasses.replace(
        config, group_size=samples, initial_rollouts=samples, branch_rule="none"
    )
    records, at_once = [], max(1, EVAL_ROWS // samples)
    for i in range(0, len(questions), at_once):
        some = questions[i : i + at_once]
        groups = Rollout(policy, alone, tools, random.Random(config.seed)).run(some)
        for question, leaves in zip(some, groups, strict=True):
            rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
            records.append(
                {
                    "domain": question.domain,
                    "accuracy": [r.accuracy for r in rewards],
                    "well_formed": [r.well_formed for r in rewards],
                    **tree_counts(leaves),
                }
            )
        on_progress(len(some))
    return records


def tree_counts(leaves: list[Segment]) -> dict[str, float | None]:
    """What the trees over these leaves took: each segment counts once, however many share it."""
    segments = list(shared_by(leaves))
    policy = [segment for segment in segments if segment.author == "policy"]
    calls = [segment for segment in segments if segment.author == "tool"]
    first = [s.entropy for s in policy if s.parent.author == "prompt"]
    after = [s.entropy for s in policy if s.parent.author == "tool"]
    return {
        "tool_calls": len(calls),
        "forks": sum(segment.decision.granted for segment in calls if segment.decision),
        "generated_tokens": sum(len(segment.token_ids) for segment in policy),
        # what the prefixes cost if every turn read them again
        "reread_tokens": sum(len(s.token_ids) for segment in policy for s in segment.path()[:-1]),
        "entropy_initial": mean(first),
        "entropy_after_tool": mean(after),
    }


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that k of n samples hold a right one, unbiased (Chen et al., arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def wilson(p: float, n: int) -> tuple[float, float]:
    """95 % interval of a share p seen on n questions (Wilson 1927)."""
    z = 1.959964
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def summary(records: list[dict], k: int | None = None) -> dict:
    """Shares over all records and for each domain. A trajectory is right at accuracy 1."""

    def figures(some: list[dict]) -> dict:
        n = len(some[0]["accuracy"])
        right = [sum(a == 1 for a in record["accuracy"]) for record in some]
        accuracy = mean([count / n for count in right])
        return {
            "questions": len(some),
            "accuracy": accuracy,
            "interval": wilson(accuracy, len(some)),
            "pass@1": mean([pass_at_k(count, n, 1) for count in right]),
            f"pass@{k or n}": mean([pass_at_k(count, n, k or n) for count in right]),
            "f1": mean([mean(record["accuracy"]) for record in some]),
            "well_formed": mean([mean(record["well_formed"]) for record in some]),
            "tool_calls": mean([record["tool_calls"] / n for record in some]),
            "entropy_initial": mean([record["entropy_initial"] for record in some]),
            "entropy_after_tool": mean([record["entropy_after_tool"] for record in some]),
        }

    domains = sorted({record["domain"] for record in records})
    by_domain = {d: figures([r for r in records if r["domain"] == d]) for d in domains}
    return {**figures(records), "domains": by_domain}


# ---- training -----------------------------------------------------------------------------


def questions_of_step(questions: list[Question], step: int, config: Config) -> list[Question]:
    """What step 1, 2, .. asks: every question once in a random order, then again in another."""
    asked, orders, n = [], {}, config.questions_per_step
    for i in range((step - 1) * n, step * n):
        epoch, at = divmod(i, len(questions))
        if epoch not in orders:
            rng = random.Random(f"order {config.seed} {epoch}")
            orders[epoch] = rng.sample(questions, len(questions))
        asked.append(orders[epoch][at])
    return asked


def train_step(
    policy: Policy, optimizer, questions: list[Question], config: Config, tools, step: int
) -> tuple[dict, list[list[Segment]], list[list[Reward]]]:
    """One step of ARPO: its metrics, and the leaves and their rewards for each question.

    All that it draws depends on the seed and the number of the step alone.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed * 1_000_003 + step)
    rollout = Rollout(policy, config, tools, random.Random(f"rollout {config.seed} {step}"))
    groups = rollout.run(questions)  # M leaves for each question
    rewards = [
        [score(policy, leaf, question, config, tools) for leaf in leaves]
        for question, leaves in zip(questions, groups, strict=True)
    ]
    rolled_out = time.perf_counter()
    rows = [row for pair in zip(groups, rewards, strict=True) for row in credit(*pair, config)]
    stats = update(policy, optimizer, rows, config)
    metrics = {
        **step_metrics(groups, rewards),
        "prefill_tokens": rollout.prefill_tokens,
        "train_tokens": sum(map(len, rows)),
        **stats,
        "seconds_rollout": rolled_out - started,
        "seconds_update": time.perf_counter() - rolled_out,
    }
    return metrics, groups, rewards


def step_metrics(groups: list[list[Segment]], rewards: list[list[Reward]]) -> dict:
    """What the trees of one step, and their rewards, look like."""
    leaves = [leaf for group in groups for leaf in group]
    all_rewards = [r for some in rewards for r in some]
    return {
        "reward": mean([r.total for r in all_rewards]),
        "accuracy": mean([r.accuracy == 1 for r in all_rewards]),
        "well_formed": mean([r.well_formed for r in all_rewards]),
        "groups": len(groups),
        "equal_groups": sum(len({r.total for r in some}) == 1 for some in rewards),
        "rollouts": len(leaves),
        **tree_counts(leaves),
        "train_tokens_unpacked": sum(len(s.token_ids) for leaf in leaves for s in leaf.path()),
    }


def train(config: Config, tools: dict[str, toolbox.Tool] | None = None) -> int:
    """Roll out, reward, credit, update, log; evaluate before, now and then, and after."""
    if config.temperature == 0:
        raise UserError("--temperature 0: training needs samples that differ; it must be above 0")
    questions, test = load_questions(config.dataset_path), load_questions(config.eval_path)
    tools = tools or make_tools(config)
    torch.manual_seed(config.seed)  # the fresh adapter
    policy = load_policy(config, tools, trainable=True)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    run = RunFolder(config)
    with progress_bar() as bar:
        try:
            before = run.evaluate(policy, test, tools, bar, step=0)
            task = bar.add_task("train", total=config.steps)
            bar.console.print(LOG_HEAD)
            for step in range(1, config.steps + 1):
                asked = questions_of_step(questions, step, config)
                metrics, *trees = train_step(policy, optimizer, asked, config, tools, step)
                run.log({"step": step, **metrics})
                bar.console.print(log_line(step, metrics))
                if config.record_every and (step - 1) % config.record_every == 0:
                    run.record(policy, step, asked, *trees)
                if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                    run.evaluate(policy, part_of(test), tools, bar, step)
                bar.advance(task)
            bar.remove_task(task)
            after = run.evaluate(policy, test, tools, bar, step=config.steps)
        except KeyboardInterrupt:
            run.save(policy)
            console.print(f"stopped; the adapter is in {run.folder / 'adapter'}", markup=False)
            return 130
    run.save(policy)
    console.print(comparison(before, after))
    console.print(run.in_words(), markup=False, soft_wrap=True)
    return 0


def part_of(questions: list[Question], per_domain: int = 20) -> list[Question]:
    """The first few questions of every domain, for a quick look while training."""
    seen: Counter = Counter()
    some = []
    for question in questions:
        seen[question.domain] += 1
        if seen[question.domain] <= per_domain:
            some.append(question)
    return some


class RunFolder:
    """What a run leaves: config.json, metrics, evaluations and rollouts (.jsonl), adapter/."""

    def __init__(self, config: Config):
        self.config, self.folder = config, free_folder(Path(config.output_dir))
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--output_dir {config.output_dir}: {reason(error)}") from None
        text = json.dumps(dataclasses.asdict(config), indent=2)
        (self.folder / "config.json").write_text(text + "\n", encoding="utf-8")
        self.totals: Counter = Counter()
        self.started = time.perf_counter()
        console.print(f"writing to {self.folder}", markup=False, soft_wrap=True)

    def append(self, name: str, row: dict) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def log(self, metrics: dict) -> None:
        self.append("metrics.jsonl", metrics)
        for name in ("prefill_tokens", "reread_tokens", "train_tokens", "train_tokens_unpacked"):
            self.totals[name] += metrics[name]

    def evaluate(self, policy: Policy, questions: list[Question], tools, bar, step: int) -> dict:
        """Sampled at temperature 1, and greedy."""
        figures = {}
        for name, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            config = dataclasses.replace(self.config, temperature=temperature)
            on_progress = advance(bar, f"evaluate, {name}", questions)
            records = evaluate(policy, questions, config, tools, on_progress=on_progress)
            figures[name] = summary(records)
            self.append("evaluations.jsonl", {"step": step, "decoding": name, **figures[name]})
        sampled, greedy = figures["sampled"], figures["greedy"]
        bar.console.print(
            f"[bold]step {step}: test accuracy {sampled['accuracy']:.1%} sampled, "
            f"{greedy['accuracy']:.1%} greedy[/] ({sampled['questions']} questions)"
        )
        return figures

    def record(self, policy: Policy, step: int, questions, groups, rewards, most: int = 2):
        """The trees of some questions, enough to draw them later."""
        for each in list(zip(questions, groups, rewards, strict=True))[:most]:
            self.append("rollouts.jsonl", {"step": step, **tree_record(policy, *each, self.config)})

    def save(self, policy: Policy) -> None:
        policy.model.save_pretrained(self.folder / "adapter")

    def in_words(self) -> str:
        t, seconds = self.totals, time.perf_counter() - self.started
        reread = t["reread_tokens"] / max(1, t["prefill_tokens"])
        packed = t["train_tokens_unpacked"] / max(1, t["train_tokens"])
        return (
            f"{seconds:.0f} seconds. Read {t['prefill_tokens']:,} tokens of prompts and results; "
            f"reading the prefix again every turn: {reread:.1f} times as many.\n"
            f"Trained on {t['train_tokens']:,} tokens; one row a trajectory: {packed:.1f} times.\n"
            f"Adapter, metrics and rollouts: {self.folder}"
        )


def free_folder(folder: Path) -> Path:
    """The folder itself, or its name with the first free number: no run overwrites another."""
    folder = folder.resolve()
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def tree_record(
    policy: Policy, question: Question, leaves: list[Segment], rewards: list[Reward], config: Config
) -> dict:
    """A question's tree as plain data: nodes name their parent by index, leaves name their node."""
    A = group_advantages([r.total for r in rewards]).tolist()
    credits = segment_advantages(leaves, torch.tensor(A), config.shared_weight)
    entropies = token_entropies(policy, leaves, config)
    index = {segment: i for i, segment in enumerate(shared_by(leaves))}
    nodes = [
        {
            "parent": index.get(segment.parent),
            "author": segment.author,
            "tokens": [policy.decode([token]) for token in segment.token_ids],
            "stop": segment.stop,
            "entropy": segment.entropy,
            "token_entropy": entropies.get(segment),
            "advantage": credits[segment].mean().item() if segment in credits else None,
            "decision": dataclasses.asdict(segment.decision) if segment.decision else None,
        }
        for segment in index
    ]
    return {
        "question": question.text,
        "answers": question.answers,
        "domain": question.domain,
        "nodes": nodes,
        "leaves": [
            {"node": index[leaf], "advantage": a, **dataclasses.asdict(r)}
            for leaf, r, a in zip(leaves, rewards, A, strict=True)
        ],
    }


@torch.no_grad()
def token_entropies(policy: Policy, leaves: list[Segment], config: Config) -> dict:
    """Entropy of every policy token in the tree, divided by ln V: segment -> list."""
    counted = {s: dict.fromkeys(leaves, 0.0) for s in shared_by(leaves) if s.author == "policy"}
    row = make_row(leaves, counted)
    batch = make_batch([row], policy.pad_id, policy.device, policy.lm.dtype)
    H = token_logprobs(policy, batch, config.temperature or 1.0)[1][0]  # (T,)
    H = (H / math.log(policy.lm.config.vocab_size)).tolist()
    found, at = {}, 0
    for segment in shared_by(leaves):
        if segment in counted:
            found[segment] = [round(h, 4) for h in H[at : at + len(segment.token_ids)]]
        at += len(segment.token_ids)
    return found


# ---- command line -------------------------------------------------------------------------


def make_tools(config: Config) -> dict[str, toolbox.Tool]:
    """The built-in tools, by name."""
    c = config
    try:
        return toolbox.default_tools(c.documents_path, c.search_results, c.search_chars)
    except (OSError, ValueError) as error:
        raise UserError(f"--documents_path {c.documents_path}: {reason(error)}") from None


def eval_command(config: Config, samples: int, pass_k: int | None, json_path: str | None) -> int:
    """Accuracy on a file of questions, sampled and greedy, with intervals and by domain."""
    k = samples if pass_k is None else pass_k
    if not 1 <= k <= samples:
        raise UserError(f"--samples {samples} --pass_k {k}: it must be 1 <= pass_k <= samples")
    questions, tools = load_questions(config.eval_path), make_tools(config)
    policy = load_policy(config, tools, trainable=False)
    if json_path:
        write_json(Path(json_path), {})  # better refused now than after the work
    figures = {}
    with progress_bar() as bar:
        for name, temperature, n in (("sampled", config.temperature, samples), ("greedy", 0.0, 1)):
            asked = dataclasses.replace(config, temperature=temperature)
            records = evaluate(policy, questions, asked, tools, n, advance(bar, name, questions))
            figures[name] = summary(records, min(k, n))
            console.print(report_table(name, figures[name]))
    if json_path:
        write_json(Path(json_path), {"config": dataclasses.asdict(config), **figures})
    return 0


def write_json(path: Path, value: dict) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: {reason(error)}") from None


def show_command(config: Config, text: str | None, answer: str | None) -> int:
    """Roll out one question and draw its tree: entropy, tool results, decisions, rewards."""
    known = load_questions(config.eval_path)
    if text is None:
        question = next((q for q in known if q.domain == "deep_search"), known[0])
    else:
        answers = [answer] if answer else []
        question = next((q for q in known if q.text == text), Question(text, answers))
    tools = make_tools(config)
    torch.manual_seed(config.seed)
    policy = load_policy(config, tools, trainable=False)
    (leaves,) = Rollout(policy, config, tools, random.Random(config.seed)).run([question])
    rewards = [score(policy, leaf, question, config, tools) for leaf in leaves]
    console.print(draw_tree(tree_record(policy, question, leaves, rewards, config)))
    answer = ", ".join(question.answers) or "unknown; name it with --answer"
    console.print(f"answer: {answer}", markup=False)
    return 0


COMMANDS = {  # name: (function, flags it has beside those of Config)
    "train": (train, {}),
    "eval": (
        eval_command,
        {
            "--samples": ("int", 1, "trajectories for each question"),
            "--pass_k": ("int", None, "k of pass@k (default: samples)"),
            "--json": ("str", None, "write the figures to this file"),
        },
    ),
    "show": (
        show_command,
        {
            "--question": ("str", None, "the question (default: a deep search of the mini-world)"),
            "--answer": ("str", None, "its right answer, where the question is your own"),
        },
    ),
}


def parse_command(args: list[str]) -> Callable[[], int]:
    """The command that was asked for, with its settings, ready to run."""
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if args else 2)
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; the commands are {', '.join(COMMANDS)}")
    command, own_flags = COMMANDS[name]
    parser = Parser(prog=f"arpo_mini.py {name}", description=command.__doc__, allow_abbrev=False)
    for flag, (annotation, default, words) in own_flags.items():
        parser.add_argument(flag, type=kind(annotation), default=default, help=words)
    for item in dataclasses.fields(Config):
        if name == "train":
            parser.add_field(item)
        elif item.name != "dataset_path":  # there, --dataset_path names what is evaluated on
            parser.add_field(item, *(["--dataset_path"] if item.name == "eval_path" else []))
    values = parser.parse(args[1:])
    own = [values.pop(flag.removeprefix("--")) for flag in own_flags]
    config = Config(**values)
    return lambda: command(config, *own)


def main(args: list[str]) -> int:
    try:
        return parse_command(args)()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
