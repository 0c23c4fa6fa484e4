"""What each rank of a ZeRO 3 run keeps of its own: client state, buffers and extra states.

DeepSpeed's stages 1 and 2 write such values once, by the first rank. Stage 3 writes them in every rank's file and gives
each rank its own back, such as a random state. A target of stage 3 on as many ranks has a place for all of them; any
other has the first rank's, and the user is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.source import RankState, Source
from bert2bert.checkpoints.spec import OWN_STATE
from bert2bert.checkpoints.target import Target
from bert2bert.errors import some
from bert2bert.files.torch_writer import equal


def of_ranks(source: Source, spec: TargetSpec, target: Target) -> TargetSpec:
    """The target with every rank's own values, where its files have a place for them."""
    if target.stage != 3 or target.ranks != len(source.of_ranks):
        return spec
    origins = _origins(source, spec)
    return replace(
        spec,
        of_ranks=tuple(
            RankState(
                {key: value for key, value in rank.client_state.items() if key not in OWN_STATE},
                {name: rank.module[origin] for name, origin in origins.items() if origin in rank.module},
            )
            for rank in source.of_ranks
        ),
    )


def _origins(source: Source, spec: TargetSpec) -> dict[str, str]:
    """Of what the target's state dict holds as it is in the source's first rank: name -> its name there."""
    held = {**source.buffers, **source.extras}
    by_value = {id(value): name for name, value in held.items() if isinstance(value, torch.Tensor)}
    found: dict[str, str] = {}
    for name, value in {**spec.buffers, **spec.extras}.items():
        origin = name if name in held and held[name] is value else by_value.get(id(value))
        if origin is not None:
            found[name] = origin
    return found


def first_ranks(source: Source, spec: TargetSpec, target: Target) -> list[str]:
    """Which values of single ranks the target does not hold, in a sentence."""
    if spec.of_ranks or len(source.of_ranks) < 2 or target.format == "hub":
        return []
    names = _differ([rank.client_state for rank in source.of_ranks]) - {*OWN_STATE}
    names |= _differ([rank.module for rank in source.of_ranks])
    count = len(source.of_ranks)
    return [
        f"the first rank's for all ranks: {some(sorted(map(str, names)), 4)} (client state, buffers), of which the "
        f"source's {count} ranks keep their own; only ZeRO stage 3 on {count} ranks has a place for each"
    ] if names else []  # fmt: skip


def _differ(ranks: list[Mapping[str, Any]]) -> set[str]:
    """Keys that a rank has otherwise than the first, or only one of both has."""
    first, found = ranks[0], set[str]()
    for other in ranks[1:]:
        keys = (first.keys() | other.keys()) - found
        found |= {k for k in keys if (k in first) != (k in other) or not equal(first[k], other[k])}
    return found
