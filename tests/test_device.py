"""Every tensor is made where the model is: a step on a pretended GPU, number by number."""

from dataclasses import replace

import pytest
import torch
from conftest import ECHO, TINY, TINY_QUESTIONS, TinyPolicy, small_policy
from pretend_gpu import GPU, OnGPU, PretendGPU, move

from arpo_mini import train_step


def numbers(config, on_gpu):
    """Figures but for the seconds, and the adapter, after a step."""
    policy = small_policy(TinyPolicy)
    if on_gpu:
        policy = replace(policy, model=move(policy.model))
        assert policy.device == GPU
    policy.limits.recompute = config.rollout_rows == 3
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-3, foreach=False)
    figures, *_ = train_step(policy, optimizer, TINY_QUESTIONS, config, ECHO, step=1)
    adapter = [(p.data.held if on_gpu else p.data).tolist() for p in policy.parameters]
    return {name: x for name, x in figures.items() if "seconds" not in name}, adapter


@pytest.mark.parametrize(
    "changes",
    [
        {"branch_rule": "official", "updates_per_rollout": 2},
        {"micro_batch_tokens": 40, "rollout_rows": 3, "top_p": 0.9},
    ],
)
def test_a_step_is_the_same_on_a_pretended_gpu(changes):
    config = replace(TINY, group_size=3, kl_coefficient=0.1, max_segment_tokens=8, **changes)
    here = numbers(config, on_gpu=False)
    with PretendGPU():
        assert numbers(config, on_gpu=True) == here
    assert here[0]["grad_norm"] > 0


def test_the_pretended_gpu_is_as_strict_as_a_real_one():
    here, there = torch.ones(2), OnGPU(torch.ones(2))
    with PretendGPU():
        made = torch.arange(2, device=there.device)
        assert made.device == there.to("cuda").device == (there + made).device == GPU
        assert here.to(GPU).device == GPU and there.to("cpu").device.type == "cpu"
        assert torch.equal((2.0 * there).to("cpu"), torch.full((2,), 2.0))
        assert there[torch.tensor([0])].device == GPU  # indices may be on the CPU
        for meet in (here.add, lambda x: torch.cat([x, here]), here.__getitem__):
            with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
                meet(made)
