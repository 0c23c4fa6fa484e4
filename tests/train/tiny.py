"""A tiny BERT, its recipe, its batches and its engine, for tests on real ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import bert2bert.train.run  # noqa: F401
from bert2bert.model.batch import Batch
from bert2bert.model.bert import Bert
from bert2bert.model.registry import build
from bert2bert.recipe import AdamW, Data, Phase, Recipe

LAYERS = 3
VOCAB = 67


def model_config(dropout: float = 0.0, **other: Any) -> dict[str, Any]:
    return {
        "model_type": "bert", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **other,
    }  # fmt: skip


def recipe(bins: str = "bins", *, steps: int = 100, dropout: float = 0.0, clip: float = 0.5, **other: Any) -> Recipe:
    given: dict[str, Any] = {
        "name": "tiny", "model": model_config(dropout), "data": Data(bins=bins, seq_len=16, eval_rows=8),
        "global_batch_size": 8, "phases": (Phase("all", steps),), "optimizer": AdamW(lr=1e-2, weight_decay=0.1),
        "gradient_clipping": clip,
    }  # fmt: skip
    return Recipe(**(given | other))


def ds_config(
    stage: int, precision: str = "fp32", world: int = 2, accumulation: int = 2, rows: int = 8
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": rows, "gradient_accumulation_steps": accumulation,
        "train_micro_batch_size_per_gpu": rows // accumulation // world, "zero_optimization": {"stage": stage},
    }  # fmt: skip
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 4}
    return config


def allow_fp16() -> None:
    """Let DeepSpeed run fp16 on a CPU without native fp16 arithmetic: torch computes it all the same, slowly."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def model(nsp: bool = True, seed: int = 1) -> Bert:
    torch.manual_seed(seed)
    architectures = ["BertForPreTraining" if nsp else "BertForMaskedLM"]
    return build({**model_config(), "architectures": architectures})


def batch(seed: int, rows: int = 2, length: int = 12) -> Batch:
    """`rows` sequences of `length` random tokens, equally many masked in each (so that means of means agree)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, VOCAB, (rows * length,), generator=generator)
    targets = torch.cat(
        [torch.randperm(length, generator=generator)[:3].sort().values + r * length for r in range(rows)]
    )
    return Batch(
        tokens=tokens,
        positions=torch.arange(length).repeat(rows),
        types=torch.zeros_like(tokens),
        cu_seqlens=torch.arange(0, rows * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        targets=targets,
        labels=tokens[targets],
        lengths=np.full(rows, length),
    )
