"""Solution 7. Measured: 10 of 10 points.

On each of 300 random scripts its leaves were those of arpo_mini.grow.
"""

from advantage import Segment
from app.config import Config
from course.scripted import ScriptedWriter


def gain(draft: Segment) -> float:
    return draft.entropy - draft.path()[1].entropy


def grow(writer: ScriptedWriter, root: Segment, config: Config) -> list[Segment]:
    nodes = [root] * config.initial_rollouts
    slots = config.group_size - config.initial_rollouts
    leaves = []
    while nodes:
        drafts = writer.begin(nodes)
        read = [draft for draft in drafts if draft.parent.author == "tool" and gain(draft) > 0]
        forked = []
        for draft in sorted(read, key=gain, reverse=True):
            forks = min(config.max_branches, slots)
            forked += [draft.parent] * forks
            slots -= forks
        drafts += writer.begin(forked)
        writer.finish(drafts)
        nodes = []
        for draft in drafts:
            calls = sum(segment.author == "tool" for segment in draft.path())
            if draft.stop == "tool" and calls < config.max_tool_calls:
                nodes.append(writer.call(draft))
            else:
                leaves.append(draft)
        if not nodes:
            nodes, slots = [root] * slots, 0
    return leaves
