"""Vocabulary and positions: old logits stay, new rows are what the operator says, moments and refusals are right."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from bert2bert.algebra import axes
from bert2bert.algebra.realise import realise
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import table_for
from tests import tiny
from tests.cover import families
from tests.laws.harness import Grown, assert_gradient_rule, assert_slices, grow, reader, realised
from tests.planning import plan_growth
from tests.rounding import ROUNDING, WRONG, allowed, elementary, gap

FAMILIES = sorted(tiny.VARIANTS)
TABLES_OF_POSITIONS = [name for name in FAMILIES if "pos" in table_for(tiny.config_of(name)).sizes.axes]
OLD, NEW = 29, 34


def wider(name: str) -> dict[str, int]:
    """A vocabulary and a width that grow at once."""
    config = tiny.config_of(name)
    return {"vocab": NEW, "embed": 2 * table_for(config).axis_sizes(config)["embed"]}


def rows_of(grown: Grown) -> dict[str, torch.Tensor]:
    """The tensors with a row for each token."""
    return {n: grown.state[n] for n, p in grown.plan.tensors.items() if "vocab" in axes.axes_of(p.spec)}


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("vocab", ["mean", "copy:of=3+17", "normal", "zeros"])
@pytest.mark.parametrize("how", [{}, {"wider": True}, {"wider": True, "breaker": "uneven"}])
def test_old_logits_stay(name: str, vocab: str, how: dict[str, Any]) -> None:
    sizes = wider(name) if how.get("wider") else {"vocab": NEW}
    grown = grow(name, sizes, vocab=vocab, breaker=how.get("breaker"))
    assert grown.drift() <= ROUNDING
    assert any("enter the softmax" in reason for reason in grown.plan.exactness.function)
    assert grown.plan.moments != "exact"
    before, after = (tiny.loss(m, c) for m, c in ((grown.source, grown.config), (grown.target, grown.plan.config)))
    assert gap(after, before) > WRONG  # that is why it is reported


@pytest.mark.parametrize("name", families())
def test_new_rows(name: str) -> None:
    """Means are those of the old rows, copies are copies, zeros zero, in every tensor with a row for each token."""
    made = {vocab: rows_of(grow(name, {"vocab": NEW}, vocab=vocab)) for vocab in ("mean", "copy:of=3+17", "zeros")}
    assert made["mean"]
    for n, mean in made["mean"].items():
        old = mean[:OLD]
        assert gap(mean[OLD:], old.mean(0).expand_as(mean[OLD:]), elementary(old)) <= ROUNDING
        copied, zeros = made["copy:of=3+17"][n], made["zeros"][n]
        assert torch.equal(copied[OLD:], old[[3, 17, 3, 17, 3]])
        assert torch.equal(zeros[:OLD], old) and not zeros[OLD:].any()
    config = tiny.config_of(name)
    drawn = rows_of(grow(name, {"vocab": 3000}, vocab="normal"))
    for n, rows in drawn.items():
        expected = 0.0 if n.endswith("bias") else table_for(config).std(n, config)
        assert rows[OLD:].std().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["bert", "gpt2-untied", "llama"])
def test_moments_of_new_rows(name: str) -> None:
    """Carried ones have no zero second moment; zeroed ones are warned of, and --moments asymmetric zeroes all."""
    carried = grow(name, {"vocab": NEW}, vocab="mean")
    ones = {n: torch.rand(w.shape, dtype=torch.float64) + 0.1 for n, w in carried.weights.items()}
    reads = reader(dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), ones))
    assert carried.plan.moments == "carried" and not any("zeroed" in w for w in carried.plan.warnings)
    assert all(v.min() > 0 for v in realised(carried.plan, reads, "exp_avg_sq").values())
    for vocab, moments in (("normal", None), ("zeros", None), ("mean", "asymmetric")):
        plan = grow(name, {"vocab": NEW}, vocab=vocab, moments=moments).plan
        assert any("3.16x" in w for w in plan.warnings)
        v = realised(plan, reads, "exp_avg_sq")
        for n, p in plan.tensors.items():
            if "vocab" in axes.axes_of(p.spec):
                assert torch.equal(v[n][:OLD], ones[n]) and not v[n][OLD:].any()


@pytest.mark.parametrize("name", ["bert", "t5", "llama", "modernbert-untied"])
@pytest.mark.parametrize("vocab", ["mean", "copy:of=0", "normal", "zeros"])
def test_slices(name: str, vocab: str) -> None:
    grown = grow(name, {**wider(name), "vocab": 700}, vocab=vocab)  # more than one block of mixed rows
    assert_slices(grown.plan, grown.weights)


def test_old_rows_are_read_alone() -> None:
    """The mean needs the whole table, but rows of old tokens do not wait for it."""
    plan = grow("gpt2", {"vocab": 600}, keys={"vocab_size": 520}, vocab="mean").plan
    asked = []

    def read(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.zeros(stop - start, 8)

    realise(plan.tensors["transformer.wte.weight"].narrow(0, 512), "fp32", read)
    assert asked == [(0, 256), (256, 512)]


@pytest.mark.parametrize("name", ["bert", "bert-untied", "gpt2-untied", "llama", "t5"])
def test_mean_is_what_transformers_draws_around(name: str) -> None:
    grown = grow(name, {"vocab": NEW}, vocab="mean")
    theirs = tiny.build(grown.config)
    theirs.load_state_dict(grown.source.state_dict())
    torch.manual_seed(0)
    theirs.float().resize_token_embeddings(NEW)
    found = tiny.parameters(theirs, grown.config)
    for n, rows in rows_of(grown).items():
        if rows.ndim == 2:
            spread = sqrt(1e-9) * rows.std()  # theirs draws around the mean with a billionth of the rows' covariance
            assert (found[n].detach() - rows).abs().max() < 100 * spread, n


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt2-untied", "llama"])
@pytest.mark.parametrize("form", ["npy", "safetensors"])
def test_given_rows(name: str, form: str, tmp_path: Path) -> None:
    """They stand where they are given, grow with the width, leave the rest to the mean, and replay only as they are."""
    config = tiny.config_of(name)
    embed = table_for(config).axis_sizes(config)["embed"]
    rows, path = np.random.default_rng(0).normal(size=(NEW - OLD, embed)), tmp_path / f"rows.{form}"
    names = [
        n for n, p in grow(name, {"vocab": NEW}, vocab="mean").plan.tensors.items() if "vocab" in axes.axes_of(p.spec)
    ]
    held = names[:1] if form == "npy" else [n for n in names if not n.endswith("bias")]
    if form == "npy":
        np.save(path, rows)
    else:
        safetensors.numpy.save_file(dict.fromkeys(held, rows), path)
    grown = grow(name, {"vocab": NEW}, vocab=f"given:file={path}")
    for n, found in rows_of(grown).items():
        expected = torch.from_numpy(rows) if n in held else found[:OLD].mean(0).expand_as(found[OLD:])
        assert gap(found[OLD:], expected, elementary(found)) <= ROUNDING
    wide = grow(name, wider(name), vocab=f"given:file={path}", width="fpi:choice=left")
    assert wide.drift() <= ROUNDING
    assert_slices(wide.plan, wide.weights)
    embedding = wide.state[held[0]][OLD:]
    assert torch.equal(embedding, torch.from_numpy(np.tile(rows, 2)))
    new = torch.full((1, 1), NEW - 1)
    a, b = (tiny_logits(g, new) for g in (grown, wide))
    assert gap(a, b, allowed(lambda: tiny_logits(wide, new))) <= ROUNDING
    recorded = wide.plan.recipe["vocab"]
    assert recorded == f"given:file={path},sha256={recorded[-64:]}"
    again = plan_growth(wide.config, wide.plan.config, vocab=recorded, width="fpi:choice=left", seed=1)
    assert again.digest() == wide.plan.digest() and again.recipe == wide.plan.recipe
    np.save(tmp_path / "other.npy", rows + 1)
    assert grow(name, wider(name), vocab=f"given:file={tmp_path / 'other.npy'}").plan.digest() != wide.plan.digest()
    np.save(path, rows + 1) if form == "npy" else safetensors.numpy.save_file({held[0]: rows + 1}, path)
    with pytest.raises(InvalidConfig, match="these are other rows"):
        plan_growth(wide.config, wide.plan.config, vocab=recorded)
    assert any("3.16x" in w for w in grown.plan.warnings)


@torch.no_grad()
def tiny_logits(grown: Grown, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model whose input is new tokens."""
    output = grown.target(input_ids=ids)
    return output.prediction_logits if "prediction_logits" in output else output.logits


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((3, 8)), r"float64 \[3, 8\]; expected floating \[5, 8\]"),
        (np.zeros((5, 16)), "as wide as the source"),
        (np.zeros((5, 8), dtype=np.int64), "int64"),
    ],
)
def test_given_rows_that_do_not_fit(array: np.ndarray, match: str, tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(InvalidConfig, match=match):
        grow("bert", {"vocab": NEW}, vocab=f"given:file={tmp_path / 'rows.npy'}")


def test_given_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "rows.npy").write_text("no")
    (tmp_path / "rows.safetensors").write_text("no")
    safetensors.numpy.save_file({"word_embeddings": np.zeros((5, 8))}, tmp_path / "named.safetensors")
    (tmp_path / "a,b").mkdir()
    np.save(tmp_path / "a,b" / "rows.npy", np.zeros((5, 8)))
    config = tiny.config_of("bert")
    target = config | {"vocab_size": NEW}
    for name, match in {
        "rows.npy": "numpy.save", "rows.safetensors": "neither", "none.npy": "cannot be read",
        "named.safetensors": "did you mean 'bert.embeddings.word_embeddings.weight'",
    }.items():  # fmt: skip
        with pytest.raises(InvalidConfig, match=match):
            plan_growth(config, target, vocab=f"given:file={tmp_path / name}")
    with pytest.raises(InvalidConfig, match="known key"):
        plan_growth(config, target, vocab=f"given:file={tmp_path / 'a,b' / 'rows.npy'}")
    with pytest.raises(InvalidConfig, match="0 to 28"):
        plan_growth(config, target, vocab="copy:of=29")


@pytest.mark.parametrize("width", ["direct", "aki", "tile", "staged", "lemon"])
def test_with_other_widths(width: str) -> None:
    """Whatever fills the rest of a tensor, the source's corner of old tokens and the new rows are there."""
    grown = grow("gpt2", wider("gpt2"), vocab="normal", width=width)
    alone = grow("gpt2", {"embed": 16}, width=width)
    word = "transformer.wte.weight"
    if width != "direct":
        assert torch.equal(grown.state[word][:OLD], alone.state[word])
    assert torch.equal(grown.state[word][:OLD, :8] != 0, torch.ones(OLD, 8, dtype=torch.bool))
    assert 0.01 < grown.state[word][OLD:].std() < 0.03


@pytest.mark.parametrize("name", families(TABLES_OF_POSITIONS))
@pytest.mark.parametrize("sizes", [{}, {"embed": 16}])
def test_positions(name: str, sizes: dict[str, int]) -> None:
    """Up to the old length nothing changes, and the tiled rows repeat the old ones from the first token's on."""
    table = table_for(tiny.config_of(name))
    first, old = table.sizes.first_position, table.axis_sizes(tiny.config_of(name))["pos"]
    tiled, drawn = (grow(name, {"pos": 27, **sizes}, positions=p) for p in ("tile", "normal"))
    for grown in (tiled, drawn):
        assert grown.plan.exactness.function == () and grown.drift() <= ROUNDING
        assert any(f"longer than {old - first} tokens" in note for note in grown.plan.notes)
    n = next(n for n, p in tiled.plan.tensors.items() if p.spec == "pos -> embed")
    rows, tokens = tiled.state[n], tiled.state[n][first:old]
    assert torch.equal(rows[first:], torch.cat([tokens] * 3)[: 27 - first])
    assert tiled.plan.moments == "carried"
    assert any("3.16x" in w for w in drawn.plan.warnings)
    if not sizes:
        assert_gradient_rule(drawn)


@pytest.mark.parametrize("name", families(TABLES_OF_POSITIONS))
def test_interpolated_positions(name: str) -> None:
    """Ends stay, what lies between is on the line between neighbours, and the plan says that logits change."""
    grown = grow(name, {"pos": 21}, positions="interpolate")
    n = next(n for n, p in grown.plan.tensors.items() if p.spec == "pos -> embed")
    first = table_for(grown.config).sizes.first_position
    old, new = grown.weights[n], grown.state[n]
    assert torch.equal(new[: first + 1], old[: first + 1])
    theirs = torch.nn.functional.interpolate(
        old[first:].T[None], size=len(new) - first, mode="linear", align_corners=True
    )[0].T
    assert gap(new[first:], theirs) <= ROUNDING
    assert grown.drift() > WRONG and any("interpolated" in reason for reason in grown.plan.exactness.function)
    assert_slices(grown.plan, grown.weights)


@pytest.mark.parametrize("name", families(set(FAMILIES) - set(TABLES_OF_POSITIONS)))
def test_models_without_a_table_of_positions(name: str) -> None:
    config = tiny.config_of(name)
    with pytest.raises(UnsupportedGrowth, match="needs no operator"):
        plan_growth(config, config, positions="tile")
    if "max_position_embeddings" in config:
        grown = grow(name, target={"max_position_embeddings": 32})
        assert grown.plan.exactness.function == () and grown.drift() == 0.0


@pytest.mark.parametrize(
    ("kind", "operator", "key"), [("vocab", "mean", "vocab_size"), ("positions", "tile", "max_position_embeddings")]
)
def test_operators_with_nothing_to_do_and_sizes_without_operator(kind: str, operator: str, key: str) -> None:
    config = tiny.config_of("bert")
    target = config | {key: config[key] + 5}
    with pytest.raises(InvalidConfig, match=f"{key} is the same .* leave --{kind} out"):
        plan_growth(config, config, **{kind: operator})
    with pytest.raises(UnsupportedGrowth, match=f"--{kind} .*{operator}"):
        plan_growth(config, target)
    with pytest.raises(InvalidConfig, match="--width random, which copies nothing"):
        plan_growth(config, target, width="random", **{kind: operator})
