"""Every tensor is made where the model is: a step on a pretended GPU, number by number.

Its tensors say that they are on cuda:0 and refuse to meet any that are not. Each wraps a tensor of
the CPU, which does the arithmetic; so all values are those of the CPU.
"""

from dataclasses import replace

import pytest
import torch
from common import ECHO, TINY, TINY_QUESTIONS, TinyPolicy, small_policy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from arpo_mini import train_step
from engine.writer import Writer

GPU = torch.device("cuda", 0)
# These may meet both. The last one because autograd asks C++, to which all of this is the CPU, for
# the zeros that it puts the gradient of an indexed tensor into.
BETWEEN_DEVICES = ("aten::copy_", "aten::_to_copy", "aten::index_put")


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, **like)

    def __init__(self, held):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        """The operator on the held tensors; its results are on the GPU, or where it was told.

        As in CUDA, only a number, and indices, may be on the CPU.
        """
        kwargs, name = kwargs or {}, operator.name()
        checked = args[:1] if name.startswith("aten::index.") else (args, kwargs)
        met = [x for x in tree_iter(checked) if isinstance(x, torch.Tensor) and x.dim()]
        if name not in BETWEEN_DEVICES and not all(isinstance(x, OnGPU) for x in met):
            raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
        device = torch.device(kwargs.get("device") or GPU)
        kwargs = kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs
        result = operator(*tree_map(held, args), **tree_map(held, kwargs))
        if operator._schema.is_mutable and name.partition(".")[0].endswith("_"):
            return args[0]
        return tree_map(on_gpu, result) if device.type == "cuda" else result


def held(x):
    return x.held if isinstance(x, OnGPU) else x


def on_gpu(x):
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


class PretendGPU(TorchFunctionMode):
    """Within it, what asks for a tensor on a GPU gets one of these."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        given = (*args[1:], *kwargs.values())
        asked = [x for x in given if isinstance(x, str | torch.device)]
        if name == "pad_sequence" and isinstance(args[0][0], OnGPU):  # made by C++, as above
            return on_gpu(function([held(x) for x in args[0]], *args[1:], **kwargs))
        if name in ("tolist", "numpy"):
            return function(held(args[0]).detach())
        if name == "to" and asked:
            moved = on_gpu(args[0]) if torch.device(asked[0]).type == "cuda" else held(args[0])
            dtypes = [x for x in given if isinstance(x, torch.dtype)]
            return moved.to(*dtypes) if dtypes else moved
        there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if there and not any(isinstance(x, OnGPU) for x in args):
            return on_gpu(function(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)


def numbers(config, on_gpu):
    """Figures but for the seconds, and the adapter, after a step."""
    policy = small_policy(TinyPolicy)
    if on_gpu:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        policy = replace(policy, model=policy.model._apply(lambda x: OnGPU(x.data)))
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        assert policy.device == GPU
    policy.limits.recompute = config.rollout_rows == 3
    optimizer = torch.optim.AdamW(policy.parameters, lr=1e-3, foreach=False)
    figures, *_ = train_step(policy, optimizer, TINY_QUESTIONS, config, ECHO, step=1)
    adapter = [(p.data.held if on_gpu else p.data).tolist() for p in policy.parameters]
    return {name: x for name, x in figures.items() if "seconds" not in name}, adapter


@pytest.mark.slow
def test_a_step_is_the_same_on_a_pretended_gpu(monkeypatch):
    # torch 2.11 makes no wrapped tensors in inference mode
    monkeypatch.setattr(Writer, "write", torch.no_grad()(Writer.write.__wrapped__))
    config = replace(TINY, group_size=2, kl_coefficient=0.1, max_segment_tokens=6)
    for changed in (
        replace(config, branch_rule="official", updates_per_rollout=2),
        replace(config, micro_batch_tokens=40, rollout_rows=3, top_p=0.9),
    ):
        here = numbers(changed, on_gpu=False)
        with PretendGPU():
            assert numbers(changed, on_gpu=True) == here
        assert here[0]["grad_norm"] > 0


def test_the_pretended_gpu_is_as_strict_as_a_real_one():
    with PretendGPU():
        here, there = torch.arange(2), torch.arange(2, device=GPU)
        assert there.device == there.to("cpu").to("cuda").device == (there + there).device == GPU
        assert there[here].device == GPU  # indices may be on the CPU
        for meet in (here.add, lambda x: torch.cat([x, here]), here.__getitem__):
            with pytest.raises(RuntimeError, match="on cuda:0 and on the CPU"):
                meet(there)
