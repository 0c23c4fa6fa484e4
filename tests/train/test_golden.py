"""Losses of twenty steps as they were recorded once: a change of what a training step computes shows here.

`python -m tests.train.test_golden` records them again, after a change that means to change them. Nothing drops out, for
such draws are another generator's on other processors; and no wrong scale of a gradient hides behind Adam's division:
clipping binds in some of the steps, and epsilon counts beside the moments.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bert2bert.recipe import AdamW, Phase, Recipe, Schedule, SubModels, Top
from tests.distributed import run_ranks
from tests.train import runs, tiny
from tests.train.test_architectures import counting, model_of, recipe_of

GOLDEN = Path(__file__).parents[1] / "data" / "golden_losses.json"
RUNS = {"bert": 0, "gpt2": 1, "llama": 2, "t5": 3}  # the ZeRO stage at which each is run
TOLERANCE = 1e-5
"""Relative. All of these runs at all ZeRO stages, by torch's kernels for AVX-512, AVX2 and neither
(ATEN_CPU_CAPABILITY=avx512, avx2, default), were at most 1.7e-7 from what is recorded; each mistake that
`tests.mutations` makes in a training step moves every architecture's losses by at least 8.8e-4."""


def recipe(bins: Path, kind: str) -> Recipe:
    """Some layers learn at a rate that warms up, then all of them along a wave."""
    some = Top(1) if kind == "t5" else SubModels(1)
    phases = (
        Phase("some", 8, some, Schedule("linear", warmup_steps=4, final=0.5)),
        Phase("all", 12, schedule=Schedule("cosine", warmup_steps=2)),
    )
    optimizer = AdamW(lr=1e-2, betas=(0.9, 0.98), eps=1e-3, weight_decay=0.5)
    plan = recipe_of(bins, model_of(kind), gradient_clipping=1.2)
    return replace(plan, phases=phases, optimizer=optimizer, eval_every=20)


def trained(bins: Path, root: Path) -> dict[str, dict[str, list[float]]]:
    """{architecture: {kind of record: losses}}, of two ranks with two micro-batches each."""
    found = {}
    for kind, stage in RUNS.items():
        runs.run(recipe(bins, kind), tiny.ds_config(stage), root / kind, quiet=True)
        records = runs.records(root / kind)
        found[kind] = {what: [r["loss"] for r in records if r["kind"] == what] for what in ("train", "eval")}
    return found


def losses(root: Path) -> dict[str, Any]:
    return run_ranks(trained, 2, counting(root / "bins"), root)[0]  # type: ignore[no-any-return]


@pytest.mark.timeout(100)
def test_twenty_steps_have_the_losses_that_were_recorded(tmp_path: Path) -> None:
    found, golden = losses(tmp_path), json.loads(GOLDEN.read_text(encoding="utf-8"))
    for kind in RUNS:
        for what, steps in (("train", 20), ("eval", 2)):
            assert len(found[kind][what]) == steps
            assert found[kind][what] == pytest.approx(golden[kind][what], rel=TOLERANCE, abs=0), (kind, what)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = losses(Path(folder))
    digits = {
        kind: {what: [float(f"{x:.9g}") for x in each] for what, each in of.items()} for kind, of in found.items()
    }
    lines = (f'"{kind}": {json.dumps(of)}' for kind, of in digits.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
