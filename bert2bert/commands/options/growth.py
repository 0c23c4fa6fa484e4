"""Options that describe a growth: of ``config``, ``plan``, ``learn``, and those that ``grow`` shares with ``plan``."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from bert2bert.commands.options.source import source, source_details, target_config

SIZES = {  # option of `config`, as Python has it -> its value and help
    "width": ("W", "size of the hidden states; the size of a head stays as it is"),
    "depth": ("D", "number of layers, in each stack of an encoder-decoder"),
    "ffn": ("F", "size of the feed-forward layers (default: grows as the width does)"),
    "params": ("N", "number of parameters: 500M, 1.3B, or 3x the source's; chooses width and depth, or the one of them "
               "that is not given, at about the source's ratio of the two"),
    "heads": ("H", "number of attention heads (default: as many as fit the width)"),
    "kv_heads": ("K", "number of key-value heads (default: each keeps its number of query heads)"),
    "experts": ("E", "number of experts of a mixture"),
    "vocab": ("V", "number of tokens of the vocabulary; the tokenizer is then not copied"),
}  # fmt: skip


def growth(p: ArgumentParser) -> None:
    """What ``plan`` and ``grow`` are asked for; OP is `NAME[:key=value,…]`."""
    target_config(p, required=False)
    p.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="take the larger model and the operators from a recipe whose model grows between its phases, in place of "
        "--config and the operators' options",
    )
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override its values")
    source_details(p)
    p.add_argument("--width", default="fpi", metavar="OP", help="operator that widens layers (default: fpi)")
    p.add_argument("--depth", default="stack", metavar="OP", help="operator that adds layers (default: stack)")
    p.add_argument("--vocab", metavar="OP", help="operator that adds tokens; needed if the vocabulary grows")
    p.add_argument("--positions", metavar="OP", help="operator that adds learned positions; needed if they grow")
    p.add_argument("--experts", metavar="OP", help="operator that makes experts; needed if their number grows")
    p.add_argument(
        "--embeddings",
        metavar="OP",
        help="untie: copy the tied word embedding, its moments with it, into an output matrix of its own; needed if "
        "the target config has tie_word_embeddings false where the source's is true",
    )
    p.add_argument(
        "--with",
        dest="other",
        type=Path,
        metavar="CHECKPOINT",
        help="interpolate the grown model with this checkpoint of the target's size; needs --alpha",
    )
    p.add_argument("--alpha", type=float, metavar="A", help="share of the grown model with --with, from 0 to 1")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of random choices and values (default: 0)")
    p.add_argument(
        "--break-symmetry",
        metavar="HOW",
        help="noise[:scale=0.1] or uneven: make copied units differ, so that they can learn different things, and "
        "leave the function as it is (default: copies stay equal, and a warning says where)",
    )
    p.add_argument(
        "--moments",
        choices=("exact", "carried", "reset", "asymmetric"),
        help="Adam's moments: grown by the same maps as the weights (exact: only if they then fit the grown model's "
        "gradients; carried: in any case), all zero at step 0 (reset), or zero where a weight is new (asymmetric) "
        "(default: the operator's own choice)",
    )


def config(p: ArgumentParser) -> None:
    """Of ``config``."""
    source(p, "; or a config.json, or a folder that holds one")
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the folder to write; it must be new")
    for name, (metavar, text) in SIZES.items():
        p.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)
    p.add_argument(
        "--embeddings", metavar="OP", help="untie: give the model an output matrix of its own in place of a tied one"
    )
    source_details(p)


def plan(p: ArgumentParser) -> None:
    """Of ``plan``."""
    source(p, "; left out with a --recipe that has its model", optional=True)
    growth(p)
    p.add_argument(
        "--ds_config",
        type=Path,
        metavar="FILE",
        help="with --recipe: DeepSpeed JSON whose ZeRO stage and precision say what a rank holds in memory",
    )
    p.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="estimate for N processes (default: 1)",
    )
    p.add_argument(
        "--disk-bandwidth",
        default="1,1",
        metavar="READ,WRITE",
        help="speed of each process's disk in GB/s, for the estimate of time (default: 1,1)",
    )


def learn(p: ArgumentParser) -> None:
    """Of ``learn``."""
    source(p)
    target_config(p)
    source_details(p)
    p.add_argument("--data", type=Path, required=True, metavar="DIR", help="token bins (of `prepare`) to fit on")
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file of maps to write (safetensors)")
    p.add_argument("--steps", type=int, default=100, metavar="N", help="steps of Adam on the maps (default: 100)")
    p.add_argument(
        "--lr",
        type=float,
        default=1e-2,
        metavar="X",
        help="learning rate: the largest length by which a row of a map moves in the first step; falls to 0 (default: "
        "0.01)",
    )
    p.add_argument(
        "--noise",
        type=float,
        default=0.03,
        metavar="X",
        help="length of the random vector that is added to each row of a width map before the fit (default: 0.03)",
    )
    p.add_argument("--rows", type=int, default=16, metavar="N", help="rows of text in each step (default: 16)")
    p.add_argument(
        "--length", type=int, metavar="N", help="tokens in each row (default: as the source was trained, else 64)"
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="seed of rows, masks and noise (default: 0)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device of the fit (default: cpu)")
