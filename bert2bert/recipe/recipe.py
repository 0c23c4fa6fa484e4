"""A recipe: one experiment as a tree of frozen dataclasses, defined by a Python file with `recipe = Recipe(...)`.

A recipe says what is trained, on which data, for how long and how: model, rows per optimizer step, phases, optimizer.
It does not say on which machine: precision, ZeRO stage and micro-batch stand in the ds_config. Every value can be
overridden on the command line by its dotted name (``--set phases.0.steps=10``), typed as declared here.

Refused, as `InvalidConfig`: unknown keys (with the nearest known ones), values of the wrong type or out of range,
contradictions between values, and the LAMB optimizer. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any

from bert2bert.data.objective import Causal, Masked, Objective, SpanCorruption, default
from bert2bert.errors import InvalidConfig, UnsupportedGrowth, did_you_mean
from bert2bert.model import registry
from bert2bert.recipe import programs, triggers
from bert2bert.recipe.checks import in_range as _in_range
from bert2bert.recipe.checks import require as _require
from bert2bert.recipe.growing import Grow
from bert2bert.recipe.model_keys import model_keys
from bert2bert.recipe.parts import AdamW, Data
from bert2bert.recipe.programs import AnyProgram, Full
from bert2bert.recipe.safety import Safety
from bert2bert.recipe.schedules import Schedule
from bert2bert.recipe.settings import build
from bert2bert.recipe.triggers import AnyTrigger
from bert2bert.tables import table_for


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps with one layer program and one schedule, before which the model may grow.

    ``steps``: the most steps of it; 0 leaves them out, not the growth. ``until``: what ends it before, or alone if
    ``steps`` is None. ``seq_len``, ``global_batch_size``, ``mlm_probability``: None takes the recipe's.
    """

    name: str
    steps: int | None = None
    program: AnyProgram = Full()  # noqa: RUF009 - frozen
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen
    until: AnyTrigger = None
    grow: Grow | None = None
    seq_len: int | None = None
    global_batch_size: int | None = None
    mlm_probability: float | None = None

    def __post_init__(self) -> None:
        _require(bool(self.name), "phase.name", self.name, "a name")
        programs.admit(self.program)
        if self.until is not None:
            triggers.admit(self.until)
        where = f"phase {self.name!r}: "
        if self.steps is None:
            if self.until is None or not self.until.counted:
                raise InvalidConfig(
                    f"{where}neither steps nor until says for sure when it ends; give steps=…, the most that it may "
                    "take, or until=Tokens(…), Flops(…) or Epochs(…)"
                )
        else:
            _in_range(f"{where}steps", self.steps, 0)
        if self.seq_len is not None:
            _in_range(f"{where}seq_len", self.seq_len, 8)
        if self.global_batch_size is not None:
            _in_range(f"{where}global_batch_size", self.global_batch_size, 1)
        if self.mlm_probability is not None:
            Masked(self.mlm_probability)


@dataclass(frozen=True)
class Recipe:
    """One pre-training run.

    ``model``: a Hugging Face config, with its model_type where it is no BERT's; None takes that of the checkpoint which
    the run starts from (--resume). ``global_batch_size``: rows of data.seq_len slots per optimizer step over all
    ranks. ``objective``: what is predicted; None takes the architecture's: Masked(), Causal() or SpanCorruption().
    ``gradient_clipping``: the gradient norm's limit, 0 for none. ``*_every``: in optimizer steps; the last step is
    always evaluated and saved, and so is the step before a growth. ``keep_checkpoints``: how many of the latest stay on
    disk; ``keep_every``: those at multiples of so many steps stay, too (0: none).
    ``checkpoint_async``: write checkpoints while training goes on, from a copy in the memory of each rank's host.
    """

    name: str
    model: Annotated[dict[str, Any], model_keys] | None
    data: Data
    global_batch_size: int
    phases: tuple[Phase, ...]
    optimizer: AdamW
    objective: Masked | Causal | SpanCorruption | None = None
    gradient_clipping: float = 1.0
    safety: Safety = Safety()  # noqa: RUF009 - frozen
    seed: int = 0
    eval_every: int = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    keep_every: int = 0
    checkpoint_async: bool = False
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", self.name, "a name")
        for key in ("global_batch_size", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            _in_range(key, getattr(self, key), 1)
        _in_range("keep_every", self.keep_every, 0)
        _require(
            self.keep_every % self.checkpoint_every == 0, "keep_every", self.keep_every,
            f"a multiple of checkpoint_every, {self.checkpoint_every}, or checkpoints at these steps are not written",
        )  # fmt: skip
        _in_range("gradient_clipping", self.gradient_clipping, 0)
        _in_range("seed", self.seed, 0)
        _require(self.steps != 0, "the number of steps of all phases", self.steps, "at least one")
        names = [phase.name for phase in self.phases]
        _require(len(set(names)) == len(names), "the list of phase names", names, "different names")
        start: int | None = 0
        for i, phase in enumerate(self.phases):
            mixed = phase.grow.mix_with if phase.grow else None
            if mixed is not None and mixed not in names[:i]:
                raise InvalidConfig(f"phases.{i}.grow.mix_with is {mixed!r}; " + did_you_mean(mixed, names[:i]))
            if phase.steps != 0:
                phase.schedule.check(f"phases.{i}.schedule", phase.steps, start, self.steps)
            start = None if start is None or phase.steps is None or phase.until else start + phase.steps
        if self.model is not None:
            self._check_models()

    def _check_models(self) -> None:
        """Raise InvalidConfig for a model, at the start or after a growth, that cannot be trained as its phase says."""
        for i, (phase, model) in enumerate(zip(self.phases, self.models, strict=True)):
            with _within(f"phases.{i} ({phase.name!r}): " if i else ""):
                if i == 0 or phase.grow:
                    where = "grow.model" if phase.grow else "model"
                    registry.check(build(Annotated[dict, model_keys], model, where))
                    self._check_objective(model)
                self._check_rows(phase, model)
                self._check_program(i, model)

    def _check_rows(self, phase: Phase, model: dict[str, Any]) -> None:
        table, length = table_for(registry.typed(model)), phase.seq_len or self.data.seq_len
        positions = table.positions(model)
        if positions is not None and length > positions:
            kept = table.sizes.first_position
            raise InvalidConfig(
                f"{'seq_len' if phase.seq_len else 'data.seq_len'} is {length}, but model.{table.positions_key} is "
                f"{model[table.positions_key]}" + (f", of which {kept} are no token's" if kept else "")
            )
        if phase.mlm_probability is not None and not isinstance(self.objective, Masked):
            raise InvalidConfig(
                f"mlm_probability is {phase.mlm_probability}, but a {table.model_type} is not trained by masked "
                "tokens; leave it out"
            )

    def _check_objective(self, model: dict[str, Any]) -> None:
        trains = registry.objective_of(model)
        if self.objective is None:
            object.__setattr__(self, "objective", default(trains))  # so that what is recorded says it
        elif self.objective.trains != trains:
            raise InvalidConfig(
                f"objective is {self.objective.kind!r}, but a {model.get('model_type', 'bert')} is trained by "
                f"{default(trains).kind!r}; leave objective out of the recipe, or take another model"
            )

    def _check_program(self, i: int, model: dict[str, Any]) -> None:
        table = table_for(registry.typed(model))
        stacks = len(table.sizes.depth)
        programs.check(self.phases[i].program, table.layer_parts(model), stacks, f"phases.{i}.program")

    @property
    def layers(self) -> int:
        """Layers of the first model, of all its stacks; 0 where it is not known yet."""
        return 0 if self.model is None else len(table_for(registry.typed(self.model)).layer_parts(self.model))

    @cached_property
    def models(self) -> tuple[dict[str, Any], ...]:
        """The model's config in every phase. Raises InvalidConfig for a growth that does not fit the model before it,
        and ValueError where the first model is not known."""
        if self.model is None:
            raise ValueError(f"recipe {self.name!r} takes its model from a checkpoint")
        found, config = [], self.model
        for i, phase in enumerate(self.phases):
            if phase.grow is not None:
                with _within(f"phases.{i} ({phase.name!r}): "):
                    config = phase.grow.target(config)
            found.append(config)
        return tuple(found)

    def at(self, index: int) -> Recipe:
        """The recipe with what one phase has otherwise: its model, row length, batch and masking; of one phase."""
        phase = self.phases[index]
        objective = self.objective
        if phase.mlm_probability is not None and isinstance(objective, Masked):
            objective = replace(objective, mlm_probability=phase.mlm_probability)
        return replace(
            self,
            model=None if self.model is None else self.models[index],
            data=replace(self.data, seq_len=phase.seq_len or self.data.seq_len),
            global_batch_size=phase.global_batch_size or self.global_batch_size,
            objective=objective,
            phases=(Phase(phase.name, steps=1, program=phase.program),),
        )

    def same_engine(self, phase: Phase, other: Phase) -> bool:
        """Whether one engine can serve two phases of one model: they have the same batch."""
        return (phase.global_batch_size or self.global_batch_size) == (
            other.global_batch_size or self.global_batch_size
        )

    @property
    def begins_with_growth(self) -> bool:
        """Whether the model grows before anything is trained."""
        return next(phase for phase in self.phases if phase.grow or phase.steps != 0).grow is not None

    @property
    def predicts(self) -> Objective:
        """The objective: `objective`, which is known once the model is."""
        if self.objective is None:
            raise ValueError(f"recipe {self.name!r} has neither an objective nor a model to take it from")
        return self.objective

    @property
    def steps(self) -> int | None:
        """The most optimizer steps of all phases; None where a phase ends by something else alone."""
        counts = [phase.steps for phase in self.phases]
        return None if None in counts else sum(n for n in counts if n is not None)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready dicts, lists and scalars; `from_dict` is its inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


@contextmanager
def _within(where: str) -> Iterator[None]:
    """Say where in a recipe an InvalidConfig or UnsupportedGrowth comes from, unless it says so itself."""
    try:
        yield
    except (InvalidConfig, UnsupportedGrowth) as error:
        if not where or str(error).startswith(where):
            raise
        raise InvalidConfig(where + str(error)) from error
