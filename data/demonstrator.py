"""The mini-world's demonstrator: transcripts of its problems, with the real tools.

It hesitates after tool results, the way the paper observed real models to: it guesses instead of
calculating, misreads, stops early, looks again. That is what makes the entropy rise after a tool
result, and what ARPO has to unlearn.
"""

from dataclasses import astuple, dataclass
from random import Random

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


UNSURE = Hesitation(again=0.06, misread=0.48, stop=0.1, guess=0.8)
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
        done: int | None = 0  # steps made so far; None: answered
        while done is not None:
            options = self.options(problem, done, unsure)
            chances = {text: chance for text, (chance, _) in options.items()}
            if self.rng.random() < self.right_way:
                (text,) = self.options(problem, done, Hesitation())
            else:
                (text,) = self.rng.choices([*chances], chances.values())
            turns.append(Turn("policy", text, chances))
            done = options[text][1]
            if done is not None:
                turns.append(Turn("tool", self.call(problem.steps[done - 1]), {}))
        return turns

    def options(
        self, problem: Problem, done: int, unsure: Hesitation
    ) -> dict[str, tuple[float, int | None]]:
        """What may be written after `done` steps: text -> its chance, and the steps then made."""
        after = problem.steps[done] if done < len(problem.steps) else None
        if done == 0:
            return {act(plan(after), after): (1.0, 1)}
        last = problem.steps[done - 1]
        options: dict = {act("I look again.", last): (unsure.again, done)}

        def add(text: str, chance: float, then: int | None = None) -> None:
            options[text] = (options.get(text, (0.0, then))[0] + chance, then)

        for found, chance in self.readings(last, 0.0 if after else unsure.misread).items():
            thought, left = f"Found {found}. ", chance * (1 - unsure.again)
            stop = unsure.stop if after else 1.0
            guess = unsure.guess if after and after.tool == "calculator" else 0.0
            add(answer(f"{thought}That is the answer.", found), left * stop)
            add(answer(f"{thought}I guess {found}.", found), left * (1 - stop) * guess)
            if after:
                add(act(thought + plan(after), after), left * (1 - stop) * (1 - guess), done + 1)
        return {text: option for text, option in options.items() if option[0] > 0}

    def readings(self, step: Step, misread: float) -> dict[str, float]:
        """What may be read in the step's result: the right value, or another one that is there."""
        if step.tool == "calculator":
            return {step.found: 1.0}
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
