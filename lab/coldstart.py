"""Make the tiny Qwen3 from nothing: tokenizer, model, supervised cold start on demonstrations.

    python -m lab.coldstart [--output_dir data/tiny-qwen3]
    python -m lab.coldstart --world decisive   (that model, trained further on the second world)
    python -m lab.coldstart --model_name M     (an adapter for a model there is: lab/sft.py)

What it imitates, and why it hesitates after tool results: data/demonstrator.py.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2 import Qwen2Tokenizer

from app.config import DATA, option
from arpo_mini import SEARCH_CHARS
from data.demonstrator import UNSURE, WORLDS, Demonstrator, Hesitation, Turn
from data.make_world import DOMAINS, Entity, Maker, capital
from lab.command import exit_code, make_folder, parse
from lab.sft import fine_tune
from tools import default_tools

TURN = ("<|im_start|>", "<|im_end|>")
TAGS = ("think", "search", "calculator", "result", "answer")
# A system message is dropped: this model learnt the grammar and its tools in the cold start.
CHAT_TEMPLATE = (
    "{%- for message in messages if message.role != 'system' -%}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


# Tokenizer and model --------------------------------------------------------------------------


def corpus(world: dict[str, Entity], tools: dict, taken: set[tuple], seed: int) -> list[str]:
    """Text to learn the tokens from: documents, questions and transcripts, without their tags."""
    maker = Maker(world, Random(seed), taken)
    demonstrator = Demonstrator(world, tools, Random(seed))
    texts = [text for e in world.values() for text in (e.text, capital(e.name))]
    for problem in [maker.draw(domain) for domain in DOMAINS for _ in range(2000)]:
        texts.append(f"user\n{problem.text}\nassistant\n")
        for turn in demonstrator.solve(problem, UNSURE):
            texts += re.split("</?[a-z]+>", turn.text)
    return texts


def build_tokenizer(texts: list[str], vocab_size: int = 1280) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Qwen's chat markers; each protocol tag is one token; pad is not eos."""
    backend = Qwen2Tokenizer().backend_tokenizer  # words with the space before, single digits
    backend.normalizer = None  # else other bytes could come back than went in
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", *TURN],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN[1],
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """The real Qwen3 architecture, tiny: four layers of width 128."""
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(shape)


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


def batches(demonstrator, maker, tokenizer, unsure: Hesitation, domains: tuple = DOMAINS):
    """Endless batches (input_ids, expected), of similar lengths so that little is padding."""
    while True:
        rows = []
        for _ in range(POOL * BATCH):
            problem = maker.draw(maker.rng.choice((*domains, domains[-1])))
            rows.append(encode(tokenizer, problem.text, demonstrator.solve(problem, unsure)))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        maker.rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group])  # (B, T)
            yield ids, [expected for _, expected in group]


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
    for step in (bar := tqdm(range(steps), desc="cold start")):
        ids, expected = next(data)
        rows, columns, targets = soft_targets(expected, model.config.vocab_size)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
        logp = model.lm_head(hidden[rows, columns - 1]).log_softmax(dim=-1)  # (n, V)
        loss = torch.nn.functional.kl_div(logp, targets, reduction="batchmean")
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # a linear warm-up, then half a cosine down to a fiftieth
        falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / 100) * falling
            optimizer.step()
        bar.set_postfix(KL=f"{loss.item():.4f}")


@dataclass(frozen=True)
class Flags:
    world: str = option("country", "whose questions it learns to answer", choices=tuple(WORLDS))
    output_dir: str | None = option(None, "none: tiny-qwen3 beside the questions of the world")
    steps: int | None = option(None, "of the training; none: 2200, of world decisive 700", low=1)
    seed: int = option(0, "of everything that is drawn", 0, 2**32 - 1)


def cold_start(args: list[str]) -> None:
    own, _ = parse("lab.coldstart", __doc__, args, Flags, names=())
    first, (source, unsure) = own.world == "country", WORLDS[own.world]
    folder = DATA if first else DATA / own.world
    output = make_folder(own.output_dir or folder / "tiny-qwen3")
    world, _, test = source.make()
    tools = default_tools(folder / "documents.jsonl", 1, SEARCH_CHARS)
    taken = {problem.key for problem in test}

    torch.manual_seed(own.seed)
    if first:
        tokenizer = build_tokenizer(corpus(world, tools, taken, own.seed))
        model = build_model(tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-qwen3")
        model = Qwen3ForCausalLM.from_pretrained(DATA / "tiny-qwen3", dtype=torch.float32)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    maker = source.Maker(world, Random(own.seed + 1), taken)
    demonstrator = Demonstrator(world, tools, Random(own.seed + 1))
    data = batches(demonstrator, maker, tokenizer, unsure, source.DOMAINS)
    train(model, data, own.steps or (2200 if first else 700))
    model.generation_config.update(do_sample=True, eos_token_id=tokenizer.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)


def main(args: list[str]) -> int:
    of_any_model = {"--model_name", "--data"} & {arg.partition("=")[0] for arg in args}
    return exit_code(lambda: (fine_tune if of_any_model else cold_start)(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
