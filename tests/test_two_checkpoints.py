"""Growths that start from two checkpoints: a grown model interpolated with one of the target's size (the V-cycle)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bert2bert.commands import cli
from bert2bert.commands.verify import verify
from tests import tiny
from tests.rounding import ROUNDING, gap
from tests.test_verify_families import GROWN, result, target


def save(folder: Path, config: dict[str, object], seed: int) -> dict[str, torch.Tensor]:
    """A scrambled model in float32."""
    model = tiny.build(config).float()
    tiny.scramble(model, seed)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def paths(tmp_path: Path, name: str) -> tuple[Path, Path, Path]:
    """A small model, a large one, and the large one's config."""
    goal = target(tmp_path / "big.json", name)
    save(tmp_path / "small", tiny.config_of(name), 1)
    save(tmp_path / "large", tiny.config_of(name, **GROWN[name]), 2)
    return tmp_path / "small", tmp_path / "large", goal


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("form", ["hub", "universal"])
def test_the_v_cycle(name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, goal = paths(tmp_path, name)
    how = ["--config", str(goal), "--width", "decoalesce", "--format", form]
    with_large = ["--with", str(large), "--alpha", "0.25", "--moments", "reset"]
    assert cli.main(["grow", str(small), str(tmp_path / "mixed"), *how, *with_large, "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert f"with     0.75 of {large}, 0.25 of the grown" in out and "width decoalesce" in out
    report = verify(small, tmp_path / "mixed", other=large)
    assert report.ok, report.text()
    assert result(report, "with")[0] and "not promised" in result(report, "logits")[1]
    if form == "hub":
        assert cli.main(["grow", str(small), str(tmp_path / "plain"), *how, "--no-measure"]) == 0
        grown, before, mixed = (
            load_file(tmp_path / folder / "model.safetensors") for folder in ("plain", "large", "mixed")
        )
        for n, value in mixed.items():
            assert gap(value, 0.75 * before[n] + 0.25 * grown[n]) <= ROUNDING, n
    # verify needs the same two, and notices another
    assert cli.main(["verify", str(small), str(tmp_path / "mixed")]) == 2
    assert f"interpolated with {large}; give that checkpoint with --with" in capsys.readouterr().err
    assert cli.main(["verify", str(small), str(tmp_path / "mixed"), "--with", str(small)]) != 0


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, goal = paths(tmp_path, "gpt2")
    save(tmp_path / "other", tiny.config_of("bert"), 3)
    how = ["grow", str(small), str(tmp_path / "out"), "--config", str(goal)]
    for more, text in (
        (["--alpha", "0.5"], "--alpha belongs to --with"),
        (["--with", str(large)], "--with needs --alpha"),
        (["--with", str(large), "--alpha", "1.5"], "alpha is 1.5"),
        (["--with", str(small), "--alpha", "0.5"], "needs a checkpoint of the target's size"),
        (["--with", str(tmp_path / "other"), "--alpha", "0.5"], "a bert, the grown model is a gpt2"),
    ):
        assert cli.main([*how, *more]) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_source_with_moments_needs_them_of_the_other_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, goal = paths(tmp_path, "gpt2")
    same = tmp_path / "same.json"
    same.write_text(json.dumps(tiny.config_of("gpt2")))
    assert cli.main(["grow", str(small), str(tmp_path / "zero"), "--config", str(same), "--no-measure"]) == 0
    how = ["grow", str(tmp_path / "zero"), str(tmp_path / "out"), "--config", str(goal), "--no-measure"]
    assert cli.main([*how, "--with", str(large), "--alpha", "0.5"]) == 2
    assert "holds weights only" in capsys.readouterr().err
    full = tmp_path / "full"
    assert cli.main(["grow", str(large), str(full), "--config", str(goal), "--no-measure"]) == 0
    assert cli.main([*how, "--with", str(full), "--alpha", "0.5"]) == 0
    assert cli.main(["verify", str(tmp_path / "zero"), str(tmp_path / "out"), "--with", str(full)]) == 0
