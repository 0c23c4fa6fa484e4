"""What DeepSpeed's ``*_model_states.pt`` say: names, shapes, frozen parameters, buffers, counters, client state.

ZeRO 1 and 2 write one such file, which also holds the low-precision weights; ZeRO 3 writes one a rank, without weights.
Native and universal checkpoints share them. ZeRO 0 has this file alone, with the torch optimizer's state and without a
word on which parameter is whose (see `stage0`). Refuses, as InvalidCheckpoint: files that are not of DeepSpeed, of
tensor or pipeline parallel runs, and ranks that contradict each other.

Longer than other modules: it reads one kind of file, whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.source import RankState, TensorMeta
from bert2bert.checkpoints.zero.wrapped import listed, with_wrappers
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_OWN_KEYS = {
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "frozen_param_fragments",
    "shared_params", "lr_scheduler", "data_sampler", "random_ltd", "dp_world_size", "mp_world_size",
    "checkpoint_parallel_dimensions", "ds_config", "ds_version", "universal_checkpoint_info", *COUNTERS,
    "num_experts", "ds_autoep_layers", "autoep_layers", "folding",
}  # fmt: skip
_RAW = {"module", "lr_scheduler", "data_sampler", "random_ltd", "ds_config"}
"""What may hold objects of any class; so may a user's client state, all that is not of `_OWN_KEYS`."""
EXTRA = "_extra_state"  # how the name ends of what a module keeps beside parameters and buffers
_SAME_ON_ALL_RANKS = ("ds_version", "dp_world_size", "mp_world_size", *COUNTERS)


def alike(paths: list[Path], values: list[Any], what: str) -> None:
    """Every file says the same, or InvalidCheckpoint names the first that differs from the first of all."""
    for path, value in zip(paths, values, strict=True):
        if value != values[0]:
            one, other = values[0], value
            if isinstance(one, list) and isinstance(other, list):  # long lists: just where they part
                at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
                one, other = (len(one), len(other)) if at is None else (one[at], other[at])
            raise InvalidCheckpoint(
                f"{path.parent}: files of different checkpoints are mixed: {what} is {one!r} in {paths[0].name} "
                f"and {other!r} in {path.name}. Restore the files of one save, or use another tag."
            )


def hyper(group: dict[str, Any]) -> dict[str, Any]:
    """An optimizer group of a file without its parameter indices; numbers kept as tensors become numbers."""
    plain = {k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for k, v in group.items()}
    return {key: value for key, value in plain.items() if key != "params"}


def optimizer_groups(
    param_groups: list[dict[str, Any]], shapes: list[dict[str, tuple[int, ...]]], path: Path
) -> tuple[list[dict[str, Any]], list[int]]:
    """Groups as hyper-parameters and "names", and the group of each flat group (one each, or sub-groups)."""
    owner = {flat: g for g, group in enumerate(param_groups) for flat in group["params"]}
    if sorted(owner) != list(range(len(shapes))):
        raise InvalidCheckpoint(
            f"{path}: its optimizer groups own the flat groups {sorted(owner)}, but the model-states file describes "
            f"{len(shapes)} of them: files of different checkpoints are mixed."
        )
    groups = [{**hyper(g), "names": [name for flat in g["params"] for name in shapes[flat]]} for g in param_groups]
    return groups, [owner[flat] for flat in range(len(shapes))]


def plain_scaler(states: dict[str, Any]) -> dict[str, Any] | None:
    """The loss scaler's attributes (scale, counters, hysteresis) from an optimizer file; None if it has none."""
    found = states.get("loss_scaler")
    return {k: v for k, v in found.items() if k not in ("class", "dtype")} if isinstance(found, dict) else None


def autoep_layers(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What a model-states file says of the blocks that DeepSpeed's AutoEP replaced; empty of any other run."""
    return list(found.get("ds_autoep_layers") or found.get("autoep_layers") or ())


def take(pieces: list[torch.Tensor], low: int, high: int) -> torch.Tensor:
    """Elements [low, high) of flat pieces that follow each other; a view where one piece covers them."""
    parts, base = [], 0
    for piece in pieces:
        begin, end = max(low, base), min(high, base + piece.numel())
        if begin < end:
            parts.append(piece[begin - base : end - base])
        base += piece.numel()
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else pieces[0][:0]


def _client_state(found: dict[str, Any]) -> dict[str, Any]:
    """What a script asked DeepSpeed to keep, and what DeepSpeed keeps of a script's data."""
    mine = {key: value for key, value in found.items() if key not in _OWN_KEYS}
    return mine | {key: found[key] for key in ("data_sampler", "random_ltd") if found.get(key) is not None}


class ModelStates:
    """The merged content of the model-states files of all ranks, in rank order.

    ``shapes``: parameters of each flat group (stage 3: sub-group), in flat order; ``frozen``: parameters that the
    optimizer does not own, with shapes; ``buffers``: persistent ones and other tensors of modules' own; ``extras``:
    what else the model's state dict holds (extra states of modules), of any type; ``order``: all names of that dict;
    ``optimizer``: the torch optimizer's state of ZeRO 0 (``whole``), where every parameter counts as frozen until `own`
    says whose it is.
    """

    def __init__(self, paths: list[Path], sharded: bool, whole: bool = False, manifest: Manifest | None = None) -> None:
        self.paths, self.sharded, self.whole = paths, sharded, whole
        self._written = () if manifest is None else tuple(manifest.tensors)
        loaded = torch_reader.load_all(paths, _OWN_KEYS - _RAW)
        self.ranks = [self._checked(path, found) for path, found in zip(paths, loaded, strict=True)]
        for key in _SAME_ON_ALL_RANKS:
            alike(paths, [rank.get(key) for rank in self.ranks], key)
        alike(paths, [len(rank["param_shapes"]) for rank in self.ranks], "number of flat groups")
        self.shapes: list[dict[str, tuple[int, ...]]] = self.ranks[0]["param_shapes"]
        for flat, _ in enumerate(self.shapes):
            alike(paths, [list(rank["param_shapes"][flat].items()) for rank in self.ranks], "list of parameters")
        first = self.ranks[0]
        held = first.get("module") or {}
        self.module = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in held.items()}
        self.order = list(self.module)
        self.optimizer: Any = first.get("optimizer")
        self.world_size: int = int(first.get("dp_world_size") or 1)
        self.ds_config: dict[str, Any] = first.get("ds_config") or {}
        self.ds_version = first.get("ds_version")
        self.counters = {key: int(first.get(key) or 0) for key in COUNTERS}
        self.lr_scheduler = first.get("lr_scheduler")
        self.client_state = _client_state(first)
        named = [name for name in first.get("buffer_names") or () if name in self.module]
        self.buffers: dict[str, Any] = {name: self.module[name] for name in named}
        self.extras: dict[str, Any] = {}
        self.flat_names = {name for group in self.shapes for name in group}
        self.aliases: dict[str, str] = {}
        self.frozen: dict[str, tuple[int, ...]] = {}
        self.lists_frozen = first.get("frozen_param_shapes") is not None
        self.frozen_later: tuple[str, ...] = ()
        self.unlisted: tuple[str, ...] = ()
        self._untrained: list[str] = []  # of the extras
        self.unread: tuple[str, ...] = ()
        self.second_names: dict[str, tuple[str, Any]] = {}
        self._sort_out_the_rest()

    def of_ranks(self) -> tuple[RankState, ...]:
        """ZeRO 3: what each rank's file says of client state, buffers and extras."""
        names = (*self.buffers, *self.extras)
        return tuple(
            RankState(_client_state(found), {name: found["module"][name] for name in names if name in found["module"]})
            for found in (self.ranks if self.sharded else ())
        )

    def renamed(self, name: str) -> str:
        """The model's own name of what the files call ``name``."""
        return name

    def _checked(self, path: Path, found: Any) -> dict[str, Any]:
        if not isinstance(found, dict) or "param_shapes" not in found:
            raise InvalidCheckpoint(f"{path}: no DeepSpeed model-states file, it has no 'param_shapes'")
        if (found["param_shapes"] is None) != self.whole:
            raise InvalidCheckpoint(
                f"{path}: of ZeRO stage 0, which keeps no partitions, beside optimizer shards or other ranks' files: "
                "files of different checkpoints are mixed. Restore the files of one save, or use another tag."
            )
        if self.whole:
            found = {**found, "param_shapes": []}
        if isinstance(found.get("module"), dict):
            found = {**found, "module": with_wrappers(found["module"], [*self._written, *listed(found)])}
        dims = found.get("checkpoint_parallel_dimensions") or {}
        split = max(int(found.get("mp_world_size") or 1), *(int(dims.get(k) or 1) for k in ("pp_degree", "tp_degree")))
        if split > 1:
            raise InvalidCheckpoint(
                f"{path}: of a model split {split} ways by tensor or pipeline parallelism, which this program does not "
                "read. Merge it first (DeepSpeed's zero_to_fp32.py, then save_pretrained)."
            )
        for layer in autoep_layers(found):
            if layer.get("checkpoint_format") == "zero3_partitioned":
                raise InvalidCheckpoint(
                    f"{path}: AutoEP with ZeRO-3-partitioned experts (checkpoint format "
                    f"{layer.get('checkpoint_format_version')}): every rank's shapes are those of its own experts, "
                    "which this program does not read. Expected AutoEP of ZeRO stage 1 or 2, which writes a file for "
                    "each expert: save the model from such a run."
                )
        return found

    def _sort_out_the_rest(self) -> None:
        """Which names of the state dict are tied, which frozen, which neither, and which lack values."""
        recorded = self.ranks[0].get("frozen_param_shapes")
        fragments = {name: tuple(shape) for name, shape in (recorded or {}).items() if name not in self.flat_names}
        self.frozen_later = tuple(name for name in recorded or () if name in self.flat_names)
        shared = {
            absent: kept
            for absent, kept in (self.ranks[0].get("shared_params") or {}).items()
            if self.sharded or absent not in self.module or self.module[absent].numel()
        }  # DeepSpeed takes all parameters without elements for one
        named = set(self.buffers)
        known = self.flat_names | named | shared.keys()
        rest = [name for name in self.order if name not in known]
        # Where the file lists the frozen ones, or leaves them out on purpose (exclude_frozen_parameters), the rest is
        # of no parameter. Stages 0 and 1 do not list them.
        listed = recorded is not None or ("frozen_param_shapes" in self.ranks[0] and self._config_stage() >= 2)
        if self.sharded:
            self.frozen = fragments
            rest = [name for name in rest if name not in fragments]
            self.extras = {name: self.module[name] for name in rest if self._is_extra(name, listed=False)}
            valued = self.flat_names | fragments.keys()
            tied = [name for pair in shared.items() if valued.isdisjoint(pair) for name in pair]
            rest += [name for name in tied if name in self.module and name not in rest]
            self.unread = tuple(name for name in rest if name not in self.extras)
        else:  # the values are here; two names of one memory are tied (DeepSpeed misses those of shared modules)
            at = {self._memory(n): n for n in reversed(self.order) if n in self.flat_names or n in rest}
            at |= {self._memory(name): name for name in named}  # of which DeepSpeed lists one name only
            for name in rest:
                if (kept := at[self._memory(name)]) in named:
                    self.buffers[name] = self.module[name]
                elif kept != name and not name.endswith(EXTRA):
                    shared[name] = kept
                elif self._is_extra(name, listed and name not in fragments):
                    self.extras[name] = self.module[name]
                else:
                    self.frozen[name] = tuple(self.module[name].shape)
            self._find_untrained(recorded)
            self._find_dropped(fragments)
        odd = [n for n, v in self.extras.items() if isinstance(v, torch.Tensor) and not n.endswith(EXTRA)]
        self.unlisted = tuple(name for name in odd if not self.sharded and name not in self._untrained)
        for name in odd:
            self.buffers[name] = self.extras.pop(name)  # what is written lists it, which tells it from frozen ones
        have = self.flat_names | self.frozen.keys()
        for absent, kept in shared.items():
            if (absent in have) != (kept in have):
                self.aliases.update({absent: kept} if kept in have else {kept: absent})
        # exclude_frozen_parameters takes the first name of a tied frozen tensor out of the file, not the second.
        self.second_names = {
            name: (kept, self.module[name])
            for name, kept in shared.items()
            if not {name, kept} & have and self._has_values(name)
        }

    def _find_untrained(self, recorded: Mapping[str, Any] | None) -> None:
        """Of the extras, parameters that the run kept out of its optimizer without freezing them, which no list of the
        file has. They are told from tensors of modules' own by their names, which end as those of this model's other
        parameters do (weight, bias). They count as frozen. But where the frozen ones were left out, they stay among
        the extras: once a file has the list, an engine looks there for all that it has frozen."""
        kinds = {name.rpartition(".")[2] for name in (*self.flat_names, *(recorded or ()))}
        tensors = (name for name, value in self.extras.items() if isinstance(value, torch.Tensor))
        self._untrained = [name for name in tensors if name.rpartition(".")[2] in kinds]
        if recorded is not None:
            self.frozen |= {name: tuple(self.extras.pop(name).shape) for name in self._untrained}

    def _find_dropped(self, fragments: Mapping[str, tuple[int, ...]]) -> None:
        """Frozen parameters that the model leaves out of its state dict, as scripts do with a tower that never changes:
        stage 2 keeps their values beside it. (Frozen experts are elsewhere.)"""
        values = {} if self.ranks[0].get("num_experts") else self.ranks[0].get("frozen_param_fragments") or {}
        for name, shape in fragments.items():
            value = values.get(name)
            if name not in self.module and isinstance(value, torch.Tensor) and tuple(value.shape) == shape:
                self.module[name] = value.detach()
                self.frozen[name] = shape

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parameters without optimizer state of which the files do not say that they are frozen."""
        recorded = self.ranks[0].get("frozen_param_shapes") or ()
        found = [name for name, shape in self.frozen.items() if name not in recorded and 0 not in shape]
        return tuple(dict.fromkeys([*found, *self._untrained]))

    def _has_values(self, name: str) -> bool:
        value = self.module.get(name)
        return isinstance(value, torch.Tensor) and value.numel() > 0

    def _is_extra(self, name: str, listed: bool) -> bool:
        """Whether a name of the state dict, of no trained parameter and no buffer, is of no frozen parameter either.
        ``listed``: by the file's own list of these."""
        value = self.module[name]
        if not isinstance(value, torch.Tensor) or name.endswith(EXTRA):
            return True
        return value.numel() > 0 if self.sharded else listed  # stage 3 leaves parameters without elements in the dict

    def _config_stage(self) -> int:
        zero = self.ds_config.get("zero_optimization")
        stage = zero.get("stage") if isinstance(zero, dict) else None
        return stage if isinstance(stage, int) else 0

    def own(self, groups: list[list[str]]) -> None:
        """ZeRO 0: these parameters (of ``frozen``) are the optimizer's, group by group."""
        self.shapes = [{name: self.frozen.pop(name) for name in names} for names in groups]
        self.flat_names = {name for names in groups for name in names}

    def _memory(self, name: str) -> tuple[Any, ...]:
        tensor = self.module[name]
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            return (name,)
        return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype

    def frozen_pieces(self, name: str) -> list[torch.Tensor]:
        """A frozen parameter's flat values, in order: one piece, or (stage 3) one a rank, padding cut off."""
        if not self.sharded:
            return [self.module[name].reshape(-1)]
        numel = math.prod(self.frozen[name])
        cut = -(-numel // self.world_size)
        pieces = []
        for rank, states in enumerate(self.ranks):
            piece = (states.get("frozen_param_fragments") or {}).get(name)
            want = max(0, min(cut, numel - rank * cut))
            if not isinstance(piece, torch.Tensor) or piece.numel() < want:
                raise InvalidCheckpoint(f"{self.paths[rank]}: lacks its {want} elements of the frozen '{name}'")
            pieces.append(piece.reshape(-1)[:want])
        return pieces

    def clip_grad(self) -> float | None:
        """The run's gradient clipping by its ds_config; None if that does not say."""
        found = self.ds_config.get("gradient_clipping")
        return float(found) if isinstance(found, int | float) else None

    def precision(self) -> str:
        """ "fp32", "bf16" or "fp16" of the engine that wrote this: from its ds_config; where the file has none (older
        DeepSpeeds), from the trained weights."""
        for key in ("bf16", "fp16", "bfloat16"):
            section = self.ds_config.get(key)
            if isinstance(section, dict) and str(section.get("enabled")).lower() in ("true", "1"):
                return "bf16" if key.startswith("b") else "fp16"
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        values = [self.module.get(name) for name in self.flat_names or self.frozen] if not self.ds_config else []
        found = {kinds.get(value.dtype, "fp32") for value in values if isinstance(value, torch.Tensor)}
        return found.pop() if len(found) == 1 else "fp32"

    def describe(
        self, groups: list[dict[str, Any]], dtype: Callable[[str], torch.dtype]
    ) -> tuple[dict[str, TensorMeta], dict[str, list[torch.Tensor]]]:
        """Every tensor's description, in the model's order, and the flat pieces of the frozen ones.

        ``groups``: optimizer groups with their "names"; ``dtype(name)``: of a trainable tensor's master.
        """
        shape = {name: shape for shapes in self.shapes for name, shape in shapes.items()}
        group = {name: g for g, entry in enumerate(groups) for name in entry["names"]}
        frozen = {name: self.frozen_pieces(name) for name in self.frozen}
        tensors = {}
        for name in self.in_order(set(shape) | set(frozen)):
            if name in shape:
                tensors[name] = TensorMeta(name, shape[name], str(dtype(name))[6:], group[name], True)
            else:
                kept = frozen[name][0].dtype
                tensors[name] = TensorMeta(name, self.frozen[name], str(kept)[6:], None, False)
        return tensors, frozen

    def in_order(self, names: set[str]) -> list[str]:
        """The names in the order of the model's state dict; those it lacks follow in flat order."""
        known = [name for name in self.order if name in names]
        seen = set(known)
        return known + [n for n in [*(m for g in self.shapes for m in g), *self.frozen] if n in names and n not in seen]
