"""Optimizer groups from the tables, against those that transformers' Trainer makes, and pairs a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.tables import Parameter, table_for
from tests import tiny
from tests.checkpoints.engines import aliases, trainer_groups

# (decay, no decay) of transformers' Trainer for models of two layers, counted by hand
COUNTS = {"llama": (16, 5), "qwen2": (15, 11), "gpt2": (10, 18), "t5": (33, 14), "modernbert": (10, 7)}


def model_of(config: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        built = transformers.AutoConfig.for_model(**config)
        model: torch.nn.Module = getattr(transformers, config["architectures"][0])._from_config(built)
    tiny.untie(model, config)
    return model


def members(config: dict[str, Any]) -> dict[str, Parameter]:
    table = table_for(config)
    return table.parameters(config, table.names.classes[config["architectures"][0]])


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_decay_and_order_are_those_of_transformers_trainer(name: str) -> None:
    """Native shards are addressed by position: the order inside the groups counts as well."""
    config = tiny.config_of(name)
    model = model_of(config)
    theirs = [(group.decay, group.names) for group in trainer_groups(model)]
    assert [(group.decay, group.names) for group in param_groups(members(config), "decay")] == theirs
    shapes = {n: p.shape for n, p in model.named_parameters()}  # and so they are for a model of which no table is known
    assert [(group.decay, group.names) for group in param_groups(by_name(shapes), "decay")] == theirs


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_decay(name: str) -> None:
    layers = {"gpt2": {"n_layer": 2}, "t5": {"num_layers": 2}}.get(name, {"num_hidden_layers": 2})
    config = tiny.config_of(name, **layers, tie_word_embeddings=name != "llama")
    assert tuple(len(group.names) for group in param_groups(members(config), "decay")) == COUNTS[name]


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_every_layer_has_a_pair_of_groups(name: str) -> None:
    config = tiny.config_of(name)
    found, table = members(config), table_for(config)
    groups, sizes = param_groups(found, "layers"), table.axis_sizes(config)
    layers = [f"{axis[:-1]}.{i}" for axis in table.sizes.depth for i in range(sizes[axis])]
    pairs = [(layer, decay) for layer in layers for decay in (True, False)]
    assert [(group.part, group.decay) for group in groups if "." in group.part] == pairs
    assert [part for part in dict.fromkeys(group.part for group in groups) if "." not in part] == [
        part for part in ("embeddings", "head", "unused") if any(p.part == part for p in found.values())
    ]
    of = {name: group.part for group in groups for name in group.names}
    assert all(of[n] == f"{p.depth[:-1]}.{p.layer}" for n, p in found.items() if p.layer is not None)
    words = next(iter(found))
    assert of[words] == ("head" if config["tie_word_embeddings"] else "embeddings")
    assert {part for n, part in of.items() if "lm_head" in n or "decoder.bias" in n or "predictions" in n} <= {"head"}
    named = by_name({n: p.shape for n, p in found.items()}, aliases(model_of(config)))
    stacks = {"layer": "layer", "decoder_layer": "decoder.block"}
    for n, place in named.items():  # the rule for models without a table says the same
        stack, _, number = found[n].part.rpartition(".")
        assert place.part == (f"{stacks[stack]}.{number}" if stack else number), n


def test_parts_of_a_bert() -> None:
    config = tiny.config_of("bert")
    parts = {n: p.part for n, p in members(config).items()}
    assert (
        parts["bert.embeddings.position_embeddings.weight"] == parts["bert.embeddings.LayerNorm.bias"] == "embeddings"
    )
    assert parts["bert.embeddings.word_embeddings.weight"] == parts["cls.predictions.transform.dense.bias"] == "head"
    assert parts["bert.pooler.dense.weight"] == parts["cls.seq_relationship.bias"] == "unused"
    alone = members(tiny.config_of("bert", architectures=["BertForNextSentencePrediction"]))
    assert alone["cls.seq_relationship.bias"].part == "head"  # what else should it be trained for?
    assert alone["bert.embeddings.word_embeddings.weight"].part == "embeddings"
