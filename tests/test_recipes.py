"""What the documents say is so: the recipes, the claims of the shipped model, all names. Slow."""

import dataclasses
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from common import ROOT, arpo, lines_of, python
from transformers import AutoTokenizer

from app.cli import COMMANDS
from app.config import DATA, Config
from data.files import load_documents
from lab import coldstart, compare, corpus, forking, sft
from lab.bench import __main__ as bench
from lab.command import exit_code

FIXTURES = {  # a name on the page -> a file of the same form
    **{f"openai/gsm8k:main/{split}": "gsm8k" for split in ("train", "test")},
    **{f"hotpotqa/hotpot_qa:distractor/{s}": "hotpot_distractor" for s in ("train", "validation")},
    "dongguanting/ARPO-SFT-54K": "sharegpt",
    "dongguanting/ARPO-RL-Reasoning-10K:train_10k": "reinforcement",
    "dongguanting/ARPO-RL-DeepSearch-1K:hard_search": "reinforcement",
    "aime24.jsonl": "aime24",
}
LESS = "--max_segment_tokens 16 --max_total_tokens 900 --group_size 2 --initial_rollouts 1"
ONE_STEP = f"{LESS} --steps 1 --questions_per_step 2"
PROGRAMS = {
    "-m lab.corpus": (lambda args: exit_code(lambda: corpus.make(args)), ""),
    "-m lab.coldstart": (coldstart.main, "--demonstrations 4 --demonstrations_per_step 2"),
    "arpo_mini.py train": (lambda args: arpo("train", *args), ONE_STEP),
    "arpo_mini.py eval": (lambda args: arpo("eval", *args), LESS),
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
        coldstart.build_model(tokenizer).save_pretrained(name)
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


def test_a_corpus_holds_every_paragraph_of_any_form_once(tmp_path, monkeypatch, refused):
    text = (ROOT / "tests/fixtures/forms_corpus.jsonl").read_text(encoding="utf-8")
    cases, (run, _) = [json.loads(line) for line in text.splitlines()], PROGRAMS["-m lab.corpus"]
    monkeypatch.chdir(tmp_path)
    for case in cases:
        Path("x.jsonl").write_text(json.dumps(case["row"]), "utf-8")
        code = run(["--data", "x.jsonl", "--output", "made.jsonl"])
        if "refused" in case:
            refused(code, case["refused"])
        else:
            assert [[*each] for each in load_documents("made.jsonl")] == case["documents"]
    good = [json.dumps(case["row"]) + "\n" for case in cases if "documents" in case]
    Path("rows.jsonl").write_text("".join(good), "utf-8")
    for data, rows, count in (("rows.jsonl,rows.jsonl", "99", 5), ("rows.jsonl", "2", 2)):
        assert run(["--data", data, "--rows", rows, "--output", "made.jsonl"]) == 0
        assert len(load_documents("made.jsonl")) == count
    refused(run(["--data", "rows.jsonl,made.jsonl", "--output", "made.jsonl"]), "a file of --data")
    refused(run([]), "--data is missing")
    refused(run(["--data", "rows.jsonl", "--output", "no/such/x"]), "--output no/such/x: No such")


# ---- the shipped model, and the default run -------------------------------------------------


@pytest.mark.slow
def test_the_cold_start_leaves_something_to_learn_everywhere(tmp_path):
    assert arpo("eval", "--samples", "16", "--json", tmp_path / "figures.json") == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    sampled, greedy = figures["sampled"], figures["greedy"]
    assert 0.25 <= sampled["accuracy"] <= 0.45 and greedy["accuracy"] <= 0.60
    assert sampled["well_formed"] >= 0.95
    assert sampled["entropy_after_tool"] >= 1.4 * sampled["entropy_initial"]
    for domain, values in sampled["domains"].items():
        assert values["pass@16"] >= 0.80, domain


@pytest.mark.slow
def test_the_default_run_learns_within_its_memory(tmp_path):
    code = (  # VmHWM begins anew with the program, unlike ru_maxrss, which knows pytest's own peak
        "import re, arpo_mini, pathlib; from app import cli;"
        "code = cli.main(['train', '--output_dir', %r], arpo_mini.train, arpo_mini.load_agent);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]); raise SystemExit(code)"
    )
    done = python("-c", code % str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (0, "")  # no noise of the libraries
    rows = lines_of(tmp_path / "run", "evaluations.jsonl")
    accuracy = {(row["step"], row["decoding"]): row["accuracy"] for row in rows}
    assert accuracy[0, "sampled"] <= 0.45
    assert accuracy[Config().steps, "sampled"] >= 0.85
    assert accuracy[Config().steps, "greedy"] >= 0.90
    assert int(done.stdout.split()[-1]) * 1024 <= 3e9


# ---- names ----------------------------------------------------------------------------------


def documents() -> str:
    paths = [ROOT / "README.md", ROOT / "data/README.md", *sorted(ROOT.glob("docs/*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.slow
def test_the_example_of_a_tool_runs(tmp_path):
    code = documents().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("runs/letters", str(tmp_path / "letters")).replace("steps=5", "steps=1")
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "letters" / "adapter").is_dir()


def test_the_documents_name_what_there_is():
    """Every module of a command, and every flag of ours."""
    text = documents()
    modules = set(re.findall(r"python -m ((?:lab|course|data)[\w.]*)", text))
    assert modules and all(importlib.util.find_spec(name) for name in modules)
    ours = {flag.lstrip("-") for _, own in COMMANDS.values() for flag in own}
    classes = [Config, sft.Settings, *(f for _, f in bench.COMMANDS.values())]
    classes += [module.Flags for module in (coldstart, compare, forking, corpus)]
    ours |= {item.name for each in classes for item in dataclasses.fields(each)}
    foreign = r"chromium|\$shot|pngquant|pip |launch |torchrun "
    lines = [line for line in text.splitlines() if not re.search(foreign, line)]
    flags = set(re.findall(r"(?<!\w)--(\w+)", "\n".join(lines)))
    assert flags and flags <= ours | {"preset", "help"}, flags - ours
