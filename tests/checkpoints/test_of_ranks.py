"""What every rank of a ZeRO 3 engine keeps of its own comes back to that rank, as DeepSpeed's own load gives it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.open import open_source
from bert2bert.commands import cli
from bert2bert.measure.resharded import compare
from tests.checkpoints.engines import Case, build, hf_config, release, train
from tests.distributed import run_ranks

CASE = Case("run", 3, model="mlm", layout="single", buffer=True, steps=1)
NOTE = "the first rank's for all ranks: {} (client state, buffers), of which the source's 2 ranks keep their own; "


def rank_of() -> int:
    import deepspeed.comm as dist

    return int(dist.get_rank())


def save(folder: str) -> None:
    engine = build(CASE)
    train(engine, CASE)
    engine.module.get_buffer("bert.tally").add_(rank_of())
    random = torch.Generator().manual_seed(rank_of()).get_state()
    mine = {"random": random, "epoch": 2, **({"best": 0.5} if rank_of() == 1 else {})}
    engine.save_checkpoint(folder, client_state=mine)
    release(engine)


def load(folder: str, case: Case) -> tuple[Any, ...]:
    """What DeepSpeed gives this rank: seed, epoch, what only one rank has, and the buffer."""
    engine = build(case)
    _, client = engine.load_checkpoint(folder)
    found = (
        int(client["random"][0]),
        client["epoch"],
        client.get("best"),
        engine.module.get_buffer("bert.tally").tolist(),
    )
    release(engine)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(save, 2, str(folder / "run"))
    for name, layers in (("small", 2), ("big", 4)):
        (folder / f"{name}.json").write_text(json.dumps({"model_type": "bert", **hf_config(num_hidden_layers=layers)}))
    return folder


@pytest.mark.parametrize("command", ["reshard", "grow"])
def test_each_rank_has_its_own_again(
    run: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = run_ranks(load, 2, str(run / "run"), CASE)
    assert [(seed, epoch, best) for seed, epoch, best, _ in theirs] == [(0, 2, None), (1, 2, 0.5)]
    assert theirs[0][3] != theirs[1][3]
    form = ["--format", "zero", "--stage", "3", "--world-size", "2", "--source-config", str(run / "small.json")]
    more = ["--config", str(run / "big.json"), "--no-measure"] if command == "grow" else []
    assert cli.main([command, str(run / "run"), str(tmp_path / "out"), *form, *more]) == 0
    assert "first rank" not in capsys.readouterr().out
    case = replace(CASE, sizes={"num_hidden_layers": 4}) if more else CASE
    assert run_ranks(load, 2, str(tmp_path / "out"), case) == theirs
    assert cli.main(["verify", str(run / "run"), str(tmp_path / "out"), *form[-2:]]) == 0
    if command == "reshard":
        assert "each rank's own" in capsys.readouterr().out
        source, target = open_source(run / "run"), open_source(tmp_path / "out")
        target.of_ranks = target.of_ranks[::-1]
        found: dict[str, str] = {}
        compare(source, target, lambda name, ok, text: found.update({} if ok else {name: text}))
        assert found == {"states of ranks": "rank 0 differs"}


@pytest.mark.parametrize(
    "form", [[], ["--format=zero", "--stage=3", "--world-size=3"], ["--format=zero", "--stage=2", "--world-size=2"]]
)  # fmt: skip
def test_what_has_no_place_is_said(
    run: Path, tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--source-config", str(run / "small.json")]
    assert cli.main(["reshard", str(run / "run"), str(tmp_path / "out"), *form, *small]) == 0
    assert NOTE.format("bert.tally, best, random") in capsys.readouterr().out
    assert cli.main(["verify", str(run / "run"), str(tmp_path / "out"), *small]) == 0
    more = ["--config", str(run / "big.json"), "--no-measure", *small]
    assert cli.main(["grow", str(run / "run"), str(tmp_path / "grown"), *form, *more]) == 0
    assert NOTE.format("bert.tally, best, random") in capsys.readouterr().out
