"""What a run says of itself when it starts, and when it ends: a few lines for the top and the foot of a job's log."""

from __future__ import annotations

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader
from bert2bert.recipe import Recipe

if TYPE_CHECKING:
    from bert2bert.train.engine import Engine


def banner(recipe: Recipe, engine: Engine, bins: TokenBins, loader: Loader, output: Path, step: int) -> str:
    """What is trained on what, by how many, at which sizes, and where it can be watched. step: where the run starts."""
    model = engine.model
    count = sum(prod(engine.shape(name)) for name in engine.names)
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    rows, length = recipe.global_batch_size, recipe.data.seq_len
    ranks = f"{engine.world} rank{'s' * (engine.world > 1)}"
    phases = ", ".join(f"{phase.name} {phase.steps:,}" for phase in recipe.phases if phase.steps)
    train, predicted = bins.meta["splits"]["train"], asdict(recipe.predicts)
    lines = {
        "model": f"{model.name}, {len(model.layers)} layers x {model.width}, {count:,} parameters",
        "run": f"{recipe.name}: {recipe.steps:,} steps ({phases})" + (f", from step {step:,} on" if step else ""),
        "data": f"{bins.folder}: {train['tokens']:,} tokens to train on",
        "packing": f"{loader.rows_per_epoch:,} rows an epoch, {loader.fill:.1%} of their slots filled; "
        f"{loader.cut:.1%} of {train['documents']:,} documents are cut",
        "predicts": ", ".join([predicted.pop("kind"), *(f"{key} {value:g}" for key, value in predicted.items())]),
        "ranks": f"{ranks} on {device}, {engine.precision}, ZeRO stage {engine.stage}",
        "batch": f"{engine.micro_rows} rows a micro-batch x {engine.accumulation} accumulated x {ranks} = {rows} rows "
        f"({rows * length:,} token slots) a step",
        "folder": f"{output}; watch it with: tensorboard --logdir {output / 'tensorboard'}",
    }
    return "\n".join(f"{key:8} {text}" for key, text in lines.items())


def ending(
    recipe: Recipe, step: int, spent: dict[str, float], loss: float | None, held: dict[str, Any], at: Path
) -> str:
    """How a run ended. spent: in all, by the run's own clock; loss: the last step's, None where this process made no
    step; held: the last evaluation; at: the newest checkpoint."""
    seconds = round(spent["seconds"])
    time = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    losses = [f"loss {loss:.4f}"] if loss is not None else []
    losses += [f"held-out loss {held['loss']:.4f}, accuracy {held['accuracy']:.4f}"] if held else []
    return (
        f"{'finished':8} step {step:,} of {recipe.steps:,}: {spent['tokens']:,.0f} tokens and {spent['flops']:.3g} "
        f"FLOPs in {time} of training; {'; '.join([*losses, f'checkpoint {at}'])}"
    )
