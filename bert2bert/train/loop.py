"""The training loop on one engine: optimizer steps of the phases that it serves, with evaluations and checkpoints.

Everything that decides a step (program, learning rate, rows, masks) is a pure function of the recipe and the position,
so a run continued from a checkpoint is the run that was never stopped. A signal (`stopping.SIGNALS`) to any rank ends
the run after the step under way, with a checkpoint. A phase that needs another engine (its model grows, its batch is
another) ends the loop with a checkpoint, too; `run` builds the next. A step whose loss or gradient is not finite is not
applied; whether the run then stops, the recipe's `Safety` says. Refuses a held-out loss that jumps at a growth.
"""

from __future__ import annotations

import math
import time
from statistics import fmean
from typing import Any

import torch

from bert2bert.checkpoints.manifest import Grown
from bert2bert.data.loader import Loader, eval_batches
from bert2bert.data.objective import Objective
from bert2bert.model.program import Step
from bert2bert.ranks import distributed, stopping
from bert2bert.recipe import Phase
from bert2bert.recipe.programs import Draw, evaluated
from bert2bert.recipe.schedules import lr_at
from bert2bert.recipe.triggers import Agreement
from bert2bert.tables.flops import Flops
from bert2bert.train import engine as engines
from bert2bert.train.agreement import correlations
from bert2bert.train.compute import peak_flops, step_flops
from bert2bert.train.errors import explained
from bert2bert.train.evaluate import EVALUATION_SEED, evaluate
from bert2bert.train.growing import check_loss, drop
from bert2bert.train.job import Job
from bert2bert.train.metrics import Interval
from bert2bert.train.position import Position
from bert2bert.train.safety import Watch
from bert2bert.train.save import Saving


class Loop:
    """One engine and the phases that it serves, from a position on. Every rank makes the same calls in order.

    growth: that of the manifest which was loaded. grown: whether the model has grown since the last step.
    """

    def __init__(self, job: Job, engine: engines.Engine, position: Position, growth: Grown | None, grown: bool) -> None:
        self.job, self.engine, self.position, self.growth, self.grown = job, engine, position, growth, grown
        self.recipe = recipe = job.recipe
        self.served, self.metrics = self.phase, job.metrics
        self.held_out = eval_batches(
            job.bins, "heldout", recipe.predicts, recipe.data.seq_len, engine.micro_rows, recipe.data.eval_rows,
            engine.rank, engine.world, EVALUATION_SEED,
        )  # fmt: skip
        name = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else None
        self.peak = None if name is None else peak_flops(name, engine.precision)
        self.flops = Flops(engine.model.hf_config, engine.model.heads)
        self.fresh = frozenset(growth.inserted if growth else ())
        self.watch = Watch(recipe.safety, int(position.memory.get("skipped", 0)))
        self.evaluated = -1  # the step of the last evaluation of this model
        self.saving: Saving | None = None  # a checkpoint whose files are written behind training
        self.loader = self._rows()
        self._settle()

    @property
    def phase(self) -> Phase:
        """The phase of the next step, or the last."""
        return self.recipe.phases[self.position.phase]

    @property
    def complete(self) -> bool:
        """Whether the run is at its end."""
        last = self.position.phase == len(self.recipe.phases) - 1
        return last and not self.position.pending(self.recipe) and self._over()

    @property
    def paused(self) -> bool:
        """Whether the phase is over after which the run shall pause."""
        return self.job.until in [phase.name for phase in self.recipe.phases[: self.position.phase]]

    @property
    def served_out(self) -> bool:
        """Whether the next step needs another engine."""
        return self.position.pending(self.recipe) or not self.recipe.same_engine(self.served, self.phase)

    def _over(self) -> bool:
        return self.position.over(self.phase, self.loader.rows_per_epoch)

    def _rows(self) -> Loader:
        """The rows of the phase, from where the run stands; at the phase's first step the position takes note of it."""
        own, position, engine = self.recipe.at(self.position.phase), self.position, self.engine

        def loader(objective: Objective, row_length: int) -> Loader:
            return Loader(
                self.job.bins, "train", objective, row_length, engine.micro_rows, engine.rank, engine.world, own.seed
            )

        found = loader(own.predicts, own.data.seq_len)
        if position.phase_step == 0 and "began" not in position.memory:
            before = position.row_length
            epoch = None if before in (0, own.data.seq_len) else loader(own.predicts, before).rows_per_epoch
            self.position = position.begun(own.data.seq_len, found.rows_per_epoch, epoch)
        found.load_state({"rows": self.position.rows})
        return found

    def _settle(self) -> None:
        """Go to the phase of the next step; the run may have been resumed at the end of one."""
        before, self.position = self.position, self.position.settled(self.recipe, self.loader.rows_per_epoch)
        if self.position.phase != before.phase and not self.served_out:
            self.loader = self._rows()

    def run(self) -> str | None:
        """Train until the run ends, pauses, or needs another engine; the name of the signal that stopped it, if any."""
        try:
            return self._run()
        finally:
            if self.saving is not None:  # an error: what is written behind training stays unfinished
                self.saving.give_up()

    def _run(self) -> str | None:
        stopped = self._asked()
        if not stopped and (self.position.step == 0 or self.grown) and not self.served_out:
            self.job.before = self.position.memory.get("loss")
            self._evaluate(self.phase)
            self._check_growth()
            stopped = self._asked()
        interval = Interval(self.position.spent)
        while not (stopped or self.served_out or self.paused or self.complete):
            phase = self.phase
            record, stopped = self._optimizer_step(phase)
            compared = self._compared(phase)
            held_out = self._held_out(phase) if self.position.step % self.recipe.eval_every == 0 else None
            over = self._over()
            if self.metrics is not None:
                self.metrics.advance(phase.name)
            if over or stopped or compared or self.position.step % self.recipe.log_every == 0:
                spent = self.position.spent
                self._write(record | compared | interval.rates(spent, self.engine.world, self.peak))
                interval = Interval(spent)
            if held_out:
                self._write(held_out)
            if over:
                self._leave(phase)
            last = bool(stopped) or self.complete or self.served_out or self.paused
            if last or self._due(over):
                self._save(last)
        if self.served_out and not stopped and self.job.saved < 0:
            self._save(last=True)  # nothing was trained yet, but the growth reads files
        return stopped

    def _due(self, over: bool) -> bool:
        """Whether a checkpoint is due, which it is too where a later growth mixes this phase's weights in."""
        step = self.position.step
        return step % self.recipe.checkpoint_every == 0 or (over and step in self.position.needed(self.recipe))

    def _optimizer_step(self, phase: Phase) -> tuple[dict[str, Any], str | None]:
        """One optimizer step; its 'train' record without the rates, and the signal that any rank got."""
        recipe, engine, position, job = self.recipe, self.engine, self.position, self.job
        began = time.perf_counter()
        step = self._drawn(phase)
        lr = lr_at(
            phase.schedule, recipe.optimizer.lr, position.phase_step, self._horizon(phase), position.step, recipe.steps
        )
        engine.apply(step)
        engine.set_rates(phase.schedule, lr, position.phase_step)
        loss = torch.zeros((), device=engine.device)
        tokens = flops = 0
        where = f"step {position.step + 1} (phase {phase.name!r})"
        with explained(f"in {where}", job.newest):
            for _ in range(engine.accumulation):
                batch = next(self.loader)
                tokens += batch.real_tokens
                flops += step_flops(self.flops, batch, step)
                micro_loss, _, _ = engine.forward(batch.to(engine.device, non_blocking=True), step)
                engine.backward(micro_loss)
                loss += micro_loss.detach().float()
        local = [float(loss) / engine.accumulation / engine.world, tokens, flops]
        written = self.saving is not None and self.saving.written
        mean, *totals = engine.sum([*local, float(job.lock.lost), float(written), *stopping.asked(job.stop)])
        if totals[2]:
            distributed.write_on_first(job.output, job.lock.check)
        if totals[3] == engine.world or engine.diverged:  # a run that ends here shall keep what it can
            self._commit()
        stopped = stopping.answer(totals[4:])
        if skipped := self.watch.after(not engine.diverged, mean, engine.grad_norm, where, job.newest):
            job.warn(skipped)
        job.loss = mean
        self.position = position = position.advanced(
            self.loader.state()["rows"], tokens=int(totals[0]), flops=totals[1],
            seconds=time.perf_counter() - began, skipped=self.watch.in_a_row,
        )  # fmt: skip
        spent = position.spent
        record = {
            "kind": "train", "step": position.step, "phase": phase.name, "phase_step": position.phase_step,
            "loss": mean, "lr": lr, "grad_norm": engine.grad_norm, "tokens": spent["tokens"], "flops": spent["flops"],
            "seconds": spent["seconds"], "layers_run": len(step.run),
            "layers_learning": len(step.learn & set(engine.model.parts)),
            "loss_scale": engine.loss_scale, "skipped_steps": engine.counters["skipped_steps"],
        }  # fmt: skip
        return record, stopped

    def _drawn(self, phase: Phase) -> Step:
        """What the phase's program does in the next step."""
        position = self.position
        return phase.program.step(
            Draw(position.step, position.phase_step, self.recipe.seed, self.engine.model.parts, self.fresh)
        )

    def _horizon(self, phase: Phase) -> int:
        """Steps of the phase, for its schedule: those of the recipe, or what the share that is done makes likely."""
        step = self.position.phase_step
        known = [] if phase.steps is None else [phase.steps]
        if phase.until is not None and phase.until.counted:
            done = phase.until.done(self.position.stretch(self.loader.rows_per_epoch))
            known.append(max(round(step / done), step + 1) if done > 0 else 2**31)
        return max(min(known), step)

    def _compared(self, phase: Phase) -> dict[str, Any]:
        """How far neighbouring layers agree, on the rows of the next step (FLOPs not counted as spent), where the
        phase's trigger asks for it: keys of the 'train' record."""
        until, engine, loader = phase.until, self.engine, self.loader
        if not isinstance(until, Agreement) or self.position.phase_step % until.every:
            return {}
        step, state = self._drawn(phase), loader.state()
        engine.apply(step)
        batches = [next(loader) for _ in range(engine.accumulation)]
        loader.load_state(state)
        with explained(f"in the comparison of layers after step {self.position.step}", self.job.newest):
            found = correlations(engine, batches, step)
        self.position = self.position.compared(found)
        return {"agreement": found, **({"agreement_mean": fmean(found), "agreement_min": min(found)} if found else {})}

    def _leave(self, phase: Phase) -> None:
        """Go on from the end of a phase; where the run ends or the model grows, not without an evaluation."""
        after = self.position.settled(self.recipe, self.loader.rows_per_epoch)
        if (self.complete or after.pending(self.recipe)) and self.evaluated != self.position.step:
            self._evaluate(phase)
        self._settle()

    def _check_growth(self) -> None:
        """Raise UserError for a held-out loss that rose at the growth beyond what its plan says."""
        job = self.job
        if self.grown and self.phase.grow is not None and self.growth is not None and job.result is not None:
            guessing = math.log(self.engine.model.sizes["vocab"])
            check_loss(self.recipe, self.position.phase, self.growth, guessing, job)

    def _asked(self) -> str | None:
        """The signal that any rank got, if any. Collective."""
        return stopping.answer(self.engine.sum(stopping.asked(self.job.stop)))

    def _write(self, record: dict[str, Any]) -> None:
        """Record and show what was measured."""
        if self.metrics is not None:
            self.metrics.write(record | {"growths": self.position.growths})

    def _evaluate(self, phase: Phase) -> None:
        self._write(self._held_out(phase))

    def _held_out(self, phase: Phase) -> dict[str, Any]:
        """Evaluate; the 'eval' record."""
        with explained(f"in the evaluation after step {self.position.step}", self.job.newest):
            step = evaluated(phase.program, self.engine.model.parts)
            self.job.result = found = evaluate(self.engine, self.held_out, step)
        self.evaluated, self.position = self.position.step, self.position.looked_at(found["loss"])
        spent = {key: self.position.spent[key] for key in ("tokens", "flops", "seconds")}
        return {"kind": "eval", "step": self.position.step, "phase": phase.name, **found, **spent}

    def _kept(self) -> set[int]:
        """Steps whose checkpoints stay on disk besides the latest."""
        every, step = self.recipe.keep_every, self.position.step
        return self.position.needed(self.recipe) | set(range(0, step + 1, every) if every else ())

    def _save(self, last: bool) -> None:
        """Save where the run stands. last: no step follows on this engine, so that there is nothing to write behind."""
        job, position = self.job, self.position
        self._commit()
        if job.saved == position.step:
            return
        behind = self.recipe.checkpoint_async and not last
        self.saving = Saving(
            self.engine, job.output, position, model=self.engine.model.hf_config, aliases=self.engine.model.aliases,
            recipe=self.recipe.to_dict(), data=job.data, growth=self.growth, keep=self.recipe.keep_checkpoints,
            needed=self._kept(), check=job.lock.check, behind=behind,
        )  # fmt: skip
        if not behind:
            self._commit()

    def _commit(self) -> None:
        """Wait for the checkpoint under way, if there is one, and make it the latest. Collective."""
        if self.saving is None:
            return
        job, position = self.job, self.saving.position
        job.at = self.saving.commit()
        job.saved, self.saving = position.step, None
        if position.growths:
            drop(job.output, position)
