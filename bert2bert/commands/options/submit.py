"""Options of ``submit``: the job that trains a recipe on a Slurm cluster."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

PASSED_ON = "training"
"""Where the words behind ``--`` are kept."""


def submit(p: ArgumentParser) -> None:
    """Of ``submit``."""
    p.passed_on = PASSED_ON  # type: ignore[attr-defined]  # bert2bert.terminal.arguments.Parser
    p.add_argument("recipe", type=Path, metavar="RECIPE", help="the experiment, see recipes/")
    p.add_argument("--ds_config", type=Path, required=True, metavar="FILE", help="DeepSpeed JSON: precision, ZeRO")
    p.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the run's folder; the script is written there"
    )
    p.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    p.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="0: none, the ranks compute on CPUs (default: 8)"
    )
    p.add_argument("--tasks-per-node", type=int, metavar="N", help="ranks of a node (default: its GPUs, or 1)")
    p.add_argument("--cpus-per-task", type=int, default=8, metavar="N", help="CPUs of a rank (default: 8)")
    p.add_argument("--time", default="24:00:00", metavar="LIMIT", help="of one start of the job (default: 24:00:00)")
    p.add_argument(
        "--lead", type=int, default=600, metavar="SECONDS", help="how long before the limit to stop (default: 600)"
    )
    p.add_argument(
        "--max-tries", type=int, default=3, metavar="N", help="starts in a row without a new checkpoint (default: 3)"
    )
    for name in ("partition", "account", "qos"):
        p.add_argument(f"--{name}", metavar="NAME", help="as of sbatch (default: the cluster's)")
    p.add_argument(
        "--python", type=Path, metavar="PATH", help="a virtual or conda environment, or a python (default: this one)"
    )
    p.add_argument(
        "--container", metavar="IMAGE", help="a .sif file or a folder for apptainer, all else for enroot and pyxis"
    )
    p.add_argument(
        "--container-options", default="", metavar="WORDS", help="more options of apptainer exec, or of srun"
    )
    p.add_argument(
        "--env", nargs="+", action="extend", default=[], metavar="NAME[=VALUE]",
        help="variables for every rank; without a value, the one that is set here",
    )  # fmt: skip
    p.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="one more option of sbatch: --sbatch=--exclusive",
    )
    p.add_argument("--yes", action="store_true", help="submit the script, too")
