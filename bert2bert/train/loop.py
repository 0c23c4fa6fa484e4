"""Pre-train: phases of optimizer steps, each under the layer program drawn for it, with evaluations and checkpoints.

Everything that decides a step (program, learning rate, rows, masks) is a pure function of the recipe and the step, so
a run continued from a checkpoint is the run that was never stopped. A signal (`stopping.SIGNALS`) to any rank ends the
run after the step under way, with a checkpoint. Refuses a loss or a gradient that is not finite: it stops, and no
checkpoint is written of it.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import MaskedLoader, eval_batches
from bert2bert.errors import InvalidConfig, UserError
from bert2bert.files.disk import disk_errors
from bert2bert.files.lock import Lock
from bert2bert.model.batch import IGNORE
from bert2bert.model.bert import Bert
from bert2bert.model.config import BertConfig
from bert2bert.model.flops import peak_flops, step_flops
from bert2bert.ranks import distributed, stopping
from bert2bert.ranks.rendezvous import Stopped
from bert2bert.recipe import Recipe
from bert2bert.recipe.programs import draw
from bert2bert.recipe.schedules import lr_at, peak_of
from bert2bert.train import engine as engines
from bert2bert.train import run_folder
from bert2bert.train.banner import banner, ending
from bert2bert.train.errors import explained
from bert2bert.train.evaluate import MASK_SEED, evaluate
from bert2bert.train.metrics import MetricsWriter
from bert2bert.train.position import Progress, start
from bert2bert.train.resume import Resumed, load
from bert2bert.train.rng import seed_all
from bert2bert.train.save import save, tag_of, versions


def train(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    output: Path,
    resume: Path | None = None,
    command: Sequence[str] | None = None,
    recipe_file: Path | None = None,
    quiet: bool = False,
    timeout: float = engines.TIMEOUT,
) -> dict[str, Any]:
    """Run the recipe into the folder ``output``; the ranks' environment must be set (bert2bert.ranks.launcher.set_up).

    ``resume``: a run folder (``output`` itself: the run goes on, or starts if no checkpoint is there yet), a tag's
    folder, a grown checkpoint, or a Hugging Face folder. ``command``: what run.json says started it (default sys.argv);
    ``recipe_file`` is copied into the folder; ``quiet``: print warnings only; ``timeout``: seconds that a rank waits
    for another, at the start and in a collective.
    Returns {"step", "loss" and "accuracy" (of the last evaluation on held-out text), "flops", "seconds", "tokens",
    "stopped" (the signal's name or None)}. Raises UserError for every mistake of the user.
    """
    output = Path(output)
    resume = None if resume is None else Path(resume)
    config = BertConfig.from_hf(recipe.model)
    bins = TokenBins.open(recipe.data.bins)
    if bins.vocab_size > config.vocab_size:
        raise InvalidConfig(
            f"the tokenizer of {bins.folder} has {bins.vocab_size} ids, the model's vocab_size is {config.vocab_size}; "
            f"set model.vocab_size to at least {bins.vocab_size}"
        )
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
            model = Bert(config, compile_layers=device.type == "cuda" and _stage(ds_config) < 3)
            engine = engines.build(recipe, ds_config, model)
            try:
                run = _Run(recipe, engine, config, bins, output, stop, lock, quiet)
                if resume is not None and source is None:
                    run.say(f"no checkpoint in {output} yet: the run starts")
                run.begin(ds_config, source, continued, command, recipe_file)
                with explained("between two steps", run.newest):
                    return run.go()
            finally:
                engine.destroy()


def _stage(ds_config: Mapping[str, Any]) -> int:
    return int((ds_config.get("zero_optimization") or {}).get("stage", 0))


def _not_begun(signal: str) -> dict[str, Any]:
    """Said, and returned by `train`, if a signal came before anything was done."""
    if os.environ["RANK"] == "0":
        print(f"stopped by {signal} before the first step. Run the same command again", file=sys.stderr, flush=True)
    return {"step": 0, "loss": None, "accuracy": None, "flops": 0.0, "seconds": 0.0, "tokens": 0, "stopped": signal}


class _Run:
    """One run's state: engine, data, position and what was spent."""

    def __init__(
        self,
        recipe: Recipe,
        engine: engines.Engine,
        config: BertConfig,
        bins: TokenBins,
        output: Path,
        stop: stopping.Stop,
        lock: Lock,
        quiet: bool,
    ) -> None:
        self.recipe, self.engine, self.config, self.bins = recipe, engine, config, bins
        self.output, self.stop, self.lock, self.quiet = output, stop, lock, quiet
        data = recipe.data
        self.loader = MaskedLoader(
            bins, "train", data.seq_len, engine.micro_rows, engine.rank, engine.world, recipe.seed, data.mlm_probability
        )
        self.held_out = eval_batches(
            bins, "heldout", data.seq_len, engine.micro_rows, data.eval_rows, engine.rank, engine.world, MASK_SEED,
            data.mlm_probability,
        )  # fmt: skip
        self.digests = {"digest": bins.digest, "tokenizer_digest": bins.tokenizer_digest}
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
        self.peak = None if name is None else peak_flops(name, engine.precision)
        self.step = 0
        self.spent = start().spent
        self.growth: dict[str, Any] | None = None
        self.saved = -1  # the step of the newest checkpoint
        self.loss: float | None = None
        self.result: dict[str, float] = {}

    def begin(
        self,
        ds_config: Mapping[str, Any],
        resume: Path | None,
        continued: bool,
        command: Sequence[str] | None,
        recipe_file: Path | None,
    ) -> None:
        """Load what is resumed from, and write the run folder's description."""
        engine, recipe = self.engine, self.recipe
        seed_all(recipe.seed, engine.rank)
        source = None
        if resume is not None:
            found = load(engine, resume, recipe, self.digests)
            self._take(found)
            spent = (found.growth or {}).get("source_spent") if found.kind != "train" else found.progress.spent
            source = {"path": str(resume), "kind": found.kind, "growth": found.growth, "spent": spent}
            self.say(f"resumed from {found.folder} ({found.kind}) at step {self.step} of {recipe.steps}")
            for note in found.notes:
                self.warn(f"  note: {note}")
        self.held_entropy = self.bins.meta["splits"]["heldout"].get("unigram_entropy")
        describe = partial(
            run_folder.describe, self.output, recipe, ds_config, model=self.config.to_hf(), world=engine.world,
            versions=versions(), data={**self.digests, "heldout_unigram_entropy": self.held_entropy}, command=command,
            source=source, continued=continued, step=self.step, bins=self.bins.folder, recipe_file=recipe_file,
        )  # fmt: skip
        distributed.write_on_first(self.output, describe)
        self.say(banner(recipe, engine, self.config, self.bins, self.output, self.step))

    def _take(self, found: Resumed) -> None:
        self.step, self.growth = found.progress.step, found.growth
        self.spent = dict(found.progress.spent)
        self.loader.load_state({"rows": found.progress.rows})
        if found.kind == "train" and found.folder.resolve().parent == self.output.resolve():
            self.saved = self.step

    def say(self, text: str) -> None:
        """Tell the user, on rank 0, unless there is to be quiet."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Tell the user, on rank 0."""
        if self.engine.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def go(self) -> dict[str, Any]:
        """Train to the recipe's end, or to the end of the step in which a signal came."""
        recipe = self.recipe
        rank, show = self.engine.rank, not self.quiet
        with MetricsWriter(self.output, rank, step=self.step, steps=recipe.steps, show=show) as metrics:
            stopped = self._asked()
            if self.step == 0 and not stopped:
                self._evaluate(metrics)
                stopped = self._asked()
            interval = _Interval(self.spent)
            while self.step < recipe.steps and not stopped:
                record, stopped = self._optimizer_step()
                phase, phase_step = record["phase"], record["phase_step"]
                steps = next(p.steps for p in recipe.phases if p.name == phase)
                metrics.advance(phase)
                if self.step % recipe.log_every == 0 or phase_step == steps or stopped:
                    metrics.write(record | interval.rates(self.spent, self.engine.world, self.peak))
                    interval = _Interval(self.spent)
                last = self.step == recipe.steps
                if self.step % recipe.eval_every == 0 or last:
                    self._evaluate(metrics)
                if self.step % recipe.checkpoint_every == 0 or last or stopped:
                    self._save()
        if self.step == recipe.steps:
            stopped = None  # it came too late: the run is complete
            if not self.result:
                self.say(f"the run in {self.output} is complete: step {self.step} of {recipe.steps}")
            else:
                at = self.output / tag_of(self.step)
                self.say(ending(recipe, self.step, self.spent, self.loss, self.result, at))
            distributed.write_on_first(self.output, lambda: run_folder.finish(self.output))
        elif self.saved == self.step:
            self.warn(
                f"stopped by {stopped} after step {self.step} of {recipe.steps}; checkpoint written. "
                f"Continue with --resume {self.output}"
            )
        else:
            self.warn(f"stopped by {stopped} before the first step. Run the same command again")
        spent = {key: self.spent[key] for key in ("flops", "seconds", "tokens")}
        held = {key: self.result.get(key) for key in ("loss", "accuracy")}
        return {"step": self.step, **held, **spent, "stopped": stopped}

    def _optimizer_step(self) -> tuple[dict[str, Any], str | None]:
        """One optimizer step; its 'train' record without the rates, and the signal that any rank got."""
        recipe, engine = self.recipe, self.engine
        began = time.perf_counter()
        index, phase_step = recipe.locate(self.step)
        phase = recipe.phases[index]
        program = draw(phase.program, self.step, recipe.seed, recipe.layers)
        lr = lr_at(phase.schedule, peak_of(phase.schedule, recipe.optimizer.lr), phase_step, phase.steps)
        engine.apply(program)
        engine.set_lr(lr)
        loss = torch.zeros((), device=engine.device)
        tokens = attended = predicted = 0
        with explained(f"in step {self.step + 1} (phase {phase.name!r})", self.newest):
            for _ in range(engine.accumulation):
                batch = next(self.loader)
                tokens += batch.real_tokens
                attended += batch.attended
                predicted += int((batch.labels != IGNORE).sum())
                micro_loss, _, _ = engine.forward(batch.to(engine.device, non_blocking=True), program)
                engine.backward(micro_loss)
                loss += micro_loss.detach().float()
        local = [float(loss) / engine.accumulation / engine.world, tokens, attended, predicted]
        mean, *totals = engine.sum([*local, float(self.lock.lost), *stopping.asked(self.stop)])
        tokens, attended, predicted = (int(total) for total in totals[:3])
        if totals[3]:
            distributed.write_on_first(self.output, self.lock.check)
        stopped = stopping.answer(totals[4:])
        self.spent["flops"] += step_flops(self.config, tokens, attended, predicted, program)
        self.spent["tokens"] += tokens
        self.spent["steps"] += 1
        self.spent["seconds"] += time.perf_counter() - began
        self._check_finite(mean, phase.name)
        self.step, self.loss = self.step + 1, mean
        record = {
            "kind": "train", "step": self.step, "phase": phase.name, "phase_step": phase_step + 1, "loss": mean,
            "lr": lr, "grad_norm": engine.grad_norm, "tokens": self.spent["tokens"], "flops": self.spent["flops"],
            "seconds": self.spent["seconds"], "layers_run": len(program.run), "layers_learning": len(program.learn),
            "loss_scale": engine.loss_scale, "skipped_steps": engine.counters["skipped_steps"],
        }  # fmt: skip
        return record, stopped

    def _asked(self) -> str | None:
        """The signal that any rank got, if any. Collective."""
        return stopping.answer(self.engine.sum(stopping.asked(self.stop)))

    def _check_finite(self, loss: float, phase: str) -> None:
        """fp16 has its loss scale to recover with; in fp32 and bf16 what is not finite stays so."""
        norm = self.engine.grad_norm
        sound = math.isfinite(loss) and (norm is None or (math.isfinite(norm) and norm >= 0))
        if sound or self.engine.precision == "fp16":
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm} (loss {loss:.4g})"
        raise UserError(
            f"{what} in step {self.step + 1} (phase {phase!r}): training diverged. Lower the learning rate, lengthen "
            f"the warm-up, or set gradient_clipping. {self.newest()}"
        )

    def newest(self) -> str:
        """What an end in between leaves to go on from."""
        if self.saved < 0:
            return "No checkpoint was written yet; the same command starts again"
        return f"The newest checkpoint is of step {self.saved}; continue with --resume {self.output}"

    def _evaluate(self, metrics: MetricsWriter) -> None:
        with explained(f"in the evaluation after step {self.step}", self.newest):
            self.result = evaluate(self.engine, self.held_out)
        done = max(self.step - 1, 0)
        phase = self.recipe.phases[self.recipe.locate(done)[0]].name
        spent = {key: self.spent[key] for key in ("tokens", "flops", "seconds")}
        metrics.write({"kind": "eval", "step": self.step, "phase": phase, **self.result, **spent})

    def _save(self) -> None:
        if self.saved == self.step:
            return
        recipe = self.recipe
        last = len(recipe.phases) - 1
        at = recipe.locate(self.step) if self.step < recipe.steps else (last, recipe.phases[last].steps)
        progress = Progress(self.step, *at, rows=self.loader.state()["rows"], spent=self.spent)
        save(
            self.engine, self.output, progress, model=self.config.to_hf(), aliases=self.config.aliases,
            recipe=recipe.to_dict(), data=self.digests, growth=self.growth, keep=recipe.keep_checkpoints,
            check=self.lock.check,
        )  # fmt: skip
        self.saved = self.step


class _Interval:
    """Speed since the last record."""

    def __init__(self, spent: Mapping[str, float]) -> None:
        self.start = dict(spent)

    def rates(self, spent: Mapping[str, float], world: int, peak: float | None) -> dict[str, float | None]:
        """tokens_per_s over all ranks, and mfu (None where the peak is not known)."""
        tokens, flops, seconds = (spent[key] - self.start[key] for key in ("tokens", "flops", "seconds"))
        seconds = max(seconds, 1e-9)
        return {"tokens_per_s": tokens / seconds, "mfu": None if peak is None else flops / seconds / (peak * world)}
