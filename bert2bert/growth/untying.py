"""Growth of a tied model into an untied one: the word embedding is copied into an output matrix of its own.

The first step of two: at the source's sizes the copy is made, then the ordinary operators grow the untied model. The
function stays what it was. The moments of both matrices are those of the one: its gradient was the sum of the look-up's
and the output's, of which each matrix has one from now on, so that they are carried and not exact.

Refuses (`UnsupportedGrowth`) models without a head of words, architectures whose config does not say whether they are
tied, targets that are tied, operators that shrink, mix or draw everything, and other architectures; (`InvalidConfig`) a
source that is untied already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from bert2bert.algebra.plan import Dim, Exactness, GrowthPlan, TensorPlan, Term
from bert2bert.errors import InvalidConfig, UnsupportedGrowth
from bert2bert.growth.choices import Choices
from bert2bert.growth.within import within
from bert2bert.tables import table_for

MOMENTS = (
    "word embedding and output matrix carry the moments of the tied matrix, though the gradient of each is but one of "
    "the two that were added there, a heuristic"
)


def untied(
    source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str], optimizer: bool
) -> GrowthPlan:
    """The plan of a growth into an untied model, which rests on that of the copy. optimizer: whether the source has
    moments. Raises UnsupportedGrowth, InvalidConfig."""
    _check(source, target, choices, heads)
    first = _copied(source, heads, choices)
    second = within(first.config, target, replace(choices, embeddings=None), heads, optimizer)
    exact = Exactness() if second.moments == "reset" else first.exactness
    return replace(
        second,
        before=(first,),
        recipe={**second.recipe, "embeddings": str(choices.embeddings)},
        exactness=exact + second.exactness,
        moments="carried" if second.moments == "exact" else second.moments,
    )


def _copied(source: Mapping[str, Any], heads: frozenset[str], choices: Choices) -> GrowthPlan:
    """The source, untied."""
    table, config = table_for(source), {**source, "tie_word_embeddings": False}
    parameters = table.parameters(config, heads)
    copied = choices.embeddings.make(parameters, table.aliases(source, heads)) if choices.embeddings else {}
    tensors = {}
    for name, p in parameters.items():
        term = Term(copied[name], tuple(Dim(np.arange(size)) for size in p.shape))
        tensors[name] = TensorPlan(name, p.spec, p.shape, (term,))
    kept = Exactness(moments=(MOMENTS,))
    return GrowthPlan(tensors, config, table.aliases(config, heads), exactness=kept, moments="carried")


def check_source(source: Mapping[str, Any], heads: frozenset[str], option: str) -> None:
    """Raise UnsupportedGrowth or InvalidConfig for a model that cannot be untied. option: for messages."""
    table = table_for(source)
    if table.names.untie:
        raise UnsupportedGrowth(
            f"{option}: a {table.model_type} is tied until its files hold another head, whatever its config says, and "
            f"{table.names.untie} says how its logits are scaled; leave the option out"
        )
    if "lm" not in heads:
        raise UnsupportedGrowth(
            f"{option}: the source has no language-model head, so it has no output matrix; leave the option out"
        )
    if not table.tied(source):
        raise InvalidConfig(f"{option}: the source is untied already (tie_word_embeddings=false); leave the option out")


def _check(source: Mapping[str, Any], target: Mapping[str, Any], choices: Choices, heads: frozenset[str]) -> None:
    table, option = table_for(source), f"--embeddings {choices.embeddings}"
    if target.get("model_type") != table.model_type:
        raise UnsupportedGrowth(
            f"{option}: the target is a {target.get('model_type')}, the source a {table.model_type}; untie it within "
            f"its architecture first, then grow that"
        )
    check_source(source, heads, option)
    if table.tied(target):
        raise UnsupportedGrowth(
            f"{option}: tie_word_embeddings is true in the target config, or left out, which means true; set it to "
            f"false there"
            if table.names.tie_default
            else f"{option}: tie_word_embeddings is true in the target config; set it to false there"
        )
    width = choices.width.operator
    if choices.shrinks or width.name in ("random", "ligo"):
        one = choices.width if width.shrinks or not choices.shrinks else choices.depth
        raise UnsupportedGrowth(
            f"{option} with {one.flag}: only operators that copy and enlarge can go with it; untie alone first, in a "
            f"growth of the same sizes"
        )
    if choices.moments == "exact":
        raise UnsupportedGrowth(
            f"--moments exact: this growth cannot keep the moments exactly:\n  {MOMENTS}\n"
            f"Use --moments carried, asymmetric (zero for what width and depth add) or reset."
        )
