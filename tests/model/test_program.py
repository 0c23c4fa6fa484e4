"""Layer programs: what runs, what learns, what is refused, and that nothing but the gradient changes."""

from __future__ import annotations

import pytest
import torch

from bert2bert.errors import InvalidConfig
from bert2bert.model.program import LayerProgram, full
from tests.model.sample import batch, model


def grads(program: LayerProgram | None, **changes: object) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    bert = model(torch.float32, **changes)
    loss = bert(batch(), program).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in bert.named_parameters()}


def learns(name: str, layers: tuple[int, ...], embeddings: bool) -> bool:
    if ".layer." in name:
        return int(name.split(".layer.")[1].split(".")[0]) in layers
    if "embeddings" in name and "word" not in name:
        return embeddings
    return "pooler" not in name and "seq_relationship" not in name


@pytest.mark.parametrize(
    "run, learn, embeddings",
    [((0, 1, 2), (2,), False), ((0, 1), (1,), False), ((0,), (0,), False), ((0, 1), (0, 1), True), ((0, 1), (), False)],
)
@pytest.mark.parametrize("tied", [True, False])
def test_only_what_learns_gets_a_gradient(run: tuple, learn: tuple, embeddings: bool, tied: bool) -> None:
    loss, found = grads(LayerProgram(run, learn, embeddings), tie_word_embeddings=tied)
    whole, expected = grads(LayerProgram(run, run, True), tie_word_embeddings=tied)
    assert torch.equal(loss, whole), "a frozen layer must compute the same bits as a learning one"
    for name, gradient in found.items():
        wanted = learns(name, learn, embeddings)
        if "word_embeddings" in name:  # tied, it is the decoder too; untied, it learns only with the embeddings
            wanted = tied or embeddings
        assert (gradient is not None) == wanted, name
        if wanted and ("word_embeddings" not in name or embeddings):
            assert torch.equal(gradient, expected[name]), name


def test_full_is_the_default_and_runs_everything() -> None:
    assert full(3) == LayerProgram((0, 1, 2), (0, 1, 2), True)
    loss, found = grads(None)
    again, expected = grads(full(3))
    assert torch.equal(loss, again)
    assert all(learns(name, (0, 1, 2), True) == (g is not None) for name, g in found.items())
    assert all((g is None and expected[name] is None) or torch.equal(g, expected[name]) for name, g in found.items())


def test_the_order_of_the_program_is_the_order_of_the_layers() -> None:
    bert, flat = model(), batch()
    straight, turned = (bert.encode(flat, LayerProgram(run, run, True)) for run in ((0, 1, 2), (2, 1, 0)))
    bert.bert.encoder.layer[0], bert.bert.encoder.layer[2] = bert.bert.encoder.layer[2], bert.bert.encoder.layer[0]
    assert torch.equal(bert.encode(flat), turned)
    assert not torch.equal(straight, turned)


def test_no_graph_is_kept_below_the_lowest_learning_layer() -> None:
    bert, seen = model(), []
    for number, layer in enumerate(bert.bert.encoder.layer):
        layer.register_forward_hook(lambda _, __, out, number=number: seen.append((number, out.requires_grad)))
    bert(batch(), LayerProgram((0, 1, 2), (2,), False))
    assert seen == [(0, False), (1, False), (2, True)]


def test_no_grad_of_the_caller_is_respected() -> None:
    with torch.no_grad():
        assert not model()(batch(), full(3)).loss.requires_grad


@pytest.mark.parametrize(
    "run, learn, embeddings, text",
    [
        ((), (), False, "no layer runs"),
        ((0, 1, 2), (1,), False, "not the last ones"),
        ((0, 1), (0, 1, 2), False, "not the last ones"),
        ((0, 1, 0), (0,), False, "layer 0 runs both"),
        ((0, 1), (1,), True, r"layers \(0,\) above them are frozen"),
    ],
)
def test_contradictions_are_refused(run: tuple, learn: tuple, embeddings: bool, text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        LayerProgram(run, learn, embeddings)


def test_a_layer_the_model_lacks_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="runs layer 3, the model has layers 0 to 2"):
        model()(batch(), LayerProgram((0, 3), (3,), False))
