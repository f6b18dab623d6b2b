"""One judge for reward and evaluation: right for right answers, and for nothing else."""

# ruff: noqa: RUF001  (full-width and other look-alike characters are what is tested)
import json
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from common import ROOT
from hypothesis import given
from hypothesis import strategies as st

from engine import expressions, judge
from engine.judge import as_number, clean, exact_match, judge_answer, math_equal


def pairs(table, *score):
    """("63 cm", "63", *score) of "63 cm for 63;" and so on."""
    lines = map(str.strip, table.split(";"))
    return [pytest.param(*line.rsplit(" for ", 1), *score, id=line) for line in lines]


# ---- numbers: the same value, in either direction, or nothing -------------------------------

SAME_NUMBER = r"""
x=63 for 63; 90° for 90; 18 cm for 18; (5) for 5; −5 for -5; １２３ for 123; 1,234 for 1234;
1 234 567 for 1234567; 1,\!000 for 1000; 1{,}234.5 for 1,234.5; 3 \times 10^8 m/s for 3e8;
3·10^2 for 300; 1.5 million for 1,500,000; $1.5 million for 1,500,000 dollars; 5万元 for 50000;
\dfrac{3}{4} for 0.75; -\frac34 for -0.75; 1\frac{1}{2} for 3/2; 2½ for 2.5; \(63\) for 63;
**63** for 63; `63` for 63; \text{63 cm} for 63; answer = 63 for 63; 50% for 50; 50\% for 0.5;
\$20 for 20 dollars; 20€ for €20; ¥161.27 for 161.27元; 18 KG for 18 kilograms;
18 years old for 18 years; 25 \text{ cm}^2 for 25 square centimeters; 5m² for 5 m^2;
60 km/h for 60 kilometers per hour; 25℃ for 25 degrees Celsius; 90˚ for 90; 1984年 for 1984;
18 лет for 18; 5 km away for 5 km; 24 trailing zeros for 24;
8个顶点 for 8; 20% increase for 20%; 5 paths for 5; $20 dollars for $20;
3만 for 30000; ​63 for 63; 2 lakh for 200000; 50¢ for 50; 6" for 6 inches; 6' for 6 feet; '6' for 6;
1’234’567 for 1234567; 3 incorrect answers for 3; f(3) = 42 for 42; 4千米 for 4 km;
25 cm squared for 25 cm^2; 9.8 meters per second squared for 9.8 m/s^2; 7pm for 7 p.m.;
44 B.C. for 44 BC; 5 kJ for 5; 5 nanometers for 5 nm; 100 ml for 100 mL;
50 million US dollars for $50 million; *42* for 42; 37^\circ \text{C} for 37 °C; 5 \Omega for 5 Ω;
5\,\mu m for 5 μm; 60 km h^{-1} for 60 km/h; 5 N·m for 5 N m; 24 people for 24; 1/2 cup for 1/2;
5 red marbles for 5; 5백만 for 5000000; $5 each for $5; 5 Million for 5000000; 18 (eggs) for 18;
$18/day for $18 per day; 5\,{\rm cm} for 5; \frac{m}{n}=\frac34 for 3/4; |AB|=5 for 5
"""
OTHER_NUMBER = r"""
-5. for 5; (5) for -5; (1.5) for 15; 1,5 for 15; 12,34 for 1234; 1.5 million for 1.5; 63 64 for 63;
63 or 64 for 63; 63/64 for 63; 6 3 for 63; 63±1 for 63; about 63 for 63; ~63 for 63; 18 cm for 18 m;
5 cm^2 for 5 cm^3; $5 for €5; 25°C for 25°F; 5个 for 5人; 2x for 2; 2t for 2; 1.5M for 1.5;
1990s for 1990; 1st for 1; 10² for 102; 10⁵ for 105; x1 for 1; 50% for 5; 0.3333 for 1/3; 1/0 for 0;
9e999 for 9; 0 for none; 11 for Apollo 11; 3-1 for 1-3; 1030 for 10:30; 1987 for 2004-05-12;
510 for 5'10; 100200 for (100,200); 2 pi for 2; 2 halves for 2; 63 maybe for 63;
\frac{5}{3}6 for 5/36; \frac{1}{2}5 for 1/25; 2 xy for 2; 4 千米 for 4000; 5 GHz for 5 MHz;
7 a.m. for 7 p.m.; x \not= 12 for 12; 12 below zero for 12; 5백만 for 5; 3조 원 for 3;
5 quintillion for 5; 5 millones for 5; 500 млн for 500; 500 mln for 500; 5分之一 for 5; 5半 for 5;
5 point five for 5; 5 thirtieths for 5; 63 _8 for 63; \text{63}_8 for 63; 5 N for 5 N m;
5 Nm for 5 nm; 5 Mm for 5 mm; 2 x m for 2; \sqrt{x}=5 for 5; x \ne = 5 for 5; never = 5 for 5;
79 BC for 79; 5 GB for 5 Gb; 5 per thousand for 5; 1 maybe for 1; 5 squared for 5; 5 mille for 5;
x/2=3 for 3; e^x = 3 for 3; \binom{n}{2} = 45 for 45; x(x+1)=3 for 3; \sin x=1 for 1; |x|=3 for 3
"""
NUMBERS = pairs(SAME_NUMBER, 1) + pairs(OTHER_NUMBER, 0)


@pytest.mark.parametrize(("prediction", "answer", "score"), NUMBERS)
def test_numbers(prediction, answer, score):
    assert judge_answer(prediction, [answer]) == (2 / 3 if answer == "Apollo 11" else score)
    for one, other in [(prediction, answer), (answer, prediction)]:
        assert exact_match(one, other) == math_equal(one, other) == score


# ---- expressions: math-verify ---------------------------------------------------------------

EQUAL = r"""
(1,2) for (1, 2); 2,1 for 1,2; \{1,2\} for \{2,1\}; 10^5 for 100000; 2+3=5 for 5; 5! for 120;
√12 for 2\sqrt3; sqrt(12) for 2*sqrt(3); 2π for 2\pi; x²-1 for (x-1)(x+1); x**2 for x^2;
0.5x for \frac{x}{2}; 1.1^2 for 1.21; 3<x for x>3; x>=3 for [3,\infty); y=2x+1 for 2x+1;
\varnothing for ∅; A and C for C, A; \ln e for 1; cos π for -1; \log_2 8 for 3; 6÷3 for 2;
2x+y-4=0 for y=4-2x; x_1=2 for 2; 10\pi \text{ cm}^2 for 10\pi; 12\sqrt3 inches for 12\sqrt{3} in;
16_{8} for 16_8; c) for C; \textbf{(C)} for C; 0.1\overline{6} for \frac{1}{6};
x > 3/2 or x < -0.5 for (-\infty,-\frac12)\cup(\frac32,\infty); x<1 or 3<x for x<1 or x>3;
x \leq 3 \text{ or } x \geqslant 5 for (-\infty,3]\cup[5,\infty);
x <= 3 or x >= 5 for x \ge 5 \text{ or } x \le 3;
(-inf, 3] U [5, inf) for (-\infty,3]\cup[5,\infty); 1000\pi for 1,000\pi;
1200, 1500 for \$1,200, \$1,500; (0,1000) for (0, 1,000); y=2, x=3 for (3,2); x=2 and y=3 for (2,3);
2 or 3 for \{2,3\}; 1+i\sqrt{3} for 2e^{i\pi/3}; 3+4*i for 3+4i;
\frac{1+3i}{2} for \frac12+\frac32 i; i^2 for -1; 2i, -2i for z=2i \text{ or } z=-2i;
\{(1,2),(3,4)\} for (3,4),(1,2); infinity for \infty; +/- 2 for \pm 2;
sqrt((x+1)(x+2)) for \sqrt{(x+1)(x+2)}; \frac{\sin 60^\circ}{2} for \frac{\sqrt3}{4}; 2ba for 2ab;
CO_2 for CO2; C_6H_{12}O_6 for C6H12O6; bh/2 for \frac12 bh; 1+X^2 for x^2+1;
\pi(R-r)(R+r) for \pi(R^2-r^2); \text{CO}_2 for CO_2; σ² for \sigma^2; 2Γ for \Gamma\cdot 2;
2x for f'(x)=2x; \lbrace 1,2\rbrace for \{2,1\}; P(A\mid B) for P(A|B); p\rightarrow q for p\to q;
{n \choose k} for \binom{n}{k}; c>b>a for a<b<c; 1 \ge k > -1 for -1<k\leq 1;
\langle 2,1\rangle for (2,1); ]-\infty,3[ for (-\infty,3); .\overline{3} for 1/3; Na+ for Na^+;
1998/05/12 for 1998-05-12; 1, 2, and 3 for 3,2,1; d/2 for \frac{d}{2}; 2sqrt(5) for 2\sqrt{5};
f(2)=1/2 for f(2)=\frac12; 4πr² for 4\pi r^2; \sqrt{ab} cm for \sqrt{ab}; \mu m g for \mu mg;
\frac{1\pm\sqrt5}{2} for \frac{1+\sqrt5}{2}, \frac{1-\sqrt5}{2};
\frac{2\pm\sqrt{12}}{2} for 1\pm\sqrt3; \mathbb R for \mathbb{R}; {\bf C} for C;
\sin A=\frac35 for \frac35
"""
UNEQUAL = r"""
2+3 for 23; 64=63 for 63; 2x+1=5 for 5; x>3 for x≥3; 1.41421356 for \sqrt{2}; 3.14 for \pi;
2^{-70} for 2^{-71}; 10\pi over h for 10\pi; 6\cdot3 km for 18 cm; x-1 for x 1; y=63 for x=63;
(2,1) for (1,2); [1,2] for (1,2); \{1,2\} for (1,2); 1,2,3 for 1,2; x=1 for x=1 \text{ or } x=2;
0.\overline{3} for 0.3; \sin 30 for 1/2; (-\infty,3) for (-\infty,3];
x < 3 or y > 5 for x < 3 or x > 5; y < 3 or y > 5 for x < 3 or x > 5; U2 for 2U; C++ for C; B for A;
A, B for B; B. Paris for B; \frac{1}{2 for 0.5; 1/0 for \infty; 2.7.0 for 3.11.0; v1.1 for v1.10;
1.1.2004 for 1.10.2004; 2<x<3 for \{2,3\}; 2<x<3 for 2 or 3; 2 or 3 for (2,3);
0,1,2 for 1,000, 2,000; y=2, x=3 for (2,3); f' for f; 5" for 5 feet; 1000 for (1,000);
1-i\sqrt{3} for 2e^{i\pi/3}; |z+2i|=3 for |z-2i|=3; i for -i; \{(1,2),(4,3)\} for (1,2),(3,4);
10\pi + ft for 10\pi; CO_3 for CO2; \sin 22.5^\circ for \sin 22.5; -\infty for infinity;
\begin{pmatrix}1&2\\3&4\end{pmatrix} for \begin{pmatrix}1&2\\3&5\end{pmatrix}; 1 for \frac{R}{r};
2N for N+n; (r,r) for (R,r); X>x for x>X; \phi-\Phi for \Phi-\phi; \gamma for \Gamma; 10 for 10^T;
X^2 for X^TX; 0 for \frac{d^{2}y}{dx^{2}}; 0=2x for \frac{dy}{dx}=2x;
0 for \frac{\partial u}{\partial t}; 2,3 for 2, 2, 3; 1,-2,1 for 1,-2; 5 for 5, 5;
10\approx 9 for 10; \angle ACB for \angle ABC; (3,\infty] for (3,\infty); x =/= 5 for x = 5;
f(2)=5 for f(3)=5; x>2 and x<5 for x>2 or x<5; x=2 or y=3 for x=2, y=3
"""
EXPRESSIONS = pairs(EQUAL, 1) + pairs(UNEQUAL, 0)


@pytest.mark.parametrize(("prediction", "answer", "score"), EXPRESSIONS)
def test_expressions(prediction, answer, score):
    assert judge_answer(prediction, [answer]) == exact_match(prediction, answer) == score


# ---- words: F1 ------------------------------------------------------------------------------

WORDS = r"""
\boxed{\text{Monday}} for monday = 1; "Monday." for Monday = 1; the Old Mill for old mill = 1;
Mill for Old Mill = 2/3; York New for New York = 1; Jean Paul Sartre for Jean-Paul Sartre = 1;
US for U.S. = 1; don’t for don't = 1; The for The Who = 0; The for A = 0; an for a = 0;
Hepatitis B for Hepatitis A = 1/2; no for yes = 0; yes, it is for yes = 0; not true for true = 0;
World War 1 for World War 2 = 2/3; 12 for 12 Angry Men = 1/2; 5 May 1998 for May 5, 1998 = 1;
1939–1945 for 1939 - 1945 = 1; 10:31 for 10:30 = 0; the 1990s for 1990's = 1;
1,234 soldiers of Rome for 1234 soldiers of Rome = 1; C# for C++ = 0; AB- for AB+ = 0;
AC/DC for AC/DC = 1; Straße for STRASSE = 1; ﬁsh for Fish = 1; Café for Café = 1; Cafe for Café = 0;
मंबई for मुंबई = 0; 《红楼梦》 for 红楼梦 = 1; 北京市 for 北京 = 4/5; 海上 for 上海 = 1/2;
กรุงเทพ for กรุงเทพ = 1; 63 for sixty three = 0; May 5th, 1998 for May 5, 1998 = 1;
4th of July for July 4 = 1; Sept. 1971 for September 1971 = 1; 3:15pm for 3:15 P.M. = 1;
from 1939 to 1945 for 1939–1945 = 1; 1986-2013 for from 1986 until 2013 = 1; 1-2 for 2 to 1 = 0;
JK Rowling for J. K. Rowling = 1; Ernst and Young for Ernst & Young = 1;
3 and 7 points each for -3 and 7 points each = 4/5; May 05, 1998 for May 5, 1998 = 1;
the TNF-α for TNF-α = 1; β for β decay = 2/3
"""
UNORDERED = ("York New", "5 May 1998", "4th of July")


@pytest.mark.parametrize(("prediction", "answer"), pairs(WORDS))
def test_words(prediction, answer):
    answer, score = answer.rsplit(" = ", 1)
    assert judge_answer(prediction, [answer]) == pytest.approx(float(as_number(score)))
    assert exact_match(prediction, answer) == (score == "1" and prediction not in UNORDERED)


def test_the_best_of_several_answers_counts():
    assert judge_answer("12", ["a dozen", "12.0", "11"]) == 1
    assert judge_answer("the Mill", ["Old Mill", "mill"]) == 1
    assert judge_answer("Mill", ["5", "Old Mill"]) == pytest.approx(2 / 3)
    assert judge_answer("12", []) == 0
    assert judge_answer("Cafe\u0301", ["Caf\u00e9"]) == 1


@pytest.mark.parametrize("empty", ["", " ", ".", "\\text{}", "$$"])
def test_nothing_is_no_answer(empty):
    for answer in ("5", "A", "Old Mill", "", empty):
        assert judge_answer(empty, [answer]) == judge_answer(answer, [empty]) == 0


@given(a=st.text(), b=st.text())
def test_a_text_is_right_for_itself_and_every_text_is_judged(monkeypatch, a, b):
    monkeypatch.setattr(judge, "same_expression", lambda *pair: False)
    assert judge_answer(a, [a]) == (clean(a) != "")
    assert 0 <= judge_answer(a, [b]) <= 1


# ---- cost -----------------------------------------------------------------------------------


def test_answers_of_the_mini_world_never_reach_math_verify(monkeypatch):
    monkeypatch.setattr(expressions, "ask_worker", None)  # a call would raise
    lines = [*(ROOT / "data/train.jsonl").open(), *(ROOT / "data/test.jsonl").open()]
    answers = [json.loads(line)["answer"] for line in lines]
    for answer, other in zip(answers, random.Random(0).sample(answers, len(answers)), strict=True):
        assert judge_answer(answer, [answer]) == 1
        assert answer == other or judge_answer(other, [answer]) < 1
        judge_answer(f"{other} {answer}", [answer])


HOSTILE = [
    *("10^10^10", "10^{10^{10}}", "9^9^9^9", "9!!!!", "99999999!", "(2^{99999999999}, 3)"),
    *("(" * 75 + "1" + ")" * 75, "{" * 5_000, "\\frac{1}" * 900, "\\text{" * 2_000, "$" * 9_999),
    *("1" * 10_000, "1,1" * 5_000, "x" * 10_000, "**" * 5_000, "\\" * 9_999, " " * 9_999 + "1"),
    *("\0", "6\0003", "\ud800", "\udfff63", "a" + "\u0301\u0316" * 5_000, "\ufdfa" * 9_999),
    *("1e999999999", "9E99^{9E99}", "1/" * 2_000, "\\left(" * 500, "的" * 9_999, "the " * 3_000),
]
ENDLESS = ("\\gamma(99999999)", "(x+y+z+a+b+c)^{50}")  # they use up their time


@pytest.fixture
def nothing_kept(monkeypatch):
    monkeypatch.setattr(expressions, "ask_worker", expressions.ask_worker.__wrapped__)


@pytest.mark.slow
def test_hostile_answers_take_bounded_time_in_any_thread(nothing_kept):
    """And the answer that another thread waits for stays right."""
    right, asked = ("(x-1)(x+1)", "x^2-1"), [(endless, "\\sqrt{2}") for endless in ENDLESS]
    for hostile in HOSTILE:
        asked += [(hostile, answer) for answer in ("63", "\\sqrt{2}", "Old Mill", "北京")]
        asked.append(right)
    asked += asked[::-1]

    def timed(pair):
        start = time.perf_counter()
        return judge_answer(pair[0], [pair[1]]), time.perf_counter() - start

    worker = expressions.start_worker(os.getpid())
    with ThreadPoolExecutor(2) as threads:
        scores, times = zip(*threads.map(timed, asked), strict=True)
    assert [*scores] == [pair == right for pair in asked]
    assert max(times) < 20  # two times 0.8 seconds of CPU time, on a busy machine
    assert expressions.start_worker(os.getpid()) is worker and worker.poll() is None


@pytest.mark.slow
def test_a_worker_is_started_again_and_a_child_waits_for_no_thread():
    assert judge_answer("3<x", ["x>3"]) == 1
    ended = expressions.start_worker(os.getpid())
    ended.kill()
    assert judge_answer("3<x", ["x>3"]) == 1  # known: nobody is asked
    assert expressions.start_worker(os.getpid()) is ended
    assert judge_answer("7<x", ["x>7"]) == 1
    assert expressions.start_worker(os.getpid()) is not ended
    with expressions.LOCK:
        child = os.fork() or os._exit(expressions.LOCK.locked())
    assert os.waitpid(child, 0)[1] == 0


def test_without_math_verify_one_line_says_what_to_install(monkeypatch, nothing_kept):
    expressions.start_worker.cache_clear()
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    with pytest.raises(RuntimeError, match=r"pip install -r requirements\.txt"):
        judge_answer("3<x", ["x>3"])


@pytest.mark.slow
def test_where_there_is_no_fork_and_no_limit_of_memory(tmp_path, monkeypatch, nothing_kept):
    """As on Windows: the worker itself compares, and is ended when a pair takes too long."""
    (tmp_path / "resource.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delattr(os, "fork")
    monkeypatch.setattr(expressions, "MAX_WAIT", 2.0)
    expressions.start_worker.cache_clear()
    worker = expressions.start_worker(os.getpid())
    assert judge_answer("(x-1)(x+1)", ["x^2-1"]) == 1 and judge_answer("3<x", ["x>4"]) == 0
    assert judge_answer("\\frac{", ["\\sqrt{2}"]) == 0
    assert expressions.start_worker(os.getpid()) is worker
    start = time.perf_counter()
    assert judge_answer(ENDLESS[1], ["\\sqrt{2}"]) == 0 and time.perf_counter() - start < 20
    assert judge_answer("(x-1)(x+1)", ["x^2-1"]) == 1
    expressions.start_worker.cache_clear()
