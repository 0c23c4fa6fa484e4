"""Options of the commands that only read: ``inspect``, ``operators``, ``verify``, ``report`` and ``status``."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from bert2bert.commands.options.source import CHECKPOINT, source, source_details


def inspect(p: ArgumentParser) -> None:
    """Of ``inspect``."""
    p.add_argument("path", type=Path, metavar="CHECKPOINT", help=CHECKPOINT)
    p.add_argument("--tag", metavar="TAG", help="the tag to show, a sub-folder (default: the one in `latest`)")
    p.add_argument("--tensors", action="store_true", help="list every tensor")
    p.add_argument(
        "--check",
        action="store_true",
        help="read every file and compare it with the manifest; exit status 1 if one is damaged",
    )


def operators(p: ArgumentParser) -> None:
    """Of ``operators``."""
    p.add_argument("name", nargs="?", metavar="NAME", help="show one operator in full (default: list all)")


def verify(p: ArgumentParser) -> None:
    """Of ``verify``."""
    source(p)
    p.add_argument("grown", type=Path, metavar="GROWN", help="a checkpoint that was grown or resharded from SOURCE")
    source_details(p)
    p.add_argument("--grown-tag", metavar="TAG", help="the grown checkpoint's tag (default: the one in `latest`)")
    p.add_argument(
        "--with", dest="other", type=Path, metavar="CHECKPOINT", help="the checkpoint that was given to grow --with"
    )
    read = p.add_mutually_exclusive_group()
    read.add_argument(
        "--bins",
        type=Path,
        metavar="DIR",
        help="run both models on held-out text of these token bins (default: random tokens)",
    )
    read.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="run both models on these token ids: a text file, one row a line, all rows equally long",
    )
    p.add_argument("--no-logits", action="store_true", help="run no model: compare only tensors and moments")
    p.add_argument("--output", type=Path, metavar="FILE", help="also write the report to this file, as JSON")


def report(p: ArgumentParser) -> None:
    """Of ``report``."""
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of training runs; the first is the "
                   "reference")  # fmt: skip
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write report.md, report.png and report.json into this folder (default: print the table only)",
    )


def status(p: ArgumentParser) -> None:
    """Of ``status``."""
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of training runs")
    p.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        help="print it again every so many seconds, as long as one of them is running (default: print it once)",
    )
