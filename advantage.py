"""The tree of segments, the reward of a trajectory (leaf), the advantages of a token.

    question -- policy -- result -+- policy -- result -- policy      leaf 0, reward r_0
                                  +- policy                          leaf 1, reward r_1

The leaves of one question are compared with each other (GRPO). A segment that several leaves
share gets one advantage from each of them (ARPO, arXiv 2507.19849, section 3.2). Pure functions.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# ---- the tree -----------------------------------------------------------------------------


@dataclass(eq=False)  # compared by identity: one segment occurs in many paths
class Segment:
    """Consecutive tokens with one author. A trajectory is `leaf.path()`."""

    author: str  # prompt, policy or tool
    token_ids: list[int]
    parent: "Segment | None" = field(default=None, repr=False)
    stop: str | None = None  # policy: why it stopped, tool | answer | eos | length
    entropy: float | None = None  # policy: of its first k tokens, as the branch rule saw it
    logp: list[float] = field(default_factory=list)  # policy: of each token when it was sampled
    token_entropy: list[float] = field(default_factory=list)  # policy: H at each, in nats
    tool: str | None = None  # tool: its name; None: the call failed
    decision: Any = None  # tool: the branch decision (entropy.Decision) taken here

    def path(self) -> list["Segment"]:
        """From the root to this segment."""
        segments, segment = [], self
        while segment is not None:
            segments.append(segment)
            segment = segment.parent
        return segments[::-1]

    def path_tokens(self) -> list[int]:
        """The token ids of its path, this segment's included."""
        return [token for segment in self.path() for token in segment.token_ids]

    def depth(self) -> int:
        """The number of tokens of its path."""
        return sum(len(segment.token_ids) for segment in self.path())


def shared_by(leaves: list[Segment]) -> dict[Segment, list[int]]:
    """Segment -> the indices of the leaves that pass through it; parents before children."""
    below: dict[Segment, list[int]] = {}
    for i, leaf in enumerate(leaves):
        for segment in leaf.path():
            below.setdefault(segment, []).append(i)
    return below


# ---- the reward of a trajectory -----------------------------------------------------------

# No tag pair contains its own tag: only one match is possible, so the time stays linear.
THINK = r"\s*<think>(?:(?!</?think>).)*</think>\s*"
CALL = re.compile(THINK + r"<(?!think>|answer>|result>)([\w-]+)>(?:(?!</\1>).)*</\1>\s*", re.DOTALL)
ANSWER = re.compile(THINK + r"<answer>((?:(?!</?answer>).)*)</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reward:
    total: float  # what the policy is trained on
    accuracy: float  # in [0, 1]
    well_formed: bool
    tools_used: int  # kinds of tools, not calls


def reward(
    turns: list[tuple[str, str]],
    answers: list[str],
    *,
    judge: Callable[[str, list[str]], float],
    tools_used: int,
) -> Reward:
    r"""-1 if badly formed, else the accuracy, +0.1 if right with two kinds of tools (paper, Eq. 8).

    `turns` is a trajectory without its prompt and eos: (author, text), policy and tool in turn.
    Whether it is well-formed is judged author by author, so a policy cannot write its own results:

        policy  <think>..</think> <tool>..</tool>
        tool    the result, whatever it says                          (both as often as needed)
        policy  <think>..</think> <answer>.. \boxed{..} ..</answer>

    `judge` says how right an answer is, in [0, 1]; `tools_used` are the kinds that answered.
    """
    authors = [author for author, _ in turns]
    if authors != [("policy", "tool")[i % 2] for i in range(len(turns))]:
        raise ValueError(f"turns must be policy, tool, policy, ...; got {', '.join(authors)}")
    texts = [text for author, text in turns if author == "policy"]
    # An even number of turns ends with a result that the policy never read.
    calls, last = (texts[:-1], texts[-1]) if len(turns) % 2 else (texts, "")

    answer = ANSWER.fullmatch(last)
    prediction = boxed(answer[1]) if answer else None
    forged = any("<result>" in text or "</result>" in text for text in texts)
    well_formed = prediction is not None and not forged and all(map(CALL.fullmatch, calls))
    right = judge(prediction, answers) if well_formed else 0.0
    return Reward(total_reward(well_formed, right, tools_used), right, well_formed, tools_used)


def total_reward(well_formed: bool, accuracy: float, tools_used: int) -> float:
    if not well_formed:
        return -1.0
    return accuracy + 0.1 if accuracy > 0 and tools_used > 1 else accuracy


def boxed(text: str) -> str | None:
    r"""What the last \boxed{..} holds, up to the brace that closes it; None if there is none."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for sign in re.finditer(r"\\.|[{}]", rest if found else "", re.DOTALL):  # \{ is no brace
        depth += (sign[0] == "{") - (sign[0] == "}")
        if depth == 0:
            return rest[: sign.start()]
    return None


# ---- from rewards to advantages -----------------------------------------------------------


def group_advantages(rewards: Sequence[float] | Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-6) over the leaves of one question: (M,) -> (M,).

    GRPO (core_algos.py:113 of the released code). Equal rewards give exactly 0, and so does a
    group of one. The released code gives up to 0.056 for equal rewards (a float32 rounding error
    divided by 1e-6) and, for a group of one, the reward itself.
    """
    r = torch.as_tensor(rewards, dtype=torch.float32)
    if len(r) < 2:
        return torch.zeros_like(r)
    r = r - r[0]  # changes no advantage; equal rewards become exactly 0, without rounding
    return (r - r.mean()) / (r.std() + 1e-6)


def segment_advantages(
    leaves: list[Segment], A: Tensor, shared_weight: float
) -> dict[Segment, Tensor]:
    """Policy segment -> one advantage from each leaf below it, in the order of `shared_by`:

        (1 - shared_weight) * A_i + shared_weight * mean(A of the leaves below)

    shared_weight: 0 soft credit (released code, GRPO), 1 hard (paper, section 3.2), 0.3 a blog.
    All have the same sum, so the same gradient, unless the clip acts on one sign only.
    """
    if not 0 <= shared_weight <= 1:
        raise ValueError(f"shared_weight must be in [0, 1], got {shared_weight}")
    if len(A) != len(leaves):
        raise ValueError(f"{len(A)} advantages for {len(leaves)} leaves")
    advantages = {}
    for segment, below in shared_by(leaves).items():
        if segment.author == "policy":
            own = A[below]  # (d,)
            advantages[segment] = (1 - shared_weight) * own + shared_weight * own.mean()
    return advantages


# ---- the objective of a token -------------------------------------------------------------


def clipped_objective(
    ratio: Tensor,
    A_plus: Tensor,
    A_minus: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Tensor:
    """sum_i min(ratio A_i, clip(ratio) A_i) of a token shared by trajectories i; to maximise.

        min(ratio, 1 + clip_high) * A_plus + max(ratio, 1 - clip_low) * A_minus

    A_plus sums the positive A_i, A_minus the negative ones; with one trajectory this is PPO's.
    `dual_clip` > 1 also limits the ratio of A_minus (core_algos.py:455 of the released code: 3).
    """
    rewarded = ratio.clamp(max=1 + clip_high) * A_plus
    punished = ratio.clamp(min=1 - clip_low, max=dual_clip) * A_minus
    return rewarded + punished


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(d) - d - 1, d = ref_logp - logp: KL(policy, reference) per token, at least 0.

    Unbiased except for the limit of 10, which the released code has too (core_algos.py:583).
    """
    d = (ref_logp - logp).clamp(max=10)  # no inf: its gradient times 0 would be nan
    return (d.exp() - d - 1).clamp(max=10)
