"""`bert2bert submit`: what it refuses at the door, and a script that is pretrain.sbatch with its settings filled in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from bert2bert.commands.cli import main

ROOT = Path(__file__).parents[1]
DEMO = ["--ds_config", str(ROOT / "ds_configs" / "zero2_cpu.json")]


def submit(output: Path, *words: str, recipe: str = "demo_small") -> int:
    return main(["submit", str(ROOT / "recipes" / f"{recipe}.py"), *DEMO, "--output", str(output), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "3"], "on 24 ranks that makes 1536 rows, which do not divide the recipe's global_batch_size, 256"),
        (["--nodes", "0"], "--nodes is 0; expected a whole number from 1 on"),
        (["--time", "soon"], "--time is 'soon'; expected minutes"),
        (["--gpus-per-node", "2", "--", "--set", "sed=1"], "unknown key 'sed'"),
        (["--gpus-per-node", "2", "--", "--output", "x"], "--output behind `--`: it is an option of submit itself"),
        (["--gpus-per-node", "2", "--", "--resume", "a", "--from", "b"], "--from b belongs to --resume auto"),
        (["--gpus-per-node", "2", "--env", "NOT_SET_ANYWHERE"], "--env NOT_SET_ANYWHERE: it is not set here"),
        (["--gpus-per-node", "2", "--env", "A-B=1"], "'A-B' is no variable's name"),
        (["--gpus-per-node", "2", "--sbatch", "exclusive"], "--sbatch is 'exclusive'; expected one option of sbatch"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_option_that_training_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        submit(tmp_path / "run", "--gpus-per-node", "2", "--", "--bin", "x")
    assert ended.value.code == 2 and "unknown option --bin: did you mean '--bins'?" in capsys.readouterr().err


def test_the_script_holds_every_setting_and_the_shipped_logic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_DEBUG", "a'b")
    words = ["--nodes", "2", "--gpus-per-node", "2", "--account", "lab", "--lead", "90", "--env", "NCCL_DEBUG"]
    assert submit(Path("it's run"), *words, "--json", "--sbatch=--mem=0", "--", "--bins", "bins", "--resume=auto") == 0
    script = tmp_path / "it's run" / "pretrain.sbatch"
    assert json.loads(capsys.readouterr().out) == {
        "script": str(script),
        "command": ["sbatch", str(script)],
        "job": None,
    }
    text = script.read_text()
    top, _, body = text.partition("\nset -eu\n")
    for line in ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--account=lab", "--requeue", "--mem=0"):
        assert f"\n#SBATCH {line}\n" in top
    assert "\nLEAD=90\n" in top and f"\nPROJECT={ROOT}\n" in top and "The project's commit: " in top
    shipped = (ROOT / "launch" / "pretrain.sbatch").read_text().partition("\nset -eu\n")[2]
    before, after = shipped.split('. "$PROJECT/launch/job.sh"\n')
    assert body == before + (ROOT / "launch" / "job.sh").read_text() + after
    shown = subprocess.run(
        ["bash", "-c", f'{top}\nprintf \'%s\\n\' "$@" "$NCCL_DEBUG"'], capture_output=True, text=True, timeout=30
    )
    run = [ROOT / "recipes" / "demo_small.py", ROOT / "ds_configs" / "zero2_cpu.json", script.parent]
    assert shown.stdout.splitlines() == [*map(str, run), "--bins", str(tmp_path / "bins"), "--resume=auto", "a'b"]


def test_what_sbatch_refuses_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    words = ["--gpus-per-node", "2", "--partition", "gpx", "--yes"]
    assert submit(tmp_path / "run", *words) == 2
    assert "sbatch cannot be run here" in capsys.readouterr().err
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpx' >&2; exit 1\n")
    sbatch.chmod(0o755)
    assert submit(tmp_path / "run", *words) == 2
    assert f"sbatch refused {tmp_path}/run/pretrain.sbatch: sbatch: error: invalid partition" in capsys.readouterr().err
