"""Pre-train: a recipe run into a folder, from random weights or from any checkpoint.

Sets up what a run needs on every rank (process group, folder and its lock, model, engine) and hands over to the `loop`.
Refuses (InvalidConfig) a tokenizer with more ids than the model, or without what the objective needs, and what
`run_folder`, `resume` and `engine` refuse.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.open import open_source
from bert2bert.data import objective
from bert2bert.data.bins import TokenBins
from bert2bert.errors import InvalidConfig
from bert2bert.files.disk import disk_errors
from bert2bert.model import registry
from bert2bert.ranks import distributed, stopping
from bert2bert.ranks.rendezvous import Stopped
from bert2bert.recipe import Recipe, model_keys
from bert2bert.tables import table_for
from bert2bert.train import engine as engines
from bert2bert.train import run_folder, sharded
from bert2bert.train.errors import explained
from bert2bert.train.loop import Loop
from bert2bert.train.save import whole


def train(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    output: Path,
    resume: Path | None = None,
    command: Sequence[str] | None = None,
    recipe_file: Path | None = None,
    quiet: bool = False,
    timeout: float = engines.TIMEOUT,
    activation_checkpointing: bool = False,
) -> dict[str, Any]:
    """Run the recipe into the folder ``output``; the ranks' environment must be set (bert2bert.ranks.launcher.set_up).

    ``resume``: a run folder (``output`` itself: the run goes on, or starts if no checkpoint is there yet), a tag's
    folder, a grown checkpoint, or a Hugging Face folder. ``command``: what run.json says started it (default sys.argv);
    ``recipe_file`` is copied into the folder; ``quiet``: print warnings only; ``timeout``: seconds that a rank waits
    for another, at the start and in a collective; ``activation_checkpointing``: learning blocks keep their input alone
    for the backward pass, which computes the rest again.
    Returns {"step", "loss" and "accuracy" (of the last evaluation on held-out text), "flops", "seconds", "tokens",
    "stopped" (the signal's name or None)}. Raises UserError for every mistake of the user.
    """
    output = Path(output)
    resume = None if resume is None else Path(resume)
    if recipe.model is None:
        recipe = replace(recipe, model=_model_of(resume))
    model_config = registry.typed(recipe.model or {})
    vocab_size = table_for(model_config).axis_sizes(model_config)["vocab"]
    bins = TokenBins.open(recipe.data.bins)
    if bins.vocab_size > vocab_size:
        raise InvalidConfig(
            f"the tokenizer of {bins.folder} has {bins.vocab_size} ids, the model's vocab_size is {vocab_size}; "
            f"set model.vocab_size to at least {bins.vocab_size}"
        )
    objective.check_run(recipe.predicts, bins.vocabulary, recipe.data.seq_len, model_config)
    run_folder.check_folder(output)
    begun = "No step was made; run the same command again"
    with stopping.held() as stop, disk_errors(output), explained("before the first step", lambda: begun):
        try:
            device = engines.start(timeout, stop)
        except Stopped as stopped:
            return _not_begun(str(stopped))
        if name := stopping.answer(distributed.total(stopping.asked(stop), device)):
            return _not_begun(name)
        with run_folder.locked(output) as lock:
            continued, source = distributed.write_on_first(output, lambda: run_folder.claim(output, resume))
            torch.manual_seed(recipe.seed)  # the same fresh weights on every rank
            compiled = device.type == "cuda" and _stage(ds_config) < 3
            opened = sharded.opened(recipe, ds_config)
            model = registry.build(model_config, compile_layers=compiled, opened=opened)
            model.recompute = activation_checkpointing
            engine = engines.build(recipe, ds_config, model)
            try:
                loop = Loop(recipe, engine, bins, output, stop, lock, quiet)
                if resume is not None and source is None:
                    loop.say(f"no checkpoint in {output} yet: the run starts")
                loop.begin(ds_config, source, continued, command, recipe_file)
                with explained("between two steps", loop.newest):
                    return loop.run()
            finally:
                engine.destroy()


def _model_of(resume: Path | None) -> dict[str, Any]:
    """The config of the checkpoint that a run starts from, as far as it says what the model computes. Raises
    InvalidConfig where there is none."""
    if resume is None:
        raise InvalidConfig(
            "the recipe has no model (model=None takes that of a checkpoint), and there is no checkpoint to take it "
            "from; give one with --resume, or write the model's config into the recipe"
        )
    newest = whole(resume) if resume.is_dir() and not os.path.lexists(resume / "latest") else None
    config = open_source(newest or resume).config
    if config is None:
        raise InvalidConfig(
            f"{resume}: no config says which model this is, and the recipe has none either. Put the model's "
            "config.json into the folder"
        )
    known = model_keys(registry.typed(config))
    return {key: value for key, value in config.items() if key in known}


def _stage(ds_config: Mapping[str, Any]) -> int:
    return int((ds_config.get("zero_optimization") or {}).get("stage", 0))


def _not_begun(signal: str) -> dict[str, Any]:
    """Print that a signal came before anything was done; the result of `train` in that case."""
    if os.environ["RANK"] == "0":
        print(f"stopped by {signal} before the first step. Run the same command again", file=sys.stderr, flush=True)
    return {"step": 0, "loss": None, "accuracy": None, "flops": 0.0, "seconds": 0.0, "tokens": 0, "stopped": signal}
