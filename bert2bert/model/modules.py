"""The small modules that several cores are made of."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bert2bert.errors import InvalidConfig, did_you_mean

_OWN: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": functools.partial(nn.GELU, "tanh"),
    "gelu_pytorch_tanh": functools.partial(nn.GELU, "tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """An activation by its name in a Hugging Face config: torch's own where it has one, else transformers'.

    Raises InvalidConfig for a name that transformers does not know.
    """
    if name in _OWN:
        return _OWN[name]()
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise InvalidConfig(f"model config: the activation is {name!r}; {did_you_mean(name, ACT2FN)}")
    found: nn.Module = ACT2FN[name]
    return found


def chain(**modules: nn.Module) -> nn.Sequential:
    """Modules that are applied one after another, each under its name."""
    return nn.Sequential(OrderedDict(modules))


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, the parameters of new modules go to the meta device as soon as they have a name: a model is made with one
    parameter in memory at a time. Buffers, whose values modules compute, stay where they are."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # a tied one is there already, and stays the same object
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Unallocated(TorchFunctionMode):
    """Inside, what is made without values, as most parameters are, is made on the meta device and takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({**(kwargs or {}), "device": "meta"} if func is torch.empty else kwargs or {}))


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · weight over the last dim (Zhang & Sennrich 2019); 16-bit inputs are taken to float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Conv1D(nn.Module):
    """GPT-2's linear map: the weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)
