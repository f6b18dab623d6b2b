"""Every tensor is made where the model is: a step on a pretended GPU, number by number."""

import dataclasses

import pytest
import torch
from conftest import with_random_adapter
from pretend_gpu import GPU, OnGPU, PretendGPU, move

from arpo_mini import evaluate, train_step
from engine.model import load_policy

WAYS = {
    "the defaults": {},
    "official": {"branch_rule": "official", "updates_per_rollout": 2, "kl_coefficient": 0.1},
    "cut and checkpointed": {"micro_batch_tokens": 200, "gradient_checkpointing": True},
    "a row a trajectory, few at once": {"packed": False, "rollout_rows": 3},
}


def numbers(config, tools, questions, on_gpu):
    """Metrics but for the seconds, the adapter, and answers, after a step."""
    torch.manual_seed(0)
    policy = with_random_adapter(load_policy(config, tools, trainable=True))
    if on_gpu:
        move(policy.model)
        assert policy.device == GPU
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    metrics, *_ = train_step(policy, optimizer, questions, config, tools, step=1)
    records = evaluate(policy, questions[:1], config, tools)
    adapter = [p.data.held if on_gpu else p.data for p in parameters]
    metrics = {name: value for name, value in metrics.items() if "seconds" not in name}
    return metrics, adapter, [record["accuracy"] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("changes", WAYS.values(), ids=WAYS)
def test_a_step_is_the_same_on_a_pretended_gpu(config, tools, questions, changes):
    config = dataclasses.replace(config, group_size=4, max_tool_calls=2, **changes)
    metrics, adapter, accuracy = numbers(config, tools, questions[2:4], on_gpu=False)
    with PretendGPU():
        there = numbers(config, tools, questions[2:4], on_gpu=True)
    assert there[0] == metrics and there[2] == accuracy
    assert metrics["grad_norm"] > 0
    assert all(torch.equal(a, b) for a, b in zip(there[1], adapter, strict=True))


def test_the_pretended_gpu_is_as_strict_as_a_real_one():
    here, there = torch.ones(2), OnGPU(torch.ones(2))
    with PretendGPU():
        made = torch.arange(2, device=there.device)
        assert made.device == there.to("cuda").device == (there + made).device == GPU
        assert here.to(GPU).device == GPU and there.to("cpu").device.type == "cpu"
        assert torch.equal((2.0 * there).to("cpu"), torch.full((2,), 2.0))
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            here + there
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            torch.cat([there, torch.arange(2)])
        assert there[torch.tensor([0])].device == GPU  # indices may be on the CPU
        with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
            here[made]
