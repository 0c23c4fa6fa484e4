"""The target of a growth or a resharding for an expert-parallel engine, or for one that does not split its experts.

Refuses, as InvalidConfig, sizes that do not fit, and experts of deepspeed.moe.layer.MoE in native shards that do not
say over how many ranks they are split; as UnsupportedGrowth, what DeepSpeed's own names and orders are not known for.
"""

from __future__ import annotations

from dataclasses import replace

from bert2bert.checkpoints.expert_parallel.layout import CAPTURED, Block, ExpertParallel, blocks
from bert2bert.checkpoints.expert_parallel.writer import check
from bert2bert.checkpoints.job import TargetSpec
from bert2bert.checkpoints.source import Source
from bert2bert.checkpoints.target import Target
from bert2bert.errors import InvalidConfig, UnsupportedGrowth


def with_experts(spec: TargetSpec, source: Source, target: Target) -> TargetSpec:
    """The same target for an engine whose ranks share the experts as ``target`` says, or that does not split them."""
    kept = source.expert_parallel if target.groups in (None, "source") else None
    auto = [block for block in blocks(spec.shapes) if block.auto]
    if target.expert_parallel is None:
        return _whole(spec, source, kept, auto) if target.format == "zero" else spec
    size, world = target.expert_parallel, target.world_size or 1
    if source.expert_parallel and source.expert_parallel.data_first and 1 < size < world:
        raise UnsupportedGrowth(
            f"{source.path}: of a run with use_data_before_expert_parallelism, which places experts on other ranks "
            f"than the files that are written for {size} of {world} ranks.\nGive --expert-parallel {world} or 1, where "
            "both place them alike, or use --format universal."
        )
    last = _last(spec, source, kept)
    kind = str(spec.config.get("model_type"))
    if auto and not kept and kind not in CAPTURED:
        raise UnsupportedGrowth(
            f"{source.path}: how an AutoEP engine names the routers of {_called(spec)} is not known; known are "
            f"{', '.join(CAPTURED)}.\nGive the config of one of these, or leave --expert-parallel out."
        )
    captured = kind in CAPTURED or bool(kept and kept.captured)
    spec = replace(spec, expert_parallel=ExpertParallel(size, last, captured))
    check(spec, world)
    return spec


def _whole(spec: TargetSpec, source: Source, kept: ExpertParallel | None, auto: list[Block]) -> TargetSpec:
    """For an engine that does not split its experts: the order of groups that have been an expert-parallel engine's."""
    numbered = [block for block in blocks(spec.shapes) if not block.auto]
    if numbered:
        raise InvalidConfig(
            f"{source.path}: the experts of {numbered[0].prefix[:-1]} are those of a deepspeed.moe.layer.MoE, "
            "which loads expert-parallel files only.\nGive the number of ranks that share them (its ep_size): "
            "--expert-parallel N."
        )
    if not (auto and source.expert_parallel):
        return spec
    _last(spec, source, kept)
    return _in_model_order(spec, source, auto)


def _last(spec: TargetSpec, source: Source, kept: ExpertParallel | None) -> bool:
    """Whether the engine's groups have the routers last. kept: how the source is split, where its groups are kept.
    Raises UnsupportedGrowth where these are in neither order."""
    last = kept.last if kept else len(spec.groups) > 1
    if last is None:
        raise UnsupportedGrowth(
            f"{source.path}: its optimizer groups do not hold experts and routers in the order in which DeepSpeed puts "
            "them, so the order that the training script will expect is not known.\nChoose groups with --groups."
        )
    return last


def notes(spec: TargetSpec) -> list[str]:
    """What the training script must do for the engine's groups to be those that were written, in sentences."""
    if not spec.expert_parallel or not any(block.auto for block in blocks(spec.shapes)):
        return []
    lists = 'lists of parameters (with a "name" in each group)'
    given = lists if spec.expert_parallel.last else "model.parameters() as it is, not a list of it"
    return [
        f"for autoep_size {spec.expert_parallel.size}; the optimizer must be that of the ds_config, and "
        f"model_parameters {given}: DeepSpeed orders the groups by that"
    ]


def _called(spec: TargetSpec) -> str:
    return f"a {spec.config['model_type']}" if spec.config.get("model_type") else "a model without a config"


def _in_model_order(spec: TargetSpec, source: Source, auto: list[Block]) -> TargetSpec:
    """The tensors that an expert-parallel engine wrote in the order of the model that does not split its experts: the
    engine has every router before its experts, not every model has."""
    before = CAPTURED.get(str(spec.config.get("model_type")))
    if before is None:
        raise UnsupportedGrowth(
            f"{source.path}: whether {_called(spec)} has its routers before or after its experts is not known, and "
            f"native shards are addressed by position.\nGive a config with --source-config (known are "
            f"{', '.join(CAPTURED)}), or use --format universal, which goes by names."
        )
    if not before:
        return spec
    block_of = {name: block.prefix for block in auto for name in block.whole}
    routers = {f"{block.prefix}gate.weight": block.prefix for block in auto}

    def ordered(names: tuple[str, ...]) -> tuple[str, ...]:
        held: dict[str, list[str]] = {}
        for name in names:
            held.setdefault(block_of.get(name, ""), []).append(name)
        result: list[str] = []
        for name in names:
            if name in routers:
                result += held.pop(routers[name], [])
            if name not in block_of:
                result.append(name)
        return (*result, *(name for prefix, rest in held.items() if prefix for name in rest))

    shapes = {name: spec.shapes[name] for name in ordered(tuple(spec.shapes))}
    groups = tuple(replace(group, names=ordered(group.names)) for group in spec.groups)
    return replace(spec, shapes=shapes, groups=groups)
