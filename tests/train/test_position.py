"""Whether a run may go on from a manifest's position under a changed recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bert2bert.checkpoints.manifest import Trained
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Recipe, load_recipe
from bert2bert.train.position import continued

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
    told, folder = training(recipe, 1, 3), Path("runs/small/global_step3")
    assert continued(told, folder, recipe, DIGESTS, []).phase_step == 3
    longer = replace(recipe, phases=(first, replace(second, steps=second.steps + 1)))
    assert continued(told, folder, longer, DIGESTS, []).phase == 1
    for phases in ((replace(first, steps=first.steps + 1), second), (first,), (first, replace(second, steps=2))):
        with pytest.raises(InvalidConfig, match=r"phases are 'sub-models' .*stands at step 3 of phase 'full' of 'sub-"):
            continued(told, folder, replace(recipe, phases=phases), DIGESTS, [])
