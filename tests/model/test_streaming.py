"""BERT streamed: what its decoder reads is equal to the model's bit for bit, one module's weights alive at a time."""

from __future__ import annotations

import weakref

import pytest
import torch

from bert2bert.errors import InvalidCheckpoint
from bert2bert.model import streaming
from bert2bert.model.bert import Bert
from bert2bert.model.streaming import Rows, Weights, streamed_bert
from tests.model.sample import batch, model

WORDS = "bert.embeddings.word_embeddings.weight"


def weights(bert: Bert, rows: Rows, dtype: torch.dtype = torch.float64) -> Weights:
    """A model's parameters, read by ``rows``."""
    return Weights(rows, {name: tuple(p.shape) for name, p in bert.named_parameters()}, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["BertForPreTraining", "BertForMaskedLM"])
def test_equals_the_model_bit_for_bit(
    architecture: str, tied: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 100)
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # which must not act
    bert = model(dtype, architectures=[architecture], tie_word_embeddings=tied, **rates)
    flat = batch(nsp=architecture == "BertForPreTraining")
    kept, asked = {name: p.detach() for name, p in bert.named_parameters()}, set()

    def rows(name: str, start: int, stop: int) -> torch.Tensor:
        asked.add(name)
        return kept[name][start:stop]

    hidden, pairs = streamed_bert(bert.config, weights(bert, rows, dtype), flat)
    expected = bert(flat, return_logits=True)
    assert torch.equal(bert.cls.predictions.decoder(hidden), expected.logits)
    assert (pairs is None and expected.nsp_logits is None) or torch.equal(pairs, expected.nsp_logits)
    assert asked == {
        name for name in kept if name.removeprefix("cls.predictions.").split(".")[0] not in ("decoder", "bias")
    }


def test_holds_one_module_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK", 1)
    bert = model(torch.float32, num_hidden_layers=6)
    kept = {name: p.detach() for name, p in bert.named_parameters()}
    alive: dict[int, int] = {}
    most = 0
    made = torch.empty

    def counted(*shape: object, **how: object) -> torch.Tensor:
        nonlocal most
        tensor = made(*shape, **how)  # type: ignore[call-overload]
        if tensor.is_meta:
            return tensor
        alive[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, id(tensor))
        most = max(most, sum(alive.values()))
        return tensor

    monkeypatch.setattr(streaming.torch, "empty", counted)
    streamed_bert(bert.config, weights(bert, lambda n, start, stop: kept[n][start:stop], torch.float32), batch())

    def size(prefix: str) -> int:
        return sum(p.nbytes for name, p in kept.items() if name.startswith(prefix))

    assert size("bert.encoder.layer.0.") == most > size("bert.embeddings.")


def test_a_foreign_shape_is_refused() -> None:
    bert = model()
    kept = {name: p.detach() for name, p in bert.named_parameters()}
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    for other, shape in ((kept[name][:-1], r"\(39, 24\)"), (kept[name][:, 1:], r"\(40, 23\)")):
        held = kept | {name: other}
        with pytest.raises(InvalidCheckpoint, match=rf"{name} have shape {shape}, expected \(40, 24\)"):
            streamed_bert(bert.config, weights(bert, lambda n, a, b, of=held: of[n][a:b]), batch())
