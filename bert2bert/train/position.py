"""Where a run stands, and whether a recipe can go on from there.

Refuses (InvalidConfig) what would give the position another meaning: other data, another tokenizer, seed, row length or
objective, and phases already run that are no longer those of the recipe. Other changes (learning rate, more steps or
phases) are allowed and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert2bert.checkpoints.manifest import Trained
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Recipe, renamed

# Changing these says nothing about what is learned.
_FREE = ("name", "data.bins", "data.eval_rows", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every")


@dataclass(frozen=True)
class Progress:
    """``step``: optimizer steps done; ``phase``, ``phase_step``: of the next one (or of the end); ``rows``: rows that
    the loader has given out, over all ranks; ``spent``: "flops", "seconds", "tokens", "steps"."""

    step: int
    phase: int
    phase_step: int
    rows: int
    spent: dict[str, float]


def start() -> Progress:
    """The position of a run that begins."""
    return Progress(0, 0, 0, 0, {"flops": 0.0, "seconds": 0.0, "tokens": 0, "steps": 0})


def continued(training: Trained, folder: Path, recipe: Recipe, data: Mapping[str, Any], notes: list[str]) -> Progress:
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
    phase, phase_step, step = training.phase, training.phase_step, training.step
    old, new = training.recipe["phases"], recipe.to_dict()["phases"]
    passed = [(p["name"], p["steps"]) for p in old[:phase]]
    kept = [(p["name"], p["steps"]) for p in new[:phase]]
    there = phase < len(new) and new[phase]["name"] == old[phase]["name"] and new[phase]["steps"] >= phase_step
    if passed != kept or not there:
        raise InvalidConfig(
            f"the recipe's phases are {_listed(new)}, but {folder} stands at step {phase_step} of phase "
            f"{old[phase]['name']!r} of {_listed(old)}. Phases already run must stay as they were, and the one under "
            "way can only get longer"
        )
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k not in _FREE]
    if changed:
        said = ", ".join(f"{k}: {before.get(k)!r} → {now.get(k)!r}" for k in changed[:6])
        notes.append(f"the recipe differs from that of the checkpoint's run ({said}); its values hold from here on")
    return Progress(step, phase, phase_step, training.data["rows"], dict(training.spent))


def _listed(phases: list[dict[str, Any]]) -> str:
    return ", ".join(f"{p['name']!r} ({p['steps']} steps)" for p in phases)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested dicts and lists."""
    if isinstance(tree, dict | list) and tree:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        below = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items)
        return {key: value for part in below for key, value in part.items()}
    return {prefix: tree}
