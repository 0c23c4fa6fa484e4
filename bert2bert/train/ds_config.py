"""A user's ds_config made to agree with a recipe: batch sizes and clipping filled in; what would not be obeyed or would
corrupt a checkpoint refused.

DeepSpeed ignores top-level keys that it does not know, so a misspelt one would silently do nothing: the keys are closed
here. The optimizer, its schedule and clipping belong to the recipe; precision, ZeRO stage, micro-batch, communication
and offload to the ds_config. Every refusal is an `InvalidConfig` naming key, value and remedy. Imports no torch.
Longer than other modules: the list of what is refused is one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.expert_parallel.layout import CAPTURED
from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.model.registry import typed
from bert2bert.recipe import Recipe
from bert2bert.tables import table_for

_RECIPE = "it belongs to the recipe ({}); remove it here"
_UNUSED = "this model has no use for it, so it would do nothing; remove it"

ALLOWED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "data_types",
    "expert_parallel",
    "zero_allow_untested_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "disable_python_gc",
    "wandb",
    "comet",
    "csv_monitor",
    "log_level",
    "aio",
)

REFUSED = {
    "optimizer": _RECIPE.format("recipe.optimizer"),
    "scheduler": _RECIPE.format("recipe.phases.N.schedule"),
    "tensorboard": "the run folder's TensorBoard files are written already; remove it",
    "zero_force_ds_cpu_optimizer": "DeepSpeed's CPU Adam cannot leave a resting layer alone; remove it",
    "steps_per_print": "progress is reported by the run itself (recipe.log_every); remove it",
    "checkpoint": "how a checkpoint is loaded is found from the checkpoint, and it is written behind training by --set "
    "checkpoint_async=true (DeepSpeed's decoupled writer fails at ZeRO-1 and 2); remove it",
    "timeout": "how long ranks wait for each other is given by --timeout SECONDS; remove it",
    "autotuning": "it runs other settings than the file says; tune apart, then write the result here",
    "torch_autocast": "the growth of its checkpoints is untested; use bf16 or fp16",
    "pipeline": _UNUSED,
    "activation_checkpointing": "its options are for models that call deepspeed.checkpointing; to compute blocks again "
    "in the backward pass, run with --activation_checkpointing; remove it here",
    **dict.fromkeys(("tensor_parallel", "hybrid_engine", "weight_quantization"), _UNUSED),
    "data_efficiency": _RECIPE.format("recipe.data"),
    "dataloader_drop_last": _RECIPE.format("recipe.data"),
}

_DROP = "remove it"
REMOVED = {  # DeepSpeed stops at these keys whatever their value, {"enabled": false} included
    "nebula": "checkpoints are written by this project; remove it",
    "compression_training": _DROP,
    "amp": "use bf16 or fp16, which keep fp32 master weights",
    "quantize_training": _DROP,
    "sparse_gradients": _DROP,
    "eigenvalue": _DROP,
    "sparse_attention": _DROP,
    "elasticity": "a run can be resumed on any number of ranks without it; remove it",
    "graph_harvesting": _DROP,
    "curriculum_learning": _RECIPE.format("recipe.data"),
    "progressive_layer_drop": "which layers run is the recipe's phases.N.program; remove it",
}
REMOVED_ZERO = {
    "mics_shard_size": "use stage 3 without it",
    "mics_hierarchical_params_gather": "use stage 3 without it",
    "zeropp_loco_param": _DROP,
}

_PARTITION = "checkpoints written with it hold partitions that this project cannot check; remove it"
REFUSED_ZERO = {
    "round_robin_gradients": "DeepSpeed 0.19 then addresses checkpoint slices in another order than it says, and "
    "weights are lost in silence; remove it",
    "elastic_checkpoint": "DeepSpeed 0.19 writes such checkpoints but cannot load them; any world size can be resumed "
    "without it through a universal checkpoint; remove it",
    "zenflow": _PARTITION,
    "zero_quantized_weights": _PARTITION,
    "zero_quantized_nontrainable_weights": _PARTITION,
    "zero_quantized_gradients": _PARTITION,
    "cpu_offload": 'it is deprecated; write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'it is deprecated; write "offload_param": {"device": "cpu"}',
}

TRUE_ZERO = {
    "ignore_unused_parameters": "a sub-model leaves layers unused in a step, and DeepSpeed would stop there",
    "compute_grad_norm": "by that norm a run knows which steps would spoil the model (recipe.safety)",
}

_AUTOEP = ("enabled", "autoep_size", "use_grouped_mm", "disable_triton_grouped_mm", "combine_impl", "gate_up_impl")
_MASTERS = ("bf16_master_weights_and_grads", "bf16_optimizer_states", "fp16_master_weights_and_grads")


def read(path: str | Path) -> dict[str, Any]:
    """The JSON of a ds_config file; InvalidConfig when it cannot be read as an object."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig(f"no ds_config {path}: {error}; expected a DeepSpeed JSON file, see ds_configs/") from error
    except ValueError as error:
        raise InvalidConfig(f"ds_config {path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidConfig(f"ds_config {path} holds a {type(config).__name__}; expected a JSON object")
    return config


def resolve(ds_config: dict[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """A copy of ``ds_config`` that agrees with the recipe on ``world_size`` ranks.

    Filled in: train_batch_size (the recipe's global_batch_size), gradient_accumulation_steps, gradient_clipping,
    zero_allow_untested_optimizer (the optimizer is a subclass of torch's AdamW). InvalidConfig for everything refused.
    """
    config = copy.deepcopy(ds_config)
    for key, value in config.items():
        if key in REMOVED:
            raise InvalidConfig(f"ds_config: {key!r} was removed in DeepSpeed 0.19.8: {REMOVED[key]}")
        if key in REFUSED and not _off(value):
            raise InvalidConfig(f"ds_config: {key!r}: {REFUSED[key]}")
        if key not in REFUSED and key not in ALLOWED:
            raise InvalidConfig(f"ds_config: unknown key {key!r}: {did_you_mean(key, ALLOWED)}")
    precision = _precision(config)
    _check_zero(config, precision)
    _check_experts(config, recipe, world_size)
    _fill_batch(config, recipe, world_size)
    clip = config.setdefault("gradient_clipping", recipe.gradient_clipping)
    if clip != recipe.gradient_clipping:
        raise InvalidConfig(
            f"ds_config: gradient_clipping is {clip!r}, the recipe's is {recipe.gradient_clipping}; remove it here, or "
            f"run with --set gradient_clipping={clip}"
        )
    if config.setdefault("zero_allow_untested_optimizer", True) is not True:
        raise InvalidConfig(
            "ds_config: zero_allow_untested_optimizer is not true; DeepSpeed counts the subclass of torch's AdamW that "
            "leaves frozen layers alone as untested; set it to true or remove it"
        )
    return config


def of_phase(ds_config: Mapping[str, Any], recipe: Recipe, index: int, world_size: int) -> dict[str, Any]:
    """`resolve` for one phase of a recipe. Experts are split where the phase's model has some; before it grows into a
    mixture, it has none to split."""
    own = dict(ds_config)
    mixtures = ["experts" in table_for(typed(model)).axis_sizes(model) for model in recipe.models]
    if "expert_parallel" in own and any(mixtures) and not mixtures[index]:
        del own["expert_parallel"]
    return resolve(own, recipe.at(index), world_size)


def stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a ds_config."""
    return int((settings.get("zero_optimization") or {}).get("stage", 0))


def precision(settings: Mapping[str, Any]) -> str:
    """'fp32', 'bf16' or 'fp16', of a ds_config that `resolve` has checked."""
    return _precision(dict(settings))


def _off(value: Any) -> bool:
    return value in (None, False) or (isinstance(value, dict) and value.get("enabled") is False)


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key, {})
    if not isinstance(value, dict):
        raise InvalidConfig(f"ds_config: {key} is {value!r}; expected an object")
    return value


def _precision(config: dict[str, Any]) -> str:
    """'fp32', 'bf16' or 'fp16'."""
    on = []
    for kind in ("bf16", "fp16"):
        section = _section(config, kind)
        if section.get("enabled", False) not in (True, False):
            raise InvalidConfig(f"ds_config: {kind}.enabled is {section['enabled']!r}; expected true or false")
        if section.get("enabled"):
            on.append(kind)
        for key in _MASTERS:
            if section.get(key):
                raise InvalidConfig(f"ds_config: {kind}.{key}: no fp32 master weights would be kept to grow; remove it")
    if len(on) == 2:
        raise InvalidConfig("ds_config: bf16 and fp16 are both enabled; enable one, or neither for fp32")
    return on[0] if on else "fp32"


def _check_zero(config: dict[str, Any], precision: str) -> None:
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise InvalidConfig(f"ds_config: zero_optimization.stage is {stage!r}; expected 0, 1, 2 or 3")
    for key in sorted(zero.keys() & REMOVED_ZERO.keys()):
        raise InvalidConfig(f"ds_config: zero_optimization.{key} was removed in DeepSpeed 0.19.8: {REMOVED_ZERO[key]}")
    for key, reason in REFUSED_ZERO.items():
        if not _off(zero.get(key)):
            raise InvalidConfig(f"ds_config: zero_optimization.{key}: {reason}")
    if (size := zero.get("zero_hpz_partition_size", 1)) != 1:
        raise InvalidConfig(f"ds_config: zero_optimization.zero_hpz_partition_size is {size!r}: {_PARTITION}")
    for key, reason in TRUE_ZERO.items():
        if zero.get(key, True) is not True:
            raise InvalidConfig(f"ds_config: zero_optimization.{key} is not true; {reason}; remove it")
    for key in ("offload_optimizer", "offload_param"):
        offload = _section(zero, key) if zero.get(key) is not None else {}
        if offload.get("device") == "nvme":
            raise InvalidConfig(
                f"ds_config: zero_optimization.{key}.device is 'nvme'; what was loaded could not be compared with the "
                "checkpoint; use 'cpu' or remove it"
            )
    _check_types(_section(config, "data_types"), precision, stage)


def _check_types(types: dict[str, Any], precision: str, stage: int) -> None:
    """``keep_in_fp32_modules`` is about buffers alone, saved in the dtype that the engine holds."""
    for key in types:
        if key not in ("grad_accum_dtype", "keep_in_fp32_modules"):
            raise InvalidConfig(
                f"ds_config: data_types.{key} is untested here; only grad_accum_dtype and keep_in_fp32_modules may be "
                "set; remove it"
            )
    keep = types.get("keep_in_fp32_modules", "auto")
    if keep != "auto" and not (isinstance(keep, list) and all(isinstance(name, str) for name in keep)):
        raise InvalidConfig(
            f"ds_config: data_types.keep_in_fp32_modules is {keep!r}; expected 'auto' or patterns of buffers' names"
        )
    if precision == "bf16" and stage == 1 and types.get("grad_accum_dtype") == "fp32":
        raise InvalidConfig(
            "ds_config: data_types.grad_accum_dtype is 'fp32' with bf16 and ZeRO stage 1; DeepSpeed then takes another "
            "optimizer wrapper, whose checkpoints do not name their stage; use stage 2, or remove data_types"
        )


def expert_ranks(config: Mapping[str, Any]) -> int | None:
    """How many ranks share the experts of a mixture under a ds_config that `resolve` gave; None: each has all."""
    section = config.get("expert_parallel")
    return int(section["autoep_size"]) if section else None


def _check_experts(config: dict[str, Any], recipe: Recipe, world_size: int) -> None:
    """AutoEP: what it does not run for, or what this project does not know of the checkpoints that it writes."""
    if _off(config.get("expert_parallel")) or not config["expert_parallel"]:
        config.pop("expert_parallel", None)
        return
    section = _section(config, "expert_parallel")
    if section.get("enabled") is not True:
        raise InvalidConfig(f"ds_config: expert_parallel.enabled is {section.get('enabled')!r}; expected true or false")
    for key in section:
        if key not in _AUTOEP:
            raise InvalidConfig(f"ds_config: expert_parallel.{key} is untested here; {did_you_mean(key, _AUTOEP)}")
    model = recipe.model or {}
    if (kind := str(model.get("model_type", "bert"))) not in CAPTURED:
        raise InvalidConfig(
            f"ds_config: expert_parallel: a {kind} has no experts that DeepSpeed's AutoEP splits; it splits those of "
            f"{', '.join(CAPTURED)}; remove it"
        )
    zero = _section(config, "zero_optimization")
    if (stage := zero.get("stage", 0)) not in (1, 2):
        raise InvalidConfig(
            f"ds_config: expert_parallel with zero_optimization.stage {stage}; AutoEP's checkpoints are read and "
            "written for stages 1 and 2; use one of them, or remove expert_parallel: every rank then has all experts"
        )
    if offload := [key for key in ("offload_optimizer", "offload_param") if not _off(zero.get(key))]:
        raise InvalidConfig(f"ds_config: zero_optimization.{offload[0]} with expert_parallel is untested; remove one")
    for key, only in (("hidden_act", "silu"), ("router_jitter_noise", 0.0)):
        if model.get(key, only) != only:
            raise InvalidConfig(
                f"ds_config: expert_parallel: model.{key} is {model[key]!r}; AutoEP computes {only!r} alone; remove it"
            )
    size, experts = section.setdefault("autoep_size", 1), table_for(model).axis_sizes(model)["experts"]
    for count, what in ((world_size, "ranks"), (experts, "experts of a layer")):
        if type(size) is not int or size < 1 or count % size:
            raise InvalidConfig(
                f"ds_config: expert_parallel.autoep_size is {size!r}, which does not divide the {count} {what}; choose "
                f"one of {', '.join(str(n) for n in range(1, count + 1) if count % n == 0)}"
            )


def _divisors(number: int, near: int) -> str:
    """The divisors of a number in words, at most eight, those nearest to ``near``."""
    found = [n for n in range(1, number + 1) if number % n == 0]
    nearest = sorted(sorted(found, key=lambda n: abs(n - near))[:8])
    head = [str(n) for n in nearest]
    return head[0] if len(head) == 1 else f"{', '.join(head[:-1])} or {head[-1]}"


def _fill_batch(config: dict[str, Any], recipe: Recipe, world_size: int) -> None:
    key = "train_micro_batch_size_per_gpu"
    micro = config.get(key)
    if type(micro) is not int or micro < 1:
        raise InvalidConfig(
            f"ds_config: {key} is {micro!r}; expected the rows of one micro-batch of one rank, at least 1"
        )
    rows = recipe.global_batch_size
    if rows % (micro * world_size):
        ranks = "" if rows % micro else f"{_divisors(rows // micro, world_size)} ranks with {key} {micro}"
        if rows % world_size:
            remedy = f"run on a number of ranks that divides {rows}" + (f": {ranks}" if ranks else "")
        else:
            remedy = f"set {key} to a divisor of {rows // world_size}: {_divisors(rows // world_size, micro)}"
            remedy += f"; or run on {ranks}" if ranks else ""
        raise InvalidConfig(
            f"ds_config: {key} is {micro}; on {world_size} ranks that makes {micro * world_size} rows, which do not "
            f"divide the recipe's global_batch_size, {rows}; {remedy}"
        )
    derived = {"train_batch_size": rows, "gradient_accumulation_steps": rows // (micro * world_size)}
    for name, value in derived.items():
        if config.setdefault(name, value) != value:
            raise InvalidConfig(
                f"ds_config: {name} is {config[name]!r}, but the recipe's global_batch_size, {rows}, on {world_size} "
                f"ranks with {key} {micro} makes it {value}; remove it here"
            )
