"""Depth growth, averages and upcycling against mergekit (`make oracles`): passthrough, linear and mixture merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mergekit", reason="mergekit is not installed; `make oracles` installs and uses it")

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.moe.config import MoEMergeConfig
from mergekit.moe.mixtral import MixtralMoE
from mergekit.options import MergeOptions

from bert2bert import growths
from bert2bert.algebra.realise import values
from bert2bert.growth.source_model import open_model
from tests import tiny
from tests.oracles.folders import grown, loaded, saved
from tests.rounding import ROUNDING, gap

SILENT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
OPTIONS = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)


def merged(folder: Path, **recipe: Any) -> dict[str, torch.Tensor]:
    """What mergekit makes of a recipe, loaded by transformers."""
    run_merge(MergeConfiguration.model_validate({"dtype": "float32", **recipe}), str(folder), OPTIONS)
    return loaded(folder)


def slices(model: Path, *layers: tuple[int, int], silent: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """mergekit's slices of one model; those in ``silent`` with output projections of zero, as for LLaMA Pro."""
    return [
        {"sources": [{"model": str(model), "layer_range": list(span)}
                     | ({"parameters": {"scale": SILENT}} if i in silent else {})]}
        for i, span in enumerate(layers)
    ]  # fmt: skip


DEPTHS = {
    "stack": [(0, 3), (0, 3), (2, 3)],
    "gstack": [(0, 3), (0, 3), (0, 3)],
    "interleave": [(i // 2, i // 2 + 1) for i in range(6)],
    "interpolate": [(i, i + 1) for i in (0, 0, 1, 1, 2)],
    "upscale:m=1": [(0, 2), (1, 3)],
    "top": [(0, 3), (1, 3)],
}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# Of Qwens, mergekit leaves a list of layer types in the config that is too short.
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "gpt2"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_depth_is_a_passthrough_merge(name: str, depth: str, tmp_path: Path) -> None:
    saved(tmp_path / "small", name)
    theirs = merged(tmp_path / "merged", merge_method="passthrough", slices=slices(tmp_path / "small", *DEPTHS[depth]))
    layers = sum(last - first for first, last in DEPTHS[depth])
    larger = tiny.config_of(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": layers})
    same(grown(tmp_path / "small", tmp_path / "large", larger, "--depth", depth, "--no-measure"), theirs)


def test_inserted_identities_are_blocks_of_llama_pro(tmp_path: Path) -> None:
    saved(tmp_path / "small", "llama")
    spans = slices(tmp_path / "small", (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), silent=(2, 4))
    theirs = merged(tmp_path / "merged", merge_method="passthrough", slices=spans)
    larger = tiny.config_of("llama", num_hidden_layers=5)
    same(grown(tmp_path / "small", tmp_path / "large", larger, "--depth", "insert_identity:place=top"), theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_interpolation_is_a_linear_merge(name: str, tmp_path: Path) -> None:
    config = saved(tmp_path / "a", name)
    saved(tmp_path / "b", name, seed=1)
    weights = [{"model": str(tmp_path / m), "parameters": {"weight": w}} for m, w in (("a", 0.7), ("b", 0.3))]
    theirs = merged(tmp_path / "merged", merge_method="linear", models=weights)
    plan = growths.interpolate(growths.grow(), growths.grow(), 0.3).plan(config, config)
    ours = values(plan, [open_model(tmp_path / m).read for m in ("a", "b")])
    assert plan.tensors.keys() == theirs.keys() - plan.aliases.keys()
    for tensor, described in plan.tensors.items():
        assert gap(ours(tensor, "fp32", 0, described.shape[0]), theirs[tensor]) <= ROUNDING, tensor


@pytest.mark.parametrize("name", ["llama-mha", "mistral"])
def test_upcycling_is_a_mixture_of_one_model(name: str, tmp_path: Path) -> None:
    """Routers are random in both, so all else is compared."""
    config = saved(tmp_path / "small", name, sliding_window=None, rms_norm_eps=1e-5)
    one = {"source_model": str(tmp_path / "small")}
    recipe = {"base_model": one["source_model"], "experts": [one] * 4, "gate_mode": "random", "dtype": "float32"}
    routers = [torch.randn(4, 12) for _ in range(3)]
    MixtralMoE().write_model(str(tmp_path / "merged"), MoEMergeConfig.model_validate(recipe), OPTIONS, routers)
    theirs = loaded(tmp_path / "merged")
    kept = {key: config[key] for key in ("num_key_value_heads", "rms_norm_eps", "rope_parameters")}
    larger = tiny.config_of("mixtral", num_local_experts=4, sliding_window=None, **kept)
    ours = grown(tmp_path / "small", tmp_path / "large", larger, "--experts", "upcycle", "--no-measure")
    gates = {n for n in ours if n.endswith("gate.weight")}
    assert len(gates) == 3 and all(ours[n].shape == theirs[n].shape for n in gates)
    same({n: v for n, v in ours.items() if n not in gates}, {n: v for n, v in theirs.items() if n not in gates})
