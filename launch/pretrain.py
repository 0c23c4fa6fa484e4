"""Pre-train as a recipe says: the entry for deepspeed, torchrun, mpirun and srun alike, or one plain process.

A user's mistake is printed once, without a traceback, and every rank exits with status 2. A signal to any rank (Ctrl-C,
SIGTERM, SIGHUP, SIGUSR1, SIGUSR2: a time limit, a preemption) ends the run after the step under way: its checkpoint is
written, one line says so, and every rank exits with 75, so that no job that waits for it starts. A signal that comes
before the first step does the same without a checkpoint.
"""

from __future__ import annotations

from bert2bert.ranks import stopping

if __name__ == "__main__":
    stopping.hold()  # whoever started this may end it at any moment, while Python still imports, too

import argparse
import contextlib
import json
import sys
import time
from functools import partial
from pathlib import Path

from bert2bert.errors import UserError
from bert2bert.ranks import launcher, orphans
from bert2bert.terminal.arguments import Parser

EXAMPLE = """\
examples:
  deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \\
      --recipe recipes/bert_small.py --bins bins/wiki_books --output runs/small
  torchrun --nproc_per_node 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \\
      --recipe recipes/demo_small.py --output runs/demo_small --set phases.0.steps=50
  mpirun -n 2 python launch/pretrain.py ...
  srun --ntasks 2 python launch/pretrain.py ...       (see launch/pretrain.sbatch)

start, or continue where it stopped:   --output runs/small --resume auto
start from a grown checkpoint:         --output runs/base --resume runs/grown
both in one command:                   --output runs/base --resume auto --from runs/grown
"""


def arguments() -> Parser:
    parser = Parser(
        prog="launch/pretrain.py",
        description="Pre-train the model of a recipe with DeepSpeed.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ds_config", required=True, type=Path, metavar="FILE", help="DeepSpeed JSON: precision, ZeRO")
    parser.add_argument("--recipe", required=True, type=Path, metavar="FILE", help="the experiment, see recipes/")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="run folder: checkpoints and metrics")
    parser.add_argument(
        "--resume",
        metavar="DIR|auto",
        help="checkpoint or run folder to continue from; auto: the newest undamaged one in --output, else what "
        "--from names, else none: one command for start and restart",
    )
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="DIR", help="with --resume auto: what the run starts from at first"
    )
    parser.add_argument("--bins", metavar="DIR", help="token bins, in place of the recipe's data.bins")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override values of the recipe"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="how long a rank waits for another, at the start and in a collective (default: 600)",
    )  # fmt: skip
    parser.add_argument(
        "--activation_checkpointing", action="store_true",
        help="keep only the input of every learning block for the backward pass, and compute the rest again there",
    )  # fmt: skip
    parser.add_argument("--until", metavar="PHASE", help="pause at the end of this phase, with a checkpoint; status 0")
    parser.add_argument(
        "--report-to", nargs="+", default=["tensorboard"], metavar="NAME",
        help="where numbers go besides metrics.jsonl, separated by commas or spaces: tensorboard (the default), wandb, "
        "mlflow, where these are installed; or none",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the run's end as one JSON object on standard output")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only (and what --json gives)")
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    with launcher.first_speaks():
        options = arguments().parse_args(words)
    rank = launcher.started_as()
    if options.local_rank is not None:  # deepspeed's launcher, whose end nobody else would tell its ranks of
        orphans.watch()
    try:
        from bert2bert.commands import pretraining
        from bert2bert.train import reporters

        timeout = launcher.timeout(options.timeout)
        found = launcher.set_up()
        rank = found.rank
        recipe, config = pretraining.checked(options, found.world, says=rank == 0)
        resume = options.resume if options.resume in (None, "auto") else Path(options.resume)
        report = reporters.names(options.report_to)

        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's log is no result
            from bert2bert.commands import phase_growth  # torch: only once the input is known to be sound
            from bert2bert.train.run import train

            phase_growth.check(recipe)
            command = ["launch/pretrain.py", *words]
            result = train(
                recipe, config, options.output, resume, command=command, recipe_file=options.recipe,
                quiet=options.quiet, timeout=timeout, activation_checkpointing=options.activation_checkpointing,
                until=options.until, start=options.start, report=report,
                grow=partial(phase_growth.grow, quiet=options.quiet),
            )  # fmt: skip
        if options.json and rank == 0:
            print(json.dumps({k: None if v != v else v for k, v in result.items()}), flush=True)
    except UserError as error:
        if rank == 0 or alone():
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    leave()
    return stopping.STOPPED if result["stopped"] else 0


def alone() -> bool:
    """Whether no launcher ends this rank within the time that rank 0 needs to meet the same mistake, say so and end."""
    until = time.monotonic() + launcher.GRACE_SECONDS
    with stopping.held() as stop:
        while stop.caught is None and time.monotonic() < until:
            time.sleep(0.05)
        return stop.caught is None


def leave() -> None:
    """Close the process group: its threads, alive while the interpreter goes down, may abort a run that is done."""
    from torch import distributed

    if distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # a rank that is lost now takes nothing of the run with it
            distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    stopping.leave(main())
