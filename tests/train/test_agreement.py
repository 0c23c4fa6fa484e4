"""Agreement of neighbouring layers' gradients: those of a model whose layers are not shared, by plain torch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.model.program import Step, full
from bert2bert.model.registry import build
from bert2bert.recipe import Agreement, Phase, Shared
from bert2bert.train import partitions
from bert2bert.train.agreement import correlations
from tests import tiny as models
from tests.distributed import run_ranks
from tests.model.test_cores import flat
from tests.rounding import gap
from tests.train import runs, tiny

BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h"}
RUNS = {"bert": (0, 1, 2, 0, 1, 2), "gpt2": (0, 0, 0, 1, 1, 2)}  # a unit that repeats; groups


def model_of(name: str) -> Any:
    torch.manual_seed(1)
    return tiny.model(nsp=False) if name == "bert" else build(models.config_of(name))


def batch_of(name: str, seed: int) -> Any:
    return tiny.batch(seed) if name == "bert" else flat(seed=seed)


def measured(cases: list[tuple[str, int, str]]) -> list[list[float]]:
    """Of every case; nothing but the random state, which must stay as well, could tell that it was measured."""
    from bert2bert.train import engine as engines

    tiny.allow_fp16()
    found = []
    for name, stage, precision in cases:
        model = model_of(name)
        engine = engines.build(tiny.recipe(), tiny.ds_config(stage, precision), model)
        model.recompute = True
        step = Step(RUNS[name], full(model.parts).learn)
        engine.apply(step)
        before, state = partitions.digests(engine), torch.get_rng_state()
        found.append(correlations(engine, [batch_of(name, 10 * m + engine.rank) for m in range(2)], step))
        assert torch.equal(torch.get_rng_state(), state) and model.recompute
        assert partitions.digests(engine) == before
        assert all(p.grad is None for p in model.parameters())
        for _ in range(engine.accumulation):  # and the engine goes on
            loss, *_ = engine.forward(batch_of(name, engine.rank), step)
            engine.backward(loss)
        assert engine.grad_norm is not None and np.isfinite(engine.grad_norm)
        engine.destroy()
    return found


def unshared(name: str) -> list[float]:
    """The same layers as so many different ones, and autograd's own gradients of their weights."""
    small = model_of(name)
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    large = build({**small.hf_config, layers: len(RUNS[name])})
    state, path = small.state_dict(), BLOCKS[name]
    given = {key: value for key, value in state.items() if not key.startswith(path)}
    for place, number in enumerate(RUNS[name]):
        old = f"{path}.{number}."
        given |= {f"{path}.{place}.{k.removeprefix(old)}": v for k, v in state.items() if k.startswith(old)}
    large.load_weights(given)
    for seed in (0, 1, 10, 11):
        large(batch_of(name, seed)).loss.backward()
    slopes = [[p.grad.flatten() for p in layer.parameters() if p.dim() == 2] for layer in large.layers]  # type: ignore[union-attr]
    flat_of = [torch.cat(each).numpy() for each in slopes]
    found = [float(np.corrcoef(a, b)[0, 1]) for a, b in pairwise(flat_of)]
    return found if name == "bert" else [found[0], found[1], found[3]]


@pytest.mark.timeout(120)
def test_correlations_are_those_of_the_unshared_model() -> None:
    cases = [("bert", stage, "fp32") for stage in range(4)]
    cases += [("gpt2", 3, "fp32"), ("bert", 2, "bf16"), ("bert", 0, "fp16"), ("bert", 3, "fp16")]
    expected = {name: unshared(name) for name in BLOCKS}
    assert max(expected["bert"]) - min(expected["bert"]) > 0.1
    for rank in run_ranks(measured, 2, cases, timeout=100):
        for (name, stage, precision), found in zip(cases, rank, strict=True):
            allowed = 1e-4 if precision == "fp32" else 5e-2
            assert gap(found, expected[name], allowed) <= 1, (name, stage, precision)


@pytest.mark.timeout(120)
def test_layers_that_disagree_end_the_phase(tmp_path: Path) -> None:
    """At the second check in a row, whether the run was stopped on the way or not; a check changes no loss."""
    bins = runs.make_bins(tmp_path)
    ends = Agreement(threshold=0.99, every=2, patience=2)
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
    plan, never = (
        runs.recipe(bins, phases=(Phase("shared", 8, Shared(times=2), until=until), Phase("full", 2)))
        for until in (ends, None)
    )
    seldom = replace(plan, log_every=100)
    for name, recipe, stop_at in (("whole", plan, None), ("never", never, 4), ("parts", seldom, 2)):
        run_ranks(runs.run, 2, recipe, config, tmp_path / name, None, stop_at, timeout=100)
    run_ranks(runs.run, 2, seldom, config, tmp_path / "parts", tmp_path / "parts", timeout=100)

    def seen(name: str, kind: str) -> dict[int, tuple[str, float]]:
        return {r["step"]: (r["phase"], r["loss"]) for r in runs.records(tmp_path / name) if r["kind"] == kind}

    parts = seen("parts", "train")
    assert sorted(parts) == [2, 3, 4, 6], "of checks, of the stop, of the end"
    assert parts == {step: seen("whole", "train")[step] for step in parts}
    assert seen("whole", "eval") == seen("parts", "eval")
    assert [phase for phase, _ in seen("whole", "train").values()] == ["shared"] * 4 + ["full"] * 2
    assert {step: seen("whole", "train")[step] for step in range(1, 5)} == dict(
        list(seen("never", "train").items())[:4]
    )
    for name in ("whole", "parts"):
        checks = {r["step"]: r for r in runs.records(tmp_path / name) if "agreement" in r}
        assert list(checks) == [2, 4]
        for record in checks.values():
            found = record["agreement"]
            assert len(found) == 2 * tiny.LAYERS - 1 and max(found) < 1
            assert record["agreement_min"] == min(found) and record["agreement_mean"] == pytest.approx(np.mean(found))
