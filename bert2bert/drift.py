"""How far a grown model is from its source on the same tokens: logits, loss, and the gradients by which it would learn.

A BERT runs one layer at a time in float64, so that no whole model is in memory; other families, and gradients, run on
transformers' models, in float64 where that fits and else in float32.

Refuses what `sample` and `reference` refuse, and models with fewer positions than the source (`InvalidConfig`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bert2bert import reference
from bert2bert.checkpoint_model import CheckpointModel
from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import IGNORE
from bert2bert.model.config import ACTIVATIONS, BertConfig
from bert2bert.model.streaming import streamed_forward
from bert2bert.plan import GrowthPlan
from bert2bert.realise import Read, values
from bert2bert.reference import Fetch
from bert2bert.sample import Tokens, draw, draw_batch, positions
from bert2bert.tables import table_for

if TYPE_CHECKING:
    from bert2bert.planning import Growth


@dataclass(frozen=True)
class Drift:
    """How far two models are apart on the same tokens. loss: nats a prediction, source and grown;
    logits_relative: |grown - source| / |source| in the Euclidean norm; agreement: share of equal best guesses.
    Logits are those of the tokens that the source knows; a loss is over all tokens. dtype: that both ran in."""

    tokens: int
    predictions: int
    text: str
    loss_source: float
    loss_grown: float
    logits_max: float
    logits_relative: float
    agreement: float
    dtype: str = "float64"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return asdict(self)

    def render(self) -> str:
        """One line for a terminal."""
        return (
            f"drift    loss {self.loss_source:.6g} -> {self.loss_grown:.6g} nats on {self.predictions} predictions "
            f"({self.text}); logits differ by {self.logits_relative:.3g} relative, {self.logits_max:.3g} at most; "
            f"{100 * self.agreement:.4g} % equal best guesses"
        )


def drift(growth: Growth, tokens: Tokens) -> Drift:
    """The change of function that a growth will make, before anything is written."""
    return compare(growth.model, planned(growth.plan, growth.reads, torch.float32), growth.plan.config, tokens)


def report_drift(growth: Growth, tokens: Tokens, say: Callable[[str], None]) -> Drift | None:
    """`drift` in one line for a terminal; where there is no reference to run, the reason, and None."""
    try:
        found = drift(growth, tokens)
    except reference.NoReference as error:
        say(f"drift    not measured: {error}")
        return None
    say(found.render())
    return found


def planned(plan: GrowthPlan, reads: Sequence[Read], dtype: torch.dtype, state: str = "fp32") -> Fetch:
    """Whole tensors of a plan by name."""
    realised = values(plan, reads, dtype)
    return lambda name: realised(name, state, 0, plan.tensors[name].shape[0])


def whole(model: CheckpointModel, state: str = "fp32") -> Fetch:
    """Whole tensors of a checkpoint by canonical name."""
    return lambda name: model.read(name, state, 0, model.parameters[name].shape[0])


def compare(model: CheckpointModel, grown: Fetch, config: Mapping[str, Any], tokens: Tokens) -> Drift:
    """A source against the model that ``grown`` fills, which has the source's heads."""
    rows, table = positions(model), table_for(config)
    if "pos" in table.sizes and (theirs := table.axis_sizes(config)["pos"] - table.first_position) < rows:
        raise InvalidConfig(
            f"a {table.model_type} of {theirs} positions cannot read what the source, a {model.table.model_type} of "
            f"{rows}, reads: no growth of this source made it; give a checkpoint that was grown from it"
        )
    sizes, vocab = [size(model, c) for c in (model.config, config)], _vocab(model.config, config)
    if streams(model) and streams(model, config):
        dtype, sample = torch.float64, draw_batch(model, vocab, tokens, max(sizes))
        runs = []
        for c, fetch in ((model.config, whole(model)), (config, grown)):
            out = streamed_forward(BertConfig.from_hf(c), fetch, sample, dtype)
            keep = sample.labels != IGNORE
            if out.logits is None:
                raise ValueError("a streamed run gives logits")
            runs.append((out.logits[keep][:, :vocab], float(out.loss)))
        count = sample.real_tokens
    else:
        dtype = reference.precision(max(sizes), "running the larger of the two models")
        given = draw(model, vocab, tokens, max(sizes))
        what, runs = reference.kind(model.config, model.table), []
        for c, fetch in ((model.config, whole(model)), (config, grown)):
            built = reference.build(table_for(c), c, model.heads, fetch, dtype)
            with torch.no_grad():
                logits, loss = reference.run(built, given, what, vocab)
            runs.append((logits, float(loss)))
            del built
            gc.collect()  # modules refer to each other
        count = given.ids.numel()
    (x, loss_source), (y, loss_grown) = runs
    return Drift(
        tokens=count,
        predictions=len(x),
        text=tokens.text,
        loss_source=loss_source,
        loss_grown=loss_grown,
        logits_max=float((x - y).abs().max()),
        logits_relative=float((x - y).norm() / x.norm()),
        agreement=float((x.argmax(1) == y.argmax(1)).double().mean()),
        dtype=str(dtype).removeprefix("torch."),
    )


def gradient_error(model: CheckpointModel, plan: GrowthPlan, tokens: Tokens) -> tuple[float, str, torch.dtype]:
    """The gradient rule on a sample: the largest difference of the grown model's gradient from the one that the plan
    makes of the source's, relative to the tensor's largest entry; the tensor; the dtype of both models."""
    small, large = size(model, model.config), size(model, plan.config)
    dtype = reference.precision(small + 2 * large, "the gradients of both models")
    vocab = _vocab(model.config, plan.config)
    sample = draw(model, vocab, tokens, max(small, large))
    what = reference.kind(model.config, model.table)

    def of(config: Mapping[str, Any], fetch: Fetch) -> dict[str, Tensor]:
        return reference.gradients(
            reference.build(table_for(config), config, model.heads, fetch, dtype), sample, what, vocab
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


def size(model: CheckpointModel, config: Mapping[str, Any]) -> int:
    """Parameters of a model of a config with the checkpoint's heads."""
    return sum(prod(p.shape) for p in table_for(config).parameters(config, model.heads).values())


def _vocab(*configs: Mapping[str, Any]) -> int:
    """The tokens that all models know."""
    return min(table_for(c).axis_sizes(c)["vocab"] for c in configs)


def streams(model: CheckpointModel, config: Mapping[str, Any] | None = None) -> bool:
    """Whether this project's own BERT computes the model, one layer at a time."""
    config = model.config if config is None else config
    return config["model_type"] == "bert" and "mlm" in model.heads and config.get("hidden_act", "gelu") in ACTIVATIONS
