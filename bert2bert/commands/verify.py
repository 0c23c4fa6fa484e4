"""Check a grown checkpoint: every tensor and moment against the plan, its function and gradients against the source.

The plan is rebuilt from the growth manifest and must have the stored digest. Every tensor and buffer of both sides is
accounted for, and every row of every state of every tensor compared bit for bit; what a narrower dtype rounded is
counted. Logits and loss of both models are compared on the same tokens. The grown model's gradients are compared with
those that the plan makes of the source's by the rule for moments (see `measure.drift`); both models must fit in memory.

A checkpoint that `reshard` wrote is compared with its source bit for bit, and no model is run.

Refuses a grown checkpoint that is not a model of its own config (`InvalidCheckpoint`), and models that cannot be run
(`NoReference`). A check that fails is a result, not an error: it is in the report and in the exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert2bert.algebra.plan import Exactness, GrowthPlan
from bert2bert.checkpoints.manifest import Grown
from bert2bert.checkpoints.open import open_source
from bert2bert.errors import InvalidConfig
from bert2bert.growth.opened import Growth, between
from bert2bert.growth.source_model import CheckpointModel, open_model
from bert2bert.growth.steps import replan
from bert2bert.measure import resharded
from bert2bert.measure.checks import Check, Checks, Verified
from bert2bert.measure.drift import compare, weights
from bert2bert.measure.grown import (
    check_accounted,
    check_function,
    check_gradients,
    check_tensors,
    gradients_take,
    unpromised,
    unrounded,
)
from bert2bert.measure.tokens import Tokens
from bert2bert.measure.tokens import check as check_tokens


def verify(
    source: Path,
    grown: Path,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    grown_tag: str | None = None,
    bins: Path | None = None,
    tokens: Path | None = None,
    logits: bool = True,
    other: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Verified:
    """Compare a grown checkpoint with its source.

    bins, tokens: compare functions on held-out text, or on the token ids of a file, instead of random tokens. logits:
    whether to compare functions and gradients at all; without, no model is run. other: the checkpoint that the grown
    one was interpolated with. say: receives a line before something that takes much memory.
    """
    if (found := _verify_resharded(source, grown, tag, grown_tag)) is not None:
        return found
    model = open_model(source, source_config, tag)
    target = open_model(grown, tag=grown_tag)
    given = Tokens(bins, tokens)
    both = (model, target)
    check_tokens(given, min(m.table.axis_sizes(m.config)["vocab"] for m in both), *both)
    checks = Checks()
    runs = logits and "lm" in model.heads and "lm" in target.heads
    growth = _rebuilt(model, target, other, checks)
    if growth is not None:
        takes = gradients_take(model, growth.plan) if runs and not unpromised(growth.plan) else ""
        if takes:  # before the hours that reading everything may take
            why = "gradients will be compared on both models whole, which takes"
            say(f"note     {why} {takes}; --no-logits leaves them out")
        check_accounted(growth, target, checks)
        check_tensors(growth, target, checks)
    if not runs:
        why = "left out as asked" if not logits else "no language-model head in this checkpoint, so there are none"
        checks("logits", True, why)
        return checks.verified()
    drift = compare(model, weights(target), target.config, given)
    kept, intact = growth.plan.exactness if growth else Exactness(), growth if checks.ok else None
    check_function(target, drift, kept, lambda: unrounded(intact, given), checks)
    if growth is not None:
        check_gradients(model, growth.plan, given, checks)
    return checks.verified(drift)


def _verify_resharded(source: Path, written: Path, tag: str | None, written_tag: str | None) -> Verified | None:
    """The result for a checkpoint that `reshard` wrote of the source, of any model; None if it is of another."""
    target = open_source(written, written_tag)
    if target.manifest is None or target.manifest.reshard is None:
        return None
    whole_source = open_source(source, tag)
    if not resharded.is_reshard(whole_source, target):
        return None
    checks = Checks()
    resharded.compare(whole_source, target, checks)
    return checks.verified()


def _rebuilt(model: CheckpointModel, target: CheckpointModel, other: Path | None, check: Check) -> Growth | None:
    """The growth that the target's manifest describes, its sources and its plan's digest checked; None without one."""
    grown_by = target.source.manifest.growth if target.source.manifest else None
    if grown_by is None:
        detail = "no growth manifest: only the function is compared, and it is expected to be equal"
        check("manifest", True, detail)
        return None
    second = _second(other, grown_by)
    for name, of, recorded in (("source", model, grown_by.source), ("with", second, grown_by.other or {})):
        if of is not None:
            _check_source(name, of, recorded, check)
    growth = Growth(model, _replan(model, second, target, grown_by.operators), second)
    digest = growth.plan.digest()
    same = digest == grown_by.plan_digest
    check("plan", same, digest[:16] if same else "rebuilt from the manifest, it has another digest")
    return growth


def _second(other: Path | None, grown_by: Grown) -> CheckpointModel | None:
    """The checkpoint that a growth interpolated with. Raises InvalidConfig where it is missing or out of place."""
    recorded = grown_by.other
    if (other is None) != (recorded is None):
        raise InvalidConfig(
            f"the growth interpolated with {recorded['path']}; give that checkpoint with --with"
            if recorded
            else "--with: the growth started from one checkpoint alone; leave it out"
        )
    return open_model(other) if other is not None else None


def _check_source(name: str, model: CheckpointModel, recorded: Mapping[str, Any], check: Check) -> None:
    mine = model.source.identity()
    keys = [k for k in recorded if k != "path" and mine.get(k) != recorded[k]]
    was = f"grown from tag {recorded.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(keys)})"
    check(name, not keys, f"{was}; choose it with --tag" if keys else "the checkpoint that was grown")


def _replan(
    model: CheckpointModel, second: CheckpointModel | None, target: CheckpointModel, how: Mapping[str, Any]
) -> GrowthPlan:
    if second is not None:
        own = how["interpolate"][-1]
        plan = _replan(model, None, target, own)
        plan = replace(plan, config=target.config)
        return between(second, model, plan, how["alpha"], own["moments"])
    # a growth may have scaled the norms' epsilon: it was asked for with the source's, for no other is let through
    mine, theirs = model.table.norms.eps[0], target.table.norms.eps[0]
    asked = {key: value for key, value in target.config.items() if key != theirs}
    if mine in model.config:
        asked[theirs] = model.config[mine]
    return replan({**how, "heads": model.heads}, asked, model.config)
