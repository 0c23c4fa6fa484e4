"""Options that name what a command starts from: a checkpoint, and the config of the larger model."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

CHECKPOINT = (
    "a DeepSpeed checkpoint folder (ZeRO stage 0 to 3 of any world size, or universal; the folder with the file "
    "`latest`, or the folder of one tag), or a Hugging Face model folder"
)


def source(p: ArgumentParser, other: str = "", optional: bool = False) -> None:
    """SOURCE. other: what it may be besides a checkpoint, or when it may be left out."""
    p.add_argument("source", type=Path, nargs="?" if optional else None, metavar="SOURCE", help=CHECKPOINT + other)


def source_details(p: ArgumentParser) -> None:
    """How to read SOURCE."""
    p.add_argument("--source-config", type=Path, metavar="FILE", help="the source's config.json, if SOURCE holds none")
    p.add_argument("--tag", metavar="TAG", help="the source's tag, its sub-folder (default: the one in `latest`)")


def target_config(p: ArgumentParser, required: bool = True) -> None:
    """--config. required: whether nothing else may say what the larger model is."""
    p.add_argument(
        "--config",
        type=Path,
        required=required,
        metavar="FILE",
        help="config.json of the larger model (Hugging Face), or the folder that holds it",
    )
