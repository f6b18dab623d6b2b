"""Questions and demonstrations from files: the official ARPO files unchanged, and one's own.

    form           recognised by                    from
    plain          "question", "answer"             one's own JSONL; "domain" where there is one
    evaluation     "question" | "problem" |         evaluation/data/*.jsonl; the answer is a text,
                   "Question", and "answer"         a number, a list, or ends in "#### n" (gsm8k)
    reinforcement  "prompt", "reward_model"         rl_datasets/*.parquet, or the same rows as JSONL
    sharegpt       "conversations"                  the SFT data; one human turn, one gpt turn

The form of every row is told by its keys; a file is JSONL unless its name ends in .parquet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from advantage import boxed
from data.files import UserError, reason

MAX_QUESTION_CHARS = 1_000_000  # a tokenizer takes seconds and gigabytes for ten times as many
PLAIN = '{"question": "...", "answer": "..."}'
LEGAL = (
    f'{PLAIN} (or "problem" or "Question"), {{"prompt": [..], "reward_model": {{..}}}}, '
    '{"conversations": [..]}'
)
SHAREGPT = '{"conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}]}'
# The official evaluation files do not say what they are about; the paper's groups of them do.
DOMAINS = {
    "math": "aime24 aime25 math500 gsm8k math",
    "knowledge": "hotpotqa 2wiki musique bamboogle",
    "deep_search": "gaia hle webwalker xbench SimpleQA",
}
DOMAIN_OF_FILE = {name: domain for domain, names in DOMAINS.items() for name in names.split()}


@dataclass(frozen=True)
class Question:
    text: str
    answers: list[str]
    domain: str = "all"


@dataclass(frozen=True)
class Demonstration:
    """A worked example: the turns (author, text) of a trajectory, policy and tool in turn."""

    question: str
    turns: list[tuple[str, str]]


def load_questions(path: str) -> list[Question]:
    """The questions of a file of any form; UserError names the file, the line and what is wrong."""
    domain = DOMAIN_OF_FILE.get(Path(path).stem, "all")
    questions = list(read_rows(path, lambda row: read_question(row, domain)))
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def load_demonstrations(path: str) -> list[Demonstration]:
    """The demonstrations of a sharegpt file; UserError as in `load_questions`."""
    demonstrations = list(read_rows(path, read_sharegpt, SHAREGPT))
    if not demonstrations:
        raise UserError(f"{path} holds no demonstrations")
    return demonstrations


# ---- rows of a file -----------------------------------------------------------------------


def read_rows(path: str, read: Callable, legal: str = LEGAL) -> Iterator:
    """What `read` makes of each row; its complaints get the file and the line."""
    parquet = Path(path).suffix == ".parquet"
    for number, row in parquet_rows(path) if parquet else jsonl_rows(path):
        try:
            row = json.loads(row) if isinstance(row, str) else row
            yield read(row)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            where = f"{path}, {'row' if parquet else 'line'} {number}"
            raise UserError(f"{where}: {reason(error)}; legal: {legal}") from None


def jsonl_rows(path: str) -> Iterator[tuple[int, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def parquet_rows(path: str) -> Iterator[tuple[int, dict]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        how = "install it (pip install pyarrow) or convert the file to JSONL"
        raise UserError(f"{path}: reading parquet needs the package pyarrow; {how}") from None
    try:
        return enumerate(read_table(path).to_pylist(), start=1)
    except (OSError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


# ---- a row, by its form -------------------------------------------------------------------


def read_question(row: dict, domain: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"a row has keys, this is a {type(row).__name__}")
    if "conversations" in row:
        return sharegpt_question(row)
    if "prompt" in row and "reward_model" in row:
        return reinforcement_question(row)
    return plain_question(row, domain)


def plain_question(row: dict, domain: str) -> Question:
    # aime24 has "problem" beside "question"; the released evaluation asks the latter.
    key = next((key for key in ("question", "problem", "Question") if key in row), "question")
    text = row[key]
    answer = row["answers" if "answers" in row and "answer" not in row else "answer"]
    answers = answer if isinstance(answer, list) else [answer]
    checked(text, answers)
    return Question(
        text,
        [gsm8k_answer(a) if isinstance(a, str) else str(a) for a in answers],
        str(row.get("domain") or domain),
    )


def gsm8k_answer(text: str) -> str:
    """What follows "#### " in a solution that ends in it, without separators; else the text."""
    if not re.search(r"#### -?[\d.,]+\s*$", text):
        return text
    return re.search(r"#### (-?[\d.,]+)", text)[1].replace(",", "")


def reinforcement_question(row: dict) -> Question:
    """verl's columns. The system prompt is left out: ours says what our tools are.

    `ground_truth` is a plain text even where it looks like a list; `ability` may be missing.
    """
    users = [turn["content"] for turn in row["prompt"] if turn["role"] == "user"]
    if len(users) != 1:
        raise ValueError(f"a prompt has one user turn, this one has {len(users)}")
    answer = row["reward_model"]["ground_truth"]
    checked(users[0], [answer])
    return Question(users[0], [str(answer)], row.get("ability") or row.get("data_source") or "all")


def sharegpt_question(row: dict) -> Question:
    r"""The question of a demonstration, and the answer it boxes."""
    question, solution = human_and_gpt(row)
    answer = boxed(solution)
    if answer is None:
        raise ValueError("the gpt turn holds no \\boxed{..} answer")
    checked(question, [answer])
    return Question(question, [answer])


def checked(text, answers: list) -> None:
    known = answers and all(isinstance(answer, str | int | float) for answer in answers)
    if not isinstance(text, str) or not known:
        raise ValueError("a question is a text and has at least one answer, text or number")
    if len(text) > MAX_QUESTION_CHARS:
        raise ValueError(f"a question has at most {MAX_QUESTION_CHARS:,} characters")


# ---- demonstrations -----------------------------------------------------------------------

# A result follows a call; "<result>" that is only mentioned, in a thought, is the policy's own.
CALLED = re.compile(r"(</(?!think>|result>)[\w-]+>)\s*<result>(.*?)</result>", re.DOTALL)


def read_sharegpt(row: dict) -> Demonstration:
    """The gpt turn cut into what the policy wrote and, after its calls, what tools answered.

    A tool's turn is the text between its tags: who encodes it spells them as a rollout would.
    """
    question, solution = human_and_gpt(row)
    *calls, last = CALLED.split(solution)  # text, closing tag, result, text, .., last
    turns = []
    for text, closing, result in zip(calls[::3], calls[1::3], calls[2::3], strict=True):
        turns += [("policy", text + closing), ("tool", result)]
    return Demonstration(question, [*turns, ("policy", last)])


def human_and_gpt(row: dict) -> tuple[str, str]:
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    if [author for author, _ in turns] != ["human", "gpt"]:
        got = ", ".join(str(author) for author, _ in turns)
        raise ValueError(f"a conversation is one human turn and one gpt turn, this is: {got}")
    (_, question), (_, solution) = turns
    if not isinstance(question, str) or not isinstance(solution, str):
        raise ValueError("the value of a turn is a text")
    return question, solution
