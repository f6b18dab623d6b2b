"""Make the tiny Qwen3 from nothing: tokenizer, model, supervised cold start on demonstrations.

    python -m lab.coldstart [--output_dir data/tiny-qwen3]

The demonstrator solves mini-world problems in the transcript grammar with the real tools. First it
is always right; in a second stage it hesitates after tool results, the way the paper observed real
models to: it guesses instead of calculating, misreads, stops early, looks again. That is what makes
the entropy rise after a tool result, and what ARPO has to unlearn.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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

    guess: float = 0.0  # writes a number where the next step is the calculator
    stop: float = 0.0  # takes what it just found for the answer
    misread: float = 0.0  # reads another value of the last result
    again: float = 0.0  # makes the same call once more


UNSURE = Hesitation(guess=0.5, stop=0.05, misread=0.3, again=0.06)


class Demonstrator:
    """Writes the transcript of one problem as (author, text) turns, calling the real tools."""

    def __init__(self, world: dict[str, Entity], tools: dict, rng: Random):
        self.world, self.tools, self.rng = world, tools, rng
        self.by_title = {e.name.removeprefix("the "): e for e in world.values()}
        self.results: dict[tuple[str, str], str] = {}  # one call has one result

    def call(self, tool: str, argument: str) -> str:
        if (tool, argument) not in self.results:
            (result,) = run_calls([ToolCall(tool, argument)], self.tools, time_limit=5.0)
            if not result.ok:
                raise ValueError(f"the call {tool}({argument}) failed: {result.text}")
            self.results[tool, argument] = result_text(result)
        return self.results[tool, argument]

    def solve(self, problem: Problem, unsure: Hesitation) -> list[tuple[str, str]]:
        turns: list[tuple[str, str]] = []
        thought = ""
        for step, after in zip(problem.steps, [*problem.steps[1:], None], strict=True):
            plan = "I compute." if step.tool == "calculator" else f"I need {step.need}."
            turns += self.act(f"{thought}{plan}", step)
            while self.rng.random() < unsure.again:
                turns += self.act("I look again.", step)
            found = step.found
            if after is None and self.rng.random() < unsure.misread:
                found = self.misread(step)
            thought = f"Found {found}. "
            if after is None or self.rng.random() < unsure.stop:
                break
            if after.tool == "calculator" and self.rng.random() < unsure.guess:
                guess = self.guess(int(problem.answer))
                return [*turns, self.answer(f"{thought}I guess {guess}.", guess)]
        return [*turns, self.answer(thought + "That is the answer.", found)]

    def act(self, thought: str, step: Step) -> list[tuple[str, str]]:
        policy = f"<think>{thought}</think><{step.tool}>{step.argument}</{step.tool}>"
        return [("policy", policy), ("tool", self.call(step.tool, step.argument))]

    def answer(self, thought: str, value: str) -> tuple[str, str]:
        return "policy", f"<think>{thought}</think><answer>\\boxed{{{value}}}</answer>"

    def misread(self, step: Step) -> str:
        """Another value of the result: another fact of the document, or a number gone wrong."""
        if step.tool == "calculator":
            return str(abs(int(step.found) + self.rng.choice((-10, -1, 1, 10, 100))))
        facts = self.by_title[step.argument].facts.values()
        alike = [v for v in facts if v != step.found and v.isdigit() == step.found.isdigit()]
        return self.rng.choice(alike or [v for v in facts if v != step.found])

    def guess(self, right: int) -> str:
        return str(self.rng.randint(right // 2, right + right // 2 + 2))


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
        for _, text in demonstrator.solve(problem, UNSURE):
            texts += re.split("</?[a-z]+>", text)
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


def encode(tokenizer, question: str, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and, beside each, 1 where the policy is its author."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids, by_policy = list(prompt), [0] * len(prompt)
    for author, text in turns:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        by_policy += [int(author == "policy")] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*by_policy, 1]


BATCH, POOL = 32, 16  # demonstrations a step; steps whose demonstrations are sorted together


def batches(demonstrator, maker, tokenizer, unsure: Hesitation):
    """Endless batches (ids, by_policy), each of similar lengths so that little is padding."""
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
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),  # (B, T)
                torch.tensor([mine + [0] * (width - len(mine)) for _, mine in group]),  # (B, T)
            )


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(model, data, steps: int, peak: float) -> None:
    """Next-token prediction on the policy's tokens; results and prompts are only read."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    started, average = time.time(), None
    for step in range(steps):
        ids, by_policy = next(data)
        counted = by_policy[:, 1:] > 0  # (B, T-1)
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[counted])  # (n, V)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {average:.4f}  {time.time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=DATA / "tiny-qwen3")
    parser.add_argument("--start", type=Path, help="a saved first stage; only the second is run")
    parser.add_argument("--sure_steps", type=int, default=3000, help="of right demonstrations")
    parser.add_argument(
        "--unsure_steps", type=int, default=1000, help="of hesitant ones, after them"
    )
    parser.add_argument("--vocab_size", type=int, default=1280)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    world, _, test = make()
    tools = default_tools(DATA / "documents.jsonl", top_k=1, max_chars=200)
    taken = {problem.key for problem in test}

    def data(seed: int, unsure: Hesitation):
        maker = Maker(world, Random(seed), taken)
        return batches(Demonstrator(world, tools, Random(seed)), maker, tokenizer, unsure)

    if args.start:
        tokenizer = AutoTokenizer.from_pretrained(args.start)
        model = AutoModelForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        torch.manual_seed(args.seed)
        tokenizer = build_tokenizer(corpus(world, tools, taken, args.seed), args.vocab_size)
        model = build_model(tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
        train(model, data(args.seed + 1, Hesitation()), args.sure_steps, peak=3e-3)
    train(model, data(args.seed + 2, UNSURE), args.unsure_steps, peak=1e-3)
    model.generation_config.update(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
