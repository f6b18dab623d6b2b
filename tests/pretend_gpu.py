"""A GPU that is not there: tensors that say they are on cuda:0 and refuse to meet any that are not.

Where no machine has a GPU, nothing else would notice a tensor that is made on the wrong device.
Each one wraps a tensor of the CPU, which does the arithmetic; so all values are those of the CPU.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)
# These may meet both. The last one because autograd asks C++, to which all of this is the CPU, for
# the zeros that it puts the gradient of an indexed tensor into.
BETWEEN_DEVICES = ("aten::copy_", "aten::_to_copy", "aten::index_put")


class OnGPU(torch.Tensor):
    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
        )

    def __init__(self, held):
        self.held = held

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        """The operator on the held tensors; its results are on the GPU, or where it was told."""
        kwargs = kwargs or {}
        name = operator.name()
        if name not in BETWEEN_DEVICES:
            refuse_others(name, args, kwargs)
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


def refuse_others(name, args, kwargs):
    """As CUDA does: only a number, and indices, may be on the CPU."""
    checked = args[:1] if name.startswith("aten::index.") else (args, kwargs)
    others = [x for x in tree_iter(checked) if isinstance(x, torch.Tensor) and x.dim()]
    if not all(isinstance(x, OnGPU) for x in others):
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")


class PretendGPU(TorchFunctionMode):
    """Within it, what asks for a tensor on a GPU gets one of these."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy"):
            return function(held(args[0]).detach())
        asked = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str | torch.device)]
        if name == "to" and asked:
            moved = on_gpu(args[0]) if torch.device(asked[0]).type == "cuda" else held(args[0])
            dtypes = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.dtype)]
            return moved.to(*dtypes) if dtypes else moved
        if torch.device(kwargs.get("device") or "cpu").type == "cuda" and not any(
            isinstance(x, OnGPU) for x in args
        ):
            return on_gpu(function(*args, **kwargs | {"device": "cpu"}))
        return function(*args, **kwargs)


def move(model: nn.Module) -> nn.Module:
    """All parameters and buffers of a model to the pretended GPU; tied ones stay tied."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in moved:
                moved[parameter] = nn.Parameter(on_gpu(parameter.data), parameter.requires_grad)
            setattr(module, name, moved[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, on_gpu(buffer))
    return model
