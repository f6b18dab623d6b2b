r"""One judge for reward and evaluation: is a prediction one of the right answers?

The right answer decides how it is compared, after LaTeX and Unicode are spelled in one way:

    number      "63", "-3/4", "1e3", "18 cm", "1.5 million", "x = 5"    the same exact value
    expression  "\sqrt{2}", "x > 3", "(1, 2)", "2x + 1": no words       math-verify decides
    words       "World War 2", "Old Mill", "北京"                        F1; yes and no exactly

A number counts with or without its unit, but not with another unit; "50%" is 50, and 0.5 as well.
"1,234" is 1234, "1,5" are two numbers, "3-4" and "10:30" are texts (a score, a time), "3.14" is not
pi. An expression counts as its value: 10^5 for 100000. Only words score between 0 and 1.
"""

import re
import unicodedata
from collections import Counter
from difflib import SequenceMatcher
from fractions import Fraction
from functools import lru_cache

from engine.expressions import FUNCTIONS, MAX_LENGTH, same_expression, two_cases


def judge_answer(prediction: str, answers: list[str]) -> float:
    """In [0, 1], the best over the answers: 1 for an exact match, F1 where the answer is words."""
    p, best = plain(prediction), 0.0
    for answer in answers:
        a = plain(answer)
        if p is None or a is None:
            score = judge_other(prediction, answer)
        else:  # most answers are found here, at once
            score = overlap(p, a) if isinstance(p, list) and isinstance(a, list) else float(p == a)
        best = max(best, score)
    return best


# At least four letters each: no article, no yes or no; and no name of a function.
PLAIN_WORDS = re.compile(
    rf"(?!.*\b(?:true|false|{FUNCTIONS})\b)[a-z]{{4,}}(?: [a-z]{{4,}})*", re.IGNORECASE
)


def plain(text: str) -> Fraction | list[str] | None:
    """The value of a plain number, the words of plain words, None of all else."""
    number = as_number(text)
    if number is None and PLAIN_WORDS.fullmatch(text):
        return text.lower().split()
    return number


def overlap(p: list[str], a: list[str]) -> float:
    """2 |shared words| / (|p| + |a|)."""
    return 2 * (Counter(p) & Counter(a)).total() / max(len(p) + len(a), 1)


def judge_other(prediction: str, answer: str) -> float:
    """What is neither a plain number nor plain words."""
    if exact_match(prediction, answer):
        return 1.0
    return f1_score(prediction, answer) if is_words(answer) else 0.0


def measures(prediction: str | None, answers: list[str]) -> dict:
    """What an evaluation reports, each the best over the answers; None: nothing was answered."""
    given = answers if prediction is not None else []
    return {
        "prediction": prediction,
        "em": float(any(exact_match(prediction, answer) for answer in given)),
        "f1": judge_answer(prediction, given) if given else 0.0,
        "math_equal": float(any(math_equal(prediction, answer) for answer in given)),
    }


def exact_match(prediction: str, answer: str) -> bool:
    """Mathematically equal, or the same words in the same order."""
    if math_equal(prediction, answer):
        return True
    return is_words(answer) and words(prediction) == words(answer) != []


def math_equal(prediction: str, answer: str) -> bool:
    """The same value, an equal expression, or the same text but for spaces and case."""
    numbers = as_number(prediction), as_number(answer)
    if None not in numbers:
        return numbers[0] == numbers[1]
    p, a = clean(prediction), clean(answer)
    if not p or not a:
        return False
    if "=" not in p or "=" not in a:  # "x = 63" for "63", but not for "y = 63"
        p, a = NAME.sub("", p), NAME.sub("", a)
    quantities = quantity(p), quantity(a)
    if None not in quantities:
        (x, unit), (y, other) = sorted(quantities, key=lambda pair: pair[1])
        if unit == "":
            return (x == y and other != "BC") or (other == "%" and x == y / 100)
        more = other.removeprefix(unit)  # "20 % increase" is 20 %, but 5 N m are not 5 N
        units = {*UNITS.values(), *SI.values()}.intersection(more.replace("/", " ").split())
        return x == y and other.startswith(unit) and more[:1] in ("", " ") and not units
    choices = CHOICE.fullmatch(p), CHOICE.fullmatch(a)
    if None not in choices:  # "(B)" for "B"
        return choices[0][1].lower() == choices[1][1].lower()
    if squeeze(p) == squeeze(a):
        return True
    heads = [found[0] for text in (p, a) if (found := NAME.match(text))]
    if len(heads) == 2 and "(" in heads[0] and squeeze(heads[0]) == squeeze(heads[1]):
        return math_equal(p[len(heads[0]) :], a[len(heads[1]) :])  # f(2) = 1/2
    if is_words(p) or is_words(a) or (any(quantities) and not all(map(DIGIT.search, (p, a)))):
        return False
    left, equals, right = p.rpartition("=")
    if equals and "=" not in left and not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", p)):
        return math_equal(left, right) and math_equal(right, a)  # "2 + 3 = 5" for 5
    (p, unit), (a, other) = split_unit(p), split_unit(a)
    return (unit == other or "" in (unit, other)) and same_expression(p, a)


def f1_score(prediction: str, answer: str) -> float:
    """2 |shared| / (|prediction| + |answer|) of words, or of characters in a script without spaces.

    Words count in any order (as in SQuAD), characters in the order of the answer.
    """
    p, a = words(prediction), words(answer)
    if p != a and any(text in (["yes"], ["no"], ["true"], ["false"]) for text in (p, a)):
        return 0.0
    if any(map(UNSPACED.match, a)):
        blocks = SequenceMatcher(None, p[:1000], a, autojunk=False).get_matching_blocks()
        shared = sum(block.size for block in blocks)
        return 2 * shared / max(len(p) + len(a), 1)
    return overlap(p, a)


# ---- one spelling -------------------------------------------------------------------------

MAX_TEXT = 4_000  # characters that are read: NFKC takes quadratic time (accents on accents)
SIGNS = str.maketrans(
    "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u2044\u2215\u2236\u2019\u3001\u3002",
    "-------//:',.",
)
STYLE = re.compile(r"\\(?:text[a-z]{0,6}|math(?:rm|bf|it|sf)|[mh]box|ce)\s*\{([^{}]*)\}")
SILENT = re.compile(r"\\(?:left|right|[Bb]igg?[lr]?|boxed|fbox|displaystyle)(?![a-z])|\\[()\[\]]")
WRAPPED = re.compile(r"(?s)\A(?:\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|\*\*?(.*?)\*?\*)\Z")
EDGES = " \t\r\n`\"'“”\u2018\u2019«»「」『』《》"
NO_NAME = rf"\b(?:not|never|false|minus)\b|\\(?:frac|neq?)\b|(?<![a-z])(?:{FUNCTIONS})(?![a-z])"
NO_NAME += r"|\\(?:binom|lfloor|lceil)"
NO_NAME += r"|\A(\w)\([^()=]*(?<![A-Za-z])\1(?![A-Za-z])"  # nor the product x(x + 1)
NAME = re.compile(
    rf"\A(?![^=]*(?:{NO_NAME}))\\?[A-Za-z][\w\\{{}} ]*'*(?:\([^()=]*\) *)?=\s*(?=[^=]+\Z)"
)
SAME = {"lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "mid": "|", "vert": "|"}
SAME |= {"rightarrow": r"\to", "lt": "<", "gt": ">", "varnothing": r"\emptyset", "degree": "°"}
SAME |= dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac") | dict.fromkeys(("quad", "qquad"), " ")
SAME |= {f"{one}e{end}": rf"\{one}e " for one in "lg" for end in ("", "q", "qslant")}
# What has a value: digits, and "\cos \pi", "ln e"
DIGIT = re.compile(rf"\d|\\[a-z]|π|(?<![A-Za-z])(?:{FUNCTIONS})(?![A-Za-z])")
DOTS = re.compile(r"(?<=\d)\s?(?:[A-Za-z]\.)+[A-Za-z]\b\.?")
CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*[).:]?")


@lru_cache(maxsize=256)  # a group of rollouts has one question
def clean(text: str) -> str:
    """NFKC, one minus sign, and without the LaTeX that only says how something looks."""
    text = text[:MAX_TEXT]
    if not text.isascii():
        text = re.sub("[º˚]", "°", re.sub(r"(?<=\d)(?=[¼-¾⅐-⅞])", " ", text))  # 2½ is not 21/2
        text = re.sub("[\u00ad\u200b\u200e\u200f\u2060\ufeff]", "", text)  # they are not seen
        text = re.sub("[⁰ⁱ⁴-⁹⁺⁻ⁿ¹²³]+", r"^{\g<0>}", text)  # 10² is not 102
        text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\b(\d{4})/(\d\d)/(\d\d)\b", r"\1-\2-\3", text)  # a date
    if re.search(r"[\\$^_~{]", text):
        text = re.sub(r"(?<=\d)(?:,?\\[,;:! ]|\{,\})(?=\d{3}(?!\d))", ",", text)  # 1\,000
        if len(re.findall(r"(?<!\\)\$", text)) > 1:  # around mathematics: no currency
            text = re.sub(r"(?<!\\)\$", "", text)
        text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "°", text)
        text = re.sub(r"(?<!\\)\\[,;:!> ]|(?<=\S)~", " ", text)
        text = re.sub(r"\{\\(rm|bf|it|sf) +([^{}]*)\}", r"\\math\1{\2}", text)  # {\rm cm}
        text = re.sub(r"\\(math[a-z]+) +(\w)", r"\\\1{\2}", text)  # \mathbb R
        text = SILENT.sub("", STYLE.sub(r" \1 ", STYLE.sub(r" \1 ", text)))
        text = re.sub(r"\\([a-z]+)", lambda found: SAME.get(found[1], found[0]), text)
        text = re.sub(r"\s*([_^])\s*", r"\1", re.sub(r"\\([%$#&_])", r"\1", text))
    text = DOTS.sub(lambda found: found[0].replace(".", ""), text)  # 5 p.m., 44 B.C.
    for _ in range(2):
        quoted = text.strip()[:1] in EDGES  # else a last ' is a prime: y', 5"
        edges = EDGES if quoted else EDGES.translate({ord(sign): None for sign in "'\""})
        text = WRAPPED.sub(r"\1\2", text.strip(edges).rstrip(edges + ".,;:\\")).strip()
    return text


def squeeze(text: str) -> str:
    """Without spaces, but for those between words or numbers; X is x, but not beside x."""
    text = re.sub(r"([A-Z][a-z]?)_(?:(\d+)|\{(\d+)\})", r"\1\2\3", text)  # CO_2 is CO2
    text = re.sub(r"\^\{?(\d?[+-])\}?\Z", r"\1", text)  # Na^+ is Na+
    text = re.sub(r"(?<=[A-Z]\d|[a-z]\d) (?=[A-Z][a-z]?\d?\Z)", "", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", " ".join(text.split()))
    text = re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", text)
    lower = re.sub(r"(\\[A-Za-z]+)|[^\\]+", lambda part: part[1] or part[0].casefold(), text)
    return text if two_cases(text) else lower


# ---- numbers ------------------------------------------------------------------------------

DECIMAL = r"(?:\d{1,3}(?:[, ']\d{3})+|\d*)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?"
NUMBER = re.compile(rf"[-+]?(?:{DECIMAL}|\d+/\d+)")
FRACTION = re.compile(r"\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
QUANTITY = re.compile(
    r"\s*(?P<open>\()?\s*(?P<sign>[-+]?)\s*(?:(?P<currency>(?:US)?[$€£¥₹₩]|Rs|USD|EUR)\.?)?\s*"
    rf"(?P<minus>-?)(?:(?:(?P<whole>\d+) +)?(?P<part>\d+ */ *\d+)|(?P<decimal>{DECIMAL}))"
    r"(?: *(?:[x*×·]|\\times|\\cdot) *10\^\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"(?:\s*(?P<close>\)))?(?P<unit>.*)",
    re.DOTALL,
)
SCALES = {"dozen": 12} | {
    word: 10 ** int(line.split()[0])
    for line in """
        6 million 百万 백만; 7 crore 千万 천만; 2 hundred 百 백; 3 thousand 千 천; 4 万 萬 만;
        5 lakh; 8 亿 億 억; 9 billion; 12 trillion 兆 조; 15 quadrillion; 18 quintillion
    """.split(";")
    for word in line.split()[1:]
}
SCALE = re.compile(rf"\s*({'|'.join(SCALES)})s?(?![a-z]|(?<=千)[米克])", re.IGNORECASE)
MEASURED = re.compile(r"(.*?[^\s+*/=<>-])(\s+([A-Za-z]{2,})[\w^{}/.-]*(?:\s+[A-Za-z][\w^{}/.-]*)*)")
UNIT = re.compile(r"(/?)((?:[^\W\d_]|[°%$¢€£¥₹₩'\x22-])+)\.?(?:\^?\{?(-?[1-4])\}?)?")
UNITS = {
    name: names.split()[0]
    for names in """
        mm; cm centimeter centimetre 厘米; m meter metre 米; km 公里 千米; in inch inches "; mg;
        ft foot feet '; yd yard; mi mile; g gram 克; kg kgs kilo 公斤 千克; t tonne; lb pound;
        oz ounce; mL ml; L l liter litre; ms; s second sec 秒; min minute 分钟; h hour hr 小时;
        Hz hertz; km/h kph kmh; mi/h mph; N newton; Nm; J joule; W watt; kW; V volt;
        A ampere amp; Ω ohm; K kelvin; C coulomb; T tesla; Pa pascal; eV electronvolt; mol mole;
        °C °celsius; °F °fahrenheit; ° degree deg 度; % percent pct;
        $ us$ dollar usd; cent ¢; € euro eur; £ gbp; ¥ yuan yen rmb cny jpy 元 円; ₹ rupee rs inr;
        ₩ won krw; AD CE ad ce; BC BCE bc bce; am; pm; unit;
        yr year; wk week; mo month; pt point; qt quart; rad
    """.split(";")
    for name in names.split()
}
SI = {  # kJ and kilojoules, mm and millimetres
    (short if name == names.split()[0] else long) + name: short + names.split()[0]
    for short, long in zip(
        "kMGTmμnp", "kilo mega giga tera milli micro nano pico".split(), strict=True
    )
    for names in """
        m meter metre; g gram; s second; L liter litre; Hz hertz; Pa pascal; J joule; W watt; Wh;
        V volt; A ampere amp; N newton; Ω ohm; eV electronvolt; B byte; b bit; cal calorie; mol mole
    """.split(";")
    for name in names.split()
}
DECADE = re.compile(r"\d{3}0'?s")  # the 1990s
NO_UNIT = re.compile(  # words that change the number before them
    rf"(?!sec)(?:{FUNCTIONS})s?|squared|cubed|factorials?|roots?|(?:tau|alpha|beta|theta)s?|at|infinity"
    r"|and|or|to|not?|nor|minus|plus|over|out|of|by|than|times|perhaps|guess|less|versus|halves|modulo"
    r"|(?:half|third|quarter|ten|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie)th"
    r"|(?:hundred|thousand|\w+illion)th|\w+illi?on|\w+illiard)(?:en?|e?s)?|mille|mil"
)
AFTER = "old|tall|high|long|wide|deep|thick|away|apart|later|ago|each|left|more|(?:in )?total"
# Last words that take the number back or make it another: "5 wrong answers" are 5, "5 wrong" not.
NO_END = re.compile(
    r"maybe|perhaps|(?:im)?possibl[ey]|probabl[ey]|(?:un)?likely|un(?:known|sure|certain|defined)|wrong"
    r"|false|incorrect|approx(?:imately)?|roughly|nearly|almost|below|negative|none|nil|par"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|(?:twen|thir|for|fif|six|seven|eigh|nine)ty"
    r"|ml[nr]d?|mi?o|mrd|tr?n|tys|bn|myriad|juta|triệu|[十百千万萬亿億兆십백천만억조]+.?|分之.*|半.*|以.*"
    r"|\u0441|мл(?:н|рд)|милл(?:ион|иард)(?:\u0430|ов)?|тыс(?:яч[\u0430и]?)?|трил\w*|трлн|половин\w*|сот(?:ен|н[яи])"
    r"|десят\w*|مليون|مليار|ألف|लाख|करोड़"
)


def as_number(text: str) -> Fraction | None:
    """The exact value of a plain number: "-5", "1,200", ".5", "1e3", "3/4"; None for the rest."""
    try:
        text = text.strip()
        plain = len(text) <= MAX_LENGTH and NUMBER.fullmatch(text)
        return Fraction(re.sub("[, ']", "", text)) if plain else None
    except (ValueError, ZeroDivisionError):  # "", "e5", "1/0"
        return None


def quantity(text: str) -> tuple[Fraction, str] | None:
    """(18, "cm") of "18 centimeters", a `clean` text; None where it is not one number."""
    found = len(text) <= MAX_LENGTH and QUANTITY.fullmatch(FRACTION.sub(r" \1\2/\3\4 ", text))
    if not found or bool(found["open"]) != bool(found["close"]) or DECADE.fullmatch(text):
        return None
    if found["open"] and "," in (found["decimal"] or ""):  # the point (100,200)
        return None
    try:
        value = Fraction(re.sub("[, ']", "", found["part"] or found["decimal"]))
    except (ValueError, ZeroDivisionError):
        return None
    value = (value + int(found["whole"] or 0)) * Fraction(10) ** int(found["power"] or 0)
    rest, currency = found["unit"], UNITS.get((found["currency"] or "").lower(), "")
    if scale := SCALE.match(rest):
        value, rest = value * SCALES[scale[1].lower()], rest[scale.end() :]
    unit = unit_of(rest, currency)
    sign = -1 if found["sign"] + found["minus"] == "-" else 1
    return None if unit is None else (sign * value, unit)


def unit_of(text: str, unit: str) -> str | None:
    """What of " square centimeters tall" is "cm2"; None of what is no unit."""
    text = re.sub(r"\\mu ", "μ", text.replace(r"\Omega", "Ω"))
    text = re.sub(r"(?<=[A-Za-z]) ?(?:·|\\cdot) ?(?=[A-Za-z])", " ", text)  # N·m
    text = re.sub(r"\s*(?:°|\b(?:degree|deg)s?\b)\s*", " °", text)
    text = re.sub(r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", text))
    text = re.sub(r"(\w) squared\b", r"\1^2", re.sub(r"(\w) cubed\b", r"\1^3", text))
    text = re.sub(r"\bU\.?S\.? (?=dollars?\b)", "", text.replace("per cent", "percent"))
    text = re.sub(rf" (?:{AFTER})\Z", "", text)
    text = re.sub(r"\A \((\w+)\)\Z", r" \1", text)  # 9 (apples)
    beside = text[:1].isspace() or (unit and text[:1] == "/")  # $18/day
    word = ""
    for token in re.sub(r"\s*(?:/|\bper\b)\s*", " /", text).split():
        found = UNIT.fullmatch(token)
        if not found or (found[1] and found[2] in SCALES):  # per thousand
            return None
        per, word, power = found.groups(default="")
        lower = word.lower() if len(word) > 1 else word  # "M" is no meter
        name, one = UNITS.get(word), lower.rstrip("s")
        if name is None and (len(word) > 2 or (beside and not power)):  # "2nm" is a product
            name = SI.get(word if len(word) < 4 else one)  # Nm is not nm
        name = name or UNITS.get(lower) or UNITS.get(one)
        letter = not beside and re.fullmatch("[A-Za-z]", word) and word not in "mghsLWV"  # 2t
        if name is None or letter:  # any word in lower case after a space, or in another script
            product = word.isascii() and not (beside and len(word) > 2)  # 2xy, 2 x m
            if product or word != lower or power or NO_UNIT.fullmatch(word) or GREEK.search(word):
                return None
            name = one
        if power.startswith("-"):  # h^{-1} is /h
            per, power = "/", power.lstrip("-1")
        if name != unit:  # $20 dollars
            unit = f"{unit}{per or ' '}{name}{power}".strip()
        beside = True
    return None if word not in UNITS and NO_END.fullmatch(word) else unit


def split_unit(text: str) -> tuple[str, str]:
    r"""An expression and its unit: "10\pi cm^2" is ("10\pi", "cm2"), "5 m" ("\frac{5}{1}", "m")."""
    if number := quantity(text):
        value, unit = number
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}", unit
    found = len(text) <= MAX_LENGTH and MEASURED.fullmatch(text)
    short = found and len(found[3]) < 4  # \\mu mg is a product
    valued = found and (not short or re.search(r"\d|\^|\\[a-z]+\{|\\pi|π", found[1]))
    likely = valued and MATHS.search(found[1]) and (not short or found[3] in UNITS)
    unit = unit_of(found[2], "") if likely else None
    return (text, "") if unit is None else (found[1], unit)


# ---- words --------------------------------------------------------------------------------

SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
UNSPACED = re.compile(f"[{SPACELESS}]")  # Thai, Lao, Burmese, Khmer, Japanese, Chinese
TOKEN = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")
GREEK = re.compile("[\u0370-\u03ff]")
PUNCTUATION = re.compile(r"((?<=\d)['.:/-](?=\d)|(?<=\w)-(?!\w)|(?<![^\s(=])-(?=\d|\w\b))|[^\w\s]")
RANGE = re.compile(r"\d+(?:,\d{3})*\s*-\s*\d+(?:,\d{3})*")
MONTHS = "january february march april may june july august september october november december"
MONTHS = {name[:3]: name for name in MONTHS.split()}
DATE = re.compile(  # "5th of May", "May 5th", "Sept. 1971"
    r"\b(?:0?(\d\d?)(?:st|nd|rd|th)?(?: of)? )?"
    rf"((?:{'|'.join(MONTHS)})[a-z]*)\.?(?:,? 0?(\d+)(?:st|nd|rd|th)?)?(?![a-z])"
)
ARTICLE = re.compile(r"\b(?:(?:an|the)(?=\s+\S)|a(?=\s+\w\w))(?=\s)")
NO_WORD = re.compile(
    r"\\(?:begin|end)\s*\{[a-z]*\}|\\[A-Za-z]+"
    rf"|(?<![A-Za-z])(?:{FUNCTIONS}|and|or|oo|[Ii]nf(?:inity)?)(?![A-Za-z])"
)
MATHS = re.compile(
    r"\\[A-Za-z]|[\^=<>+*|√π∞≤≥≠×÷±\u222a∩∈]|[a-z]/\d"
    r"|\d(?!st|nd|rd|th|[ap]m)[a-z]{1,3}(?![a-z])|\A-?[\d.]+ [a-z]{2}\Z"
)


def is_words(text: str) -> bool:
    """No number and no expression: "Apollo 11", "yes", "U.S.", but not "18 cm", "2x" or "3-4"."""
    if as_number(text) is not None or quantity(clean(text)) is not None:
        return False
    text, _ = split_unit(clean(text))
    if DECADE.fullmatch(text) or RANGE.fullmatch(text):
        return True
    text = re.sub(r"(?<![\u0370-\u03ff])[\u0370-\u03ff](?![\u0370-\u03ff])", r" \g<0> ", text)
    runs = re.findall(r"[^\W\d_]+", NO_WORD.sub(" ", text.replace(".", "")))
    if any(len(run) > 3 or not (run.isascii() or GREEK.fullmatch(run)) for run in runs):
        return True
    return any(len(run) > 1 for run in runs) and not MATHS.search(text)


def words(text: str) -> list[str]:
    """Folded case, no punctuation, no article before a word; "2004-05-12" and "C++" stay whole."""

    def keep(found: re.Match) -> str:
        sign = found[0]
        kept = sign not in "^`~|" and unicodedata.category(sign)[0] in "MS"  # accents, symbols
        return sign if found[1] or kept or sign == "#" else "" if sign in ".'&" else " "

    def date(found: re.Match) -> str:
        day, month, other = found.groups()
        name = MONTHS[month[:3]]
        known = name.startswith(month) and (day or other)
        return " ".join(filter(None, (day, name, other))) if known else found[0]

    text = unicodedata.normalize("NFKC", clean(text).casefold())
    text = re.sub(r"(?<![\d,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda n: n[0].replace(",", ""), text)
    text = re.sub(r"(?<=\d)(?:\s*-\s*|\s+(?:to|until)\s+)(?=\d)", "-", text)
    text = re.sub(r"\bfrom (?=\d+-\d)", "", text)
    text = DATE.sub(date, re.sub(r"(?<=\d)(?=[ap]m\b)", " ", text))
    text = re.sub(r"(?<![\w'])([a-z])(?:\. ?| )(?=[a-z]\b)", r"\1", text)  # J. R. R. is JRR
    text = text.replace(" & ", " and ")
    return TOKEN.findall(ARTICLE.sub(" ", PUNCTUATION.sub(keep, text)))
