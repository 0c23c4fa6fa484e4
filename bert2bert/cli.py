"""The ``bert2bert`` command. Sub-commands import what they need when they run, so that ``--help`` imports no torch.

Exit status: 0 done, 1 a check failed (verify), 2 the input cannot be used (the message says why and what would work).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert2bert import __version__
from bert2bert.errors import UserError

_SOURCE = (
    "a DeepSpeed checkpoint folder (ZeRO 1, 2, 3 of any world size, or universal; with its `latest`, or one tag), or a "
    "Hugging Face folder"
)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, options aligned."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


def main(argv: Sequence[str] | None = None, comm: Any = None) -> int:
    """Run one command. comm: an MPI communicator when every rank calls this alike (``grow`` only)."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args, comm) or 0)
    except UserError as error:
        if comm is None or comm.Get_rank() == 0:
            print(f"bert2bert {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output (head, less) has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"bert2bert {args.command}: interrupted; nothing was committed", file=sys.stderr)
        return 130


# ------------------------------------------------------------------------------------------------ commands


def _prepare(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.data.prepare import prepare

    text, heldout, fraction = args.text, args.heldout_text, args.heldout_fraction
    if args.corpus:
        from bert2bert.data.corpus import books

        shelf = books()
        if args.corpus not in shelf:
            from bert2bert.errors import InvalidData, did_you_mean

            raise InvalidData(
                f"--corpus {args.corpus!r} is no book of the embedded corpus; {did_you_mean(args.corpus, shelf)}"
            )
        text = [path for name, path in shelf.items() if name != args.corpus]
        heldout = [shelf[args.corpus]]
    if fraction is None:
        fraction = 0.0 if heldout else 0.01
    meta = prepare(
        text=text,
        dataset=args.dataset,
        dataset_config=args.dataset_config,
        dataset_split=args.dataset_split,
        text_column=args.text_column,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        heldout_text=heldout,
        heldout_fraction=fraction,
        document=args.document,
        output=args.output,
        seed=args.seed,
    )
    for name, split in meta["splits"].items():
        print(f"{name:8} {split['tokens']:,} tokens in {split['documents']:,} documents")
    held = meta["splits"].get("heldout", {})
    if "unigram_entropy" in held:
        print(
            f"held out: unigram entropy {held['unigram_entropy']:.4f} nats a token; a model below it has learnt context"
        )
    print(f"written  {args.output}")


def _inspect(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.shards.inspect import inspect, render

    found = inspect(args.path, args.tag)
    print(json.dumps(found, indent=1, default=str) if args.json else render(found, tensors=args.tensors))


def _how(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "source_config": args.source_config,
        "tag": args.tag,
        "width": args.width,
        "depth": args.depth,
        "seed": args.seed,
        "breaker": args.break_symmetry,
    }


def _plan(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.planning import describe, open_growth, summary

    growth = open_growth(args.source, args.config, **_how(args))
    found = describe(growth)
    if args.json:
        print(json.dumps(found, indent=1, default=str))
        return
    print(summary(growth, found))
    tensors = found["tensors"]
    wide = max(len(name) for name in tensors)
    print(f"\n{'target tensor':{wide}}  {'shape':14} {'bytes':>14}  {'from':{wide}}  how")
    for name, t in tensors.items():
        shape = " x ".join(map(str, t["shape"]))
        print(f"{name:{wide}}  {shape:14} {t['bytes']:14,}  {', '.join(t['from']) or '-':{wide}}  {t['how']}")


def _grow(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.growth import grow

    grow(
        args.source,
        args.target,
        args.config,
        form=args.format,
        stage=args.stage,
        world_size=args.world_size,
        precision=args.precision,
        layout=args.groups,
        lossy=args.lossy,
        measure=not args.no_measure,
        bins=args.bins,
        comm=comm,
        **_how(args),
    )


def _verify(args: argparse.Namespace, comm: Any) -> int:
    from bert2bert.verify import render, verify

    found = verify(
        args.source,
        args.grown,
        source_config=args.source_config,
        tag=args.tag,
        grown_tag=args.grown_tag,
        bins=args.bins,
    )
    print(json.dumps(found, indent=1) if args.json else render(found))
    return 0 if found["ok"] else 1


def _report(args: argparse.Namespace, comm: Any) -> None:
    from bert2bert.report import render, report

    found = report(args.runs, args.output)
    print(json.dumps(found, indent=1, default=str) if args.json else render(found))


# -------------------------------------------------------------------------------------------------- parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bert2bert",
        description="Grow a small model's checkpoint, shards and optimizer state included, and pre-train the result.",
        epilog="Training: deepspeed launch/pretrain.py --help. Over MPI ranks: mpirun -n 4 python launch/grow.py …",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=f"example:\n{example}", formatter_class=_Help
        )
        sub.set_defaults(run=run)
        return sub

    p = command(
        "prepare",
        _prepare,
        "Turn text into token bins: tokenizer, memory-mapped tokens, document boundaries, a held-out split.",
        "  bert2bert prepare --text books/*.txt --heldout-fraction 0.01 --vocab-size 30522 --output bins/\n"
        "  bert2bert prepare --corpus emma --vocab-size 1024 --output bins/",
    )
    origin = p.add_mutually_exclusive_group(required=True)
    origin.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text files (.txt, .gz, .xz)")
    origin.add_argument("--dataset", metavar="NAME", help="a dataset of the hub, or a local folder or file of one")
    origin.add_argument("--corpus", metavar="BOOK", help="the embedded corpus of seven novels, with BOOK held out")
    p.add_argument("--dataset-config", metavar="NAME", help="the dataset's configuration")
    p.add_argument("--dataset-split", default="train", metavar="NAME", help="the dataset's split (default: train)")
    p.add_argument("--text-column", default="text", metavar="NAME", help="the column that holds text (default: text)")
    p.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="tokenizer.json, vocab.txt or a folder (default: train)"
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
        _inspect,
        "Say what is in a checkpoint: format, stage, world size, architecture, tensors, optimizer state, step.",
        "  bert2bert inspect runs/small",
    )
    p.add_argument("path", type=Path, help=_SOURCE)
    p.add_argument("--tag", help="the tag to look at (default: what `latest` names)")
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument("--json", action="store_true", help="machine-readable output")

    def growth_options(p: argparse.ArgumentParser) -> None:
        p.add_argument("--config", type=Path, required=True, metavar="TARGET", help="the target's Hugging Face config")
        p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config, when it carries none")
        p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
        p.add_argument(
            "--width", default="fpi", metavar="OP", help="fpi | aki [:choice=balanced|random|left] | direct | random"
        )
        p.add_argument("--depth", default="stack", metavar="OP", help="stack: whole copies, then the top layers again")
        p.add_argument("--seed", type=int, default=0, help="of every choice and fill (default: 0)")
        p.add_argument(
            "--break-symmetry",
            metavar="HOW",
            help="noise[:scale=0.1] (in the null space, keeps the function) | uneven | fresh-moments",
        )

    p = command(
        "plan",
        _plan,
        "Show what a growth would do, reading no tensor: origin of every tensor, exactness, sizes, bytes, cost.",
        "  bert2bert plan runs/small --config base.json --width aki --depth stack",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    growth_options(p)
    p.add_argument("--json", action="store_true", help="machine-readable output")

    p = command(
        "grow",
        _grow,
        "Grow a checkpoint, shard by shard and with its optimizer state.",
        "  bert2bert grow runs/small runs/grown --config base.json --width aki --depth stack\n"
        "  bert2bert grow runs/small runs/grown --config base.json --format zero --stage 2 --world-size 4",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("target", type=Path, help="the folder to write; it must hold no checkpoint yet")
    growth_options(p)
    p.add_argument(
        "--format",
        choices=("universal", "zero", "hub"),
        default="universal",
        help="universal (default): any ZeRO stage and world size; zero: native shards; hub: weights only",
    )
    p.add_argument("--stage", type=int, choices=(1, 2, 3), help="ZeRO stage of --format zero")
    p.add_argument("--world-size", type=int, metavar="N", help="data-parallel ranks of --format zero")
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the target run (default: the source's)")
    p.add_argument(
        "--groups",
        choices=("layers", "decay", "single", "source"),
        help="optimizer groups: per layer (ours), decay/no-decay, one, the source's (default: as found)",
    )
    p.add_argument("--lossy", action="store_true", help="accept a width that cannot keep the function")
    p.add_argument("--bins", type=Path, metavar="DIR", help="measure the change on held-out text, not on random tokens")
    p.add_argument("--no-measure", action="store_true", help="do not measure how the function changes")

    p = command(
        "verify",
        _verify,
        "Check a grown checkpoint against its source: tensors, moments, logits, loss. Exit status 1 when one fails.",
        "  bert2bert verify runs/small runs/grown --json",
    )
    p.add_argument("source", type=Path, help=_SOURCE)
    p.add_argument("grown", type=Path, help="the checkpoint that was grown from it")
    p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config, when it carries none")
    p.add_argument("--tag", help="the source's tag (default: what `latest` names)")
    p.add_argument("--grown-tag", help="the grown checkpoint's tag (default: what `latest` names)")
    p.add_argument("--bins", type=Path, metavar="DIR", help="compare on held-out text, not on random tokens")
    p.add_argument("--json", action="store_true", help="machine-readable output")

    p = command(
        "report",
        _report,
        "Compare runs with the first: savings table and loss curves over FLOPs and wall clock, Markdown and PNG.",
        "  bert2bert report runs/scratch runs/base --output report/",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders; the first is the reference")
    p.add_argument("--output", type=Path, metavar="DIR", help="write report.md and report.png there")
    p.add_argument("--json", action="store_true", help="machine-readable output")
    return parser


if __name__ == "__main__":
    sys.exit(main())
