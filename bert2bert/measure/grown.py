"""Compare a grown checkpoint with the plan of its growth, and with its source: tensors, function, gradients.

A check that fails is a result, not an error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bert2bert.algebra.plan import Exactness, GrowthPlan
from bert2bert.algebra.realise import values
from bert2bert.algebra.states import MOMENTS
from bert2bert.checkpoints.zero.layout import row_blocks
from bert2bert.errors import some
from bert2bert.growth.opened import Growth
from bert2bert.growth.source_model import CheckpointModel
from bert2bert.measure.checks import Check
from bert2bert.measure.drift import Drift, compare, gradient_error, gradients_memory
from bert2bert.measure.rounding import Blocks, Comparison
from bert2bert.measure.tokens import Tokens
from bert2bert.measure.transformers_models import NoReference, precision

# An exact growth in float32 differs by the rounding of its shares (1/3 is not a float), and T5, which scales no scores,
# magnifies that to 5e-6; 16-bit files differ by more.
TOLERANCE = {"float32": 5e-5, "float64": 5e-5, "float16": 2e-2, "bfloat16": 1.5e-1}
# The rule holds for the numbers of the plan itself, so only the arithmetic of the run is between the two.
_GRADIENT = {torch.float64: 1e-6, torch.float32: 1e-2}
_LITTLE = 1e8  # bytes
_RUN = {"float64": 0.0, "float32": 1e-4}
# Of the plan's numbers in float64, whose rounding a model magnifies by up to 10^7; in float32 that is not a test.
_RULE = {"float64": 1e-8, "float32": 0.0}


def check_accounted(growth: Growth, target: CheckpointModel, check: Check) -> None:
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
        "what transformers does not read": list(model.left),
        "not part of the grown model": [n for n in rest if n not in copies | old],
        "buffers that it does not hold": [n for n in gone if n not in old],
        "not in the source's files": list(model.source.unread),
    }
    summary = f"{len(took)} of the source's {len(model.source.tensors)} tensors make the target's {len(wanted)}"
    summary += "".join(f"; {what}: {some(names)}" for what, names in left.items() if names)
    check("tensors", not odd, f"{len(odd)} are missing or not the plan's, first {odd[0]}" if odd else summary)


def check_tensors(growth: Growth, target: CheckpointModel, check: Check) -> None:
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


def unrounded(growth: Growth | None, tokens: Tokens) -> Drift | None:
    """The drift of the plan's own numbers in float64, which no file has rounded; None without a plan."""
    if growth is None:
        return None
    read = values(growth.plan, growth.reads, torch.float64)
    return compare(growth.model, lambda n, start, stop: read(n, "fp32", start, stop), growth.plan.config, tokens)


def check_function(
    target: CheckpointModel, found: Drift, kept: Exactness, unrounded: Callable[[], Drift | None], check: Check
) -> None:
    """Logits (of the tokens that the source knows) and loss are equal, as far as the dtypes of file and run allow,
    where the plan promises it. A model may magnify rounding beyond that (noise many times as large as the weights):
    then the plan's own numbers have to be equal, for the files were compared with them bit for bit."""
    stored = {meta.dtype for meta in target.source.tensors.values()} if target.source.format == "hub" else {"float32"}
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


def unpromised(plan: GrowthPlan) -> tuple[str, ...]:
    """Why the grown model's gradients are not those that the plan makes."""
    return plan.exactness.moments or plan.exactness.function


def gradients_take(model: CheckpointModel, plan: GrowthPlan) -> str:
    """The memory that the comparison of gradients takes, in words; '' where there is not enough, or it is little."""
    numel = gradients_memory(model, plan.config)
    try:
        dtype = precision(numel, "the gradients of both models")
    except NoReference:
        return ""
    return f"{numel * dtype.itemsize / 1e9:.2g} GB of memory" if numel * dtype.itemsize > _LITTLE else ""


def check_gradients(model: CheckpointModel, plan: GrowthPlan, tokens: Tokens, check: Check) -> None:
    """The rule by which the moments were made, where the plan promises that it is the gradient's."""
    if reasons := unpromised(plan):
        check("gradients", True, f"not promised: {reasons[0]}")
        return
    try:
        worst, name, dtype = gradient_error(model, plan, tokens)
    except NoReference as error:  # a comparison more, which needs more memory than the others, or transformers
        check("gradients", True, f"not compared: {str(error).splitlines()[0]}")
        return
    limit = _GRADIENT[dtype]
    check("gradients", worst <= limit, f"{worst:.3g} of the largest entry at most, allowed {limit:g} (worst {name})")
