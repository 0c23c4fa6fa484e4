"""The universal reader on what DeepSpeed's own converter makes of ZeRO 1, 2 and 3, against the live engines."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import STATES
from bert2bert.errors import InvalidCheckpoint
from tests.checkpoints.engines import Case, load_truth, save_cases
from tests.checkpoints.test_readers_zero import edit, equal

CASES = [
    Case("z1", 1, "bf16", frozen=("layer.0.",), buffer=True, client_state={"epoch": 2}),
    Case("z2", 2, "fp16", layout="layers", zero={"parameter_alignment": True}),
    Case("z3", 3, zero={"sub_group_size": 1500}, layout="layers"),
    Case("z3frozen", 3, "bf16", frozen=("layer.0.",), buffer=True),
]


def convert(tag: Path, output: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    main(
        argparse.Namespace(
            input_folder=str(tag), output_folder=str(output), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("universal")
    save_cases(folder, 2, CASES, timeout=200)
    for case in CASES:
        run = folder / case.name
        convert(run / "global_step3", run / "uni")
        (run / "latest").unlink()
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everything_equals_the_live_engine(saved: Path, case: Case) -> None:
    live = load_truth(saved, case)
    source = open_source(saved / case.name)  # by latest_universal
    assert (source.format, source.tag, source.stage, source.world_size) == ("universal", "uni", None, None)
    assert (source.precision, source.states) == (case.precision, STATES)
    assert list(source.tensors) == list(live["tensors"])
    for name, states in live["tensors"].items():
        meta = source.tensors[name]
        assert meta.trainable == (name in live["step"]) and source.step(name) == live["step"].get(name, 0)
        for state, want in states.items():
            assert equal(source.read(name, state, 0, len(want)), want), (name, state)
            assert equal(source.read(name, state, 1, len(want) - 1), want[1:-1])
        if not meta.trainable:
            assert not source.read(name, "exp_avg", 0, meta.shape[0]).any()
    for found, want in zip(source.groups, live["groups"], strict=True):
        assert {key: found[key] for key in want} == want
    assert source.counters == live["counters"] and source.lr_scheduler == live["lr_scheduler"]
    assert source.loss_scaler == live["loss_scaler"] and source.client_state == case.client_state
    assert all(equal(source.buffers[name], want) for name, want in live["buffers"].items())
    assert source.aliases["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"


def test_reads_are_views_and_few_files_stay_open(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bert2bert.checkpoints.universal.reader._OPEN_FILES", 3)
    source = open_source(saved / "z3")
    name = "bert.embeddings.word_embeddings.weight"
    assert source.read(name, "exp_avg", 2, 9).data_ptr() == source.read(name, "exp_avg", 0, 61)[2:].data_ptr()
    for other in source.tensors:
        source.read(other, "fp32", 0, 1)
    assert len(source._open) == 3


def spoil(kind: str, tag: Path) -> None:
    weight = tag / "zero" / "bert.pooler.dense.weight"
    match kind:
        case "no-values":
            (weight / "fp32.pt").unlink()
        case "half-moments":
            (weight / "exp_avg_sq.pt").unlink()
        case "no-optimizer":
            (tag / "zero" / "optimizer_state.pt").unlink()
        case "foreign-optimizer":
            torch.save({"x": 1}, tag / "zero" / "optimizer_state.pt")
        case "size":
            torch.save({"param": torch.zeros(7)}, weight / "fp32.pt")
        case "no-tensor":
            torch.save({"weight": torch.zeros(7)}, weight / "fp32.pt")
        case "truncated":
            (weight / "fp32.pt").write_bytes((weight / "fp32.pt").read_bytes()[:500])
        case "round-robin":
            options = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
            edit(tag / "mp_rank_00_model_states.pt", lambda content: content.update(ds_config=options))
        case "no-model-states":
            (tag / "mp_rank_00_model_states.pt").unlink()


@pytest.mark.parametrize(
    ("kind", "message"),
    {
        "no-values": r"bert.pooler.dense.weight: lacks fp32.pt, though the model states name the parameter",
        "half-moments": r"lacks exp_avg_sq.pt",
        "no-optimizer": r"optimizer_state.pt: no such file",
        "foreign-optimizer": r"no optimizer state of a universal checkpoint",
        "size": r"fp32.pt: holds 7 elements, shape \(32, 32\) needs 1024",
        "no-tensor": r"fp32.pt: holds no tensor",
        "truncated": r"fp32.pt: truncated",
        "round-robin": r"converted from a run with zero_optimization.round_robin_gradients.*Use the native checkpoint",
        "no-model-states": r"no \*_model_states.pt",
    }.items(),
)
def test_bad_folders_each_get_one_clear_message(saved: Path, tmp_path: Path, kind: str, message: str) -> None:
    tag = shutil.copytree(saved / "z2" / "uni", tmp_path / "uni")
    spoil(kind, tag)
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tag).read("bert.pooler.dense.weight", "fp32", 0, 1)


def test_a_parameter_without_moments_reads_as_never_stepped(saved: Path, tmp_path: Path) -> None:
    tag = shutil.copytree(saved / "z2" / "uni", tmp_path / "uni")
    for state in ("exp_avg", "exp_avg_sq", "step"):
        (tag / "zero" / "bert.pooler.dense.weight" / f"{state}.pt").unlink()
    source = open_source(tag)
    assert source.step("bert.pooler.dense.weight") == 0 and source.step("bert.pooler.dense.bias") == 3
    zeros: Any = source.read("bert.pooler.dense.weight", "exp_avg", 3, 5)
    assert equal(zeros, torch.zeros(2, 32))
    for folder in (tag / "zero").iterdir():
        for state in ("exp_avg", "exp_avg_sq") if folder.is_dir() else ():
            (folder / f"{state}.pt").unlink(missing_ok=True)
    assert open_source(tag).states == ("fp32",)
