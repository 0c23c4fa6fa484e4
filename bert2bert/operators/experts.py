"""Expert operators: a dense feed-forward becomes experts (upcycle), and experts become more (duplicate).

Routers are softmaxes of ``experts <- normed`` over all experts of which the largest few are kept; dividing these by
their sum, as Mixtral does and Qwen3-MoE with norm_topk_prob, is the same as choosing first and taking the softmax then.
Refuses experts that do not divide into shards, and more experts a token than there are (`InvalidConfig`); which models
an operator is for, `upcycling` and `growth` check.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from bert2bert.algebra.maps import Gather, copies
from bert2bert.errors import InvalidConfig
from bert2bert.operators.decisions import Pair, Reasons, Width
from bert2bert.operators.registry import operator

_TOP = "num_experts_per_tok"


@dataclass(frozen=True)
class Shards:
    """How a dense feed-forward becomes experts."""

    count: int
    """Its features are cut into so many shards; expert j is a copy of shard j // (experts / count)."""
    gate: float = 1.0
    """Factor on the gate's matrix; up, down: on the others."""
    up: float = 1.0
    down: float = 1.0
    function: tuple[str, ...] = ()
    """Why logits change."""
    notes: tuple[str, ...] = ()
    """Advice to print."""


def chosen(pair: Pair, source: bool = False) -> int:
    """How many experts a token has, in the target or the source. Raises InvalidConfig."""
    config, experts = (pair.source, pair.small["experts"]) if source else (pair.target, pair.large["experts"])
    top = config.get(_TOP, pair.table.compatible.must_agree[_TOP])
    if not isinstance(top, int) or isinstance(top, bool) or top < 1:
        raise InvalidConfig(f"model config: {_TOP} is {top!r}; a positive integer is expected")
    if top > experts:
        raise InvalidConfig(f"model config: {_TOP}={top} of {experts} experts; choose at most {experts}")
    return top


def normalised(pair: Pair) -> bool:
    """Whether the weights of a token's experts sum to one."""
    return bool(pair.target.get("norm_topk_prob", pair.table.compatible.must_agree.get("norm_topk_prob", True)))


def _ties(choice: str) -> tuple[str, ...]:
    """Advice on router rows that several experts share."""
    return (
        "router rows are shared by several experts, so the function is kept up to ties: where the scores of the last "
        f"row that is chosen and of the next tie at the run's precision, top-k may choose {choice}, and that token's "
        "function changes (rare in float32, less so in bfloat16)",
    )


@operator(
    "experts", "upcycle", paper="Komatsuzaki et al., ICLR 2023; He et al. (NVIDIA), 2024", moments="carried",
    keeps="the function, where the weights of a token's experts sum to one",
    needs="a dense llama or mistral for a mixtral, a qwen3 for a qwen3_moe",
)  # fmt: skip
def upcycle(pair: Pair, *, granularity: int = 1, scale: Literal["keep", "cube", "none"] = "keep") -> Shards:
    """Every expert is a copy of the dense feed-forward, or of a shard of it; routers are drawn at random.

    granularity G, virtual groups: the dense features are cut into G shards, each with E = experts / G copies, and the G
    groups share E router rows, so that a token's T experts are T / G copies of every shard. The dense layer is G times
    as wide as an expert. scale, of the experts' weights: 'keep' undoes the router's factor, 1 / G where weights sum to
    one, else T / (E G^2), its mean for an even router, half on up and half on down; 'cube' is the paper's, all three
    times the cube root of E G^2 / T; 'none'. Exact up to ties: where the scores of two router rows are equal at the
    run's precision, which of their experts are chosen is left to top-k, and a shard can be missed. No router without
    biases can prevent it.
    """
    experts, top = pair.large["experts"], chosen(pair)
    if experts % granularity:
        raise InvalidConfig(
            f"--experts upcycle:granularity={granularity}: the target config has {experts} experts, which do not "
            f"divide into {granularity} shards; choose a multiple"
        )
    sums, published = normalised(pair) or top == experts, experts * granularity / top
    factor, cube = float(granularity) if sums else published, published ** (1 / 3)
    gate, linear = {"keep": (1.0, sqrt(factor)), "cube": (cube, cube), "none": (1.0, 1.0)}[scale]
    reasons = {
        f"the weights of a token's {top} of {experts} experts do not sum to one (norm_topk_prob=False)": not sums,
        f"a token's {top} experts cannot hold each of {granularity} shards equally often": bool(top % granularity),
        "scale=cube multiplies what enters the activation too, which is not linear": gate != 1,
        f"with scale=none the experts' sum is 1 / {factor:.6g} of the dense layer": scale == "none" and factor != 1,
    }
    function = tuple(f"upcycle: {reason}" for reason, holds in reasons.items() if holds)
    ties = granularity > 1 and not top % granularity and top < experts
    notes = _ties(f"experts of one of the {granularity} shards twice and miss another") if ties else ()
    return Shards(granularity, gate, linear, linear, function, notes)


@operator(
    "experts", "duplicate", paper="Dwivedi et al., Expert Upcycling, 2026",
    keeps="the function, where experts and experts a token grow by the same whole number",
    needs="a mixture of experts",
)  # fmt: skip
def duplicate(pair: Pair) -> Width:
    """Experts and their router rows are copied, round and round: expert j is old expert j mod n.

    Copies of one expert score alike, so a token chooses all of them or none: with c times the experts and
    num_experts_per_tok the function is kept (up to ties of scores at the run's precision, where top-k may take copies
    of both), and the moments are exact; with the old number, a token gets the copies of fewer experts. The paper adds
    noise to router biases, which these routers do not have: --break-symmetry noise gives
    to a copy's down projection what it takes from the next one's.
    """
    old, new = pair.small["experts"], pair.large["experts"]
    before, after = chosen(pair, source=True), chosen(pair)
    index = np.arange(new) % old
    times, rest = divmod(new, old)
    if not rest and after == times * before:
        ties = times > 1 and before < old
        notes = _ties("copies of both and not all of either") if ties else ()
        return Width("duplicate", {"experts": copies(index, old)}, reasons=Reasons(notes=notes))
    alone = before == after == 1 and normalised(pair)
    reason = (
        f"experts {old} -> {new}, num_experts_per_tok {before} -> {after}: copies score alike and are chosen together, "
        f"so a token gets other experts or weights; {times * before} of {times * old} would keep the function"
    )
    heuristic = "copied experts carry their original's moments unscaled, a heuristic"
    reasons = Reasons(function=() if alone else (reason,), moments=(heuristic,))
    return Width("duplicate", {"experts": Gather(index, old)}, reasons=reasons)
