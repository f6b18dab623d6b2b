"""Are two mathematical expressions equal? math-verify's verdict, from a process of its own.

What the policy writes is hostile, and sympy computes some of it in C, where no exception stops it:
"10^{10^{10}}" takes all time and memory. So a worker process compares, in a fork for each pair.
The kernel ends the fork when its CPU time is up, whatever it does and whichever thread asked; and
no pair is judged in a state that another one left.

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
if hasattr(os, "register_at_fork"):  # another thread may hold it then
    os.register_at_fork(after_in_child=lambda: globals().update(LOCK=threading.Lock()))
FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|infty"
TRIG = "sin|cos|tan|cot|sec|csc"
SIGNS = "∞≤≥≠×·÷±\u222a∩∈∅≈∠→∂∇" + "".join(map(chr, range(0x3B1, 0x3CA)))
COMMANDS = """
    infty le ge ne times cdot div pm cup cap in emptyset approx angle to partial nabla
    alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho
    sigma sigma tau upsilon phi chi psi omega
""".split()
LATEX = {sign: rf"\{command} " for sign, command in zip(SIGNS, COMMANDS, strict=True)}
LATEX |= {sign.upper(): rf"\{LATEX[sign][1:].capitalize()}" for sign in "γδθλξπσφψω"}
LATEX = str.maketrans(LATEX | {"°": "", "$": ""})
NO_EXPRESSION = re.compile(
    r"(?<!_)\d\s+\d|[\d)]\s*_|[\"'~#]|\\[lc]?dots"  # "63 64", 63_8: it joins or drops these
    r"|\\(?:partial|nabla|angle|approx)(?![a-z])|\\infty ?\]|\[ ?-?\\infty|\(\d+\) ?=|=/"
    r"|\\frac *\{? *d[^=]*?\{ *d *[a-z]"  # dy/dx: it takes y for a constant
    r"|(?<![\\A-Za-z])[A-Za-z]\d|\A\d+(?:\s*[-:/.]\s*\d+)+\Z"  # U2; a score, a time, a date
    r"|\^\{?(?:\d{5}|\d+\}?\^)|\d{4}!|!!|(?:[({]\s*){3}"  # would only take time
)
NO_LIST = re.compile(r"\\(?:pm|cup)|[()\[\]=;]|\b(?:and|or)\b")
DOTTED = re.compile(r"\d\.\d+\.\d|(?<![\\A-Za-z])[A-Za-z]\d+\.\d")  # 3.11.0, v1.10: no products
RAY = re.compile(r"\b([a-z]) *(<|>|\\[lg]e) *([^<>=,]+?) *(?=\bor\b|\\cup|\Z)")
RAYS = re.compile(rf"{RAY.pattern}(?:or|\\cup) +{RAY.pattern}")  # x <= 3 or x >= 5


def same_expression(prediction: str, answer: str) -> bool:
    """Does math-verify call the expressions equal? False, too, where it would take too long."""
    if max(len(prediction), len(answer)) > MAX_LENGTH or DOTTED.search(f"{prediction} {answer}"):
        return False
    texts = as_latex(prediction), as_latex(answer)
    if any(not re.fullmatch("[ -~]*", text) or NO_EXPRESSION.search(text) for text in texts):
        return False
    if texts[0] == texts[1]:
        return True
    texts = capitals_apart(texts)
    some = [text for text in texts if not re.search(r"[<>]|\\[lg]e ", text)]
    if len(some) == 1 and not re.search(r"[(\[]", some[0]):  # 2 < x < 3 is no {2, 3}
        return False
    if sum("=" in text for text in texts) == 1 and any(map(unsolved, texts)):
        return False
    if len({bool(re.search(r"\bor\b|\\cup", text)) for text in texts}) > 1:
        letters = set(re.findall(r"\b([a-z]) *=", texts[0]))
        if (not some and "|" not in "".join(texts)) or len(letters) > 1:
            return False  # "x > 2 and x < 5" is not "x > 2 or x < 5"
    opens = re.compile(r"\((?!.*\).*\()|\\\{|")  # "(1,2),(3,4)" are two points, no pair
    sets = [r"\{" if " or " in text else opens.match(text)[0] for text in some]
    commas = {text.count(",") for text in some if not NO_LIST.search(text)}
    if {*sets} == {"(", r"\{"} or len(commas) > 1:  # a set is no pair, and 5, 5 is not 5
        return False
    # math-verify compares two unions of rays, but not one with intervals.
    other = tuple(map(as_intervals, texts))
    return ask_worker(texts) or (sum(map(str.__ne__, texts, other)) == 1 and ask_worker(other))


def unsolved(text: str) -> bool:
    """Is it e^x = 3, x/2 = 3: an equation for an unknown, whose right side is no answer?"""
    left, equals, right = text.partition("=")
    letters = {*re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])(?:_\w)?", left)} - {"e"}
    named = re.search(r"\\(?:int|sum|prod|lim|max|min|sup|inf)(?![a-z])", left)
    named = named or re.fullmatch(r" *\w+ *", left)
    one = len(letters) == 1 and letters <= {*"xynkt"}
    return bool(equals) and "=" not in right and one and not named


def two_cases(text: str) -> bool:
    """Does a letter stand in both cases? Then R is not r."""
    letters = {*"".join(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{1,3}(?![A-Za-z])", text))}
    return not letters.isdisjoint(letter.lower() for letter in letters if letter.isupper())


def capitals_apart(texts: tuple[str, str]) -> tuple[str, ...]:
    r"""Another letter for R beside r, and for \Phi beside \phi: math-verify lower-cases."""
    sign = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
    signs, both = set(sign.findall(" ".join(texts))), any(map(two_cases, texts))
    free = iter(sorted({*"bcjkmnpqsuvwyz"} - {one.lower() for one in signs}))
    upper = (one for one in sorted(signs) if one.lower() in signs - {one})
    names = {one: next(free, one) for one in upper if both or len(one) > 1}
    return tuple(sign.sub(lambda found: names.get(found[0], found[0]), text) for text in texts)


def as_latex(text: str) -> str:
    """Plain text as LaTeX, decimals as exact fractions."""

    def exact(found: re.Match) -> str:
        power, whole, digits = found.groups()
        fraction = rf"\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}}"
        return f"^{{{fraction}}}" if power else fraction

    def repeating(found: re.Match) -> str:  # 0.1\overline{6} = (16 - 1) / 90
        whole, fixed, again = found.groups()
        tens, nines = 10 ** len(fixed), 10 ** len(again) - 1
        return rf"\frac{{{int(whole + fixed + again) - int(whole + fixed or 0)}}}{{{nines * tens}}}"

    # "1,000, 2" and "1,000x" have a number with a separator, "(1,000)" is a pair
    pair = "" if re.search(r",\s|;|\b(?:and|or)\b", text) else r"(?<![(\[])(?<!\\\{)"
    separated = rf"(?<![\d,.]){pair}\d{{1,3}}(?:,\d{{3}})+(?!,?\d)"
    text = re.sub(separated, lambda number: number[0].replace(",", ""), text)
    values = re.split(r" *(?:, *(?:and )?| and ) *", text)
    if all(re.match(r"[a-z] *=", value) for value in values):  # y=3, x=2 is the pair (2,3)
        text = ",".join(sorted(values))
    text = re.sub(r"\A\]", "(", re.sub(r"\[\Z", ")", text))  # ]1,2[ is (1,2)
    text = re.sub(r"(\d*)\.(\d*)\\(?:overline|bar|dot) ?\{(\d+)\}", repeating, text)
    text = re.sub(rf"({TRIG}) ?([({{])? ?([\d.]+)°(?(2) ?[)}}])", r"\1(\\frac{\3\\pi}{180})", text)
    text = re.sub(r"(?<![^(\[,+-]) ?\+?(?:[Ii]nf(?:inity)?|oo)(?![A-Za-z])", r"\\infty ", text)
    text = re.sub(r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup ", text)
    text = " ".join(text.translate(LATEX).replace("**", "^").split())
    for sign, command in (("<=", "le"), (">=", "ge"), ("!=", "ne"), ("+/-", "pm")):
        text = text.replace(sign, rf"\{command} ")
    text = re.sub(r"\^(-\d+)", r"^{\1}", re.sub(r"\^(?:T|\{T\})", "^{T_{0}}", text))  # no transpose
    text = re.sub(r"(?:√|\\?(?<![A-Za-z])sqrt) ?\(((?:[^()]|\([^()]*\))*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?:√|(?<![\\A-Za-z])sqrt) ?(\d+|[a-z](?![a-z]))", r"\\sqrt{\1}", text)
    text = re.sub(rf"(?<![\\A-Za-z])({FUNCTIONS})(?![A-Za-z])", r"\\\1 ", text)
    if chain := re.fullmatch(r"([^<>,]+)(>|\\ge )( *[^<>, ]+ *)(>|\\ge )([^<>,]+)", text):
        text = "".join(chain.groups()[::-1]).replace(">", "<").replace(r"\ge", r"\le")  # c > b > a
    text = re.sub(r"(\w+) ?\\choose ?(\w+)", r"\\binom{\1}{\2}", text)
    if text.count(r"\pm") == 1 and re.fullmatch(r"[^,]*\\frac[^,]*\\pm[^,]*", text):
        text = ",".join(text.replace(r"\pm", sign) for sign in "+-")  # there none would be read
    return re.sub(r"(\^)?(\d*)\.(\d+)", exact, text)


def as_intervals(text: str) -> str:
    """A union of two rays of one letter as intervals; any other text as it is."""

    def interval(found: re.Match) -> str:
        closed = "e" in found[2]
        if found[2] in ("<", r"\le"):
            return rf"(-\infty,{found[3]}{')]'[closed]}"
        return rf"{'(['[closed]}{found[3]},\infty)"

    rays = RAYS.fullmatch(text)
    return RAY.sub(interval, text).replace("or", r"\cup") if rays and rays[1] == rays[4] else text


@lru_cache(maxsize=4096)  # the trajectories of a question often answer the same
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
