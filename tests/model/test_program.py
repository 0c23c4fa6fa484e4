"""Layer programs: what runs, what learns, what is refused, and that nothing but the gradient changes."""

from __future__ import annotations

import pytest
import torch

from bert2bert.errors import InvalidConfig
from bert2bert.model.program import Step
from tests.model.sample import batch, model
from tests.rounding import ROUNDING, gap
from tests.steps import some, whole

LAYERS = ("layer.0", "layer.1", "layer.2")


def grads(program: Step | None, **changes: object) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
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
    loss, found = grads(some(run, learn, embeddings), tie_word_embeddings=tied)
    reference, expected = grads(some(run, run, True), tie_word_embeddings=tied)
    assert torch.equal(loss, reference), "a frozen layer must compute the same bits as a learning one"
    for name, gradient in found.items():
        wanted = learns(name, learn, embeddings)
        if "word_embeddings" in name:  # tied, it is the decoder too; untied, it learns only with the embeddings
            wanted = tied or embeddings
        assert (gradient is not None) == wanted, name
        if wanted and ("word_embeddings" not in name or embeddings):
            assert torch.equal(gradient, expected[name]), name


def test_full_is_the_default_and_runs_everything() -> None:
    assert whole(3) == Step((0, 1, 2), frozenset({"embeddings", "head", *LAYERS}))
    loss, found = grads(None)
    again, expected = grads(whole(3))
    assert torch.equal(loss, again)
    assert all(learns(name, (0, 1, 2), True) == (g is not None) for name, g in found.items())
    assert all((g is None and expected[name] is None) or torch.equal(g, expected[name]) for name, g in found.items())


def test_the_order_of_the_program_is_the_order_of_the_layers() -> None:
    bert, flat = model(), batch()
    straight, turned = (bert.encode(flat, some(run, run, True)) for run in ((0, 1, 2), (2, 1, 0)))
    bert.bert.encoder.layer[0], bert.bert.encoder.layer[2] = bert.bert.encoder.layer[2], bert.bert.encoder.layer[0]
    assert torch.equal(bert.encode(flat), turned)
    assert not torch.equal(straight, turned)


def test_no_graph_is_kept_below_the_lowest_learning_layer() -> None:
    bert, seen = model(), []
    for number, layer in enumerate(bert.bert.encoder.layer):
        layer.register_forward_hook(lambda _, __, out, number=number: seen.append((number, out.requires_grad)))
    bert(batch(), some((0, 1, 2), (2,), False))
    assert seen == [(0, False), (1, False), (2, True)]


def test_no_grad_of_the_caller_is_respected() -> None:
    with torch.no_grad():
        assert not model()(batch(), whole(3)).loss.requires_grad


@pytest.mark.parametrize("rested", [(0,), (1,), (0, 1)])
def test_layers_that_rest_pass_gradients_on_to_what_learns_below(rested: tuple) -> None:
    """As autograd gives where parameters require none; the embeddings learn below them."""
    bert = model(torch.float32)
    learn = frozenset({"embeddings", "head", *LAYERS} - {f"layer.{i}" for i in rested})
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_(bert.known[name].part in learn)
    bert(batch(), Step((0, 1, 2), learn)).loss.backward()
    _, expected = grads(None)
    for name, parameter in bert.named_parameters():
        if bert.known[name].part in learn:
            assert torch.equal(parameter.grad, expected[name]), name
        else:
            assert parameter.grad is None, name


def test_a_layer_that_runs_twice_is_two_with_the_same_weights() -> None:
    bert, flat = model(), batch()
    bert(flat, Step((0, 0, 1, 2), whole(3).learn)).loss.backward()
    longer = model(num_hidden_layers=4)
    state = dict(bert.named_parameters())
    for n in (3, 2, 1):  # upwards from layer 0
        for key in [k for k in state if f".layer.{n - 1}." in k]:
            state[key.replace(f".layer.{n - 1}.", f".layer.{n}.")] = state[key]
    longer.load_weights({key: value.detach() for key, value in state.items()})
    longer(flat).loss.backward()
    of = dict(longer.named_parameters())
    for name, parameter in bert.named_parameters():
        if ".layer.0." in name:
            both = of[name].grad + of[name.replace(".layer.0.", ".layer.1.")].grad
            assert gap(parameter.grad, both) <= ROUNDING, name


@pytest.mark.parametrize(
    "run, learn, share, text",
    [
        ((), {"head"}, "mean", "no layer runs"),
        ((0,), set(), "mean", "nothing learns"),
        ((0,), {"head"}, "most", "share is 'most'; expected 'mean' or 'sum'"),
        ((0, 3), {"head"}, "mean", "layer 3 runs, but the model has layers 0 to 2"),
        ((0,), {"layr.0"}, "mean", "unknown part 'layr.0' learns: did you mean 'layer.0'"),
        ((0,), {"layer.1"}, "mean", "layer.1 learns, but does not run"),
    ],
)
def test_contradictions_are_refused(run: tuple, learn: set, share: str, text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        model()(batch(), Step(run, frozenset(learn), share))


def test_a_model_without_layers_trains_its_embeddings_and_head() -> None:
    found = grads(Step((), frozenset({"embeddings", "head"})), num_hidden_layers=0)[1]
    for name, gradient in found.items():
        assert (gradient is not None and bool(gradient.any())) == learns(name, (), True), name
    with pytest.raises(InvalidConfig, match="layer 0 runs, but the model has no layers"):
        model(num_hidden_layers=0)(batch(), some((0,), (), True))
