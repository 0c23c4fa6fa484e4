"""The operator on tied embeddings: the word embedding is copied into an output matrix of its own.

Refuses nothing: which models it is for, `growth.untying` checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bert2bert.operators.registry import operator


@operator(
    "embeddings",
    "untie",
    paper="record 53 of modded-nanogpt",
    keeps="the function",
    needs="a tied model with a language-model head whose config says whether it is tied, so no T5",
    moments="carried",
)
def untie(names: Iterable[str], ties: Mapping[str, str]) -> dict[str, str]:
    """The tied word embedding is copied into an output matrix of its own, W_out = W_in.

    Both matrices carry the moments of the one, a heuristic: its gradient was the sum of the look-up's and the output's,
    of which each matrix has one from now on. Goes with any width and depth that copy and enlarge; the target config has
    tie_word_embeddings false.
    """
    return {name: ties.get(name, name) for name in names}
