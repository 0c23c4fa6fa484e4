"""The benchmarks run, and what they check about correctness holds; no speed is asserted."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_benchmark_at_toy_size(tmp_path: Path) -> None:
    printed = run("gpu.py", "--toy", "--commit", "abc1234", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["broken"] and len(found["checks"]) == 9
    for check in found["checks"]:
        assert check["ok"], check
        assert f"| {check['check']} | " in printed and " | ok |" in printed
    assert "skipped: it has no CPU version" in printed and "abc1234" in found["run"]

    cases = found["cases"]["toy BERT"]
    assert set(cases) == {
        "engine", "engine, 2 layers", "engine, 4 layers", "bare", "transformers", "transformers, compiled",
    }  # fmt: skip
    assert all(case["tokens_per_s"] > 0 for case in cases.values())
    assert cases["engine"]["graphs"] > 0  # the layers were compiled at all
    for name, case in cases.items():
        assert name.startswith("transformers") or case["graph_breaks"] == case["recompiles_after_step_3"] == 0, name
    for measure in ("engine's step / bare loop's", "tokens/s / transformers", "graph breaks"):
        assert f"| toy BERT | {measure} | " in printed


def test_cores_benchmark_at_toy_size() -> None:
    found = json.loads(run("cores.py", "bert", "llama", "--toy", "--json"))
    for result in found.values():
        assert all(result[way] > 0 and result["tokens_per_s"][way] > 0 for way in ("packed", "padded"))


def test_programs_benchmark_at_toy_size() -> None:
    found = json.loads(run("programs.py", "--toy", "--json").splitlines()[-1])
    assert len(found) == 8 and all(row["time"] > 0 for row in found.values())
    costs = {name: row["flops"] for name, row in found.items()}
    assert costs["sub-model of 1 layers, of which the top 1 learn"] < costs["top 2 layers learn"] < 1
    assert costs["shared, all 4 layers twice"] > 1.5


def test_loader_benchmark_at_a_tiny_size() -> None:
    sizes = ("--documents", "200", "--seq-len", "32", "--rows", "2", "--seconds", "0.01")
    found = json.loads(run("loader.py", *sizes, "--json"))
    assert 0.9 < found["fill"] <= 1
    assert found["loader_tokens_per_s"] > 0 and found["collator_tokens_per_s"] > 0


def test_growth_benchmark_at_toy_size(tmp_path: Path) -> None:
    printed = run("growth.py", "--toy", "--stages", "3", "--rounds", "1", "--json", str(tmp_path / "found.json"))
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    found = {(row["case"], row["measure"]): row for row in rows}
    case = "110M -> 335M, ZeRO-3"
    for form in ("universal", "zero", "universal, 2 workers"):
        assert found[f"{case} to {form}", "grow / floor"]["value"] > 0
    for form in ("universal", "zero"):  # at this size, too: what a file adds is small
        assert found[f"{case} to {form}", "written / target"]["met"]
        assert found[f"{case} to {form}", "memory, MB"]["met"]
    for rival in ("ds_to_universal", "zero_to_fp32"):
        assert found[case, f"{rival} / grow"]["value"] > 0
    assert found["335M -> 1.3B, ZeRO-3 to universal", "memory, MB"]["met"]
    assert f"| {case} to universal | grow / floor | " in printed


def test_dry_run_of_a_growth_over_sparse_files(tmp_path: Path) -> None:
    """Reader and writer handle a checkpoint that is far larger than the disk space and the memory it takes."""
    run("growth.py", "--toy", "--dry-run", "--folder", str(tmp_path), "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())["dry_run"]
    assert found["target_tensor_bytes"] == 12 * found["parameters"][1] == 12_395_175_936
    assert found["target_tensor_bytes"] < found["target_bytes"] < 1.001 * found["target_tensor_bytes"]
    for part in ("source", "source_hub", "target"):
        assert found[f"{part}_on_disk"] < 0.002 * found[f"{part}_bytes"]
    assert found["memory"] < 200e6  # the target has 12.4 GB
    assert found["cost"]["ranks"] == 8 and "8 ranks at 2 GB/s read" in found["summary"]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


def test_the_growth_benchmark_refuses_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("growth_benchmark", BENCHMARKS / "growth.py")
    assert spec and spec.loader
    growth = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(growth)
    monkeypatch.setattr(growth.shutil, "disk_usage", lambda folder: argparse.Namespace(free=10**9))
    growth.check_room(tmp_path, 10**9)
    with pytest.raises(SystemExit, match=r"1\.0 GB free, about 2\.0 GB needed"):
        growth.check_room(tmp_path, 2 * 10**9)


def test_activations_of_a_gpt_are_those_of_the_literature() -> None:
    """Korthikanti et al. 2022, section 4.1: 34 bytes, two of them masks of dropout, where attention stores no scores;
    2 where the block is computed again."""
    found = json.loads(run("activations.py", "gpt2", "--json"))["gpt2"]
    assert found["kept"] == pytest.approx(32, rel=0.02) and found["recomputed"] == pytest.approx(2, rel=0.02)
