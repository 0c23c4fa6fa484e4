"""The command line of ``bert2bert``: its commands, their options and help texts. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert2bert import __version__
from bert2bert.terminal.arguments import Parser

Run = Callable[[argparse.Namespace, Any], int | None]

_SOURCE = (
    "a DeepSpeed checkpoint folder (ZeRO 0 to 3 of any world size, or universal; with its `latest`, or one tag), or a "
    "Hugging Face folder"
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, options aligned."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def parser(runs: Mapping[str, Run]) -> Parser:
    """The whole command line. runs: what each command runs, by its name."""
    top = Parser(
        prog="bert2bert",
        description="Grow a small model's checkpoint, shards and optimizer state included, and pre-train the result.",
        epilog="Training: deepspeed launch/pretrain.py --help. Over MPI ranks: mpirun -n 4 python launch/grow.py …, or "
        "launch/reshard.py …",
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n{example}", formatter_class=_Help
        )
        sub.set_defaults(run=runs[name])
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, all else to stderr")
        sub.add_argument("--quiet", action="store_true", help="print warnings and errors only (and what --json gives)")
        return sub

    p = command(
        "prepare",
        "Turn text into token bins: tokenizer, memory-mapped tokens, document boundaries, a held-out split.",
        "  bert2bert prepare --text books/*.txt --heldout-fraction 0.01 --vocab-size 30522 --output bins/\n"
        "  bert2bert prepare --corpus emma --vocab-size 1024 --output bins/",
    )
    origin = p.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files, plain or .gz, .bz2, .xz"
    )
    origin.add_argument("--dataset", metavar="NAME", help="a dataset of the hub, or a local folder or file of one")
    origin.add_argument("--corpus", metavar="BOOK", help="the embedded corpus of seven novels, with BOOK held out")
    p.add_argument("--dataset-config", metavar="NAME", help="the dataset's configuration")
    p.add_argument("--dataset-split", default="train", metavar="NAME", help="the dataset's split (default: train)")
    p.add_argument("--text-column", default="text", metavar="NAME", help="the column that holds text (default: text)")
    p.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a Hub folder, tokenizer.json or vocab.txt (default: train)",
    )
    p.add_argument("--vocab-size", type=int, default=30522, metavar="N", help="of a trained tokenizer (default: 30522)")
    p.add_argument("--heldout-text", nargs="+", type=Path, default=[], metavar="FILE", help="files to hold out")
    p.add_argument(
        "--heldout-fraction",
        type=float,
        metavar="F",
        help="share of the documents to hold out (default: 0.01 where no --heldout-text is given)",
    )
    p.add_argument("--document", choices=("file", "blank-line", "line"), default="file", help="what ends a document")
    p.add_argument("--seed", type=int, default=0, help="chooses the held-out documents (default: 0)")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="the bins folder to write")

    p = command(
        "inspect",
        "Say what is in a checkpoint: format, stage, world size, architecture, tensors, optimizer state, step.",
        "  bert2bert inspect runs/small",
    )
    p.add_argument("path", type=Path, help=_SOURCE)
    p.add_argument("--tag", help="the tag to look at (default: what `latest` names)")
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument(
        "--check", action="store_true", help="read every file, compare it with the manifest; exit status 1: one is bad"
    )

    def growth_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--config", type=Path, required=True, metavar="TARGET", help="the target's Hugging Face config")
        p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config, when it carries none")
        p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
        p.add_argument("--width", default="fpi", metavar="OP", help="how axes grow (default: fpi)")
        p.add_argument("--depth", default="stack", metavar="OP", help="how layers grow (default: stack)")
        p.add_argument("--vocab", metavar="OP", help="how the vocabulary grows, where it does")
        p.add_argument("--positions", metavar="OP", help="how a table of positions grows, where it does")
        p.add_argument("--experts", metavar="OP", help="how experts come about, where the target has more")
        p.add_argument(
            "--with", dest="other", type=Path, metavar="CHECKPOINT", help="interpolate with one of the target's size"
        )
        p.add_argument("--alpha", type=float, metavar="A", help="with --with: A of the grown model, 1 - A of the other")
        p.add_argument("--seed", type=int, default=0, help="of every choice and fill (default: 0)")
        p.add_argument(
            "--break-symmetry", metavar="HOW", help="noise[:scale=0.1] | uneven: tells copies apart, exactly"
        )
        p.add_argument(
            "--moments",
            choices=("exact", "carried", "reset", "asymmetric"),
            help="Adam's, in place of the operator's policy: by the same maps, all zero at step 0, zero where fresh",
        )

    def target_options(p: argparse.ArgumentParser) -> None:
        p.add_argument(
            "--format",
            choices=("universal", "zero", "hub"),
            default="universal",
            help="universal (default): any ZeRO stage and world size; zero: native shards; hub: weights only",
        )
        p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage of --format zero")
        p.add_argument(
            "--world-size", type=int, metavar="N", help="data-parallel ranks of --format zero (stage 0: any)"
        )
        p.add_argument(
            "--expert-parallel",
            type=int,
            metavar="E",
            help="ranks that share a mixture's experts; of --format zero, stage 1 or 2 (DeepSpeed's autoep_size)",
        )
        p.add_argument(
            "--precision",
            choices=("fp32", "bf16", "fp16"),
            help="of the target (default: the source's; in a Hugging Face folder each tensor's own, and made of a run "
            "fp32, that of its master weights)",
        )
        p.add_argument(
            "--groups",
            choices=("layers", "decay", "single", "source"),
            help="optimizer groups: per layer (ours), decay/no-decay (as transformers' Trainer's), one, the source's "
            "(default: as found)",
        )
        p.add_argument(
            "--target-tag", metavar="TAG", help="the name of the checkpoint's folder (default: the source's)"
        )
        p.add_argument("--shard-size", metavar="SIZE", help="largest weights file of --format hub (default: 5GB)")
        p.add_argument(
            "--workers",
            type=int,
            default=1,
            metavar="N",
            help="processes that share the work, without MPI (default: 1)",
        )

    p = command(
        "operators",
        "List the growth operators: paper, what each preserves, what it needs. With a name: formula and options.",
        "  bert2bert operators\n  bert2bert operators lemon",
    )
    p.add_argument("name", nargs="?", help="one operator")

    p = command(
        "plan",
        "Show what a growth would do, reading no tensor: origin of every tensor, exactness, sizes, bytes, cost.",
        "  bert2bert plan runs/small --config base.json --width aki --depth stack",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    growth_options(p)
    p.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes to expect time and memory for (default: 1)"
    )
    p.add_argument(
        "--disk-bandwidth",
        default="1,1",
        metavar="READ,WRITE",
        help="GB/s that one rank reads and writes at, for the expected time (default: 1,1)",
    )

    p = command(
        "grow",
        "Grow a checkpoint, shard by shard and with its optimizer state.",
        "  bert2bert grow runs/small runs/grown --config base.json --width aki --depth stack\n"
        "  bert2bert grow runs/small runs/grown --config base.json --format zero --stage 2 --world-size 4",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("target", type=Path, help="the folder to write; it must hold no checkpoint yet")
    growth_options(p)
    target_options(p)
    p.add_argument("--lossy", action="store_true", help="accept a width that cannot keep the function")
    p.add_argument("--bins", type=Path, metavar="DIR", help="measure the change on held-out text, not on random tokens")
    p.add_argument("--no-measure", action="store_true", help="do not measure how the function changes")

    p = command(
        "reshard",
        "Write a checkpoint of any model anew for another form, ZeRO stage, number of ranks or precision, bit for bit.",
        "  bert2bert reshard runs/small runs/small8 --format zero --stage 3 --world-size 8\n"
        "  bert2bert reshard runs/small runs/any --workers 4",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("target", type=Path, help="the folder to write; it must hold no checkpoint yet")
    p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
    p.add_argument(
        "--source-config", type=Path, metavar="FILE", help="a config to carry along, when the source has none"
    )
    target_options(p)

    p = command(
        "learn",
        "Fit the maps of --width ligo on text: width and depth learned on the grown model's loss.",
        "  bert2bert learn runs/small --config base.json --data bins/ --output maps.safetensors",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("--config", type=Path, required=True, metavar="TARGET", help="the target's Hugging Face config")
    p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config, when it carries none")
    p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="token bins to fit on")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="the maps to write, a safetensors file")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="of Adam on the maps (default: 100)")
    p.add_argument(
        "--lr", type=float, default=1e-2, help="largest move of a map's row in the first step (default: 0.01)"
    )
    p.add_argument("--noise", type=float, default=0.03, help="on the copies that the fit starts from (default: 0.03)")
    p.add_argument("--rows", type=int, default=16, metavar="N", help="rows of text a step (default: 16)")
    p.add_argument("--length", type=int, metavar="N", help="tokens a row (default: what the source was trained on)")
    p.add_argument("--seed", type=int, default=0, help="of rows, masks and noise (default: 0)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the fit runs (default: cpu)")

    p = command(
        "verify",
        "Check a grown checkpoint against its source: tensors, moments, function, gradients. Exit status 1: not equal.",
        "  bert2bert verify runs/small runs/grown --json",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("grown", type=Path, help="the checkpoint that was grown from it")
    p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config, when it carries none")
    p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
    p.add_argument("--grown-tag", help="the grown checkpoint's tag (default: what `latest` names)")
    p.add_argument("--with", dest="other", type=Path, metavar="CHECKPOINT", help="what the growth interpolated with")
    read = p.add_mutually_exclusive_group()
    read.add_argument("--bins", type=Path, metavar="DIR", help="compare on held-out text, not on random tokens")
    read.add_argument("--tokens", type=Path, metavar="FILE", help="compare on these token ids, one row a line")
    p.add_argument("--no-logits", action="store_true", help="run no model: compare tensors and moments alone")
    p.add_argument("--output", type=Path, metavar="FILE", help="write the report there too, as JSON")

    p = command(
        "report",
        "Compare runs with the first: savings table and loss curves over FLOPs and wall clock, Markdown and PNG.",
        "  bert2bert report runs/scratch runs/base --output report/",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the reference")
    p.add_argument("--output", type=Path, metavar="DIR", help="write report.md and report.png there")
    return top
