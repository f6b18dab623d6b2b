"""What the README and data/README.md claim of the shipped model and of the default run. Slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.config import Config
from arpo_mini import main

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_cold_start_leaves_something_to_learn_everywhere(tmp_path):
    assert main(["eval", "--samples", "16", "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    sampled, greedy = figures["sampled"], figures["greedy"]
    assert 0.25 <= sampled["accuracy"] <= 0.45
    assert greedy["accuracy"] <= 0.60
    assert sampled["well_formed"] >= 0.95
    assert sampled["entropy_after_tool"] >= 1.4 * sampled["entropy_initial"]
    for domain, values in sampled["domains"].items():
        assert values["pass@16"] >= 0.80, domain


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """Accuracy by (step, decoding) of one default run, its last step, and its peak memory."""
    folder = tmp_path_factory.mktemp("default") / "run"
    code = (  # VmHWM begins anew with the program, unlike ru_maxrss, which knows pytest's own peak
        "import re, arpo_mini, pathlib; code = arpo_mini.main(['train', '--output_dir', %r]);"
        "status = pathlib.Path('/proc/self/status').read_text();"
        "print(re.search(r'VmHWM:\\s*(\\d+) kB', status)[1]); raise SystemExit(code)"
    )
    command = [sys.executable, "-c", code % str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no noise of the libraries
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    accuracy = {(row["step"], row["decoding"]): row["accuracy"] for row in rows}
    peak = int(done.stdout.split()[-1]) * 1024
    return accuracy, max(row["step"] for row in rows), peak


@pytest.mark.slow
def test_the_default_run_learns_within_its_memory(default_run):
    accuracy, last, peak = default_run
    assert accuracy[0, "sampled"] <= 0.45
    assert accuracy[last, "sampled"] >= 0.85
    assert accuracy[last, "greedy"] >= 0.90
    assert peak <= 3e9


@pytest.mark.slow
def test_the_readme_example_of_a_tool_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 12
    code = code.replace("runs/letters", str(tmp_path / "letters")).replace("steps=5", "steps=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "letters" / "adapter").is_dir()


def test_the_readme_names_what_there_is():
    """Every function and flag that the README's tables name exists."""
    import re

    import advantage
    import arpo_mini
    import entropy
    import tools
    from lab.sft import Settings

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## The algorithm, step by step")[1].split("Step 10 has")[0]
    names = {name for row in table.splitlines()[3:] for name in re.findall(r"`(\w+)`", row)}
    places = (arpo_mini, arpo_mini.Rollout, entropy, advantage, tools, Config)
    for name in names - {"generate", "output_scores", "w"}:
        assert any(hasattr(place, name) for place in places), name
    others = r"chromium|\$shot|pngquant|python -m lab\.(compare|report|bench)"  # have their own
    text = "\n".join(line for line in text.splitlines() if not re.search(others, line))
    flags = set(re.findall(r"--(\w+)", text)) - {"help", "preset"}
    own = {flag[2:] for _, flags in arpo_mini.COMMANDS.values() for flag in flags}
    own |= set(Settings.__dataclass_fields__)  # of the cold start
    assert flags <= set(Config.__dataclass_fields__) | own
