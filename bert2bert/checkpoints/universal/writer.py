"""DeepSpeed universal checkpoints: addressed by parameter name, one folder that ZeRO 1, 2 and 3 load at any world size.

DeepSpeed's own converter writes one dialect for stages 1 and 2 and another for stage 3; here both are in one folder:
both names of the model-states file, both sets of keys in `zero/optimizer_state.pt`, and `{'param': tensor}` files
that either loader accepts. Stage 3 copies the first group's hyper-parameters into every group, so what it is given
holds only those on which all groups agree: an unmodified script keeps its own weight decay per group. What a file
cannot repair: stage 3 shares one step tensor among sub-groups, and no stage restores buffers or frozen
parameters (they are in `module` of ``mp_rank_00_model_states.pt``).

Refuses (InvalidConfig) groups whose optimizer does not keep both of Adam's moments: the format has no other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bert2bert.checkpoints.job import STATES, FilePlan, Job, TargetSpec, write_bytes
from bert2bert.checkpoints.optimizers import ADAM
from bert2bert.checkpoints.zero.contents import DS_VERSION, hyper_parameters, model_states, scaler_fields, step_tensor
from bert2bert.errors import InvalidConfig
from bert2bert.files import torch_writer
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank

MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stages 1 and 2; stage 3


def universal_files(job: Job) -> list[FilePlan]:
    """The files of a universal checkpoint, each independent of the others."""
    spec = job.spec
    for group in spec.groups:
        if group.moments != ADAM:
            raise InvalidConfig(
                f"format universal holds Adam's two moments, and the optimizer of {group.names[0]} keeps "
                f"{', '.join(group.moments.values())}. Use --format zero --stage S --world-size N."
            )
    frozen = sum(map(spec.numel, spec.without_gradient)) * spec.dtype.itemsize
    plans = [FilePlan(MODEL_FILES[0], frozen, partial(_model, job, spec.without_gradient))]
    plans.append(FilePlan(MODEL_FILES[1], 0, partial(_model, job, ())))
    plans.append(FilePlan("zero/optimizer_state.pt", 0, partial(_optimizer, spec)))
    for group in spec.groups:
        step = torch_writer.saved(step_tensor(group.step))
        for name in group.names:
            for state in STATES:
                write = partial(_tensor, job, name, state)
                plans.append(FilePlan(f"zero/{name}/{state}.pt", 4 * spec.numel(name), write))
            plans.append(FilePlan(f"zero/{name}/step.pt", 0, partial(write_bytes, step)))
    return plans


def _model(job: Job, values: tuple[str, ...], file: Sink) -> int:
    spec, module = job.spec, job.module(values)
    param_shapes = [{name: torch.Size(spec.shapes[name]) for name in group.names} for group in spec.groups]
    tree = model_states(spec, module, param_shapes, None, 1, fragments={name: module[name] for name in values})
    tree["universal_checkpoint_info"] = {"universal_checkpoint_version": 0.4}
    return torch_writer.save(file, tree, job.tally.wrote)


def _optimizer(spec: TargetSpec, file: Sink) -> int:
    groups = [hyper_parameters(group) for group in spec.groups]
    agreed = {key: value for key, value in groups[0].items() if all(g.get(key) == value for g in groups)}
    tree: dict[str, Any] = {
        "ds_version": DS_VERSION,
        "param_groups": [{**hyper, "params": [i]} for i, hyper in enumerate(groups)],
        "optimizer_state_dict": {
            "state": {0: {"step": step_tensor(max(group.step for group in spec.groups))}},
            "param_groups": [{**agreed, "params": [0]}],
        },
    }
    if spec.precision == "fp16" and spec.loss_scaler:  # else the engine keeps the scaler of its own config
        tree |= scaler_fields(spec)
    return torch_writer.save(file, tree)


def _tensor(job: Job, name: str, state: str, file: Sink) -> int:
    blank = Blank(job.spec.shapes[name], torch.float32, partial(job.elements, name, state, 0, job.spec.numel(name)))
    return torch_writer.save(file, {"param": blank, "cat_dim": 0}, job.tally.wrote)
