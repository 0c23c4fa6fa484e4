"""A model in memory as a source: its parameters by the names of its state dict, what an optimizer of torch keeps of
them beside.

Refuses, as InvalidCheckpoint, parameters that are not plain numbers in this process's memory: on the meta device, empty
or sharded (ZeRO-3, FSDP, tensor parallelism), quantised, of several devices; as InvalidConfig, an optimizer of other
parameters; as UnsupportedGrowth, one whose states are not those of Adam.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bert2bert.checkpoints.optimizers import ADAM, held
from bert2bert.checkpoints.source import STATES, Source, TensorMeta
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth, some

_PLAIN = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip


class LiveSource(Source):
    """A model in memory, named and shaped as in a Hugging Face folder, and so of that format; its values are read when
    they are asked for. ``tied``: name -> the earlier name of the same parameter."""

    format = "hub"

    def __init__(
        self, model: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        path = Path(f"{type(model).__name__} in memory")
        super().__init__(path, path, None)
        self.config = config
        self.tied: dict[str, str] = {}
        self._values: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Any]] = {}
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in names:
                self.tied[name] = names[id(parameter)]
                continue
            names[id(parameter)] = name
            self._check(name, parameter)
            self._values[name] = parameter.detach()
            shape, dtype = tuple(parameter.shape), _PLAIN[parameter.dtype]
            self.tensors[name] = TensorMeta(name, shape, dtype, None, parameter.requires_grad)
        devices = sorted({str(value.device) for value in self._values.values()})
        if len(devices) != 1:
            raise InvalidCheckpoint(
                f"{path}: its parameters lie on {some(devices) or 'no device: there are none'}; expected one device. "
                "Move the model to one (model.to(device)), or grow its checkpoint on disk."
            )
        own = self.tensors.keys() | self.tied
        self.buffers = {name: value for name, value in model.state_dict().items() if name not in own}
        if optimizer is not None:
            self._take(optimizer, names)

    def _check(self, name: str, parameter: Tensor) -> None:
        if isinstance(parameter, DTensor) or not parameter.numel():
            found = f"{name} is a shard (FSDP, tensor parallelism, ZeRO-3: shape {tuple(parameter.shape)} here)"
            do = "Gather the model, or grow its checkpoint on disk."
        elif parameter.is_meta:
            found, do = f"{name} is on the meta device and has no values", "Load the weights first."
        elif parameter.dtype not in _PLAIN:
            kind = str(parameter.dtype).removeprefix("torch.")
            found = f"{name} is {kind}: weights that are quantised or packed cannot be grown"
            do = "Use the model that they were made from, or dequantize() it."
        else:
            return
        raise InvalidCheckpoint(f"{self.path}: {found}. {do}")

    def _take(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> None:
        """Groups, states and steps of an optimizer."""
        for i, group in enumerate(optimizer.param_groups):
            if strange := [tuple(p.shape) for p in group["params"] if id(p) not in names]:
                raise InvalidConfig(
                    f"the optimizer's group {i} has a parameter of shape {strange[0]} that is not the model's: "
                    f"expected an optimizer of the parameters of {self.path}"
                )
            own = [names[id(p)] for p in group["params"]]
            self.groups.append({**{key: value for key, value in group.items() if key != "params"}, "names": own})
            self.moments.append(dict(ADAM))
            for name, parameter in zip(own, group["params"], strict=True):
                state = optimizer.state.get(parameter) or {}
                if state and (keeps := held(state)) != set(ADAM.values()):
                    raise UnsupportedGrowth(
                        f"{self.path}: its {type(optimizer).__name__} keeps {', '.join(sorted(keeps)) or 'nothing'} of "
                        f"{name}. Known are the states of Adam and AdamW, {' and '.join(ADAM.values())} (without "
                        "amsgrad). Grow the weights alone: leave the optimizer out."
                    )
                self._state[name] = state
                self._steps[name] = int(state["step"]) if state else 0
        if any(self._state.values()):
            self.states = STATES

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> Tensor:
        whole = self._values[meta.name]
        if state != "fp32":
            kept = self._state.get(meta.name)
            if not kept:
                return torch.zeros((stop - start, *meta.shape[1:]) if meta.shape else (), dtype=torch.float32)
            whole = kept[state]
        return (whole[start:stop] if meta.shape else whole).cpu()
