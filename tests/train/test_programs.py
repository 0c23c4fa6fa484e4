"""Programs: which layers run and parts learn, uniform draws, the same draw in every process, refusals at the door."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.model.program import Step
from bert2bert.recipe import Draw, Fresh, Frozen, Full, Shared, SubModels, Top, VirtualDepth, from_dict
from bert2bert.recipe.programs import check
from tests.steps import some, whole
from tests.train import tiny


def parts(layers: int) -> tuple[str, ...]:
    return tuple(f"layer.{i}" for i in range(layers))


def draw(program: Any, step: int, seed: int, layers: int, fresh: Sequence[str] = ()) -> Step:
    return program.step(Draw(step, step, seed, parts(layers), frozenset(fresh)))


def test_full_runs_and_learns_everything() -> None:
    assert draw(Full(), 7, 0, 4) == whole(4)


def test_sub_models_run_a_bottom_prefix_and_learn_its_top() -> None:
    found = {draw(SubModels(3), step, 1, 12) for step in range(200)}
    bottom = tuple(range(12))
    assert found == {some(bottom[:d], bottom[d - 3 : d], False) for d in (3, 6, 9, 12)}


def test_those_that_draw_nothing() -> None:
    assert draw(Top(2), 5, 0, 4) == some(range(4), (2, 3), False)
    assert draw(Fresh(), 5, 0, 4, ("layer.1",)) == Step((0, 1, 2, 3), frozenset({"layer.1"}))
    assert draw(Fresh(head=True), 5, 0, 4, ("layer.1",)).learn == {"layer.1", "head"}
    assert draw(Frozen(("embeddings", "layer.[01]")), 5, 0, 4) == some(range(4), (2, 3), False)
    assert draw(Shared(times=3), 5, 0, 2).run == (0, 1) * 3 and draw(Shared(uses=(2, 1)), 5, 0, 2).run == (0, 0, 1)
    assert (draw(Shared(times=3), 5, 0, 2).share, draw(Shared(times=3, share="sum"), 5, 0, 2).share) == ("mean", "sum")


def test_virtual_depths_are_the_released_codes() -> None:
    """By its formula, from the same uniform numbers: begin = ratio + 0.4, end = 0.6, x from 1e-6 to 1."""
    layers, least, ratio, depths = 3, 1e-6, 12 / 3, []
    for step in range(3000):
        given = Draw(step, step, 0, parts(layers))
        run = VirtualDepth(12).step(given).run
        begin, end = ratio + 0.4, 0.6
        n = (begin * least - end) / (end - begin)
        x = least + (1 - least) * given.uniform("virtual depth")
        y = min(max(end * (n + 1) / (x + n), 1), ratio)
        assert len(run) == int(y * layers) and run == tuple(i * layers // len(run) for i in range(len(run)))
        depths.append(len(run))
    counts = Counter(depths)
    assert set(counts) == set(range(3, 13)) and counts[3] > counts[4] > counts[5]


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
        "from bert2bert.recipe import Draw, SubModels; parts = tuple(f'layer.{i}' for i in range(8));"
        "print([len(SubModels(2).step(Draw(s, s, 5, parts)).run) for s in range(40)])"
    )
    here = [len(draw(SubModels(2), s, 5, 8).run) for s in range(40)]
    for hash_seed in ("1", "2"):  # Python's own hash differs between processes
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == str(here), done.stderr


def test_the_draw_of_a_recorded_seed_never_changes() -> None:
    """A resumed run must repeat the draws of the run that it continues, in later versions too."""
    assert [len(draw(SubModels(3), s, 0, 12).run) for s in range(8)] == [12, 3, 12, 6, 6, 3, 3, 12]


@pytest.mark.parametrize(
    ("program", "layers", "message"),
    [
        (SubModels(3), 4, r"layers_per_stage is 3, which does not divide the 4 layers of the model; expected one of"),
        (Top(5), 4, "layers is 5; expected at most the 4 layers"),
        (Shared(uses=(2, 2)), 4, "uses has 2 numbers; expected one for each of the 4 layers"),
        (VirtualDepth(3), 4, "layers is 3; expected at least the 4 layers"),
        (Frozen(("layr.*",)), 4, r"parts.0 is 'layr.\*'; expected a pattern of 'embeddings', 'head' or a layer"),
        (SubModels(1), 0, "the model has no layers to train by stages; expected the program 'full'"),
        (Top(1), 0, "layers is 1; expected at most the 0 layers"),
        (Fresh(), 0, "no growth before it inserted layers"),
        (Shared(uses=(2,)), 0, "uses has 1 numbers; expected one for each of the 0 layers"),
        (VirtualDepth(3), 0, "the model has no layers to share"),
        (
            Frozen(("layer.*",)),
            0,
            r"parts.0 is 'layer.\*'; expected a pattern of 'embeddings', 'head' of a model without",
        ),
    ],
)
def test_what_does_not_fit_a_model_is_refused(program: Any, layers: int, message: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"phases.0.program \('{program.kind}'\): {message}"):
        check(program, parts(layers), 1, "phases.0.program")


def test_a_model_without_layers_has_a_program() -> None:
    for program in (Full(), Shared(times=2), Frozen(("head",))):
        check(program, (), 1, "phases.0.program")
        assert draw(program, 3, 0, 0).run == ()


def test_two_stacks_run_whole() -> None:
    check(Top(2), parts(4), 2, "")
    with pytest.raises(InvalidConfig, match="2 stacks"):
        check(SubModels(2), parts(4), 2, "")


@dataclass(frozen=True)
class EverySecond:
    """Layers of even and odd number learn in turn."""

    first: int = 0
    kind: str = field(default="every-second", init=False)

    def check(self, layers: int) -> None: ...

    def step(self, draw: Draw) -> Step:
        mine = draw.parts[(draw.step + self.first) % 2 :: 2]
        return Step(tuple(range(len(draw.parts))), frozenset({"head", *mine}))


def test_a_recipe_file_may_define_its_own(tmp_path: Any) -> None:
    """It is recorded by its kind, checked at the door, and known again in the same program."""
    made = tiny.recipe(phases=(tiny.Phase("own", 3, EverySecond(1)),))
    assert made.to_dict()["phases"][0]["program"] == {"first": 1, "kind": "every-second"}
    assert from_dict(made.to_dict()) == made
    with pytest.raises(InvalidConfig, match="frozen dataclass"):
        tiny.Phase("own", 3, object())
