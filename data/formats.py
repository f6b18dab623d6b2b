r"""Questions and demonstrations from files: the published forms unchanged, and one's own.

    form           recognised by                     from
    plain          a question and an answer          one's own, evaluation/data/*.jsonl, HotpotQA,
                   (QUESTION_KEYS, ANSWER_KEYS)      2Wiki, MuSiQue, gsm8k, FlashRAG, Search-R1
    solved         a question and "solution"         MATH: the answer is in its last \boxed{..}
    reinforcement  "prompt" and "reward_model"       verl's columns: rl_datasets, DAPO-Math
    conversation   "conversations" or "messages" or  sharegpt (the SFT data), OpenAI, LLaMA-Factory,
                   "instruction" and "output"        Alpaca: a question, calls, results, an answer

The form of every row is told by its keys, in upper or lower case; files.py says what a file may be.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import re
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import Any

from advantage import THINK, boxed
from data.files import BAD_ROW, HUB_ID, UserError, read_rows, reason

logger = logging.getLogger("arpo_mini")

MAX_CHARS = 1_000_000  # a tokenizer takes seconds and gigabytes for ten times as many
QUESTION_KEYS = ("question", "problem", "query", "prompt")
ANSWER_KEYS = ("final_answer", "expected_answer", "answer_number", "answer", "answers")
ANSWER_KEYS += ("golden_answers", "possible_answers", "target")
ALIAS_KEYS = ("answer_aliases", "aliases", "alt_ans")  # of 2Wiki, MuSiQue, CRAG
FORMAT = re.compile("</?(?:think|answer|search)>")  # a prompt that describes these has our place
CHOICES = re.compile("(multiple_|answer_)?(choice|option|opt)s?(_list|_?[a-e1-5])?")
A_CHOICE = re.compile(r"\d(\.0)?|[(\[]?[A-Ka-k][)\]]?[.:]?|[A-K]{2,5}|[A-K][.)] .*", re.DOTALL)
NO_ANSWER = {"?", "<unk>", "No Answer Present."}  # of tests
QUESTION = (
    '{"question": "...", "answer": "..."} (or "problem", "prompt"; "answers", "golden_answers", '
    '"solution" with \\boxed{..}), {"prompt": [..], "reward_model": {"ground_truth": ..}}, '
    '{"conversations": [..]}, {"messages": [..]}'
)
DEMONSTRATION = (
    '{"conversations": [{"from": "human", "value": ".."}, {"from": "gpt", "value": ".."}]}, '
    '{"messages": [{"role": "user", "content": ".."}, ..]}, {"instruction": "..", "output": ".."}'
)
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
    """The questions of a file of any form; UserError names the file, the row and what is wrong."""
    hub = HUB_ID.fullmatch(str(path))
    domain = DOMAIN_OF_FILE.get(Path(hub[1] if hub else path).name.split(".")[0], "all")
    rows = read_rows(path, lambda row: read_question(row, domain), QUESTION)
    questions = [question for _, question in rows]
    if not questions:
        raise UserError(f"{path} holds no questions")
    return questions


def load_demonstrations(path: str) -> list[Demonstration]:
    """The conversations of a file that can be mapped onto our grammar; the log counts the others.

    Raises UserError where a line is no row, and where none can be mapped.
    """
    mapped: list[Demonstration] = []
    left_out: dict[str, list[str]] = {}  # why -> where
    for place, row in read_rows(path, dict, DEMONSTRATION):
        try:
            mapped.append(read_demonstration(row))
        except BAD_ROW as error:
            left_out.setdefault(reason(error), []).append(place)
    often = sorted(left_out.items(), key=lambda item: -len(item[1]))[:5]
    whys = "".join(f"; left out: {len(at)}, at {at[0]}: {why}" for why, at in often)
    if not mapped:
        raise UserError(f"{path} holds no demonstrations{whys}; legal: {DEMONSTRATION}")
    total = len(mapped) + sum(map(len, left_out.values()))
    level = logging.WARNING if whys else logging.INFO
    logger.log(level, "%s: %d of %d rows are demonstrations%s", path, len(mapped), total, whys)
    return mapped


# ---- questions ----------------------------------------------------------------------------


def read_question(row: dict, domain: str) -> Question:
    told = {"reward_model", "solution", *ANSWER_KEYS} & {*row}
    if not told and ("conversations" in row or "messages" in row):
        solved = read_demonstration(row)
        text, answers = solved.question, [boxed(solved.turns[-1][1])]
    else:
        text, answers = asked(row), gold_answers(row)
    known = answers and all(isinstance(answer, str | Number) for answer in answers)
    if not isinstance(text, str) or not known:
        raise ValueError("a question is a text and has at least one answer, text or number")
    if max(len(str(each)) for each in [text, *answers]) > MAX_CHARS:
        raise ValueError(f"a question or an answer has at most {MAX_CHARS:,} characters")
    if NO_ANSWER.union(("notfound", "proof") if "problem" in row else ()).issuperset(answers):
        raise ValueError(f"the answer {answers[0]!r} says that there is none")
    texts = [text, *(spelling for answer in answers for spelling in spellings(answer))]
    if not all(re.search(r"[^\s\u00ad\u200b-\u200f\u2060-\u2064\ufeff]", each) for each in texts):
        raise ValueError("a question or an answer is empty")
    return Question(text, list(dict.fromkeys(texts[1:])), domain_of(row) or domain)


def asked(row: dict) -> Any:
    """The question alone: a system prompt is left out, for ours says what our tools are."""
    # aime24 has "problem" beside "question"; the released evaluation asks the latter.
    text = row[next((key for key in QUESTION_KEYS if row.get(key) is not None), "question")]
    shown = [row.get("image"), row.get("images"), "task_id" in row and row.get("file_name")]  # GAIA
    shown = [x for each in shown for x in (each if isinstance(each, list) else [each])]
    if any(any(each.values()) if isinstance(each, dict) else each for each in shown):
        raise ValueError("it asks about an image or a file, which is not read")
    turns = from_table(text)
    if isinstance(turns, list) and all(isinstance(x, dict) and "role" in x for x in turns):
        users = [turn["content"] for turn in turns if turn["role"] == "user"]
        if len(users) != 1:
            raise ValueError(f"a prompt has one user turn, this one has {len(users)}")
        (text,) = users
    extra = from_table(row.get("extra_info"))  # the question without verl's "think step by step"
    bare = extra.get("question") if isinstance(extra, dict) else None
    if isinstance(bare, str) and bare:
        before, _, after = text.rpartition(bare)
        if text.startswith(bare) or (FORMAT.search(before) and not after.strip()):
            return bare
    body = row.get("body")  # of SVAMP
    return f"{body} {text}" if isinstance(body, str) and body.strip() else text


def gold_answers(row: dict) -> list:
    """Whatever the row accepts, unchecked; KeyError where it holds no answer."""
    found = as_list(unpacked(answer_of(row)))
    choices = [each for k, v in row.items() if CHOICES.fullmatch(k) and v for each in as_list(v)]
    if all(isinstance(row.get(key), str) and row[key] for key in "ab"):
        choices += [row.get(key) for key in "abcd"]
    offered = {str(each) for each in choices if not str(each).isdigit()}  # a digit is an index
    named = [x for x in map(str, found) if A_CHOICE.fullmatch(x) and x not in offered]
    if choices and named:
        raise ValueError("the answer names a choice: write the choices into the question")
    aliases = (unpacked(row.get(key)) for key in ALIAS_KEYS)
    return found + [x for some in aliases for x in as_list(some) if x not in (None, "", "[]")]


def answer_of(row: dict) -> Any:
    """What stands under the key that says most surely what is right."""
    if "reward_model" in row:
        model = from_table(row["reward_model"])
        if not isinstance(model, dict):
            raise ValueError(f"reward_model is no object but {model!s:.40}")
        return model["ground_truth"]
    key = next((key for key in ANSWER_KEYS if row.get(key) not in (None, [], "")), None)
    if not key:
        return row["answer" if in_box(str(row.get("solution"))) is None else "solution"]
    lists = (row.get(key) for key in ("answers", "golden_answers"))  # of all that are right
    return next((some for some in lists if row[key] in as_list(some)), row[key])


def unpacked(found: Any) -> Any:
    """One answer or a list of them, out of what a data set wraps them in."""
    if isinstance(found, str) and isinstance(listed := from_json(found), dict | list):
        texts = listed and all(isinstance(each, str) for each in listed)  # "[0, 1]": an interval
        found = listed if texts else found
    if isinstance(found, dict) and {k for k, v in found.items() if v is not None} == {"target"}:
        return found["target"]  # Search-R1
    if isinstance(found, dict) and "aliases" in found:  # TriviaQA
        return [found.get("value"), *(found["aliases"] or [])]
    return found


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def spellings(answer: str | Number) -> list[str]:
    """The texts that an answer stands for: a solution for what it ends in, true for yes, too."""
    if isinstance(answer, bool):
        return [str(answer), "yes" if answer else "no"]
    if isinstance(answer, str):
        answer = gsm8k_answer(answer)
        held = in_box(answer)
        return [answer if held is None else held]
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{answer} is no answer")
    return [str(float(f"{answer:.15g}") if isinstance(answer, float) else answer)]


def in_box(solution: str) -> str | None:
    r"""What `boxed` finds; MATH also has \boxed 2 and \fbox{2}."""
    number = r"-?[0-9.]*[0-9](?![0-9.]*[0-9])"
    end = r"[\s$.;:?&)\]}]|,(?!\d)|\^\\circ|\\([)\]%,;!\\ ]|text|math|q?quad)|\Z"
    alone = rf"\\boxed *({number}|[A-Za-z])(?={end})"
    braced = re.sub(r"\\boxed\s+\{", r"\\boxed{", re.sub(alone, r"\\boxed{\1}", solution))
    return boxed(braced.replace("\\fbox{", "\\boxed{"))


def gsm8k_answer(text: str) -> str:
    """What follows "#### " in the last line of a solution, a number without $ and separators."""
    solution, _, last = text.rstrip().rpartition("\n")
    if "#### " in last:
        answer = last.split("#### ")[1].strip()
    elif last.startswith("####") and (solution or last == "####"):
        answer = last.removeprefix("####")
    else:
        return text
    found = re.fullmatch(r"(-?)\\?\$?(-?[\d,]*\.?\d+(?:/\d+)?)(%?)\.?", answer)
    whole = found and re.fullmatch(r"-?(\d+|\d{1,3}(,\d{2,3})*,\d{3})?(\.\d+|/\d+)?", found[2])
    return found[1] + found[2].replace(",", "") + found[3] if whole else answer


def domain_of(row: dict) -> str:
    """The first label of the row, as a text whatever it is; "" where there is none."""
    labels = (row.get(key) for key in ("domain", "ability", "data_source"))
    filled = (label for label in labels if label is not None and str(label).strip(" []{}"))
    return str(next(filled, ""))[:100]


# ---- demonstrations -----------------------------------------------------------------------

AUTHORS = {"system": "system", "developer": "system", "user": "user", "human": "user"}
AUTHORS |= dict.fromkeys("assistant gpt chatgpt model function_call tool_call".split(), "policy")
AUTHORS |= dict.fromkeys("tool observation function tool_response ipython".split(), "tool")
# A result follows a call; "<result>" that is only mentioned, in a thought, is the policy's own.
RESULT = r"<(?:result|information|tool_response)>(.*?)</(?:result|information|tool_response)>"
CALLED = re.compile(rf"(</(?!think>|result>)[\w-]+>)\s*{RESULT}", re.DOTALL)
WRAPPED = re.compile(rf"\s*{RESULT}\s*", re.DOTALL)


def read_demonstration(row: dict) -> Demonstration:
    """What the policy wrote and, after its calls, what tools answered, without the tags of results.

    Who encodes a result spells it as a rollout would. The system's turn is left out: ours says
    what our tools are.
    """
    rows = turns_of(row)
    turns: list[tuple[str, str]] = []
    for author, text in map(author_and_text, rows):
        if author == "policy" and turns and turns[-1][0] == author:  # it goes on writing
            text = turns.pop()[1] + text
        *called, last = CALLED.split(text) if author == "policy" else [text]
        for before, closing, result in zip(called[::3], called[1::3], called[2::3], strict=True):
            turns += [("policy", before + closing), ("tool", result)]
        turns += [(author, last)] if author != "system" else []
    if turns and turns[-1][0] == "tool":
        turns.append(("policy", ""))
    authors, texts = [author for author, _ in turns], [text for _, text in turns]
    if authors != ["user", "policy", *["tool", "policy"] * (len(turns) // 2 - 1)]:
        got = ", ".join(str(turn.get("from") or turn.get("role")) for turn in rows[:9])
        shape = "a conversation is one human turn and one gpt turn, calls and results between"
        raise ValueError(f"{shape}; this is: {got}")
    texts[1:-1:2] = map(calling, texts[1:-1:2])
    if not texts[0].strip() or max(map(len, texts)) > MAX_CHARS:
        raise ValueError(f"a turn has at most {MAX_CHARS:,} characters, a question is not empty")
    if texts[-1].strip() or len(texts) == 2:  # nothing after a result: cut short, left to sft
        texts[-1] = answering(texts[-1])
    return Demonstration(texts[0], list(zip(authors[1:], texts[1:], strict=True)))


def turns_of(row: dict) -> list[dict]:
    if "instruction" not in row:
        return row["messages"] if row.get("messages") else row["conversations"]
    question = "\n".join(filter(None, (row["instruction"], row.get("input"))))  # Alpaca
    earlier = [{"from": "human"}, {"from": "gpt"}] * len(row.get("history") or [])
    said = {"from": "gpt", "value": row.get("output")}
    return [*earlier, {"from": "human", "value": question}, said]


def author_and_text(turn: dict) -> tuple[str, str]:
    role, text = turn.get("from") or turn.get("role"), turn.get("value") or turn.get("content")
    if isinstance(text, list):  # parts, as OpenAI has them
        if any(part["type"] != "text" for part in text):
            raise ValueError("a turn that is not all text")
        text = "".join(part["text"] for part in text)
    if not isinstance(text or "", str):
        raise ValueError("the value of a turn is a text")
    if role not in AUTHORS:
        raise ValueError(f"the role {str(role)[:40]!r} is none of {', '.join(AUTHORS)}")
    text = text or ""
    if AUTHORS[role] == "tool":
        wrapped = WRAPPED.fullmatch(text)
        return "tool", wrapped[1] if wrapped else text
    if thought := turn.get("reasoning_content") or turn.get("reasoning"):
        text = f"<think>{thought}</think>{text}"
    if role in ("function_call", "tool_call"):
        text = spelled_call(text)
    text = re.sub("(?s)<tool_call>(.*)</tool_call>", lambda found: spelled_call(found[1]), text)
    calls = turn.get("tool_calls") or turn.get("function_call")
    return AUTHORS[role], text + spelled_call(calls) if calls else text


def spelled_call(calls: Any) -> str:
    """<name>text</name> of {"name": .., "arguments": {..}}, or JSON of it, or a list of one."""
    try:
        (call,) = as_list(from_json(calls))
        call = call.get("function") or call  # as OpenAI has it
        name, text = call["name"], from_json(call["arguments"])
        given = text.values() if isinstance(text, dict) else [text]
        (text,) = [value for value in given if value is not None]  # in tables all tools have all
    except BAD_ROW:
        name, text = "", None
    legal = re.fullmatch(r"(?!(think|answer|result)$)[\w-]+", str(name))
    if not legal or not isinstance(text, str | Number) or re.search(f"</?{name}>", str(text)):
        raise ValueError("a turn's call is not one tool's name with one text")
    return f"<{name}>{text}</{name}>"


def from_json(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def from_table(value: Any) -> Any:
    """The list or object that became a text in a table: as JSON, Python or numpy writes it."""
    found = from_json(value)
    if isinstance(found, str) and found.startswith(("{", "[", "array([")):
        text = re.sub(r"(?s)\Aarray\((.*), dtype=object\)\s*\Z", r"\1", found)
        text = re.sub(r"(?<=})\s+(?={)", ", ", text)  # numpy writes no commas
        with contextlib.suppress(ValueError, SyntaxError, MemoryError):
            found = ast.literal_eval(text)
    return found if isinstance(found, dict | list) else value


def thinking(text: str) -> str:
    if re.fullmatch(THINK, text, re.DOTALL):
        return text
    return f"<think>{re.sub('</?think>', '', text).strip()}</think>"


def calling(text: str) -> str:
    """A turn before a result as <think>..</think> and its call."""
    closing = re.search(r"</(?!think>|answer>)([\w-]+)>$", text.rstrip())
    start = text.rfind(f"<{closing[1]}>") if closing else -1
    if start < 0:
        raise ValueError("a result that follows no call")
    return thinking(text[:start]) + text[start:]


def answering(text: str) -> str:
    r"""A last turn as <think>..</think><answer>.. \boxed{..} ..</answer>."""
    thought, end, said = text.rpartition("</think>")  # a thought may mention the tag of an answer
    before, tag, answer = said.rpartition("<answer>")
    thought = f"{thought}{end}{before}" if tag else text
    answer = answer.partition("</answer>")[0]  # nothing is written after it
    if not tag or boxed(answer) is None:
        held = answer.strip() if tag else boxed(said)
        if not held and (thought_of := boxed(text)) and thought_of in said:
            held = thought_of  # said again without a box
        if not held:
            raise ValueError("the last turn holds no \\boxed{..} answer")
        answer = f"\\boxed{{{held}}}"
    return f"{thinking(thought)}<answer>{answer}</answer>"
