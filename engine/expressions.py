"""Are two mathematical expressions equal? math-verify's verdict, from a process of its own.

What the policy writes is hostile, and sympy computes some of it in C, where no exception stops it:
"10^{10^{10}}" takes all time and memory. So a worker process compares, in a fork for each pair.
The kernel ends the fork when its CPU time is up, whatever it does and whichever thread asked; no
pair is judged in a state that another one left; and the training process never imports sympy.

Windows has no fork: there the worker itself compares, and is ended when it takes too long.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache

MAX_SECONDS = 0.8  # of CPU time for a pair; most take 10 to 100 ms
MAX_WAIT = 5.0  # seconds for a pair where there is no fork
MAX_MEMORY = 2**30  # bytes
MAX_LENGTH = 150  # characters
LOCK = threading.Lock()
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infty"
TRIG = "sin|cos|tan|cot|sec|csc"
COMMANDS = "pi infty le ge ne times cdot div pm cup cap in theta alpha beta emptyset".split()
LATEX = str.maketrans(
    {sign: rf"\{command} " for sign, command in zip("π∞≤≥≠×·÷±\u222a∩∈θαβ∅", COMMANDS, strict=True)}
    | {"°": "", "$": ""}
)
NO_EXPRESSION = re.compile(
    r"(?<!_)\d\s+\d|\d_|\)\s*_|[\"'~#]|\\[lc]?dots"  # "63 64", 63_8: it joins or drops these
    r"|(?<![\\A-Za-z])[A-Za-z]\d|\A\d+(?:\s*[-:/.]\s*\d+)+\Z"  # U2; a score, a time, a date
    r"|\^\{?(?:\d{5}|\d+\}?\^)|\d{4}!|!!|(?:[({]\s*){3}"  # would only take time
)
DOTTED = re.compile(r"\d\.\d+\.\d|(?<![\\A-Za-z])[A-Za-z]\d+\.\d")  # 3.11.0, v1.10: no products
RAY = r"([a-z]) *(<|>|\\[lg]e) *([^<>=,]+?)"
RAYS = re.compile(rf"{RAY} *(?:\bor|\\cup) +{RAY}")  # x <= 3 or x >= 5


def same_expression(prediction: str, answer: str) -> bool:
    """Does math-verify call the expressions equal? False, too, where it would take too long."""
    if max(len(prediction), len(answer)) > MAX_LENGTH or DOTTED.search(f"{prediction} {answer}"):
        return False
    texts = as_latex(prediction), as_latex(answer)
    for text in texts:
        if not text.isascii() or not text.isprintable() or NO_EXPRESSION.search(text):
            return False
    if texts[0] == texts[1]:
        return True
    some = [text for text in texts if not re.search(r"[<>]|\\[lg]e ", text)]
    if len(some) == 1 and not re.search(r"[(\[]", some[0]):  # 2 < x < 3 is no {2, 3}
        return False
    opens = re.compile(r"\((?!.*\).*\()|\\\{|")  # "(1,2),(3,4)" are two points, no pair
    sets = [r"\{" if " or " in text else opens.match(text)[0] for text in some]
    if {*sets} == {"(", r"\{"}:  # a set is no pair
        return False
    # math-verify compares two unions of rays, but not one with intervals.
    other = tuple(map(as_intervals, texts))
    return ask_worker(texts) or (sum(map(str.__ne__, texts, other)) == 1 and ask_worker(other))


def as_latex(text: str) -> str:
    """Plain text as LaTeX, decimals as exact fractions."""

    def exact(found: re.Match) -> str:
        power, whole, digits = found.groups()
        fraction = rf"\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}}"
        return f"^{{{fraction}}}" if power else fraction

    def relation(found: re.Match) -> str:  # \leq and \leqslant are \le, \lt is <
        letter, rest = found.groups()
        return {"l": "<", "g": ">"}[letter] if rest == "t" else rf"\{letter}e "

    def repeating(found: re.Match) -> str:  # 0.1\overline{6} = (16 - 1) / 90
        whole, fixed, again = found.groups()
        tens, nines = 10 ** len(fixed), 10 ** len(again) - 1
        return rf"\frac{{{int(whole + fixed + again) - int(whole + fixed)}}}{{{nines * tens}}}"

    # "1,000, 2" and "1,000x" have a number with a separator, "(1,000)" is a pair
    pair = "" if re.search(r",\s|;|\b(?:and|or)\b", text) else r"(?<![(\[])(?<!\\\{)"
    separated = rf"(?<![\d,.]){pair}\d{{1,3}}(?:,\d{{3}})+(?!,?\d)"
    text = re.sub(separated, lambda number: number[0].replace(",", ""), text)
    values = re.split(r" *(?:, *(?:and )?| and ) *", text)
    if all(re.match(r"[a-z] *=", value) for value in values):  # y=3, x=2 is the pair (2,3)
        text = ",".join(sorted(values))
    text = re.sub(r"(\d+)\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", repeating, text)
    text = re.sub(
        rf"({TRIG}) ?([({{])? ?(\d+(?:\.\d+)?) ?°(?(2) ?[)}}])", r"\1(\\frac{\3\\pi}{180})", text
    )
    text = re.sub(
        r"(?:\A|(?<=[(\[,+-])) ?[+]?(?:[Ii]nf(?:inity)?|oo)(?![A-Za-z])", r"\\infty ", text
    )
    text = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup ", text)
    text = " ".join(text.translate(LATEX).replace("**", "^").split())
    for sign, command in (("<=", "le"), (">=", "ge"), ("!=", "ne"), ("+/-", "pm")):
        text = text.replace(sign, rf"\{command} ")
    text = re.sub(r"\^(-\d+)", r"^{\1}", text)
    text = re.sub(r"(?:√|\\?\bsqrt) ?\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:√|(?<!\\)\bsqrt) ?(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\A-Za-z])({FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)
    text = re.sub(r"\\([lg])(eq?|eqslant|t)(?![a-z])", relation, text)
    return re.sub(r"(\^)?(\d*)\.(\d+)", exact, text.replace("varnothing", "emptyset"))


def as_intervals(text: str) -> str:
    """A union of two rays of one letter as intervals; any other text as it is."""
    rays = RAYS.fullmatch(text)
    if not rays or rays[1] != rays[4]:
        return text
    return r"\cup ".join(interval(*rays.groups()[i : i + 2]) for i in (1, 4))


def interval(relation: str, end: str) -> str:
    """What x may be where it stands in this relation to the end."""
    if relation in ("<", r"\le"):
        return rf"(-\infty,{end}{')' if relation == '<' else ']'}"
    return rf"{'(' if relation == '>' else '['}{end},\infty)"


def ask_worker(texts: tuple[str, str]) -> bool:
    """One line to the worker process and one back."""
    forks = hasattr(os, "fork")
    for _ in range(2):  # the second time if somebody had ended the worker
        with LOCK:
            worker, reply = start_worker(os.getpid()), b""
            alarm, began = threading.Timer(MAX_WAIT, worker.kill), time.monotonic()
            try:
                if not forks:
                    alarm.start()
                with suppress(BrokenPipeError):
                    worker.stdin.write(json.dumps(texts).encode() + b"\n")
                    reply = worker.stdout.readline()
            finally:
                alarm.cancel()
                if not reply:  # also after Ctrl-C: a late reply must not answer the next question
                    worker.kill()
                    worker.wait()
                    start_worker.cache_clear()
        if reply:
            return reply.strip() == b"1"
        if not forks and time.monotonic() - began >= MAX_WAIT:
            return False
    raise RuntimeError("the process that compares expressions was ended twice")


@lru_cache(maxsize=1)
def start_worker(owner: int) -> subprocess.Popen:
    """The worker of process `owner`: after a fork, each has its own."""
    worker = subprocess.Popen(
        [sys.executable, __file__, *["fork"] * hasattr(os, "fork")],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of sympy's sets
    )
    if worker.stdout.readline().strip() != b"ready":
        raise RuntimeError("math-verify cannot be imported: pip install -r requirements.txt")
    return worker


def answer_questions(forks: bool) -> None:
    """The worker: pairs of expressions on stdin, 1 or 0 on stdout, until its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import I, Symbol
    from sympy.core.random import seed

    # units=True would take the t of 2t for a unit
    spelling = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    config = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=spelling)]
    parse_options = {"fallback_mode": "no_fallback", "parsing_timeout": None}
    # With the library's 15 digits, 2^{-70} and 2^{-71} differ by nothing.
    verify_options = {"numeric_precision": 200, "allow_set_relation_comp": True}
    verify_options["timeout_seconds"] = None

    def equal(texts: tuple[str, str]) -> bool:
        p, a = (parse(f"${text}$", config, **parse_options) for text in texts)
        letters = {letter for value in (*p, *a) for letter in value.free_symbols}
        if any(letter.name == "i" for letter in letters):  # not a letter, and no other one is real
            values = {one: I if one.name == "i" else Symbol(one.name) for one in letters}
            p, a = ([value.xreplace(values) for value in some] for some in (p, a))
        # In both directions: for 5 alone, "2x + 1 = 5" would be right.
        return bool(p and a) and verify(a, p, **verify_options) and verify(p, a, **verify_options)

    with suppress(ImportError, OSError, ValueError):  # Windows has no limit, macOS may refuse it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for texts in WARM_UP:
        equal(texts)
    print("ready", flush=True)
    for line in sys.stdin:
        if not forks:
            equals = False
            with suppress(Exception):  # deliberately everything: what is hostile is unequal
                seed(0)
                equals = equal(json.loads(line))
            print(int(equals), flush=True)
            continue
        fork = os.fork()
        if fork == 0:
            equals = False
            try:
                signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # its signal ends the process
                equals = equal(json.loads(line))
            finally:
                os._exit(not equals)
        print(int(os.waitpid(fork, 0)[1] == 0), flush=True)


WARM_UP = [  # they fill the caches and make the imports that most pairs need
    (r"\frac{x^2+3x-5}{(x-1)(x+2)}", r"\sin^2 x+2\pi"),
    (r"(-\infty,3]\cup[5,\infty)", "x<3"),
    (r"\{1,2\}", "(1,-2)"),
    (r"x=-2\sqrt{3}, y>5", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    ("x+2y=5", "y=3"),
    ("1<x<2", "(1,2]"),
    (r"-2\sqrt{3}", r"\frac{\sqrt{3}}{2}"),
]

if __name__ == "__main__":
    answer_questions(forks="fork" in sys.argv)
