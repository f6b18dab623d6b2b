"""Write the mini-world: documents, train and test questions, byte for byte the same for one seed.

    python data/make_world.py [--seed 0] [--folder data]

A fictional country of people, towns, workshops and goods, so that nothing can be answered from
memory. Every document states several facts; a question needs the right one, or a chain of them:

    math         one or two calls of the calculator
    knowledge    one search
    deep_search  two to five calls: searches that lead to one another, then usually the calculator

`Maker.draw` gives as many questions as one wants, each with the steps that solve it; the cold start
(lab/coldstart.py) writes its demonstrations from those steps. The questions of test.jsonl are drawn
first, and what they ask (a fact, a chain, an expression) is never drawn again for training.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

DOMAINS = ("math", "knowledge", "deep_search")
TEST_PER_DOMAIN = 120
TRAIN_PER_DOMAIN = 1200

SHE = (
    "Mira Orla Tilda Senna Ivka Runa Della Maren Petra Jonna Lise Asta Edda Nora Vesna Hilde"
).split()
HE = (
    "Anselm Corin Davo Emric Falk Goran Hugo Jarek Kasper Lorin Milo Odo Piet Rolf Stellan Tobin"
).split()
FAMILY = (
    "Voss Rook Arden Brandt Calder Drossel Ebner Fenwick Garrow Hollin Isak Jessup "
    "Kolb Lindqvist Marlow Nyberg Ostrow Pell Quill Ravn Sorrel Thorne Ulver Wexley"
).split()
TOWNS = (
    "Tarnholm Ostmere Brackwater Dunvale Eskford Fernwick Greyhaven Hallin Ironbeck Juniper "
    "Kelsow Larkstead Mossgate Northam Oakrise Pinmoor Quarrel Redmarsh Silverden Thistleby "
    "Umberton Valeport Westerlow Yarrow Ashcombe Birchley Cobblefield Driftwick"
).split()
RIVERS = "Wend Alder Brisk Cind Dorn Erle Fallow Gann Hest Lune".split()
TRADES = (
    "glassblower weaver potter smith carpenter tanner baker bookbinder clockmaker dyer "
    "engraver cooper"
).split()
WORKSHOPS = (
    "Kestrel Heron Badger Marten Falcon Otter Raven Lynx Hare Swallow Beaver Stag Owl Viper "
    "Bison Crane Ermine Finch Goshawk Hound Ibis Jackdaw Kite Lark Magpie Newt Osprey Plover "
    "Robin Salmon Tern Wolf"
).split()
LOOKS = "amber oak copper velvet silver marble woollen painted".split()
WARES = "lamp chair kettle cloak clock bowl".split()


@dataclass(frozen=True)
class Step:
    """One tool call of the solution: why, what is called, and the value to read in its result."""

    need: str
    tool: str
    argument: str
    found: str
    # of data/decisive_world.py: what may be read there by mistake, and the steps that then follow
    rival: str = ""
    otherwise: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Problem:
    """A question, its answer, the steps that solve it; `key` is what it asks, however phrased."""

    text: str
    answer: str
    domain: str
    kind: str
    steps: tuple[Step, ...]
    key: tuple

    def row(self) -> dict:
        return {"question": self.text, "answer": self.answer, "domain": self.domain}


@dataclass(frozen=True)
class Entity:
    kind: str
    name: str
    facts: dict[str, str]
    text: str


# How a fact is asked for (phrasings), and how the solver names it ("I need the LABEL of X.").
ASK = {
    ("person", "trade"): (
        "What is the trade of {x}?",
        "Which trade does {x} have?",
        "What does {x} work as?",
    ),
    ("person", "birth year"): (
        "In which year was {x} born?",
        "When was {x} born?",
        "What is the birth year of {x}?",
    ),
    ("person", "home"): (
        "In which town does {x} live?",
        "Where does {x} live?",
        "What is the home of {x}?",
    ),
    ("person", "workshop"): (
        "At which workshop is {x} employed?",
        "Where does {x} work?",
        "What is the workshop of {x}?",
    ),
    ("person", "apprentices"): (
        "How many apprentices does {x} have?",
        "What is the number of apprentices of {x}?",
    ),
    ("town", "river"): (
        "On which river does {x} lie?",
        "What is the river of {x}?",
        "Which river flows through {x}?",
    ),
    ("town", "founding year"): ("In which year was {x} founded?", "When was {x} founded?"),
    ("town", "inhabitants"): (
        "How many inhabitants does {x} have?",
        "How many people live in {x}?",
    ),
    ("town", "mayor"): ("Who is the mayor of {x}?", "Which person governs {x}?"),
    ("workshop", "town"): (
        "In which town does {x} stand?",
        "Where does {x} stand?",
        "What is the town of {x}?",
    ),
    ("workshop", "opening year"): ("In which year did {x} open?", "When did {x} open?"),
    ("workshop", "owner"): ("Who is the owner of {x}?", "To whom does {x} belong?"),
    ("workshop", "workers"): (
        "How many workers does {x} employ?",
        "What is the number of workers of {x}?",
    ),
    ("good", "maker"): (
        "Which workshop makes {x}?",
        "Who is the maker of {x}?",
        "Where does {x} come from?",
    ),
    ("good", "price"): ("How many coins does {x} cost?", "What is the price of {x}?"),
    ("good", "weight"): ("How many grams does {x} weigh?", "What is the weight of {x}?"),
}
LEADS_TO = {
    ("person", "home"): "town",
    ("person", "workshop"): "workshop",
    ("town", "mayor"): "person",
    ("workshop", "town"): "town",
    ("workshop", "owner"): "person",
    ("good", "maker"): "workshop",
}
# Two ways of telling the facts of an entity.
TELL = {
    "person": (
        "{x} is a {trade} born in {birth year}. {pronoun} lives in {home}, works at {workshop} "
        "and has {apprentices} apprentices.",
        "{x} works at {workshop} and lives in {home}. {pronoun} was born in {birth year}, is a "
        "{trade} and has {apprentices} apprentices.",
    ),
    "town": (
        "{x} is a town on the river {river}. It was founded in {founding year}, has {inhabitants} "
        "inhabitants and its mayor is {mayor}.",
        "{x} was founded in {founding year} and its mayor is {mayor}. It lies on the river {river} "
        "and has {inhabitants} inhabitants.",
    ),
    "workshop": (
        "{x} stands in {town} and opened in {opening year}. It employs {workers} workers and its "
        "owner is {owner}.",
        "{x} belongs to its owner {owner}. It opened in {opening year}, employs {workers} workers "
        "and stands in {town}.",
    ),
    "good": (
        "{x} is made by {maker}. It costs {price} coins and weighs {weight} grams.",
        "{x} weighs {weight} grams and costs {price} coins. Its maker is {maker}.",
    ),
}
# What can be compared or added: (kind, fact): phrasing of the difference and of the sum, or None.
COMPARE = {
    ("person", "birth year"): ("How many years after {y} was {x} born?", None),
    ("person", "apprentices"): (
        "How many more apprentices does {x} have than {y}?",
        "How many apprentices do {x} and {y} have together?",
    ),
    ("town", "founding year"): ("How many years after {y} was {x} founded?", None),
    ("town", "inhabitants"): (
        "How many more inhabitants does {x} have than {y}?",
        "How many inhabitants do {x} and {y} have together?",
    ),
    ("workshop", "workers"): (
        "How many more workers does {x} employ than {y}?",
        "How many workers do {x} and {y} employ together?",
    ),
    ("workshop", "opening year"): ("How many years after {y} did {x} open?", None),
    ("good", "price"): (
        "How many more coins does {x} cost than {y}?",
        "How many coins do {x} and {y} cost together?",
    ),
    ("good", "weight"): (
        "How many more grams does {x} weigh than {y}?",
        "How many grams do {x} and {y} weigh together?",
    ),
}


def build_world(rng: Random) -> dict[str, Entity]:
    """All entities by name; facts are drawn first, then each document is written from them."""
    names = {
        "person": [
            f"{first} {last}" for first, last in zip(SHE + HE, FAMILY + FAMILY[:8], strict=True)
        ]
        + [
            f"{first} {last}"
            for first, last in zip(HE + SHE, FAMILY[5:] + FAMILY[:13], strict=True)
        ],
        "town": TOWNS,
        "workshop": [f"{animal} Workshop" for animal in WORKSHOPS],
        "good": [f"the {look} {ware}" for look in LOOKS for ware in WARES],
    }
    prices = rng.sample(range(12, 98), len(names["good"]))
    entities = {}
    for kind, members in names.items():
        for i, name in enumerate(members):
            facts = draw_facts(kind, names, rng)
            if kind == "good":
                facts["price"] = str(prices[i])
            entities[name] = Entity(kind, name, facts, describe(kind, name, facts, rng))
    return entities


def draw_facts(kind: str, names: dict[str, list[str]], rng: Random) -> dict[str, str]:
    if kind == "person":
        return {
            "trade": rng.choice(TRADES),
            "birth year": str(rng.randint(1850, 1899)),
            "home": rng.choice(names["town"]),
            "workshop": rng.choice(names["workshop"]),
            "apprentices": str(rng.randint(2, 29)),
        }
    if kind == "town":
        return {
            "river": rng.choice(RIVERS),
            "founding year": str(rng.randint(1100, 1499)),
            "inhabitants": str(rng.randint(120, 989)),
            "mayor": rng.choice(names["person"]),
        }
    if kind == "workshop":
        return {
            "town": rng.choice(names["town"]),
            "opening year": str(rng.randint(1900, 1959)),
            "owner": rng.choice(names["person"]),
            "workers": str(rng.randint(11, 99)),
        }
    return {
        "maker": rng.choice(names["workshop"]),
        "price": "",
        "weight": str(rng.randint(110, 990)),
    }


def describe(kind: str, name: str, facts: dict[str, str], rng: Random) -> str:
    """The document of one entity."""
    pronoun = "She" if name.split()[0] in SHE else "He"
    return rng.choice(TELL[kind]).format(x=capital(name), pronoun=pronoun, **facts)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


class Maker:
    """Draws problems about one world. `taken` holds the keys that may not be drawn (the test's)."""

    def __init__(self, world: dict[str, Entity], rng: Random, taken: set[tuple] | None = None):
        self.rng, self.world, self.taken = rng, world, taken or set()
        self.by_kind: dict[str, list[Entity]] = {}
        for entity in world.values():
            self.by_kind.setdefault(entity.kind, []).append(entity)

    def draw(self, domain: str) -> Problem:
        kinds: dict[str, tuple[Callable[[], Problem], ...]] = {
            "math": (self.one_call, self.two_calls, self.two_calls),
            "knowledge": (self.fact,),
            "deep_search": (
                self.chain,
                self.compare,
                self.cost,
                self.cost,
                self.anniversary,
                self.far_compare,
            ),
        }
        while True:
            problem = self.rng.choice(kinds[domain])()
            if problem.key not in self.taken:
                return problem

    def draw_distinct(self, domain: str, count: int) -> list[Problem]:
        """`count` problems of one domain, no two with the same text."""
        found: dict[str, Problem] = {}
        while len(found) < count:
            problem = self.draw(domain)
            found.setdefault(problem.text, problem)
        return list(found.values())

    # one search ------------------------------------------------------------------------------

    def fact(self) -> Problem:
        kind, label = self.rng.choice(list(ASK))
        entity = self.rng.choice(self.by_kind[kind])
        text = self.rng.choice(ASK[kind, label]).format(x=entity.name)
        step = look_up(entity, label)
        return Problem(text, step.found, "knowledge", "fact", (step,), ("fact", entity.name, label))

    # several searches ------------------------------------------------------------------------

    def chain(self) -> Problem:
        """The fact of a fact: two searches, or three."""
        kind, phrase, steps, key = self.walk(self.rng.choice((1, 1, 2)))
        label = self.rng.choice([label for k, label in ASK if k == kind])
        last = look_up(self.world[steps[-1].found], label)
        text = self.rng.choice(ASK[kind, label]).format(x=phrase)
        return Problem(text, last.found, "deep_search", "chain", (*steps, last), (*key, label))

    def walk(self, hops: int, start: Entity | None = None) -> tuple[str, str, list[Step], tuple]:
        """Follow `hops` links: the kind reached, its noun phrase, the steps, and the key."""
        kind = start.kind if start else self.rng.choice(sorted({kind for kind, _ in LEADS_TO}))
        entity = start or self.rng.choice(self.by_kind[kind])
        phrase, steps, key = entity.name, [], ("chain", entity.name)
        for _ in range(hops):
            label = self.rng.choice([label for k, label in LEADS_TO if k == entity.kind])
            steps.append(look_up(entity, label))
            phrase, key = f"the {label} of {phrase}", (*key, label)
            entity = self.world[steps[-1].found]
        return entity.kind, phrase, steps, key

    # searches, then the calculator -----------------------------------------------------------

    def compare(self) -> Problem:
        """Two searches and one sum or difference."""
        (kind, label), phrasings = self.rng.choice(list(COMPARE.items()))
        x, y = self.rng.sample(self.by_kind[kind], 2)
        return self.combine(label, phrasings, (x.name, [], x), (y.name, [], y), "compare")

    def far_compare(self) -> Problem:
        """The same, but what is compared must be found first: four searches, or three."""
        kind, label = self.rng.choice([("workshop", "workers"), ("workshop", "opening year")])
        a, b = self.rng.sample(self.by_kind["person"], 2)
        first, second = (look_up(p, "workshop") for p in (a, b))
        if first.found == second.found:
            return self.far_compare()
        x = (f"the workshop of {a.name}", [first], self.world[first.found])
        y = (f"the workshop of {b.name}", [second], self.world[second.found])
        if self.rng.random() < 0.5:
            y = (second.found, [], self.world[second.found])
        return self.combine(label, COMPARE[kind, label], x, y, "far compare")

    def combine(self, label: str, phrasings: tuple, x: tuple, y: tuple, kind: str) -> Problem:
        """Sum or difference of a fact of two entities, each (noun phrase, steps to it, entity)."""
        difference, total = phrasings
        add = total is not None and self.rng.random() < 0.5
        if not add and int(x[2].facts[label]) < int(y[2].facts[label]):
            x, y = y, x
        (a, steps_a, one), (b, steps_b, two) = x, y
        steps = [*steps_a, look_up(one, label), *steps_b, look_up(two, label)]
        m, n = int(one.facts[label]), int(two.facts[label])
        sign = "+" if add else "-"
        steps.append(compute(f"{m}{sign}{n}", m + n if add else m - n))
        text = (total if add else difference).format(x=a, y=b)
        return Problem(
            text, steps[-1].found, "deep_search", kind, tuple(steps), (kind, sign, label, a, b)
        )

    def cost(self) -> Problem:
        """One or two prices and the calculator."""
        goods = self.rng.sample(self.by_kind["good"], self.rng.choice((1, 1, 2)))
        counts = [self.rng.randint(2, 9) for _ in goods]
        wanted = " and ".join(f"{n} times {g.name}" for n, g in zip(counts, goods, strict=True))
        text = self.rng.choice(
            ("How many coins do I pay for {x}?", "What is the cost of {x}?")
        ).format(x=wanted)
        prices = [int(g.facts["price"]) for g in goods]
        sums = "+".join(f"{n}*{price}" for n, price in zip(counts, prices, strict=True))
        total = sum(n * price for n, price in zip(counts, prices, strict=True))
        steps = (*(look_up(g, "price") for g in goods), compute(sums, total))
        return Problem(text, steps[-1].found, "deep_search", "cost", steps, ("cost", wanted))

    def anniversary(self) -> Problem:
        """How old a place was at a birth: two searches and a difference."""
        person = self.rng.choice(self.by_kind["person"])
        label, fact = self.rng.choice((("home", "founding year"), ("workshop", "opening year")))
        there, born = self.world[person.facts[label]], person.facts["birth year"]
        both = Step(
            f"the {label} and birth year of {person.name}",
            "search",
            person.name,
            f"{there.name} and {born}",
        )
        early, late = sorted((int(there.facts[fact]), int(born)))
        steps = [both, look_up(there, fact), compute(f"{late}-{early}", late - early)]
        x = person.name
        text = f"How many years after {x} was born did the workshop of {x} open?"
        if label == "home":
            text = f"How many years after the home of {x} was founded was {x} born?"
        key = ("anniversary", label, person.name)
        return Problem(text, steps[-1].found, "deep_search", "anniversary", tuple(steps), key)

    # the calculator alone --------------------------------------------------------------------

    def one_call(self) -> Problem:
        a, b, c = self.rng.randint(12, 99), self.rng.randint(3, 49), self.rng.randint(2, 99)
        forms = (
            (f"What is {a} times {b} plus {c}?", f"{a}*{b}+{c}", a * b + c),
            (f"What is {a} times {b} minus {c}?", f"{a}*{b}-{c}", a * b - c),
            (f"What remains when {a * b} is divided by {c}?", f"{a * b}%{c}", a * b % c),
            (
                f"What is the greatest common divisor of {a * 6} and {b * 6}?",
                f"gcd({a * 6},{b * 6})",
                math.gcd(a, b) * 6,
            ),
        )
        text, expression, value = self.rng.choice(forms)
        step = compute(expression, value)
        return Problem(text, step.found, "math", "one call", (step,), ("math", expression))

    def two_calls(self) -> Problem:
        a, b, c = self.rng.randint(12, 99), self.rng.randint(3, 49), self.rng.randint(3, 29)
        forms = (
            (
                f"Multiply {a} by {b}. What remains when you divide the product by {c}?",
                compute(f"{a}*{b}", a * b),
                compute(f"{a * b}%{c}", a * b % c),
            ),
            (
                f"Add {a} and {b}, then multiply the sum by {c}. What do you get?",
                compute(f"{a}+{b}", a + b),
                compute(f"{a + b}*{c}", (a + b) * c),
            ),
            (
                f"A square has an area of {a * a}. How long is its border?",
                compute(f"sqrt({a * a})", a),
                compute(f"4*{a}", 4 * a),
            ),
            (
                f"Each of {b} boxes holds {a} nails and {c} nails are lost. How many are left?",
                compute(f"{a}*{b}", a * b),
                compute(f"{a * b}-{c}", a * b - c),
            ),
        )
        text, one, two = self.rng.choice(forms)
        return Problem(
            text, two.found, "math", "two calls", (one, two), ("math", one.argument, two.argument)
        )


def look_up(entity: Entity, label: str) -> Step:
    query = entity.name.removeprefix("the ")
    return Step(f"the {label} of {entity.name}", "search", query, entity.facts[label])


def compute(expression: str, value: int) -> Step:
    """A calculator step; its value is worked out without tools.py (the tests compare them)."""
    return Step(f"compute {expression}", "calculator", expression, str(value))


def make(
    seed: int = 0, build: Callable = build_world, maker: type = Maker, domains: tuple = DOMAINS
) -> tuple[dict[str, Entity], list[Problem], list[Problem]]:
    """The world, its train problems and its test problems."""
    world = build(Random(seed))
    test_maker = maker(world, Random(seed + 1))
    test = [p for domain in domains for p in test_maker.draw_distinct(domain, TEST_PER_DOMAIN)]
    train_maker = maker(world, Random(seed + 2), taken={p.key for p in test})
    train = [p for domain in domains for p in train_maker.draw_distinct(domain, TRAIN_PER_DOMAIN)]
    Random(seed + 3).shuffle(train)
    return world, train, test


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main(make: Callable = make, folder: Path = Path(__file__).parent, text: str = __doc__) -> None:
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=folder)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    world, train, test = make(args.seed)
    documents = [{"title": capital(e.name), "text": e.text} for e in world.values()]
    write_jsonl(args.folder / "documents.jsonl", documents)
    write_jsonl(args.folder / "train.jsonl", [p.row() for p in train])
    write_jsonl(args.folder / "test.jsonl", [p.row() for p in test])
    counts = f"{len(documents)} documents, {len(train)} train and {len(test)} test questions"
    print(f"{counts} in {args.folder}")


if __name__ == "__main__":
    main()
