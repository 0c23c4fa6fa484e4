"""The command line of ``bert2bert``: its commands, what each does, examples. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bert2bert import __version__
from bert2bert.commands.options import growth, reading, submit, target, text
from bert2bert.terminal.arguments import Parser

Run = Callable[[argparse.Namespace, Any], int | None]


@dataclass(frozen=True)
class Command:
    """One command of the command line."""

    options: Callable[[argparse.ArgumentParser], None]
    """Adds its options to a parser."""
    text: str
    """What it does, in a sentence."""
    examples: tuple[str, ...]
    """Command lines."""
    more: str = ""
    """What else its help says above the options."""


_OPERATORS = "OP is an operator, NAME or NAME:key=value,…; `bert2bert operators` lists them."

_COMMANDS = {
    "prepare": Command(
        text.prepare,
        "Turn text into token bins for training: tokenizer, tokens, document boundaries, a held-out split.",
        (
            "bert2bert prepare --text books/*.txt --heldout-fraction 0.01 --vocab-size 30522 --output bins",
            "bert2bert prepare --corpus emma --vocab-size 1024 --output bins",
        ),
    ),
    "inspect": Command(
        reading.inspect,
        "Show what is in a checkpoint: format, stage, world size, architecture, tensors, optimizer state, step.",
        ("bert2bert inspect runs/small",),
    ),
    "operators": Command(
        reading.operators,
        "List the growth operators: paper, what each preserves, what it needs. With a name: formula and options.",
        ("bert2bert operators", "bert2bert operators lemon"),
    ),
    "config": Command(
        growth.config,
        "Write the config of a larger or smaller model whose sizes divide, and name the operators that make it.",
        (
            "bert2bert config llama-small --width 2x --depth 1.5x --output llama-large",
            "bert2bert config runs/small --params 500M --output large",
            "bert2bert config runs/gpt2 --embeddings untie --output untied",
        ),
        "W, D, F, H, K, E and V are numbers, such as 768, or multiples of the source's, such as 2x or 1.5x.",
    ),
    "plan": Command(
        growth.plan,
        "Show what a growth would do, without reading tensors: each tensor's origin, exactness, sizes, bytes, cost.",
        ("bert2bert plan runs/small --config base.json --width aki --depth stack",),
        _OPERATORS,
    ),
    "grow": Command(
        target.grow,
        "Grow a checkpoint, shard by shard and with its optimizer state.",
        (
            "bert2bert grow runs/small runs/grown --config base.json --width fpi:choice=left --depth stack",
            "bert2bert grow runs/small runs/grown --config base.json --format zero --stage 2 --world-size 4",
        ),
        _OPERATORS,
    ),
    "reshard": Command(
        target.reshard,
        "Rewrite a checkpoint of any model for another format, ZeRO stage, world size or precision, bit for bit.",
        (
            "bert2bert reshard runs/small runs/small8 --format zero --stage 3 --world-size 8",
            "bert2bert reshard runs/small runs/any --workers 4",
        ),
    ),
    "learn": Command(
        growth.learn,
        "Fit the maps of --width ligo on text: width and depth are learned from the grown model's loss.",
        ("bert2bert learn runs/small --config base.json --data bins --output maps.safetensors",),
    ),
    "verify": Command(
        reading.verify,
        "Compare a grown checkpoint with its source: tensors, moments, function, gradients. Exit status 1: not equal.",
        ("bert2bert verify runs/small runs/grown --json",),
    ),
    "submit": Command(
        submit.submit,
        "Write one Slurm script that trains a recipe, every setting at its top, into the run's folder; or submit it.",
        (
            "bert2bert submit recipes/bert_small.py --ds_config ds_configs/zero2_bf16.json --output runs/small \\\n"
            "      --nodes 4 --partition gpu -- --bins bins/wiki",
            "bert2bert submit recipes/bert_base_bert2bert.py --ds_config ds_configs/zero2_bf16.json \\\n"
            "      --output runs/base --container images/b2b.sif --env NCCL_SOCKET_IFNAME=ib0 --yes \\\n"
            "      -- --from runs/grown --resume auto",
            "bert2bert submit recipes/demo_small.py --ds_config ds_configs/zero2_cpu.json --output runs/demo \\\n"
            "      --gpus-per-node 0 --tasks-per-node 2 --time 30 --sbatch=--exclusive -- --set seed=1",
        ),
        "Behind `--` stand options of launch/pretrain.py; --resume auto is given if no other is.",
    ),
    "status": Command(
        reading.status,
        "Show how training runs stand, by their folders alone. Exit status 1: one has failed or gone silent.",
        ("bert2bert status runs/small runs/base", "bert2bert status runs/* --watch 30"),
    ),
    "report": Command(
        reading.report,
        "Compare training runs with the first: a table of savings, loss curves over FLOPs and time (Markdown, PNG).",
        ("bert2bert report runs/scratch runs/base --output report",),
    ),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, options aligned."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)
        self._action_max_length = 13  # argparse forgets the indentation of sub-commands: the longest would wrap


def parser(runs: Mapping[str, Run]) -> Parser:
    """The whole command line. runs: the function that each command runs, by the command's name."""
    top = Parser(
        prog="bert2bert",
        description="Grow a small model's checkpoint, optimizer state included, and pre-train the larger model.",
        epilog="`bert2bert COMMAND --help` lists a command's options.\n"
        "To train: deepspeed launch/pretrain.py --help\n"
        "To grow or reshard over MPI ranks: mpirun -n 4 python launch/grow.py …, or launch/reshard.py …",
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in _COMMANDS.items():
        epilog = "\n  ".join(("example:" if len(command.examples) == 1 else "examples:", *command.examples))
        described = "\n".join(filter(None, (command.text, command.more)))
        sub = commands.add_parser(name, help=command.text, description=described, epilog=epilog, formatter_class=_Help)
        sub.set_defaults(run=runs[name])
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, all else to stderr")
        sub.add_argument("--quiet", action="store_true", help="print only warnings, errors and what --json asks for")
        command.options(sub)
    return top
