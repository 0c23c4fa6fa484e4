"""What tables say beyond names and shapes: deviations of fresh weights, kinds of layers, T5's scaled head."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from bert2bert.errors import InvalidConfig
from bert2bert.tables import table_for
from tests import tiny


@pytest.mark.parametrize("name", tiny.VARIANTS)
def test_deviations_are_those_that_transformers_draws_with(name: str) -> None:
    config = tiny.config_of(name)
    table = table_for(config)
    torch.manual_seed(0)
    drawn = tiny.parameters(tiny.build(config), config)
    for p in table.parameters(config, table.names.classes[config["architectures"][0]]).values():
        if len(p.shape) > 1 and p.name != "lm_head.weight":  # an untied T5's is a copy of its words here
            value, expected = drawn[p.name], table.std(p.pattern, config)
            off = float(value.detach().std()) / expected - 1
            # A deviation of n draws is off by 1/sqrt(2n); ModernBERT's are cut at two deviations: 12 % less.
            assert abs(off) < 0.13 + 4 / sqrt(2 * value.numel()), f"{p.name}: {off:+.0%} from {expected:.3g}"


def test_kinds_of_layers() -> None:
    config = tiny.config_of("modernbert")
    table = table_for(config)
    listed = [table.layer_kind(config, i) for i in range(3)]
    assert listed == config["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]
    old = {k: v for k, v in config.items() if k not in ("layer_types", "global_attn_every_n_layers")}
    assert [table.layer_kind(old | {"global_attn_every_n_layers": 2}, i) for i in range(3)] == listed
    assert table.layer_kind(old, 2) == "sliding_attention"  # every third is full unless set
    with pytest.raises(InvalidConfig, match="global_attn_every_n_layers is 0; a positive integer is expected"):
        table.layer_kind(old | {"global_attn_every_n_layers": 0}, 1)
    assert table_for(tiny.config_of("bert")).layer_kind({}, 5) == ""


@pytest.mark.parametrize(
    ("keys", "spec"),
    [
        ({}, "(rho sigma ~embed)"),
        ({"tie_word_embeddings": False}, "(rho normed)"),
        ({"scale_decoder_outputs": False}, "(rho ~embed)"),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, "(rho sigma normed)"),
    ],
)
def test_t5_scales_the_head_unless_set(keys: dict[str, bool], spec: str) -> None:
    sizes = tiny.VARIANTS["t5"].base
    table = table_for(sizes)
    last = table.parameters(sizes | keys, frozenset({"decoder", "lm"}))["decoder.final_layer_norm.weight"]
    assert last.spec == spec
    assert table.settled(sizes | keys)["scale_decoder_outputs"] is ("sigma" in spec)
