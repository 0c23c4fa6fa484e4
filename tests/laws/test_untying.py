"""A tied model grows into an untied one: the function stays, both matrices carry the moments of the one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.choices import Choices
from bert2bert.growth.steps import replan
from bert2bert.tables import table_for
from tests import tiny
from tests.laws.harness import STATES, Grown, assert_same_logits, reader, realised
from tests.laws.test_levels import random_states
from tests.planning import plan_growth

TIED = ["bert", "roberta", "gpt2", "llama-tied", "modernbert"]
OTHERS = ["mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe"]  # untied in tests.tiny


def tied(name: str) -> dict[str, Any]:
    return tiny.config_of(name, tie_word_embeddings=True)


@pytest.mark.parametrize("name", TIED + OTHERS)
def test_a_tied_matrix_becomes_two_with_its_moments(name: str) -> None:
    small = tied(name)
    large = small | {"tie_word_embeddings": False}
    grown = Grown(small, plan_growth(small, large, embeddings="untie"))
    assert_same_logits(grown)
    assert grown.plan.moments == "carried" and any("tied matrix" in why for why in grown.plan.exactness.moments)
    assert grown.plan.aliases == {}
    words, head = grown.target.get_input_embeddings(), grown.target.get_output_embeddings()
    assert words.weight is not head.weight and torch.equal(words.weight, head.weight)
    states = random_states(grown.plan, small)
    ties = table_for(small).aliases(small, frozenset(grown.plan.recipe["heads"]))
    assert ties
    for state in STATES:
        for n, value in realised(grown.plan, reader(states), state).items():
            assert torch.equal(value, states[state][ties.get(n, n)]), (state, n)


@pytest.mark.parametrize("name", TIED + OTHERS)
def test_with_a_width_in_the_same_pass(name: str) -> None:
    """Whole multiples keep the function; the matrices part, for one is read through copies that the other writes."""
    small = tied(name)
    wide = table_for(small).resize(small, {"embed": 2 * table_for(small).axis_sizes(small)["embed"]})
    plan = plan_growth(small, wide | {"tie_word_embeddings": False}, embeddings="untie")
    grown = Grown(small, plan)
    assert_same_logits(grown)
    again = replan(plan.recipe, plan.config, small)
    assert again.digest() == plan.digest() and again.recipe == plan.recipe
    assert str(Choices.of_recipe(plan.recipe).embeddings) == "untie"


def test_with_depth_and_other_moments() -> None:
    small = tied("gpt2")
    large = small | {"tie_word_embeddings": False, "n_layer": 2 * small["n_layer"]}
    assert_same_logits(Grown(small, plan_growth(small, large, depth="insert_identity", embeddings="untie")))
    reset = plan_growth(small, large, embeddings="untie", moments="reset")
    assert reset.moments == "reset" and all(p.reset for p in reset.tensors.values())


@pytest.mark.parametrize(
    ("name", "source", "target", "how", "text"),
    [
        ("gpt2", True, False, {"embeddings": None}, "or copy the tied matrix .* with --embeddings untie"),
        ("gpt2", True, True, {}, "tie_word_embeddings is true in the target config"),
        ("gpt2", False, False, {}, "the source is untied already"),
        ("gpt2", False, True, {"embeddings": None}, "tie_word_embeddings is False in the source and True"),
        ("t5", True, False, {}, "a t5 is tied until its files hold another head"),
        ("gpt2", True, False, {"moments": "exact"}, "--moments exact: .*\n.*tied matrix"),
        ("gpt2", True, False, {"width": "random"}, "--embeddings untie with --width random"),
        ("gpt2", True, False, {"depth": "shrink"}, "--embeddings untie with --depth shrink"),
        ("gpt2", True, False, {"embeddings": "tie"}, "--embeddings 'tie': unknown operator; .*untie"),
    ],
)
def test_what_is_refused(name: str, source: bool, target: bool, how: dict[str, Any], text: str) -> None:
    small = tiny.config_of(name, tie_word_embeddings=source)
    with pytest.raises((UnsupportedGrowth, InvalidConfig), match=text):
        plan_growth(small, small | {"tie_word_embeddings": target}, **({"embeddings": "untie"} | how))


def test_a_model_without_words_has_no_output_matrix() -> None:
    small = tiny.config_of("BertModel")
    with pytest.raises(UnsupportedGrowth, match="no language-model head"):
        plan_growth(small, small | {"tie_word_embeddings": False}, embeddings="untie")
