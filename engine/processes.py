"""Several processes, a GPU or a core each: `accelerate launch arpo_mini.py train`, or torchrun.

Each rolls out its share of the questions; gradients are summed before every optimizer step, so
that all adapters stay the same. Process 0 alone writes files. One process meets nobody.
"""

import os
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist

from advantage import shared_by
from data.files import UserError

MEANS, SUMS = ("loss", "clip_fraction", "drift_mean"), ("train_tokens", "prefill_tokens")


class Processes:
    def __init__(self):
        self.met, self.part = False, 1.0  # the others in this step; of the step's tokens
        self.rank, self.count = (int(os.environ.get(*x)) for x in (("RANK", 0), ("WORLD_SIZE", 1)))
        if self.count > 1:
            gpu, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if 0 < there <= gpu:
                raise UserError(f"process {gpu} has no GPU of its own: this machine has {there}")
            torch.cuda.set_device(gpu) if there else None
            kind = "cpu:gloo,cuda:nccl" if there and dist.is_nccl_available() else "gloo"
            dist.init_process_group(kind, timeout=timedelta(days=1))

    def meet(self, collective, *given) -> None:
        self.met = True
        try:
            collective(*given)
        except RuntimeError:
            raise UserError("another process of this run has ended, and so does this one") from None

    def exchange(self, mine) -> list:
        """What each of them says; over gloo, which notices where one has ended."""
        self.meet(dist.all_gather_object, said := [None] * self.count, mine)
        return said

    def agree(self, model: torch.nn.Module, facts: dict) -> None:
        """All begin with the adapter of process 0; UserError where the facts are not the same."""
        if facts["questions_per_step"] < self.count:
            raise UserError(
                f"--questions_per_step: each of {self.count} processes needs a question"
            )
        for rank, other in enumerate(self.exchange(facts)):
            if odd := [name for name in facts if facts[name] != other.get(name)]:
                raise UserError(f"process {rank} was started with another {', '.join(odd)}")
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            self.meet(dist.broadcast, p.data, 0)

    def add_up(self, parameters: list, total: float) -> None:
        """Gradients of means over `total` tokens become that of the mean over all tokens."""
        flat = torch.cat([p.grad.flatten() for p in parameters])
        self.part = total / sum(self.exchange(total))
        self.meet(dist.all_reduce, flat.mul_(self.part))
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p)

    def shared(self, work, questions: list, number: int) -> tuple[dict, list, list]:
        """work(questions, seed) -> figures, groups, rewards: of all, where each does its share."""
        if self.count == 1:
            return work(questions, number)
        self.met = False
        try:
            mine = work(questions[self.rank :: self.count], number + 1_000_000_007 * self.rank)
        except torch.OutOfMemoryError as error:
            if not self.met:  # else the others do not repeat the step
                raise
            raise UserError(f"{error}; it takes a smaller --micro_batch_tokens") from None
        trees = [list(shared_by(leaves)) for leaves in mine[1]]  # pickled parents first: not deep
        said = self.exchange((trees, {**mine[0], "part": self.part}, *mine[1:]))
        _, figures, *found = zip(*said, strict=True)
        at = [divmod(i, self.count) for i in range(len(questions))]
        return merged(figures), *([some[rank][i] for i, rank in at] for some in found)


def merged(figures: tuple[dict, ...]) -> dict:
    """Of the whole step: sums, means over its tokens, of other figures the largest."""

    def of_all(name: str):
        known = [f for f in figures if f[name] is not None]
        values = [f[name] for f in known]
        if name in MEANS and known:
            return sum(f[name] * f["part"] for f in known) / sum(f["part"] for f in known)
        return sum(values) if name in SUMS else max(values, default=None)

    return {name: of_all(name) for name in figures[0] if name != "part"}


def shared(roll_out):
    """An agent's method: each process rolls out its share of the questions, and all get all."""

    def of_all(self, questions, config, seed):
        def work(some, seed):
            return {}, *roll_out(self, some, config, seed)

        return self.policy.processes.shared(work, questions, seed)[1:]

    return of_all


@lru_cache(maxsize=1)
def joined() -> Processes:
    """Those that were launched together; they meet for the first time."""
    return Processes()
