"""The mini-world's demonstrator: transcripts of its problems, with the real tools.

It hesitates after tool results, the way the paper observed real models to: it guesses instead of
calculating, misreads, stops early, looks again. That is what makes the entropy rise after a tool
result, and what ARPO has to unlearn.
"""

from dataclasses import astuple, dataclass
from random import Random

from data import decisive_world, make_world
from data.formats import Demonstration
from data.make_world import DOMAINS, Maker, Problem, Step, make
from tools import ToolCall, result_text, run_calls


@dataclass(frozen=True)
class Hesitation:
    """What the demonstrator does right after a tool result, as probabilities."""

    again: float = 0.0  # makes the same call once more
    misread: float = 0.0  # reads another value where the right one would be the answer
    stop: float = 0.0  # takes what it just found for the answer
    guess: float = 0.0  # guesses what it just found where the next step is the calculator
    rivals_only: bool = False  # only where the result holds two candidates


UNSURE = Hesitation(again=0.06, misread=0.48, stop=0.1, guess=0.8)
# The worlds, and how their demonstrator hesitates.
WORLDS = {
    "country": (make_world, UNSURE),
    "decisive": (decisive_world, Hesitation(again=0.05, misread=0.4, stop=0.55, rivals_only=True)),
}
# The share of turns in which it goes the right way whatever the chances. They are what is learnt
# (see `Turn`), so this only decides how often the long ways are seen to their end.
RIGHT_WAY = 0.75


@dataclass(frozen=True)
class Turn:
    """A stretch of a transcript; for the policy's, all that it might have been: text -> chance."""

    author: str
    text: str
    chances: dict[str, float]


class Demonstrator:
    """Writes the transcript of one problem, calling the real tools."""

    def __init__(self, world: dict, tools: dict, rng: Random, right_way: float = RIGHT_WAY):
        self.tools, self.rng, self.right_way = tools, rng, right_way
        self.by_title = {e.name.removeprefix("the "): e for e in world.values()}
        self.results: dict[tuple[str, str], str] = {}  # one call has one result

    def solve(self, problem: Problem, unsure: Hesitation) -> list[Turn]:
        turns: list[Turn] = []
        last: Step | None = None
        rest: tuple[Step, ...] | None = problem.steps  # still to make; None: answered
        while rest is not None:
            options = self.options(last, rest, unsure)
            chances = {text: chance for text, (chance, *_) in options.items()}
            if self.rng.random() < self.right_way:
                (text,) = self.options(last, rest, Hesitation())
            else:
                (text,) = self.rng.choices([*chances], chances.values())
            turns.append(Turn("policy", text, chances))
            _, last, rest = options[text]
            if rest is not None:
                turns.append(Turn("tool", self.call(last), {}))
        return turns

    def options(
        self, last: Step | None, rest: tuple[Step, ...], unsure: Hesitation
    ) -> dict[str, tuple[float, Step | None, tuple[Step, ...] | None]]:
        """What may be written after the step `last`: text -> chance, its step, what is left."""
        if last is None:
            return {act(plan(rest[0]), rest[0]): (1.0, rest[0], rest[1:])}
        if unsure.rivals_only and not last.rival:
            unsure = Hesitation()
        options: dict = {act("I look again.", last): (unsure.again, last, rest)}

        def add(text: str, chance: float, step: Step | None = None, then=None) -> None:
            options[text] = (options.get(text, (0.0,))[0] + chance, step, then)

        misread = unsure.misread if last.rival or not rest else 0.0
        for found, chance in self.readings(last, misread).items():
            then = rest if found == last.found or not last.rival else last.otherwise
            after = then[0] if then else None
            thought, left = f"Found {found}. ", chance * (1 - unsure.again)
            stop = unsure.stop if after else 1.0
            guess = unsure.guess if after and after.tool == "calculator" else 0.0
            add(answer(f"{thought}That is the answer.", found), left * stop)
            add(answer(f"{thought}I guess {found}.", found), left * (1 - stop) * guess)
            if after:
                chance = left * (1 - stop) * (1 - guess)
                add(act(thought + plan(after), after), chance, after, then[1:])
        return {text: option for text, option in options.items() if option[0] > 0}

    def readings(self, step: Step, misread: float) -> dict[str, float]:
        """What may be read in the step's result: the right value, or another one that is there."""
        if step.tool == "calculator":
            return {step.found: 1.0}
        if step.rival:
            return {step.found: 1 - misread, step.rival: misread}
        facts = self.by_title[step.argument].facts.values()
        others = {v for v in facts if v != step.found}
        wrong = {v for v in others if v.isdigit() == step.found.isdigit()} or others
        return {step.found: 1 - misread} | {v: misread / len(wrong) for v in sorted(wrong)}

    def call(self, step: Step) -> str:
        """The tool's result, as the policy reads it."""
        key = (step.tool, step.argument)
        if key not in self.results:
            (result,) = run_calls([ToolCall(*key)], self.tools, time_limit=5.0)
            if not result.ok:
                raise ValueError(f"the call {step.tool}({step.argument}) failed: {result.text}")
            self.results[key] = result_text(result)
        return self.results[key]


def plan(step: Step) -> str:
    return "I compute." if step.tool == "calculator" else f"I need {step.need}."


def act(thought: str, step: Step) -> str:
    return f"<think>{thought}</think><{step.tool}>{step.argument}</{step.tool}>"


def answer(thought: str, value: str) -> str:
    return f"<think>{thought}</think><answer>\\boxed{{{value}}}</answer>"


def demonstrations_of_the_world(
    count: int, tools: dict, seed: int, hesitation: float
) -> list[Demonstration]:
    """Solutions of problems that no test question asks; right ones without `hesitation`.

    With 1 the demonstrator hesitates as `UNSURE` says, between that by a share of its chances.
    """
    world, _, test = make()
    maker = Maker(world, Random(seed), taken={problem.key for problem in test})
    demonstrator = Demonstrator(world, tools, Random(seed), right_way=0.0)
    unsure = Hesitation(*(hesitation * chance for chance in astuple(UNSURE)))
    demonstrations = []
    for i in range(count):
        problem = maker.draw(DOMAINS[i % len(DOMAINS)])
        turns = demonstrator.solve(problem, unsure)
        demonstrations.append(Demonstration(problem.text, [(t.author, t.text) for t in turns]))
    return demonstrations
