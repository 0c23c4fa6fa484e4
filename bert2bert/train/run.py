"""Pre-train: a recipe run into a folder, from random weights or from any checkpoint.

Sets up what a run needs on every rank (process group, folder and its lock, model, engine) and hands over to the `loop`.
Refuses (InvalidConfig) a tokenizer with more ids than the model, or without what the objective needs, and what
`run_folder`, `resume` and `engine` refuse.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.facts import versions
from bert2bert.data import objective
from bert2bert.data.bins import TokenBins
from bert2bert.errors import InvalidConfig, UserError, did_you_mean
from bert2bert.files.disk import disk_errors
from bert2bert.model import registry
from bert2bert.ranks import distributed, heartbeat, stopping
from bert2bert.ranks.comm import together
from bert2bert.ranks.rendezvous import Stopped
from bert2bert.recipe import Recipe
from bert2bert.tables import table_for
from bert2bert.train import ds_config as configs
from bert2bert.train import engine as engines
from bert2bert.train import nodes, room, run_folder, sharded
from bert2bert.train.banner import banner, ending, result
from bert2bert.train.errors import explained
from bert2bert.train.growing import Grow, grown, layout
from bert2bert.train.job import Job
from bert2bert.train.loop import Loop
from bert2bert.train.metrics import MetricsWriter
from bert2bert.train.model_of import model_of
from bert2bert.train.obeying import factors_of, without_factors
from bert2bert.train.position import NEVER, Position
from bert2bert.train.restart import AUTO, newest_undamaged
from bert2bert.train.resume import Found, find, load
from bert2bert.train.rng import seed_all
from bert2bert.train.save import whole


def train(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    output: Path,
    resume: Path | str | None = None,
    command: Sequence[str] | None = None,
    recipe_file: Path | None = None,
    quiet: bool = False,
    timeout: float = engines.TIMEOUT,
    activation_checkpointing: bool = False,
    until: str | None = None,
    grow: Grow | None = None,
    start: Path | None = None,
    report: Sequence[str] = ("tensorboard",),
) -> dict[str, Any]:
    """Run the recipe into the folder ``output``; the ranks' environment must be set (bert2bert.ranks.launcher.set_up).

    ``resume``: a run folder (``output`` itself: the run goes on, or starts if no checkpoint is there yet), a tag's
    folder, a grown checkpoint, or a Hugging Face folder; "auto": the newest undamaged checkpoint in ``output``, else
    ``start``, if that is given. ``command``: what run.json says started it (default sys.argv);
    ``recipe_file`` is copied into the folder; ``quiet``: print warnings only; ``timeout``: seconds that a rank waits
    for another, at the start and in a collective; ``activation_checkpointing``: learning blocks keep their input alone
    for the backward pass, which computes the rest again; ``until``: the name of the phase after which to pause;
    ``grow``: how a checkpoint grows between two phases; ``report``: where numbers go, names of `reporters`.
    Returns {"step", "loss" and "accuracy" (of the last evaluation on held-out text), "flops", "seconds", "tokens",
    "stopped" (the signal's name or None)}. Raises UserError for every mistake of the user.
    """
    output = Path(output)
    auto = resume == AUTO
    resume = None if resume is None or auto else Path(resume)
    begins = _begins(output, start) if auto else resume
    if recipe.model is None:
        recipe = replace(recipe, model=model_of(begins, recipe))
    bins = TokenBins.open(recipe.data.bins)
    check(recipe, bins, begins, until)
    run_folder.check_folder(output)
    early = partial(explained, "before the first step", lambda: "No step was made; run the same command again")
    with stopping.held() as stop, disk_errors(output), early():
        try:
            device = engines.start(timeout, stop)
        except Stopped as stopped:
            return _not_begun(str(stopped))
        if name := stopping.answer(distributed.total(stopping.asked(stop), device)):
            return _not_begun(name)
        with heartbeat.watched(distributed.RANKS, timeout), early(), run_folder.locked(output) as lock:
            job = Job(recipe, bins, output, stop, lock, quiet, until, report)
            job.nodes = nodes.check(recipe, ds_config, job.data, begins, output, device)
            wanted = (newest_undamaged(job) or start) if auto else resume
            continued, source = distributed.write_on_first(output, lambda: run_folder.claim(output, wanted))
            if resume is not None and source is None:
                job.say(f"no checkpoint in {output} yet: the run starts")
            found = None if source is None else find(source, recipe, job.data, continued)
            run = _Run(job, dict(ds_config), found, grow, activation_checkpointing)
            describe = partial(
                run_folder.describe, output, recipe, ds_config, world=distributed.RANKS.size,
                versions=versions("deepspeed"), command=command, source=run.source(source), continued=continued,
                step=run.position.step, bins=bins.folder, recipe_file=recipe_file,
                data={**job.data, "heldout_unigram_entropy": bins.meta["splits"]["heldout"].get("unigram_entropy")},
            )  # fmt: skip
            return run.go(describe)


def _begins(output: Path, start: Path | None) -> Path | None:
    """What a run that is started again by itself begins with, as far as a look at its folder tells."""
    newest = whole(output) if output.is_dir() else None
    return newest or start


def check(recipe: Recipe, bins: TokenBins, resume: Path | None, until: str | None) -> None:
    """Raise InvalidConfig for what can be known to fail before anything is started. The recipe knows its model."""
    for model in recipe.models:
        vocab_size = table_for(registry.typed(model)).axis_sizes(model)["vocab"]
        if bins.vocab_size > vocab_size:
            raise InvalidConfig(
                f"the tokenizer of {bins.folder} has {bins.vocab_size} ids, the model's vocab_size is {vocab_size}; "
                f"set model.vocab_size to at least {bins.vocab_size}"
            )
    for i, model in enumerate(recipe.models):
        own = recipe.at(i)
        objective.check_run(own.predicts, bins.vocabulary, own.data.seq_len, registry.typed(model))
    names = [phase.name for phase in recipe.phases]
    if until is not None and until not in names:
        raise InvalidConfig(f"--until is {until!r}: " + did_you_mean(until, names))
    if recipe.begins_with_growth and resume is None:
        raise InvalidConfig("the recipe begins with a growth; give the checkpoint that grows with --resume")


class _Run:
    """A run over its engines, one after the other."""

    def __init__(
        self, job: Job, ds_config: dict[str, Any], found: Found | None, grow: Grow | None, recompute: bool
    ) -> None:
        self.job, self.ds_config, self.found, self.grow, self.recompute = job, ds_config, found, grow, recompute
        self.position = Position() if found is None else found.position
        self.position = self.position.settled(job.recipe, NEVER)
        self.grown = found is not None and found.kind == "growth" and not self.position.phase_step
        if found is not None:
            job.at = found.folder
            if found.kind == "train" and found.folder.resolve().parent == job.output.resolve():
                job.saved = self.position.step

    def source(self, path: Path | None) -> dict[str, Any] | None:
        """What run.json says of the checkpoint that the run begins with."""
        if self.found is None:
            return None
        growth, kind = self.found.growth, self.found.kind
        about = growth.to_json() if growth else None
        spent = (about or {}).get("source_spent") if kind != "train" else dict(self.position.spent)
        return {"path": str(path), "kind": kind, "growth": about, "spent": spent}

    def go(self, describe: Callable[..., None]) -> dict[str, Any]:
        """Train, grow, train on; the result of `train`. describe: writes the run folder's description of a model."""
        heartbeat.at_end(lambda why: self._failed(UserError(why)))
        try:
            return self._go(describe)
        except Exception as error:
            self._failed(error)
            raise

    def _go(self, describe: Callable[..., None]) -> dict[str, Any]:
        job = self.job
        if job.until in [phase.name for phase in job.recipe.phases[: self.position.phase]]:
            job.warn(f"phase {job.until!r} is over already: step {self.position.step}")
            return result(job, self.position, None)
        loop = None
        with ExitStack() as stack:
            while True:
                self._grow()
                engine = self._engine()
                try:
                    loop, first = self._loop(engine), loop is None
                    if first:
                        distributed.write_on_first(job.output, partial(describe, model=engine.model.hf_config))
                        job.say(banner(job, loop))
                        for note in room.notes(loop.engine, job.recipe, job.output, loop.position.step):
                            job.warn(f"  note: {note}")
                        job.metrics = stack.enter_context(together(distributed.RANKS, self._metrics))
                    loop.metrics = job.metrics
                    with explained("between two steps", job.newest):
                        stopped = loop.run()
                finally:
                    engine.destroy()
                self.position, self.grown = loop.position, False
                if stopped or loop.paused or not loop.served_out or job.at is None:
                    break
                self.found = find(job.at, job.recipe, job.data, True)
        return ending(job, loop, stopped)

    def _failed(self, error: Exception) -> None:
        """Note in run.json what ended the run, on rank 0, as far as that can be done without the others."""
        if distributed.RANKS.rank == 0 and not self.job.lock.lost:
            what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with suppress(OSError, UserError):
                run_folder.ended(self.job.output, "failed", what, self.position.step)

    def _metrics(self) -> MetricsWriter:
        job, at = self.job, self.position
        return MetricsWriter(  # what was measured right after a growth will be measured again
            job.output, distributed.RANKS.rank, step=at.step, growths=at.growths - self.grown, steps=job.recipe.steps,
            show=not job.quiet, report=job.report, name=job.recipe.name,
            config={"recipe": job.recipe.to_dict(), "ds_config": self.ds_config, "ranks": distributed.RANKS.size},
        )  # fmt: skip

    def _grow(self) -> None:
        """Let the model grow as often as the recipe says before the next step."""
        job = self.job
        while self.position.pending(job.recipe):
            index = self.position.phase
            name = job.recipe.phases[index].name
            settings = configs.of_phase(self.ds_config, job.recipe, index, distributed.RANKS.size)
            job.say(f"growing before phase {name!r} from {job.at}")
            with explained(f"in the growth before phase {name!r}", job.newest):
                folder, seconds = grown(job.recipe, self.position, self.grow, job.output, job.at, layout(settings))
            self.found = find(folder, job.recipe, job.data, True)
            self.position = replace(self.position, growths=self.position.growths + 1)
            entry = {"phase": name, "step": self.position.step, "seconds": seconds}
            distributed.write_on_first(
                job.output, partial(run_folder.grew, job.output, job.recipe.models[index], entry)
            )
            job.at, self.grown = folder, True
            self.position = self.position.settled(job.recipe, NEVER)

    def _engine(self) -> engines.Engine:
        """The engine of the phase, with fresh weights. Raises InvalidConfig for a schedule that needs a growth."""
        recipe = self.job.recipe.at(self.position.phase)
        settings = configs.of_phase(self.ds_config, self.job.recipe, self.position.phase, distributed.RANKS.size)
        torch.manual_seed(recipe.seed)  # the same fresh weights on every rank
        compiled = torch.cuda.is_available() and configs.stage(settings) < 3
        opened = sharded.opened(recipe, settings)
        model = registry.build(registry.typed(recipe.model or {}), compile_layers=compiled, opened=opened)
        model.recompute = self.recompute
        names = [name for name, _ in model.named_parameters()]
        self.found = None if self.found is None else self.found.of(names)
        growth = None if self.found is None else self.found.growth
        factors = factors_of(self.job.recipe, self.position.phase, growth, names)
        if factors is not None and (note := without_factors(growth, names)):
            self.job.warn(f"  note: {note}")
        return engines.build(recipe, settings, model, factors, growth.inserted if growth else ())

    def _loop(self, engine: engines.Engine) -> Loop:
        """The loop of the phase on its engine, with the weights of where the run stands."""
        job, recipe = self.job, self.job.recipe
        seed_all(recipe.seed, engine.rank)
        growth = None
        if self.found is not None:
            found = self.found
            notes = [*found.notes, *load(engine, found, recipe.at(self.position.phase), self.position)]
            growth = None if found.growth is None else replace(found.growth, source_training=None)
            steps = "" if recipe.steps is None else f" of {recipe.steps}"
            job.say(f"resumed from {found.folder} ({found.kind}) at step {self.position.step}{steps}")
            for note in notes:
                job.warn(f"  note: {note}")
        return Loop(job, engine, self.position, growth, self.grown)


def _not_begun(signal: str) -> dict[str, Any]:
    """Print that a signal came before anything was done; the result of `train` in that case."""
    if os.environ["RANK"] == "0":
        print(f"stopped by {signal} before the first step. Run the same command again", file=sys.stderr, flush=True)
    return {"step": 0, "loss": None, "accuracy": None, "flops": 0.0, "seconds": 0.0, "tokens": 0, "stopped": signal}
