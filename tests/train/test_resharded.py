"""A run goes on from what `reshard` made of its checkpoint, or of a growth, as it does from that checkpoint itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bert2bert.commands import cli
from bert2bert.recipe import Phase, Recipe
from tests.distributed import run_ranks
from tests.train import runs, tiny

RUNS = [(2, "fp32"), (3, "fp16")]
CUTS = {
    "universal": [],
    "zero0": ["--format", "zero", "--stage", "0"],
    "zero1x3": ["--format", "zero", "--stage", "1", "--world-size", "3"],
    "zero3x2": ["--format", "zero", "--stage", "3", "--world-size", "2"],
}
GROWN = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
Job = tuple[Recipe, dict[str, Any], Path, Path]
"""Recipe, ds_config, output, what it goes on from."""


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def straight_and_stopped(bins: Path, root: Path) -> None:
    tiny.allow_fp16()
    for stage, precision in RUNS:
        config = tiny.ds_config(stage, precision)
        runs.run(runs.recipe(bins), config, root / f"straight{stage}")
        runs.run(runs.recipe(bins), config, root / f"stopped{stage}", stop_at=4)


@pytest.fixture(scope="module")
def home(bins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 8 steps in two phases, and the same stopped after the first step of the second."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(straight_and_stopped, 2, bins, root, timeout=90)
    return root


def go_on(jobs: list[Job]) -> None:
    tiny.allow_fp16()
    for plan, config, output, source in jobs:
        runs.run(plan, config, output, resume=source)


def same_end(one: Path, other: Path, step: int, past: int) -> None:
    """The records past a step and the checkpoint of the last one are equal: losses, rates, position, every digest."""
    records = [[r for r in runs.records(run) if r["step"] > past] for run in (one, other)]
    assert records[0] == records[1] and len(records[0]) >= step - past
    a, b = (runs.manifest(run, step) for run in (one, other))
    assert a["tensors"] == b["tensors"] and a["groups"] == b["groups"] and a["counters"] == b["counters"]
    positions = [{k: v for k, v in m["training"].items() if k != "spent"} for m in (a, b)]
    spent = [{k: v for k, v in m["training"]["spent"].items() if k != "seconds"} for m in (a, b)]
    assert positions[0] == positions[1] and spent[0] == spent[1]


@pytest.mark.timeout(150)
def test_a_run_goes_on_exactly_however_its_checkpoint_was_cut_again(bins: Path, home: Path, tmp_path: Path) -> None:
    jobs: list[Job] = []
    for stage, precision in RUNS:
        for cut, options in CUTS.items():
            if precision == "fp16" and cut != "universal":
                continue
            target = tmp_path / f"{stage}to{cut}"
            assert cli.main(["reshard", str(home / f"stopped{stage}"), str(target), *options]) == 0
            assert cli.main(["inspect", "--check", str(target)]) == 0
            jobs.append((runs.recipe(bins), tiny.ds_config(stage, precision), tmp_path / f"{stage}from{cut}", target))
    twice = tmp_path / "twice"
    assert cli.main(["reshard", str(tmp_path / "2tozero1x3"), str(twice), *CUTS["universal"]]) == 0
    jobs.append((runs.recipe(bins), tiny.ds_config(2), tmp_path / "2fromtwice", twice))
    run_ranks(go_on, 2, jobs, timeout=140)
    for _, _, output, _ in jobs:
        same_end(home / f"straight{output.name[0]}", output, step=8, past=5)
        assert json.loads((output / "run.json").read_text())["source"]["kind"] == "train"


@pytest.mark.timeout(90)
def test_on_another_number_of_ranks_as_from_the_run_itself(
    bins: Path, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reshard", str(home / "stopped2"), str(tmp_path / "target"), *CUTS["zero1x3"]]) == 0
    config = tiny.ds_config(2, world=1)
    sources = {"itself": home / "stopped2", "resharded": tmp_path / "target"}
    capfd.readouterr()
    run_ranks(go_on, 1, [(runs.recipe(bins), config, tmp_path / n, s) for n, s in sources.items()], timeout=80)
    assert capfd.readouterr().err.count("saved on 2 ranks, continued on 1: the data go on in order") == 2
    same_end(tmp_path / "itself", tmp_path / "resharded", step=8, past=5)


@pytest.mark.timeout(120)
def test_a_growth_goes_on_the_same(bins: Path, home: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**tiny.model_config(0.1), **GROWN}))
    grown = tmp_path / "grown"
    assert cli.main(["grow", str(home / "stopped2"), str(grown), "--config", str(config), "--width", "fpi"]) == 0
    plan = runs.recipe(
        bins, model={**tiny.model_config(0.1), **GROWN}, phases=(Phase("all", 3),), eval_every=3, checkpoint_every=3
    )
    jobs: list[Job] = [(plan, tiny.ds_config(2), tmp_path / "from", grown)]
    for cut in ("universal", "zero3x2"):
        assert cli.main(["reshard", str(grown), str(tmp_path / f"to{cut}"), *CUTS[cut]]) == 0
        jobs.append((plan, tiny.ds_config(2), tmp_path / f"from{cut}", tmp_path / f"to{cut}"))
    run_ranks(go_on, 2, jobs, timeout=100)
    spent = runs.manifest(home / "stopped2", 5)["training"]["spent"]
    for _, _, output, _ in jobs:
        same_end(tmp_path / "from", output, step=3, past=-1)
        source = json.loads((output / "run.json").read_text())["source"]
        assert source["kind"] == "growth" and source["spent"]["flops"] == spent["flops"]
        assert runs.manifest(output, 3)["growth"] == runs.manifest(tmp_path / "from", 3)["growth"]
