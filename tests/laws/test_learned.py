"""Learned maps (LiGO): where a fit starts, that it reaches every map, helps, and is replayed by a plan bit for bit."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.commands.learn import Fit, Fitted, learn, rows_of
from bert2bert.data.bins import TokenBins
from bert2bert.data.corpus import books
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, InvalidData, UnsupportedGrowth
from bert2bert.measure import transformers_models
from bert2bert.measure.transformers_models import IGNORE, Sample
from bert2bert.operators.width_ligo import load
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.data.fixtures import write_bins
from tests.doors import grow
from tests.laws.harness import STATES, assert_slices, detached, reader, realised, scrambled
from tests.planning import plan_growth
from tests.rounding import ROUNDING, WRONG, allowed, gap, largest

# an indivisible width, another head size, another number of query heads a group
ODD = [("bert", {"embed": 12, "heads": 3, "ffn": 17}), ("bert", {"embed": 12, "heads": 2}),
       ("gpt2", {"embed": 10, "heads": 2}), ("qwen3", {"embed": 14, "kv": 3, "group": 4, "ffn": 13}),
       ("t5", {"embed": 9, "heads": 3, "qk": 4, "ffn": 13}), ("modernbert", {"embed": 12, "heads": 3})]  # fmt: skip


def deep(config: dict[str, Any], more: int = 2) -> dict[str, Any]:
    """The config with more layers of every kind."""
    table = table_for(config)
    sizes = table.axis_sizes(config)
    large = table.resize(config, {axis: sizes[axis] + more for axis in table.sizes.depth})
    if kinds := config.get("layer_types"):
        large["layer_types"] = [kinds[i % len(kinds)] for i in range(sizes["layers"] + more)]
    return large


def wide(config: dict[str, Any], sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """The config twice as wide, or with these sizes."""
    table = table_for(config)
    return table.resize(config, sizes or {"embed": 2 * table.axis_sizes(config)["embed"]})


def heads_of(config: dict[str, Any]) -> frozenset[str]:
    return table_for(config).names.classes[config["architectures"][0]]


def fit_of(config: dict[str, Any], large: dict[str, Any], **how: Any) -> tuple[Fit, dict[str, torch.Tensor]]:
    """A fit from scrambled weights in float64, and those."""
    weights = detached(scrambled(config), config)
    fit = Fit(config, large, weights.__getitem__, heads_of(config), dtype=torch.float64, **how)
    return fit, weights


def noise_samples(config: dict[str, Any], seed: int = 0) -> Iterator[Sample]:
    g = torch.Generator().manual_seed(seed)
    while True:
        yield Sample(*(torch.randint(2, 23, (3, 6), generator=g) for _ in range(2)))


def plan_of(config: dict[str, Any], large: dict[str, Any], file: Path, **how: Any) -> GrowthPlan:
    return plan_growth(config, large, width=f"ligo:maps={file}", **how)


def assert_frozen(fit: Fit, found: Fitted, weights: dict[str, torch.Tensor], file: Path) -> GrowthPlan:
    """The plan of the stored fit gives the tensors on which the fit computed its loss, slice by slice."""
    config, large = dict(fit.pair.source), dict(fit.pair.target)
    plan = plan_of(config, large, file)
    state = realised(plan, reader({"fp32": weights}))
    maps = {name: torch.from_numpy(m) for name, m in found.maps.items()}
    for name, value in fit.blend(maps).items():
        assert gap(state[name], value) <= ROUNDING, name
    assert_slices(plan, weights)
    return plan


@pytest.mark.parametrize("name", families())
def test_a_fit_reaches_every_map_and_its_plan_is_what_was_fitted(name: str, tmp_path: Path) -> None:
    config = tiny.config_of(name)
    fit, weights = fit_of(config, deep(wide(config)))
    given = next(noise_samples(config))

    def slopes() -> dict[str, torch.Tensor]:
        maps = {n: m.clone().requires_grad_() for n, m in fit.maps.items()}
        return dict(zip(maps, torch.autograd.grad(fit.loss(maps, given), list(maps.values())), strict=True))

    limits = allowed(slopes)
    for n, slope in slopes().items():
        assert largest(slope) > WRONG * limits[n], f"the loss does not reach {n}"
    found = fit.run(noise_samples(config), steps=2, lr=0.1)
    assert all((m - fit.maps[n].numpy()).any() for n, m in found.maps.items()) and len(found.losses) == 2
    assert found.losses[0] == float(fit.loss(fit.maps, given))
    found.save(tmp_path / "maps.safetensors")
    plan = assert_frozen(fit, found, weights, tmp_path / "maps.safetensors")
    assert plan.moments == "reset" and plan.exactness.function and not plan.exactness.lossy
    read = reader(dict.fromkeys(STATES, weights))
    assert not any(m.any() for state in STATES[1:] for m in realised(plan, read, state).values())
    state = realised(plan, read)
    model = transformers_models.build(table_for(config), plan.config, fit.used, state.__getitem__, torch.float64)
    after = {n: torch.from_numpy(m) for n, m in found.maps.items()}
    loss = transformers_models.run(model, given, fit.what, 29)[1]
    assert gap(loss, fit.loss(after, given), allowed(lambda: fit.loss(after, given))) <= ROUNDING


@pytest.mark.parametrize("name", families())
def test_a_fit_starts_as_tiles_and_stacks(name: str) -> None:
    config = tiny.config_of(name)
    large = deep(wide(config))
    fit, weights = fit_of(config, large, noise=0.0)
    state = realised(plan_growth(config, large, width="fpi:choice=left"), reader({"fp32": weights}))
    for n, value in fit.blend(fit.maps).items():
        assert gap(value, state[n]) <= ROUNDING, n
    noisy = fit_of(config, large)[0]
    assert 0 < max((noisy.maps[n] - m).abs().max().item() for n, m in fit.maps.items()) < 0.1


@pytest.mark.parametrize("name,sizes", ODD)
def test_any_width_and_head_size(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    config = tiny.config_of(name)
    fit, weights = fit_of(config, deep(wide(config, sizes), 1))
    found = fit.run(noise_samples(config), steps=1, lr=0.1)
    found.save(tmp_path / "maps")
    plan = assert_frozen(fit, found, weights, tmp_path / "maps")
    old = [tensor for tensor in plan.tensors.values() if tensor.spec == "vocab -> embed"]
    for tensor in old:  # features that the source has stay where they are
        kept = realised(plan, reader({"fp32": weights}))[tensor.name][:, : weights[tensor.name].shape[1]]
        assert torch.equal(kept, weights[tensor.name])


def test_what_does_not_grow_is_not_learned(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2")
    layers = fit_of(config, deep(config))[0].maps
    assert layers and all(m.shape == (5, 3) for m in layers.values()) and "transformer.h.layers.attn.c_attn" in layers
    features = fit_of(config, wide(config))[0].maps
    assert set(features) == {"embed", *(f"layers.{i}.{key}" for i in range(3) for key in _GPT2_UNITS)}
    assert features["embed"].shape == (8, 8) and features["layers.0.ffn"].shape == (12, 12)


_GPT2_UNITS = ("heads qk", "heads ~qk", "heads v", "ffn")


def test_a_stored_fit_replays_bit_for_bit(tmp_path: Path) -> None:
    config = tiny.config_of("llama")
    large = deep(wide(config))
    weights = detached(scrambled(config), config)
    files = [tmp_path / name for name in ("one", "two", "other")]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        fit = Fit(config, large, weights.__getitem__, heads_of(config), seed=seed)  # float32, as the command has it
        fit.run(noise_samples(config), steps=2, lr=0.01).save(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    plans = [plan_of(config, large, file) for file in files]
    assert plans[0].digest() == plans[1].digest() != plans[2].digest()
    plans[1] = plan_of(config, large, files[1], seed=7)  # nothing is drawn
    first, second, third = (realised(plan, reader({"fp32": weights})) for plan in plans)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert any(not torch.equal(first[n], third[n]) for n in first)
    assert load(files[0])[1]["steps"] == 2


def characters(folder: Path) -> TokenBins:
    """A novel as bins of characters, the end of it held out."""
    text = lzma.decompress(books()["persuasion"].read_bytes()).decode()
    alphabet = {c: 5 + i for i, c in enumerate(sorted(set(text)))}
    ids = np.array([alphabet[c] for c in text], dtype=np.uint16)
    parts = {"train": ids[:-60_000], "heldout": ids[-60_000:]}
    write_bins(folder, [len(parts["train"])], 5 + len(alphabet), heldout=[len(parts["heldout"])])
    for split, part in parts.items():
        (folder / f"{split}.bin").write_bytes(part.tobytes())
    return TokenBins.open(folder)


def trained(folder: Path, bins: TokenBins, steps: int) -> dict[str, Any]:
    """A small GPT-2 trained on the text, as a Hugging Face folder; its config."""
    config = tiny.config_of("gpt2", n_embd=24, n_head=3, n_inner=64, n_layer=2, n_positions=32,
                            vocab_size=bins.vocab_size, initializer_range=0.1)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.for_model(**config))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step, given in enumerate(islice(rows_of(bins, "train", "causal", 8, 32, 5), steps)):
        adam.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 20) * (1 - step / steps)
        adam.zero_grad()
        transformers_models.run(model, given, "causal", bins.vocab_size)[1].backward()
        adam.step()
    model.save_pretrained(folder)
    return config


def test_a_fit_beats_its_start_on_held_out_text(tmp_path: Path) -> None:
    bins = characters(tmp_path / "bins")
    config = trained(tmp_path / "small", bins, 200)
    large = deep(wide(config))
    (tmp_path / "large.json").write_text(json.dumps(large))
    messages: list[str] = []
    found = learn(
        tmp_path / "small",
        tmp_path / "large.json",
        bins.folder,
        tmp_path / "maps",
        steps=40,
        length=32,
        say=messages.append,
    )
    assert "nats on held-out text" in messages[-2] and found.about["heldout"][0] > found.about["heldout"][1]
    folder = grow(tmp_path / "small", tmp_path / "grown", tmp_path / "large.json", format="hub", measure=False,
                  width=f"ligo:maps={tmp_path / 'maps'}", say=messages.append)  # fmt: skip
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    source = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "small").eval()
    fit = Fit(config, large, {n: p.detach() for n, p in source.named_parameters()}.__getitem__, heads_of(config))
    held = list(islice(rows_of(bins, "heldout", "causal", 16, 32, 9), 16))
    before = np.array([fit.measure(fit.maps, [given]) for given in held])
    with torch.no_grad():
        after = np.array([float(transformers_models.run(model, given, "causal", bins.vocab_size)[1]) for given in held])
    maps = {n: torch.from_numpy(m) for n, m in found.maps.items()}
    assert gap(torch.tensor(fit.measure(maps, held)), torch.tensor(after.mean())) <= ROUNDING
    gain = before - after
    assert gain.mean() > 6 * gain.std(ddof=1) / len(gain) ** 0.5 and gain.mean() > 0.1, (before.mean(), after.mean())


@pytest.mark.parametrize("name", ["bert", "t5-untied"])
def test_the_command_on_encoders_and_encoder_decoders(name: str, tmp_path: Path) -> None:
    config = tiny.config_of(name)
    model = tiny.build(config)
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "small")
    (tmp_path / "large.json").write_text(json.dumps(wide(config)))
    write_bins(tmp_path / "bins", [300, 200], 29, heldout=[90], sentinels=5)
    run = {"steps": 2, "rows": 2, "length": 8, "say": lambda text: None}
    found = learn(tmp_path / "small", tmp_path / "large.json", tmp_path / "bins", tmp_path / "maps", **run)
    assert len(found.losses) == 2 and load(tmp_path / "maps")[1]["length"] == 8
    with pytest.raises(InvalidConfig, match="is there already"):
        learn(tmp_path / "small", tmp_path / "large.json", tmp_path / "bins", tmp_path / "maps", **run)
    for option in ("steps", "rows", "lr", "noise"):
        with pytest.raises(InvalidConfig, match=f"--{option} is 0"):
            learn(tmp_path / "small", tmp_path / "large.json", tmp_path / "bins", tmp_path / "new", **run | {option: 0})
    with pytest.raises(InvalidConfig, match="--seed is -1; expected a whole number"):
        learn(tmp_path / "small", tmp_path / "large.json", tmp_path / "bins", tmp_path / "new", **run | {"seed": -1})
    with pytest.raises(InvalidConfig, match="--length is 2; expected 3 to"):
        learn(tmp_path / "small", tmp_path / "large.json", tmp_path / "bins", tmp_path / "new", **run | {"length": 2})


def test_rows_of_text(tmp_path: Path) -> None:
    bins = write_bins(tmp_path / "bins", [400], 500, heldout=[20], distinct=True, sentinels=9)
    causal, again = (next(rows_of(bins, "train", "causal", 3, 16, 4)) for _ in range(2))
    assert torch.equal(causal.ids, again.ids) and torch.equal(causal.labels[:, :-1], causal.ids[:, 1:])
    assert (causal.labels[:, -1] == IGNORE).all() and (causal.ids.diff() == 1).all()
    pairs = next(rows_of(bins, "train", "seq2seq", 3, 16, 4))
    for read, written, text in zip(pairs.ids, pairs.labels, causal.ids, strict=True):
        kept = torch.cat([read[(read > 4) & (read < 491)], written[(written > 4) & (written < 491)]])
        assert torch.equal(kept.sort().values, text) and read[-1] == written[-1] == 3 and written[0] == 499
    other = write_bins(tmp_path / "other", [400], 500)
    with pytest.raises(InvalidConfig, match="no sentinels"):
        next(rows_of(other, "train", "seq2seq", 3, 16, 4))
    masked = next(rows_of(bins, "train", "masked", 3, 16, 4))
    chosen = masked.labels != IGNORE
    assert chosen.sum(1).tolist() == [2, 2, 2] and torch.equal(masked.labels[chosen], causal.ids[chosen])
    assert (masked.ids[:, 0] == 2).all() and (masked.ids[:, -1] == 3).all() and not chosen[:, [0, -1]].any()
    with pytest.raises(InvalidData, match="20 tokens, fewer than one row of 64"):
        next(rows_of(bins, "heldout", "causal", 3, 64, 4))


def test_refusals(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2")
    large, file = deep(wide(config)), tmp_path / "maps"
    fit, weights = fit_of(config, large)
    fit.run(noise_samples(config), steps=1, lr=0.01).save(file)
    with pytest.raises(InvalidConfig, match="needs the maps of a fit"):
        plan_growth(config, large, width="ligo")
    for how, words in (({"depth": "interleave"}, "covers the depth"), ({"moments": "carried"}, "not determined"),
                       ({"moments": "exact"}, "not determined"), ({"moments": "asymmetric"}, "give reset"),
                       ({"breaker": "noise"}, "no even copies")):  # fmt: skip
        with pytest.raises(UnsupportedGrowth, match=words):
            plan_of(config, large, file, **how)
    assert plan_of(config, large, file, moments="reset").digest() == plan_of(config, large, file).digest()
    plan = plan_of(config, large, file)
    assert plan_of(config, large, file, depth=plan.recipe["depth"]).digest() == plan.digest()  # as verify plans it
    with pytest.raises(UnsupportedGrowth, match=r"was fitted for layers 3 -> 5, this growth is 3 -> 4"):
        plan_of(config, deep(wide(config), 1), file)
    with pytest.raises(UnsupportedGrowth, match=r"embed 8 -> 16, this growth is 8 -> 24"):
        plan_of(config, deep(wide(config, {"embed": 24})), file)
    llama = tiny.config_of("llama")
    with pytest.raises(UnsupportedGrowth, match="fitted for a gpt2, this is a llama"):
        plan_of(llama, deep(wide(llama)), file)
    with pytest.raises(UnsupportedGrowth, match="nearest is ligo"):
        plan_growth(config, large, width="mango")
    with pytest.raises(InvalidCheckpoint, match="not readable"):
        plan_of(config, large, tmp_path / "none")
    maps = load_file(file)
    save_file(maps, tmp_path / "foreign")
    with pytest.raises(InvalidCheckpoint, match="of no fit"):
        plan_of(config, large, tmp_path / "foreign")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InvalidCheckpoint, match="damaged"):
        plan_of(config, large, file)
    with pytest.raises(UnsupportedGrowth, match="no language-model head"):
        Fit(config, large, weights.__getitem__, frozenset())
    with pytest.raises(UnsupportedGrowth, match="nothing to learn"):
        Fit(config, config, weights.__getitem__, heads_of(config))
