"""The command line of ``bert2bert``: its commands, their options and help texts. Imports no torch.

Longer than other modules: it is one list, which is easiest to read in one place.
"""

from __future__ import annotations

import argparse
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert2bert import __version__
from bert2bert.terminal.arguments import Parser

Run = Callable[[argparse.Namespace, Any], int | None]

_CHECKPOINT = (
    "a DeepSpeed checkpoint folder (ZeRO stage 0 to 3 of any world size, or universal; the folder with the file "
    "`latest`, or the folder of one tag), or a Hugging Face model folder"
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, options aligned."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def parser(runs: Mapping[str, Run]) -> Parser:
    """The whole command line. runs: the function that each command runs, by the command's name."""
    top = Parser(
        prog="bert2bert",
        description="Grow a small model's checkpoint, optimizer state included, and pre-train the larger model.",
        epilog="To train: deepspeed launch/pretrain.py --help. To grow or reshard over MPI ranks: "
        "mpirun -n 4 python launch/grow.py …, or launch/reshard.py …",
        formatter_class=_Help,
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    for name, (add_options, text, *examples) in _COMMANDS.items():
        epilog = "\n  ".join(("example:", *examples))
        sub = commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=_Help)
        sub.set_defaults(run=runs[name])
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, all else to stderr")
        sub.add_argument("--quiet", action="store_true", help="print only warnings, errors and what --json asks for")
        add_options(sub)
    return top


# ------------------------------------------------------------------------------------------------ shared by commands


def _source(p: ArgumentParser) -> None:
    p.add_argument("source", type=Path, metavar="SOURCE", help=_CHECKPOINT)


def _source_options(p: ArgumentParser) -> None:
    p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config.json, if SOURCE holds none")
    p.add_argument("--tag", help="the source's tag (default: the one that `latest` names)")


def _target_config(p: ArgumentParser) -> None:
    p.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE",
        help="config.json of the larger model (Hugging Face), or the folder that holds it",
    )


def _growth_options(p: ArgumentParser) -> None:
    _target_config(p)
    _source_options(p)
    p.add_argument("--width", default="fpi", metavar="OP", help="operator that widens layers (default: fpi)")
    p.add_argument("--depth", default="stack", metavar="OP", help="operator that adds layers (default: stack)")
    p.add_argument("--vocab", metavar="OP", help="operator that adds tokens, if the target has a larger vocabulary")
    p.add_argument("--positions", metavar="OP", help="operator that adds learned positions, if the target has more")
    p.add_argument("--experts", metavar="OP", help="operator that makes experts, if the target has more of them")
    p.add_argument(
        "--with",
        dest="other",
        type=Path,
        metavar="CHECKPOINT",
        help="interpolate the grown model with this checkpoint of the target's size",
    )
    p.add_argument(
        "--alpha", type=float, metavar="A", help="weights of --with: A for the grown model, 1 - A for the other"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of random choices and new values (default: 0)")
    p.add_argument(
        "--break-symmetry",
        metavar="HOW",
        help="noise[:scale=0.1] or uneven: make copied units differ, so that they can learn different things, and "
        "leave the function as it is",
    )
    p.add_argument(
        "--moments",
        choices=("exact", "carried", "reset", "asymmetric"),
        help="Adam's moments, instead of the operator's policy: grown by the same maps as the weights (exact: only if "
        "they then fit the grown model's gradients; carried: in any case), all zero at step 0 (reset), or zero "
        "where a weight is new (asymmetric)",
    )


def _target_options(p: ArgumentParser) -> None:
    p.add_argument("target", type=Path, metavar="TARGET", help="the folder to write; it must hold no checkpoint yet")
    p.add_argument(
        "--format",
        choices=("universal", "zero", "hub"),
        default="universal",
        help="universal (default): loads at any ZeRO stage and world size; zero: DeepSpeed's own shards, for one stage "
        "and world size; hub: a Hugging Face folder, weights only",
    )
    p.add_argument("--stage", type=int, choices=(0, 1, 2, 3), help="ZeRO stage of --format zero")
    p.add_argument(
        "--world-size", type=int, metavar="N", help="data-parallel ranks of --format zero (at stage 0, any number)"
    )
    p.add_argument(
        "--expert-parallel",
        type=int,
        metavar="E",
        help="ranks over which each mixture's experts are split (DeepSpeed's autoep_size); with --format zero, stage "
        "1 or 2",
    )
    p.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the target (default: the source's; a Hugging Face folder keeps each tensor's dtype, or, "
        "when made of a training checkpoint, takes its fp32 master weights)",
    )
    p.add_argument(
        "--groups",
        choices=("layers", "decay", "single", "source"),
        help="optimizer groups: two a layer, as launch/pretrain.py has them; two in all, with and without weight "
        "decay, as transformers' Trainer has them; one; or the source's (default: chosen from the source)",
    )
    p.add_argument("--target-tag", metavar="TAG", help="tag of the checkpoint to write (default: the source's)")
    p.add_argument("--shard-size", metavar="SIZE", help="largest weights file of --format hub (default: 5GB)")
    p.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the work, without MPI (default: 1)"
    )


# ----------------------------------------------------------------------------------------------- one function a command


def _prepare(p: ArgumentParser) -> None:
    origin = p.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files, plain or .gz, .bz2, .xz"
    )
    origin.add_argument(
        "--dataset", metavar="NAME", help="a dataset of the Hugging Face Hub, or a local folder or file of one"
    )
    origin.add_argument(
        "--corpus", metavar="BOOK", help="the seven novels that come with this program; BOOK is held out"
    )
    p.add_argument("--dataset-config", metavar="NAME", help="the dataset's configuration")
    p.add_argument("--dataset-split", default="train", metavar="NAME", help="the dataset's split (default: train)")
    p.add_argument("--text-column", default="text", metavar="NAME", help="the dataset's column of text (default: text)")
    p.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a Hugging Face folder, tokenizer.json or vocab.txt (default: train a tokenizer on the text)",
    )
    p.add_argument(
        "--vocab-size", type=int, default=30522, metavar="N", help="tokens of a trained tokenizer (default: 30522)"
    )
    p.add_argument("--heldout-text", nargs="+", type=Path, default=[], metavar="FILE", help="text files to hold out")
    p.add_argument(
        "--heldout-fraction",
        type=float,
        metavar="F",
        help="share of the documents to hold out (default: 0.01, or none with --heldout-text or --corpus)",
    )
    p.add_argument(
        "--document",
        choices=("file", "blank-line", "line"),
        default="file",
        help="what ends a document: the file's end (default), a blank line, or every line's end; line ends are \\n, "
        "\\r\\n and \\r, and all are read as \\n, in records too",
    )
    p.add_argument("--seed", type=int, default=0, help="seed that chooses the held-out documents (default: 0)")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="the bins folder to write")


def _inspect(p: ArgumentParser) -> None:
    p.add_argument("path", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    p.add_argument("--tag", help="the tag to show (default: the one that `latest` names)")
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument(
        "--check",
        action="store_true",
        help="read every file and compare it with the manifest; exit status 1 if one is damaged",
    )


def _operators(p: ArgumentParser) -> None:
    p.add_argument("name", nargs="?", metavar="NAME", help="show one operator in full")


SIZES = {  # option of `config`, as Python has it -> its value and help
    "width": ("W", "size of the hidden states: 2x the source's, or 768; heads keep their size"),
    "depth": ("D", "layers: 1.5x the source's, or 12; of both stacks of an encoder-decoder"),
    "ffn": ("F", "feed-forward size: 4x the source's, or 3072 (default: it grows as the width does)"),
    "params": ("N", "number of parameters: 500M, 1.3B, or 3x the source's; chooses width and depth at about the "
               "source's aspect, or the one of the two that is not given"),
    "heads": ("H", "attention heads, so many or 2x the source's (default: as many as fit the width)"),
    "kv_heads": ("K", "key-value heads, so many or 2x (default: groups stay as large as they are)"),
    "experts": ("E", "experts of a mixture, so many or 2x"),
    "vocab": ("V", "tokens of the vocabulary, so many or 2x; no tokenizer is copied then"),
}  # fmt: skip


def _config(p: ArgumentParser) -> None:
    p.add_argument(
        "source", type=Path, metavar="SOURCE", help=_CHECKPOINT + "; or a config.json, or a folder that holds one"
    )
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write; it must be new")
    for name, (metavar, text) in SIZES.items():
        p.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)
    _source_options(p)


def _plan(p: ArgumentParser) -> None:
    _source(p)
    _growth_options(p)
    p.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="estimate time and memory for N processes (default: 1)"
    )
    p.add_argument(
        "--disk-bandwidth",
        default="1,1",
        metavar="READ,WRITE",
        help="speed of each process's disk in GB/s, for the estimate of time (default: 1,1)",
    )


def _grow(p: ArgumentParser) -> None:
    _source(p)
    _growth_options(p)
    _target_options(p)
    p.add_argument("--lossy", action="store_true", help="accept a width growth that changes the function")
    p.add_argument(
        "--bins", type=Path, metavar="DIR", help="measure the change of the function on held-out text of these bins "
        "(default: on random tokens)"
    )  # fmt: skip
    p.add_argument("--no-measure", action="store_true", help="do not measure how the function changes")


def _reshard(p: ArgumentParser) -> None:
    _source(p)
    _target_options(p)
    _source_options(p)


def _learn(p: ArgumentParser) -> None:
    _source(p)
    _target_config(p)
    _source_options(p)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="token bins to fit on")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file of maps to write (safetensors)")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="steps of Adam on the maps (default: 100)")
    p.add_argument(
        "--lr", type=float, default=1e-2, help="largest change of a map's row in the first step (default: 0.01)"
    )
    p.add_argument(
        "--noise", type=float, default=0.03, help="noise on the maps that the fit starts from (default: 0.03)"
    )
    p.add_argument("--rows", type=int, default=16, metavar="N", help="rows of text in each step (default: 16)")
    p.add_argument("--length", type=int, metavar="N", help="tokens in each row (default: as the source was trained)")
    p.add_argument("--seed", type=int, default=0, help="seed of rows, masks and noise (default: 0)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the fit (default: cpu)")


def _verify(p: ArgumentParser) -> None:
    _source(p)
    p.add_argument("grown", type=Path, metavar="GROWN", help="a checkpoint that was grown or resharded from SOURCE")
    _source_options(p)
    p.add_argument("--grown-tag", help="the grown checkpoint's tag (default: the one that `latest` names)")
    p.add_argument(
        "--with", dest="other", type=Path, metavar="CHECKPOINT", help="the checkpoint that was given to grow --with"
    )
    read = p.add_mutually_exclusive_group()
    read.add_argument(
        "--bins",
        type=Path,
        metavar="DIR",
        help="run both models on held-out text of these bins (default: random tokens)",
    )
    read.add_argument("--tokens", type=Path, metavar="FILE", help="run both models on these token ids, one row a line")
    p.add_argument("--no-logits", action="store_true", help="run no model: compare only tensors and moments")
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the report to this file, as JSON")


def _report(p: ArgumentParser) -> None:
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the reference")
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="write report.md, report.png and report.json into this folder"
    )


_COMMANDS: dict[str, tuple[Any, ...]] = {  # name: (function that adds its options, what it does, examples)
    "prepare": (
        _prepare,
        "Turn text into token bins for training: tokenizer, tokens, document boundaries, a held-out split.",
        "bert2bert prepare --text books/*.txt --heldout-fraction 0.01 --vocab-size 30522 --output bins/",
        "bert2bert prepare --corpus emma --vocab-size 1024 --output bins/",
    ),
    "inspect": (
        _inspect,
        "Show what is in a checkpoint: format, stage, world size, architecture, tensors, optimizer state, step.",
        "bert2bert inspect runs/small",
    ),
    "operators": (
        _operators,
        "List the growth operators: paper, what each preserves, what it needs. With a name: formula and options.",
        "bert2bert operators",
        "bert2bert operators lemon",
    ),
    "config": (
        _config,
        "Write the config of a larger or smaller model whose sizes divide, and say which operators make it.",
        "bert2bert config llama-small --width 2x --depth 1.5x --output llama-large",
        "bert2bert config runs/small --params 500M --output large",
    ),
    "plan": (
        _plan,
        "Show what a growth would do, without reading tensors: each tensor's origin, exactness, sizes, bytes, cost.",
        "bert2bert plan runs/small --config base.json --width aki --depth stack",
    ),
    "grow": (
        _grow,
        "Grow a checkpoint, shard by shard and with its optimizer state. `bert2bert operators` lists the operators.",
        "bert2bert grow runs/small runs/grown --config base.json --width aki --depth stack",
        "bert2bert grow runs/small runs/grown --config base.json --format zero --stage 2 --world-size 4",
    ),
    "reshard": (
        _reshard,
        "Rewrite a checkpoint of any model for another format, ZeRO stage, world size or precision, bit for bit.",
        "bert2bert reshard runs/small runs/small8 --format zero --stage 3 --world-size 8",
        "bert2bert reshard runs/small runs/any --workers 4",
    ),
    "learn": (
        _learn,
        "Fit the maps of --width ligo on text: width and depth are learned from the grown model's loss.",
        "bert2bert learn runs/small --config base.json --data bins/ --output maps.safetensors",
    ),
    "verify": (
        _verify,
        "Compare a grown checkpoint with its source: tensors, moments, function, gradients. Exit status 1: not equal.",
        "bert2bert verify runs/small runs/grown --json",
    ),
    "report": (
        _report,
        "Compare training runs with the first: a table of savings, loss curves over FLOPs and time (Markdown, PNG).",
        "bert2bert report runs/scratch runs/base --output report/",
    ),
}
