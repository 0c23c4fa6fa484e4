"""A synthetic target checkpoint for writer tests: a tiny BERT's names and shapes, random values, known everything."""

from __future__ import annotations

import functools
import zlib
from typing import Any

import torch

from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.checkpoints.job import STATES, TargetGroup, TargetSpec, Values
from tests.checkpoints.engines import hf_config, tiny_bert

LR, DECAY, BETAS, EPS = 7e-4, 0.1, (0.8, 0.97), 3e-7
TIED = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}


def scheduler_state(steps: int) -> dict[str, Any]:
    """What WarmupLR (the scheduler of tests.checkpoints.engines) stores."""
    return {"last_batch_iteration": steps}


PLAIN = {
    "bert.embeddings.word_embeddings.weight": (61, 8),
    "bert.embeddings.LayerNorm.weight": (8,),
    "bert.encoder.layer.0.output.dense.weight": (8, 13),
    "bert.encoder.layer.0.output.dense.bias": (8,),
    "bert.encoder.layer.1.output.dense.weight": (8, 13),
    "cls.predictions.bias": (61,),
}


def plain_spec() -> TargetSpec:
    """A few tensors, for tests that look at files only: no model, no transformers, quick to write."""
    groups = [TargetGroup(g.part, g.decay, g.names, {"lr": LR}, 7) for g in param_groups(by_name(PLAIN), "decay")]
    return TargetSpec(PLAIN, TIED, {"model_type": "bert"}, tuple(groups), "decay", "fp32", STATES, {"global_steps": 7})


@functools.lru_cache
def _tiny() -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    model = tiny_bert()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied_bias = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    return shapes, TIED | tied_bias if tied_bias.keys() <= model.state_dict().keys() else TIED


def make_spec(precision: str = "fp32", layout: str = "decay", step: int = 7, **over: Any) -> TargetSpec:
    """Names and shapes from the transformers model itself. Under the layers layout every group has its own step."""
    shapes, aliases = _tiny()
    groups = tuple(
        TargetGroup(
            g.part, g.decay, g.names, {"lr": LR, "weight_decay": DECAY if g.decay else 0.0, "betas": BETAS, "eps": EPS},
            step + i if layout == "layers" else step,
        )
        for i, g in enumerate(param_groups(by_name(shapes, aliases), layout))
    )  # fmt: skip
    given: dict[str, Any] = {
        "shapes": shapes,
        "aliases": aliases,
        "config": {**hf_config(), "architectures": ["BertForPreTraining"], "model_type": "bert"},
        "groups": groups,
        "group_layout": layout,
        "precision": precision,
        "states": STATES,
        "counters": {"global_steps": step, "global_samples": 16 * step, "skipped_steps": 1},
        "lr_scheduler": scheduler_state(step),
        "client_state": {"note": {"epoch": 3}},
    }
    return TargetSpec(**{**given, **over})


def make_tensors(spec: TargetSpec) -> dict[str, dict[str, torch.Tensor]]:
    """Random values of every state, the same for the same names and shapes; second moments positive, one -0.0."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in spec.shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        fp32, exp_avg, exp_avg_sq = (torch.randn(shape, generator=generator) * s for s in (0.05, 1e-3, 1e-3))
        exp_avg.view(-1)[0] = -0.0
        tensors[name] = {"fp32": fp32, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq.square()}
    return tensors


def reader(tensors: dict[str, dict[str, torch.Tensor]]) -> Values:
    """Rows of those tensors."""

    def values(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        tensor = tensors[name][state]
        return tensor[start:stop] if tensor.dim() else tensor

    return values
