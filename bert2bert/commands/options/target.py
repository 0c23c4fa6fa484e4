"""Options that describe a checkpoint to write: of ``grow`` and ``reshard``."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from bert2bert.commands.options.growth import growth
from bert2bert.commands.options.source import source, source_details


def target(p: ArgumentParser) -> None:
    """Where it goes and its form."""
    p.add_argument("target", type=Path, metavar="TARGET", help="the folder to write; it must hold no checkpoint yet")
    p.add_argument(
        "--format",
        choices=("universal", "zero", "hub"),
        default="universal",
        help="universal (default): loads at any ZeRO stage and world size; zero: DeepSpeed's own shards, for one stage "
        "and world size; hub: a Hugging Face folder, weights only",
    )
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage; needed with --format zero")
    p.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="number of data-parallel ranks; needed with --format zero, except at stage 0, which fits any number",
    )
    p.add_argument(
        "--expert-parallel",
        type=int,
        metavar="E",
        help="number of ranks over which each mixture's experts are split (DeepSpeed's autoep_size), with --format "
        "zero and stage 1 or 2 (default: experts are not split)",
    )
    p.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the target's weights (default: the source's; with --format hub, each tensor's dtype, or of "
        "a training checkpoint its fp32 master weights)",
    )
    p.add_argument(
        "--groups",
        choices=("layers", "decay", "single", "source"),
        help="optimizer groups: layers, two for each layer, as launch/pretrain.py has them; decay, two in all, with "
        "and without weight decay, as transformers' Trainer has them; single, one; source, the source's (default: "
        "chosen from the source)",
    )
    p.add_argument("--target-tag", metavar="TAG", help="tag of the checkpoint to write (default: the source's)")
    p.add_argument(
        "--shard-size", metavar="SIZE", help="largest weights file of --format hub, such as 200MB (default: 5GB)"
    )
    p.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the work, without MPI (default: 1)"
    )


def grow(p: ArgumentParser) -> None:
    """Of ``grow``."""
    source(p)
    growth(p)
    p.add_argument(
        "--phase", metavar="NAME", help="with --recipe: the phase before which to grow (default: the only growth)"
    )
    target(p)
    p.add_argument("--lossy", action="store_true", help="accept a width growth that changes the function")
    p.add_argument(
        "--bins",
        type=Path,
        metavar="DIR",
        help="measure how the function changes on held-out text of these token bins (default: on random tokens)",
    )
    p.add_argument("--no-measure", action="store_true", help="do not measure how the function changes")


def reshard(p: ArgumentParser) -> None:
    """Of ``reshard``."""
    source(p)
    target(p)
    source_details(p)
