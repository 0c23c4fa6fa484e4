"""Whole experiments on a real Slurm cluster of two nodes: stopped by preemption, limits and lost nodes, with any number
of ranks; and jobs without requeueing, in conda environments and containers, or without the submitter's environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cluster.slurm import HERE, ask, cluster, facts, finish, submit, wait
from tests.train.launched import ROOT, losses, write_inputs

__all__ = ["cluster"]  # the fixture
pytestmark = pytest.mark.timeout(600)

RECIPE = '''"""Forty steps with dropout, each as slow as a file says."""
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bert2bert.recipe import AdamW, Data, Phase, Recipe


@dataclass(frozen=True)
class Paced:
    kind: str = field(default="paced", init=False)
    counted: ClassVar[bool] = False

    def done(self, phase):
        if Path({pace!r}).exists():
            time.sleep({seconds})
        return 0.0


recipe = Recipe(
    name="chain",
    model={model},
    data=Data(bins="given", seq_len=32, eval_rows=16),
    global_batch_size=24,
    phases=(Phase("paced", 40, until=Paced()),),
    optimizer=AdamW(lr=1e-3),
    eval_every=20,
    checkpoint_every=1000,
    log_every=1,
)
'''
SMALL = {
    "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 32, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
LARGE = SMALL | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
PARTS = ["prepare", "small", "grow", "large", "scratch", "report"]
AS_ROOT = {f"{name}_ALLOW_RUN_AS_ROOT{more}": "1" for name in ("OMPI", "PRTE") for more in ("", "_CONFIRM")}


def begin(env: dict[str, str], work: Path, name: str, *words: str, **more: str) -> tuple[dict[str, str], str]:
    """Type the line of a chain into the folder ``name``: (the jobs by their parts, what it prints)."""
    prepare = f"--text {work}/text.txt --vocab-size 256 --heldout-fraction 0.1 --document blank-line"
    given = {
        "RUNS": str(work / name), "BINS": str(work / name / "bins"), "PREPARE": prepare,
        "CONFIG": str(work / "large.json"),
        "SMALL": str(work / "small.py"), "LARGE": str(work / "large.py"), "SCRATCH": str(work / "scratch.py"),
        "DS_CONFIG": str(work / "ds.json"), "PREPARE_OPTIONS": "--nodes=1", "REPORT_OPTIONS": "--nodes=1",
        "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHON": sys.executable,
    }  # fmt: skip
    (work / name).mkdir(exist_ok=True)
    done = subprocess.run(
        ["launch/chain.sh", *HERE, f"--output={work / name}/%x.log", *words], cwd=ROOT,
        env={**env, **AS_ROOT, **given, **more}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {line[0][:-1]: line[2].rstrip(",") for line in lines if line[1] == "job"}, done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, recipes, the larger config and the ds_config of the chains."""
    folder = tmp_path_factory.mktemp("chain")
    write_inputs(folder)
    for name, model, seconds in (("small", SMALL, 0.5), ("large", LARGE, 1.5), ("scratch", LARGE, 0)):
        text = RECIPE.format(model=model, pace=str(folder / f"{name}.pace"), seconds=seconds)
        (folder / f"{name}.py").write_text(text)
    (folder / "large.json").write_text(json.dumps({"model_type": "bert", **LARGE}))
    (folder / "ds.json").write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}')
    return folder


@pytest.fixture(scope="module")
def undisturbed(work: Path, cluster: dict[str, str]) -> Path:
    """The run folders of a chain that nothing stopped."""
    jobs, _ = begin(cluster, work, "undisturbed")
    assert list(jobs) == PARTS
    done(cluster, work / "undisturbed", jobs)
    return work / "undisturbed"


def done(env: dict[str, str], folder: Path, jobs: dict[str, str]) -> None:
    """Wait until all jobs have succeeded."""
    for part, job in jobs.items():
        log = next(iter(folder.glob(f"{part}-*.log")), folder / "none")
        wait(env, job, log, lambda job=job: not ask(env, "squeue", "-h", "-j", job))
        log = next(iter(folder.glob(f"{part}-*.log")), folder / "none")
        state = facts(env, job)["JobState"]
        assert state == "COMPLETED", f"{part}: {state}\n{log.read_text() if log.exists() else 'no log'}"


def trained(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count('"train"') if metrics.exists() else 0


def further(run: Path, more: int = 2) -> Callable[[], bool]:
    """Whether so many more steps were trained."""
    before = trained(run)
    return lambda: trained(run) >= before + more


def weights(run: Path) -> list[torch.Tensor]:
    """Master weights and moments of the newest checkpoint, by rank."""
    found: list[torch.Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    for file in sorted((run / (run / "latest").read_text()).glob("*optim_states.pt")):
        states = torch.load(file, weights_only=False)["optimizer_state_dict"]
        collect([states["single_partition_of_fp32_groups"], states["base_optimizer_state"]])
    return found


def test_a_chain_through_a_preemption_and_a_time_limit_equals_an_undisturbed_one(
    work: Path, cluster: dict[str, str], undisturbed: Path
) -> None:
    (work / "small.pace").touch()
    (work / "large.pace").touch()
    runs = work / "disturbed"
    given = {"LARGE_OPTIONS": "--time=1", "SCRATCH": "-"}  # a limit far below the 600 s of LEAD
    jobs, _ = begin(cluster, work, "disturbed", **given)
    small = runs / "small"
    wait(cluster, jobs["small"], runs / "none", further(small))
    urgent = ["sbatch", "-p", "urgent", "--nodes=2", "--exclusive", "--time=5", "-o", "/dev/null", "--wrap", "sleep 1"]
    subprocess.run(urgent, cwd=ROOT, env=cluster, capture_output=True, timeout=30, check=True)
    wait(cluster, jobs["small"], runs / "none", (small / "requeued").exists)
    assert 0 < int((small / "latest").read_text().removeprefix("global_step")) < 40
    (work / "small.pace").unlink()
    again, printed = begin(cluster, work, "disturbed", **given)
    assert {"small", "grow", "large", "report"} <= again.keys() and printed.count("submitted before") >= 4
    assert all(jobs[part] == job for part, job in again.items())

    large = runs / "base"
    wait(cluster, jobs["large"], runs / "none", (large / "requeued").exists)
    assert 0 < int((large / "latest").read_text().removeprefix("global_step")) < 40
    (work / "large.pace").unlink()
    done(cluster, runs, jobs)
    assert [facts(cluster, jobs[part])["Restarts"] for part in ("small", "grow", "large")] == ["1", "0", "1"]
    for run in ("small", "base"):
        assert losses(runs / run) == losses(undisturbed / run)
        ours, theirs = weights(runs / run), weights(undisturbed / run)
        assert len(ours) == len(theirs) > 4 and all(map(torch.equal, ours, theirs))

    for name, shown in (("undisturbed", ("small", "base", "scratch")), ("disturbed", ("small", "base"))):
        assert all(run in (work / name / "report" / "report.md").read_text() for run in shown)
    jobs, printed = begin(cluster, work, "disturbed", **given)
    assert not jobs and printed.count("complete, passed over") == len(PARTS) - 1


def test_a_run_goes_on_with_other_ranks_and_past_a_lost_node(
    work: Path, tmp_path: Path, cluster: dict[str, str], undisturbed: Path
) -> None:
    """2 ranks, cancelled; 3 ranks, whose second node dies; cancelled; 1 rank: one run with the losses of two ranks."""
    (work / "small.pace").touch()
    run, log = tmp_path / "run", tmp_path / "log"
    words = [work / "small.py", work / "ds.json", run, "--bins", undisturbed / "bins"]
    job = submit(cluster, log, *words)
    wait(cluster, job, log, further(run))
    subprocess.run(["scancel", job], env=cluster, timeout=30)
    assert finish(cluster, job, log)[0] == "CANCELLED"

    job = submit(cluster, log, *words, options=["--ntasks=3", "--ntasks-per-node=2"])
    wait(cluster, job, log, further(run))
    folder = Path(cluster["SLURM_CONF"]).parent
    os.kill(int((folder / "slurmd.n2.pid").read_text()), signal.SIGKILL)
    ask(cluster, "scontrol", "update", "nodename=n2", "state=down", "reason=lost")
    try:
        wait(cluster, job, log, lambda: facts(cluster, job)["Restarts"] == "1")
        assert facts(cluster, job)["JobState"] in ("PENDING", "COMPLETING")
    finally:
        subprocess.run(["slurmd", "-c", "-N", "n2", "-f", cluster["SLURM_CONF"]], env=cluster, timeout=30)
        ask(cluster, "scontrol", "update", "nodename=n2", "state=resume")
    wait(cluster, job, log, lambda: log.read_text().count("resumed from") == 2)
    wait(cluster, job, log, further(run))
    subprocess.run(["scancel", job], env=cluster, timeout=30)
    assert finish(cluster, job, log)[0] == "CANCELLED"

    (work / "small.pace").unlink()
    job = submit(cluster, log, *words, options=["--nodes=1"])
    state, printed = finish(cluster, job, log)
    assert state == "COMPLETED", printed
    about = json.loads((run / "run.json").read_text())
    assert "2 ranks on CPU" in printed and [start["world_size"] for start in about["continued"]] == [3, 3, 1]
    ours, theirs = losses(run), losses(undisturbed / "small")
    assert [record[:2] for record in ours] == [record[:2] for record in theirs]
    assert ours[:3] == theirs[:3]  # as long as there were two ranks; then dropout draws from other seeds
    assert [loss for *_, loss in ours] == pytest.approx([loss for *_, loss in theirs], rel=0.01)


# ---- what the scripts make of Slurm; a shell script stands in for Python


def stand_in(folder: Path, text: str) -> Path:
    """A conda environment whose python is a shell script."""
    for name in ("bin", "conda-meta", "etc/conda/activate.d"):
        (folder / name).mkdir(parents=True)
    (folder / "etc" / "conda" / "activate.d" / "it.sh").write_text("export ACTIVATED=$CONDA_PREFIX\n")
    (folder / "bin" / "python").write_text("#!/bin/bash\n" + text)
    (folder / "bin" / "python").chmod(0o755)
    return folder


TELL = 'echo "rank $RANK/$WORLD_SIZE $ACTIVATED omp=$OMP_NUM_THREADS nccl=$NCCL_DEBUG node=$SLURMD_NODENAME ${@: -1}"\n'


def test_a_rendered_script_alone_is_the_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Submitted without the environment of the shell, as some sites do; the ranks get what the script says."""
    env = stand_in(tmp_path / "env", TELL)
    run = tmp_path / "a run"
    words = ["recipes/demo_small.py", "--ds_config", "ds_configs/zero2_cpu.json", "--output", str(run), "--nodes", "2"]
    words += ["--gpus-per-node", "0", "--cpus-per-task", "1", "--time", "5", "--python", str(env), "--env"]
    words += [
        "NCCL_DEBUG=INFO x",
        "OMP_NUM_THREADS",
        "--sbatch=--export=NOTHING",
        "--yes",
        "--json",
        "--",
        "--set",
        "seed=7",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bert2bert", "submit", *words], cwd=ROOT, env={**cluster, "OMP_NUM_THREADS": "3"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["script"] == str(run / "pretrain.sbatch")
    log = run / f"demo-small-{found['job']}.log"
    state, printed = finish(cluster, found["job"], log)
    assert state == "COMPLETED", printed
    tell = f"{env} omp=3 nccl=INFO x node="
    assert sorted(printed.splitlines()) == [f"rank {n}/2 {tell}n{n + 1} auto" for n in (0, 1)]


def test_a_container_runs_every_rank(tmp_path: Path, cluster: dict[str, str]) -> None:
    env = stand_in(tmp_path / "env", TELL)
    (env / "bin" / "apptainer").write_text(
        f'#!/bin/bash\necho "with $@"; while [ "$1" != {tmp_path}/it.sif ]; do shift; done; shift; exec "$@"\n'
    )
    (env / "bin" / "apptainer").chmod(0o755)
    (tmp_path / "it.sif").touch()
    inside = {"PATH": f"{env / 'bin'}:{cluster['PATH']}", "CONTAINER": f"{tmp_path}/it.sif", "PYTHON": "python"}
    log = tmp_path / "log"
    state, printed = finish(
        cluster,
        submit({**cluster, **inside, "CONTAINER_OPTIONS": "--bind /data"}, log, "R.py", "D.json", tmp_path / "run"),
        log,
    )
    assert state == "COMPLETED", printed
    assert printed.count(f"with exec --bind {ROOT} --pwd {ROOT} --bind /data {tmp_path}/it.sif python -u launch/") == 2
    assert "rank 1/2" in printed


def test_a_job_that_may_not_requeue_submits_itself_again_with_all_that_waits_for_it(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    starts = tmp_path / "starts"
    env = stand_in(tmp_path / "env", f'echo "$@" >> {starts}; [ $(wc -l < {starts}) = 2 ] || exit 75\n')
    log = tmp_path / "log"
    words = ["R.py", "D.json", tmp_path / "run", "--set", "a=b c"]
    job = submit({**cluster, "PYTHON": str(env)}, log, *words, options=["--no-requeue", "--begin=now+2", "--nodes=1"])
    behind = ask(cluster, "sbatch", "--parsable", f"--dependency=afterok:{job}", "-o", "/dev/null", "--wrap", "true")
    assert finish(cluster, job, log)[0] == "FAILED" and facts(cluster, job)["ExitCode"] == "75:0"
    printed = log.read_text()
    assert "submitted again as job" in printed
    state, _ = finish(cluster, behind, log)
    printed = log.read_text()
    first, second = starts.read_text().splitlines()
    assert state == "COMPLETED" and first == second and first.endswith("--set a=b c --resume auto"), printed
    new = printed.split("submitted again as job ")[1].split(",")[0]
    about = facts(cluster, new)
    assert (about["JobState"], about["NumTasks"], about["TimeLimit"]) == ("COMPLETED", "1", "00:10:00")
