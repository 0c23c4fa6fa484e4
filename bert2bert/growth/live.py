"""Growth in memory: a model of transformers is opened as a source, and the grown model is made of a plan.

The grown model is filled as `from_pretrained` fills one: its buffers are made for the new config, what is tied is one
parameter, and parameters that transformers would draw are an error. No file is read or written.

Refuses, as InvalidConfig, what is not a model or config of transformers; as InvalidCheckpoint, what `LiveSource`
refuses and parameters that the model ties and its config does not; as UnsupportedGrowth, a grown model that the
installed transformers does not know or that its class does not fit.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bert2bert.algebra.realise import values
from bert2bert.algebra.states import MOMENTS
from bert2bert.checkpoints.live import LiveSource
from bert2bert.checkpoints.spec import widest
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth
from bert2bert.growth.kin import frozen
from bert2bert.growth.opened import Growth
from bert2bert.growth.source_model import CheckpointModel, check_type, class_name, match, named_class, read_config
from bert2bert.tables import table_for

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def config_of(given: Any) -> dict[str, Any]:
    """A config as config.json holds it, of one in memory, a dict, or a path. Raises InvalidConfig."""
    import transformers

    if isinstance(given, str | PathLike):
        return read_config(Path(given))
    if isinstance(given, transformers.PreTrainedConfig):
        found: dict[str, Any] = json.loads(given.to_json_string())
    elif isinstance(given, Mapping):
        found = copy.deepcopy(dict(given))
    else:
        raise InvalidConfig(
            f"the config is a {type(given).__name__}; expected a config of transformers, a dict, or the path of a "
            "config.json"
        )
    check_type(found, "the config")
    return found


def open_live(model: Any, optimizer: torch.optim.Optimizer | None = None) -> CheckpointModel:
    """A model in memory matched with its config, which no file holds. Raises InvalidConfig, InvalidCheckpoint,
    UnsupportedGrowth."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        inner = next((name for name in ("module", "_orig_mod", "base_model") if hasattr(model, name)), None)
        raise InvalidConfig(
            f"the model is a {type(model).__module__}.{type(model).__name__}; expected a model of transformers "
            "(PreTrainedModel)" + (f", which may be its .{inner}" if inner else "")
        )
    config = config_of(model.config)
    config["architectures"] = [_known_class(model, config)]
    source = LiveSource(model, config, optimizer)
    found = match(source, config)
    ties = {found.stored(alias): found.stored(kept) for alias, kept in found.aliases().items()}
    for name, kept in source.tied.items():
        if ties.get(name, name) != ties.get(kept, kept):
            raise InvalidCheckpoint(
                f"{source.path}: {name} and {kept} are one parameter, which the config does not say "
                f"(tie_word_embeddings is {config.get('tie_word_embeddings')}): grown, they would be two.\nSay so in "
                "model.config, or give one of them a copy of its own."
            )
    return found


def _known_class(model: PreTrainedModel, config: Mapping[str, Any]) -> str:
    """The first class of a model that its table knows: a script's own class may rest on one."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((name for name in names if name in table_for(config).names.classes), names[0])


def _dtype(growth: Growth, name: str) -> torch.dtype:
    """Of a target tensor in memory: that of what it is made of, the widest of several; of one without a source, that
    of most of the source."""
    found = set(growth.dtypes(name)) or {_usual(growth.model)}
    result: torch.dtype = getattr(torch, "float64" if "float64" in found else widest(found))
    return result


def _usual(model: CheckpointModel) -> str:
    """The dtype of most of a model's elements, by torch's name."""
    elements: Counter[str] = Counter()
    for meta in model.source.tensors.values():
        elements[meta.dtype] += meta.numel
    return elements.most_common(1)[0][0]


def tensor(growth: Growth, name: str, state: str = "fp32") -> Tensor:
    """One whole tensor of the target, by canonical name, in its dtype; moments as they are computed, in float32, or in
    float64 where the tensor is of that."""
    dtype = _dtype(growth, name)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    shape = growth.plan.tensors[name].shape
    found = values(growth.plan, growth.reads, computed)(name, state, 0, shape[0] if shape else 1)
    return found if state in MOMENTS else found.to(dtype)


def names(growth: Growth) -> dict[str, str]:
    """Name in the class of the grown model -> canonical name, of every tensor; tied copies are left out."""
    return {class_name(growth.model.table, growth.plan.config, name): name for name in growth.plan.tensors}


def grown_model(growth: Growth, like: PreTrainedModel | None) -> PreTrainedModel:
    """The grown model, in eval mode, or as the model ``like``, of which it is grown: of its class, its mode, frozen
    as `kin.frozen` says, on its device, with its generation config.

    Raises UnsupportedGrowth, InvalidConfig.
    """
    import transformers

    state = {name: tensor(growth, canonical) for name, canonical in names(growth).items()}
    cls, hf = _class(growth, like)
    how = {} if like is None else _implementations(like)
    with quiet(transformers):
        grown, info = cls.from_pretrained(
            None, config=hf, state_dict=state, dtype=getattr(torch, _usual(growth.model)), output_loading_info=True,
            **how,
        )  # fmt: skip
    if wrong := {what: sorted(map(str, found)) for what, found in info.items() if found}:
        raise UnsupportedGrowth(
            f"the grown tensors do not fill a {cls.__name__} of transformers {transformers.__version__}: {wrong}"
        )
    with torch.no_grad():
        for name, parameter in grown.named_parameters():
            if parameter.dtype != state[name].dtype:
                parameter.data = state[name]
    grown.config.name_or_path = ""
    if like is not None:
        _as(like, growth, grown)
    result: PreTrainedModel = grown
    return result


def _as(like: PreTrainedModel, growth: Growth, grown: PreTrainedModel) -> None:
    """Give a grown model what its source has beside parameters and config."""
    canonical, still = names(growth), frozen(growth)
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(canonical[name] not in still)
    if grown.can_generate() and like.can_generate():
        grown.generation_config = copy.deepcopy(like.generation_config)
    grown.train(like.training)
    grown.to(like.device)  # type: ignore[arg-type]


def _implementations(like: PreTrainedModel) -> dict[str, Any]:
    """By which kernels a model runs its attention and experts."""
    found = {key: getattr(like.config, f"_{key}", None) for key in ("attn_implementation", "experts_implementation")}
    return {key: value for key, value in found.items() if value is not None}


def _class(growth: Growth, like: PreTrainedModel | None) -> tuple[Any, Any]:
    """Class and config of the grown model: the model's own, where the architecture stays."""
    import transformers

    config, version = dict(growth.plan.config), f"transformers {transformers.__version__}"
    kind, name = config["model_type"], named_class(config)
    cls: Any
    of: Any
    if like is not None and like.config.model_type == kind:
        cls, of = type(like), type(like.config)
    else:
        cls = getattr(transformers, name, None)
        if cls is None or kind not in transformers.CONFIG_MAPPING:
            raise UnsupportedGrowth(
                f"{version} has no class {name or 'for these heads'} of a {kind}.\nInstall a newer one, or write the "
                "grown checkpoint to disk."
            )
        of = transformers.CONFIG_MAPPING[kind]
    try:
        hf = of.from_dict(config)
    except Exception as error:  # its validators raise what they like
        raise InvalidConfig(f"{version} refuses the config of the grown model: {error}") from error
    try:
        inspect.signature(cls).bind(hf)
    except TypeError as error:
        raise UnsupportedGrowth(
            f"{cls.__name__} is not made of a config alone ({error}), so its grown model cannot be made. Grow a model "
            f"of transformers' own class, or take the tensors: plan(…).tensors()."
        ) from error
    return cls, hf


def fill_optimizer(growth: Growth, optimizer: torch.optim.Optimizer, grown: PreTrainedModel) -> None:
    """Give an optimizer of the grown model's parameters the grown moments and the steps of what each is made of; what
    has no source, or starts again by choice, stays without. Raises InvalidConfig, UnsupportedGrowth."""
    source, canonical = growth.model.source, names(growth)
    if not growth.model.trained:
        raise InvalidConfig(
            f"{source.path}: it holds no optimizer's moments; plan the growth with the optimizer that has taken steps"
        )
    own = {id(p): canonical[name] for name, p in grown.named_parameters()}
    known = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    if not known or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise UnsupportedGrowth(
            f"the moments are those of Adam; expected a torch.optim.Adam or AdamW without amsgrad, not {optimizer}"
        )
    for group, parameter in ((each, p) for each in optimizer.param_groups for p in each["params"]):
        if id(parameter) not in own:
            raise InvalidConfig(
                f"the optimizer has a parameter of shape {tuple(parameter.shape)} that is not the grown model's: "
                "expected an optimizer of its parameters"
            )
        name = own[id(parameter)]
        roots = [] if growth.plan.tensors[name].reset else growth.roots(name)
        step = max((source.step(growth.model.stored(root)) for root in roots), default=0)
        if step:
            moments = {m: tensor(growth, name, m).to(parameter) for m in MOMENTS}
            count = torch.tensor(float(step))
            if group.get("fused") or group.get("capturable"):  # whose kernels read it beside the parameter
                count = count.to(parameter.device, torch.float32)
            optimizer.state[parameter] = {"step": count, **moments}


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no remarks of a load that reads no file: what does not fill the model is an error here."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
