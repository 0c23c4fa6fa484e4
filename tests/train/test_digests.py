"""Training checkpoints carry the digest of every file: one changed byte of any kind of file is found and named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.commit.pending import file_sizes
from bert2bert.checkpoints.inspect import check
from bert2bert.checkpoints.inspect_text import render_check
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.commands import cli
from bert2bert.errors import UserError
from bert2bert.files.digest import FILE_DIGEST, file_digest
from bert2bert.recipe import Phase
from bert2bert.train import save, writing
from tests.distributed import run_ranks
from tests.train import runs, tiny

CASES = [(0, "fp32"), (2, "bf16"), (3, "fp32")]


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def short(bins: Path) -> Any:
    return runs.recipe(bins, phases=(Phase("all", 1),), eval_every=100, checkpoint_every=100)


def one_step(bins: Path, root: Path, cases: list[tuple[int, str]]) -> None:
    for stage, precision in cases:
        runs.run(short(bins), tiny.ds_config(stage, precision), root / f"z{stage}")


@pytest.fixture(scope="module")
def home(bins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(one_step, 2, bins, root, CASES, timeout=60)
    return root


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_changed_byte_of_any_file_is_named(
    home: Path, stage: int, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = home / f"z{stage}"
    folder = run / "global_step1"
    manifest = json.loads((folder / MANIFEST).read_text())
    kinds = {"bert2bert_rng_rank_00000.pt", "bert2bert_rng_rank_00001.pt"}
    if stage < 3:
        kinds |= {"mp_rank_00_model_states.pt"}
    else:
        kinds |= {f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)}
    if stage:
        prefix = "bf16_" if precision == "bf16" else ""
        kinds |= {f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)}
    assert manifest["digests"]["kind"] == FILE_DIGEST
    assert manifest["digests"]["files"].keys() == manifest["files"].keys() == file_sizes(folder).keys() == kinds
    assert cli.main(["inspect", "--check", str(run)]) == 0
    assert "sizes and contents: all as the manifest says" in capsys.readouterr().out
    for name in kinds:
        content = (folder / name).read_bytes()
        for at in (len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert cli.main(["inspect", "--check", str(run)]) == 1
            out = capsys.readouterr().out
            assert f"bad          {name}: content differs" in out and out.count("content differs") == 1
        (folder / name).write_bytes(content)
    assert not check(run).bad


def test_a_manifest_of_an_older_version_is_checked_by_sizes(home: Path, bins: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "z2", tmp_path / "run")
    path = tmp_path / "run" / "global_step1" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digests"], manifest["digest"]
    path.write_text(json.dumps(manifest))
    found = check(tmp_path / "run")
    assert found.digests == 0 and not found.bad and ", sizes: all as the manifest" in render_check(found)
    assert run_ranks(lengthened, 1, bins, tmp_path / "run", timeout=60) == [2]
    assert check(tmp_path / "run").digests == 3


def lengthened(bins: Path, run: Path) -> int:
    plan = runs.recipe(bins, phases=(Phase("all", 2),), eval_every=100, checkpoint_every=100)
    step: int = runs.run(plan, tiny.ds_config(2, "bf16", world=1), run, resume=run)["step"]
    return step


def fail_on_one_rank(bins: Path, output: Path, victim: int) -> str:
    """What every rank learns when one of them cannot read its files back."""

    def broken(path: Path) -> str:
        if int(os.environ["RANK"]) == victim:
            raise OSError(5, "Input/output error", str(path))
        return file_digest(path)

    writing.file_digest = broken
    try:
        runs.run(short(bins), tiny.ds_config(2), output)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_cannot_read_its_files_back_stops_all(bins: Path, tmp_path: Path, victim: int) -> None:
    for text in run_ranks(fail_on_one_rank, 2, bins, tmp_path / "run", victim, timeout=50):
        assert "cannot be written: Input/output error" in text and "global_step1" in text
    folder = tmp_path / "run" / "global_step1"
    assert not (folder / MANIFEST).exists() and (folder / save.UNFINISHED).exists()
    assert not (tmp_path / "run" / "latest").exists()
