"""DeepSpeed checkpoints of ZeRO stage 0: one file with whole tensors, which loads at any world size.

The optimizer's state is addressed by position, so the script that resumes must build its groups like the target's. In
16 bits there are two forms: master weights and moments tensor by tensor for torch's AdamW and most others
(FP16_UnfusedOptimizer), and flat by group for DeepSpeed's FusedAdam (FP16_Optimizer), which takes its gradient clipping
from the file over the config: 0, no clipping, is written where the source did not say.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bert2bert.checkpoints.job import FilePlan, Job, TargetGroup
from bert2bert.checkpoints.zero.contents import adam_state, hyper_parameters, model_states, scaler_attributes
from bert2bert.checkpoints.zero.layout import zero12_layout
from bert2bert.checkpoints.zero.tag_files import MODEL
from bert2bert.files import torch_writer
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


def stage0_files(job: Job, world: int) -> list[FilePlan]:
    """The one file of the checkpoint. ``world``: ranks of the run, which DeepSpeed notes and does not check."""
    spec = job.spec
    low = 0 if spec.precision == "fp32" else spec.dtype.itemsize
    payload = sum(
        spec.numel(name) * (low + 4 + 4 * (len(group.moments))) for group in spec.groups for name in group.names
    )
    return [
        FilePlan(MODEL, payload + spec.dtype.itemsize * sum(map(spec.numel, spec.frozen)), partial(_write, job, world))
    ]


def _write(job: Job, world: int, file: Sink) -> int:
    spec = job.spec
    module: dict[str, Any] = dict(job.module(spec.shapes))
    if spec.precision == "fp32":  # the weights are the master weights
        trained = [name for name in spec.shapes if name not in spec.frozen]
        module |= {name: _whole(job, name, "fp32") for name in trained}
        module |= {absent: module[kept] for absent, kept in spec.aliases.items()}
        optimizer = _by_tensor(job)
    elif spec.fused:
        masters = [_joined(job, group, "fp32") for group in spec.groups]
        clip = 0.0 if spec.clip_grad is None else spec.clip_grad
        optimizer = {
            **_scaler(job),
            "optimizer_state_dict": _by_group(job),
            "fp32_groups_flat": masters,
            "clip_grad": clip,
        }
    else:
        groups = [[_whole(job, name, "fp32") for name in group.names] for group in spec.groups]
        optimizer = {**_scaler(job), "optimizer_state_dict": _by_tensor(job), "fp32_groups": groups}
    tree = {
        **model_states(spec, module, [], 0, world),
        "optimizer": optimizer,
        "param_shapes": None,
        "shared_params": None,
    }
    return torch_writer.save(file, tree, job.tally.wrote)


def _scaler(job: Job) -> dict[str, Any]:
    dynamic, state = scaler_attributes(job.spec)
    known = {key: state[key] for key in _SCALER if key in state}
    return {"cur_iter": 0, **known, "dynamic_loss_scale": dynamic}


def _by_tensor(job: Job) -> dict[str, Any]:
    """A torch optimizer's state_dict with one entry a parameter, numbered on from group to group."""
    states: dict[int, Any] = {}
    groups = []
    for group in job.spec.groups:
        first = len(states)
        for name in group.names:
            states[len(states)] = adam_state(group, partial(_whole, job, name))
        groups.append({**hyper_parameters(group), "params": list(range(first, len(states)))})
    return {"state": states, "param_groups": groups}


def _by_group(job: Job) -> dict[str, Any]:
    """A torch optimizer's state_dict with one flat entry a group."""
    groups = job.spec.groups
    return {
        "state": {g: adam_state(group, partial(_joined, job, group)) for g, group in enumerate(groups)},
        "param_groups": [{**hyper_parameters(group), "params": [g]} for g, group in enumerate(groups)],
    }


def _whole(job: Job, name: str, state: str) -> Blank:
    numel = job.spec.numel(name)
    return Blank(job.spec.shapes[name], torch.float32, partial(job.elements, name, state, 0, numel))


def _joined(job: Job, group: TargetGroup, state: str) -> Blank:
    layout = zero12_layout([job.spec.numel(name) for name in group.names], 1)
    pieces, total = layout.pieces[0], layout.total
    return Blank((total,), torch.float32, partial(job.shard, group.names, state, pieces, total))
