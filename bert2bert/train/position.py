"""Where a run stands, and whether a recipe can go on from there.

Refuses (InvalidConfig) what would give the position another meaning: other data, another tokenizer, seed, row length or
objective, and phases already run that are no longer those of the recipe. Other changes (learning rate, more steps or
phases) are allowed and reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.manifest import Trained
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Phase, Recipe, renamed
from bert2bert.recipe.triggers import HeldOut, Stretch

NOTHING = {"flops": 0.0, "seconds": 0.0, "tokens": 0, "steps": 0}
"""Spent by a run that begins."""

NEVER = 2**62
"""Rows of an epoch, where none of the phases at hand ends by epochs."""

_REMEMBERED = 100  # evaluations and checks of a phase that its trigger can look back on

# Changing these says nothing about what is learned.
_FREE = (
    "name",
    "data.bins",
    "data.eval_rows",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "checkpoint_async",
    "log_every",
)


@dataclass(frozen=True)
class Position:
    """Where a run stands: all that decides its next step, beside weights, moments and random states."""

    step: int = 0
    """Optimizer steps done."""
    phase: int = 0
    """Index of the phase of the next step, or of the last phase."""
    phase_step: int = 0
    """Steps done in it."""
    rows: int = 0
    """Rows that the loader has given out, over all ranks, in units of `row_length`."""
    row_length: int = 0
    """Token slots of a row; 0: none was given out yet."""
    spent: Mapping[str, float] = field(default_factory=lambda: dict(NOTHING))
    """"flops", "seconds", "tokens", "steps"."""
    growths: int = 0
    """Growths of the recipe that are done."""
    ended: tuple[int, ...] = ()
    """The step after which each phase before this one ended."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """What the phase's trigger looks back on: "began" (rows, tokens and flops at its start), "held_out" ([flops, loss]
    of evaluations), "correlations"; "loss": the last held-out loss; "skipped": steps in a row that were not applied."""

    @classmethod
    def of(cls, training: Trained) -> Position:
        """From a manifest's section."""
        return cls(
            training.step, training.phase, training.phase_step, training.data["rows"],
            int(training.data.get("row_length") or (training.recipe.get("data") or {}).get("seq_len") or 0),
            dict(training.spent), training.growths, tuple(training.ended), dict(training.memory),
        )  # fmt: skip

    def recorded(self, recipe: Mapping[str, Any], data: Mapping[str, Any]) -> Trained:
        """As a manifest has it. data: digests of tokens and tokenizer."""
        return Trained(
            recipe=dict(recipe), phase=self.phase, phase_step=self.phase_step, step=self.step, spent=self.spent,
            data={**data, "rows": self.rows, "row_length": self.row_length}, growths=self.growths, ended=self.ended,
            memory=self.memory,
        )  # fmt: skip

    def advanced(self, rows: int, *, tokens: int, flops: float, seconds: float, skipped: int) -> Position:
        """After one more step of the phase. rows: given out so far; tokens, flops, seconds: of the step; skipped: steps
        up to it that were not applied."""
        memory = {key: value for key, value in self.memory.items() if key != "skipped"}
        more = {"flops": flops, "seconds": seconds, "tokens": tokens, "steps": 1}
        spent = {key: value + more.get(key, 0) for key, value in self.spent.items()}
        memory |= {"skipped": skipped} if skipped else {}
        return replace(self, step=self.step + 1, phase_step=self.phase_step + 1, rows=rows, spent=spent, memory=memory)

    def looked_at(self, loss: float) -> Position:
        """After an evaluation. loss: on held-out text, in nats."""
        seen = [*self.memory.get("held_out", ()), [self.spent["flops"], loss]][-_REMEMBERED:]
        return replace(self, memory={**self.memory, "loss": loss, "held_out": seen})

    def compared(self, correlations: Sequence[float]) -> Position:
        """After a look at how far neighbouring layers' gradients agree."""
        seen = [*self.memory.get("correlations", ()), list(correlations)][-_REMEMBERED:]
        return replace(self, memory={**self.memory, "correlations": seen})

    def stretch(self, rows_per_epoch: int) -> Stretch:
        """What the phase has done, for its trigger. rows_per_epoch: of rows of `row_length`."""
        began = self.memory.get("began", {})
        return Stretch(
            steps=self.phase_step,
            run_steps=self.step,
            tokens=int(self.spent["tokens"] - began.get("tokens", 0)),
            flops=self.spent["flops"] - began.get("flops", 0.0),
            epochs=(self.rows - began.get("rows", 0)) / max(rows_per_epoch, 1),
            held_out=[HeldOut(*pair) for pair in self.memory.get("held_out", ())],
            correlations=self.memory.get("correlations", ()),
        )

    def over(self, phase: Phase, rows_per_epoch: int) -> bool:
        """Whether the phase is over here."""
        if phase.steps is not None and self.phase_step >= phase.steps:
            return True
        return phase.until is not None and self.phase_step > 0 and phase.until.done(self.stretch(rows_per_epoch)) >= 1

    def next_phase(self) -> Position:
        """At the start of the next phase."""
        kept = {key: value for key, value in self.memory.items() if key in ("loss", "skipped")}
        return replace(self, phase=self.phase + 1, phase_step=0, ended=(*self.ended, self.step), memory=kept)

    def settled(self, recipe: Recipe, rows_per_epoch: int) -> Position:
        """At the phase of the next step: past those that are over, up to one before which the model has yet to grow."""
        position, last = self, len(recipe.phases) - 1
        while position.phase < last and not position.pending(recipe):
            if not position.over(recipe.phases[position.phase], rows_per_epoch):
                break
            position = position.next_phase()
        return position

    def pending(self, recipe: Recipe) -> bool:
        """Whether the model has yet to grow before the phase."""
        return self.growths < sum(phase.grow is not None for phase in recipe.phases[: self.phase + 1])

    def needed(self, recipe: Recipe) -> set[int]:
        """Steps whose checkpoints later growths mix in."""
        names = [phase.name for phase in recipe.phases]
        ahead = [phase.grow for phase in recipe.phases if phase.grow is not None][self.growths :]
        ends = dict(zip(names, self.ended, strict=False))
        return {ends[grow.mix_with] for grow in ahead if grow.mix_with in ends}

    def begun(self, row_length: int, epoch: int, epoch_before: int | None) -> Position:
        """At the phase's first step, its start noted. Rows of another length go on at the same share of an epoch.

        epoch: rows of `row_length` in an epoch; epoch_before: of the rows before, if these were of another length.
        """
        rows = self.rows if epoch_before is None else round(self.rows / epoch_before * epoch)
        began = {"rows": rows, "tokens": self.spent["tokens"], "flops": self.spent["flops"]}
        return replace(self, rows=rows, row_length=row_length, memory={**self.memory, "began": began})


def continued(training: Trained, folder: Path, recipe: Recipe, data: Mapping[str, Any], notes: list[str]) -> Position:
    """The position in a manifest's ``training``, once it is sure that the run can go on with this recipe and data.

    ``folder``: of the checkpoint, for messages; ``data``: {"digest", "tokenizer_digest"} of the bins now given;
    ``notes``: gets a sentence about what differs and may.
    """
    for key, what in (("tokenizer_digest", "tokenizer"), ("digest", "data")):
        if training.data[key] != data[key]:
            raise InvalidConfig(
                f"the {what} differs from that of the run in {folder}: digest {data[key]}, the run had "
                f"{training.data[key]}. Give the bins that the run was started with (--bins), or start a new run"
            )
    before, now = _flat(renamed(training.recipe)), _flat(recipe.to_dict())
    for key in ("objective.kind", "seed", "data.seq_len", *(k for k in now if k.startswith("objective."))):
        if before.get(key) != now[key]:
            remedy = f"--set {key}={before.get(key)}" if key != "objective.kind" else "that run's recipe"
            raise InvalidConfig(
                f"{key} is {now[key]!r}, the run in {folder} had {before.get(key)!r}: its position in the data would "
                f"mean other rows. Continue with {remedy}, or start a new run"
            )
    phase, phase_step = training.phase, training.phase_step
    old, new = renamed(training.recipe)["phases"], recipe.to_dict()["phases"]
    passed, kept = [_decided(p) for p in old[:phase]], [_decided(p) for p in new[:phase]]
    there = phase < len(new) and new[phase]["name"] == old[phase]["name"]
    there = there and (new[phase]["steps"] is None or new[phase]["steps"] >= phase_step)
    if passed != kept or not there:
        raise InvalidConfig(
            f"the recipe's phases are {_listed(new)}, but {folder} stands at step {phase_step} of phase "
            f"{old[phase]['name']!r} of {_listed(old)}. Phases already run must stay as they were, and the one under "
            "way can only get longer"
        )
    done = sum(p.get("grow") is not None for p in old[: phase + 1])
    if training.growths == done and (old[phase].get("grow") or None) != (new[phase].get("grow") or None):
        raise InvalidConfig(
            f"the recipe's growth before phase {new[phase]['name']!r} is not that which {folder} has behind it; leave "
            "it as it was, or start a new run"
        )
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in _FREE]
    if changed:
        differs = ", ".join(f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in changed[:6])
        notes.append(f"the recipe differs from that of the checkpoint's run ({differs}); its values hold from here on")
    return Position.of(training)


def same_phases(training: Trained, recipe: Recipe) -> bool:
    """Whether a recorded recipe is this one, as far as its name and those of its phases tell."""
    recorded = training.recipe
    names = [phase.get("name") for phase in recorded.get("phases") or ()]
    return recorded.get("name") == recipe.name and names == [phase.name for phase in recipe.phases]


def grows_next(training: Trained, recipe: Recipe) -> bool:
    """Whether the run of a grown checkpoint's source is one of this recipe, which goes on behind a growth there."""
    return same_phases(training, recipe) and Position.of(training).settled(recipe, NEVER).pending(recipe)


def _decided(phase: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must stay of a phase that was run."""
    return phase["name"], phase.get("steps"), phase.get("until"), phase.get("grow"), phase.get("seq_len")


def _listed(phases: list[dict[str, Any]]) -> str:
    return ", ".join(f"{p['name']!r} ({_length(p)})" for p in phases)


def _length(phase: Mapping[str, Any]) -> str:
    until = (phase.get("until") or {}).get("kind")
    steps = None if phase.get("steps") is None else f"{phase['steps']} steps"
    return " or ".join(filter(None, (steps, until and f"until {until}")))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts and lists."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        below = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items)
        return {key: value for part in below for key, value in part.items()}
    return {prefix: tree}
