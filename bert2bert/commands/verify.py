"""Check a grown checkpoint: every tensor and moment against the plan, its function and gradients against the source.

The plan is rebuilt from the growth manifest and must have the stored digest. Every tensor and buffer of both sides is
accounted for, and every row of every state of every tensor compared bit for bit; what a narrower dtype rounded is
counted. Logits and loss of the files' models are compared on the same tokens, and the gradients of a sample with those
that the plan makes of the source's, as its moments were made, see `drift`: these need both models in memory.

A checkpoint that `reshard` wrote is compared with its source bit for bit, and no model is run.

Refuses a grown checkpoint that is not a model of its own config (`InvalidCheckpoint`), and models that cannot be run
(`NoReference`). A check that fails is a result, not an error: it is in the report and in the exit code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bert2bert.algebra.plan import Exactness, GrowthPlan
from bert2bert.algebra.realise import values
from bert2bert.algebra.states import MOMENTS
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.zero.layout import row_blocks
from bert2bert.errors import InvalidConfig, some
from bert2bert.growth.opened import Growth, between
from bert2bert.growth.source_model import CheckpointModel, open_model
from bert2bert.growth.steps import replan
from bert2bert.measure import resharded
from bert2bert.measure.drift import Drift, compare, gradient_error, gradients_memory, weights
from bert2bert.measure.rounding import Blocks, Comparison
from bert2bert.measure.tokens import Tokens
from bert2bert.measure.tokens import check as check_tokens
from bert2bert.measure.transformers_models import NoReference, precision

Check = Callable[[str, bool, str], None]

# An exact growth in float32 differs by the rounding of its shares (1/3 is no float), and T5, which scales no scores,
# magnifies that to 5e-6; 16-bit files differ by more.
TOLERANCE = {"float32": 5e-5, "float64": 5e-5, "float16": 2e-2, "bfloat16": 1.5e-1}
# The rule holds for the numbers of the plan itself, so only the arithmetic of the run is between the two.
_GRADIENT = {torch.float64: 1e-6, torch.float32: 1e-2}
_LITTLE = 1e8  # bytes
_RUN = {"float64": 0.0, "float32": 1e-4}
# Of the plan's numbers in float64, whose rounding a model magnifies by up to 10^7; in float32 it tells nothing.
_RULE = {"float64": 1e-8, "float32": 0.0}


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
) -> dict[str, Any]:
    """Compare a grown checkpoint with its source. Returns {"ok", "checks": [{"name", "ok", "detail"}], "drift"}.

    bins, tokens: compare functions on held-out text, or on the token ids of a file, in place of random tokens.
    logits: whether to compare functions and gradients at all; without, no model is run. other: the checkpoint that the
    grown one was interpolated with. say: told what takes long or much memory before it begins.
    """
    if (anew := _anew(source, grown, tag, grown_tag)) is not None:
        return anew
    model = open_model(source, source_config, tag)
    target = open_model(grown, tag=grown_tag)
    given = Tokens(bins, tokens)
    both = (model, target)
    check_tokens(given, min(m.table.axis_sizes(m.config)["vocab"] for m in both), *both)
    manifest = (target.source.manifest or {}).get("growth")
    checks: list[dict[str, Any]] = []

    def check(name: str, ok: bool, detail: str) -> None:
        checks.append(_entry(name, ok, detail))

    runs = logits and "mlm" in model.heads and "mlm" in target.heads
    plan, growth = None, None
    if manifest is None:
        detail = "no growth manifest: only the function is compared, and it is expected to be equal"
        check("manifest", True, detail)
    else:
        second = _second(other, manifest)
        for name, of, recorded in (("source", model, manifest["source"]), ("with", second, manifest.get("with"))):
            if of is not None:
                _check_source(name, of, recorded, check)
        growth = Growth(model, _replan(model, second, target, manifest["operators"]), second)
        plan = growth.plan
        same = plan.digest() == manifest["plan_digest"]
        check("plan", same, plan.digest()[:16] if same else "rebuilt from the manifest, it has another digest")
        gradients = runs and not _unpromised(plan)
        if gradients and (taken := _gradients_take(model, plan)):  # before the hours that reading everything may take
            why = "gradients will be compared on both models whole, which takes"
            say(f"note     {why} {taken}; --no-logits leaves them out")
        _check_accounted(growth, target, check)
        _check_tensors(growth, target, check)
    found = None
    if runs:
        found = compare(model, weights(target), target.config, given)
        intact = growth if all(c["ok"] for c in checks) else None
        kept = plan.exactness if plan else Exactness()
        _check_function(target, found, kept, lambda: _unrounded(intact, given), check)
        if plan is not None:
            _check_gradients(model, plan, given, check)
    else:
        why = "left out as asked" if not logits else "no language-model head in this checkpoint, so there are none"
        check("logits", True, why)
    return {"ok": all(c["ok"] for c in checks), "checks": checks, "drift": found.as_dict() if found else None}


def _anew(source: Path, written: Path, tag: str | None, written_tag: str | None) -> dict[str, Any] | None:
    """The report on a checkpoint that `reshard` wrote of the source, of any model; None if it is of another."""
    target = open_source(written, written_tag)
    if not (target.manifest or {}).get("reshard"):
        return None
    whole_source = open_source(source, tag)
    if not resharded.is_reshard(whole_source, target):
        return None
    checks: list[dict[str, Any]] = []
    resharded.compare(whole_source, target, lambda name, ok, detail: checks.append(_entry(name, ok, detail)))
    return {"ok": all(c["ok"] for c in checks), "checks": checks, "drift": None}


def _entry(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": bool(ok), "detail": detail}


def _second(other: Path | None, manifest: dict[str, Any]) -> CheckpointModel | None:
    """The checkpoint that a growth interpolated with. Raises InvalidConfig where it is missing or out of place."""
    recorded = manifest.get("with")
    if (other is None) != (recorded is None):
        raise InvalidConfig(
            f"the growth interpolated with {recorded['path']}; give that checkpoint with --with"
            if recorded
            else "--with: the growth started from one checkpoint alone; leave it out"
        )
    return open_model(other) if other is not None else None


def _check_source(name: str, model: CheckpointModel, recorded: dict[str, Any], check: Check) -> None:
    mine = model.source.identity()
    keys = [k for k in recorded if k != "path" and mine.get(k) != recorded[k]]
    was = f"grown from tag {recorded.get('tag')}, this is {mine.get('tag')} (differs in {', '.join(keys)})"
    check(name, not keys, f"{was}; choose it with --tag" if keys else "the checkpoint that was grown")


def _replan(
    model: CheckpointModel, second: CheckpointModel | None, target: CheckpointModel, how: dict[str, Any]
) -> GrowthPlan:
    if second is not None:
        own = how["interpolate"][-1]
        plan = _replan(model, None, target, own)
        plan = replace(plan, config=target.config)
        return between(second, model, plan, how["alpha"], own["moments"])
    # a growth may have scaled the norms' epsilon: it was asked for with the source's, for no other is let through
    mine, theirs = model.table.eps[0], target.table.eps[0]
    asked = {key: value for key, value in target.config.items() if key != theirs}
    if mine in model.config:
        asked[theirs] = model.config[mine]
    return replan({**how, "heads": model.heads}, asked, model.config)


def _unrounded(growth: Growth | None, tokens: Tokens) -> Drift | None:
    """The drift of the plan's own numbers in float64, which no file has rounded; None without a plan."""
    if growth is None:
        return None
    read = values(growth.plan, growth.reads, torch.float64)
    return compare(growth.model, lambda n, start, stop: read(n, "fp32", start, stop), growth.plan.config, tokens)


def _check_function(
    target: CheckpointModel, found: Drift, kept: Exactness, unrounded: Callable[[], Drift | None], check: Check
) -> None:
    """Logits (of the tokens that the source knows) and loss are equal, as far as the dtypes of file and run allow,
    where the plan promises it. A model may magnify rounding beyond that (noise many times as large as the weights):
    then the plan's own numbers have to be equal, for the files were compared with them bit for bit."""
    stored = {meta.dtype for meta in target.source.tensors.values()} if target.source.form == "hub" else {"float32"}
    limit = max(_RUN[found.dtype], *(TOLERANCE[dtype] for dtype in stored))
    losses = f"{found.loss_source:.6g} -> {found.loss_grown:.6g}" if found.loss_source is not None else ""
    if not kept.logits:
        detail = f"not promised: {found.logits_relative:.3g} relative on {found.text}"
        check("logits", True, detail + (f", loss {losses}" if losses else ""))
        return
    detail = f"{found.logits_relative:.3g} relative, at most {limit:g}, on {found.text}"
    if found.logits_relative > limit and (before := unrounded()) and before.logits_relative <= _RULE[before.dtype]:
        detail = f"{found.logits_relative:.3g} relative, {before.logits_relative:.3g} before rounding, on {found.text}"
        limit = found.logits_relative
    check("logits", found.logits_relative <= limit, detail)
    if found.loss_source is None or found.loss_grown is None:
        return  # random tokens
    if kept.softmax:
        check("loss", True, f"not promised, for new tokens enter the softmax: {losses}")
        return
    gap = abs(found.loss_grown - found.loss_source)
    check("loss", gap <= limit * max(1.0, found.loss_source), losses)


def _unpromised(plan: GrowthPlan) -> tuple[str, ...]:
    """Why the grown model's gradients are not those that the plan makes."""
    return plan.exactness.moments or plan.exactness.function


def _gradients_take(model: CheckpointModel, plan: GrowthPlan) -> str:
    """The memory that the comparison of gradients takes, in words; '' where there is not enough, or it is little."""
    numel = gradients_memory(model, plan.config)
    try:
        dtype = precision(numel, "the gradients of both models")
    except NoReference:
        return ""
    return f"{numel * dtype.itemsize / 1e9:.2g} GB of memory" if numel * dtype.itemsize > _LITTLE else ""


def _check_gradients(model: CheckpointModel, plan: GrowthPlan, tokens: Tokens, check: Check) -> None:
    """The rule by which the moments were made, where the plan promises that it is the gradient's."""
    if reasons := _unpromised(plan):
        check("gradients", True, f"not promised: {reasons[0]}")
        return
    try:
        worst, name, dtype = gradient_error(model, plan, tokens)
    except NoReference as error:  # a comparison more, which needs more memory than the others, or transformers
        check("gradients", True, f"not compared: {str(error).splitlines()[0]}")
        return
    limit = _GRADIENT[dtype]
    check("gradients", worst <= limit, f"{worst:.3g} of the largest entry at most, allowed {limit:g} (worst {name})")


def _check_accounted(growth: Growth, target: CheckpointModel, check: Check) -> None:
    """Every tensor and buffer of the source takes part or is named, and every tensor of the target is the plan's."""
    model, plan, held = growth.model, growth.plan, target.source.tensors
    wanted = {target.stored(name): tensor.shape for name, tensor in plan.tensors.items()}
    odd = [n for n, shape in wanted.items() if n not in held or held[n].shape != shape]
    odd += [
        n
        for n in held
        if n not in wanted and n not in {target.stored(alias) for alias in plan.aliases} | {*target.left}
    ]
    took = {model.stored(root) for name in plan.tensors for root in growth.roots(name)}
    copies, old = {model.stored(alias) for alias in model.aliases()}, set(model.left)
    rest = [n for n in model.source.tensors if n not in took]
    gone = [n for n in model.source.buffers if n not in target.source.buffers]
    left = {
        "copies of tied tensors": [n for n in rest if n in copies],
        "what no current model has": list(model.left),
        "not part of the grown model": [n for n in rest if n not in copies | old],
        "buffers that it does not hold": [n for n in gone if n not in old],
        "not in the source's files": list(model.source.unread),
    }
    said = f"{len(took)} of the source's {len(model.source.tensors)} tensors make the target's {len(wanted)}"
    said += "".join(f"; {what}: {some(names)}" for what, names in left.items() if names)
    check("tensors", not odd, f"{len(odd)} are missing or not the plan's, first {odd[0]}" if odd else said)


def _check_tensors(growth: Growth, target: CheckpointModel, check: Check) -> None:
    """Every state of every tensor against the plan, and the step counts against the source's."""
    model, plan = growth.model, growth.plan
    for state in target.source.states:
        compared = Comparison()
        for name in plan.tensors:
            compared.add(name, _blocks(growth, target, name, state))
        compared.report("weights" if state == "fp32" else state, check)
    if all(m in target.source.states and m in model.source.states for m in MOMENTS):
        steps = _steps(growth, target)
        off = [f"{n}: {a} in the source, {b} grown" for n, (a, b) in steps.items() if a != b]
        check("step", not off, off[0] if off else f"kept ({', '.join(sorted({str(a) for a, _ in steps.values()}))})")


def _steps(growth: Growth, target: CheckpointModel) -> dict[str, tuple[int, int]]:
    """Adam steps of every target tensor, expected and found. A group has one count, the largest of its origins."""
    origin = {}
    for name, tensor in growth.plan.tensors.items():
        roots = [] if tensor.reset else growth.roots(name)
        origin[target.stored(name)] = growth.model.source.step(growth.model.stored(roots[0])) if roots else 0
    expected = dict(origin)
    for group in target.source.groups:
        for name in group["names"]:
            expected[name] = max(origin[member] for member in group["names"])
    return {name: (expected[name], target.source.step(name)) for name in origin}


def _blocks(growth: Growth, target: CheckpointModel, name: str, state: str) -> Blocks:
    expect = values(growth.plan, growth.reads)
    # a source of weights only gives an optimizer that has not stepped
    known = state in growth.model.source.states
    for start, stop in row_blocks(growth.plan.tensors[name].shape):
        found = target.read(name, state, start, stop)
        yield expect(name, state, start, stop) if known else torch.zeros_like(found), found


def render(report: dict[str, Any]) -> str:
    """The report as a table for a terminal."""
    lines = [f"{'ok' if c['ok'] else 'FAILED':7} {c['name']:11} {c['detail']}" for c in report["checks"]]
    return "\n".join([*lines, "verified" if report["ok"] else "NOT verified"])
