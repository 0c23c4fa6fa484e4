"""The fit of learned growth maps (LiGO) on the language-model loss of the grown model, and the command ``learn``.

In every step the grown model's weights are made of the source's by the maps, differentiably, and the model runs on
transformers. Only the maps learn, by Adam with a rate that falls to zero. What is kept is a file of maps: ``--width
ligo:maps=FILE`` makes a plan of it, which grows any checkpoint format, shard by shard.

Refuses a model without a language-model head (`UnsupportedGrowth`), a growth that changes no size, and what
`measure.transformers_models` and `measure.tokens` refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bert2bert.algebra.realise import realise
from bert2bert.data.bins import TokenBins
from bert2bert.errors import InvalidConfig, InvalidData, UnsupportedGrowth
from bert2bert.growth.checks import pair_of
from bert2bert.growth.choices import Choices
from bert2bert.growth.source_model import open_model, read_config
from bert2bert.measure import transformers_models
from bert2bert.measure.drift import whole
from bert2bert.measure.tokens import Pieces, open_bins, trained_length
from bert2bert.measure.tokens import positions as positions_of
from bert2bert.measure.transformers_models import Fetch, Sample
from bert2bert.model.registry import objective_of
from bert2bert.operators.builder import Builder
from bert2bert.operators.width_ligo import Part, Scheme, save
from bert2bert.tables import table_for


@dataclass(frozen=True)
class Fitted:
    """maps: name -> matrix. losses: of every step, in nats, before it. about: from which growth and settings."""

    maps: dict[str, NDArray[Any]]
    losses: tuple[float, ...]
    about: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file that ``--width ligo:maps=FILE`` reads."""
        save(path, self.maps, {**self.about, "losses": self.losses})


class Blend:
    """The grown model's tensors as differentiable functions of the maps. weights: the source's, by canonical name."""

    def __init__(self, scheme: Scheme, heads: frozenset[str], weights: Fetch, dtype: torch.dtype, device: str) -> None:
        pair = scheme.pair
        self.scheme, self.dtype, self.device = scheme, dtype, device
        self.originals = pair.table.parameters(pair.source, heads)
        self.parameters = pair.table.parameters(pair.target, heads)
        self.build: Builder = scheme.builder(self.originals)
        self.weights = {name: weights(name).to(device, dtype) for name in self.originals}
        plans = {name: self.build.tensor(p) for name, p in self.parameters.items()}
        # What the start fills, such as a norm that the layer copied lacks, has no map.
        self.fixed = {name: realise(p, "fp32", [], dtype).to(device) for name, p in plans.items() if not p.terms}

    def __call__(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the grown model by canonical name."""
        widened: dict[str, Tensor] = {}
        stacks: dict[str, Tensor] = {}
        grown = {}
        for p in self.parameters.values():
            if p.name in self.fixed:
                grown[p.name] = self.fixed[p.name]
                continue
            found = self.scheme.sources(self.build, p)
            for name, layer in found:
                if name not in widened:
                    widened[name] = self._wide(self.weights[name], self.scheme.parts(self.build, p, layer), maps)
            if key := self.scheme.depth_key(p):
                if p.pattern not in stacks:
                    stacks[p.pattern] = torch.stack([widened[name] for name, _ in found])
                weights = maps[key][p.layer, [layer for _, layer in found]]
                grown[p.name] = torch.tensordot(weights, stacks[p.pattern], 1)
            else:
                grown[p.name] = widened[found[0][0]]
        return grown

    def _wide(self, x: Tensor, dims: list[list[Part]], maps: Mapping[str, Tensor]) -> Tensor:
        for d, parts in enumerate(dims):
            gains = [np.ones(len(part.start)) if part.start.gain is None else part.start.gain for part in parts]
            if any(part.key for part in parts):
                matrix = torch.block_diag(*(self._matrix(part, maps) for part in parts))
                x = torch.tensordot(x, matrix, ([d], [1])).movedim(-1, d)
            elif not all(part.start.is_identity for part in parts):
                offsets = np.cumsum([0, *(part.start.source for part in parts)])
                index = np.concatenate([part.start.index + at for part, at in zip(parts, offsets[:-1], strict=True)])
                x = x.index_select(d, torch.from_numpy(index).to(self.device))
            if any(part.start.gain is not None for part in parts):
                gain = torch.from_numpy(np.concatenate(gains)).to(x)
                x = x * gain.view([-1 if i == d else 1 for i in range(x.ndim)])
        return x

    def _matrix(self, part: Part, maps: Mapping[str, Tensor]) -> Tensor:
        """[target, source] of a product: old features stay, fresh ones are mixtures."""
        blocks = part.start.index[:: part.repeat] // part.repeat
        eye = torch.eye(part.start.source // part.repeat, dtype=self.dtype, device=self.device)
        chosen = eye[torch.from_numpy(blocks).to(self.device)]
        if part.key:
            fresh = torch.from_numpy(np.nonzero(part.fresh)[0]).to(self.device)
            chosen = chosen.index_copy(0, fresh, maps[part.key])
        inside = torch.eye(part.repeat, dtype=self.dtype, device=self.device)
        return torch.kron(chosen, inside) if part.repeat > 1 else chosen


class _Loss(nn.Module):
    """The loss of a model as a module, so that its weights can be put in from outside."""

    def __init__(self, model: nn.Module, what: str, vocab: int) -> None:
        super().__init__()
        self.model, self.what, self.vocab = model, what, vocab

    def forward(self, given: Sample) -> Tensor:
        return transformers_models.run(self.model, given, self.what, self.vocab)[1]


class Fit:
    """One fit: the source, the target, the maps at their start and the loss as a function of them.

    heads: what the source has; the fit uses the smallest model among them with a language-model head. Raises
    UnsupportedGrowth.
    """

    def __init__(
        self,
        source: Mapping[str, Any],
        target: Mapping[str, Any],
        weights: Fetch,
        heads: frozenset[str],
        *,
        noise: float = 0.03,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        table = table_for(source)
        pair = pair_of(source, target, Choices.parse(width="ligo", seed=seed))
        if "lm" not in heads:
            raise UnsupportedGrowth(
                f"a fit lowers the language-model loss, and this {table.model_type} has no language-model head; use a "
                f"checkpoint with one, or a width that is not learned"
            )
        self.used = min((has for has in table.names.classes.values() if "lm" in has and has <= heads), key=len)
        self.pair, self.what, self.device, self.dtype = pair, objective_of(source), device, dtype
        self.blend = Blend(Scheme(pair), self.used, weights, dtype, device)
        start = self.blend.scheme.initial(self.blend.build, self.blend.parameters, noise, seed)
        if not start:
            raise UnsupportedGrowth("the target config has the source's sizes, so there is nothing to learn")
        self.maps = {name: torch.from_numpy(array).to(device, dtype) for name, array in start.items()}
        self.about = {
            "model_type": table.model_type,
            "axes": {axis: [pair.small[axis], pair.large[axis]] for axis in table.sizes.axes},
            "noise": noise,
            "seed": seed,
        }

    @cached_property
    def module(self) -> nn.Module:
        """The target model, as a loss. Raises NoReference where transformers cannot run it."""
        grown, pair = self.blend(self.maps), self.pair
        model = transformers_models.build(
            pair.table, pair.target, self.used, lambda name: grown[name].cpu(), self.dtype
        )
        return _Loss(model.to(self.device), self.what, pair.large["vocab"])

    def loss(self, maps: Mapping[str, Tensor], given: Sample) -> Tensor:
        """The grown model's loss in nats a prediction."""
        weights = {f"model.{name}": value for name, value in self.blend(maps).items()}
        there = Sample(given.ids.to(self.device), given.labels.to(self.device))
        found: Tensor = torch.func.functional_call(self.module, weights, (there,))
        return found

    @torch.no_grad()
    def measure(self, maps: Mapping[str, Tensor], samples: Iterable[Sample]) -> float:
        """The mean loss over samples."""
        return float(np.mean([float(self.loss(maps, given)) for given in samples]))

    def run(
        self, samples: Iterable[Sample], steps: int, lr: float, say: Callable[[int, float], None] | None = None
    ) -> Fitted:
        """Fit the maps for so many steps, one sample each. lr: the length by which a row of a map moves in the first
        step at most, falling linearly to zero: Adam's rate times the square root of the row's entries."""
        learned = {name: value.clone().requires_grad_() for name, value in self.maps.items()}
        adam = torch.optim.Adam([{"params": [value]} for value in learned.values()])
        losses = []
        for step, given in enumerate(islice(samples, steps)):
            for group in adam.param_groups:
                group["lr"] = lr * (1 - step / steps) / group["params"][0].shape[1] ** 0.5
            adam.zero_grad()
            loss = self.loss(learned, given)
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
            if say:
                say(step, losses[-1])
        maps = {name: value.detach().cpu().numpy() for name, value in learned.items()}
        return Fitted(maps, tuple(losses), {**self.about, "steps": len(losses), "lr": lr})


def rows_of(bins: TokenBins, split: str, what: str, rows: int, length: int, seed: int) -> Iterator[Sample]:
    """Endless samples of [rows, length] random pieces of text, predicted by the objective of an architecture that
    trains `what`: 'masked', 'causal' or 'seq2seq'."""
    tokens = bins.split(split)[0]
    if len(tokens) < length:
        raise InvalidData(
            f"token bins {bins.folder}: split {split!r} has {len(tokens)} tokens, fewer than one row of {length}; use "
            f"more text, or a smaller --length"
        )
    rng, number, pieces = np.random.default_rng(seed), 0, Pieces(what, bins, length, seed)
    while True:
        starts = rng.integers(0, len(tokens) - length + 1, rows)
        yield pieces(np.stack([tokens[at : at + length] for at in starts]), number)
        number += rows


def learn(
    source: Path,
    config: Path,
    data: Path,
    output: Path,
    *,
    source_config: Path | None = None,
    tag: str | None = None,
    steps: int = 100,
    lr: float = 1e-2,
    noise: float = 0.03,
    rows: int = 16,
    length: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Fitted:
    """Fit the maps of a growth on token bins and write them to ``output``. Raises UserError of all kinds."""
    for name, value in {"steps": steps, "lr": lr, "noise": noise, "rows": rows}.items():
        if not value > 0:
            raise InvalidConfig(f"--{name} is {value}; a positive number is expected")
    if seed < 0:
        raise InvalidConfig(f"--seed is {seed}; expected a whole number of at least 0")
    if output.exists():
        raise InvalidConfig(f"{output} is there already; choose another --output, or delete it")
    if device != "cpu" and not torch.cuda.is_available():
        raise InvalidConfig(f"--device {device}: torch finds no such device here; leave it out to use the CPU")
    model, target = open_model(source, source_config, tag), read_config(config)
    bins = open_bins(data, model.table.axis_sizes(model.config)["vocab"])
    positions = positions_of(model)
    if length and not 2 < length <= positions:
        raise InvalidConfig(f"--length is {length}; expected 3 to {positions}, the positions that this model knows")
    length = length or min(trained_length(model), positions)
    fit = Fit(model.config, target, whole(model), model.heads, noise=noise, seed=seed, device=device)
    held = list(islice(rows_of(bins, "heldout", fit.what, rows, length, seed), 8))
    say(f"maps     {len(fit.maps)} of {sum(m.numel() for m in fit.maps.values()):,} numbers; {steps} steps on {data}")
    start = fit.measure(fit.maps, held)
    every = max(1, steps // 10)
    found = fit.run(
        rows_of(bins, "train", fit.what, rows, length, seed),
        steps,
        lr,
        lambda step, loss: say(f"step     {step} loss {loss:.4f}") if step % every == 0 else None,
    )
    end = fit.measure({name: torch.from_numpy(m).to(device) for name, m in found.maps.items()}, held)
    about = {"source": model.source.identity(), "data": bins.digest, "heldout": [start, end], "length": length}
    found = Fitted(found.maps, found.losses, {**found.about, **about, "rows": rows})
    found.save(output)
    say(f"loss     {start:.4f} -> {end:.4f} nats on held-out text")
    say(f"written  {output}; grow with --width ligo:maps={output}")
    return found
