"""Make the tiny Qwen3 from nothing: tokenizer, model, supervised cold start on demonstrations.

    python -m lab.coldstart [--output_dir data/tiny-qwen3]
    python -m lab.coldstart --model_name M     (an adapter for a model there is: lab/sft.py)

The demonstrator solves mini-world problems in the transcript grammar with the real tools, and
hesitates after tool results, the way the paper observed real models to: it guesses instead of
calculating, misreads, stops early, looks again. That is what makes the entropy rise after a tool
result, and what ARPO has to unlearn.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data.make_world import DOMAINS, Entity, Maker, Problem, Step, capital, make
from tools import ToolCall, default_tools, result_text, run_calls

DATA = Path(__file__).parent.parent / "data"
TAGS = ("think", "search", "calculator", "result", "answer")
# Qwen's own pre-tokenizer: words with the space before them, digits one by one.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A system message is dropped: this model learnt the grammar and its tools in the cold start.
CHAT_TEMPLATE = (
    "{%- for message in messages if message.role != 'system' -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


# The demonstrator -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Hesitation:
    """What the demonstrator does right after a tool result, as probabilities."""

    again: float = 0.0  # makes the same call once more
    misread: float = 0.0  # reads another value where the right one would be the answer
    stop: float = 0.0  # takes what it just found for the answer
    guess: float = 0.0  # guesses what it just found where the next step is the calculator


UNSURE = Hesitation(again=0.06, misread=0.48, stop=0.1, guess=0.8)
# The share of turns in which it goes the right way whatever the chances. They are what is learnt
# (see `Turn`), so this only decides how often the long ways are seen to their end.
RIGHT_WAY = 0.75


@dataclass(frozen=True)
class Turn:
    """A stretch of a transcript; for the policy's, all that it might have been: text -> chance."""

    author: str
    text: str
    chances: dict[str, float]


class Demonstrator:
    """Writes the transcript of one problem, calling the real tools."""

    def __init__(self, world: dict[str, Entity], tools: dict, rng: Random):
        self.tools, self.rng = tools, rng
        self.by_title = {e.name.removeprefix("the "): e for e in world.values()}
        self.results: dict[tuple[str, str], str] = {}  # one call has one result

    def solve(self, problem: Problem, unsure: Hesitation) -> list[Turn]:
        turns: list[Turn] = []
        done: int | None = 0  # steps made so far; None: answered
        while done is not None:
            options = self.options(problem, done, unsure)
            chances = {text: chance for text, (chance, _) in options.items()}
            if self.rng.random() < RIGHT_WAY:
                (text,) = self.options(problem, done, Hesitation())
            else:
                (text,) = self.rng.choices([*chances], chances.values())
            turns.append(Turn("policy", text, chances))
            done = options[text][1]
            if done is not None:
                turns.append(Turn("tool", self.call(problem.steps[done - 1]), {}))
        return turns

    def options(
        self, problem: Problem, done: int, unsure: Hesitation
    ) -> dict[str, tuple[float, int | None]]:
        """What may be written after `done` steps: text -> its chance, and the steps then made."""
        after = problem.steps[done] if done < len(problem.steps) else None
        if done == 0:
            return {act(plan(after), after): (1.0, 1)}
        last = problem.steps[done - 1]
        options: dict = {act("I look again.", last): (unsure.again, done)}

        def add(text: str, chance: float, then: int | None = None) -> None:
            options[text] = (options.get(text, (0.0, then))[0] + chance, then)

        for found, chance in self.readings(last, 0.0 if after else unsure.misread).items():
            thought, left = f"Found {found}. ", chance * (1 - unsure.again)
            stop = unsure.stop if after else 1.0
            guess = unsure.guess if after and after.tool == "calculator" else 0.0
            add(answer(f"{thought}That is the answer.", found), left * stop)
            add(answer(f"{thought}I guess {found}.", found), left * (1 - stop) * guess)
            if after:
                add(act(thought + plan(after), after), left * (1 - stop) * (1 - guess), done + 1)
        return {text: option for text, option in options.items() if option[0] > 0}

    def readings(self, step: Step, misread: float) -> dict[str, float]:
        """What may be read in the step's result: the right value, or another one that is there."""
        if step.tool == "calculator":
            return {step.found: 1.0}
        facts = self.by_title[step.argument].facts.values()
        others = {v for v in facts if v != step.found}
        wrong = {v for v in others if v.isdigit() == step.found.isdigit()} or others
        return {step.found: 1 - misread} | {v: misread / len(wrong) for v in sorted(wrong)}

    def call(self, step: Step) -> str:
        """The tool's result, as the policy reads it."""
        key = (step.tool, step.argument)
        if key not in self.results:
            (result,) = run_calls([ToolCall(*key)], self.tools, time_limit=5.0)
            if not result.ok:
                raise ValueError(f"the call {step.tool}({step.argument}) failed: {result.text}")
            self.results[key] = result_text(result)
        return self.results[key]


def plan(step: Step) -> str:
    return "I compute." if step.tool == "calculator" else f"I need {step.need}."


def act(thought: str, step: Step) -> str:
    return f"<think>{thought}</think><{step.tool}>{step.argument}</{step.tool}>"


def answer(thought: str, value: str) -> str:
    return f"<think>{thought}</think><answer>\\boxed{{{value}}}</answer>"


# Tokenizer and model --------------------------------------------------------------------------


def corpus(world: dict[str, Entity], tools: dict, taken: set[tuple], seed: int) -> list[str]:
    """Text to learn the tokens from: documents, questions and transcripts, without their tags."""
    maker, demonstrator = (
        Maker(world, Random(seed), taken),
        Demonstrator(world, tools, Random(seed)),
    )
    texts = [text for e in world.values() for text in (e.text, capital(e.name))]
    for problem in [maker.draw(domain) for domain in DOMAINS for _ in range(2000)]:
        texts.append(f"user\n{problem.text}\nassistant\n")
        for turn in demonstrator.solve(problem, UNSURE):
            texts += re.split("</?[a-z]+>", turn.text)
    return texts


def build_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's chat markers; each protocol tag is one token; pad is not eos."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The real Qwen3 architecture, tiny: four layers of width 128."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


# Training -------------------------------------------------------------------------------------


def encode(tokenizer, question: str, turns: list[Turn]) -> tuple[list[int], list[dict]]:
    """Token ids and, for each, what the policy should have expected there: token id -> chance.

    Nothing is expected of a prompt or a result: it is only read.
    """
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids, expected = list(prompt), [{} for _ in prompt]
    for turn in turns:
        texts = [turn.text, *turn.chances]
        piece, *others = tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids += piece
        possible = list(zip(others, turn.chances.values(), strict=True))
        for i, token in enumerate(piece):
            total = sum(chance for _, chance in possible)
            here: dict[int, float] = {}
            for other, chance in possible:
                here[other[i]] = here.get(other[i], 0.0) + chance / total
            expected.append(here)
            possible = [(o, chance) for o, chance in possible if o[i] == token]
    return [*ids, tokenizer.eos_token_id], [*expected, {tokenizer.eos_token_id: 1.0}]


BATCH, POOL = 32, 16  # demonstrations a step; steps whose demonstrations are sorted together


def batches(demonstrator, maker, tokenizer, unsure: Hesitation):
    """Endless batches (input_ids, expected), of similar lengths so that little is padding."""
    while True:
        rows = []
        for _ in range(POOL * BATCH):
            problem = maker.draw(maker.rng.choice((*DOMAINS, "deep_search")))
            rows.append(encode(tokenizer, problem.text, demonstrator.solve(problem, unsure)))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        maker.rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group])  # (B, T)
            yield ids, [expected for _, expected in group]


def learning_rate(step: int, steps: int, peak: float = 3e-3) -> float:
    """Of step 0, 1, ..: a linear warm-up, then half a cosine down to a fiftieth."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def soft_targets(expected: list[list[dict]], vocab_size: int):
    """Row and column of each of the n tokens that are learnt, and its (n, V) distribution."""
    learnt = [(r, c, p) for r, row in enumerate(expected) for c, p in enumerate(row) if p]
    rows, columns = (torch.tensor(index) for index in list(zip(*learnt, strict=True))[:2])
    targets = torch.zeros(len(learnt), vocab_size)
    for i, (_, _, chances) in enumerate(learnt):
        targets[i, list(chances)] = torch.tensor([*chances.values()])
    return rows, columns, targets


def train(model, data, steps: int) -> None:
    """Minimise the KL divergence from the demonstrator to the model, on the policy's tokens.

    Where the demonstrator chooses, the target is the distribution of its choices, not the one it
    drew: then choices add no noise, and the digits that it copies are learnt exactly.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [*model.get_input_embeddings().parameters(), *model.model.norm.parameters()]
    others += [p for p in model.model.layers.parameters() if p.ndim == 1]
    optimizers = [  # Muon needs a third of the steps that AdamW alone needs
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.05),
    ]
    started, average = time.time(), None
    for step in range(steps):
        ids, expected = next(data)
        rows, columns, targets = soft_targets(expected, model.config.vocab_size)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        logp = model.lm_head(hidden[rows, columns - 1]).log_softmax(dim=-1)  # (n, V)
        loss = torch.nn.functional.kl_div(logp, targets, reduction="batchmean")
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  KL {average:.4f}  {time.time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=DATA / "tiny-qwen3")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--vocab_size", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    world, _, test = make()
    tools = default_tools(DATA / "documents.jsonl", top_k=1, max_chars=200)
    taken = {problem.key for problem in test}

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(corpus(world, tools, taken, args.seed), args.vocab_size)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    maker = Maker(world, Random(args.seed + 1), taken)
    demonstrator = Demonstrator(world, tools, Random(args.seed + 1))
    train(model, batches(demonstrator, maker, tokenizer, UNSURE), args.steps)
    model.generation_config.update(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    if {"--model_name", "--data"} & {arg.partition("=")[0] for arg in sys.argv[1:]}:
        from lab import sft

        sys.exit(sft.main(sys.argv[1:]))
    main()
