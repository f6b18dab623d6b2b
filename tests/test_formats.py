"""Files of questions, documents and demonstrations: every published form, and what is no form."""

import contextlib
import gzip
import json
import sys

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from common import ROOT

from advantage import reward
from app.run_folder import fingerprint_file
from data.files import Document, UserError, load_documents, reason
from data.formats import Question, load_demonstrations, load_questions

FIXTURES = ROOT / "tests" / "fixtures"
OFFICIAL = json.loads((FIXTURES / "forms_official.json").read_text("utf-8"))


def rows(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text("utf-8").splitlines()]


def jsonl(some):
    return "".join(json.dumps(row) + "\n" for row in some).encode()


def write(path, content):
    """A file of bytes, or of rows: parquet where its name says so, else JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list) and path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    else:
        path.write_bytes(jsonl(content) if isinstance(content, list) else content)
    return str(path)


def refused(load, path):
    with pytest.raises(UserError) as caught:
        load(str(path))
    message = str(caught.value)
    assert str(path) in message and len(message.splitlines()) == 1 and len(message) < 1200
    return message


# ---- rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_file_is_read_unchanged(name):
    expected = [Question(*each) for each in OFFICIAL[name]]
    assert load_questions(str(FIXTURES / f"{name}.jsonl")) == expected


LOADERS = {
    "questions": (load_questions, "question problem golden_answers reward_model conversations"),
    "documents": (load_documents, "title text contents content"),
    "demonstrations": (load_demonstrations, "conversations messages instruction"),
}
CASES = [(kind, case) for kind in LOADERS for case in rows(f"forms_{kind}.jsonl")]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_row_is_read_or_named_with_the_legal_forms(number, tmp_path):
    """Rows as published files have them: the same from JSON lines and from parquet."""
    kind, case = CASES[number][0], dict(CASES[number][1])
    load, forms = LOADERS[kind]
    path, row = tmp_path / "x.jsonl", case.pop("row")
    if "refused" in case:
        message = refused(load, write(path, [row]))
        assert f"{path}, line 1: " in message and case["refused"] in message
        assert all(f'"{form}"' in message for form in forms.split())
        return
    (found,) = load(write(path, [row]))
    assert {key: json.loads(json.dumps(getattr(found, key))) for key in case} == case
    if case.get("turns", [("", "")])[-1][1]:  # what is mapped is well-formed
        judged = reward(case["turns"], ["4"], judge=lambda prediction, answers: 0.0, tools_used=1)
        assert "<result>" in case["turns"][0][1] or judged.well_formed
    with contextlib.suppress(pyarrow.ArrowException, OverflowError):  # what a table cannot hold
        assert load(write(tmp_path / "x.parquet", [row])) == [found]


def test_demonstrations_that_cannot_be_mapped_are_left_out_by_name(tmp_path, caplog):
    good, chat, other = ({"instruction": "q", "output": o} for o in ("\\boxed{4}", "Hi", None))
    path = write(tmp_path / "mixed.jsonl", [good, chat, good, chat, other, {"x": 1}])
    assert len(load_demonstrations(path)) == 2
    assert f"{path}: 2 of 6 rows are demonstrations; left out: 3, at {path}, line 2" in caplog.text
    assert f"left out: 1, at {path}, line 6: 'conversations' is missing" in caplog.text


# ---- what a file may be -------------------------------------------------------------------

ROW = {"question": "q", "answer": 4, "title": "t", "text": "x"}
TWO = jsonl([ROW, ROW])
ARRAY = json.dumps([ROW, ROW], indent=1).encode()


@pytest.mark.parametrize(
    "content",
    [TWO, b"\xef\xbb\xbf" + TWO, TWO.replace(b"\n", b"\r\n\r\n"), ARRAY, b"\xef\xbb\xbf\n" + ARRAY,
     gzip.compress(TWO, mtime=0), gzip.compress(ARRAY, mtime=0)],
)  # fmt: skip
def test_lines_arrays_and_gz_are_told_by_their_bytes(content, tmp_path):
    for name in ("x.jsonl", "x.json.gz"):
        path = write(tmp_path / name, content)
        assert load_questions(path) == [Question("q", ["4"])] * 2
        assert load_documents(path) == [Document("t", "x")] * 2


BROKEN = {
    "empty": (b"", "holds no"),
    "latin-1": (TWO + '{"question": "é"}'.encode("latin-1"), "line 3: byte 14 is no UTF-8 text"),
    "utf-16": (TWO.decode().encode("utf-16"), "save it as UTF-8"),
    "cut line": (TWO[:-9], "line 2: no JSON"),
    "cut gz": (gzip.compress(TWO * 99, mtime=0)[:-20], "cannot read"),
    "damaged gz": (gzip.compress(TWO, mtime=0)[:14] + b"\0" * 40, "cannot read"),
    "cut array": (ARRAY[:-20], "a JSON array, but no JSON"),
    "array of numbers": (b"[7]", "row 1: a row has keys, this is a int"),
    "twice": (TWO + b'{"Question": "a", "Question": "b"}', "line 3: the key 'Question' is"),
    "deep": (TWO + b'{"a":' * 100_000, "line 3: nested too deeply"),
    "deep array": (b"[" * 100_000, "nested too deeply"),
    "no parquet": (b"PAR1 and nothing else", "cannot read"),
    "long": (b"x" * 10**7, "(column 1); legal: JSON lines, a JSON array or parquet"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line(kind, tmp_path):
    content, words = BROKEN[kind]
    for load, _ in LOADERS.values():
        assert words in refused(load, write(tmp_path / "x.jsonl", content))
    assert reason(ValueError("in the next line:\n  why\nmore")) == "in the next line: why"


def test_folders_and_rows_of_parquet_are_one_line(tmp_path, monkeypatch):
    assert "Is a directory" in refused(load_questions, tmp_path)
    for content in (b"", b"PAR1 and nothing else", b'{"question": "a"}'):
        assert "cannot read" in refused(load_questions, write(tmp_path / "x.parquet", content))
    odd = write(tmp_path / "odd.parquet", [{"text": "a"}])
    assert "row 1: 'question' is missing" in refused(load_questions, odd)
    tenth = {"question": ["q"], "answer": pyarrow.array([0.1], pyarrow.float32())}
    pyarrow.parquet.write_table(pyarrow.table(tenth), tmp_path / "float.parquet")
    assert load_questions(str(tmp_path / "float.parquet")) == [Question("q", ["0.1"])]
    two = pyarrow.Table.from_arrays([["q"], ["a"], ["b"]], ["question", "answer", "answer"])
    pyarrow.parquet.write_table(two, odd)
    assert "the key 'answer' is there twice" in refused(load_questions, odd)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(load_questions, odd)
    assert load_questions(str(FIXTURES / "plain.jsonl"))  # JSONL needs no pyarrow


# ---- data sets of the hub -----------------------------------------------------------------

CACHED = """
openai/gsm8k main/train-00000-of-00002.parquet main/train-00001-of-00002.parquet README.md
openai/gsm8k main/test-00000-of-00001.parquet socratic/train-00000-of-00001.parquet
o/hashed data/train-00000-of-00001-a09b74b3ef9c3b56.parquet train.json dataset_infos.json
o/converted main/train/0000.parquet main/train/0001.parquet main/test/0000.parquet
o/plain nq/train.jsonl nq/dev.jsonl musique_ans_v1.0_dev.jsonl
o/half train-00000-of-00002.parquet
o/script script.py
"""
ANSWER = [{"question": "q", "answer": "so\n#### 1,000", "contents": '"T"\nx'}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as the hub's library leaves it, and no network."""
    for repo, *names in map(str.split, CACHED.strip().splitlines()):
        folder = tmp_path / f"datasets--{repo.replace('/', '--')}"
        write(folder / "refs" / "main", b"c0ffee")
        for name in names:
            write(folder / "snapshots" / "c0ffee" / name, ANSWER)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)


KNOWN = "name one of openai/gsm8k:main/test, openai/gsm8k:main/train, openai/gsm8k:socratic/train"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("openai/gsm8k:main/train", 2),
        ("openai/gsm8k:main/test", 1),
        ("openai/gsm8k:test", 1),  # one config has it
        ("o/hashed", 1),  # the same rows, as parquet and as JSON, are read once
        ("o/hashed:default/train", 1),
        ("o/converted:main/train", 2),
        ("o/plain:nq/dev", 1),
        ("o/plain:musique_ans_v1.0_dev", 1),
        *[(f"openai/gsm8k{wanted}", KNOWN) for wanted in ("", ":main", ":train", ":no/train")],
        ("o/half:train", "only 1 of its 2 files are there"),
        ("o/script", "holds no .parquet, .jsonl or .json file"),
        ("o/unknown", "no such file, and no data set of the hub: Cannot reach"),
        ("o/no--name", "no such file, and no data set of the hub: Cannot have --"),
        ("o/such.jsonl", "cannot read o/such.jsonl: No such file"),
        *[(drive, "No such file") for drive in ("C:/a/mine", "C:\\a b\\mine.jsonl", "D:mine")],
    ],
)
def test_a_hub_data_set_by_its_id(name, found, hub):
    if isinstance(found, int):
        domain = "math" if "gsm8k" in name else "all"
        assert load_questions(name) == [Question("q", ["1000"], domain)] * found
        assert load_documents(name) == [Document("T", "x")] * found
    else:
        assert found in refused(load_questions, name)


def test_a_local_file_wins(hub, tmp_path):
    both = [fingerprint_file(f"openai/gsm8k:main/{split}") for split in ("test", "train")]
    assert None not in both and both[0] != both[1]
    write(tmp_path / "openai" / "gsm8k", [ROW])
    assert load_questions("openai/gsm8k")[0].answers == ["4"]
