"""The training loop: phases of optimizer steps, with evaluations and checkpoints.

Everything that decides a step (program, learning rate, rows, masks) is a pure function of the recipe and the step, so
a run continued from a checkpoint is the run that was never stopped. A signal (`stopping.SIGNALS`) to any rank ends the
run after the step under way, with a checkpoint. A step whose loss or gradient is not finite is not applied; whether the
run then stops, the recipe's `Safety` says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bert2bert.checkpoints.facts import versions
from bert2bert.checkpoints.manifest import Grown
from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader, eval_batches
from bert2bert.files.lock import Lock
from bert2bert.ranks import distributed, stopping
from bert2bert.recipe import Recipe
from bert2bert.recipe.programs import draw
from bert2bert.recipe.schedules import lr_at
from bert2bert.tables.flops import Flops
from bert2bert.train import engine as engines
from bert2bert.train import run_folder
from bert2bert.train.banner import banner, ending
from bert2bert.train.compute import peak_flops, step_flops
from bert2bert.train.errors import explained
from bert2bert.train.evaluate import EVALUATION_SEED, evaluate
from bert2bert.train.metrics import Interval, MetricsWriter
from bert2bert.train.position import Progress, start
from bert2bert.train.resume import Resumed, load
from bert2bert.train.rng import seed_all
from bert2bert.train.safety import Watch
from bert2bert.train.save import save, tag_of


class Loop:
    """The state of one run: engine, data, position and what was spent. Every rank makes the same calls in order."""

    def __init__(
        self,
        recipe: Recipe,
        engine: engines.Engine,
        bins: TokenBins,
        output: Path,
        stop: stopping.Stop,
        lock: Lock,
        quiet: bool,
    ) -> None:
        self.recipe, self.engine, self.bins = recipe, engine, bins
        self.output, self.stop, self.lock, self.quiet = output, stop, lock, quiet
        data = recipe.data
        self.loader = Loader(
            bins, "train", recipe.predicts, data.seq_len, engine.micro_rows, engine.rank, engine.world, recipe.seed
        )
        self.held_out = eval_batches(
            bins, "heldout", recipe.predicts, data.seq_len, engine.micro_rows, data.eval_rows, engine.rank,
            engine.world, EVALUATION_SEED,
        )  # fmt: skip
        self.digests = {"digest": bins.digest, "tokenizer_digest": bins.tokenizer_digest}
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
        self.peak = None if name is None else peak_flops(name, engine.precision)
        self.flops = Flops(engine.model.hf_config, engine.model.heads)
        self.step = 0
        self.spent = start().spent
        self.growth: Grown | None = None
        self.watch = Watch(recipe.safety)
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
            growth = found.growth.to_json() if found.growth else None
            spent = (growth or {}).get("source_spent") if found.kind != "train" else found.progress.spent
            source = {"path": str(resume), "kind": found.kind, "growth": growth, "spent": spent}
            self.say(f"resumed from {found.folder} ({found.kind}) at step {self.step} of {recipe.steps}")
            for note in found.notes:
                self.warn(f"  note: {note}")
        self.held_entropy = self.bins.meta["splits"]["heldout"].get("unigram_entropy")
        describe = partial(
            run_folder.describe, self.output, recipe, ds_config, model=engine.model.hf_config, world=engine.world,
            versions=versions("deepspeed"), data={**self.digests, "heldout_unigram_entropy": self.held_entropy},
            command=command, source=source, continued=continued, step=self.step, bins=self.bins.folder,
            recipe_file=recipe_file,
        )  # fmt: skip
        distributed.write_on_first(self.output, describe)
        self.say(banner(recipe, engine, self.bins, self.loader, self.output, self.step))

    def _take(self, found: Resumed) -> None:
        self.step, self.growth = found.progress.step, found.growth
        self.spent = dict(found.progress.spent)
        self.loader.load_state({"rows": found.progress.rows})
        if found.kind == "train" and found.folder.resolve().parent == self.output.resolve():
            self.saved = self.step

    def say(self, text: str) -> None:
        """Print on rank 0, unless only warnings are to be printed."""
        if not self.quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Print on rank 0."""
        if self.engine.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def run(self) -> dict[str, Any]:
        """Train to the recipe's end, or to the end of the step in which a signal came."""
        recipe = self.recipe
        rank, show = self.engine.rank, not self.quiet
        with MetricsWriter(self.output, rank, step=self.step, steps=recipe.steps, show=show) as metrics:
            stopped = self._asked()
            if self.step == 0 and not stopped:
                self._evaluate(metrics)
                stopped = self._asked()
            interval = Interval(self.spent)
            while self.step < recipe.steps and not stopped:
                record, stopped = self._optimizer_step()
                phase, phase_step = record["phase"], record["phase_step"]
                steps = next(p.steps for p in recipe.phases if p.name == phase)
                metrics.advance(phase)
                if self.step % recipe.log_every == 0 or phase_step == steps or stopped:
                    metrics.write(record | interval.rates(self.spent, self.engine.world, self.peak))
                    interval = Interval(self.spent)
                last = self.step == recipe.steps
                if self.step % recipe.eval_every == 0 or last:
                    self._evaluate(metrics)
                if self.step % recipe.checkpoint_every == 0 or last or stopped:
                    self._save()
        return self._end(stopped)

    def _end(self, stopped: str | None) -> dict[str, Any]:
        """Print how the run ended; the result of `train`. stopped: the signal that ended it, if one did."""
        recipe = self.recipe
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
        lr = lr_at(phase.schedule, recipe.optimizer.lr, phase_step, phase.steps, self.step, recipe.steps)
        engine.apply(program)
        engine.set_lr(lr)
        loss = torch.zeros((), device=engine.device)
        tokens = flops = 0
        with explained(f"in step {self.step + 1} (phase {phase.name!r})", self.newest):
            for _ in range(engine.accumulation):
                batch = next(self.loader)
                tokens += batch.real_tokens
                flops += step_flops(self.flops, batch, program)
                micro_loss, _, _ = engine.forward(batch.to(engine.device, non_blocking=True), program)
                engine.backward(micro_loss)
                loss += micro_loss.detach().float()
        local = [float(loss) / engine.accumulation / engine.world, tokens, flops]
        mean, *totals = engine.sum([*local, float(self.lock.lost), *stopping.asked(self.stop)])
        if totals[2]:
            distributed.write_on_first(self.output, self.lock.check)
        stopped = stopping.answer(totals[3:])
        self.spent["tokens"] += int(totals[0])
        self.spent["flops"] += totals[1]
        self.spent["steps"] += 1
        self.spent["seconds"] += time.perf_counter() - began
        where = f"step {self.step + 1} (phase {phase.name!r})"
        if skipped := self.watch.after(not engine.diverged, mean, engine.grad_norm, where, self.newest):
            self.warn(skipped)
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

    def newest(self) -> str:
        """A sentence: which checkpoint is the newest, and how to continue from it."""
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
            self.engine, self.output, progress, model=self.engine.model.hf_config, aliases=self.engine.model.aliases,
            recipe=recipe.to_dict(), data=self.digests, growth=self.growth, keep=recipe.keep_checkpoints,
            check=self.lock.check,
        )  # fmt: skip
        self.saved = self.step
