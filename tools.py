"""What the policy can call: a calculator and a search; how a call is read, run and answered.

    policy text -> policy_stop -> read_call -> ToolCall -> run_calls -> ToolResult -> result_text

A tool is a named function from text to text. What the policy does wrong, and what a tool does
wrong, is data: a result that says so in words. Nothing here knows of models, tokens or tensors.
"""

import ast
import json
import math
import operator
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path

import numpy as np

TAG = re.compile(r"<(/?)([A-Za-z_][A-Za-z0-9_-]{0,40})>")
RESERVED = ("think", "answer", "result")  # the grammar's own tags never name a tool


class ToolError(ValueError):
    """What the policy did wrong, in words: becomes an error result, never ends a rollout."""


@dataclass(frozen=True)
class Tool:
    """A function from text to text; the policy calls it by writing <name>argument</name>."""

    name: str
    run: Callable[[str], str]
    description: str  # one line for the system prompt: what to write between the tags

    def __post_init__(self) -> None:
        if not TAG.fullmatch(f"<{self.name}>") or self.name in RESERVED:
            legal = f"letters, digits, _ and -, and none of {', '.join(RESERVED)}"
            raise ValueError(f"{self.name!r} is not a name for a tool; legal: {legal}")


@dataclass(frozen=True)
class ToolCall:
    name: str
    argument: str


@dataclass(frozen=True)
class ToolResult:
    text: str
    ok: bool


# --- reading a call -------------------------------------------------------------------------------


def last_closed(text: str) -> tuple[str, str] | None:
    """(name, content) of the pair of tags that was closed last outside thoughts, or None.

    A tag mentioned in a thought is not a call, so everything up to the last </think> is left out,
    and everything from a <think> that is still open. The content begins at the nearest opening tag.
    """
    begin = text.rfind("</think>") + 1  # 0 when nothing was thought
    end = text.find("<think>", begin)
    opened: dict[str, int] = {}  # name -> where the content after its nearest opening tag begins
    name, content = None, slice(0)
    for tag in TAG.finditer(text, begin, end if end >= 0 else len(text)):
        slash, tag_name = tag.groups()
        if not slash:
            opened[tag_name] = tag.end()
        elif tag_name in opened and tag_name != "result":  # a bare closing tag means nothing
            name, content = tag_name, slice(opened.pop(tag_name), tag.start())
    return (name, text[content]) if name else None


def policy_stop(text: str) -> str | None:
    """Is this policy segment complete? "tool" after a call, "answer" after </answer>, else None.

    ``text`` is what the policy wrote in this segment so far, never a prompt or a result. Any pair
    of tags is a call, whatever its name, so that the policy can be told which tools there are.
    A few characters may follow the closing tag: one token may carry both. Linear in the length.
    """
    closed = last_closed(text)
    return closed and ("answer" if closed[0] == "answer" else "tool")


def read_call(text: str, tools: Mapping[str, Tool]) -> ToolCall | None:
    """The last complete call of one policy segment, or None, by the rules of ``policy_stop``.

    ``tools`` does not narrow it down: a name that is not in there is a call all the same, and
    ``run_calls`` answers it.
    """
    closed = last_closed(text)
    if closed is None or closed[0] == "answer":
        return None
    return ToolCall(closed[0], closed[1].strip())


# --- running it and answering ---------------------------------------------------------------------

MAX_THREADS = 64  # calls that run at the same time
MAX_ERROR_CHARS = 300


def run_one(call: ToolCall, tools: Mapping[str, Tool]) -> ToolResult:
    """Run one call right here; whatever goes wrong becomes an error result."""
    names = ", ".join(tools)
    if call.name not in tools:
        return ToolResult(f"there is no tool named {call.name}; the tools are {names}", ok=False)
    if not call.argument:
        return ToolResult(f"the call of {call.name} is empty; the tools are {names}", ok=False)
    try:
        text = tools[call.name].run(call.argument)
        if not isinstance(text, str):
            raise TypeError(f"it returned {type(text).__name__}, not text")
    except ToolError as error:
        return ToolResult(cut(str(error), MAX_ERROR_CHARS), ok=False)
    except BaseException as error:  # deliberately everything: a rollout outlives its tools
        problem = f"{call.name} failed: {type(error).__name__}: {error}"
        return ToolResult(cut(problem, MAX_ERROR_CHARS), ok=False)
    return ToolResult(text, ok=True)


def run_calls(
    calls: list[ToolCall], tools: Mapping[str, Tool], time_limit: float
) -> list[ToolResult]:
    """Run the calls of one rollout level side by side; the results in the order of the calls.

    Equal calls run once. A call that raises, or takes longer than ``time_limit`` seconds, gives an
    error result. A thread cannot be killed: a tool that hangs is left behind as a daemon, which
    does not keep the interpreter from ending.
    """
    results: dict[ToolCall, ToolResult] = {}
    finished: dict[ToolCall, ToolResult] = {}  # the threads write here, some of them too late

    def work(call: ToolCall) -> None:
        finished[call] = run_one(call, tools)

    different = list(dict.fromkeys(calls))
    for i in range(0, len(different), MAX_THREADS):
        started = []
        for call in different[i : i + MAX_THREADS]:
            thread = threading.Thread(target=work, args=(call,), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # so many calls hang that no thread is left
                results[call] = ToolResult(f"{call.name} did not start: {error}", ok=False)
            else:
                started.append((call, thread, time.monotonic() + time_limit))
        for call, thread, deadline in started:
            thread.join(max(0.0, deadline - time.monotonic()))
            late = ToolResult(f"{call.name} took longer than {time_limit:g} seconds", ok=False)
            results[call] = finished.get(call, late)
    return [results[call] for call in calls]


def readable(text: str) -> str:
    """NUL and lone surrogates, which no tokenizer takes, become U+FFFD."""
    return re.sub(r"[\x00\ud800-\udfff]", "\ufffd", text)


def escape(text: str) -> str:
    """Readable text that cannot pass for a tag or a chat marker. Escaping twice changes nothing.

    A '<', or a look-alike that a tokenizer may turn into one (NFKC), stays only where it can mean
    "less than".
    """
    return re.sub(r"[<\uff1c\ufe64](?![\s\d=.+-]|$)", "&lt;", readable(text))


def broken(marker: str) -> str:
    """The spelling of a special token, e.g. <|end|> or [INST], that is one no more."""
    escaped = escape(marker)
    return escaped if escaped != marker else f"{marker[0]} {marker[1:]}"


def result_text(result: ToolResult) -> str:
    """What the policy gets to read; an error is marked as one."""
    return f"<result>\n{escape(result.text if result.ok else 'error: ' + result.text)}\n</result>"


def cut(text: str, max_chars: int) -> str:
    """At most ``max_chars`` characters, whole words; ' ...' shows that something is missing."""
    if len(text) <= max_chars:
        return text
    kept = text[: max_chars - 3]
    return (kept[: kept.rfind(" ")] if " " in kept else kept[:-1]).rstrip() + " ..."


# --- calculator -----------------------------------------------------------------------------------

MAX_CHARS = 1000  # of an expression
MAX_PARENTHESES = 50  # one inside another
MAX_DEPTH = 200  # operations one inside another; a sum of 200 terms fits
MAX_BITS = 4096  # of every integer on the way
MAX_DIGITS = 200  # of the result
TOO_LARGE = "the numbers become too large"


def bounded(value: float) -> float:
    if isinstance(value, complex):
        raise ToolError("a root of a negative number is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError(TOO_LARGE)
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError(TOO_LARGE)
    return value


def whole(value: float) -> int:
    if value != int(value):
        raise ToolError(f"{value:g} is not a whole number")
    return int(value)


def power(base: float, exponent: float) -> float:
    exact = isinstance(base, int) and isinstance(exponent, int)
    if exact and (base.bit_length() - 1) * exponent > MAX_BITS:  # it would have even more bits
        raise ToolError(TOO_LARGE)
    return base**exponent


def factorial(n: float) -> int:
    if n > MAX_BITS:  # n! has more than n bits
        raise ToolError(TOO_LARGE)
    return math.factorial(whole(n))


def comb(n: float, k: float) -> int:
    n, k = whole(n), whole(k)
    k = min(k, n - k) if k <= n else k
    if k <= n and k * max(1, n.bit_length() - 1 - k.bit_length()) > MAX_BITS:
        raise ToolError(TOO_LARGE)  # since comb(n, k) >= max(2, n / k) ** k
    return math.comb(n, k)


def lcm(*values: float) -> int:
    return reduce(lambda a, b: bounded(math.lcm(a, b)), map(whole, values), 1)


def round_to(value: float, digits: float = 0) -> float:
    if abs(digits) > MAX_DIGITS:
        raise ToolError(f"round takes at most {MAX_DIGITS} digits")
    return round(value, whole(digits))


OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: power,
    ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
FUNCTIONS = {
    "sqrt": math.sqrt, "abs": abs, "min": min, "max": max, "round": round_to,
    "gcd": lambda *values: math.gcd(*map(whole, values)), "lcm": lcm,
    "factorial": factorial, "comb": comb,
    "log": math.log, "exp": math.exp, "sin": math.sin, "cos": math.cos,
}  # fmt: skip


def parse(expression: str) -> ast.expr:
    """The syntax tree of an expression that is short, plain ASCII and not deeply nested."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"{len(expression)} characters are too many, {MAX_CHARS} are allowed")
    expression = expression.translate(str.maketrans("\u00d7\u00f7\u2212", "*/-"))
    expression = " ".join(expression.split())
    odd = re.search(r"[^ -~]|[\"'\\#]", expression)  # Python reads many a non-ASCII letter as ASCII
    if odd:
        raise ToolError(f"the character {odd[0]!a} is not arithmetic")
    if re.search(r"\d(?!e[+-]?\d)[a-z]|[\d)] ?\(", expression, re.IGNORECASE):  # 3x, 3(4 + 5)
        raise ToolError("write * to multiply")
    depths = accumulate((c in "([{") - (c in ")]}") for c in expression)
    if max(depths, default=0) > MAX_PARENTHESES:
        raise ToolError(f"more than {MAX_PARENTHESES} parentheses one inside another")
    try:
        return ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError("use numbers, + - * / // % **, parentheses and functions") from None


def evaluate(node: ast.AST, depth: int = 0) -> float:
    """The value of one node of the syntax tree; every number on the way is bounded."""
    if depth > MAX_DEPTH:
        raise ToolError(f"more than {MAX_DEPTH} operations one inside another")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate(operand, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](evaluate(left, depth + 1), evaluate(right, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            values = [evaluate(arg, depth + 1) for arg in args]
            try:
                value = FUNCTIONS[name](*values)
            except ToolError:
                raise
            except (TypeError, ValueError):  # too few, too many, or outside the domain
                raise ToolError(f"{name} is not defined for these arguments") from None
        case _:
            raise ToolError(complaint(node))
    return bounded(value)


def complaint(node: ast.AST) -> str:
    """What is wrong with a node that is not arithmetic."""
    match node:
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name not in FUNCTIONS:
            return f"{cut(name, 40)} is unknown; the functions are {', '.join(FUNCTIONS)}"
        case ast.Constant(value=name) | ast.Name(id=name):
            return f"{name} is not a number"
        case ast.Call(keywords=[_, *_]):
            return "an argument cannot have a keyword"
        case ast.BinOp(op=ast.BitXor()):
            return "^ is not a power here, write **"
        case ast.Tuple():
            return "a comma only separates the arguments of a function: write 1234, not 1,234"
    culprit = getattr(node, "func", getattr(node, "op", node))
    return f"{type(culprit).__name__} is not arithmetic"


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, or ToolError, in words and at once.

    Integers are exact; other numbers show 10 significant digits. Python's rules hold: ** binds to
    the right and before a sign, // rounds down, round(2.5) is 2.
    """
    try:
        return show(evaluate(parse(expression)))
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError(TOO_LARGE) from None


def show(value: float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            raise ToolError(f"the result has more than {MAX_DIGITS} digits")
        return str(value)
    if not 1e-9 <= abs(value) < 1e15:
        return f"{value:.10g}"
    decimals = max(0, 9 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"  # not 'g', which writes 0.00002 as 2e-05
    return text.rstrip("0").rstrip(".") if decimals else text


# --- search ---------------------------------------------------------------------------------------

K1, B = 1.5, 0.75
MAX_QUERY_CHARS, MAX_QUERY_TERMS = 10_000, 32
JSONL_LINE = '{"title": "...", "text": "..."}'


@dataclass(frozen=True)
class Document:
    title: str
    text: str


def terms(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


class Search:
    """BM25 over title and text (Robertson & Zaragoza 2009, The Probabilistic Relevance Framework).

        score(d, q) = sum over the terms t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean))
        idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5))

    tf: how often t occurs in d; |d|: terms in d, mean: of all documents; n of N documents have t.
    A term counts once however often q repeats it. The 1 + keeps idf above 0.
    """

    def __init__(
        self, documents: list[Document], k1=K1, b=B, top_k: int = 3, max_chars: int = 300
    ) -> None:
        if k1 < 0 or not 0 <= b <= 1 or top_k < 1 or max_chars < 10 or not documents:
            raise ValueError(
                f"{k1=}, {b=}, {top_k=}, {max_chars=}, {len(documents)} documents; legal are "
                "k1 >= 0, 0 <= b <= 1, top_k >= 1, max_chars >= 10, at least one document"
            )
        self.documents, self.top_k, self.max_chars = documents, top_k, max_chars
        lengths = np.zeros(len(documents))  # (N,)
        occurrences = defaultdict(lambda: ([], []))  # term -> (documents, how often in each)
        for i, document in enumerate(documents):
            words = terms(f"{document.title} {document.text}")
            lengths[i] = len(words)
            for term, tf in Counter(words).items():
                occurrences[term][0].append(i)
                occurrences[term][1].append(tf)
        norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))  # (N,)
        self.postings = {}  # term -> (documents, what the term adds to the score of each)
        for term, (ids, tfs) in occurrences.items():
            ids, tf = np.array(ids), np.array(tfs, dtype=float)
            idf = math.log(1 + (len(documents) - len(ids) + 0.5) / (len(ids) + 0.5))
            self.postings[term] = ids, idf * tf / (tf + norms[ids])

    @classmethod
    def from_jsonl(cls, path: str | Path, **settings) -> "Search":
        """A search over a file with one {"title": "...", "text": "..."} per line.

        Raises ValueError that names the file and the number of the first line that is different.
        """
        documents = []
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    document = Document(entry["title"], entry["text"])
                    if not (isinstance(document.title, str) and isinstance(document.text, str)):
                        raise TypeError
                except (ValueError, KeyError, TypeError, RecursionError):
                    message = f"{path}, line {number}: a line must look like {JSONL_LINE}"
                    raise ValueError(message) from None
                documents.append(document)
        if not documents:
            raise ValueError(f"{path} has no line like {JSONL_LINE}")
        return cls(documents, **settings)

    def rank(self, query: str) -> list[tuple[float, Document]]:
        """(score, document), best first, equal scores in document order; at most ``top_k``."""
        scores = np.zeros(len(self.documents))
        for term in list(dict.fromkeys(terms(query[:MAX_QUERY_CHARS])))[:MAX_QUERY_TERMS]:
            if term in self.postings:
                ids, weights = self.postings[term]
                scores[ids] += weights
        found = np.flatnonzero(scores)
        if len(found) > self.top_k:  # keep what reaches the k-th best, ties included
            found = found[scores[found] >= np.partition(scores[found], -self.top_k)[-self.top_k]]
        best = found[np.argsort(-scores[found], kind="stable")][: self.top_k]
        return [(float(scores[i]), self.documents[i]) for i in best]

    def __call__(self, query: str) -> str:
        """One line of at most ``max_chars`` per result, numbered unless ``top_k`` is 1."""
        lines = [self.line(document) for _, document in self.rank(query)]
        if not lines:
            return f"nothing found for: {cut(query[:MAX_QUERY_CHARS], 100)}"
        if self.top_k == 1:
            return lines[0]
        return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, start=1))

    def line(self, document: Document) -> str:
        # More words than max_chars do not fit: a document may be a book.
        title, text = (
            " ".join(part.split(maxsplit=self.max_chars)[: self.max_chars])
            for part in (document.title, document.text)
        )
        return cut(text if text.startswith(title) else f"{title}: {text}", self.max_chars)


def default_tools(
    documents_path: str | Path, top_k: int, max_chars: int, k1: float = K1, b: float = B
) -> dict[str, Tool]:
    """The two tools of the mini-world, by name."""
    search = Search.from_jsonl(documents_path, top_k=top_k, max_chars=max_chars, k1=k1, b=b)
    tools = [
        Tool("search", search, "words to look for in the documents"),
        Tool("calculator", calculate, "an expression such as (12 + 3) * 4"),
    ]
    return {tool.name: tool for tool in tools}
