"""What follows from a table and a config: sizes, what a growth must leave as it is, and refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import transformers

from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.tables import TABLES
from tests import tiny
from tests.planning import plan_growth


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", {"embed": 12, "normed": 12, "kv": 2, "group": 3, "qk": 4, "v": 4, "ffn": 10}),
        ("llama-mha", {"kv": 6, "group": 1}),
        ("llama-mqa", {"kv": 1, "group": 6}),
        ("gpt2", {"embed": 8, "heads": 2, "qk": 4, "ffn": 12}),
    ],
)
def test_sizes(name: str, expected: dict[str, int]) -> None:
    config = tiny.config_of(name)
    sizes = TABLES[config["model_type"]].axis_sizes(config)
    assert {axis: sizes[axis] for axis in expected} == expected


def test_absent_keys_take_transformers_defaults() -> None:
    base = {
        "num_attention_heads": 64,
        "hidden_size": 192,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "vocab_size": 7,
    }
    kv_and_head = {t: (TABLES[t].axis_sizes(base)["kv"], TABLES[t].axis_sizes(base)["qk"]) for t in
                   ("llama", "mistral", "qwen2", "qwen3")}  # fmt: skip
    assert kv_and_head == {"llama": (64, 3), "mistral": (8, 3), "qwen2": (32, 3), "qwen3": (32, 128)}
    assert (
        TABLES["gpt2"].axis_sizes({"n_embd": 6, "n_head": 2, "n_layer": 1, "n_positions": 4, "vocab_size": 7})["ffn"]
        == 24
    )


@pytest.mark.parametrize(
    ("more", "matters"),
    [
        ({}, False),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, False),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5.0, "factor": 2.0}}, True),
        ({"rope_theta": 5.0, "rope_scaling": None}, False),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, True),
    ],
)
def test_the_context_matters_only_where_it_sets_frequencies(more: dict[str, Any], matters: bool) -> None:
    settled = TABLES["llama"].settled({"max_position_embeddings": 16, "hidden_size": 8, **more})
    assert settled["rope_parameters"]["rope_theta"] == (5.0 if more else 10000.0)
    assert ("max_position_embeddings" in settled) is matters
    assert settled["hidden_act"] == "silu" and "hidden_size" not in settled


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id is 0; a roberta is described only with pad_token_id=1"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_settings_beyond_the_rows_are_refused(name: str, changes: dict[str, Any], text: str) -> None:
    config = {**tiny.config_of(name), **changes}
    with pytest.raises(UnsupportedGrowth, match=text):
        TABLES[config["model_type"]].axis_sizes(config)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"num_key_value_heads=4 does not divide num_attention_heads=6"):
        TABLES["llama"].axis_sizes({**tiny.config_of("llama"), "num_key_value_heads": 4})


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "modernbert"])
@pytest.mark.parametrize(
    "old",
    [
        {},
        {"rope_theta": 500000},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": SCALED},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"global_rope_theta": 8e4, "local_rope_theta": 9e3},
    ],
    ids=repr,
)
def test_rotary_positions_in_old_words(name: str, old: dict[str, Any]) -> None:
    """What an older config says is what transformers makes of it, so that growing into a re-saved one is not a change;
    and a scaling that the target leaves out is one."""
    new = tiny.config_of(name)
    if ("global_rope_theta" in old) != (name == "modernbert") and old:
        return  # the other architecture's words
    older = {key: value for key, value in new.items() if key != "rope_parameters"} | copy.deepcopy(old)
    resaved = transformers.AutoConfig.for_model(**copy.deepcopy(older)).to_dict()
    table = TABLES[new["model_type"]]
    theirs = {key: value for key, value in table.settled(resaved).items() if key == "rope_parameters"}
    found = table.settled(older)["rope_parameters"]
    assert found == theirs["rope_parameters"], (found, resaved["rope_parameters"])
    assert plan_growth(older, resaved).exactness.function == plan_growth(resaved, older).exactness.function == ()
    if old:
        with pytest.raises(UnsupportedGrowth, match="rope_parameters is"):
            plan_growth(older, new)
    with pytest.raises(InvalidConfig, match="rope_scaling is 'linear'; an object"):
        plan_growth(older | {"rope_scaling": "linear"}, new)


def test_a_window_that_appears_is_refused() -> None:
    config = tiny.config_of("mistral", sliding_window=None)
    for a, b in ((config, config | {"sliding_window": 5}), (config | {"sliding_window": 5}, config)):
        with pytest.raises(UnsupportedGrowth, match="sliding_window is"):
            plan_growth(a, b)


@pytest.mark.parametrize("width", ["fpi", "random"])
def test_kinds_of_another_number_of_layers_are_refused(width: str) -> None:
    config = tiny.config_of("qwen3")
    with pytest.raises(InvalidConfig, match="target config: layer_types lists the kinds of 3 layers, and there are 5"):
        plan_growth(config, config | {"num_hidden_layers": 5}, width=width)


@pytest.mark.parametrize(
    ("name", "changes", "how"),
    [
        ("modernbert", {"layer_types": 3}, {}),
        ("modernbert", {"layer_types": None, "global_attn_every_n_layers": 0}, {}),
        ("modernbert", {"rope_parameters": {"full_attention": 3}}, {}),
        ("bert", {"initializer_range": None, "num_hidden_layers": 4}, {"depth": "random"}),
        ("mixtral", {"num_experts_per_tok": "2", "num_local_experts": 10}, {"experts": "duplicate"}),
        ("mixtral", {"num_experts_per_tok": 0, "num_local_experts": 10}, {"experts": "duplicate"}),
    ],
)
def test_values_of_the_wrong_kind_are_refused(name: str, changes: dict[str, Any], how: dict[str, Any]) -> None:
    """By key, and with what is expected."""
    config = tiny.config_of(name)
    key = next(iter(changes)) if len(changes) == 1 or how else "global_attn_every_n_layers"
    wanted = "full_attention" if key == "rope_parameters" else key
    with pytest.raises(InvalidConfig, match=wanted):
        plan_growth(config, config | changes, **how)
    with pytest.raises(InvalidConfig, match="architectures is 3"):
        plan_growth(config | {"architectures": 3}, config)
