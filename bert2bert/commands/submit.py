"""The command ``submit``: one Slurm script that trains a recipe, with every setting at its top, in the run's folder.

It is ``launch/pretrain.sbatch`` with its settings and arguments filled in and ``launch/job.sh`` put in its place, so
that the script alone is the job: it needs this checkout of the project, and nothing that is set where it is submitted.

Refuses (`InvalidConfig`) what `pretraining.checked` refuses on that many ranks, numbers and names that sbatch could not
take, a variable that is not set, a package without its ``launch`` folder, and with ``--yes`` what sbatch refuses.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert2bert.commands import pretraining
from bert2bert.errors import InvalidConfig
from bert2bert.files.checkout import git_commit
from bert2bert.files.disk import disk_errors, replace
from bert2bert.recipe import Recipe

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = "pretrain.sbatch"
_OWN = ("--recipe", "--ds-config", "--output", "--local-rank")
_PATHS = ("--bins", "--from", "--resume")
_LIMIT = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Submitted:
    """``job``: its number; None where the script was only written."""

    script: Path
    job: str | None

    @property
    def command(self) -> list[str]:
        return ["sbatch", str(self.script)]

    def as_json(self) -> dict[str, Any]:
        """As ``submit --json`` prints it."""
        return {"script": str(self.script), "command": self.command, "job": self.job}

    def text(self) -> str:
        """For a terminal."""
        done = f"job      {self.job}" if self.job else f"submit   {shlex.join(self.command)}"
        return f"written  {self.script}\n{done}"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Callable[[], str]]:
    """`submit`, as JSON and as text."""
    found = submit(args, args.training)
    return found.as_json(), found.text


def submit(args: argparse.Namespace, training: Sequence[str]) -> Submitted:
    """Write the script, and submit it if that is asked for. training: options of ``launch/pretrain.py``."""
    _check(args)
    tasks = args.tasks_per_node or args.gpus_per_node or 1
    words = ["--recipe", str(args.recipe), "--ds_config", str(args.ds_config), "--output", str(args.output), *training]
    for word in training:
        if word.partition("=")[0].replace("_", "-") in _OWN:
            raise InvalidConfig(f"{word} behind `--`: it is an option of submit itself; give it before `--`")
    if not any(word.partition("=")[0] == "--resume" for word in training):
        words += ["--resume", "auto"]  # as the script does
    options = runpy.run_path(str(_launch() / "pretrain.py"))["arguments"]().parse_args(words)
    recipe, _ = pretraining.checked(options, args.nodes * tasks, says=True)
    _check_growths(recipe)
    more = _absolute(training)
    if options.bins is None:
        more += ["--bins", str(Path(recipe.data.bins).absolute())]
    output = args.output.absolute()
    if output.exists() and not output.is_dir():
        raise InvalidConfig(f"--output {args.output} is a file; expected a folder for the run")
    run = [str(args.recipe.absolute()), str(args.ds_config.absolute()), str(output), *more]
    text = _rendered(_header(args, recipe.name, tasks, output) + _settings(args, run))
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        replace(output / SCRIPT, text)
    return Submitted(output / SCRIPT, _sbatch(output / SCRIPT) if args.yes else None)


def _launch() -> Path:
    if not (PROJECT / "launch" / SCRIPT).is_file():
        raise InvalidConfig(f"there is no {PROJECT / 'launch'}: submit works in a checkout, with pip install -e .")
    return PROJECT / "launch"


def _check(args: argparse.Namespace) -> None:
    least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "lead": 1, "max_tries": 1}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise InvalidConfig(f"--{name.replace('_', '-')} is {value}; expected a whole number from {low} on")
    if not _LIMIT.fullmatch(args.time):
        raise InvalidConfig(f"--time is {args.time!r}; expected minutes, [HOURS:]MINUTES:SECONDS or DAYS-HOURS")
    for option in args.sbatch:
        if not option.startswith("-") or "\n" in option:
            raise InvalidConfig(f"--sbatch is {option!r}; expected one option of sbatch, such as --sbatch=--exclusive")


def _check_growths(recipe: Recipe) -> None:
    if any(phase.grow for phase in recipe.phases):
        from bert2bert.commands import phase_growth  # imports torch

        phase_growth.check(recipe)


def _absolute(training: Sequence[str]) -> list[str]:
    """Options with the paths in them as they are from here: the job runs in the project's folder."""

    def path(text: str) -> str:
        return text if text == "auto" else str(Path(text).absolute())

    words = list(training)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in _PATHS:
            if equals:
                words[i] = f"{name}={path(value)}"
            elif i + 1 < len(words):
                words[i + 1] = path(words[i + 1])
    return words


def _header(args: argparse.Namespace, name: str, tasks: int, output: Path) -> list[str]:
    """The lines above the settings: what the script is, and sbatch's own options."""
    options = {
        "job-name": re.sub(r"[^\w.+-]", "-", name), "nodes": args.nodes, "ntasks-per-node": tasks,
        "gpus-per-node": args.gpus_per_node or None, "cpus-per-task": args.cpus_per_task, "time": args.time,
        "partition": args.partition, "account": args.account, "qos": args.qos,
        "output": shlex.quote(str(output / "%x-%j.log")), "open-mode": "append",
    }  # fmt: skip
    return [
        "#!/bin/bash",
        f"# Pre-train {name}: `{shlex.join(['bert2bert', *sys.argv[1:]])}`".replace("\n", " "),
        f"# The project's commit: {git_commit() or 'unknown'}",
        "",
        *(f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None),
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in args.sbatch),
    ]


def _settings(args: argparse.Namespace, run: Sequence[str]) -> list[str]:
    """The script's variables, the user's, and its arguments."""
    python = args.python
    if python is None:
        python = "" if args.container else sys.executable
    elif not args.container:
        python = python.expanduser().absolute()
    container = args.container or ""
    if container.endswith(".sif") or Path(container).is_dir():
        container = container and str(Path(container).absolute())
    values = {
        "LEAD": args.lead, "MAX_TRIES": args.max_tries, "PROJECT": PROJECT, "PYTHON": python, "CONTAINER": container,
        "CONTAINER_OPTIONS": args.container_options, "RECORD": "",
    }  # fmt: skip
    exports = []
    for text in args.env:
        name, equals, value = text.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InvalidConfig(f"--env {text}: {name!r} is no variable's name; expected NAME or NAME=VALUE")
        if not equals and name not in os.environ:
            raise InvalidConfig(f"--env {name}: it is not set here; give {name}=VALUE")
        exports.append(f"export {name}={shlex.quote(value if equals else os.environ[name])}")
    lines = [f"{key}={shlex.quote(str(value))}" for key, value in values.items()]
    return [
        *lines,
        *exports,
        "set -- \\",
        *(f"    {shlex.quote(word)} \\" for word in run[:-1]),
        f"    {shlex.quote(run[-1])}",
    ]


def _rendered(top: list[str]) -> str:
    """The script: ``top`` in place of what stands above the closing rule, the common part in place of its reading."""
    launch = _launch()
    text = (launch / SCRIPT).read_text(encoding="utf-8")
    _, rule, body = text.partition("# ---------------------------------------------------------------------\n")
    reads = '. "$PROJECT/launch/job.sh"\n'
    if not rule or body.count(reads) != 1:
        raise InvalidConfig(f"{launch / SCRIPT} was changed: submit finds no rule below its settings, or no job.sh")
    return "\n".join(top) + "\n" + rule + body.replace(reads, (launch / "job.sh").read_text(encoding="utf-8"))


def _sbatch(script: Path) -> str:
    """The number of the job. Raises InvalidConfig with sbatch's own words where there is none."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except OSError as error:
        raise InvalidConfig(
            f"sbatch cannot be run here ({error.strerror}); on the login node: sbatch {script}"
        ) from None
    if done.returncode:
        said = done.stderr.strip() or f"status {done.returncode}"
        raise InvalidConfig(f"sbatch refused {script}: {said}\nChange the options of submit, and run it again")
    return done.stdout.strip().partition(";")[0]
