"""The optimizer factors of a growth in its manifest: written, read, renamed, and multiplied by those of the source."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bert2bert.checkpoints.factors import Factors
from bert2bert.checkpoints.manifest import MANIFEST, Manifest, Trained, read_manifest, write_manifest
from bert2bert.checkpoints.open import open_source
from bert2bert.commands.cli import main
from bert2bert.errors import InvalidCheckpoint
from bert2bert.growth.factors import of_growth
from bert2bert.growth.opened import open_growth
from bert2bert.tables import table_for
from tests import tiny
from tests.doors import grow, reshard
from tests.test_verify_families import save, silent

HEAD, WRAPPER = "transformer.ln_f.weight", "module.net."
MATRIX = "transformer.h.0.mlp.c_fc.weight"


def target(file: Path, embed: int) -> Path:
    config = tiny.config_of("gpt2")
    file.write_text(json.dumps(table_for(config).resize(config, {"embed": embed})))
    return file


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in a wrapper, twice as wide, as a universal checkpoint: with moments, of zero."""
    path = tmp_path_factory.mktemp("factors")
    save(path / "small", "gpt2")
    file = path / "small" / "model.safetensors"
    save_file({WRAPPER + name: value for name, value in load_file(file).items()}, file)
    goal = target(path / "big.json", 16)
    grow(path / "small", path / "big", goal, format="universal", measure=False, say=silent)
    return path / "big"


def manifest(folder: Path) -> Manifest:
    found = open_source(folder).manifest
    assert found is not None
    return found


def test_the_manifest_has_them_by_the_names_of_the_files(grown: Path) -> None:
    found = manifest(grown)
    factors = found.factors()
    assert factors is not None and factors.keys() == found.tensors.keys()
    assert factors[WRAPPER + MATRIX] == Factors(0.5, 2.0, 0.5) and factors[WRAPPER + HEAD] == Factors(0.5, 2.0, 1.0)
    assert found.growth and found.growth.factors == type(found.growth.factors).from_json(
        json.loads((open_source(grown).folder / MANIFEST).read_text())["growth"]["factors"]
    )
    assert Manifest().factors() is None


def test_reshard_gives_them_the_names_of_its_target(grown: Path, tmp_path: Path) -> None:
    reshard(grown, tmp_path / "hub", format="hub", say=silent)
    factors = manifest(tmp_path / "hub").factors()
    assert factors is not None and factors[MATRIX] == Factors(0.5, 2.0, 0.5)
    before = manifest(grown).factors()
    assert before == {WRAPPER + name: one for name, one in factors.items()}


@pytest.mark.parametrize("followed,share", [(None, 1.0), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_second_growth_multiplies_by_what_was_in_force(
    grown: Path, followed: float | None, share: float, tmp_path: Path
) -> None:
    """followed: of the run in between, to what share it obeyed them; None: there was none."""
    goal, folder = target(tmp_path / "larger.json", 48), open_source(grown).folder
    kept = (folder / MANIFEST).read_text()
    try:
        if followed is not None:
            write_manifest(folder, replace(manifest(grown), kind="train", training=Trained(followed=followed)))
        assert read_manifest(folder) == manifest(grown)
        found = of_growth(open_growth(grown, goal))
    finally:
        (folder / MANIFEST).write_text(kept)
    assert found.of(MATRIX) == Factors(1 / 3, 3.0, 1 / 3) * Factors(0.5, 2.0, 0.5) ** share
    assert not found.without


def test_plan_counts_them(grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "factors  3 different on learning rate, decay and epsilon"
    for embed, text in ((32, f"{line}, with which AdamW follows"), (40, "none for 40 of 40 tensors: its entries need")):
        goal = target(tmp_path / f"{embed}.json", embed)
        assert main(["plan", str(grown), "--config", str(goal)]) == 0
        assert text in capsys.readouterr().out
    assert main(["plan", str(grown), "--config", str(tmp_path / "32.json"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["factors"]
    assert [group["lr"] for group in found["groups"]] == [1.0, 0.25, 0.25] and found["without"] == []


@pytest.mark.parametrize("number", [0, -0.5, float("nan"), float("inf"), "0.5", True])
def test_recorded_factors_are_positive_numbers(grown: Path, number: object, tmp_path: Path) -> None:
    found = json.loads((open_source(grown).folder / MANIFEST).read_text())
    found["growth"]["factors"]["groups"][0]["lr"] = number
    with pytest.raises(InvalidCheckpoint, match=r"growth\.factors.*lr is .*expected"):
        Manifest.from_json(found)


def test_a_share_of_obedience_keeps_rate_times_decay() -> None:
    half = Factors(0.25, 4.0, 0.25) ** 0.5
    assert half == Factors(0.5, 2.0, 0.5) and half**0 == Factors() and half.lr * half.decay == 1.0
