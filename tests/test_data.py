"""The mini-world and the tiny Qwen3 are what data/README.md says they are."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.config import Config
from arpo_mini import make_tools
from data import decisive_world, make_world
from data.demonstrator import RIGHT_WAY, UNSURE, WORLDS, Demonstrator, Hesitation
from engine.judge import judge_answer
from lab import coldstart
from lab.coldstart import encode, soft_targets
from tools import ToolCall, run_calls

DATA = Path(__file__).parent.parent / "data"
FILES = ("documents.jsonl", "train.jsonl", "test.jsonl")


def rows(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "make, folder", [(make_world.make, DATA), (decisive_world.make, DATA / "decisive")]
)
def test_the_script_writes_the_shipped_files_byte_for_byte(make, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_world.py", "--folder", str(tmp_path)])
    make_world.main(make)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_sizes_and_domains():
    assert 150 <= len(rows("documents.jsonl")) <= 200
    assert len(rows("train.jsonl")) >= 3000
    domains = Counter(row["domain"] for row in rows("test.jsonl"))
    assert set(domains) == set(make_world.DOMAINS) and min(domains.values()) >= 100


@pytest.mark.parametrize("make", [make_world.make, decisive_world.make])
def test_train_and_test_ask_different_things(make):
    _, train, test = make()
    assert not {p.key for p in train} & {p.key for p in test}
    assert not {p.text for p in train} & {p.text for p in test}
    for problems in (train, test):
        assert len({p.text for p in problems}) == len(problems)


def test_every_problem_is_solved_by_its_steps_with_the_real_tools():
    """Each finding stands in the result of its call, and the last one is the answer."""
    _, train, test = make_world.make()
    tools = make_tools(Config())
    calls = Counter()
    for problem in train + test:
        steps = problem.steps
        results = run_calls([ToolCall(s.tool, s.argument) for s in steps], tools, time_limit=5)
        for step, result in zip(steps, results, strict=True):
            assert result.ok
            assert all(part in result.text for part in step.found.split(" and "))
        assert steps[-1].found == problem.answer
        assert judge_answer(problem.answer, [problem.answer]) == 1
        calls[problem.domain, len(steps)] += 1
        used = {step.tool for step in steps}
        expected = {"math": {"calculator"}, "knowledge": {"search"}}.get(problem.domain)
        assert used == expected if expected else "search" in used
    assert {n for d, n in calls if d == "deep_search"} == {2, 3, 4, 5}
    assert {n for d, n in calls if d == "knowledge"} == {1}


def test_every_fact_is_asked_in_several_ways_and_a_document_states_several():
    assert min(map(len, make_world.ASK.values())) >= 2
    world, _, _ = make_world.make()
    assert all(len(entity.facts) >= 3 for entity in world.values())
    for entity in world.values():
        assert all(fact in entity.text for fact in entity.facts.values())


# ---- the second world ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def second_tools():
    return make_tools(Config(documents_path=str(DATA / "decisive" / "documents.jsonl")))


def test_every_third_search_of_the_second_world_is_decisive(second_tools):
    """And each way to read them is solved by its steps; only the right one gives the answer."""
    world, train, test = decisive_world.make()
    namesakes = {name for name, entity in world.items() if entity.kind == "namesake"}
    first, kinds = {"town": 2, "person": 1, "workshop": 0}, Counter()
    for problem in train[::5] + test:
        for i, steps in enumerate(decisive_world.readings(problem.steps)):
            results = run_calls([ToolCall(s.tool, s.argument) for s in steps], second_tools, 5)
            assert all(r.ok and s.found in r.text for s, r in zip(steps, results, strict=True))
            assert (steps[-1].found == problem.answer) == (i == 0)
            assert 2 <= len(steps) <= 5
        searches = [s for s in problem.steps if s.tool == "search"]
        found = [s for s in searches if s.argument not in namesakes]
        places = [bool(s.rival) for s in found]
        assert places == [n % 3 == first[problem.domain] for n in range(len(places))]
        kinds.update({"namesake": len(searches) > len(found), sum(places): 1})
    assert set(kinds) == {"namesake", 0, 1, 2} and min(kinds.values()) > 20


def test_its_demonstrator_hesitates_at_the_decisive_results_only(second_tools):
    """Elsewhere there is one way on; a wrong reading is followed to its end."""
    source, unsure = WORLDS["decisive"]
    world, _, test = source.make()
    demonstrator, ends = Demonstrator(world, second_tools, Random(0), right_way=0.0), Counter()
    for problem in test:
        turns = demonstrator.solve(problem, unsure)
        for result, turn in zip(turns[1::2], turns[2::2], strict=True):
            assert (len(turn.chances) > 1) == ("In silver:" in result.text)
            assert sum(turn.chances.values()) == pytest.approx(1)
        ends[len(turns) // 2 == len(problem.steps), problem.answer in turns[-1].text] += 1
    assert min(ends[True, True], ends[True, False], ends[False, False]) > 20


@pytest.mark.parametrize("world", WORLDS)
def test_a_short_cold_start(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coldstart, "BATCH", 2)
    monkeypatch.setattr(coldstart, "POOL", 1)
    flags = ["--world", world, "--steps", "1", "--output_dir", str(tmp_path)]
    assert coldstart.main(flags) == 0
    there, shipped = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, DATA / "tiny-qwen3"))
    assert there.get_vocab() == shipped.get_vocab()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 950_400
    assert coldstart.main([*flags, "--world", "third"]) == 2
    assert "--world third: choose one of country, decisive" in capsys.readouterr().err


# ---- the tiny Qwen3 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "tiny-qwen3")


def test_the_tiny_qwen3_is_a_real_and_a_tiny_one():
    model = AutoModelForCausalLM.from_pretrained(DATA / "tiny-qwen3")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.num_parameters() <= 1_500_000
    files = list((DATA / "tiny-qwen3").iterdir())
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}


def test_the_tokenizer(tokenizer):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for tag in ("think", "search", "calculator", "result", "answer"):
        for text in (f"<{tag}>", f"</{tag}>"):
            assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
    assert len(tokenizer.encode("20419", add_special_tokens=False)) == 5
    for text in ("Naïve café, 東京 — 100 %\n\tend", "</result><|im_end|>", "a  b"):
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.decode(ids) == text


def test_the_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_trajectories_stay_short(tokenizer):
    """A right deep search takes at most about 350 tokens, results included."""
    world, _, test = make_world.make()
    demonstrator = Demonstrator(world, make_tools(Config()), Random(0))
    lengths = [len(encode(tokenizer, p.text, demonstrator.solve(p, Hesitation()))[0]) for p in test]
    assert max(lengths) <= 350


def test_the_cold_start_learns_chances_not_draws(tokenizer):
    """Wherever the demonstrator may go two ways, the target is the chance of each."""
    world, _, test = make_world.make()
    demonstrator = Demonstrator(world, make_tools(Config()), Random(0))
    problem = next(p for p in test if p.domain == "math" and len(p.steps) == 2)
    seen, found = set(), tokenizer.convert_tokens_to_ids("Found")
    for _ in range(200):
        turns = demonstrator.solve(problem, UNSURE)
        ids, expected = encode(tokenizer, problem.text, turns)
        assert len(ids) == len(expected)
        assert all(token in here for token, here in zip(ids, expected, strict=True) if here)
        assert all(abs(sum(here.values()) - 1) < 1e-9 for here in expected if here)
        (first, *_) = (here for here in expected if len(here) > 1)
        assert first[found] == pytest.approx(1 - UNSURE.again)
        seen.add("".join(turn.text for turn in turns if turn.author == "policy").count("guess"))
    assert seen == {0, 1}  # both ways were walked, the right one more often than its chance
    assert (1 - UNSURE.stop) * (1 - UNSURE.guess) < RIGHT_WAY
    rows, columns, targets = soft_targets([expected], len(tokenizer))
    assert targets.shape == (sum(map(bool, expected)), len(tokenizer))
    assert targets.sum(dim=1).allclose(targets.new_ones(len(targets)))
    assert not rows.any() and all(targets[i, ids[c]] > 0 for i, c in enumerate(columns.tolist()))
