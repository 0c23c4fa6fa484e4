"""What a block of each model core keeps for its backward pass, with and without activation checkpointing.

    python benchmarks/activations.py [CORE…] [--json]

Counted, not timed: the bytes of all that autograd saves in a forward pass in bf16 beside the parameters, every storage
once, in a model of four layers less those of one of two, per layer, token and unit of width. On the CPU, not compiled;
its attention stores no scores, as on a GPU.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
import torch
from cores import CORES, batch_of

from bert2bert.model import registry
from bert2bert.model.batch import Batch
from bert2bert.tables import table_for
from bert2bert.terminal.arguments import Parser

FEW, MANY = 2, 4  # layers
DOCUMENTS = [32] * 16  # so short that torch's CPU kernel packs none, which a processor without AVX-512 cannot


def saved_bytes(config: dict[str, Any], batch: Batch, recompute: bool) -> int:
    """Bytes that one forward pass keeps for its backward pass."""
    model = registry.build(config)
    model.to(torch.bfloat16).train()
    model.recompute = recompute
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(saved.values())


def measure(name: str) -> dict[str, float]:
    """Bytes per layer, token and unit of width: {"kept": …, "recomputed": …}."""
    config = {"model_type": name, **CORES[name][1]}
    table = table_for(config)
    rng = np.random.default_rng(0)
    batch = batch_of(DOCUMENTS, 512, registry.objective_of(config) == "masked", config["vocab_size"], rng)
    found = {}
    for kind, recompute in {"kept": False, "recomputed": True}.items():
        few, many = (saved_bytes(table.resize(config, {"layers": n}), batch, recompute) for n in (FEW, MANY))
        found[kind] = (many - few) / (MANY - FEW) / sum(DOCUMENTS) / table.axis_sizes(config)["embed"]
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cores", nargs="*", choices=[*CORES, []], metavar="CORE", help=f"of {', '.join(CORES)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    found = {name: measure(name) for name in options.cores or CORES}
    if options.json:
        print(json.dumps(found))
        return
    print("| core | bytes per layer, token and unit of width | with --activation_checkpointing |\n|---|---|---|")
    for name, result in found.items():
        print(f"| {name} | {result['kept']:.1f} | {result['recomputed']:.1f} |")


if __name__ == "__main__":
    main()
