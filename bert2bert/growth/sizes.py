"""Chooses the sizes of a larger or smaller model: what is asked for, made to divide.

Heads stay whole and keep their size, groups of query heads stay groups, the feed-forward size follows the width. A size
that is asked for and works is taken as it is; where none can be, the nearest that works is chosen, a multiple of 64 (of
128 where that is as near) in models as wide as that, and a note says so. A number of parameters is reached by
searching width and depth, at about the source's aspect (width over depth).

Refuses (`InvalidConfig`): sizes that contradict one another, that the architecture does not have, or that cannot
divide; a vocabulary without the special tokens; a number of parameters that is out of reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import gcd, inf, isclose, lcm, log
from typing import Any, NamedTuple

from bert2bert.errors import InvalidConfig
from bert2bert.growth.resize import count, with_sizes
from bert2bert.growth.round_sizes import KERNELS, WIDE, nearest, unit
from bert2bert.growth.size_request import Amount, SizeRequest
from bert2bert.tables import Table, table_for

_MOST = 4096  # widths that are tried
_LARGEST, _DEEPEST, _MOST_PARAMETERS = 2**24, 2**12, 1e13  # of an axis, of a stack, of a model; far above all there are
_NEAR = 0.03  # how far a number of parameters may be from what was asked for, for the aspect to count


class Resized(NamedTuple):
    """A config of other sizes, and in sentences what was chosen in it that was not asked for."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def resized(config: Mapping[str, Any], heads: frozenset[str], request: SizeRequest) -> Resized:
    """The config of the model that is asked for. heads: that its class has. Raises InvalidConfig, UnsupportedGrowth."""
    sizer = _Sizer(config, heads, request)
    if request.params is not None:
        width, depth = sizer.searched(request.params.of(count(config, heads)))
    else:
        width, depth = sizer.width(), sizer.depth()
    changes = sizer.changes(width) | depth
    for axis, size in changes.items():
        if size > (most := _DEEPEST if axis in sizer.table.sizes.depth else _LARGEST):
            raise InvalidConfig(f"{sizer.table.key(axis)} would be {size:,}; expected at most {most:,}")
    made = sizer.made(changes)
    sizer.check(made)
    notes = tuple(sizer.notes(changes))
    if made == dict(config):
        why = "".join(f"\n{note}" for note in notes)
        raise InvalidConfig(f"the sizes that are asked for are those of the source; nothing would change{why}")
    return Resized(made, notes)


class _Sizer:
    """The sizes that go with one another in a model of this architecture."""

    def __init__(self, config: Mapping[str, Any], heads: frozenset[str], request: SizeRequest) -> None:
        self.config, self.classes, self.request = config, heads, request
        self.table: Table = table_for(config)
        old = self.old = self.table.axis_sizes(config)
        self.grouped = "kv" in old
        self.heads = old["kv"] * old["group"] if self.grouped else old["heads"]
        self.derived = self.table.key("qk") == self.table.key("embed")  # a head's size is the width's share
        self.whole = self.derived or self.heads * old["qk"] == old["embed"]  # the heads make up the width
        for amount, axis, what in (
            (request.kv_heads, "kv", "key-value heads"),
            (request.experts, "experts", "experts"),
        ):
            if amount is not None and axis not in old:
                raise InvalidConfig(f"{amount.option}: a {self.table.model_type} has no {what}; leave the option out")
        self.query = None if request.heads is None else self._number(request.heads, self.heads)
        self.kv = None if request.kv_heads is None else self._number(request.kv_heads, old["kv"])

    def _number(self, amount: Amount, old: int) -> int:
        """A size that must be a whole number as it is asked for."""
        found = amount.of(old)
        if not isclose(found, round(found)) or round(found) < 1:
            raise InvalidConfig(f"{amount.option} {amount.text} of {old} is {found:g}; a whole number is expected")
        return round(found)

    # ------------------------------------------------------------------------------------------ heads and widths

    @property
    def resizes_heads(self) -> bool:
        """Whether the number of heads is given and their size follows from the width."""
        return self.query is not None and self.derived and "qk" not in self.table.sizes.fixed

    @property
    def given_width(self) -> int | None:
        """The width of so many heads as are given, where their size can be no other."""
        return self.query * self.old["qk"] if self.query and self.derived and not self.resizes_heads else None

    @property
    def group(self) -> int:
        """By how many heads at a time their number can change."""
        if self.kv is not None:
            return self.kv
        return self.old["group"] if self.grouped and self.old["kv"] > 1 else 1

    @property
    def step(self) -> int:
        """What divides every width."""
        if self.query is not None and not self.given_width:
            if self.resizes_heads:
                return self.query * gcd(8, self.old["qk"])
            return self.query if self.table.model_type in self.table.sizes.multiples else 1
        return self.old["qk"] * self.group if self.whole else 1

    def width(self) -> int:
        """The width that is asked for, or the nearest that works."""
        old, asked = self.old["embed"], self.request.width
        if (given := self.given_width) is not None:
            if asked is not None and asked.of(old) != given:
                raise InvalidConfig(
                    f"--width {asked.text} with --heads {self.query}: {self.query} heads of {self.old['qk']} are "
                    f"{given} wide, and the head size cannot change; leave one of the two out"
                )
            return given
        if asked is None:
            return old
        found = nearest(asked.of(old), self.step, old)
        near = (found + sign * i * self.step for i in range(old) for sign in (1, -1))
        return next((size for size in near if size > 0 and self._works(size)), found)

    def _works(self, width: int) -> bool:
        """Whether the architecture has models of this width: some want more to divide than `step` says."""
        try:
            self.made(self.changes(width))
        except InvalidConfig:
            return False
        return True

    def changes(self, width: int) -> dict[str, int]:
        """The sizes that go with a width."""
        old, ratio = self.old, width / self.old["embed"]
        found = {"embed": width}
        if self.query is not None or width == old["embed"]:
            query = self.query or self.heads
        elif self.whole:
            query = width // old["qk"]
        else:
            query = max(1, round(self.heads * ratio / self.group)) * self.group
        if self.grouped:
            kv = self.kv or (old["kv"] if query % old["group"] or old["kv"] == 1 else query // old["group"])
            found |= {"kv": kv, "group": query // kv}
            if query % kv:
                raise InvalidConfig(
                    f"{query} heads cannot be shared evenly among {kv} key-value heads; give other --kv-heads"
                )
        else:
            found["heads"] = query
        scaled = old["ffn"] * ratio if self.request.ffn is None else self.request.ffn.of(old["ffn"])
        found["ffn"] = self._following(scaled, "ffn")
        if "shared" in old:
            found["shared"] = self._following(old["shared"] * scaled / old["ffn"], "shared")
        for amount, axis in ((self.request.experts, "experts"), (self.request.vocab, "vocab")):
            if amount is not None:
                found[axis] = self._number(amount, old[axis])
        return found

    def _following(self, wanted: float, axis: str) -> int:
        """A feed-forward size: as it is asked for or a whole number of times the old one, else one that kernels like,
        in wide models."""
        old = self.old[axis]
        free = self.request.ffn is not None or isclose(wanted % old, 0) or old < WIDE
        return nearest(wanted, 1 if free else KERNELS, old)

    # ------------------------------------------------------------------------------------------ depths

    def depths(self, layers: float) -> dict[str, int]:
        """The layers of every stack, the first having so many."""
        stacks = self.table.sizes.depth
        first = self.old[stacks[0]]
        if not first:
            return dict.fromkeys((axis for axis in stacks if axis in self.old), max(1, round(layers)))
        return {axis: max(1, round(self.old[axis] * layers / first)) for axis in stacks if axis in self.old}

    def depth(self) -> dict[str, int]:
        """The layers that are asked for, or the nearest whole number of them."""
        old, asked = self.old[self.table.sizes.depth[0]], self.request.depth
        if asked is None:
            return {axis: self.old[axis] for axis in self.table.sizes.depth if axis in self.old}
        if not old and asked.times:
            raise InvalidConfig(f"--depth {asked.text} of a model without layers; give the number of layers")
        return self.depths(asked.of(old))

    # ------------------------------------------------------------------------------------------ parameters

    def made(self, changes: Mapping[str, int]) -> dict[str, Any]:
        """The config with these sizes."""
        return with_sizes(self.config, changes)

    def searched(self, wanted: float) -> tuple[int, dict[str, int]]:
        """Width and depth of about ``wanted`` parameters: of those nearly so the one whose aspect is nearest to the
        source's, else the nearest number. Raises InvalidConfig where that is more than twice off."""
        if wanted > _MOST_PARAMETERS:
            raise InvalidConfig(f"--params {wanted:,.0f}; expected at most {_MOST_PARAMETERS:,.0f}")
        old, first = self.old["embed"], self.table.sizes.depth[0]
        if not self.old[first]:
            raise InvalidConfig(
                "--params of a model without layers, which has no aspect to keep; give --width and --depth"
            )
        fixed = self.request.width is not None or self.given_width is not None
        best: tuple[tuple[float, ...], int, dict[str, int]] | None = None
        for width in [self.width()] if fixed else self._widths(wanted):
            flattest = inf
            for depth, numbers in self._counted(width, wanted):
                off, aspect = abs(log(numbers / wanted)), log(width / old * self.old[first] / depth[first])
                liked = 0.0 if width % (2 * KERNELS) == 0 else 0.02
                rank = (0.0, abs(aspect) + 2 * off + liked) if off <= _NEAR else (off, abs(aspect))
                flattest = min(flattest, aspect) if off <= _NEAR else flattest
                if best is None or rank < best[0]:
                    best = rank, width, depth
            if best is not None and best[0][0] == 0.0 and best[0][1] < flattest < inf:
                break  # wider ones are flatter still
        if best is None or best[0][0] > log(2):
            near = "none" if best is None else f"{count(self.made(self.changes(best[1]) | best[2]), self.classes):,}"
            raise InvalidConfig(
                f"--params {wanted:,.0f} is out of reach with the other sizes as they are (nearest: {near}); the "
                "embeddings have most of a small model's parameters: give a smaller --vocab, or another number"
            )
        return best[1], best[2]

    def _widths(self, wanted: float) -> Iterator[int]:
        """Widths that work, up to where the least depth is too large."""
        least = self.depths(0) if self.request.depth is None else self.depth()
        step = lcm(self.step, unit(self.old["embed"]))
        widths = filter(self._works, range(step, _MOST * step + 1, step))
        if (narrowest := next(widths, None)) is None:
            self.made(self.changes(step))  # which says why
        yield narrowest or step
        for width in widths:
            if count(self.made(self.changes(width) | least), self.classes) > 1.5 * wanted:
                return
            yield width

    def _counted(self, width: int, wanted: float) -> Iterator[tuple[dict[str, int], int]]:
        """Depths that come near, and how many parameters the model then has."""
        changes = self.changes(width)
        one = dict.fromkeys(self.depths(1), 1)
        base = count(self.made(changes | one), self.classes)
        each = {axis: count(self.made(changes | one | {axis: 2}), self.classes) - base for axis in one}
        first = self.table.sizes.depth[0]
        slope = sum(each[axis] * self.old[axis] / self.old[first] for axis in one)
        middle = max(1, int((wanted - base) / slope))
        near = range(max(1, middle - 2), middle + 4)
        for depth in [self.depth()] if self.request.depth is not None else map(self.depths, near):
            yield depth, base + sum(each[axis] * (size - 1) for axis, size in depth.items())

    # ------------------------------------------------------------------------------------------ notes

    def check(self, made: Mapping[str, Any]) -> None:
        """Refuse sizes that leave special tokens or experts without a place."""
        sizes = self.table.axis_sizes(made)
        for key, value in made.items():
            for token in value if isinstance(value, list) else [value]:
                if key.endswith("_token_id") and isinstance(token, int) and token >= sizes["vocab"] > 0:
                    raise InvalidConfig(f"--vocab {sizes['vocab']}: {key}={token} of the config would be no token")
        chosen = made.get("num_experts_per_tok") or 1
        if "experts" in sizes and chosen > sizes["experts"]:
            raise InvalidConfig(f"--experts {sizes['experts']}: a token is sent to {chosen} (num_experts_per_tok)")

    def notes(self, changes: Mapping[str, int]) -> Iterator[str]:
        """What was chosen in place of what was asked for, and sizes that work and are not liked."""
        asked = self.request
        first = self.table.sizes.depth[0]
        if asked.params:
            yield f"{asked.params.option} {asked.params.text}: chosen {changes['embed']} wide, {changes[first]} layers"
        if self.given_width is not None:
            yield f"--heads {self.query}: {self.table.key('embed')} follows, for heads keep their size"
        why = {"embed": self._reason(), "ffn": "a whole number", first: "a whole number of layers"}
        for axis, amount in (("embed", asked.width), ("ffn", asked.ffn), (first, asked.depth)):
            if amount is not None and not isclose(wanted := amount.of(self.old[axis]), changes[axis]):
                multiple = next((m for m in (128, 64) if axis != first and changes[axis] % m == 0), 0)
                also = f" and a multiple of {multiple}" if multiple else ""
                is_ = f" is {wanted:g}" if amount.times else ""
                yield f"{amount.option} {amount.text}{is_}: chosen {changes[axis]}, for {why[axis]}{also}"
        if asked.ffn is None and (follows := self.old["ffn"] * changes["embed"] / self.old["embed"]) != changes["ffn"]:
            yield f"{self.table.key('ffn')} follows the width to {follows:g}: chosen {changes['ffn']}"
        for axis in ("embed", "ffn", "vocab"):
            size = changes.get(axis, self.old[axis])
            if size != self.old[axis] and size >= WIDE and size % KERNELS:
                yield f"{self.table.key(axis)}={size} is not a multiple of {KERNELS}, which kernels like"

    def _reason(self) -> str:
        """What a width must be."""
        if self.resizes_heads:
            return f"{self.query} heads whose size is a multiple of {gcd(8, self.old['qk'])}"
        if not self.whole or self.query is not None:
            return "sizes that divide"
        return f"whole heads of {self.old['qk']}" + (f", {self.group} at a time" if self.group > 1 else "")
