"""A recipe: one experiment as a tree of frozen dataclasses, defined by a Python file with `recipe = Recipe(...)`.

A recipe says what is trained, on which data, for how long and how: model, rows per optimizer step, phases, optimizer.
It does not say on which machine: precision, ZeRO stage and micro-batch stand in the ds_config. Every value can be
overridden on the command line by its dotted name (``--set phases.0.steps=10``), typed as declared here.

Refused, as `InvalidConfig`: unknown keys (with the nearest known ones), values of the wrong type or out of range,
contradictions between values, and the LAMB optimizer. Imports no torch.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from bert2bert.data.objective import Causal, Masked, Objective, SpanCorruption, default
from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.model import registry
from bert2bert.recipe.checks import in_range as _in_range
from bert2bert.recipe.checks import require as _require
from bert2bert.recipe.model_keys import model_keys
from bert2bert.recipe.old_names import RENAMED, explain
from bert2bert.recipe.safety import Safety
from bert2bert.recipe.schedules import Schedule
from bert2bert.recipe.settings import assign, build
from bert2bert.tables import table_for


@dataclass(frozen=True)
class Data:
    """Token bins (a folder that `bert2bert prepare` wrote) and how rows are cut from them.

    ``seq_len``: token slots of a row; ``eval_rows``: held-out rows of one evaluation (fewer when the split has fewer).
    """

    bins: str
    seq_len: int
    eval_rows: int = 256

    def __post_init__(self) -> None:
        _require(bool(self.bins), "data.bins", self.bins, "the folder that `bert2bert prepare` wrote")
        _in_range("data.seq_len", self.seq_len, 8)
        _in_range("data.eval_rows", self.eval_rows, 1)


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay Adam; biases and norms do not decay. ``lr`` is the peak of phases that name none."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    name: str = "adamw"

    def __post_init__(self) -> None:
        if "lamb" in self.name.lower():
            raise InvalidConfig(
                f"optimizer.name is {self.name!r}; expected 'adamw'. LAMB scales every layer by the norms of its "
                "weights and of its update; a flat ZeRO partition holds pieces of layers, so those norms would be wrong"
            )
        _require(
            self.name == "adamw", "optimizer.name", self.name, "'adamw', the one optimizer whose state can be grown"
        )
        _in_range("optimizer.lr", self.lr, 0, open_low=True)
        for i, beta in enumerate(self.betas):
            _require(0 <= beta < 1, f"optimizer.betas.{i}", beta, "a number in [0, 1)")
        _in_range("optimizer.eps", self.eps, 0, open_low=True)
        _in_range("optimizer.weight_decay", self.weight_decay, 0)


@dataclass(frozen=True)
class Full:
    """Every layer runs and learns."""

    kind: str = field(default="full", init=False)


@dataclass(frozen=True)
class SubModels:
    """bert2BERT's first stage: the bottom d layers run, d drawn per step from {k, 2k, ..., L}; their top k learn."""

    layers_per_stage: int = 3
    kind: str = field(default="sub-models", init=False)

    def __post_init__(self) -> None:
        _in_range("program.layers_per_stage", self.layers_per_stage, 1)


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps with one layer program and one schedule; 0 steps leave the phase out."""

    name: str
    steps: int
    program: Full | SubModels = Full()
    schedule: Schedule = Schedule()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        _require(bool(self.name), "phase.name", self.name, "a name")
        _in_range(f"phase {self.name!r}: steps", self.steps, 0)


@dataclass(frozen=True)
class Recipe:
    """One pre-training run.

    ``model``: a Hugging Face config, with its model_type where it is no BERT's; None takes that of the checkpoint which
    the run starts from (--resume). ``global_batch_size``: rows of data.seq_len slots per optimizer step over all
    ranks. ``objective``: what is predicted; None takes the architecture's: Masked(), Causal() or SpanCorruption().
    ``gradient_clipping``: the gradient norm's limit, 0 for none. ``*_every``: in optimizer steps; the last step is
    always evaluated and saved. ``keep_checkpoints``: how many of the latest stay on disk.
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
    log_every: int = 10

    def __post_init__(self) -> None:
        _require(bool(self.name), "name", self.name, "a name")
        for key in ("global_batch_size", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            _in_range(key, getattr(self, key), 1)
        _in_range("gradient_clipping", self.gradient_clipping, 0)
        _in_range("seed", self.seed, 0)
        _require(self.steps > 0, "the number of steps of all phases", self.steps, "at least one")
        names = [phase.name for phase in self.phases]
        _require(len(set(names)) == len(names), "the list of phase names", names, "different names")
        start = 0
        for i, phase in enumerate(self.phases):
            if phase.steps:
                phase.schedule.check(f"phases.{i}.schedule", phase.steps, start, self.steps)
            start += phase.steps
        if self.model is not None:
            self._check_model(self.model)

    def _check_model(self, model: dict[str, Any]) -> None:
        registry.check(build(Annotated[dict, model_keys], model, "model"))
        trains = registry.objective_of(model)
        if self.objective is None:
            object.__setattr__(self, "objective", default(trains))  # so that what is recorded says it
        elif self.objective.trains != trains:
            raise InvalidConfig(
                f"objective is {self.objective.kind!r}, but a {model.get('model_type', 'bert')} is trained by "
                f"{default(trains).kind!r}; leave objective out of the recipe, or take another model"
            )
        table = table_for(registry.typed(model))
        positions = table.positions(model)
        if positions is not None and self.data.seq_len > positions:
            raise InvalidConfig(
                f"data.seq_len is {self.data.seq_len}, but model.{table.positions_key} is {model[table.positions_key]}"
                + (f", of which {table.sizes.first_position} are no token's" if table.sizes.first_position else "")
            )
        for i, phase in enumerate(self.phases):
            if not isinstance(phase.program, Full) and len(table.sizes.depth) > 1:
                raise InvalidConfig(
                    f"phases.{i}.program is {phase.program.kind!r}; a {table.model_type} has two stacks of layers, the "
                    "first of each with the position biases of all, and is trained whole: use Full()"
                )
            if isinstance(phase.program, SubModels) and self.layers % phase.program.layers_per_stage:
                raise InvalidConfig(
                    f"phases.{i}.program.layers_per_stage is {phase.program.layers_per_stage}, which does not divide "
                    f"the {self.layers} layers of the model; expected one of {_divisors(self.layers)}"
                )

    @property
    def layers(self) -> int:
        """Layers of the model, of all its stacks; 0 where it is not known yet."""
        if self.model is None:
            return 0
        table = table_for(registry.typed(self.model))
        sizes = table.axis_sizes(self.model)
        return sum(sizes[axis] for axis in table.sizes.depth)

    @property
    def predicts(self) -> Objective:
        """The objective: `objective`, which is known once the model is."""
        if self.objective is None:
            raise ValueError(f"recipe {self.name!r} has neither an objective nor a model to take it from")
        return self.objective

    @property
    def steps(self) -> int:
        """Optimizer steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[int, int]:
        """(phase index, step within the phase) of the run's 0-based optimizer step; ValueError outside the run."""
        start = 0
        for i, phase in enumerate(self.phases):
            if start <= step < start + phase.steps:
                return i, step - start
            start += phase.steps
        raise ValueError(f"step {step} is outside the run's {self.steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-ready dicts, lists and scalars; `from_dict` is its inverse."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def from_dict(plain: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` wrote. Raises InvalidConfig, naming the key by its dotted name."""
    recipe: Recipe = build(Recipe, plain, renamed=RENAMED)
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Run a recipe file, then apply ``key.sub.0=value`` overrides together; InvalidConfig says what is wrong where.

    ``size=NAME`` takes the recipe of that name which the file defines beside ``recipe``, such as one that runs in a
    minute, ``tiny = replace(recipe, …)``.
    """
    path = Path(path)
    name, overrides = "recipe", list(overrides)
    for text in [text for text in overrides if text.partition("=")[0] == "size"]:
        overrides.remove(text)
        name = text.partition("=")[2]
    if not path.is_file():
        raise InvalidConfig(f"no recipe {path}: expected a Python file that defines `recipe = Recipe(...)`")
    try:
        defined = runpy.run_path(str(path))
    except InvalidConfig as error:
        raise InvalidConfig(f"recipe {path}: {error}") from error
    except Exception as error:  # the file is the user's code: any failure in it is his to read
        if old := explain(error):
            raise InvalidConfig(f"recipe {path}: {old}") from None
        raise InvalidConfig(f"recipe {path} cannot be run: {type(error).__name__}: {error}") from error
    found = defined.get(name)
    if name != "recipe" and not isinstance(found, Recipe):
        sizes = [n for n, value in defined.items() if isinstance(value, Recipe) and n != "recipe" and n.islower()]
        raise InvalidConfig(
            f"recipe {path} defines no recipe of size {name!r}; "
            + (did_you_mean(name, sizes) if sizes else "leave size= out")
        )
    if not isinstance(found, Recipe):
        raise InvalidConfig(f"recipe {path} defines no `recipe = Recipe(...)` (found {type(found).__name__})")
    if not overrides:
        return found
    plain = found.to_dict()
    for text in overrides:
        assign(Recipe, plain, text, RENAMED)
    return from_dict(plain)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
