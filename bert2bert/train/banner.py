"""What a run says of itself when it starts, and when it ends: a few lines for the top and the foot of a job's log."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from bert2bert.ranks.distributed import write_on_first
from bert2bert.recipe import Phase
from bert2bert.train import run_folder
from bert2bert.train.position import Position

if TYPE_CHECKING:
    from bert2bert.train.job import Job
    from bert2bert.train.loop import Loop


def banner(job: Job, loop: Loop) -> str:
    """What is trained on what, by how many, at which sizes, and where it can be watched."""
    recipe, engine, bins, loader = job.recipe, loop.engine, job.bins, loop.loader
    model, step = engine.model, loop.position.step
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    own = recipe.at(loop.position.phase)
    rows, length = own.global_batch_size, own.data.seq_len
    ranks = f"{engine.world} rank{'s' * (engine.world > 1)}"
    phases = ", ".join(_phase(phase) for phase in recipe.phases if phase.steps != 0 or phase.grow)
    total = "" if recipe.steps is None else f"{recipe.steps:,} steps "
    train, predicted = bins.meta["splits"]["train"], asdict(own.predicts)
    lines = {
        "model": f"{model.name}, {len(model.layers)} layer{'s' * (len(model.layers) != 1)} x {model.width}, "
        f"{engine.numel:,} parameters",
        "run": f"{recipe.name}: {total}({phases})" + (f", from step {step:,} on" if step else ""),
        "data": f"{bins.folder}: {train['tokens']:,} tokens to train on",
        "packing": f"{loader.rows_per_epoch:,} rows an epoch, {loader.fill:.1%} of their slots filled; "
        f"{loader.cut:.1%} of {train['documents']:,} documents are cut",
        "predicts": ", ".join([predicted.pop("kind"), *(f"{key} {value:g}" for key, value in predicted.items())]),
        "ranks": f"{ranks} on {device}, {engine.precision}, ZeRO stage {engine.stage}",
        "batch": f"{engine.micro_rows} rows a micro-batch x {engine.accumulation} accumulated x {ranks} = {rows} rows "
        f"({rows * length:,} token slots) a step",
        **job.nodes,
        "folder": f"{job.output}"
        + "".join(
            f"; watch it with: tensorboard --logdir {job.output / name}" if name == "tensorboard" else f"; {name}"
            for name in job.report
        ),
    }
    return "\n".join(f"{key:8} {text}" for key, text in lines.items())


def _phase(phase: Phase) -> str:
    """A phase in a few words."""
    until = None if phase.until is None else f"until {phase.until.kind}"
    length = " or ".join(filter(None, ("" if phase.steps is None else f"{phase.steps:,}", until)))
    return f"{'growth, ' if phase.grow else ''}{phase.name} {length}"


def ending(job: Job, loop: Loop, stopped: str | None) -> dict[str, Any]:
    """Print how the run ended, note it in the run's folder; the result of `train`. stopped: the signal that ended it,
    if one did."""
    position, steps = loop.position, job.recipe.steps
    of = "" if steps is None else f" of {steps:,}"
    if loop.complete:
        stopped = None  # it came too late: the run is complete
        if not job.result:
            job.say(f"the run in {job.output} is complete: step {position.step}{of}")
        else:
            job.say(_finished(job, position, of))
        write_on_first(job.output, lambda: run_folder.finish(job.output))
    elif not stopped:
        write_on_first(
            job.output, partial(run_folder.ended, job.output, "paused", f"--until {job.until}", position.step)
        )
        job.say(
            f"phase {job.until!r} is over at step {position.step}{of}; the checkpoint is {job.at}. "
            f"Continue with --resume {job.output}"
        )
    elif job.saved == position.step:
        write_on_first(job.output, partial(run_folder.ended, job.output, "stopped", stopped, position.step))
        job.warn(
            f"stopped by {stopped} after step {position.step}{of}; checkpoint written. Continue with --resume "
            f"{job.output}"
        )
    else:
        write_on_first(job.output, partial(run_folder.ended, job.output, "stopped", stopped, position.step))
        job.warn(f"stopped by {stopped} before the first step. Run the same command again")
    return result(job, position, stopped)


def result(job: Job, position: Position, stopped: str | None) -> dict[str, Any]:
    """The result of `train`."""
    spent = {key: position.spent[key] for key in ("flops", "seconds", "tokens")}
    held = {key: (job.result or {}).get(key) for key in ("loss", "accuracy")}
    return {"step": position.step, **held, **spent, "stopped": stopped}


def _finished(job: Job, position: Position, of: str) -> str:
    """How a complete run ended: what it spent by its own clock, the losses, the checkpoint."""
    spent, held = position.spent, job.result or {}
    seconds = round(spent["seconds"])
    time = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    losses = [f"loss {job.loss:.4f}"] if job.loss is not None else []
    losses += [f"held-out loss {held['loss']:.4f}, accuracy {held['accuracy']:.4f}"]
    return (
        f"{'finished':8} step {position.step:,}{of}: {spent['tokens']:,.0f} tokens and {spent['flops']:.3g} "
        f"FLOPs in {time} of training; {'; '.join([*losses, f'checkpoint {job.at}'])}"
    )
