"""The streamed forward: equal to the model bit for bit, one module's weights alive at a time."""

from __future__ import annotations

import weakref

import pytest
import torch

from bert2bert.errors import InvalidCheckpoint
from bert2bert.model.streaming import streamed_forward
from tests.model.sample import batch, model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
def test_equals_the_model_bit_for_bit(architecture: str, tied: bool, dtype: torch.dtype) -> None:
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # which must not act
    bert = model(dtype, architectures=[architecture], tie_word_embeddings=tied, **rates)
    flat = batch(nsp=architecture == "BertForPreTraining")
    weights = dict(bert.named_parameters())
    asked: list[str] = []

    def fetch(name: str) -> torch.Tensor:
        asked.append(name)
        return weights[name].detach()

    found, expected = streamed_forward(bert.config, fetch, flat, dtype), bert(flat, return_logits=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert set(asked) == set(weights)
    assert len(asked) == len(weights) + (2 if tied else 0)  # the tied tensors are fetched again for the head


def test_holds_one_module_at_a_time() -> None:
    bert = model(torch.float32, num_hidden_layers=6)
    weights = dict(bert.named_parameters())
    alive: dict[int, int] = {}
    most = 0

    def fetch(name: str) -> torch.Tensor:
        nonlocal most
        tensor = weights[name].detach().clone()
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    streamed_forward(bert.config, fetch, batch())

    def size(prefix: str) -> int:
        return sum(p.nbytes for name, p in weights.items() if name.startswith(prefix))

    decoder = weights["bert.embeddings.word_embeddings.weight"].nbytes + weights["cls.predictions.bias"].nbytes
    largest = max(size("bert.embeddings."), size("bert.encoder.layer.0."), size("cls.predictions.") + decoder)
    assert most == largest


def test_a_foreign_shape_is_refused() -> None:
    bert = model()
    weights = dict(bert.named_parameters())
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    weights[name] = torch.nn.Parameter(weights[name][:-1])
    with pytest.raises(InvalidCheckpoint, match=rf"{name} has shape \(39, 24\), expected \(40, 24\)"):
        streamed_forward(bert.config, weights.__getitem__, batch(), torch.float64)
