"""Whether a run may go on from a manifest's position under a changed recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bert2bert.checkpoints.manifest import Trained
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Masked, Recipe, load_recipe
from bert2bert.train.position import continued
from bert2bert.train.run import train
from tests.data.fixtures import write_bins
from tests.train import tiny

ROOT = Path(__file__).parents[2]
DIGESTS = {"digest": "d", "tokenizer_digest": "t"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(ROOT / "recipes" / "demo_bert2bert.py", [])


def training(recipe: Recipe, phase: int, phase_step: int) -> Trained:
    found = {
        "data": {**DIGESTS, "rows": 8},
        "recipe": recipe.to_dict(),
        "phase": phase,
        "phase_step": phase_step,
        "step": phase_step,
        "spent": {},
    }
    return Trained.from_json(found)


def test_phases_already_run_must_stay(recipe: Recipe) -> None:
    first, second = recipe.phases
    saved, folder = training(recipe, 1, 3), Path("runs/small/global_step3")
    assert continued(saved, folder, recipe, DIGESTS, []).phase_step == 3
    longer = replace(recipe, phases=(first, replace(second, steps=second.steps + 1)))
    assert continued(saved, folder, longer, DIGESTS, []).phase == 1
    for phases in ((replace(first, steps=first.steps + 1), second), (first,), (first, replace(second, steps=2))):
        with pytest.raises(InvalidConfig, match=r"phases are 'sub-models' .*stands at step 3 of phase 'full' of 'sub-"):
            continued(saved, folder, replace(recipe, phases=phases), DIGESTS, [])


def test_rows_mean_the_same_only_under_the_same_objective(recipe: Recipe) -> None:
    """Also for a run of an older version, which recorded the share of masked tokens elsewhere."""
    saved, folder = training(recipe, 0, 3), Path("runs/small/global_step3")
    plain = recipe.to_dict()
    del plain["objective"]
    old = replace(saved, recipe={**plain, "data": {**plain["data"], "mask_share": 0.15}})
    notes: list[str] = []
    for before in (saved, old):
        assert continued(before, folder, recipe, DIGESTS, notes).rows == 8 and not notes
        with pytest.raises(
            InvalidConfig, match=r"objective.mlm_probability is 0.3, .*--set objective.mlm_probability=0.15"
        ):
            continued(before, folder, replace(recipe, objective=Masked(0.3)), DIGESTS, [])
    other = replace(saved, recipe={**plain, "objective": {"kind": "causal"}})
    with pytest.raises(InvalidConfig, match=r"kind is 'masked', .* had 'causal'.*Continue with that run's recipe"):
        continued(other, folder, recipe, DIGESTS, [])


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    """No process group, no folder: bins of BERT's tokenizer of an older version, and a decoder."""
    bins = write_bins(tmp_path / "bins", [40], 60).folder
    meta = json.loads((bins / "meta.json").read_text())
    del meta["special"]["eos"]
    (bins / "meta.json").write_text(json.dumps(meta))
    config = {
        "model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32,
    }  # fmt: skip
    decoder = tiny.recipe(str(bins), model=config)
    with pytest.raises(InvalidConfig, match=r"the tokenizer of .*bins has no eos token, which .* 'causal' needs"):
        train(decoder, tiny.ds_config(0), tmp_path / "run")
    assert not (tmp_path / "run").exists()
