"""Layer programs: which layers run and learn, uniform draws, the same draw in every process."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from bert2bert.model.program import LayerProgram
from bert2bert.recipe import Full, SubModels
from bert2bert.recipe.programs import draw


def test_full_runs_and_learns_everything() -> None:
    everything = (0, 1, 2, 3)
    assert draw(Full(), 7, 0, 4) == LayerProgram(run=everything, learn=everything, embeddings_learn=True)


def test_sub_models_run_a_bottom_prefix_and_learn_its_top() -> None:
    found = {draw(SubModels(3), step, 1, 12) for step in range(200)}
    bottom = tuple(range(12))
    assert found == {LayerProgram(bottom[:d], bottom[d - 3 : d], embeddings_learn=False) for d in (3, 6, 9, 12)}


def test_depths_are_drawn_uniformly_and_without_pattern() -> None:
    steps = 20_000
    depths = [len(draw(SubModels(3), step, 0, 12).run) for step in range(steps)]
    spread = (steps * 0.25 * 0.75) ** 0.5
    for count in Counter(depths).values():
        assert abs(count - steps / 4) < 5 * spread
    pairs = Counter(pairwise(depths))
    assert len(pairs) == 16
    for count in pairs.values():
        assert abs(count - steps / 16) < 5 * (steps / 16) ** 0.5


def test_another_seed_draws_otherwise_and_a_step_does_not_depend_on_the_ones_before() -> None:
    first = [draw(SubModels(1), step, 0, 8) for step in range(50)]
    assert first != [draw(SubModels(1), step, 1, 8) for step in range(50)]
    assert first[49] == draw(SubModels(1), 49, 0, 8)


def test_every_process_draws_the_same() -> None:
    code = (
        "from bert2bert.recipe import SubModels; from bert2bert.recipe.programs import draw;"
        "print([len(draw(SubModels(2), s, 5, 8).run) for s in range(40)])"
    )
    here = [len(draw(SubModels(2), s, 5, 8).run) for s in range(40)]
    for hash_seed in ("1", "2"):  # Python's own hash differs between processes
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(here), done.stderr


def test_the_draw_of_a_recorded_seed_never_changes() -> None:
    """A resumed run must repeat the draws of the run that it continues, in later versions too."""
    assert [len(draw(SubModels(3), s, 0, 12).run) for s in range(8)] == [12, 3, 12, 6, 6, 3, 3, 12]


def test_stages_that_do_not_divide_the_layers_are_an_error() -> None:
    with pytest.raises(ValueError, match="stages of 3 layers do not divide a model of 4"):
        draw(SubModels(3), 0, 0, 4)
