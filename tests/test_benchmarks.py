"""The benchmarks run, and what they check about correctness holds; no speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_loader_benchmark_at_a_tiny_size() -> None:
    sizes = ("--documents", "200", "--seq-len", "32", "--rows", "2", "--seconds", "0.01")
    found = json.loads(run("loader.py", *sizes, "--json"))
    assert 0.9 < found["fill"] <= 1
    assert found["loader_tokens_per_s"] > 0 and found["collator_tokens_per_s"] > 0
