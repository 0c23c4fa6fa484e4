"""How far the gradients of neighbouring layers agree, where layers share their weights.

Share-then-unshare's measure (Yang et al. 2021, arXiv 2110.03848): layers that want different things should have weights
of their own. Autograd gives a shared layer one gradient, of all its uses together. That of each use is computed here
from what went into each linear map and the gradient of what came out of it, so that the engine's own gradients stay
untouched and nothing is unshared. Costs a forward and a backward pass, and holds the gradients of an unshared model in
float32 on every rank while it computes: ask for it every so many steps only.

Refused (`InvalidConfig`): a step that names what the model lacks. Left out: norms, biases, look-ups and the matrices of
a mixture's experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bert2bert.model.batch import Batch
from bert2bert.model.modules import Conv1D
from bert2bert.model.program import Step
from bert2bert.train.engine import Engine

Gradients = dict[str, Tensor]
"""Of the linear maps in one place of a run, by their path in the layer: [outputs, inputs] each, float32."""


def correlations(engine: Engine, batches: Iterable[Batch], step: Step) -> list[float]:
    """Pearson's correlation of the gradients in neighbouring places of ``step.run``, over the entries of all linear
    maps that both have, of the mean loss of ``batches`` (as many on every rank, on any device) over all ranks.

    Only neighbours that run the same layer count, unless there are none: two groups of layers that share nothing with
    each other need not agree. Places where no gradient is computed are left out. Collective; the model's dropout draws,
    but from a copy of the random state. Raises InvalidConfig.
    """
    model = engine.model
    step.check(model.parts)
    found: list[Gradients] = [{} for _ in step.run]
    recompute, model.recompute = model.recompute, False  # else every map would be seen twice
    devices = [engine.device] if engine.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            for batch in batches:
                _add(engine, batch.to(engine.device), step, found)
    finally:
        model.recompute = recompute
    if engine.stage == 3:
        engine.ds.empty_partition_cache()  # parameters that were gathered for a gradient that nobody asked for
    for place in found:
        for name in sorted(place):
            torch.distributed.all_reduce(place[name])
    pairs = list(pairwise((number, place) for number, place in zip(step.run, found, strict=True) if place))
    alike = [pair for pair in pairs if pair[0][0] == pair[1][0]]
    return [_correlation(a, b) for (_, a), (_, b) in alike or pairs]


def _add(engine: Engine, batch: Batch, step: Step, found: list[Gradients]) -> None:
    """Add the gradients of one batch's loss."""
    with _watched(engine.model, step) as calls, torch.enable_grad():
        loss = engine.model(batch, step).loss  # not by way of DeepSpeed, which would count it as a training step's
    seen = [call for call in calls if call[3].requires_grad]
    slopes = torch.autograd.grad(loss * (engine.loss_scale or 1.0), [call[3] for call in seen], allow_unused=True)
    for (place, name, given, _), slope in zip(seen, slopes, strict=True):
        if slope is not None:
            gradient = slope.flatten(0, -2).float().T @ given.flatten(0, -2).float()
            found[place][name] = found[place].get(name, 0) + gradient


@contextmanager
def _watched(model: Any, step: Step) -> Iterator[list[tuple[int, str, Tensor, Tensor]]]:
    """Every call of a linear map in the layers that run: its place, its path in the layer, its input and output."""
    calls: list[tuple[int, str, Tensor, Tensor]] = []
    places = {number: [i for i, other in enumerate(step.run) if other == number] for number in step.run}
    count: dict[tuple[int, str], int] = {}

    def watch(number: int, name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        use = count[number, name] = count.get((number, name), -1) + 1
        calls.append((places[number][use], name, given[0].detach(), output))

    maps = [
        (number, name, module)
        for number in places
        for name, module in model.layers[number].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    hooks = [module.register_forward_hook(partial(watch, number, name)) for number, name, module in maps]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _correlation(one: Gradients, other: Gradients) -> float:
    """Of the entries of the maps of one shape that both have; 0 where one of them is constant, 1 where one overflowed,
    for that is no sign of disagreement."""
    names = [name for name in one if name in other and one[name].shape == other[name].shape]
    a, b = (torch.cat([place[name].flatten() for name in names]).double() for place in (one, other))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    if not math.isfinite(size):
        return 1.0
    return float(a @ b) / size if size > 0 else 0.0
