"""The house: imports point one way, and the lessons are pure."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "entropy": {"torch"},
    "advantage": {"torch"},
    "tools": {"numpy"},
    "alarms": set(),
    "terminal": {"rich"},
    "runs": {"torch", "peft", "safetensors", "numpy", "terminal"},
    "metrics": {"advantage"},
    "data/formats": {"pyarrow", "advantage", "terminal"},
    "view/trees": set(),
    "view/curves": {"view"},
    "view/page": {"view"},
    "lab/report": {"terminal", "view"},
    "memory": {"torch", "terminal"},
    "settings": {"entropy", "terminal"},
    "policy": {"torch", "transformers", "peft", "tools", "data", "memory", "settings", "terminal"},
    "packing": {"torch", "advantage"},
    "decoding": {
        *("torch", "transformers", "tools", "advantage", "entropy", "packing", "policy", "runs")
    },
    "arpo_mini": {
        *("torch", "transformers", "settings", "policy", "decoding", "packing"),
        *("entropy", "advantage", "tools", "data"),
        *("terminal", "runs", "alarms", "memory", "metrics", "view"),
    },
}


@pytest.mark.parametrize("module", ALLOWED)
def test_a_module_imports_only_what_it_stands_on(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert {name for name in found if name not in sys.stdlib_module_names} <= ALLOWED[module]


@pytest.mark.parametrize("module", ["entropy", "advantage", "packing", "alarms"])
def test_the_lessons_are_pure(module):
    """No clock, no global random state, no printing, no files."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    assert not names & {"print", "open", "input"}
    imported = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert not imported & {"random", "time", "os", "sys"}


def test_a_function_fits_on_a_screen():
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("lab/*.py"),
        *ROOT.glob("view/*.py"),
        *ROOT.glob("data/*.py"),
    ]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 55, f"{path.name}: {node.name}"
