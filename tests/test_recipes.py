"""The recipes of docs/using.md, each command as it stands there; and the corpus that one makes."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from app import cli
from app.config import DATA
from arpo_mini import load_agent, train
from data.files import load_documents
from lab import corpus, sft
from lab.coldstart import build_model
from lab.command import exit_code

ROOT = Path(__file__).parent.parent
FIXTURES = {  # a name on the page -> a file of the same form
    **{f"openai/gsm8k:main/{split}": "gsm8k" for split in ("train", "test")},
    **{f"hotpotqa/hotpot_qa:distractor/{s}": "hotpot_distractor" for s in ("train", "validation")},
    "dongguanting/ARPO-SFT-54K": "sharegpt",
    "dongguanting/ARPO-RL-Reasoning-10K:train_10k": "reinforcement",
    "dongguanting/ARPO-RL-DeepSearch-1K:hard_search": "reinforcement",
    "aime24.jsonl": "aime24",
}
LESS = "--max_segment_tokens 16 --max_total_tokens 900 --group_size 2 --initial_rollouts 1"
PROGRAMS = {
    "-m lab.corpus": (lambda args: exit_code(lambda: corpus.make(args)), ""),
    "-m lab.coldstart": (sft.main, "--demonstrations 4 --demonstrations_per_step 2"),
    "arpo_mini.py train": (
        lambda args: cli.main(["train", *args], train, load_agent),
        f"{LESS} --steps 1 --questions_per_step 2",
    ),
    "arpo_mini.py eval": (lambda args: cli.main(["eval", *args], train, load_agent), LESS),
}


def recipes():
    page = (ROOT / "docs/using.md").read_text(encoding="utf-8")
    section = page.split("\n## Recipes\n")[1].split("\n## ")[0]
    blocks = [block.split("```")[0] for block in section.split("```bash\n")[1:]]
    return [block.strip().splitlines() for block in blocks]


@pytest.mark.slow
def test_every_command_of_the_recipes_runs_as_it_is_written(tmp_path, monkeypatch):
    assert [len(block) for block in recipes()] == [3, 4, 4]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-qwen3")
    for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"):
        build_model(tokenizer).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, fixture in FIXTURES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / f"tests/fixtures/{fixture}.jsonl", name)
    for line in (line for block in recipes() for line in block):
        command = line.removeprefix(".venv/bin/python ")
        program = next(name for name in PROGRAMS if command.startswith(name))
        run, less = PROGRAMS[program]
        assert run(shlex.split(command.removeprefix(program) + " " + less)) == 0, line
    for name, questions in {"gsm8k": 3, "hotpot": 2, "aime24": 1}.items():
        figures = json.loads(Path(f"{name}.json").read_text(encoding="utf-8"))
        assert figures["greedy"]["questions"] >= questions - 2, name


FORMS = [
    {"context": {"title": ["A", "B"], "sentences": [["One.", " Two."], ["Three."]]}},
    {"context": {"title": ["A"], "content": [["One.", " Two."]]}},
    {"context": [["A", ["One.", " Two."]], ["B", ["Three."]]]},
    {"paragraphs": [{"title": "B", "paragraph_text": "Three.", "is_supporting": True}]},
    {"title": "C", "context": "Four. \u00e9"},
    {"context": {"title": ["D"], "sentences": [[]]}},  # nothing to read
]


def test_a_corpus_holds_every_paragraph_of_any_form_once(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FORMS), "utf-8")
    run = PROGRAMS["-m lab.corpus"][0]
    assert run(["--data", "rows.jsonl,rows.jsonl", "--output", "made.jsonl"]) == 0
    made = [("A", "One. Two."), ("B", "Three."), ("C", "Four. \u00e9")]
    assert [tuple(d) for d in load_documents("made.jsonl")] == made
    assert run(["--data", "rows.jsonl", "--rows", "2", "--output", "made.jsonl"]) == 0
    assert len(load_documents("made.jsonl")) == 2
    for text, words in {
        '{"question": "?"}': "'context' is missing; legal: ",
        '{"context": "Four.", "title": 5}': "title and text are texts",
        '{"paragraphs": [{"paragraph_text": {"a": 1}}]}': "title and text are texts",
    }.items():
        Path("odd.jsonl").write_text(text, "utf-8")
        refused(run(["--data", "odd.jsonl"]), f"odd.jsonl, line 1: {words}")
    refused(run([]), "--data is missing")
    refused(run(["--data", "rows.jsonl", "--output", "no/such/x"]), "--output no/such/x: No such")
