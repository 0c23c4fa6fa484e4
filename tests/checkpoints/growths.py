"""A suitable target of every operator, and where an operator is not defined: tables for test_operators_engines.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.commands.learn import Fit
from bert2bert.growth.source_model import CheckpointModel
from bert2bert.measure.drift import whole
from bert2bert.operators import width_ligo
from bert2bert.tables import table_for
from tests import tiny
from tests.planning import plan_growth

FAMILIES = sorted(tiny.VARIANTS)


@dataclass(frozen=True)
class Growth:
    """An operator and a target that suits it. times, plus: how the sizes of axes change, 'depth' being every axis that
    numbers layers (an axis that a family does not have is left out); keys: config keys set; how: of `plan_growth`. A
    '{file}' in the text stands for a file made for the family by `MADE`."""

    kind: str
    text: str
    times: Mapping[str, float] = field(default_factory=dict)
    plus: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    how: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = [f"{axis}x{by}" for axis, by in self.times.items()] + [f"{a}+{by}" for a, by in self.plus.items()]
        return "-".join([self.kind, re.sub(r":\w+=\{file\}", "", self.text), *sizes])

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]

    def target(self, config: dict[str, Any]) -> dict[str, Any]:
        """The target config for a source of this config."""
        if self.name == "upcycle":
            return experts_of(config)
        table = table_for(config)
        sizes, changes = table.axis_sizes(config), {}
        for axis in (a for a in (*self.times, *self.plus)):
            for one in table.sizes.depth if axis == "depth" else [axis]:
                if one in table.sizes.axes:
                    changes[one] = round(sizes[one] * self.times.get(axis, 1)) + self.plus.get(axis, 0)
        deeper = any(axis in changes for axis in table.sizes.depth)
        return table.resize(config, changes) | ({"layer_types": None} if deeper else {}) | dict(self.keys)

    def options(self, file: Path) -> dict[str, Any]:
        """Of `plan_growth` and of `grow`."""
        return {"seed": 3, **self.how, self.kind: self.text.replace("{file}", str(file))}

    def plan(self, model: CheckpointModel, file: Path) -> GrowthPlan:
        target = self.target(model.config)
        if "{file}" in self.text and not file.exists():
            MADE[self.name](model, target, file)
        return plan_growth(model.config, target, heads=model.heads, **self.options(file))


def experts_of(config: dict[str, Any]) -> dict[str, Any]:
    """A mixture of experts of a dense model's sizes: a Qwen3's of its own kind, of others a Mixtral."""
    name = "qwen3_moe" if config["model_type"] == "qwen3" else "mixtral"
    shared = {*tiny.VARIANTS[name].base, "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings"}
    kept = {key: config[key] for key in (shared & config.keys()) - {"model_type"}}
    ffn = {"moe_intermediate_size": config.get("intermediate_size")} if name == "qwen3_moe" else {}
    return tiny.config_of(name) | kept | ffn


def new_rows(model: CheckpointModel, target: dict[str, Any], file: Path) -> None:
    """Rows of the new tokens, drawn."""
    new = table_for(target).axis_sizes(target)["vocab"] - model.table.axis_sizes(model.config)["vocab"]
    width = model.table.axis_sizes(model.config)["embed"]
    with file.open("wb") as f:
        np.save(f, np.random.default_rng(0).normal(size=(new, width)))


def learned_maps(model: CheckpointModel, target: dict[str, Any], file: Path) -> None:
    """Maps as at the start of a fit, with much noise."""
    fit = Fit(model.config, target, whole(model), model.heads, noise=0.5)
    width_ligo.save(file, {name: matrix.numpy() for name, matrix in fit.maps.items()}, fit.about)


MADE = {"given": new_rows, "ligo": learned_maps}
DOUBLE = {"embed": 2}
HALF = {"embed": 0.5, "kv": 1, "ffn": 1, "shared": 1}  # heads as many as the width has room for
HALF_AS_WIDE_AGAIN = {"embed": 1.5, "kv": 1, "ffn": 1, "shared": 1}
HEADS = {"embed": 2, "qk": 2, "heads": 1, "kv": 1}  # twice as large, not twice as many
DEEPER, SHALLOW = {"depth": 2}, {"depth": 0.4}

GROWTHS = [
    *(
        Growth("width", name, DOUBLE)
        for name in ("fpi", "aki", "direct", "random", "tile", "net2net", "staged", "lemon")
    ),
    Growth("width", "lemon", HALF_AS_WIDE_AGAIN),
    Growth("width", "gesmundo", DOUBLE),
    Growth("width", "gesmundo", {"ffn": 2, "kv": 2}),
    Growth("width", "hyperclone:noise=0.1", DOUBLE),
    Growth("width", "hyperclone", HEADS),
    *(Growth("depth", name, DEEPER) for name in ("stack", "gstack", "interleave:scale=step", "unshare")),
    *(Growth("depth", name, plus={"depth": 2}) for name in ("interpolate", "gopher", "insert_identity", "random")),
    Growth("depth", "upscale", plus={"layers": 1}),
    *(Growth("depth", name, plus={"depth": 1}) for name in ("top", "middle")),
    *(Growth("width", name, DOUBLE) for name in ("centre", "sparkling", "msg", "ligo:maps={file}")),
    Growth("width", "decoalesce", DOUBLE),
    *(Growth("width", name, HALF) for name in ("coalesce", "shrink")),
    Growth("depth", "decoalesce", DEEPER),
    *(Growth("depth", name, SHALLOW) for name in ("coalesce", "share", "shrink")),
    *(Growth("vocab", name, plus={"vocab": 5}) for name in ("mean", "copy:of=3+17", "normal", "zeros")),
    Growth("vocab", "given:file={file}", DOUBLE, plus={"vocab": 5}),
    *(Growth("positions", name, plus={"pos": 5}) for name in ("tile", "normal", "interpolate")),
    Growth("experts", "upcycle"),
    Growth("experts", "duplicate", {"experts": 2}, keys={"num_experts_per_tok": 4}),
    *(Growth("breaker", name, DOUBLE, how={"width": "fpi"}) for name in ("uneven", "noise")),
]

POST_NORM = {"bert", "bert-untied", "roberta"}
ROTARY = {name for name in FAMILIES if not name.startswith(("bert", "roberta", "gpt2", "t5"))}
MODERN = {"modernbert", "modernbert-untied"}
POSITIONS = {"bert", "bert-untied", "roberta", "gpt2", "gpt2-untied"}
SPARSE = {"mixtral", "qwen2_moe", "qwen3_moe"}
DENSE = {"llama", "llama-mha", "llama-mqa", "llama-tied", "mistral", "qwen3"}  # that have a mixture of their kind

# Where an operator is not defined, and says so.
UNDEFINED: dict[str, set[str]] = {
    "width-lemon-embedx1.5-kvx1-ffnx1-sharedx1": POST_NORM | MODERN,
    "width-gesmundo-embedx2": POST_NORM | MODERN | {"gpt2", "gpt2-untied"},
    "width-hyperclone-embedx2-qkx2-headsx1-kvx1": ROTARY,
    "depth-unshare-depthx2": MODERN,
    "depth-share-depthx0.4": MODERN,
    **dict.fromkeys((f"positions-{how}-pos+5" for how in ("tile", "normal", "interpolate")), {*FAMILIES} - POSITIONS),
    "experts-upcycle": {*FAMILIES} - DENSE,
    "experts-duplicate-expertsx2": {*FAMILIES} - SPARSE,
}
