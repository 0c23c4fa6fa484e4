"""What target tensors without a source go with: the optimizer group that one joins, and which are frozen.

An inserted block's zeros, a norm that the copied layer lacks (ModernBERT's first) and a new router have no tensor of
the source to follow. They go with the layer that the rest of their layer is made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bert2bert.tables import table_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bert2bert.growth.opened import Growth
    from bert2bert.tables import Parameter


def akin(growth: Growth) -> dict[str, str]:
    """Target tensor without a source -> the source's tensor of the same kind whose group it joins: of the layer
    that the rest of its layer is made of, else of any. Canonical names; left out where the source has no such kind."""
    kin = _Kin(growth)
    found = {name: [*kin.counterparts(name), *kin.of_kind(name)] for name in kin.new}
    return {name: ones[0] for name, ones in found.items() if ones}


def frozen(growth: Growth) -> frozenset[str]:
    """The target tensors, by canonical names, that stay frozen: those of which all that they are made of was frozen.

    One without a source follows the tensor of its kind in the layer that its layer is made of, and all that its
    layer is made of where that lacks the kind. In a layer that is all new it is trained.
    """
    kin, model = _Kin(growth), growth.model
    trained = {name for name in model.parameters if model.source.meta(model.stored(name)).trainable}
    followed = {name: growth.roots(name) or kin.followed(name) for name in growth.plan.tensors}
    return frozenset(name for name, found in followed.items() if found and trained.isdisjoint(found))


class _Kin:
    """``new``: the target's tensors without a source."""

    def __init__(self, growth: Growth) -> None:
        own, plan = growth.model.parameters, growth.plan
        self._own = own
        self._grown: Mapping[str, Parameter] = table_for(plan.config).parameters(plan.config, growth.model.heads)
        self._kinds = {p.pattern: name for name, p in reversed(own.items())}
        self._at = {(p.pattern, p.layer): name for name, p in reversed(own.items())}
        self._roots: dict[tuple[str, int | None], dict[str, None]] = {}
        """Stack and number of a target layer -> the source's tensors of layers of that stack that it is made of."""
        self.new: list[str] = []
        for name in plan.tensors:
            p, roots = self._grown[name], growth.roots(name)
            self.new += [] if roots else [name]
            same = (root for root in roots if own[root].depth == p.depth)
            self._roots.setdefault((p.depth, p.layer), {}).update(dict.fromkeys(same))

    def counterparts(self, name: str) -> list[str]:
        """The tensors of the same kind in the layers that the rest of its layer is made of."""
        p = self._grown[name]
        layers = dict.fromkeys(self._own[root].layer for root in self._roots[p.depth, p.layer])
        return [self._at[p.pattern, layer] for layer in layers if (p.pattern, layer) in self._at]

    def of_kind(self, name: str) -> list[str]:
        """The source's first tensor of the same kind, if it has any."""
        return [self._kinds[kind]] if (kind := self._grown[name].pattern) in self._kinds else []

    def followed(self, name: str) -> list[str]:
        """The source's tensors with which one without a source is frozen."""
        p = self._grown[name]
        return [] if p.layer is None else self.counterparts(name) or [*self._roots[p.depth, p.layer]]
