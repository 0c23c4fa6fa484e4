"""The oracle: transformers' own BERT in float64. Names, order, logits, loss, gradients, padded and packed."""

from __future__ import annotations

import pytest
import torch

from bert2bert.model.batch import Batch
from bert2bert.model.bert import Bert
from bert2bert.model.registry import build
from tests.model.sample import batch, hf_dict, model, padded, scramble
from tests.rounding import ROUNDING, WRONG, allowed, gap, largest

CLASSES = ("BertForPreTraining", "BertForMaskedLM")


def oracle(config: dict) -> torch.nn.Module:
    import transformers

    kind = getattr(transformers, config["architectures"][0])
    return kind(transformers.BertConfig(**config)).to(torch.float64).eval()


def pair(**changes: object) -> tuple[torch.nn.Module, Bert]:
    theirs = scramble(oracle(hf_dict(**changes)))
    ours = build(hf_dict(**changes), torch.float64).eval()
    ours.load_weights(theirs.state_dict())
    return theirs, ours


def results(ours: Bert, flat: Batch, seed: int = 0) -> dict[str, torch.Tensor]:
    """All that is compared: logits, loss and gradients by name."""
    torch.manual_seed(seed)
    out = ours(flat, return_logits=True)
    learning = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    slopes = torch.autograd.grad(out.loss, list(learning.values()), allow_unused=True)
    found = {"logits": out.logits, "nsp_logits": out.nsp_logits, "loss": out.loss}
    found |= dict(zip(learning, slopes, strict=True))
    return {name: x for name, x in found.items() if x is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CLASSES)
def test_names_order_shapes_and_config(architecture: str, tied: bool) -> None:
    config = hf_dict(architectures=[architecture], tie_word_embeddings=tied)
    theirs, ours = oracle(config), build(config)
    expected = [(name, tuple(p.shape)) for name, p in theirs.named_parameters()]
    assert [(name, tuple(p.shape)) for name, p in ours.named_parameters()] == expected
    assert list(ours.state_dict()) == list(theirs.state_dict())
    absent = set(ours.state_dict()) - {name for name, _ in expected}
    assert absent == set(ours.config.aliases)
    again = type(theirs.config)(**ours.hf_config).to_dict()
    assert {k: v for k, v in again.items() if k != "dtype"} == {
        k: v for k, v in theirs.config.to_dict().items() if k != "dtype"
    } | {"architectures": [architecture]}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", CLASSES)
def test_padded_logits_loss_gradients(architecture: str, tied: bool) -> None:
    theirs, ours = pair(architectures=[architecture], tie_word_embeddings=tied)
    nsp = architecture == "BertForPreTraining"
    flat = batch(nsp=nsp)
    arguments = padded(flat)
    expected = theirs(**arguments, **({"next_sentence_label": flat.nsp_labels} if nsp else {}))
    found = ours(flat, return_logits=True)
    limits = allowed(lambda: results(ours, flat))

    logits = (expected.prediction_logits if nsp else expected.logits)[arguments["attention_mask"].bool()]
    assert found.logits.shape == (len(flat.targets), 61)
    assert gap(found.logits, logits[flat.targets], limits["logits"]) <= ROUNDING
    kept = flat.labels != -100
    assert found.predicted == kept.sum()
    assert found.correct == (logits[flat.targets].argmax(-1) == flat.labels).sum()
    if nsp:
        assert gap(found.nsp_logits, expected.seq_relationship_logits, limits["nsp_logits"]) <= ROUNDING
    else:
        assert found.nsp_logits is None
    assert gap(found.loss, expected.loss, limits["loss"]) <= ROUNDING

    expected.loss.backward()
    found.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if gradients[name] is None:  # the bias that transformers leaves unread when untied
            assert name == "cls.predictions.bias" and not tied
            assert not parameter.grad.any()
        else:
            assert gap(parameter.grad, gradients[name], limits[name]) <= ROUNDING, name
            assert largest(parameter.grad) > WRONG * limits[name] or "key.bias" in name, name


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(activation: str) -> None:
    theirs, ours = pair(hidden_act=activation)
    flat = batch()
    expected = theirs(**padded(flat)).prediction_logits[padded(flat)["attention_mask"].bool()][flat.targets]
    found = ours(flat, return_logits=True).logits
    limit = allowed(lambda: results(ours, flat))["logits"]
    assert gap(found, expected, limit) <= ROUNDING
    _, gelu = pair(hidden_act="gelu")
    assert gap(gelu(flat, return_logits=True).logits, expected, limit) > WRONG


@pytest.mark.parametrize("architecture", CLASSES)
def test_packed_in_one_row(architecture: str) -> None:
    """transformers given one row of all sequences, their positions and a block-diagonal mask."""
    theirs, ours = pair(architectures=[architecture])
    flat = batch()
    owner = torch.repeat_interleave(torch.arange(len(flat.cu_seqlens) - 1), flat.cu_seqlens.long().diff())
    block = torch.where(owner[:, None] == owner, 0.0, -torch.inf).double()[None, None]
    expected = theirs(
        input_ids=flat.tokens[None],
        token_type_ids=flat.types[None],
        position_ids=flat.positions[None],
        attention_mask=block,
    )
    logits = expected.prediction_logits if architecture == "BertForPreTraining" else expected.logits
    found = ours(flat, return_logits=True)
    limits = allowed(lambda: results(ours, flat))
    assert gap(found.logits, logits[0][flat.targets], limits["logits"]) <= ROUNDING
    kept = flat.labels != -100
    loss = torch.nn.functional.cross_entropy(logits[0][flat.targets[kept]], flat.labels[kept])
    assert gap(found.loss, loss, limits["loss"]) <= ROUNDING


def test_transformers_reads_our_config_and_weights() -> None:
    ours = model(hidden_act="gelu_new", architectures=["BertForMaskedLM"])
    theirs = oracle(ours.hf_config)
    theirs.load_state_dict(ours.state_dict())
    flat = batch()
    expected = theirs(**padded(flat)).logits[padded(flat)["attention_mask"].bool()][flat.targets]
    limit = allowed(lambda: results(ours, flat))["logits"]
    assert gap(ours(flat, return_logits=True).logits, expected, limit) <= ROUNDING


def test_initialisation_has_transformers_distribution() -> None:
    config = hf_dict(vocab_size=500, hidden_size=48, intermediate_size=200, initializer_range=0.05)
    torch.manual_seed(0)
    for (name, ours), theirs in zip(build(config).named_parameters(), oracle(config).parameters(), strict=True):
        error = 0.05 * (2 / ours.numel()) ** 0.5  # standard error of the difference of two means
        assert abs(ours.mean() - theirs.float().mean()) <= 4 * error, name
        assert abs(ours.std() - theirs.float().std()) <= 4 * error or ours.numel() == 1, name
    assert not build(config).bert.embeddings.word_embeddings.weight[0].any()


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_is_where_transformers_has_it(rate: str) -> None:
    """One sequence draws the same random numbers in both, so training mode agrees from one seed, gradients too."""
    theirs, ours = (m.train() for m in pair(**{rate: 0.2}))
    flat = batch((14,))
    torch.manual_seed(4)
    expected = theirs(**padded(flat), next_sentence_label=torch.tensor([-100]))
    limits = allowed(lambda: results(ours, flat, seed=4))
    torch.manual_seed(4)
    found = ours(flat, return_logits=True)
    assert gap(found.logits, expected.prediction_logits[0][flat.targets], limits["logits"]) <= ROUNDING
    assert gap(ours.eval()(flat, return_logits=True).logits, found.logits, limits["logits"]) > WRONG
    found.loss.backward()
    kept = flat.labels != -100
    logits = expected.prediction_logits[0][flat.targets[kept]]
    torch.nn.functional.cross_entropy(logits, flat.labels[kept]).backward()
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            assert gap(parameter.grad, theirs.get_parameter(name).grad, limits[name]) <= ROUNDING, name
