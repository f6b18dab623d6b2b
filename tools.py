"""What the policy can call: a calculator and a search; how a call is read, run and answered.

    policy text -> policy_stop -> read_call -> ToolCall -> run_calls -> ToolResult -> result_text

A tool is a named function from text to text. A mistake of the policy or of a tool never ends the
rollout: the policy reads an error as its result. Nothing here uses models, tokens or tensors.
"""

import ast
import ctypes
import math
import operator
import os
import re
import sys
import threading
import time
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from decimal import Context
from fractions import Fraction
from functools import partial, reduce
from itertools import count, pairwise
from pathlib import Path

import numpy as np
from mpmath.ctx_mp import MPContext
from mpmath.libmp import to_rational
from tqdm import tqdm

from data.files import Document, load_documents

NAME = "[A-Za-z_][A-Za-z0-9_-]{0,40}"  # of a tool
TAG = re.compile(f"<(/?)({NAME})>")
RESERVED = ("think", "answer", "result")  # tags of the format; no tool may have these names


class ToolError(ValueError):
    """A mistake of the policy, in words; it becomes the result, and never ends a rollout."""


@dataclass(frozen=True)
class Tool:
    """A function from text to text; the policy calls it by writing <name>argument</name>."""

    name: str
    run: Callable[[str], str]
    description: str  # one line for the system prompt: what to write between the tags

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name) or self.name in RESERVED:
            legal = f"a letter or _, up to 40 of a-z, A-Z, 0-9, _, -; not {', '.join(RESERVED)}"
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
        elif tag_name in opened and tag_name != "result":  # a closing tag alone is ignored
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


def read_call(text: str) -> ToolCall | None:
    """The last complete call of one policy segment, or None, by the rules of ``policy_stop``.

    Its name may be that of no tool: ``run_calls`` answers that, too.
    """
    closed = last_closed(text)
    if closed is None or closed[0] == "answer":
        return None
    return ToolCall(closed[0], closed[1].strip())


# --- running it and answering ---------------------------------------------------------------------

MAX_THREADS = 64  # calls that run at the same time
MAX_WORD = 30  # characters; what is longer is cut


@dataclass(eq=False)
class Screen:
    """stdout or stderr for the tools, which may write to it but not close it."""

    stream: object

    def __post_init__(self) -> None:
        while isinstance(self.stream, Screen):  # a late call may have put an old one back
            self.stream = self.stream.stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def close(self, **settings: object) -> None: ...

    detach = reconfigure = close

    @property
    def buffer(self):
        return Screen(self.stream.buffer)


def run_one(call: ToolCall, tools: Mapping[str, Tool]) -> ToolResult:
    """Run one call in this thread; any exception becomes an error result."""
    if call.name not in tools or not call.argument:
        wrong = f"the call of {call.name} is empty"
        wrong = wrong if call.name in tools else f"there is no tool named {call.name}"
        return ToolResult(f"{wrong}; the tools are {', '.join(tools)}", ok=False)
    try:
        text = tools[call.name].run(call.argument)
        if not isinstance(text, str):
            raise TypeError(f"it returned {type(text).__name__}, not text")
        return ToolResult(str.__str__(text), ok=True)  # of a subclass only the characters
    except BaseException as error:  # every exception: no tool may end a rollout
        return ToolResult(cut(problem(call.name, error), 300), ok=False)


def problem(name: str, error: BaseException) -> str:
    try:
        kind, words = type(error).__name__, str.__str__(str(error))
        return words if isinstance(error, ToolError) else f"{name} failed: {kind}: {words}"
    except BaseException:  # an exception need not be able to say what it is
        return f"{name} failed, with an error that has no readable message"


def run_calls(
    calls: list[ToolCall], tools: Mapping[str, Tool], time_limit: float
) -> list[ToolResult]:
    """Run the calls of one rollout level in parallel; the results in the order of the calls.

    Equal calls run once. A call that raises, or takes longer than ``time_limit`` seconds, gives an
    error result. Tools are trusted code in daemon threads: one that takes longer is stopped as soon
    as it runs Python code again, which a C function that keeps the interpreter lock never does.
    """
    results: dict[ToolCall, ToolResult] = {}
    finished: dict[ToolCall, ToolResult] = {}  # the threads write here, some of them too late

    def work(call: ToolCall) -> None:
        finished[call] = run_one(call, tools)

    different = list(dict.fromkeys(calls))
    with redirect_stdout(Screen(sys.stdout)), redirect_stderr(Screen(sys.stderr)):
        for i in range(0, len(different), MAX_THREADS):
            started = []
            for call in different[i : i + MAX_THREADS]:
                thread = threading.Thread(target=work, args=(call,), daemon=True)
                try:
                    thread.start()
                    started.append((call, thread, time.monotonic() + time_limit))
                except RuntimeError as error:  # so many calls hang that no thread is left
                    results[call] = ToolResult(f"{call.name} did not start: {error}", ok=False)
            for call, thread, deadline in started:
                thread.join(min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX))
                late = ToolResult(f"{call.name} took longer than {time_limit:g} seconds", ok=False)
                results[call] = finished.get(call, late)
                if thread.is_alive():  # an endless loop would slow down the rest
                    ident, error = ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, error)
    return [results[call] for call in calls]


def readable(text: str) -> str:
    """NUL and lone surrogates, which no tokenizer takes, become U+FFFD."""
    return re.sub(r"[\x00\ud800-\udfff]", "\ufffd", text)


def escape(text: str) -> str:
    """Readable text that cannot pass for a tag or a chat marker. Escaping twice changes nothing.

    A '<', or a look-alike that a tokenizer may turn into one (NFKC, or NFD without accents), stays
    only where it can mean "less than". A control character is no space: it may be dropped.
    """
    return re.sub(r"[<\uff1c\ufe64\u226e](?![ \t\r\n\d=.+-]|$)", "&lt;", readable(text))


def broken(marker: re.Match) -> str:
    """A special token, e.g. <|end|> or [INST], spelled so that it is plain text."""
    escaped = escape(marker[0])
    return escaped if escaped != marker[0] else f"{escaped[0]} {escaped[1:]}"


def result_text(result: ToolResult) -> str:
    """What the policy gets to read; an error is marked as one."""
    return f"<result>\n{escape(result.text if result.ok else 'error: ' + result.text)}\n</result>"


def cut(text: str, max_chars: int) -> str:
    """At most ``max_chars`` characters, whole words if they are short; ' ...' shows the cut."""
    if len(text) <= max_chars:
        return text
    space = text.rfind(" ", max(0, max_chars - MAX_WORD), max_chars - 3)
    return text[: space if space >= 0 else max_chars - 4].rstrip() + " ..."


# --- calculator -----------------------------------------------------------------------------------

MAX_CHARS = 500  # of an expression
MAX_BITS = 4096  # of every integer in a calculation
MAX_DIGITS = 200  # of the result
DIGITS = 100, 200  # of numbers that are not exact: what is shown must be the same with both
CERTAIN = 50  # digits before the point that are surely right
mp = MPContext()
Number = int | Fraction | mp.mpf  # only the last is not exact
ONE_AT_A_TIME = threading.Lock()  # calls run side by side, and `mp` has one number of digits
if hasattr(os, "register_at_fork"):  # else a child may wait for a lock that nobody there holds
    os.register_at_fork(after_in_child=lambda: globals().update(ONE_AT_A_TIME=threading.Lock()))
NUMBER = r"(?:\d[\d_]*\.?|\.\d)[\d_]*(?:[eE][+-]?\d+)?"
TOKEN = re.compile(rf"({NUMBER})|([A-Za-z_]\w*)|(\S)", re.ASCII)
ADVICE = {  # pattern that is ambiguous or not allowed -> what to write instead
    # gcd(540,270) is clear, since nobody takes the gcd of one number
    r"(?<![\w.])(?!(?<=gcd\(|lcm\(|omb\()\d+,\d+\))\d{1,3}([,']\d{3})+(?!\d)": "write 1234, not "
    "1,234; several numbers as 1, 234",
    # 17%5, 17 %5, 17 % 5 and 17 % (5) are remainders; everything else may be a percentage
    r"%( ?of\b|(?![\w.])(?!(?<= %) [\w(.]))": "write 20/100 for 20%; a remainder: 17 % (-5)",
    r"!(?!=)": "write factorial(5), not 5!",
    r"\^": "^ is not a power here, write **",
    r"[=<>!;]": "write one expression: nothing is assigned or compared",
    r"[$\xa2-\xa5\u20a0-\u20cf]": "write amounts without a currency: 5, not $5",
    r"\A([^(]*\(){101}": "more than 100 parentheses are too many",
    r"(?<![\w.])(?<!\d )0\d": "write 12, not 012",
    r"\d[eE][+-]?\d{4}": "the exponent is too large",
    r"[^ -~]|[^\w +*/%().,-]": "the character {!a} is not arithmetic",
}


def calculate(expression: str) -> str:
    """The value of an arithmetic expression; ToolError, in words, where there is none.

    Python's rules hold: -2**2 is -4, // rounds down, log is natural, sin takes radians, round(2.5)
    is 2. Integers, decimals and fractions are exact (0.1 + 0.2 - 0.3 is 0); roots etc. are not.
    Shown are all digits of an integer, up to 15 of a decimal, ten of other numbers, such as 1/3.
    """
    try:
        text, shown = read_expression(expression), set()
        tree = ast.parse(text, mode="eval").body
        with ONE_AT_A_TIME:
            for mp.dps in DIGITS:
                shown.add(show(evaluate(tree, text)))
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the numbers become too large or too small") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ToolError("a number, a sign or a parenthesis is missing or too many") from None
    if len(shown) > 1:
        raise ToolError("too few digits are left where nearly equal numbers cancel")
    return shown.pop()


def read_expression(expression: str) -> str:
    """The expression as Python writes it, or ToolError where it is not clear arithmetic."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"{len(expression)} characters are too many, {MAX_CHARS} are allowed")
    text = expression.translate(str.maketrans("\u00d7\u00f7\u2212", "*/-"))
    text = re.sub(r"([\w.)])\s*\n\s*([-+*/%])(?![^(]*\))", r"\1; \2", text)  # 12, and then -5
    text = re.sub(r"(?<![\w.])math\.(?=[a-z])| ?=\Z", "", " ".join(text.split()))  # 3 * 4 =
    for pattern, advice in ADVICE.items():
        if found := re.search(pattern, text, re.ASCII):
            raise ToolError(advice.format(found[0]))
    before = ""  # a number, a constant or a ) that an operator must follow
    for number, name, sign in TOKEN.findall(text):
        if before and (number or name or sign == "("):  # 3(4), 2 pi, 1 000, 5 km, a second line
            raise ToolError(f"no operator after {before:.20}: write *; 1000 for 1 000; no units")
        if name and name not in FUNCTIONS and name not in CONSTANTS:
            raise ToolError(f"{name:.40} is unknown; known: {', '.join(FUNCTIONS | CONSTANTS)}")
        before = number or (name if name in CONSTANTS else sign if sign == ")" else "")
    return text


def evaluate(node: ast.AST, text: str) -> Number:
    """The value of one node of the syntax tree of ``text``; the size of every number is limited."""
    match node:
        case ast.Constant(value=int() | float() as value):
            if isinstance(value, float):  # as it was written: 0.1 is a tenth
                value = Fraction(text[node.col_offset : node.end_col_offset].replace("_", ""))
        case ast.Name(id=name) if name in CONSTANTS:
            value = +CONSTANTS[name]  # with the digits of now
        case ast.UnaryOp(op=op, operand=operand):
            value = OPERATORS[type(op)](evaluate(operand, text))
        case ast.BinOp(left=left, op=op, right=right):
            a, b = evaluate(left, text), evaluate(right, text)
            if mp.mpf in (type(a), type(b)):
                a, b = mp.convert(a), mp.convert(b)
                if isinstance(op, ast.FloorDiv | ast.Mod):
                    raise ToolError("// and % need exact numbers; there is floor(x)")
            value = OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            values = [evaluate(arg, text) for arg in args]
            try:
                value = FUNCTIONS[name](*values)
                if isinstance(value, mp.mpc):
                    raise ValueError
            except (TypeError, ValueError) as error:  # too few, too many, or outside the domain
                undefined = ToolError(f"{name} is not defined for these arguments")
                raise error if isinstance(error, ToolError) else undefined from None
        case ast.Tuple(elts=[_, *_]):
            raise ToolError("a comma separates the arguments of a function: write 3.14, not 3,14")
        case _:  # sqrt + 1, max(*1)
            raise SyntaxError
    return bounded(value)


def bounded(value: Number | mp.mpc) -> Number:
    """The value, exact where it is a short decimal; raises where it is not real, or too long."""
    if isinstance(value, mp.mpc):
        raise ToolError("a root of a negative number is not a real number")
    if isinstance(value, Fraction) and value.denominator.bit_length() > MAX_BITS:
        value = mp.convert(value)
    if isinstance(value, mp.mpf):
        if value and not sys.float_info.min <= abs(value) <= sys.float_info.max:
            raise OverflowError
        near = Fraction(int(mp.nint(value * 10**15)), 10**15)  # sqrt(0.25) is 0.5
        if bool(near) != bool(value) or abs(value) > 10**CERTAIN or settled(value - near, value):
            return value
        value = near
    if value.numerator.bit_length() > MAX_BITS:
        raise OverflowError
    return value.numerator if value.denominator == 1 else value


def settled(value: Number, scale: Number) -> Number:
    """The value, but 0 if it is only rounding error compared with `scale`: sin(pi / 6) - 0.5."""
    noise = isinstance(value, mp.mpf) and abs(value) <= abs(scale) * mp.mpf(10) ** (20 - mp.dps)
    return 0 if noise else value


def power(base: Number, exponent: Number) -> Number | mp.mpc:
    if isinstance(exponent, int) and not isinstance(base, mp.mpf):
        bits = max(abs(base.numerator), base.denominator).bit_length() - 1
        if bits * abs(exponent) <= MAX_BITS:
            value = base ** abs(exponent)
            return value if exponent >= 0 else Fraction(1, value)
    if base and abs(exponent * mp.ln(abs(base))) > 800:  # exp(800) is too large for a float
        raise OverflowError
    return mp.power(base, exponent)


def circular(function: Callable, angle: Number) -> Number:
    """sin or cos; 0 where that is what the rounding error of the angle leaves of 0: sin(pi)."""
    return settled(function(known(angle)), angle if isinstance(angle, mp.mpf) else 0)


def log(x: Number, *base: Number) -> Number:
    if x <= 0:
        raise ValueError
    value = settled(mp.ln(x), 1)
    return value / log(*base) if base else value


def whole(value: Number) -> int:
    if not isinstance(value, int):
        raise ToolError(f"{show(value)} is not a whole number")
    return value


def exact(x: Number) -> Fraction:
    # its integers may be gmpy2's
    return Fraction(*map(int, to_rational(x._mpf_))) if isinstance(x, mp.mpf) else Fraction(x)


def known(x: Number) -> Number:
    """x, but no number so large that digits before the point are not known."""
    if isinstance(x, mp.mpf) and abs(x) > 10**CERTAIN:
        raise ToolError(f"only the first {CERTAIN} digits of so large a number are known")
    return x


def comb(n: Number, k: Number) -> int:
    n, k = whole(n), whole(k)
    k = min(k, n - k) if k <= n else k
    if k <= n and k * max(1, n.bit_length() - 1 - k.bit_length()) > MAX_BITS // 8:
        raise OverflowError  # since comb(n, k) >= max(2, n / k) ** k
    return math.comb(n, k)


OPERATORS = {
    ast.Add: lambda a, b: settled(a + b, a), ast.Sub: lambda a, b: settled(a - b, a),
    ast.Div: lambda a, b: a / b if isinstance(a, mp.mpf) else Fraction(a, b),
    ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: power, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip
FUNCTIONS = {
    "sqrt": mp.sqrt, "abs": abs, "min": partial(min, key=exact), "max": partial(max, key=exact),
    "floor": lambda x: math.floor(exact(known(x))), "ceil": lambda x: math.ceil(exact(known(x))),
    "round": lambda x, n=0: round(exact(known(x)), max(-2000, min(whole(n), 2000))),
    "gcd": lambda a, *more: math.gcd(*map(whole, (a, *more))),
    "lcm": lambda a, *more: reduce(lambda a, b: bounded(math.lcm(a, b)), map(whole, (1, a, *more))),
    "factorial": lambda n: math.factorial(min(whole(n), 1000)),  # 1000! is too large already
    "comb": comb, "exp": mp.exp, "ln": lambda x: log(x), "log": log,
    "log2": lambda x: log(x, 2), "log10": lambda x: log(x, 10),
    "sin": lambda x: circular(mp.sin, x), "cos": lambda x: circular(mp.cos, x),
    "tan": lambda x: circular(mp.sin, x) / circular(mp.cos, x),
    "asin": mp.asin, "acos": mp.acos, "atan": mp.atan,
}  # fmt: skip
CONSTANTS = {"pi": mp.pi, "e": mp.e}


def show(value: Number) -> str:
    if isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            raise ToolError(f"the result has more than {MAX_DIGITS} digits")
        return str(value)
    n, m = exact(value).as_integer_ratio()
    decimal = Context(prec=15).divide(n, m)
    if not sys.float_info.min <= abs(decimal) <= sys.float_info.max:
        raise OverflowError
    if decimal.adjusted() < -9 or abs(n) >= 10**15 * m:
        return f"{float(decimal):.10g}"
    if Fraction(decimal) != Fraction(n, m):  # all digits before the point
        decimal = Context(prec=max(10, decimal.adjusted() + 1)).divide(n, m)
    return f"{decimal.normalize():f}"  # not 'g', which writes 0.00002 as 2e-05


# --- search ---------------------------------------------------------------------------------------

MAX_QUERY_CHARS, MAX_QUERY_TERMS = 10_000, 32
PART = 2**18  # terms counted at a time
# Thai, Lao, Burmese, Khmer, Japanese, Chinese: no spaces; Korean: particles follow the word.
SPACELESS = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0edf\u1000-\u1049\u1780-\u17d3\u3005-\u3007"
SPACELESS += "\u3041-\u30fa\u30fc-\u31ff\u3400-\u9fff\U00020000-\U0003ffff\uac00-\ud7ff"
INDIC = "\u0780-\u07b1\u0900-\u0963\u0966-\u0dff"  # whose vowel signs are no letters to \\w
# the dot of Istanbul's I, a soft hyphen, the vowel signs of Hebrew and Arabic
SILENT = "[\u0307\u00ad\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670]"
WORD = re.compile(rf"([{SPACELESS}]+)|((?:[^\W_{SPACELESS}]|[{INDIC}])+)")


def terms(text: str, of_query: bool = False) -> list[str]:
    """Words in lower case; without spaces, character pairs (of a document, also characters)."""
    if text.isascii():
        return re.findall("[a-z0-9]+", text.lower())
    found = []
    text = re.sub(SILENT, "", unicodedata.normalize("NFKC", text).casefold())
    for run, word in WORD.findall(text):
        found += [word] if word else run if len(run) == 1 or not of_query else []
        found += map("".join, pairwise(run))
    return found


class Search:
    """BM25 over title and text (Robertson & Zaragoza 2009, The Probabilistic Relevance Framework).

        score(d, q) = sum over the terms t of q:  idf(t) * tf / (tf + k1 * (1 - b + b * |d| / mean))
        idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5))

    tf: how often t occurs in d; |d|: terms in d, mean: of all documents; n of N documents have t.
    A term counts once however often q repeats it. The 1 + keeps idf above 0.
    """

    def __init__(self, documents: list[Document], k1=1.5, b=0.75, top_k=3, max_chars=300) -> None:
        if k1 < 0 or not 0 <= b <= 1 or top_k < 1 or max_chars < 10 or not documents:
            raise ValueError(
                f"{k1=}, {b=}, {top_k=}, {max_chars=}, {len(documents)} documents; legal are "
                "k1 >= 0, 0 <= b <= 1, top_k >= 1, max_chars >= 10, at least one document"
            )
        self.documents, self.top_k, self.max_chars = documents, top_k, max_chars
        self.numbers, tokens, lengths = number_terms(documents)
        n = sum(np.bincount(t, minlength=len(self.numbers)) for t, *_ in counted(tokens, lengths))
        self.ends = np.cumsum(n)  # (V): where the postings of a term end
        self.ids = np.empty(n.sum(), dtype=np.int32)  # (P) documents, of one term after the other
        tf = np.empty(n.sum(), dtype=np.uint16)  # (P)
        free = self.ends - n  # (V): where the next posting of a term goes
        for t, d, times in counted(tokens, lengths):
            here = np.bincount(t, minlength=len(n))
            at = (free - np.cumsum(here) + here)[t] + np.arange(len(t))
            self.ids[at], tf[at] = d, np.minimum(times, 2**16 - 1)
            free += here
        del tokens  # the weights need its memory
        norms = k1 * (1 - b + b * lengths / max(lengths.mean(), 1.0))  # (N)
        self.weights = np.repeat(np.log(1 + (len(documents) - n + 0.5) / (n + 0.5)), n)  # (P)
        for i in range(0, len(tf), PART):
            some = slice(i, i + PART)
            self.weights[some] = self.weights[some] * tf[some] / (tf[some] + norms[self.ids[some]])

    def rank(self, query: str) -> list[tuple[float, Document]]:
        """(score, document), best first, equal scores in document order; at most ``top_k``."""
        scores = np.zeros(len(self.documents))
        words = list(dict.fromkeys(terms(query[:MAX_QUERY_CHARS], of_query=True)))
        for number in [self.numbers[w] for w in words[:MAX_QUERY_TERMS] if w in self.numbers]:
            some = slice(self.ends[number - 1] if number else 0, self.ends[number])
            scores[self.ids[some]] += self.weights[some]
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
        n = self.max_chars  # more words than that do not fit: a document may be a book
        title, text = (" ".join(part.split(maxsplit=n)[:n]) for part in document)
        titled = not title or re.match(rf"{re.escape(title)}(?![A-Za-z0-9])", text)
        return cut(text if titled else f"{title}: {text}", n)


def number_terms(documents: list[Document]) -> tuple[dict[str, int], np.ndarray, np.ndarray]:
    """A number for every term; those of the documents, in a row; terms in each document (N)."""
    numbers = defaultdict(count().__next__)
    tokens, lengths = array("i"), []
    for document in tqdm(documents, "indexing", disable=len(documents) < 20_000):
        words = terms(f"{document.title} {document.text}")
        tokens.extend(map(numbers.__getitem__, words))
        lengths.append(len(words))
    return numbers, np.frombuffer(tokens, dtype=np.int32), np.array(lengths)


def counted(tokens: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Part after part of the documents: (terms, documents, how often), sorted by term."""
    ends = np.cumsum(lengths)
    borders = np.searchsorted(ends, np.arange(PART, ends[-1], PART))
    for first, end in pairwise(np.unique([0, *borders, len(lengths)])):
        documents = np.repeat(np.arange(first, end), lengths[first:end])
        some = tokens[ends[end - 1] - len(documents) : ends[end - 1]].astype(np.int64)
        pairs, times = np.unique(some << 32 | documents, return_counts=True)
        yield pairs >> 32, pairs & (2**32 - 1), times


def default_tools(documents_path: str | Path, results: int, chars: int) -> dict[str, Tool]:
    """The two tools of the mini-world, by name; UserError for a file that cannot be read."""
    search = Search(load_documents(documents_path), top_k=results, max_chars=chars)
    return {
        "search": Tool("search", search, "words to look for in the documents"),
        "calculator": Tool("calculator", calculate, "an expression such as (12 + 3) * 4"),
    }
