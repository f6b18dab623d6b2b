"""The mini-world and the tiny Qwen3 are what data/README.md says they are."""

from collections import Counter
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.config import DATA, Config
from arpo_mini import make_tools
from data import decisive_world, make_world
from data.demonstrator import RIGHT_WAY, UNSURE, WORLDS, Demonstrator, Hesitation
from lab import coldstart
from lab.coldstart import encode, soft_targets
from tools import ToolCall, run_one

MAKERS = {DATA: make_world, DATA / "decisive": decisive_world}


@pytest.fixture(scope="module")
def made():
    """Folder -> world, training and test problems."""
    return {folder: maker.make() for folder, maker in MAKERS.items()}


@pytest.mark.parametrize("folder", MAKERS)
def test_the_script_writes_the_shipped_files_byte_for_byte(folder, made, tmp_path, monkeypatch):
    """And training and test ask different things."""
    monkeypatch.setattr("sys.argv", ["make_world.py", "--folder", str(tmp_path)])
    make_world.main(lambda *args: made[folder])
    for name in ("documents.jsonl", "train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    _, train, test = made[folder]
    assert not {p.key for p in train} & {p.key for p in test}
    assert len({p.text for p in train + test}) == len(train + test) >= 3000
    domains = Counter(problem.domain for problem in test)
    assert set(domains) == {p.domain for p in train} and min(domains.values()) >= 100


def test_every_problem_is_solved_by_its_steps_with_the_real_tools(made, tools):
    """Each finding stands in the result of its call, and the last one is the answer."""
    world, train, test = made[DATA]
    calls = Counter()
    for problem in train[::3] + test:
        for step in problem.steps:
            result = run_one(ToolCall(step.tool, step.argument), tools)
            assert result.ok and all(part in result.text for part in step.found.split(" and "))
        assert step.found == problem.answer
        calls[problem.domain, len(problem.steps)] += 1
        used = {step.tool for step in problem.steps}
        expected = {"math": {"calculator"}, "knowledge": {"search"}}.get(problem.domain)
        assert used == expected if expected else "search" in used
    assert {n for d, n in calls if d == "deep_search"} == {2, 3, 4, 5}
    assert {n for d, n in calls if d == "knowledge"} == {1}
    for entity in world.values():  # a document states several facts
        assert len(entity.facts) >= 3 and all(fact in entity.text for fact in entity.facts.values())


# ---- the second world ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def second_tools():
    return make_tools(Config(documents_path=str(DATA / "decisive" / "documents.jsonl")))


def test_every_third_search_of_the_second_world_is_decisive(made, second_tools):
    """And each way to read them is solved by its steps; only the right one gives the answer."""
    world, train, test = made[DATA / "decisive"]
    namesakes = {name for name, entity in world.items() if entity.kind == "namesake"}
    first, kinds = {"town": 2, "person": 1, "workshop": 0}, Counter()
    for problem in train[::20] + test[::2]:
        for i, steps in enumerate(decisive_world.readings(problem.steps)):
            results = [run_one(ToolCall(s.tool, s.argument), second_tools) for s in steps]
            assert all(r.ok and s.found in r.text for s, r in zip(steps, results, strict=True))
            assert (steps[-1].found == problem.answer) == (i == 0)
            assert 2 <= len(steps) <= 5
        searches = [s for s in problem.steps if s.tool == "search"]
        found = [s for s in searches if s.argument not in namesakes]
        places = [bool(s.rival) for s in found]
        assert places == [n % 3 == first[problem.domain] for n in range(len(places))]
        kinds.update({"namesake": len(searches) > len(found), sum(places): 1})
    assert set(kinds) == {"namesake", 0, 1, 2} and min(kinds.values()) > 10


def test_its_demonstrator_hesitates_at_the_decisive_results_only(made, second_tools):
    """Elsewhere there is one way on; a wrong reading is followed to its end."""
    _, unsure = WORLDS["decisive"]
    world, _, test = made[DATA / "decisive"]
    demonstrator, ends = Demonstrator(world, second_tools, Random(0), right_way=0.0), Counter()
    for problem in test:
        turns = demonstrator.solve(problem, unsure)
        for result, turn in zip(turns[1::2], turns[2::2], strict=True):
            assert (len(turn.chances) > 1) == ("In silver:" in result.text)
            assert sum(turn.chances.values()) == pytest.approx(1)
        ends[len(turns) // 2 == len(problem.steps), problem.answer in turns[-1].text] += 1
    assert min(ends[True, True], ends[True, False], ends[False, False]) > 20


# ---- the tiny Qwen3 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DATA / "tiny-qwen3")


def test_the_tiny_qwen3_and_its_tokenizer(tokenizer):
    files = list((DATA / "tiny-qwen3").iterdir())
    assert sum(file.stat().st_size for file in files) <= 4_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".jinja"}
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer.encode("20419", add_special_tokens=False)) == 5


@pytest.mark.parametrize("world", [pytest.param("country", marks=pytest.mark.slow), "decisive"])
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


def test_the_cold_start_learns_chances_not_draws(made, tools, tokenizer):
    """Wherever the demonstrator may go two ways, the target is the chance of each."""
    world, _, test = made[DATA]
    demonstrator = Demonstrator(world, tools, Random(0))
    right = [(each.text, demonstrator.solve(each, Hesitation())) for each in test[::5]]
    assert max(len(encode(tokenizer, *each)[0]) for each in right) <= 350  # results included
    problem = next(p for p in test if p.domain == "math" and len(p.steps) == 2)
    seen, found = set(), tokenizer.convert_tokens_to_ids("Found")
    for _ in range(100):
        turns = demonstrator.solve(problem, UNSURE)
        ids, expected = encode(tokenizer, problem.text, turns)
        for token, here in zip(ids, expected, strict=True):
            assert not here or (token in here and sum(here.values()) == pytest.approx(1))
        (first, *_) = (here for here in expected if len(here) > 1)
        assert first[found] == pytest.approx(1 - UNSURE.again)
        seen.add("".join(turn.text for turn in turns if turn.author == "policy").count("guess"))
    assert seen == {0, 1}  # both ways were walked, the right one more often than its chance
    assert (1 - UNSURE.stop) * (1 - UNSURE.guess) < RIGHT_WAY
    rows, columns, targets = soft_targets([expected], len(tokenizer))
    assert targets.shape == (sum(map(bool, expected)), len(tokenizer))
    assert targets.sum(dim=1).allclose(targets.new_ones(len(targets)))
    assert not rows.any() and all(targets[i, ids[c]] > 0 for i, c in enumerate(columns.tolist()))
