"""The smallest configs of each family, with scrambled parameters (fresh biases of 0 and gains of 1 hide mistakes)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, PreTrainedModel

BERT_CLASSES = {c.__name__: c for c in (BertForPreTraining, BertForMaskedLM, BertModel)}


def bert_config(
    hidden: int = 8, heads: int = 2, ffn: int = 12, layers: int = 3, cls: str = "BertForPreTraining", **more: Any
) -> dict[str, Any]:
    """A Hugging Face config dict without dropout."""
    config = BertConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=ffn, num_hidden_layers=layers,
        vocab_size=29, max_position_embeddings=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        architectures=[cls], layer_norm_eps=1e-12, **more,
    )  # fmt: skip
    return config.to_dict()


def hf_bert(config: dict[str, Any]) -> PreTrainedModel:
    """The transformers model of a config dict, float64, eval mode, eager attention."""
    cls = BERT_CLASSES[config["architectures"][0]]
    model = cls._from_config(BertConfig(**config), attn_implementation="eager")
    return model.double().eval()


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values everywhere, biases and norm gains included."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=p.dtype)
        p.copy_(1 + 0.3 * noise if "LayerNorm.weight" in name else 0.4 * noise)


def batch(seed: int = 0, rows: int = 3, length: int = 7, vocab: int = 29) -> dict[str, torch.Tensor]:
    """Token ids, types, a padding mask and labels at some places."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = torch.where((torch.rand(ids.shape, generator=g) < 0.4) & (mask == 1), ids, -100)
    labels[1, 0] = ids[1, 0]
    return {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask, "labels": labels}
