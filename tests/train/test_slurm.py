"""launch/pretrain.sbatch on a real two-node Slurm cluster."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.cluster.slurm import cluster, facts, finish, submit, wait
from tests.train.launched import ROOT, losses, write_inputs

__all__ = ["cluster"]  # the fixture


def test_the_job_trains_on_two_nodes_and_goes_on_when_submitted_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    recipe, output = write_inputs(tmp_path), tmp_path / "run"
    words = [recipe, ROOT / "ds_configs" / "zero2_cpu.json", output]
    log_file = tmp_path / "first.log"
    state, log = finish(cluster, submit(cluster, log_file, *words), log_file)
    assert state == "COMPLETED", log
    described = json.loads((output / "run.json").read_text())
    assert described["world_size"] == 2 and described["finished"]
    assert [(kind, step) for kind, step, _ in losses(output)][-1] == ("eval", 6)

    log_file = tmp_path / "second.log"
    state, log = finish(cluster, submit(cluster, log_file, *words), log_file)
    assert state == "COMPLETED", log
    assert "is complete: step 6 of 6" in log

    log_file = tmp_path / "third.log"
    state, log = finish(cluster, submit(cluster, log_file, *words, "--set", "sed=1"), log_file)
    assert state == "FAILED"
    assert log.count("unknown key 'sed'") == 1


def test_a_preempted_job_goes_on_by_itself_and_a_cancelled_one_does_not(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    recipe, output, log = write_inputs(tmp_path), tmp_path / "run", tmp_path / "job.log"
    sets = ["--set", "phases.0.steps=1500", "phases.1.steps=1500", "eval_every=3000", "checkpoint_every=3000"]
    job = submit(cluster, log, recipe, ROOT / "ds_configs" / "zero2_cpu.json", output, *sets)

    def trained(more: int) -> bool:
        metrics = output / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count('"train"') >= more

    wait(cluster, job, log, lambda: trained(2))
    urgent = ["sbatch", "-p", "urgent", "--nodes=2", "--exclusive", "--time=5", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(urgent, cwd=ROOT, env=cluster, capture_output=True, timeout=30, check=True)
    wait(cluster, job, log, lambda: (output / "requeued").exists())
    stopped = (output / "latest").read_text()
    step = int(stopped.removeprefix("global_step"))
    wait(cluster, job, log, lambda: trained(step + 2))
    printed = log.read_text()  # of both starts
    assert "stopped by SIGTERM after step" in printed and f"resumed from {output}/{stopped}" in printed
    assert facts(cluster, job)["Restarts"] == "1"

    subprocess.run(["scancel", job], env=cluster, timeout=30)
    state, printed = finish(cluster, job, log)
    assert state == "CANCELLED" and facts(cluster, job)["Restarts"] == "1"
    assert (output / "latest").read_text() != stopped and printed.count("requeued: ") == 1
    steps = [step for kind, step, _ in losses(output) if kind == "train"]
    assert steps == list(range(1, len(steps) + 1)) and steps[-1] > step
