"""How far a grown model is from its source on the same tokens: logits, loss, and the gradients by which it would learn.

Logits come from this project's cores or from transformers' models, in float64 where that fits and else in float32, with
the weights read as they are needed: no model is in memory, nor are its logits, which are compared block by block of
the vocabulary. Only gradients need both models whole. On random tokens there is no loss to speak of: it is None.

Refuses what `tokens` and `transformers_models` refuse, and a model with fewer positions than the source
(`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bert2bert.algebra.plan import GrowthPlan
from bert2bert.algebra.realise import Read, values
from bert2bert.errors import InvalidConfig
from bert2bert.growth.source_model import CheckpointModel
from bert2bert.measure import transformers_models
from bert2bert.measure.streamed import Passed, passed
from bert2bert.measure.tokens import Tokens, draw, positions
from bert2bert.measure.transformers_models import Fetch
from bert2bert.model.registry import objective_of
from bert2bert.model.streaming import BLOCK, Rows
from bert2bert.tables import Parameter, table_for

if TYPE_CHECKING:
    from bert2bert.growth.opened import Growth

_LONG = 1e9  # parameters of both models from which on a comparison is announced


@dataclass(frozen=True)
class Drift:
    """How far two models are apart on the same tokens. loss: nats a prediction, source and grown, None on random
    tokens; logits_relative: |grown - source| / |source| in the Euclidean norm; agreement: share of equal best guesses.
    Logits are those of the tokens that the source knows, and a next-sentence head's; a loss is a language model's over
    all tokens. dtype: that both ran in."""

    tokens: int
    predictions: int
    text: str
    loss_source: float | None
    loss_grown: float | None
    logits_max: float
    logits_relative: float
    agreement: float
    dtype: str = "float64"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    def render(self) -> str:
        """One line for a terminal."""
        loss = "" if self.loss_source is None else f"loss {self.loss_source:.6g} -> {self.loss_grown:.6g} nats; "
        return (
            f"drift    {loss}logits differ by {self.logits_relative:.3g} relative, {self.logits_max:.3g} at most; "
            f"{100 * self.agreement:.4g} % equal best guesses ({self.predictions} predictions, {self.text})"
        )


def report_drift(growth: Growth, grown: Rows, tokens: Tokens, say: Callable[[str], None]) -> Drift | None:
    """The change of function that a growth will make, reported in one line before anything is written; where there is
    no reference to run, the reason, and None. grown: reads the weights that will be written."""
    total = sum(size(growth.model, config) for config in (growth.model.config, growth.plan.config))
    if total > _LONG:
        say(
            f"drift    being measured: {total / 1e9:.3g} B parameters are read once and run, one after the other: "
            "this takes minutes; --no-measure leaves it out"
        )
    try:
        found = compare(growth.model, grown, growth.plan.config, tokens)
    except transformers_models.NoReference as error:
        say(f"drift    not measured: {error}")
        return None
    say(found.render())
    return found


def weights(model: CheckpointModel) -> Rows:
    """The weights of a checkpoint by canonical name."""
    return lambda name, start, stop: model.read(name, "fp32", start, stop)


def planned(plan: GrowthPlan, reads: Sequence[Read], dtype: torch.dtype, state: str = "fp32") -> Fetch:
    """Whole tensors of a plan by name."""
    realised = values(plan, reads, dtype)
    return lambda name: realised(name, state, 0, plan.tensors[name].shape[0])


def whole(model: CheckpointModel, state: str = "fp32") -> Fetch:
    """Whole tensors of a checkpoint by canonical name."""
    return lambda name: model.read(name, state, 0, model.parameters[name].shape[0])


def compare(model: CheckpointModel, grown: Rows, config: Mapping[str, Any], tokens: Tokens) -> Drift:
    """A source against the model whose weights ``grown`` reads, which has the source's heads."""
    rows, table = positions(model), table_for(config)
    if "pos" in table.sizes.axes and (theirs := table.axis_sizes(config)["pos"] - table.sizes.first_position) < rows:
        raise InvalidConfig(
            f"a {table.model_type} of {theirs} positions cannot read what the source, a {model.table.model_type} of "
            f"{rows}, reads: no growth of this source made it; give a checkpoint that was grown from it"
        )
    numel, vocab = max(size(model, c) for c in (model.config, config)), _vocab(model.config, config)
    given = draw(model, vocab, tokens, numel)
    count = given.ids.numel()
    dtype = transformers_models.precision(
        max(_held(model, c, count) for c in (model.config, config)), "comparing logits"
    )
    source, other = (
        passed(c, model.heads, read, given, dtype) for c, read in ((model.config, weights(model)), (config, grown))
    )
    far = _distance(source, other, vocab)
    losses = far.losses if tokens.are_text else (None, None)
    return Drift(
        tokens=count,
        predictions=len(source.labels),
        text=tokens.text,
        loss_source=losses[0],
        loss_grown=losses[1],
        logits_max=far.largest,
        logits_relative=far.relative,
        agreement=far.agreement,
        dtype=str(dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class _Far:
    losses: tuple[float, float]
    largest: float
    relative: float
    agreement: float


@torch.no_grad()
def _distance(source: Passed, grown: Passed, vocab: int) -> _Far:
    """How far the logits of the first ``vocab`` tokens are apart, and each model's cross entropy over all its tokens;
    by blocks of the vocabulary."""
    both, count = (source, grown), len(source.labels)
    square = norm = 0.0
    largest = torch.zeros((), dtype=torch.float64)

    def differ(x: Tensor, y: Tensor) -> None:
        nonlocal square, norm, largest
        x, y = x.double(), y.double()
        norm += float(x.square().sum())
        y = y.sub_(x)
        square += float(y.square().sum())
        largest = torch.maximum(largest, y.abs_().max())

    sums = [torch.full((count,), -torch.inf, dtype=torch.float64) for _ in both]
    right = [torch.zeros(count, dtype=torch.float64) for _ in both]
    best = [
        (torch.full((count,), -torch.inf, dtype=p.hidden.dtype), torch.zeros(count, dtype=torch.int64)) for p in both
    ]
    step = max(1, BLOCK // max(count, source.hidden.shape[1], grown.hidden.shape[1]))
    for start in range(0, max(p.vocab for p in both), step):
        known = []
        for i, run in enumerate(both):
            stop = min(start + step, run.vocab)
            if stop <= start:
                continue
            logits = run.logits(start, stop)
            sums[i] = torch.logaddexp(sums[i], logits.double().logsumexp(1))
            at = ((run.labels >= start) & (run.labels < stop)).nonzero()[:, 0]
            right[i][at] = logits[at, run.labels[at] - start].double()
            if start < vocab:
                known.append(logits[:, : vocab - start])
                high, where = known[-1].max(1)
                better = high > best[i][0]
                best[i] = (torch.where(better, high, best[i][0]), torch.where(better, where + start, best[i][1]))
        if known:
            differ(*known)
    if source.pairs is not None and grown.pairs is not None:
        differ(source.pairs, grown.pairs)
    losses = [float((s - r).mean()) for s, r in zip(sums, right, strict=True)]
    equal = (best[0][1] == best[1][1]).double().mean()
    relative = (square / norm) ** 0.5 if norm else float("inf") if square else 0.0
    return _Far((losses[0], losses[1]), float(largest), relative, float(equal))


def gradient_error(model: CheckpointModel, plan: GrowthPlan, tokens: Tokens) -> tuple[float, str, torch.dtype]:
    """The gradient rule on a sample: the largest difference of the grown model's gradient from the one that the plan
    makes of the source's, relative to the tensor's largest entry; the tensor; the dtype of both models."""
    dtype = transformers_models.precision(gradients_memory(model, plan.config), "the gradients of both models")
    vocab = _vocab(model.config, plan.config)
    sample = draw(model, vocab, tokens, max(size(model, c) for c in (model.config, plan.config)))
    what = objective_of(model.config)

    def of(config: Mapping[str, Any], fetch: Fetch) -> dict[str, Tensor]:
        return transformers_models.gradients(
            transformers_models.build(table_for(config), config, model.heads, fetch, dtype), sample, what, vocab
        )

    before = of(model.config, whole(model))
    after = of(plan.config, planned(plan, [model.read], dtype))
    expect = planned(plan, [lambda name, _, start, stop: before[name][start:stop]], dtype, "exp_avg")
    largest = max(float(g.abs().max()) for g in after.values())
    worst, where = 0.0, ""
    for name, found in after.items():
        expected = expect(name)
        # a key's bias, say, has no gradient: rounding is not to be compared with rounding
        scale = max(float(expected.abs().max()), 1e-6 * largest)
        if (error := float((found - expected).abs().max()) / scale) >= worst:
            worst, where = error, name
    return worst, where, dtype


def gradients_memory(model: CheckpointModel, config: Mapping[str, Any]) -> int:
    """Numbers that `gradient_error` holds at a time: the source's gradients, the grown model and its."""
    return size(model, model.config) + 2 * size(model, config)


def size(model: CheckpointModel, config: Mapping[str, Any]) -> int:
    """Parameters of a model of a config with the checkpoint's heads."""
    return sum(prod(p.shape) for p in _parameters(model, config).values())


def _parameters(model: CheckpointModel, config: Mapping[str, Any]) -> dict[str, Parameter]:
    return table_for(config).parameters(config, model.heads)


def _held(model: CheckpointModel, config: Mapping[str, Any], tokens: int) -> int:
    """Numbers in memory at a time, or a few more, when a model is run: a parameter (an expert, of fused ones), blocks,
    and what a layer makes of the tokens."""
    inside = [p.shape for p in _parameters(model, config).values() if p.layer is not None]
    most = max((prod(shape[1:] if len(shape) > 2 else shape) for shape in inside), default=0)
    widest = max((max(shape[-2:]) for shape in inside), default=0)
    return most + 8 * (BLOCK + tokens * widest)


def _vocab(*configs: Mapping[str, Any]) -> int:
    """The tokens that all models know."""
    return min(table_for(c).axis_sizes(c)["vocab"] for c in configs)
