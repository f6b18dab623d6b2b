"""Files of questions: every official form, one's own, and what a row is told that has none."""

import builtins
import dataclasses
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import roll_out

from arpo_mini import EXAMPLES, main, question_to_show
from data import make_world
from data.formats import Question, load_demonstrations, load_questions
from app.screen import UserError

FIXTURES = Path(__file__).parent / "fixtures"
REINFORCEMENT = [
    Question("What is 12 times 12?", ["144"], "math"),
    Question("Which two towns share the bridge?", ["['Yarrow', 'Tarnholm']"], "qa"),
]


def rows(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text("utf-8").splitlines()]


def parquet(folder, name):
    """The rows of a JSONL fixture as the parquet file they are in the official repository."""
    path = folder / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(f"{name}.jsonl")), path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "plain",
            [
                Question("What is 31 times 17?", ["527"], "math"),
                Question("Which river runs through Tarnholm?", ["the Sel", "Sel"], "all"),
                Question("Who mends clocks in Juniper?", ["Orla Rook"], "knowledge"),
            ],
        ),
        ("aime24", [Question("Find the last two digits of 7^4.", ["01"], "math")]),
        ("aime25", [Question("How many primes are below 20?", ["8"], "math")]),
        ("math500", [Question("Halve $\\frac{3}{2}$.", ["\\frac{3}{4}"], "math")]),
        ("math", [Question("Solve $2x = 6$.", ["x = 3"], "math")]),
        (
            "gsm8k",
            [
                Question(
                    "Ida packs 3 crates of 400 nails and loses 25. How many are left?",
                    ["1175"],
                    "math",
                )
            ],
        ),
        ("gaia", [Question("How many islands does the attached map show?", ["12"], "deep_search")]),
        ("hle", [Question("Name the smallest nonabelian simple group.", ["A_5"], "deep_search")]),
        (
            "webwalker",
            [Question("In which hall was the 2019 fair held?", ["Hall [B]"], "deep_search")],
        ),
        ("hotpotqa", [Question("A question as hotpotqa asks it?", ["yes"], "knowledge")]),
        ("2wiki", [Question("A question as 2wiki asks it?", ["Anna Berg"], "knowledge")]),
        ("musique", [Question("A question as musique asks it?", ["1908", "in 1908"], "knowledge")]),
        (
            "bamboogle",
            [Question("A question as bamboogle asks it?", ["Lake Arn", "Arn"], "knowledge")],
        ),
        ("SimpleQA", [Question("A question as SimpleQA asks it?", ["4 May 1931"], "deep_search")]),
        ("xbench", [Question("A question as xbench asks it?", ["161.27元"], "deep_search")]),
        ("reinforcement", REINFORCEMENT),
        (
            "hard_search",
            [
                Question(
                    "Who founded the press that printed the map?",
                    ["Ilse Mora"],
                    "DR_simpledeepsearch0.8k",
                )
            ],
        ),
        (
            "sharegpt",
            [
                Question("How many days are 17 weeks and 3 days?", ["122"], "all"),
                Question("In which town is the maker of the oak lamp?", ["Larkstead"], "all"),
                Question("What is the sum of the first ten squares?", ["385"], "all"),
            ],
        ),
    ],
)
def test_every_form_is_recognised(name, expected):
    assert load_questions(str(FIXTURES / f"{name}.jsonl")) == expected


@pytest.mark.parametrize("name", ["reinforcement", "hard_search"])
def test_parquet_reads_as_its_rows_do(name, tmp_path):
    questions = load_questions(str(FIXTURES / f"{name}.jsonl"))
    assert load_questions(parquet(tmp_path, name)) == questions


def test_parquet_without_ability_or_metadata(tmp_path):
    """Columns that may be missing are missing."""
    some = [
        {key: row[key] for key in ("prompt", "reward_model")} for row in rows("hard_search.jsonl")
    ]
    path = tmp_path / "bare.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), path)
    (question,) = load_questions(str(path))
    assert question.domain == "all" and question.answers == ["Ilse Mora"]


def test_without_pyarrow_a_parquet_file_says_what_to_do(tmp_path, monkeypatch, capsys):
    path = parquet(tmp_path, "reinforcement")
    real = builtins.__import__

    def hidden(name, *args, **kwargs):
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", hidden)
    assert main(["eval", "--dataset_path", path]) == 2
    error = capsys.readouterr().err
    assert path in error and "pip install pyarrow" in error and len(error.splitlines()) == 1
    assert load_questions(str(FIXTURES / "plain.jsonl"))  # JSONL needs no pyarrow


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else", b'{"question": "a"}'])
def test_a_broken_parquet_file_is_one_line(content, tmp_path):
    path = tmp_path / "broken.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*broken.parquet") as caught:
        load_questions(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_bad_row_of_a_parquet_file_is_named(tmp_path):
    path = tmp_path / "odd.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), path)
    with pytest.raises(UserError, match="row 1: 'question' is missing"):
        load_questions(str(path))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "a", "label": "b"}, "'question' is missing"),
        ({"problem": "a"}, "'answer' is missing"),
        ({"question": "a", "answer": {"value": 1}}, "at least one answer, text or number"),
        ({"question": "a", "answer": ["b", None]}, "at least one answer, text or number"),
        ({"question": None, "answer": "b"}, "a question is a text"),
        ({"prompt": [], "reward_model": {"ground_truth": "b"}}, "one user turn, this one has 0"),
        ({"prompt": [{"role": "user", "content": "a"}], "reward_model": {}}, "'ground_truth'"),
        ({"prompt": "a", "reward_model": {"ground_truth": "b"}}, "line 2"),
        ({"prompt": None, "reward_model": None}, "line 2"),
        ({"conversations": []}, "one human turn and one gpt turn"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "this is: gpt"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "no \\boxed{..} answer",
        ),
        ({"question": "a" * 1_000_001, "answer": 1}, "at most 1,000,000 characters"),
        ("a text", "a row has keys, this is a str"),
    ],
)
def test_a_row_of_no_form_is_named_with_the_legal_forms(row, words, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "q", "answer": 4}\n' + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(UserError) as caught:
        load_questions(str(path))
    message = str(caught.value)
    assert f"{path}, line 2: " in message and words in message
    for form in ('"question"', '"problem"', '"prompt"', '"reward_model"', '"conversations"'):
        assert form in message
    assert len(message.splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"question": "q", "answer": 4}\n', encoding="utf-8-sig")
    assert load_questions(str(path)) == [Question("q", ["4"])]


def test_demonstrations_are_cut_into_who_wrote_what():
    one, two, _ = load_demonstrations(str(FIXTURES / "sharegpt.jsonl"))
    assert one.question == "How many days are 17 weeks and 3 days?"
    assert one.turns == [
        ("policy", "<think>I multiply.</think><python>\nprint(17 * 7 + 3)\n</python>"),
        ("tool", "\n122\n"),
        ("policy", "\n<think>Done.</think><answer>The answer is \\[ \\boxed{122} \\]</answer>"),
    ]
    assert [author for author, _ in two.turns] == ["policy", "tool"] * 2 + ["policy"]
    # a result that is only mentioned in a thought is not one
    assert two.turns[0][1].startswith("<think>A <result> would help")
    assert two.turns[1][1] == "\nPage 1: The oak lamp is made by Badger Workshop. <b>1911</b>\n"


def test_a_file_of_questions_is_not_one_of_demonstrations():
    with pytest.raises(UserError, match=r"'conversations' is missing; legal: .*human"):
        load_demonstrations(str(FIXTURES / "plain.jsonl"))


# ---- eval and train read them; show has two examples ready ---------------------------------

FEW = "--max_total_tokens 256 --max_segment_tokens 24".split()


def test_eval_at_the_settings_of_the_paper_writes_every_measure(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    sampling = "--temperature 0.6 --top_p 0.95 --samples 5".split()
    path = str(FIXTURES / "plain.jsonl")
    args = ["eval", "--dataset_path", path, "--json", str(figures), *sampling, *FEW]
    assert main(args) == 0
    out = capsys.readouterr().out
    for words in ("pass@5", "EM", "F1", "math", "calls a question", "right a call", "knowledge"):
        assert words in out
    values = json.loads(figures.read_text())
    assert values["config"]["top_p"] == 0.95
    sampled = values["sampled"]
    measures = {"pass@1", "pass@5", "em", "f1", "math_equal", "tool_calls", "tool_productivity"}
    for some in (sampled, *sampled["domains"].values()):
        assert measures | {"official_productivity", "well_formed", "interval"} <= set(some)
    assert set(sampled["domains"]) == {"all", "knowledge", "math"}
    for record, question in zip(sampled["records"], load_questions(path), strict=True):
        assert record["question"] == question.text and record["domain"] == question.domain
        for name in ("prediction", "accuracy", "em", "f1", "math_equal", "well_formed"):
            assert len(record[name]) == 5
    assert all(len(record["prediction"]) == 1 for record in values["greedy"]["records"])


def test_official_mode_scores_as_the_released_evaluation(tmp_path, capsys):
    """A badly formed transcript has an answer there: whatever was said last."""
    figures = tmp_path / "figures.json"
    args = ["eval", "--dataset_path", str(FIXTURES / "aime25.jsonl"), "--json", str(figures)]
    assert main([*args, "--official_rewards", "true", "--max_segment_tokens", "2"]) == 0
    (record,) = json.loads(figures.read_text())["greedy"]["records"]
    assert record["well_formed"] == [False] and "acc" in record
    assert "<think>" in record["prediction"][0]
    assert main([*args, "--max_segment_tokens", "2"]) == 0
    (record,) = json.loads(figures.read_text())["greedy"]["records"]
    assert record["prediction"] == [None]
    capsys.readouterr()


def test_train_reads_them_too(tmp_path, capsys):
    path = parquet(tmp_path, "reinforcement")
    some = ["--dataset_path", path, "--eval_path", str(FIXTURES / "aime24.jsonl")]
    short = "--steps 1 --questions_per_step 1 --group_size 2 --eval_every 0".split()
    folder = tmp_path / "run"
    assert main(["train", *some, *short, *FEW, "--output_dir", str(folder)]) == 0
    tree = json.loads((folder / "rollouts.jsonl").read_text())
    assert tree["question"] in [question.text for question in REINFORCEMENT]
    capsys.readouterr()


def test_top_p_cuts_the_unlikely_off(policy, config, tools, questions):
    """Almost nothing left to draw from is greedy decoding; the whole distribution is not."""

    def texts(**settings):
        few = dataclasses.replace(config, group_size=2, max_segment_tokens=24, **settings)
        leaves = roll_out(policy, few, tools, questions[:2])
        return [[s.token_ids for s in leaf.path()] for group in leaves for leaf in group]

    greedy = texts(temperature=0.0)
    assert texts(temperature=3.0, top_p=1e-6) == greedy
    assert texts(temperature=3.0, top_p=1.0) != greedy


def test_show_has_two_examples_ready(config, capsys):
    short = "--max_total_tokens 256 --group_size 4".split()
    assert main(["show", "--example", "divisible", *short]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2^n + 3^n" in out and "answer: 3" in out and "leaf 3" in out
    for example in (None, "deep_search"):
        assert question_to_show(config, None, None, example) == EXAMPLES["deep_search"]
    own = dataclasses.replace(config, eval_path=str(FIXTURES / "gaia.jsonl"))
    assert question_to_show(own, None, None, None) == load_questions(own.eval_path)[0]


def test_the_examples_are_right():
    n = next(n for n in range(1, 100) if (2**n + 3**n) % 7 == 0)
    assert EXAMPLES["divisible"].answers == [str(n)]
    _, _, test = make_world.make()
    (problem,) = [p for p in test if p.text == EXAMPLES["deep_search"].text]
    assert [problem.answer] == EXAMPLES["deep_search"].answers
    assert [step.tool for step in problem.steps].count("search") == 4
