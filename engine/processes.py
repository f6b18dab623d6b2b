"""Several processes, a GPU or a core each: `accelerate launch arpo_mini.py train`, or torchrun.

All begin with the same adapter (same seed, same files), each rolls out its share of the questions,
and gradients are summed before every optimizer step, so adapters stay the same. Process 0 writes.
"""

import os
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist

from advantage import shared_by
from data.files import UserError


class Processes:
    def __init__(self):
        variables = ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)
        self.rank, gpu, self.count = (int(os.environ.get(*x)) for x in variables)
        if self.count > 1:
            there = torch.cuda.device_count()
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

    def add_up(self, parameters: list, total: float) -> None:
        """Gradients of means over `total` tokens become that of the mean over all tokens."""
        self.part = total / sum(self.exchange(total))
        flat = self.part * torch.nn.utils.parameters_to_vector(p.grad for p in parameters)
        self.meet(dist.all_reduce, flat)
        torch.nn.utils.vector_to_parameters(flat, (p.grad for p in parameters))

    def shared(self, work, questions: list, number: int) -> tuple[dict, list, list]:
        """work(questions, seed) -> figures, groups, rewards: of all, where each does its share."""
        if self.count == 1:
            return work(questions, number)
        self.met, self.part = False, 1.0  # the others in this step; of the step's tokens
        try:
            own = questions[self.rank :: self.count]
            figures, *mine = work(own, number + 1_000_000_007 * self.rank)
        except torch.OutOfMemoryError as error:
            if not self.met:  # else the others do not repeat the step
                raise
            raise UserError(f"{error}; it takes a smaller --micro_batch_tokens") from None
        trees = [list(shared_by(leaves)) for leaves in mine[0]]  # pickled parents first: not deep
        _, shares, *found = zip(*self.exchange((trees, (self.part, figures), *mine)), strict=True)
        at = [divmod(i, self.count) for i in range(len(questions))]
        return merged(shares), *([some[rank][i] for i, rank in at] for some in found)


def merged(shares: tuple[tuple[float, dict], ...]) -> dict:
    """Figures of the whole step: sums, means over its tokens, of other figures the largest."""
    whole = {}
    for name in shares[0][1]:
        known = [(part, figures[name]) for part, figures in shares if figures[name] is not None]
        values = [value for _, value in known]
        whole[name] = sum(values) if name.endswith("_tokens") else max(values, default=None)
        if name in ("loss", "clip_fraction", "drift_mean") and known:
            whole[name] = sum(part * value for part, value in known) / sum(p for p, _ in known)
    return whole


joined = cache(Processes)  # those that were launched together: they meet once
