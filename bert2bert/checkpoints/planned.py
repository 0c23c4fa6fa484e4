"""The files of a checkpoint of any format, before anything is written."""

from __future__ import annotations

from functools import partial

from bert2bert.checkpoints.expert_parallel.writer import expert_zero_files
from bert2bert.checkpoints.hub.writer import MAX_FILE_BYTES, hub_config, hub_files, json_bytes
from bert2bert.checkpoints.job import FilePlan, Job, TargetSpec, write_bytes
from bert2bert.checkpoints.target import Target
from bert2bert.checkpoints.universal.writer import universal_files
from bert2bert.checkpoints.zero.layout import SUB_GROUP_SIZE
from bert2bert.checkpoints.zero.stage0_writer import stage0_files
from bert2bert.checkpoints.zero.writer import zero_files
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_writer


def planned(job: Job, target: Target, sub_group_size: int = SUB_GROUP_SIZE) -> list[FilePlan]:
    """The files of the checkpoint, each independent of the others."""
    _check_nesting(job.spec)
    stage, world = target.stage, target.ranks
    if target.format == "hub":
        plans = hub_files(job, target.shard_size or MAX_FILE_BYTES)
    elif stage is None or world is None:
        plans = universal_files(job)
    elif job.spec.expert_parallel:
        plans = expert_zero_files(job, stage, world)
    else:
        plans = zero_files(job, stage, world, sub_group_size) if stage else stage0_files(job, world)
    config = hub_config(job.spec) if target.format == "hub" else job.spec.config
    extra = {**({"config.json": json_bytes(config)} if job.spec.config else {}), **job.spec.extra_files}
    return plans + [FilePlan(name, 0, partial(write_bytes, content)) for name, content in extra.items()]


def _check_nesting(spec: TargetSpec) -> None:
    """Refuse (InvalidCheckpoint) what a pickle cannot hold: values inside each other without end, or nearly so."""
    for name in ("client_state", "extras", "buffers", "lr_scheduler", "of_ranks"):
        try:
            held = getattr(spec, name)
            torch_writer.structure([vars(rank) for rank in held] if name == "of_ranks" else held)
        except RecursionError:
            what = "client state" if name == "of_ranks" else name.replace("_", " ")
            raise InvalidCheckpoint(
                f"the source's {what} holds values nested hundreds deep, which cannot be written. "
                "Save the checkpoint without them."
            ) from None
