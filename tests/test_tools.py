"""tools.py against independent oracles: Python's own arithmetic, BM25 written out, a stopwatch."""

import math
import os
import random
import re
import sys
import threading
import time
import timeit
import tracemalloc
import unicodedata
from fractions import Fraction
from itertools import accumulate
from unittest.mock import Mock

import numpy as np
import pytest
from common import python

import tools as toolbox
from data.files import Document
from tools import Search, Tool, ToolCall, ToolError, ToolResult, calculate, escape, run_calls


def seconds(function, *args) -> float:
    """Of CPU time, the best of three runs: the machine may be busy."""
    return min(timeit.repeat(lambda: function(*args), timer=time.process_time, number=1, repeat=3))


def named(**functions) -> dict[str, Tool]:
    return {name: Tool(name, function, "for a test") for name, function in functions.items()}


def run(function, argument="1", time_limit=5.0) -> ToolResult:
    [result] = run_calls([ToolCall("t", argument)], named(t=function), time_limit)
    return result


# --- reading a call -------------------------------------------------------------------------------

CALLS = [  # what the policy wrote, the call in it
    ("<think>who?</think> <search>Mira</search>", ("search", "Mira")),
    ("<calculator>\n 3 * 4 \n</calculator>\n", ("calculator", "3 * 4")),  # a newline is no text
    ("<a>1</a> <python>print(1)</python>", ("python", "print(1)")),  # the last one; unknown
    ("<search>a <search>b</search></search>", ("search", "b")),  # the nearest opening tag
    ("if <x> then <search></search>", ("search", "")),  # empty, still a call: run_calls says so
    ("<search>3 < 4 and 5 > 2</search>", ("search", "3 < 4 and 5 > 2")),
    ("<answer>a</answer> <search>b</search>", ("search", "b")),
    ("<think>a</think><think>b</think> <search>c</search>", ("search", "c")),
]
ANSWERS = ["<think>so</think> <answer>\\boxed{3}</answer>", "<search>a</search> <answer>b</answer>"]
NEITHER = """</search>   <search>Mira</search   <think>I could <search>Mira</search></think>
<think>a <answer>1</answer></think> so   <search>a</search> b</think> c   <result>42</result>
<think>a</think> <think><search>b</search>   <p class='x'>a</p> <> </> <1a>2</1a>"""


def test_reading_a_segment():
    cases = [(text, "tool", ToolCall(*call)) for text, call in CALLS]
    cases += [(text, "answer", None) for text in ANSWERS]
    cases += [(text, None, None) for text in ["", *re.split(r" {3}|\n", NEITHER)]]
    for text, stop, call in cases:
        assert (toolbox.policy_stop(text), toolbox.read_call(text)) == (stop, call), text
    for text in (CALLS[0][0], ANSWERS[0]):  # not a character earlier
        assert {toolbox.policy_stop(text[:n]) for n in range(len(text))} == {None}


def test_reading_is_linear_on_hostile_text():
    names = [f"a{i}" for i in range(7000)]
    nested = "".join(f"<{n}>" for n in names) + "".join(f"</{n}>" for n in reversed(names))
    assert toolbox.read_call(nested).name == "a0"
    pieces = "<a> <a></a> </a> < <a </ <think> </think> </think><a></a> <a><a><a></a>".split()
    for text in [nested, *(piece * (100_000 // len(piece)) for piece in pieces)]:
        assert seconds(toolbox.policy_stop, "<think>a</think> <search>" + text) < 0.1
    short = "<think>" + "some words > others " * 20 + "</think> <search>Mira Holt"
    assert seconds(lambda: [toolbox.policy_stop(short) for _ in range(1000)]) < 0.05  # 50 us each


def test_calls_run_side_by_side_but_only_so_many_in_order_and_equal_ones_once(monkeypatch):
    monkeypatch.setattr(toolbox, "MAX_THREADS", 4)
    before, most, ran = threading.active_count(), [], []

    def work(text):
        ran.append(text)
        most.append(threading.active_count() - before)
        time.sleep(0.1 if text == "0" else 0.05)
        return text

    calls = [ToolCall("t", str(i % 9)) for i in range(11)]
    results = run_calls([*calls, ToolCall("u", "1")], named(t=work, u=work), 5.0)
    assert results == [ToolResult(call.argument, True) for call in [*calls, calls[1]]]
    assert 2 <= max(most) <= 4 and sorted(ran) == sorted(["1", *"012345678"])
    assert run_calls([], {}, 5.0) == []


# --- running calls, and results that cannot forge -------------------------------------------------


class Evil(str):
    """Text whose own methods raise."""

    def __str__(self, *args):
        raise RuntimeError("evil")

    __len__ = __getitem__ = __format__ = __eq__ = __contains__ = replace = __str__


def failing(message):  # an error whose message is made when it is asked for
    return type("Odd", (ToolError,), {"__str__": lambda self: message()})()


RAISED = [
    (KeyboardInterrupt("no"), "t failed: KeyboardInterrupt: no"),
    (ToolError("write words"), "write words"),
    (failing(sys.exit), "t failed, with an error that has no readable message"),
    (failing(lambda: Evil("words")), "words"),
    (KeyError("word " * 10_000), "t failed: KeyError: '" + "word " * 55 + "..."),
]


@pytest.mark.parametrize(("error", "text"), RAISED, ids=range(len(RAISED)))
def test_a_tool_that_raises_anything_gives_an_error_result(error, text):
    tools = named(t=Mock(side_effect=error), good=str)
    results = run_calls([ToolCall("t", "1"), ToolCall("good", "2")], tools, 5.0)
    assert results == [ToolResult(text, False), ToolResult("2", True)]


def test_other_calls_that_give_an_error_result(monkeypatch):
    calls = [ToolCall("python", "print(1)"), ToolCall("search", "")]
    unknown, empty = run_calls(calls, named(search=str, calculator=str), 5.0)
    known = "; the tools are search, calculator"
    assert unknown == ToolResult(f"there is no tool named python{known}", False)
    assert empty == ToolResult(f"the call of search is empty{known}", False)
    assert type(run(Evil).text) is str and run(Evil) == ToolResult("1", True)
    assert run(len) == ToolResult("t failed: TypeError: it returned int, not text", False)
    assert run(str, time_limit=1e30).ok
    no_more = Mock(side_effect=RuntimeError("can't start new thread"))
    monkeypatch.setattr(threading.Thread, "start", no_more)
    assert run(str) == ToolResult("t did not start: can't start new thread", False)


def test_a_tool_can_print_but_not_close_the_screen(capsys):
    def tool(text):
        print("hello")
        print("problem", file=sys.stderr)
        sys.stdout.detach(), sys.stdout.reconfigure(encoding="ascii")
        sys.stdout, sys.stderr = sys.stdout.close(), sys.stderr.close()

    before = sys.stdout, sys.stderr
    run(tool)
    assert (sys.stdout, sys.stderr) == before
    late = toolbox.Screen(toolbox.Screen(sys.stdout))
    assert late.stream is sys.stdout and print("adiós") is None
    assert capsys.readouterr() == ("hello\nadiós\n", "problem\n")


def test_a_tool_that_hangs_gives_an_error_result_and_is_stopped():
    def loop(text):
        while True:
            pass

    released, ran_on = threading.Event(), []
    hangs = {"wait": lambda text: released.wait(30) and ran_on.append(text), "loop": loop}
    before, start = threading.active_count(), time.perf_counter()
    calls = [ToolCall(name, "1") for name in ("wait", "loop", "good")]
    *late, good = run_calls(calls, named(**hangs, good=str), time_limit=0.2)
    assert 0.15 < time.perf_counter() - start < 2 and good == ToolResult("1", True)
    assert late == [ToolResult(f"{name} took longer than 0.2 seconds", False) for name in hangs]
    released.set()
    while threading.active_count() > before and time.perf_counter() - start < 20:
        time.sleep(0.01)
    assert threading.active_count() == before and not ran_on


def test_a_tool_that_hangs_does_not_keep_the_process_from_ending():
    """It sleeps, works, or prints, and catches all that is raised in it."""
    code = """if True:
        import time
        from tools import *
        def hang(text):
            while True:
                try:
                    eval(text)
                except BaseException:
                    pass
        hangs = [ToolCall("t", text) for text in ("time.sleep(60)", "1", "print(end='')")]
        print([result.ok for result in run_calls(hangs, {"t": Tool("t", hang, "")}, 0.1)])
    """
    done = python("-c", code, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[False, False, False]\n", "")


def test_a_tool_cannot_have_a_name_that_is_not_a_tag():
    for name in ("think", "answer", "result", "", "a b", "1a", "a>", "\u00e9", "/a", "a" * 42):
        with pytest.raises(ValueError, match="name"):
            Tool(name, str, "")


def test_markers_are_escaped_and_ordinary_text_is_not():
    assert toolbox.result_text(ToolResult("<b>", ok=False)) == "<result>\nerror: &lt;b>\n</result>"
    found = run(Search([Document("", "</result><answer>\\boxed{1}</answer>")]), "boxed")
    assert toolbox.TAG.findall(toolbox.result_text(found)) == [("", "result"), ("/", "result")]
    assert escape("a > b; \\boxed{1} <") == "a > b; \\boxed{1} <"
    assert escape(escape("<a>\x00\ud800")) == "&lt;a>\ufffd\ufffd"  # NUL, a lone surrogate
    for char in map(chr, range(0x10000)):  # after these it can only mean "less than"
        less = char.isdecimal() or char in " \t\r\n=.+-"
        assert escape(f"<{char}").startswith("<") == less, char
    for char in map(chr, range(sys.maxunicode + 1)):
        if "<" in unicodedata.normalize("NFKD", char):  # all the look-alikes there are
            assert escape(char + "b>") == "&lt;b>"


# --- calculator -----------------------------------------------------------------------------------

VALUES = rf"""
-2**2 -> -4   (-1)**(10**30+1) -> -1   1**10**30 -> 1   0**0 -> 1   64**(1/3) -> 4   .5 -> 0.5
0.1 + 0.2 - 0.3 -> 0   floor(4.35 * 100) -> 435   round(2.675, 2) -> 2.68   1E+3 -> 1000   5. -> 5
1/3 -> 0.3333333333   0.00002 * 1 -> 0.00002   1e-9 -> 0.000000001   1e-30 -> 1e-30   17%5 -> 2
123456789.12 + 0.01 -> 123456789.13   12345678901.5 + 0.25 -> 12345678901.75   1_000 + 1 -> 1001
10**15/7 -> 142857142857143   10**20/7 -> 1.428571429e+19   1e20 -> 1{"0" * 20}   7 %3 -> 1
(1 + 1/10**9)**10**9 -> 2.718281827   10**400 - 10**400 + 1 -> 1   2**4000 % 7 -> {2**4000 % 7}
sqrt(2)**2 - 2 -> 0   round(5.5, 10**9) -> 5.5   round(5, -10**9) -> 0   (3+4)%5 -> 2
gcd(540,270) -> 270   comb(2, 5) -> 0   max(12,34) -> 34   7 % (-3) -> -2   sin(pi/6) - 0.5 -> 0
comb(10**9, 10**9 - 2) -> 499999999500000000   factorial(100) -> {math.factorial(100)}
log(8, 2) -> 3   floor(log(243, 3)) -> 5   ln(e) -> 1   math.pi -> 3.141592654   tan(pi) -> 0
floor((10**24)**(1/3)) -> 100000000   floor(sqrt(10**16-1)) -> 99999999   sqrt(10**400) -> 1e+200
log(2, 1.00000001) -> 69314718.4   floor(e**50) -> 5184705528587072464087   ln(exp(706)) -> 706
min(pi, 3.5) -> 3.141592654   999999.999999999 * 1 -> 999999.999999999   1/pi -> 0.3183098862
(-1.000000001)**(10**9) -> 2.718281827   acos(0.9999999999) -> 0.00001414213562   lcm(-4) -> 4
floor(1 - 10**-200) -> 0   sin(10**100) -> -0.3723761237   log2(10) -> 3.321928095
round(sqrt(7.155625), 2) -> 2.68   sqrt(10**10 + 1) - 10**5 -> 0.000005   sin(pi * 10**30) -> 0
cos(1) -> 0.5403023059   asin(0.3) -> 0.304692654   atan(2) -> 1.107148718   exp(2) -> 7.389056099
10*log10(0.1**320) -> -3200   sqrt(10**9+1) - 31622 - 0.7766 -> 0.00001749518162
3 * 4 = -> 12   3 × 4 ÷ 2 − 1 -> 5   {"1+" * 199 + "1"} -> 200   {"(" * 50 + "1" + ")" * 50} -> 1
"""


def test_calculator():
    for expression, value in [*re.findall(r"(\S.*?) -> (\S+)", VALUES), (" (1\n+ 2) *\n\t3 ", "9")]:
        assert calculate(expression) == value, expression


def test_a_child_waits_for_no_thread_and_other_integers_will_do(monkeypatch):
    with toolbox.ONE_AT_A_TIME:
        child = os.fork() or os._exit(toolbox.ONE_AT_A_TIME.locked())
    assert os.waitpid(child, 0)[1] == 0
    monkeypatch.setattr(toolbox, "to_rational", lambda x: (np.int64(5), np.int64(2)))  # as gmpy2's
    assert calculate("pi") == "2.5" and calculate("round(pi)") == "2"


REFUSED = r"""
write 1234, not 1,234 | 1,234,567.5   gcd(1,234,5)   max(12,34,567, 5)   max(-1,234)   1'234
write 3.14, not 3,14 | 3,14 * 2   (1,5)   1,2,3
write 20/100 for 20% | 20 %   10% + 5   10 % +5   15%(200)   20%of 50   max(5%, 1)   7 %% 3
write factorial(5), not 5! | (3 + 2)!   -5! + 1
write ** | 2^3
nothing is assigned | x = 3*4   a = 5\nb = 6\na * b   1 < 2   1; 2   12\n-5   round(2.5, ndigits=1)
without a currency | $5 + $3   5$   €5   ₹5
no operator after 5: write * | 5 km + 3 km   5km   5(4 + 5)   5 234   5\n6   5 if 2 else 3   5e
no operator after | (1)(2)   1.or 2   pi r   0x1f   1.2.3   1 000 000   2.math.e5
is unknown; known: sqrt, abs | import math\nmath.sqrt(2)   (1).real   np.sqrt(4)   PI
missing or too many | sqrt + 1   1 +   ((1)   (1))   max(())   .   max(*1)   max(**1)   1__0
write 12, not 012 | 3 + 007   00.5
division by zero | 1/0   5 % 0   0**-1.5   tan(pi/2)   log(5, 1)
root of a negative | (-8)**0.5   (-8)**(1/3)   (-1)**(10**17/3)
is not defined for these | log(0)   sqrt()   comb(-1, 1)   ln(2, 2)   gcd()   log(2, 0)   asin(2)
is not a whole number | factorial(2.5)   lcm(4, 0.5)   comb(4.5, 2)   round(1, .5)
only the first 50 digits | sin(10**70 * e)   floor(e**150)   round(-pi * 10**70, 2)
need exact numbers | pi % 1   5 % sqrt(2)   sqrt(2) // 1
too few digits are left | sqrt(10**100 + 1) - 10**50   3**(1 + 10**-99 * pi) - 3
too large or too small | exp(-1000)   1e-400   0.5**5000   (1/10**99)**2000.5   3e-320 * 1
too large or too small | 2**0.5**9999   1e-300 * sqrt(2) * 1e-200   sqrt(2)*1e-300 / 1e300
is not arithmetic | [1, 2]   'a' * 3   1 # one   1 | 2   3:4   \frac12   √16   ½   １ + 1   ٣
"""  # noqa: RUF001


@pytest.mark.filterwarnings("error")
def test_calculator_says_what_is_wrong():
    lines = [line.replace(r"\n", "\n").split(" | ", 1) for line in REFUSED.strip().splitlines()]
    pairs = [(one, words) for words, some in lines for one in some.split("   ")]
    for expression, words in [*pairs, ("", "missing"), ("\x00", "character"), ("1 \ud800", "char")]:
        with pytest.raises(ToolError) as error:
            calculate(expression)
        assert words in str(error.value), expression
        assert len(str(error.value)) < 200  # it is read by a policy with a short context


def test_a_hostile_expression_is_answered_at_once():
    hostile = """9**9**9**9   (-2)**99999999   9.0**9**9   10**400/3   10**400 + 0.5   1e9999999999
    (10**400)**-(10**400)   exp(10**400)   exp(-10**400)   10**200   factorial(10**9)
    2**-(10**400)   comb(10**9, 5*10**8)   comb(2**4000, 1000)   comb(2**4000, 2**3999)
    1.5**10**9   round(10**1000, -5)   2**2000 * 2**2000 * 2**2000   1.0000001**10**300"""
    repeated = (
        "( [ ({[ - ~ not 1+ 2** 1< abs( lambda: x. 9 1_ a × 1e (1) sqrt( max(1, 1e200* 1e-200*"
    )
    hostile = [*re.split(r" {3,}|\n *", hostile), *(piece * 999 for piece in repeated.split())]
    hostile += ["(" * 101 + "1" + ")" * 101, "(" * 499, "9" * 499, "1e200*" * 80 + "1"]
    hostile += ["lcm(" + ", ".join(f"2**4000+{k}" for k in range(40)) + ")", " " * 10**6]
    long = "sin(10**400)+ 1/7* .1+ 2**.5+ comb(900,400)+ gcd(2**4095-1,3**2580-1)+ (1/3)**99+ -"
    legal = [piece * (498 // len(piece)) + "1" for piece in long.split()]

    def answered(expression):
        try:
            calculate(expression)
            assert expression in legal
        except ToolError as error:
            assert 0 < len(str(error)) < 200

    for expression in hostile + legal:  # a millisecond each, but 99 powers or sines 10 to 20
        assert seconds(answered, expression) < (0.1 if expression in legal else 0.02), expression


FORMS = ["{} + {}", "{} - {}", "{} * {}", "{} / {}", "({}) % ({})", "{} // {}", "-{}", "+{}"]
FORMS += ["({} + {})", "({} - {})", "({}) / ({})", "({})**2", "({})**3", "({})**-1", "abs({})"]
FORMS += ["min({}, {})", "max({}, {})", "round({}, 1)", "round({})", "floor({})", "ceil({})"]


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([str(rng.randint(0, 99)), f"{rng.randint(0, 999) / 100}", "10", "0", "2"])
    inner = [random_expression(rng, depth - 1) for _ in range(2)]
    return rng.choice(FORMS).format(*inner)


def test_calculator_equals_fractions_on_random_expressions():
    rng, values = random.Random(2), 0
    names = {"abs": abs, "min": min, "max": max, "F": Fraction, "floor": math.floor}
    names |= {"round": lambda value, digits=0: round(value, int(digits)), "ceil": math.ceil}
    for _ in range(1000):
        expression = random_expression(rng, rng.randint(1, 4))
        fractions = re.sub(r"(?<![\w.])[\d.]+", lambda number: f"F('{number[0]}')", expression)
        try:
            value = eval(fractions, names)
        except ZeroDivisionError:
            with pytest.raises(ToolError, match="division by zero"):
                calculate(expression)
            continue
        text, values = calculate(expression), values + 1
        error = abs(Fraction(text) - value)  # all digits, or ten
        assert error == 0 or (error <= abs(value) / 10**9 and len(text) > 9), expression
        assert "e" not in text or not 1e-9 <= abs(value) < 1e15
    assert values > 500


# --- search ---------------------------------------------------------------------------------------


def bm25(documents, query, k1=1.5, b=0.75):
    """The formula in the docstring of Search, one document and one term at a time."""
    bags = [(d.title + " " + d.text).lower().split() for d in documents]
    mean = sum(map(len, bags)) / len(bags)
    scores = []
    for bag in bags:
        score = 0.0
        for term in set(query.lower().split()):
            n, tf = sum(term in other for other in bags), bag.count(term)
            idf = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
            score += idf * tf / (tf + k1 * (1 - b + b * len(bag) / mean)) if tf else 0
        scores.append(score)
    return scores


def random_documents(rng, count: int, vocabulary: int, length: int) -> list[Document]:
    words = [f"w{i}" for i in range(vocabulary)]
    zipf = list(accumulate(1 / (i + 1) for i in range(vocabulary)))  # common words and rare ones
    texts = (rng.choices(words, cum_weights=zipf, k=rng.randint(2, length)) for _ in range(count))
    return [Document(f"w{i % 7}", " ".join(text)) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("part", "k1", "b"),  # the index is made in parts of so many terms
    [(2**18, 1.5, 0.75), (1, 0.0, 0.5), (100, 1.2, 0.0), (100, 2.0, 1.0)],
)
def test_search_is_bm25(monkeypatch, k1, b, part):
    monkeypatch.setattr(toolbox, "PART", part)
    rng = random.Random(5)
    documents = random_documents(rng, 60, 40, 30)
    documents[7:9] = [Document("", ""), Document("w7", "w39 " * 200)]
    search = Search(documents, k1=k1, b=b, top_k=7)
    for _ in range(20):
        query = " ".join(rng.choices([f"w{i}" for i in range(45)], k=rng.randint(1, 6)))
        scores = bm25(documents, query, k1, b)
        best = sorted((-round(score, 9), i) for i, score in enumerate(scores) if score > 0)[:7]
        assert search.rank(query) == [(pytest.approx(scores[i]), documents[i]) for _, i in best]


def test_only_what_matches_is_found():
    texts = {"Brenholt": "a town", "Mira": "a weaver", "Z": "a_42"}
    search = Search([Document(*item) for item in texts.items()])
    assert [d.title for _, d in search.rank("the WEAVER's mira?!")] == ["Mira"]
    assert [d.title for _, d in search.rank("42")] == ["Z"]
    assert [d.title for _, d in search.rank("a")] == [*texts]  # equal scores: as in the file
    assert search.rank("nowhere") == search.rank("") == search.rank("?!") == []
    assert search("nowhere  at all") == "nothing found for: nowhere  at all"
    assert Search([Document("", "?!"), Document("", "")]).rank("a") == []
    assert Search([Document("", "किताब")]).rank("कतब कि") == []  # vowel signs belong to a word
    book = [Document("", "w " * 2**16), Document("", "v")]  # a word 65,536 times
    assert [score for score, _ in Search(book).rank("w")] == pytest.approx(bm25(book, "w")[:1])


FOUND = """北京是中国的首都。 首都   東京は日本の首都である 首都   𠮷野家 𠮷野   한강은 강   Éa éA
서울은대한민국의수도이다 수도   กรุงเทพมหานครเป็นเมืองหลวง เมืองหลวง   ភ្នំពេញជារាជធានី រាជធានី
နေပြည်တော်သည်မြို့တော် မြို့တော်   2024年の東京 2024   ຫຼວງພະບາງ ພະບາງ   東京タワー タワー   ไทย ท
ｶﾀｶﾅ カタカナ   Straße strasse   ﬁnal FINAL   İstanbul istanbul   दिल्ली दिल्ली   日本 「日本」
iPhoneを iphone   مُحَمَّد محمد   שָׁלוֹם שלום   ދިވެހި ދިވެހި   Donau\u00addampf donaudampf"""


def test_words_are_found_in_every_script():
    for pair in re.split(r" {3}|\n", FOUND):
        for forms in (("NFC", "NFC"), ("NFC", "NFD"), ("NFD", "NFC")):
            text, query = map(unicodedata.normalize, forms, pair.split(" "))
            documents = [Document("", "other words ދ ވ ހ"), Document("", text)]
            found = [document for _, document in Search(documents).rank(query)]
            assert found == documents[1:], pair
    documents = [Document("", "京东"), Document("", "东京"), Document("", "东 京")]
    assert [document for _, document in Search(documents).rank("东京")] == documents[1:2]  # pairs


def test_result_lines():
    documents = [Document("Mira", "Mira is a weaver\nin  Brenholt."), Document("", "A weaver.")]
    mira = "Mira is a weaver in Brenholt."
    assert Search(documents)("weaver mira") == f"1. {mira}\n2. A weaver."
    for chars, line in {29: mira, 20: "Mira is a weaver ...", 19: "Mira is a ..."}.items():
        assert Search(documents, top_k=1, max_chars=chars)("weaver mira") == line
    assert Search([Document("Java", "JavaScript")], top_k=1)("java") == "Java: JavaScript"
    search = Search([Document("北京", "首都" * 50)], top_k=1, max_chars=60)
    assert search("首都") == "北京: " + "首都" * 26 + " ..."  # not cut at the only space


def test_a_query_is_fast_and_bounded():
    search = Search(random_documents(random.Random(7), 500, 100, 30))
    many = " ".join(f"w{i}" for i in range(150_000))
    for query in ("w1 " * 350_000, many, "w" * 10**6, "北" * 10**6):
        assert seconds(search, query) < 0.05
        assert len(search(query)) < 1000
    first = " ".join(f"w{i}" for i in range(32))
    assert search.rank(first + " w32 w33") == search.rank(first)  # 32 terms count
    assert seconds(lambda: [search(f"w{i} w{2 * i} w0 w1") for i in range(50)]) < 0.05  # 1 ms each


@pytest.mark.slow
def test_time_and_memory_of_100_000_documents(capsys):
    documents = random_documents(random.Random(9), 100_000, 30_000, 60)
    start = time.process_time()
    search = Search(documents)
    assert time.process_time() - start < 6 and "indexing: 100%" in capsys.readouterr().err
    assert seconds(search, " ".join(f"w{i}" for i in range(100))) < 0.05  # the most common terms
    tracemalloc.start()
    Search(documents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 * len(search.ids)  # bytes a posting


def test_the_tools_of_a_file(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"title": "Mira", "text": "weaver"}\n{"title": "B", "text": "a big town"}\n')
    tools = toolbox.default_tools(path, 2, 10)
    assert [tool.name for tool in tools.values()] == list(tools) == ["search", "calculator"]
    assert tools["search"].run("town mira") == "1. Mira: ...\n2. B: a ..."


def test_an_impossible_setting_is_an_error_that_names_it():
    for setting in "k1=-1 b=2 b=-0.1 top_k=0 max_chars=3".split():
        name, value = setting.split("=")
        with pytest.raises(ValueError, match=f"{setting}.*legal"):
            Search([Document("a", "b")], **{name: float(value)})
    with pytest.raises(ValueError, match=r"0 documents.*legal"):
        Search([])
