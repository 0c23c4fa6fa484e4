"""The entries and the job scripts: quick help, one message for one mistake, the right jobs with the right options."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.train.launched import ROOT, entry

SCRIPTS = [ROOT / "launch" / name for name in ("pretrain.sbatch", "grow.sbatch", "command.sbatch", "chain.sh")]
PRETRAIN = "launch/pretrain.py"
DEMO = ["--ds_config", "ds_configs/zero2_cpu.json", "--recipe", "recipes/demo_small.py"]
MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def run(command: list, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        [str(word) for word in command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(("name", "word"), [("pretrain", "--resume runs/grown"), ("grow", "--config")])
def test_help_shows_an_example_and_imports_nothing_heavy(name: str, word: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{name}.py', '--help']\n"
        f"try: runpy.run_path('launch/{name}.py', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print('heavy:', [m for m in ('torch', 'deepspeed', 'mpi4py', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout and word in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--recipe", "recipes/nowhere.py"], "error: no recipe recipes/nowhere.py"),
        (["--ds_config", "ds_configs/nowhere.json"], "error: no ds_config ds_configs/nowhere.json"),
        (["--ds_config", "README.md"], "is no JSON"),
        (["--set", "phases.0.step=1"], "unknown key 'phases.0.step': did you mean 'phases.0.steps'"),
        (["--set", "global_batch_size=96"], "train_micro_batch_size_per_gpu is 64; on 1 ranks that makes 64 rows"),
        (["--set", "batch_rows=96"], "note: batch_rows=96: write global_batch_size=96\nerror: ds_config: train_micro"),
        (["--set", "optimizer.name=lamb"], "LAMB scales every layer"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(tmp_path: Path, change: list[str], message: str) -> None:
    if "README.md" in change:
        (tmp_path / "README.md").write_text("# no JSON")
        change = ["--ds_config", str(tmp_path / "README.md")]
    output = tmp_path / "run"
    done = run([sys.executable, "launch/pretrain.py", *DEMO, "--output", output, *change])
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not output.exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on PATH")
@pytest.mark.parametrize(("change", "words"), [("--set sed=1", "unknown key 'sed'"), ("--sed 1", "usage: ")])
def test_a_mistake_on_two_ranks_is_told_once(tmp_path: Path, change: str, words: str) -> None:
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "launch/pretrain.py", *DEMO]
    done = run([*command, "--output", tmp_path / "run", *change.split()], **MPI_ENVIRONMENT)
    assert done.returncode == 2
    assert done.stderr.count(words) == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", [["--ouput", "x"], [*DEMO, "--output"], ["--help"]])
def test_only_rank_0_tells_the_usage(
    rank: int, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    pretrain = entry("pretrain")
    monkeypatch.setattr(pretrain.launcher, "GRACE_SECONDS", 0.0)
    with pytest.raises(SystemExit) as ended:
        pretrain.main(words)
    assert ended.value.code == (0 if words == ["--help"] else 2)
    printed = "".join(capsys.readouterr())
    assert printed.startswith("usage: launch/pretrain.py") if rank == 0 else not printed


def test_the_options_reach_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = types.ModuleType("bert2bert.train.run")
    stopped = None

    def train(*given: object, **named: object) -> dict:
        calls.append((*given, named))
        return {"stopped": stopped}

    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bert2bert.train.run", module)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)
    monkeypatch.chdir(ROOT)
    options = ["--local_rank=0", *DEMO, "--output", "runs/x", "--resume", "grown/y", "--bins", "other bins"]
    code = entry("pretrain").main([*options, "--set", "phases.0.steps=400", "seed=3", "--set", "gradient_clipping=2"])
    assert code == 0
    ((recipe, config, output, resume, named),) = calls
    assert named["recipe_file"] == Path("recipes/demo_small.py") and named["command"][:2] == [
        PRETRAIN,
        "--local_rank=0",
    ]
    assert (recipe.phases[0].steps, recipe.seed, recipe.data.bins) == (400, 3, "other bins")
    assert (output, resume) == (Path("runs/x"), Path("grown/y"))
    assert recipe.gradient_clipping == 2.0 and config == json.loads((ROOT / DEMO[1]).read_text())
    assert os.environ["WORLD_SIZE"] == "1" and os.environ["RANK"] == "0"

    stopped = "SIGUSR1"  # by a time limit: a job that waits for this one must not start
    assert entry("pretrain").main([*options, "--set", "seed=3"]) == 75


def test_growing_in_processes_that_mpi_does_not_join_is_refused(tmp_path: Path) -> None:
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    command = [
        sys.executable,
        "launch/grow.py",
        tmp_path,
        tmp_path / "grown",
        "--config",
        "recipes/configs/demo_base.json",
    ]
    done = run(command, **slurm)
    assert done.returncode == 2
    assert done.stderr.startswith("bert2bert grow: srun started 2 processes, but MPI joins 1; start them with")
    assert not (tmp_path / "grown").exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on PATH")
def test_a_growth_that_fails_ends_every_rank(tmp_path: Path) -> None:
    grow = ["launch/grow.py", tmp_path / "nothing", tmp_path / "grown", "--config", "recipes/configs/demo_base.json"]
    done = run(["mpirun", "--oversubscribe", "-n", "2", sys.executable, *grow], **MPI_ENVIRONMENT)
    assert done.returncode != 0
    assert str(tmp_path / "nothing") in done.stderr
    assert not (tmp_path / "grown").exists()


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="no mpirun on PATH")
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--conf", "x"], {}, "unknown option --conf: did you mean '--config'?"),
        (["--config", "x"], {"RANK": "0", "WORLD_SIZE": "1"}, "but mpirun started this process as rank 0 of 2"),
    ],
)
def test_a_mistake_of_a_growth_over_mpi_is_told_once(
    tmp_path: Path, words: list[str], environment: dict[str, str], message: str
) -> None:
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "launch/grow.py", tmp_path, tmp_path / "grown"]
    done = run([*command, *words], **MPI_ENVIRONMENT, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("bert2bert grow: ") == 1 and message in done.stderr and "Traceback" not in done.stderr


# ---- the job scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_keeps_the_cluster_at_its_top(path: Path) -> None:
    assert run(["bash", "-n", path]).returncode == 0
    lines = path.read_text().splitlines()
    if path.suffix == ".sbatch":
        end = next(i for i, line in enumerate(lines) if line.startswith("set -eu"))
        assert all(i < end for i, line in enumerate(lines) if line.startswith("#SBATCH"))
        assert run(["bash", path], SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(ROOT), SLURM_NTASKS="1").returncode == 2
    else:
        assert path.stat().st_mode & stat.S_IXUSR


def fake(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


def chain(tmp_path: Path, *words: str, **environment: str) -> tuple[str, dict[str, list[str]]]:
    """(what chain.sh prints, its sbatch lines by the part of the chain), with Slurm's commands faked."""
    log = tmp_path / "log"
    log.write_text("")
    fake(tmp_path / "bin", "sbatch", f'echo "$@" >> {log}; echo "$((100 + $(wc -l < {log})));c1"\n')
    fake(tmp_path / "bin", "squeue", "")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = run(["launch/chain.sh", *words], PATH=path, RUNS=str(tmp_path / "runs"), **environment)
    assert done.returncode == 0, done.stderr
    jobs = [line.split() for line in log.read_text().splitlines()]
    names = [next(w for w in job if w.startswith("--job-name=")) for job in jobs]
    return done.stdout, {n.removeprefix("--job-name=").rpartition("-")[0]: j for n, j in zip(names, jobs, strict=True)}


def behind(job: list[str]) -> list[str]:
    return [word for word in job if word.startswith("--dependency")]


def test_the_chain_submits_jobs_that_wait_for_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "bins").mkdir()
    prepare = {"BINS": str(tmp_path / "bins"), "PREPARE": "--corpus emma"}
    _, jobs = chain(tmp_path, "--partition=gpu", "--set", "size=tiny", GROW_OPTIONS="--partition=cpu", **prepare)
    assert list(jobs) == ["prepare", "small", "grow", "large", "scratch", "report"]
    waits = [behind(job) for job in jobs.values()]
    numbers = ("101", "102", "103", "101", "104:105")
    assert waits == [[], *([f"--dependency=afterok:{number}"] for number in numbers)]
    assert all("--partition=gpu" in job and "--parsable" in job for job in jobs.values())
    small, grow, large, scratch = (jobs[name] for name in ("small", "grow", "large", "scratch"))
    assert grow.index("--partition=gpu") < grow.index("--partition=cpu")  # sbatch takes the last
    assert all(job[job.index("--set") + 1] == "size=tiny" for job in (small, large, scratch)) and "--set" not in grow
    source, target = grow[grow.index("launch/grow.sbatch") + 1 :][:2]
    assert source == small[small.index("launch/pretrain.sbatch") + 3] == str(tmp_path / "runs" / "small")
    assert large[large.index("--from") + 1] == target
    words = {word for job in jobs.values() for word in job if word.startswith(("launch/", "recipes/", "ds_configs/"))}
    assert len(words) == 8 and all((ROOT / word).exists() for word in words)


def test_a_chain_passes_over_what_is_complete_and_all_that_follows_a_change(tmp_path: Path) -> None:
    (tmp_path / "bins").mkdir()
    (tmp_path / "bins" / "meta.json").write_text("{}")
    recipe = shutil.copy(ROOT / "recipes" / "bert_small.py", tmp_path / "small.py")
    known = {"BINS": str(tmp_path / "bins"), "SMALL": str(recipe), "SCRATCH": "-", "SEEDS": "0 1"}
    _, jobs = chain(tmp_path, **known)
    assert list(jobs) == [
        "small-seed0",
        "grow-seed0",
        "large-seed0",
        "small-seed1",
        "grow-seed1",
        "large-seed1",
        "report",
    ]
    assert [behind(jobs[f"small-seed{n}"]) for n in (0, 1)] == [[], []] and jobs["large-seed1"][-1] == "seed=1"

    for name in jobs:  # each job ends well
        (tmp_path / "runs" / name.replace("large", "base").replace("grow-", "grown-")).mkdir(exist_ok=True)
    fake(tmp_path / "bin", "sbatch", 'echo "$KEY" > "$RECORD"; echo 1\n')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    run(["launch/chain.sh"], PATH=path, RUNS=str(tmp_path / "runs"), **known)
    printed, jobs = chain(tmp_path, **known)
    assert not jobs and printed.count("complete, passed over") == 8

    recipe.write_text(recipe.read_text() + "# changed\n")
    (tmp_path / "runs" / "base-seed1").rmdir()
    _, jobs = chain(tmp_path, **known | {"SEEDS": "1"})
    assert list(jobs) == ["small-seed1", "grow-seed1", "large-seed1", "report"]


def test_a_chain_without_bins_is_refused(tmp_path: Path) -> None:
    done = run(["launch/chain.sh"], BINS=str(tmp_path / "bins"), RUNS=str(tmp_path / "runs"))
    assert done.returncode == 2 and f"there are no bins in {tmp_path / 'bins'}" in done.stderr


def batch(tmp_path: Path, output: Path, *start: str) -> tuple[list[str], dict[str, str]]:
    """What pretrain.sbatch starts: (command line of the task, its environment), with Slurm's commands faked."""
    fake(
        tmp_path / "bin",
        "scontrol",
        '[ "$2" = hostnames ] && printf "n1\\nn2\\n" || echo "  NodeAddr=10.0.0.7 Port=1"\n',
    )
    fake(tmp_path / "bin", "srun", 'shift; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"\n')
    fake(tmp_path / "bin", "python", 'printf "%s\\n" "$@"; echo ENV; env\n')
    done = run(
        ["bash", "launch/pretrain.sbatch", "R.py", "D.json", output, *start, "--set", "seed=1"],
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON=str(tmp_path / "bin" / "python"), SLURM_JOB_ID="12",
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_NTASKS="4", SLURM_JOB_NODELIST="n[1-2]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words, environment = done.stdout.split("ENV\n")
    return words.splitlines(), dict(line.split("=", 1) for line in environment.splitlines() if "=" in line)


def test_the_job_names_every_task_its_rank(tmp_path: Path) -> None:
    words, environment = batch(tmp_path, tmp_path / "run", "--resume", "grown")
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "20012"}
    assert {name: environment[name] for name in expected} == expected
    options = entry("pretrain").arguments().parse_args(words[words.index(PRETRAIN) + 1 :])
    assert (str(options.recipe), str(options.ds_config), options.output) == ("R.py", "D.json", tmp_path / "run")
    assert (options.resume, options.set) == ("grown", ["seed=1"])  # as it was given


def test_a_job_submitted_again_goes_on_from_its_own_output(tmp_path: Path) -> None:
    words, _ = batch(tmp_path, tmp_path / "run", "--from", "grown")
    options = entry("pretrain").arguments().parse_args(words[words.index(PRETRAIN) + 1 :])
    assert (options.resume, options.start) == ("auto", Path("grown"))


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_a_stopped_job_requeues_itself_until_it_makes_no_progress(tmp_path: Path, state: str) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    tell = f'[ "$1" = requeue ] && echo "$@" >> {log}; echo "JobState={state} Reason=None"\n'
    fake(tmp_path / "bin", "scontrol", tell)

    def start(checkpoint: str | None = None) -> str:
        fake(tmp_path / "bin", "srun", (f"echo {checkpoint} > {output}/latest\n" if checkpoint else "") + "exit 75\n")
        done = run(
            ["bash", "launch/pretrain.sbatch", "R.py", "D.json", output],
            PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(ROOT),
            SLURM_NTASKS="4", SLURM_JOB_NODELIST="n[1-2]",
        )  # fmt: skip
        assert done.returncode == 75
        return done.stderr

    if state == "CANCELLED":
        assert not start() and not log.exists() and not output.exists()
        return
    for checkpoint, newest in ((None, "none"), (None, "none"), ("global_step10", "global_step10")):
        assert f"requeued: stopped in time, newest checkpoint {newest}" in start(checkpoint)
    for _ in range(2):
        assert "newest checkpoint global_step10" in start()
    assert log.read_text() == "requeue 12\n" * 5
    assert "not requeued: 3 starts in a row brought no checkpoint newer than global_step10" in start()
    assert log.read_text() == "requeue 12\n" * 5
    assert "requeued: stopped in time" in start()  # submitted again by hand


@pytest.mark.parametrize(
    ("preempted", "starts", "printed"),
    [
        ("None", 0, ""),  # an error
        ("2026-01-01T00:00:00", 0, ""),  # of an earlier start: an error, too
        ("2026-01-03T00:00:00", 1, "requeued: stopped in time, newest result none\n"),
        ("2026-01-03T00:00:00", 2, "not requeued: 3 starts in a row brought no result newer than none"),
    ],
)
def test_a_command_runs_again_after_a_preemption_and_not_after_an_error(
    tmp_path: Path, preempted: str, starts: int, printed: str
) -> None:
    facts = f"JobState=RUNNING Reason=None StartTime=2026-01-02T00:00:00 PreemptTime={preempted}"
    fake(tmp_path / "bin", "scontrol", f'[ "$1" = requeue ] && echo "$@" >> {tmp_path}/log; echo "{facts}"\n')
    fake(tmp_path / "bin", "srun", "exit 143\n")
    done = run(
        ["bash", "launch/command.sbatch", "prepare", "--output", tmp_path],
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", PYTHON=sys.executable, SLURM_JOB_ID="12",
        SLURM_SUBMIT_DIR=str(ROOT), SLURM_RESTART_COUNT=str(starts),
    )  # fmt: skip
    assert done.returncode == 143 and done.stderr.startswith(printed) and bool(done.stderr) == bool(printed)
    assert (tmp_path / "log").exists() == printed.startswith("requeued")


def test_deepspeed_reads_the_hostfile() -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    found = _parse_hostfile((ROOT / "launch" / "hostfile.example").read_text().splitlines())
    assert found == {"node1": 8, "node2": 8}
