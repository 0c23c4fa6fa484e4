"""What a run prints, in a file as a job's log is one: a banner, a line for each record, an end, and JSON apart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.train.launched import ROOT, write_inputs


def run(recipe: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["--ds-config", "ds_configs/zero2_cpu.json", "--recipe", str(recipe), "--output", str(output), *more]
    env = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}  # DeepSpeed then warns
    return subprocess.run(
        [sys.executable, "launch/pretrain.py", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )


def test_a_log_reads_from_top_to_bottom(tmp_path: Path) -> None:
    recipe, output = write_inputs(tmp_path), tmp_path / "run"
    done = run(recipe, output, "--json", "--set", "phases.0.steps=2", "phases.1.steps=2", "eval_every=4")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["step"], result["stopped"]) == (4, None) and result["tokens"] > 0
    assert "\r" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "[WARNING]" not in line and "[INFO]" not in line]
    keys = ["model", "run", "data", "packing", "predicts", "ranks", "batch", "nodes", "network", "versions"]
    keys += ["environ", "folder"]
    assert [line.split()[0] for line in lines[: len(keys)]] == keys, lines
    about = dict(zip(keys, lines, strict=False))
    config = json.loads((output / "config.json").read_text())
    assert "BertForMaskedLM, 2 layers x 32, " in about["model"] and config["hidden_size"] == 32
    from transformers import BertConfig, BertForMaskedLM

    count = BertForMaskedLM(BertConfig(**config)).num_parameters()
    assert about["model"].endswith(f", {count:,} parameters")
    assert "launched: 4 steps (sub-models 2, full 2)" in about["run"]
    assert re.search(
        r"[\d,]+ rows an epoch, \d+\.\d% of their slots filled; \d+\.\d% of 353 documents", about["packing"]
    )
    assert about["predicts"] == "predicts masked, mlm_probability 0.15"
    assert "1 rank on " in about["ranks"] and "fp32, ZeRO stage 2" in about["ranks"]
    assert "64 rows a micro-batch x 2 accumulated x 1 rank = 128 rows (4,096 token slots) a step" in about["batch"]
    assert f"{output}; watch it with: tensorboard --logdir {output}/tensorboard" in about["folder"]
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    matches = [re.fullmatch(r"step (\d)/4  (\S+)  ?(?:loss )?.*", line) for line in lines[len(keys) : -1]]
    found = [(match[1], "eval" if match[2] == "held-out" else "train") for match in matches if match]
    assert found == [(str(record["step"]), record["kind"]) for record in records]
    assert all(
        f"loss {record['loss']:.3f}" in line for record, line in zip(records, lines[len(keys) : -1], strict=True)
    )
    last = lines[-1]
    assert last.startswith("finished step 4 of 4: ") and last.endswith(f"checkpoint {output}/global_step4")
    assert f"loss {records[-2]['loss']:.4f}; held-out loss {records[-1]['loss']:.4f}" in last
    assert f"{records[-1]['tokens']:,} tokens" in last

    again = run(recipe, output, "--resume", str(output), "--quiet", "--set", "phases.0.steps=2", "phases.1.steps=2")
    assert again.returncode == 0 and not again.stdout
    assert not [line for line in again.stderr.splitlines() if "[WARNING]" not in line], again.stderr
