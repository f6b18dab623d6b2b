"""Write a second mini-world, in which only some tool results are decisive.

    python -m data.decisive_world [--seed 0] [--folder data/decisive]

The people, towns and workshops of make_world.py with other facts, in another structure:

    chain        town -> its mayor or baker -> that person's workshop -> its town -> ..
    decisive     a workshop's document is written in amber and in silver: two towns, two numbers of
                 workers. The question says which ink counts. So every third search is decisive.
    distractor   for one person in four the search finds a namesake first. The document says so and
                 names the one that is meant: one more search, and no choice.

A question is a chain of two to five calls, the last one perhaps of the calculator. Its domain is
where it starts: the first decisive result is the third of a town, the second of a person (a
namesake makes it one later), the first of a workshop. Some chains end before they meet one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from data import make_world
from data.make_world import ASK, Entity, Problem, Step, capital, compute, look_up

DOMAINS = ("town", "person", "workshop")
INKS = ("amber", "silver")
LINKS = {"town": ("mayor", "baker"), "person": ("workshop",), "workshop": ("town",)}
ENDS = {
    "town": ("inhabitants", "founding year", "mayor"),
    "person": ("apprentices", "birth year", "trade"),
    "workshop": ("workers", "workers", "town"),
}
COUNTED = ("inhabitants", "apprentices", "workers")  # what may be multiplied
SEARCHES = (2, 3, 3, 3, 4, 4, 5, 5)  # how many there are in a chain, namesakes left out
MOST_CALLS = 5
TELL = {
    "town": (
        "{x} was founded in {founding year} and has {inhabitants} inhabitants. "
        "Its mayor is {mayor} and its baker is {baker}.",
        "{x} has {inhabitants} inhabitants. Its baker is {baker} and its mayor is {mayor}. "
        "It was founded in {founding year}.",
    ),
    "person": (
        "{x} is a {trade} born in {birth year}, works at {workshop} and has {apprentices} "
        "apprentices.",
        "{x} works at {workshop} and has {apprentices} apprentices. The {trade} was born in "
        "{birth year}.",
    ),
    "workshop": (
        "{x}. In amber: its town is {amber town} and it employs {amber workers} workers. "
        "In silver: its town is {silver town} and it employs {silver workers} workers.",
        "{x}. In silver: it employs {silver workers} workers and its town is {silver town}. "
        "In amber: it employs {amber workers} workers and its town is {amber town}.",
    ),
}
NAMESAKE = "{x} works at {workshop} and has {apprentices} apprentices. Another one is the {trade}."


def build_world(rng: Random) -> dict[str, Entity]:
    """All entities by name: those of the other world, with facts of this one, and the namesakes."""
    people = [e.name for e in make_world.build_world(Random(0)).values() if e.kind == "person"]
    shops = [f"{animal} Workshop" for animal in make_world.WORKSHOPS]
    names = {"town": make_world.TOWNS, "person": people, "workshop": shops}
    entities = {}
    for kind, members in names.items():
        for i, name in enumerate(members):
            facts, text = draw_facts(kind, names, rng), rng.choice(TELL[kind])
            entities[name] = Entity(kind, name, facts, text.format(x=name, **facts))
            if kind == "person" and i % 4 == 0:
                meant = f"{facts['trade']} {name}"
                text = text.format(x=capital(meant), **facts)
                entities[meant] = Entity("person", meant, facts, text)
                other = draw_facts(kind, names, rng) | {"trade": facts["trade"], "meant": meant}
                entities[name] = Entity("namesake", name, other, NAMESAKE.format(x=name, **other))
    return entities


def draw_facts(kind: str, names: dict[str, list[str]], rng: Random) -> dict[str, str]:
    if kind == "town":
        return {
            **{link: rng.choice(names["person"]) for link in LINKS["town"]},
            "inhabitants": str(rng.randint(120, 989)),
            "founding year": str(rng.randint(1100, 1499)),
        }
    if kind == "person":
        return {
            "workshop": rng.choice(names["workshop"]),
            "apprentices": str(rng.randint(2, 29)),
            "birth year": str(rng.randint(1850, 1899)),
            "trade": rng.choice(make_world.TRADES),
        }
    towns, workers = rng.sample(names["town"], 2), rng.sample(range(11, 100), 2)
    return {
        **{f"{ink} town": town for ink, town in zip(INKS, towns, strict=True)},
        **{f"{ink} workers": str(n) for ink, n in zip(INKS, workers, strict=True)},
    }


class Maker(make_world.Maker):
    """Draws chains. What a key says is where one starts and where it leads, in either ink."""

    def draw(self, domain: str) -> Problem:
        while True:
            problem = self.chain(domain)
            ways = list(readings(problem.steps))
            calls, wrong = max(map(len, ways)), {steps[-1].found for steps in ways[1:]}
            # a wrong reading is a wrong answer
            refused = problem.key in self.taken or problem.answer in wrong
            if not refused and calls <= MOST_CALLS:
                return problem

    def chain(self, kind: str) -> Problem:
        starts = [e for e in self.by_kind[kind] if e.name.split()[0] not in make_world.TRADES]
        starts += self.by_kind["namesake"] if kind == "person" else []
        start, ink = self.rng.choice(starts), self.rng.choice(INKS)
        phrase, labels = start.name, []
        for _ in range(self.rng.choice(SEARCHES) - 1):
            labels.append(self.rng.choice(LINKS[kind]))
            phrase = f"the {labels[-1]} of {phrase}"
            kind = make_world.LEADS_TO.get((kind, labels[-1]), "person")  # a baker is a person
        labels.append(self.rng.choice(ENDS[kind]))
        times = self.rng.randint(2, 9)
        if labels[-1] in COUNTED and self.rng.random() < 0.4:
            text, last = f"what is {times} times the {labels[-1]} of {phrase}?", f"{times}*"
        else:
            text, last = self.rng.choice(ASK[kind, labels[-1]]).format(x=phrase), ""
            text = text[0].lower() + text[1:]
        steps = self.solve(start, labels, ink, last)
        *_, answer = next(readings(steps))
        key = (start.name, *labels)
        domain = "person" if start.kind == "namesake" else start.kind
        return Problem(f"In {ink}, {text}", answer.found, domain, "chain", steps, key)

    def solve(self, entity: Entity, labels: list[str], ink: str, last: str) -> tuple[Step, ...]:
        """The calls from here on; a decisive one also holds those after the wrong reading."""
        if entity.kind == "namesake":
            meant = self.world[entity.facts["meant"]]
            steps = self.solve(meant, labels, ink, last)
            need = f"the {labels[0]} of {entity.name}"
            return (Step(need, "search", entity.name, meant.facts["trade"]), *steps)

        def then(value: str) -> tuple[Step, ...]:
            if labels[1:]:
                return self.solve(self.world[value], labels[1:], ink, last)
            return (compute(f"{last}{value}", int(last[:-1]) * int(value)),) if last else ()

        if entity.kind != "workshop":
            step = look_up(entity, labels[0])
            return (step, *then(step.found))
        found, rival = (entity.facts[f"{i} {labels[0]}"] for i in sorted(INKS, key=ink.__ne__))
        need = f"the {labels[0]} of {entity.name}"
        step = Step(need, "search", entity.name, found, rival, then(rival))
        return (step, *then(found))


def readings(steps: tuple[Step, ...]) -> Iterator[tuple[Step, ...]]:
    """The right way first, then every way with one wrong reading or more."""
    yield steps
    for i, step in enumerate(steps):
        if step.rival:
            for rest in readings(step.otherwise):
                yield (*steps[:i], Step(step.need, step.tool, step.argument, step.rival), *rest)


def make(seed: int = 0) -> tuple[dict[str, Entity], list[Problem], list[Problem]]:
    return make_world.make(seed, build_world, Maker, DOMAINS)


if __name__ == "__main__":
    make_world.main(make, Path(__file__).parent / "decisive", __doc__)
