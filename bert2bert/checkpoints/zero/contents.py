"""What DeepSpeed's files hold beside tensors, as its version 0.19.8 writes it: hyper-parameters, loss scaler, counters.

Refuses (ValueError: the caller's mistake) client state under DeepSpeed's own keys.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from bert2bert.checkpoints.job import TargetGroup, TargetSpec
from bert2bert.checkpoints.zero.wrapped import bare
from bert2bert.files.torch_writer import Foreign

DS_VERSION = "0.19.8"  # the DeepSpeed whose layout is written; its loaders read it for compatibility rules
_SCALER = "deepspeed.runtime.fp16.loss_scaler"
_DYNAMIC_SCALER = {  # DeepSpeed's defaults for an fp16 section without options
    "cur_scale": 65536.0, "dynamic": True, "cur_iter": 0, "last_overflow_iter": -1, "scale_factor": 2.0,
    "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "cur_hysteresis": 2, "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
}  # fmt: skip
_TORCH_ADAMW = {  # what torch's AdamW and DeepSpeed's FusedAdam and CPUAdam look up in a loaded group
    "amsgrad": False, "foreach": None, "maximize": False, "capturable": False, "differentiable": False, "fused": None,
    "decoupled_weight_decay": True, "bias_correction": True,
}  # fmt: skip


def hyper_parameters(group: TargetGroup) -> dict[str, Any]:
    """A group's entry in ``param_groups`` (without ``params``), complete for torch's AdamW and DeepSpeed's Adams."""
    hyper = {**_TORCH_ADAMW, **group.hyper}
    if "betas" in hyper:
        hyper["betas"] = tuple(hyper["betas"])
    return hyper


def step_tensor(step: int) -> torch.Tensor:
    """Adam's step as torch keeps it: a 0-dim fp32 tensor."""
    return torch.tensor(float(step))


def adam_state(group: TargetGroup, tensor: Callable[[str], Any]) -> dict[str, Any]:
    """What the group's optimizer keeps of one tensor: its moments, under its own names, and Adam's step."""
    moments = {key: tensor(state) for state, key in group.moments.items()}
    return moments if "momentum_buffer" in moments else {"step": step_tensor(group.step), **moments}


def scaler_attributes(spec: TargetSpec) -> tuple[bool, dict[str, Any]]:
    """Whether the engine's loss scale is dynamic, and the loss scaler's attributes.

    fp16: ``spec.loss_scaler``'s over DeepSpeed's defaults (a scale of 65536 when there are none), static if they say
    ``dynamic: False``. Other precisions do not scale, whatever the source did.
    """
    given = (spec.loss_scaler or {}) if spec.precision == "fp16" else {"dynamic": False, "cur_scale": 1.0}
    if bool(given.get("dynamic", True)):
        return True, {key: given.get(key, default) for key, default in _DYNAMIC_SCALER.items()}
    return False, {"cur_scale": given["cur_scale"], "dynamic": False}


def scaler_fields(spec: TargetSpec) -> dict[str, Any]:
    """``loss_scaler``, ``dynamic_loss_scale`` and ``overflow``: the object DeepSpeed takes its loss scale from."""
    dynamic, state = scaler_attributes(spec)
    scaler = Foreign(_SCALER, "DynamicLossScaler" if dynamic else "LossScaler", state)
    if dynamic:
        state["dtype"] = torch.float16
    return {"loss_scaler": scaler, "dynamic_loss_scale": dynamic, "overflow": False}


def stored_config(spec: TargetSpec, stage: int | None) -> dict[str, Any]:
    """What readers of a checkpoint look up in the ds_config that DeepSpeed stores with it."""
    precision = {} if spec.precision == "fp32" else {spec.precision: {"enabled": True}}
    return precision if stage is None else {"zero_optimization": {"stage": stage}, **precision}


def model_states(
    spec: TargetSpec,
    module: dict[str, Any],
    param_shapes: list[Any],
    stage: int | None,
    world: int,
    shared: bool = True,
    fragments: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The content of a ``*_model_states.pt``; ``stage`` None (universal) leaves the ZeRO stage out of its config.
    ``fragments``: values of the frozen parameters, of one rank at stage 3."""
    # If these are there at all, an engine looks for each of its frozen parameters in them.
    frozen = stage is None or (stage > 1 and (bool(spec.frozen) or spec.lists_frozen))
    second = {
        name: value.to(spec.dtype) if value.is_floating_point() else value
        for name, (_, value) in spec.second_names.items()
    }
    common = {
        "module": OrderedDict(
            (bare(name), value) for name, value in {**module, **second, **spec.buffers, **spec.extras}.items()
        ),
        "buffer_names": list(spec.buffers),
        "optimizer": None,
        "param_shapes": param_shapes,
        "frozen_param_shapes": sizes(spec, spec.without_gradient) if frozen else None,
        "shared_params": {**spec.aliases, **{name: first for name, (first, _) in spec.second_names.items()}}
        if shared
        else {},
        "frozen_param_fragments": OrderedDict(fragments) if frozen else None,
        "lr_scheduler": spec.lr_scheduler,
        "data_sampler": spec.client_state.get("data_sampler"),
        "random_ltd": spec.client_state.get("random_ltd"),
        "skipped_steps": spec.counters.get("skipped_steps", 0),
        "global_steps": spec.counters["global_steps"],
        "global_samples": spec.counters.get("global_samples", 0),
        "dp_world_size": world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": stored_config(spec, stage),
        "ds_version": DS_VERSION,
    }
    if taken := sorted((common.keys() - {"data_sampler", "random_ltd"}) & spec.client_state.keys()):
        raise ValueError(f"client state must not use DeepSpeed's own keys: {taken}")
    return common | spec.client_state


def sizes(spec: TargetSpec, names: Iterable[str]) -> OrderedDict[str, torch.Size]:
    """Shapes by name, as DeepSpeed's files hold them."""
    return OrderedDict((name, torch.Size(spec.shapes[name])) for name in names)
