"""What the documents claim of the shipped model, of the default run and of names. Slow."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app import cli
from app.config import Config
from arpo_mini import load_agent, train

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_cold_start_leaves_something_to_learn_everywhere(tmp_path):
    figures = tmp_path / "figures.json"
    args = ["eval", "--samples", "16", "--json", str(figures)]
    assert cli.main(args, train, load_agent) == 0
    sampled, greedy = (json.loads(figures.read_text())[name] for name in ("sampled", "greedy"))
    assert 0.25 <= sampled["accuracy"] <= 0.45
    assert greedy["accuracy"] <= 0.60
    assert sampled["well_formed"] >= 0.95
    assert sampled["entropy_after_tool"] >= 1.4 * sampled["entropy_initial"]
    for domain, values in sampled["domains"].items():
        assert values["pass@16"] >= 0.80, domain


@pytest.mark.slow
def test_the_default_run_learns_within_its_memory(tmp_path):
    folder = tmp_path / "run"
    code = (  # VmHWM begins anew with the program, unlike ru_maxrss, which knows pytest's own peak
        "import re, arpo_mini, pathlib; from app import cli;"
        "code = cli.main(['train', '--output_dir', %r], arpo_mini.train, arpo_mini.load_agent);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]); raise SystemExit(code)"
    )
    command = [sys.executable, "-c", code % str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no noise of the libraries
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").open(encoding="utf-8")]
    accuracy = {(row["step"], row["decoding"]): row["accuracy"] for row in rows}
    assert accuracy[0, "sampled"] <= 0.45
    assert accuracy[Config().steps, "sampled"] >= 0.85
    assert accuracy[Config().steps, "greedy"] >= 0.90
    assert int(done.stdout.split()[-1]) * 1024 <= 3e9


def documents() -> str:
    paths = [ROOT / "README.md", ROOT / "data/README.md", *sorted(ROOT.glob("docs/*.md"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


@pytest.mark.slow
def test_the_example_of_a_tool_runs(tmp_path):
    code = documents().split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("runs/letters", str(tmp_path / "letters")).replace("steps=5", "steps=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "letters" / "adapter").is_dir()


def test_the_documents_name_what_there_is():
    """Every module of a command, and every flag of ours."""
    from lab import coldstart, compare, corpus, forking, sft
    from lab.bench import __main__ as bench

    text = documents()
    modules = set(re.findall(r"python -m ((?:lab|course|data)[\w.]*)", text))
    assert modules and all(importlib.util.find_spec(name) for name in modules)
    ours = {flag.lstrip("-") for _, own in cli.COMMANDS.values() for flag in own}
    classes = [Config, sft.Settings, *(f for _, f in bench.COMMANDS.values())]
    classes += [module.Flags for module in (coldstart, compare, forking, corpus)]
    ours |= {item.name for each in classes for item in dataclasses.fields(each)}
    foreign = r"chromium|\$shot|pngquant|pip |launch |torchrun "
    lines = [line for line in text.splitlines() if not re.search(foreign, line)]
    flags = set(re.findall(r"(?<!\w)--(\w+)", "\n".join(lines)))
    assert flags and flags <= ours | {"preset", "help"}, flags - ours
