"""Exercise 7: grow a tree                                                   20 minutes

This is ARPO's rollout for one question, without a network: a script says what each path writes
(course/scripted.py; read its first lines). You write `grow`, level by level:

    1  N paths begin at the question; M - N slots are left for others.
    2  Every path writes its first tokens (`writer.begin`), and its entropy is known.
    3  A path that has just read a tool result forks there if its gain is above 0 and slots are
       left: at most Z more paths begin at that result. The largest gain comes first.
       gain: its entropy minus that of the first policy segment of the same trajectory.
    4  All paths, forks included, write to their end (`writer.finish`). One that stops at a tool
       call and may still call goes on from the result (`writer.call`); any other is a leaf.
    5  When no path is left, all slots that are left begin at the question, at once.

No draft is thrown away: what was measured belongs to the path that wrote it. The project's own
`grow` does the same for many questions side by side.

    config.group_size        M        config.max_branches      Z
    config.initial_rollouts  N        config.max_tool_calls    the calls a trajectory may make

    python -m course.exercises.ex7_grow          prints the leaves of a small script
    python -m course.grade 7
"""

from advantage import Segment
from app.config import Config
from course.scripted import ScriptedWriter


def grow(writer: ScriptedWriter, root: Segment, config: Config) -> list[Segment]:
    """The M leaves of the question `root`, which is a prompt; in any order."""
    raise NotImplementedError


if __name__ == "__main__":
    writer = ScriptedWriter({"0": ("call", 0.1), "0.0": ("call", 0.6), "0.1": ("answer", 0.2)})
    for leaf in grow(writer, Segment("prompt", [0]), Config(group_size=4, max_branches=1)):
        print(writer.names[leaf])  # 0.0.0, 0.1, 1 and 2
