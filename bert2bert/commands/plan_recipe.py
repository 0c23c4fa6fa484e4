"""The command ``plan --recipe``: what every phase of a recipe is, takes and costs, read off the recipe alone.

Refuses what `recipe` and `commands.phase_growth.check` refuse, and a recipe without a model where no checkpoint gives
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import mean
from typing import Any

from bert2bert.commands.phase_growth import check, growth_of
from bert2bert.data.objective import Masked
from bert2bert.growth.exactness import reasons
from bert2bert.model import registry
from bert2bert.recipe import Phase, Recipe
from bert2bert.recipe.programs import Draw
from bert2bert.tables import table_for
from bert2bert.tables.flops import Flops, Work
from bert2bert.train import ds_config as configs

_DRAWS = 256  # steps over which a program that draws is averaged
_WORDS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight, and of its gradient


@dataclass(frozen=True)
class PhasePlan:
    """One phase."""

    name: str
    model: str
    """Class and sizes, in words."""
    parameters: int
    program: str
    """Its kind."""
    layers_run: float
    """A step, on average."""
    steps: int | None
    """The most of it; None where the recipe gives none."""
    until: str | None
    """What ends it before, in words."""
    tokens: int | None
    """Token slots of all steps."""
    flops: float | None
    """Forward and backward, of all steps."""
    flops_a_token: float
    memory: int | None
    """Bytes of weights, gradients, master weights and moments on a rank, beside activations; None without ds_config."""
    grows: dict[str, Any] | None
    """Of the growth before it: "axes", "bytes_read", "bytes_written", "function" and "moments" (reasons why they
    change), "warnings"."""


@dataclass(frozen=True)
class RecipePlan:
    """A recipe, phase by phase."""

    name: str
    phases: tuple[PhasePlan, ...]
    ranks: int
    stage: int | None
    precision: str | None

    def as_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        return {**asdict(self), "flops": self.flops, "tokens": self.tokens}

    @property
    def flops(self) -> float | None:
        """Of all phases; None where one is not known."""
        known = [phase.flops for phase in self.phases]
        return None if None in known else sum(f for f in known if f is not None)

    @property
    def tokens(self) -> int | None:
        """Of all phases; None where those of one are not known."""
        known = [phase.tokens for phase in self.phases]
        return None if None in known else sum(n for n in known if n is not None)

    def text(self) -> str:
        """For a terminal."""
        lines = [f"recipe   {self.name}: {len(self.phases)} phase{'s' * (len(self.phases) != 1)}"]
        for i, phase in enumerate(self.phases):
            lines += ["", *(_growth_lines(phase.grows) if phase.grows else []), *self._phase(i, phase)]
        total = " and ".join(filter(None, (_count(self.tokens, "tokens"), _count(self.flops, "FLOPs"))))
        return "\n".join([*lines, "", f"total    {total or 'not known before it ends'}"])

    def _phase(self, i: int, phase: PhasePlan) -> list[str]:
        ends = " or ".join(filter(None, (None if phase.steps is None else f"{phase.steps:,} steps", phase.until)))
        spent = ", ".join(filter(None, (_count(phase.tokens, "tokens"), _count(phase.flops, "FLOPs"))))
        layers = f"{phase.layers_run:.3g} layers run a step" + (" on average" if phase.layers_run % 1 else "")
        lines = [
            f"phase {i}  {phase.name}: {ends}" + (f" ({spent})" if spent else ""),
            f"  model    {phase.model}, {phase.parameters:,} parameters",
            f"  program  {phase.program}: {layers}, {phase.flops_a_token / 1e6:.4g} MFLOP a token",
        ]
        if phase.memory is not None:
            lines.append(
                f"  memory   {phase.memory / 1e9:.3g} GB a rank of {self.ranks} at ZeRO stage {self.stage} in "
                f"{self.precision}, beside activations"
            )
        return lines


def plan_recipe(recipe: Recipe, ds_config: Path | None, ranks: int) -> RecipePlan:
    """Plan a recipe that knows its model. ds_config: for stage and precision. Raises UserError of all kinds."""
    check(recipe)
    raw = None if ds_config is None else configs.read(ds_config)
    found = []
    for i, phase in enumerate(recipe.phases):
        settings = None if raw is None else configs.of_phase(raw, recipe, i, ranks)
        found.append(_planned(recipe, i, phase, settings, ranks))
    stage = None if raw is None else configs.stage(raw)
    precision = None if raw is None else configs.precision(raw)
    return RecipePlan(recipe.name, tuple(found), ranks, stage, precision)


def _planned(recipe: Recipe, i: int, phase: Phase, settings: Mapping[str, Any] | None, ranks: int) -> PhasePlan:
    config, own = registry.typed(recipe.models[i]), recipe.at(i)
    table = table_for(config)
    name = registry.class_of(config)
    heads = table.names.classes[name]
    parameters = table.parameters(config, heads)
    numel = sum(prod(p.shape) for p in parameters.values())
    sizes = table.axis_sizes(config)
    parts = tuple(dict.fromkeys(p.part for p in parameters.values() if p.layer is not None))
    length = own.data.seq_len
    predicted = round(own.predicts.mlm_probability * length) if isinstance(own.predicts, Masked) else length
    work = Work((length,), predicted, (length,) if "decoder" in heads else ())
    flops, costs, run = Flops(config, heads), [], []
    for number in range(_DRAWS):
        step = phase.program.step(Draw(number, number, recipe.seed, parts, frozenset(parts[len(parts) // 2 :])))
        costs.append(flops.step(work, step.run, step.learn))
        run.append(len(step.run))
    a_token = mean(costs) / length
    tokens = None if phase.steps is None else phase.steps * own.global_batch_size * length
    layers = " + ".join(str(sizes[axis]) for axis in table.sizes.depth)
    return PhasePlan(
        name=phase.name,
        model=f"{name}, {layers} layers x {sizes['embed']}",
        parameters=numel,
        program=phase.program.kind,
        layers_run=mean(run),
        steps=phase.steps,
        until=None if phase.until is None else f"until {phase.until.kind}",
        tokens=tokens,
        flops=None if tokens is None else a_token * tokens,
        flops_a_token=a_token,
        memory=None if settings is None else states(numel, settings, ranks),
        grows=None if phase.grow is None else _growth(recipe, i, numel),
    )


def _growth(recipe: Recipe, i: int, numel: int) -> dict[str, Any]:
    """What the growth before a phase does and costs. numel: of the grown model."""
    plan, before = growth_of(recipe, i)
    return {
        "axes": {axis: list(pair) for axis, pair in plan.recipe["axes"].items()},
        **({"embeddings": plan.recipe["embeddings"]} if "embeddings" in plan.recipe else {}),
        "bytes_read": 12 * before,
        "bytes_written": 12 * numel,
        **reasons(plan.exactness),
        "warnings": list(plan.warnings),
    }


def _growth_lines(grows: Mapping[str, Any]) -> list[str]:
    axes = ", ".join(f"{axis} {old} -> {new}" for axis, (old, new) in grows["axes"].items()) or "sizes unchanged"
    kept = "exact" if not grows["function"] else "not exact: " + "; ".join(grows["function"])
    return [
        f"growth   {axes}" + (f", embeddings {grows['embeddings']}" if "embeddings" in grows else ""),
        f"  function {kept}",
        f"  disk     {grows['bytes_read'] / 1e9:.3g} GB read, {grows['bytes_written'] / 1e9:.3g} GB written",
    ]


def states(numel: int, settings: Mapping[str, Any], ranks: int) -> int:
    """Bytes that a rank holds of weights, gradients and optimizer states (Rajbhandari et al. 2020, arXiv 1910.02054,
    section 5): float32 master weights and two moments beside what the precision needs; ZeRO stage 1 shares the states
    out among the ranks, 2 the gradients, too, 3 the weights."""
    word, stage = _WORDS[configs.precision(settings)], configs.stage(settings)
    masters = 8 if word == 4 and stage == 0 else 12  # stage 0 in fp32 steps the weights themselves
    weights, gradients, optimizer = word * numel, word * numel, masters * numel
    return (
        weights // (ranks if stage >= 3 else 1)
        + gradients // (ranks if stage >= 2 else 1)
        + optimizer // (ranks if stage >= 1 else 1)
    )


def _count(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.4g} {unit}"
