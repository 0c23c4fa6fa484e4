"""Small models with scrambled parameters and small batches, flat for this project and padded for transformers."""

from __future__ import annotations

import numpy as np
import torch

from bert2bert.model.batch import Batch
from bert2bert.model.bert import Bert
from bert2bert.model.registry import build

LENGTHS = (7, 1, 12, 4)


def hf_dict(**changes: object) -> dict:
    """A Hugging Face config dict of a 3-layer model whose sizes all differ; no dropout."""
    config = {
        "architectures": ["BertForPreTraining"], "model_type": "bert", "vocab_size": 61, "hidden_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40, "max_position_embeddings": 16,
        "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
    }  # fmt: skip
    return config | changes


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """Random biases, norm gains and weights of a size that matters: fresh zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.copy_(noise * 0.3 + (1 if parameter.dim() == 1 else 0))
    return model


def model(dtype: torch.dtype = torch.float64, **changes: object) -> Bert:
    """A scrambled model in eval mode."""
    built = build(hf_dict(**changes), dtype)
    scramble(built)
    return built.eval()


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, nsp: bool = False, vocab: int = 61) -> Batch:
    """Sequences of the lengths given, flat. About a third of the positions are masked, with two spare places."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, count: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    total = sum(lengths)
    targets = torch.randperm(total, generator=generator)[: max(total // 3, 1)].sort().values
    tokens = draw(vocab, total)
    tokens[total // 2] = 0  # the padding id, whose embedding gets no gradient, as an ordinary token
    return Batch(
        tokens=tokens,
        positions=torch.cat([torch.arange(n) for n in lengths]),
        types=draw(2, total),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        targets=torch.cat([targets, torch.zeros(2, dtype=torch.int64)]),
        labels=torch.cat([draw(vocab, len(targets)), torch.full((2,), -100)]),
        lengths=np.array(lengths),
        nsp_labels=draw(2, len(lengths)) if nsp else None,
    )


def padded(flat: Batch) -> dict[str, torch.Tensor]:
    """The keyword arguments of a transformers model for the same batch, one padded row per sequence."""
    lengths = flat.cu_seqlens.long().diff()
    rows, length = len(lengths), int(lengths.max())
    mask = torch.arange(length) < lengths[:, None]
    labels = torch.full_like(flat.tokens, -100)
    kept = flat.labels != -100
    labels[flat.targets[kept]] = flat.labels[kept]
    spread = {"input_ids": flat.tokens, "token_type_ids": flat.types, "labels": labels}
    arguments = {"attention_mask": mask.long()}
    for name, values in spread.items():
        arguments[name] = torch.full((rows, length), -100 if name == "labels" else 0)
        arguments[name][mask] = values
    return arguments
