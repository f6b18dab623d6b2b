"""A policy without a network: what each path writes, and how uncertain it is, stands in a script.

    script = {"0": ("call", 0.1), "0.0": ("call", 0.6), "0.1": ("answer", 0.2)}

"0" is the first path that begins at the question. It calls a tool; its entropy H is 0.1. "0.0" is
the first path that goes on from the result, "0.1" the second: a fork. What is not in the script
answers, with H = 0.
"""

import math
from collections import Counter
from collections.abc import Collection
from types import SimpleNamespace

from advantage import Segment
from course.checking import Wrong
from tools import Tool

CALL, ANSWER = "<search>more</search>", "<answer>done</answer>"
TOOLS = {"search": Tool("search", lambda query: "found", "what to look for")}
DEEPEST, MOST = 100, 10_000  # results on one path; drafts in all


class ScriptedWriter:
    """The writer of the project (`begin`, `finish`) with a script for a policy, and one tool."""

    def __init__(self, script: dict[str, tuple[str, float]]):
        self.script = script
        self.names: dict[Segment, str] = {}  # of every draft that was begun
        self.unfinished: set[Segment] = set()
        self.started: Counter = Counter()  # node -> how many paths have begun there
        # What the project's own `grow` asks of a writer beside begin and finish; a token here is a
        # character.
        self.longest = math.inf
        self.policy = SimpleNamespace(
            decode=lambda token_ids: "".join(map(chr, token_ids)),
            encode_result=lambda result, most: [ord(c) for c in result.text],
        )

    def begin(self, nodes: list[Segment], k: int = 1) -> list[Segment]:
        """A new draft after each node: its first token, its `entropy`. A node twice: a fork."""
        drafts = []
        for node in nodes:
            if node.author == "policy":
                raise Wrong("`begin` after a policy segment: a path starts at a prompt or a result")
            if len(node.path()) > 2 * DEEPEST:
                raise Wrong(f"a path has made {DEEPEST} calls: see config.max_tool_calls")
            if len(self.names) == MOST:
                raise Wrong(f"{MOST} drafts were begun: does the loop end, are slots used up?")
            name = str(self.started[node])
            if node.parent:
                name = f"{self.names[node.parent]}.{name}"
            self.started[node] += 1
            H = self.script.get(name, ("answer", 0.0))[1]
            drafts.append(Segment("policy", [ord("<")], parent=node, entropy=H))
            self.names[drafts[-1]] = name
        self.unfinished.update(drafts)
        return drafts

    def finish(self, drafts: list[Segment], places: Collection[Segment] = ()) -> None:
        """Each draft to its end: `stop` becomes "tool" after a call, else "answer"."""
        for draft in drafts:
            if draft not in self.unfinished:
                raise Wrong(
                    f"`finish` of {self.names.get(draft)}, which is not an unfinished draft"
                )
            self.unfinished.remove(draft)
            calls = self.script.get(self.names[draft], ("answer", 0.0))[0] == "call"
            draft.token_ids = [ord(c) for c in (CALL if calls else ANSWER)]
            draft.stop = "tool" if calls else "answer"

    def call(self, draft: Segment) -> Segment:
        """Run the call at the end of a draft: the tool result, from which the path goes on."""
        if draft.stop != "tool":
            raise Wrong(f"`call` for {self.names.get(draft)}, whose stop is {draft.stop}")
        return Segment("tool", [ord(c) for c in "found"], parent=draft, tool="search")
