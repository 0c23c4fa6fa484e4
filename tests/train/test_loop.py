"""The training loop's folder, refusals, divergence, and which checkpoints are kept."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader, eval_batches
from bert2bert.data.objective import Masked
from bert2bert.errors import InvalidConfig, UserError
from bert2bert.recipe import Phase
from bert2bert.train import save
from tests.distributed import run_ranks
from tests.rounding import ROUNDING, gap
from tests.steps import whole
from tests.tables.test_flops import formula
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def fake(root: Path, step: int, kind: str | None) -> None:
    folder = root / f"global_step{step}"
    folder.mkdir()
    if kind is None:
        (folder / save.UNFINISHED).touch()
    elif kind == "none":  # somebody else's
        (folder / "weights.bin").touch()
    else:
        (folder / save.MANIFEST).write_text(json.dumps({"format_version": 1, "kind": kind, "files": {}}))


def test_a_save_killed_in_its_commit_is_not_taken_for_a_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two of its steps: one mark at least says whose the folder is."""
    manifest = Manifest(kind="train", format="zero", world_size=0)
    for call in ("fsync_tree", "write_manifest", "set_latest"):
        fake(tmp_path, 4, None)
        with monkeypatch.context() as patch:
            patch.setattr(save, call, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                save._commit(tmp_path, tmp_path / "global_step4", manifest, [], 3)
        assert save._kind(tmp_path / "global_step4") in (None, "train"), call
        shutil.rmtree(tmp_path / "global_step4")
    fake(tmp_path, 4, None)
    save._commit(tmp_path, tmp_path / "global_step4", manifest, [], 3)
    assert [path.name for path in (tmp_path / "global_step4").iterdir()] == [save.MANIFEST]
    assert json.loads((tmp_path / "global_step4" / save.MANIFEST).read_text())["files"] == {}


def test_prune_keeps_the_last_and_what_is_not_ours(tmp_path: Path) -> None:
    for step, kind in ((1, "train"), (2, "train"), (3, None), (4, "train"), (5, "growth"), (6, "none"), (9, "train")):
        fake(tmp_path, step, kind)
    fake(tmp_path, 7, "train")
    (tmp_path / "tensorboard").mkdir()
    save.prune(tmp_path, "global_step7", keep=2)
    left = {p.name for p in tmp_path.glob("global_step*")}
    assert left == {f"global_step{n}" for n in (4, 5, 6, 7, 9)}
    save.prune(tmp_path, "global_step7", keep=1)
    assert not (tmp_path / "global_step4").exists() and (tmp_path / "global_step7").exists()


def test_a_tag_that_is_written_again_is_not_the_latest_meanwhile(tmp_path: Path) -> None:
    """After a resume from an older tag: a kill during the save would leave `latest` naming half a checkpoint."""
    for step, kind in ((2, "train"), (3, None), (4, "growth"), (6, "train"), (8, "train")):
        fake(tmp_path, step, kind)
    save.set_latest(tmp_path, "global_step6")
    save._withdraw(tmp_path, tmp_path / "global_step8")
    assert (tmp_path / "latest").read_text() == "global_step6"
    save._withdraw(tmp_path, tmp_path / "global_step6")
    assert (tmp_path / "latest").read_text() == "global_step2"
    save._withdraw(tmp_path, tmp_path / "global_step2")
    assert not (tmp_path / "latest").exists()


def test_ranks_that_do_not_see_the_same_folder_are_told_so(tmp_path: Path) -> None:
    fake(tmp_path, 2, None)
    folder = tmp_path / "global_step2"
    (folder / save.random_file(0)).touch()
    with pytest.raises(UserError, match="lacks the files of 1 of 2 ranks, the first of them 1"):
        save._commit(tmp_path, folder, Manifest(format="zero", world_size=2), [], 1)
    assert not (tmp_path / "latest").exists() and not (folder / save.MANIFEST).exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory in step 3. Lower train_micro_batch_size"),
        (Exception("Current loss scale already at minimum - cannot decrease"), "smallest loss scale in step 3"),
        (RuntimeError("backend='inductor' raised: Failed to find C compiler."), "TORCHDYNAMO_DISABLE=1"),
    ],
)
def test_what_a_step_dies_of_isexplained(error: Exception, words: str) -> None:
    from bert2bert.train.errors import explained

    with pytest.raises(UserError) as caught, explained("in step 3"):
        raise error
    assert words in str(caught.value) and caught.value.__cause__ is error
    with pytest.raises(ZeroDivisionError), explained("in step 3"):
        raise ZeroDivisionError


def one_rank(bins: Path, root: Path) -> dict[str, Any]:
    """Everything that one rank can show, in one process."""
    from bert2bert.train.engine import Engine

    def refused(*args: Any, **more: Any) -> tuple[str, str]:
        try:
            runs.run(*args, **more)
        except UserError as error:
            return type(error).__name__, str(error)
        return "", ""

    out: dict[str, Any] = {}
    plan = runs.recipe(bins, phases=(Phase("one", 2), Phase("left out", 0), Phase("two", 2)), log_every=3, eval_every=3)
    config = tiny.ds_config(1, world=1)
    out["first"] = runs.run(plan, config, root / "run")
    out["again"] = refused(plan, config, root / "run")
    out["complete"] = runs.run(plan, config, root / "run", resume=root / "run")
    out["longer"] = runs.run(
        replace(plan, phases=(*plan.phases, Phase("three", 1))), config, root / "run", root / "run"
    )
    out["inside"] = refused(plan, config, root, resume=root / "run")
    small = replace(plan, model={**plan.model, "vocab_size": 32})
    out["vocabulary"] = refused(small, config, root / "small")
    out["written"] = (root / "small").exists()
    out["nothing"] = refused(plan, config, root / "new", resume=root / "nowhere")
    out["new"] = (root / "new").exists()

    original = Engine.forward

    def diverge(self: Any, batch: Any, program: Any = None) -> Any:
        loss, *rest = original(self, batch, program)
        return (loss * float("nan") if self.model.training and self.ds.global_steps == 2 else loss, *rest)

    Engine.forward = diverge
    try:
        every = replace(plan, checkpoint_every=2)
        out["diverged"] = refused(every, config, root / "nan")
    finally:
        Engine.forward = original
    out["left"] = sorted(p.name for p in (root / "nan").glob("global_step*"))

    misspelt = {**config, "zero_optimization": {"stage": 1, "overlap_com": True}}
    out["misspelt"] = refused(plan, misspelt, root / "misspelt")

    usage = namedtuple("usage", "total used free")
    keep, save.shutil.disk_usage = save.shutil.disk_usage, lambda path: usage(100, 90, 10)
    try:
        out["full"] = refused(plan, config, root / "full")
    finally:
        save.shutil.disk_usage = keep
    return out


def spent(bins: Path, steps: int, world: int) -> int:
    """FLOPs of these steps of `runs.recipe` without sub-models, by BERT's formula, from the text of so many ranks."""
    plan = runs.recipe(bins)
    loaders = [
        Loader(TokenBins.open(bins), "train", Masked(), 16, plan.global_batch_size // world, rank, world, plan.seed)
        for rank in range(world)
    ]
    batches = [next(loader) for loader in loaders for _ in range(steps)]
    config = tiny.model_config() | {"architectures": ["BertForMaskedLM"]}
    return sum(
        formula(config, tuple(map(int, b.lengths)), int((b.labels >= 0).sum()), whole(tiny.LAYERS)) for b in batches
    )


@pytest.mark.timeout(120)
def test_one_rank(bins: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(one_rank, 1, bins, tmp_path, timeout=110)
    first = found["first"]
    assert first["step"] == 4 and first["stopped"] is None and first["tokens"] > 0
    assert first["flops"] == spent(bins, 4, world=1) == spent(bins, 4, world=2)
    kind, text = found["again"]
    assert kind == InvalidConfig.__name__ and "already holds a run" in text and "--resume" in text
    assert found["complete"]["step"] == 4 and found["longer"]["step"] == 5
    assert found["inside"][0] == InvalidConfig.__name__ and "lies inside" in found["inside"][1]
    assert found["vocabulary"][0] == InvalidConfig.__name__ and "32" in found["vocabulary"][1]
    assert found["nothing"][0] == "InvalidCheckpoint" and "nowhere" in found["nothing"][1]
    assert not found["written"] and not found["new"]
    kind, text = found["diverged"]
    assert kind == "UserError" and "the loss is nan in step 3 (phase 'two')" in text and "of step 2" in text
    assert found["left"] == ["global_step2"]
    assert found["misspelt"][0] == InvalidConfig.__name__ and "overlap_com: Extra inputs" in found["misspelt"][1]
    assert found["full"][0] == "UserError" and "free" in found["full"][1]

    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["name"] == "tiny" and about["world_size"] == 1 and about["source"] is None and about["finished"]
    assert about["data"]["heldout_unigram_entropy"] > 0 and set(about["data"]) >= {"digest", "tokenizer_digest"}
    assert set(about["versions"]) == {"bert2bert", "torch", "deepspeed"}
    records = runs.records(tmp_path / "run")
    trained = [r for r in records if r["kind"] == "train"]
    assert [(r["step"], r["phase"], r["phase_step"]) for r in trained] == [
        (2, "one", 2), (3, "two", 1), (4, "two", 2), (5, "three", 1),
    ]  # fmt: skip
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 3, 4, 5]
    assert all(r["perplexity"] == pytest.approx(np.exp(r["loss"])) for r in records if r["kind"] == "eval")
    assert all(a["flops"] < b["flops"] and a["tokens"] < b["tokens"] for a, b in pairwise(trained))
    assert all(r["mfu"] is None and r["loss_scale"] is None and r["layers_run"] == tiny.LAYERS for r in trained)


def evaluations(bins: Path, stages: tuple[int, ...]) -> list[dict[str, float]]:
    import os

    from bert2bert.train import engine as engines
    from bert2bert.train.evaluate import evaluate

    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    out = []
    for stage in stages:
        engine = engines.build(runs.recipe(bins), tiny.ds_config(stage, world=world), tiny.model(nsp=False))
        batches = eval_batches(TokenBins.open(bins), "heldout", Masked(), 16, 2, 11, rank, world, 0)
        before = torch.get_rng_state()
        out.append(evaluate(engine, batches))
        assert torch.equal(before, torch.get_rng_state())  # dropout is off: training does not notice
        assert engine.model.training
        engine.destroy()
    return out


@pytest.mark.timeout(60)
def test_evaluation_does_not_depend_on_ranks_and_stage(bins: Path) -> None:
    (alone,) = run_ranks(evaluations, 1, bins, (0,), timeout=50)
    for shared in run_ranks(evaluations, 2, bins, (1, 3), timeout=50):
        for result in shared:
            assert gap(result["loss"], alone[0]["loss"]) <= ROUNDING
            assert result["accuracy"] == alone[0]["accuracy"]
