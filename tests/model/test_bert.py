"""The model by itself: dropout, next-sentence rules, static shapes, precision, configs and weights that are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.model.batch import Decoder
from bert2bert.model.bert import Bert
from bert2bert.model.config import BertConfig
from bert2bert.model.registry import build
from tests.model.sample import batch, hf_dict, model
from tests.rounding import ROUNDING, allowed, gap
from tests.steps import some


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_acts_in_training_only_and_repeats_from_a_seed(rate: str) -> None:
    bert, flat = model(**{rate: 0.3}), batch()
    plain = bert(flat).loss
    assert torch.equal(plain, model()(flat).loss)
    bert.train()
    torch.manual_seed(5)
    first = bert(flat).loss
    second = bert(flat).loss
    torch.manual_seed(5)
    assert torch.equal(first, bert(flat).loss)
    assert not torch.equal(first, second)
    assert not torch.equal(first, plain)


def test_padded_offsets_and_spare_places_change_nothing() -> None:
    """Static shapes: cu_seqlens ends in repeats of T, max_seqlen is an upper bound, spare places are ignored."""
    bert, flat = model(), batch(nsp=True)
    total = len(flat.tokens)
    roomy = dataclasses.replace(
        flat,
        cu_seqlens=torch.cat([flat.cu_seqlens, torch.full((3,), total, dtype=torch.int32)]),
        max_seqlen=16,
        targets=torch.cat([flat.targets, torch.zeros(9, dtype=torch.int64)]),
        labels=torch.cat([flat.labels, torch.full((9,), -100)]),
        nsp_labels=torch.cat([flat.nsp_labels, torch.full((3,), -100)]),
    )
    ours, theirs = bert(roomy), bert(flat)
    assert gap(ours.loss, theirs.loss, allowed(lambda: bert(flat).loss)) <= ROUNDING
    assert ours.correct == theirs.correct and ours.predicted == theirs.predicted == total // 3


def test_a_batch_without_labels_has_loss_zero() -> None:
    flat = batch()
    out = model()(dataclasses.replace(flat, labels=torch.full_like(flat.labels, -100)))
    assert out.loss == 0 and out.predicted == 0 and out.correct == 0


def test_next_sentence_labels_need_the_head() -> None:
    with pytest.raises(InvalidConfig, match="no next-sentence head"):
        model(architectures=["BertForMaskedLM"])(batch(nsp=True))
    bert = model()
    assert bert(batch()).nsp_logits is None
    assert bert(batch(), return_logits=True).nsp_logits.shape == (4, 2)
    assert bert(batch(nsp=True)).loss > bert(batch()).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near(dtype: torch.dtype) -> None:
    flat, bert = batch(), model()
    near = model(dtype)(flat).loss
    assert near.dtype == torch.float32
    assert 0 < gap(near, bert(flat).loss, allowed(lambda: bert(flat).loss, dtype, spare=32)) <= ROUNDING


def test_batch_moves_and_keeps_the_rest() -> None:
    read = Decoder(torch.arange(3), torch.tensor([0, 3]), max_seqlen=5, lengths=np.array([3]))
    moved = dataclasses.replace(batch(nsp=True), decoder=read).to("meta")
    for part, count in ((moved, 7), (moved.decoder, 2)):
        tensors = [value for f in dataclasses.fields(part) if isinstance(value := getattr(part, f.name), torch.Tensor)]
        assert len(tensors) == count and all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.max_seqlen, moved.real_tokens, moved.attended) == (12, 24, 210)
    assert moved.decoder.max_seqlen == 5 and moved.decoder.lengths.tolist() == [3]


def test_one_compiled_block_serves_all_layers_and_programs() -> None:
    """One graph for the block each time its autograd setting is new, none per layer or depth, and none later."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    config = hf_dict(architectures=["BertForMaskedLM"], num_hidden_layers=5)
    torch.manual_seed(3)
    plain = build(config)
    torch.manual_seed(3)
    compiled = build(config)
    compiled.compile_layers(backend=backend)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in compiled.named_parameters()]
    flat = batch()
    assert torch.equal(compiled(flat).loss, plain(flat).loss)
    assert len(graphs) == 2  # the block and the loss
    programs = [some(tuple(range(d)), tuple(range(d - 1, d)), False) for d in (1, 3, 5)]
    for program in programs:
        assert torch.equal(compiled(flat, program).loss, plain(flat, program).loss)
    settled = len(graphs)
    assert settled <= 4  # the block without autograd, and with an input that needs no gradient
    for program in (None, *programs):
        compiled(flat, program).loss.backward()
    assert len(graphs) == settled
    assert torch._dynamo.config.recompile_limit >= 32
    torch._dynamo.reset()


def test_compiling_is_an_option_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(Bert, "compile_layers", lambda self, backend="inductor": calls.append(backend))
    build(hf_dict())
    assert not calls
    build(hf_dict(), compile_layers=True)
    assert calls == ["inductor"]


def test_config_round_trip_and_heads() -> None:
    config = BertConfig.from_hf(hf_dict(id2label={"0": "no"}, use_cache=True))
    assert BertConfig.from_hf(config.to_hf()) == config and config.heads == ("lm", "nsp")
    assert BertConfig.from_hf({k: v for k, v in hf_dict().items() if k != "architectures"}).heads == ("lm",)
    assert Bert(config, heads=("lm",)).hf_config["architectures"] == ["BertForMaskedLM"]
    assert config.aliases == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ({"hidden_act": "gelu_nwe"}, "did you mean 'gelu_new'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"architectures": ["BertModel"]}, r"architectures is \['BertModel'\]"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"hidden_size": 24.0}, "hidden_size is 24.0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"pad_token_id": 61}, "pad_token_id is 61"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    ],
)
def test_configs_that_are_refused(changes: dict, text: str) -> None:
    with pytest.raises(InvalidConfig, match=text):
        BertConfig.from_hf(hf_dict(**changes))


def test_a_missing_size_and_unknown_heads_are_refused() -> None:
    config = hf_dict()
    del config["intermediate_size"]
    with pytest.raises(InvalidConfig, match="intermediate_size is missing"):
        build(config)
    with pytest.raises(InvalidConfig, match="model heads are"):
        Bert(BertConfig.from_hf(hf_dict()), heads=("nsp",))


def test_weights_that_are_refused_leave_the_model_alone() -> None:
    bert, name = model(), "bert.encoder.layer.2.output.dense.weight"
    before = {k: v.clone() for k, v in bert.state_dict().items()}
    good = {k: torch.zeros_like(v) for k, v in bert.named_parameters()}
    cases = [
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        (good | {name: torch.zeros(3)}, rf"{name} has shape \(3,\), expected \(24, 40\)"),
        (good | {"bert.embedings.LayerNorm.bias": torch.zeros(24)}, "did you mean 'bert.embeddings.LayerNorm.bias'"),
        (good | {"cls.predictions.decoder.bias": torch.ones(61)}, "differs from cls.predictions.bias"),
    ]
    for state, text in cases:
        with pytest.raises(InvalidCheckpoint, match=text):
            bert.load_weights(state)
    assert all(torch.equal(v, before[k]) for k, v in bert.state_dict().items())
    bert.load_weights(good | {"bert.embeddings.position_ids": torch.arange(16)})
    assert not any(p.any() for p in bert.parameters())
