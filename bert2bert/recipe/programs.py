"""Programs: which layers run and which parts learn, step by step. Torch-free.

A program is a frozen dataclass with a field ``kind`` that names it in JSON, a `check` and a `step` (`Program`); a
recipe file may define its own (docs/how-to/add-a-program.md). What a step does follows from the recipe, its seed and
the step's number alone: every rank computes the same by itself, and a resumed run the same once more.

Refused (`InvalidConfig`): a program that does not fit the model's layers, at the door where it can be seen there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, Protocol

from bert2bert.errors import InvalidConfig
from bert2bert.model.program import SHARES, Step, full
from bert2bert.recipe import foreign
from bert2bert.recipe.checks import in_range, require

_TRIED = 64  # steps of a program that are looked at before a run


@dataclass(frozen=True)
class Draw:
    """What a program may ask.

    step: 0-based optimizer step of the run. phase_step: of the phase. seed: the recipe's. parts: of the model's layers,
    in order, as its table names them ("layer.0", ...; those of a T5 through both stacks). fresh: parts that the last
    growth inserted.
    """

    step: int
    phase_step: int
    seed: int
    parts: tuple[str, ...]
    fresh: frozenset[str] = frozenset()

    def below(self, n: int, what: str = "") -> int:
        """An integer drawn uniformly from [0, n); what: tells apart several draws of one step."""
        return self._hash(what) % n

    def uniform(self, what: str = "") -> float:
        """A number drawn uniformly from [0, 1)."""
        return (self._hash(what) >> 11) / 2**53

    def _hash(self, what: str) -> int:
        # A hash and not a generator: the draw of a step does not depend on the steps before it.
        digest = hashlib.blake2b(f"{what} {self.seed} {self.step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


class Program(Protocol):
    """What `Phase.program` takes: an instance of a frozen dataclass with these. kind: a field that no constructor takes
    (init=False); its default names the class in JSON."""

    @property
    def kind(self) -> str: ...

    def check(self, layers: int) -> None:
        """Raises InvalidConfig, naming the field, where the program does not fit a model of so many layers."""

    def step(self, draw: Draw) -> Step:
        """What is done in one optimizer step."""


@dataclass(frozen=True)
class Full:
    """Every layer runs and learns."""

    kind: str = field(default="full", init=False)

    def check(self, layers: int) -> None: ...

    def step(self, draw: Draw) -> Step:
        return full(draw.parts)


@dataclass(frozen=True)
class SubModels:
    """bert2BERT's first stage (ACL 2022, algorithm 2): the bottom d layers run, d drawn per step from {k, 2k, ..., L};
    their top k and the head learn."""

    layers_per_stage: int = 3
    kind: str = field(default="sub-models", init=False)

    def __post_init__(self) -> None:
        in_range("program.layers_per_stage", self.layers_per_stage, 1)

    def check(self, layers: int) -> None:
        divisors = [k for k in range(1, layers + 1) if layers % k == 0]
        if not layers:
            raise InvalidConfig("the model has no layers to train by stages; expected the program 'full'")
        if self.layers_per_stage not in divisors:
            raise InvalidConfig(
                f"layers_per_stage is {self.layers_per_stage}, which does not divide the {layers} layers of the model; "
                f"expected one of {divisors}"
            )

    def step(self, draw: Draw) -> Step:
        k = self.layers_per_stage
        depth = k * (1 + draw.below(len(draw.parts) // k, "sub-model"))
        return Step(tuple(range(depth)), frozenset({"head", *draw.parts[depth - k : depth]}))


@dataclass(frozen=True)
class Top:
    """Every layer runs; the top ones and the head learn (MSLT, arXiv 2011.13635, after each growth)."""

    layers: int
    kind: str = field(default="top", init=False)

    def __post_init__(self) -> None:
        in_range("program.layers", self.layers, 1)

    def check(self, layers: int) -> None:
        if self.layers > layers:
            raise InvalidConfig(f"layers is {self.layers}; expected at most the {layers} layers of the model")

    def step(self, draw: Draw) -> Step:
        return Step(full(draw.parts).run, frozenset({"head", *draw.parts[-self.layers :]}))


@dataclass(frozen=True)
class Fresh:
    """Every layer runs; those that the last growth inserted learn, wherever they stand (LLaMA Pro, ACL 2024).

    head: whether the head learns with them.
    """

    head: bool = False
    kind: str = field(default="fresh", init=False)

    def check(self, layers: int) -> None: ...

    def step(self, draw: Draw) -> Step:
        if not draw.fresh:
            raise InvalidConfig("no growth before it inserted layers, so that none would learn; expected one in depth")
        return Step(full(draw.parts).run, draw.fresh | ({"head"} if self.head else set()))


@dataclass(frozen=True)
class Shared:
    """Layers run more than once with the same weights (share, then unshare: arXiv 2110.03848); all learn.

    times: the model's A layers are a unit that runs so many times over, A x B. uses: instead, how many times in a row
    each layer runs. share: the gradient of a layer is the "mean" over its uses, or their "sum".
    """

    times: int | None = None
    uses: tuple[int, ...] | None = None
    share: str = "mean"
    kind: str = field(default="shared", init=False)

    def __post_init__(self) -> None:
        given = [name for name in ("times", "uses") if getattr(self, name) is not None]
        require(len(given) == 1, "the number of program.times and program.uses that are given", len(given), "one")
        require(self.share in SHARES, "program.share", self.share, "'mean' or 'sum'")
        for name, value in (("times", self.times), *((f"uses.{i}", n) for i, n in enumerate(self.uses or ()))):
            if value is not None:
                in_range(f"program.{name}", value, 1)

    def check(self, layers: int) -> None:
        if self.uses is not None and len(self.uses) != layers:
            raise InvalidConfig(f"uses has {len(self.uses)} numbers; expected one for each of the {layers} layers")

    def step(self, draw: Draw) -> Step:
        return self.evaluated(draw.parts)

    def evaluated(self, parts: Sequence[str]) -> Step:
        """The model is all of its runs."""
        whole = full(parts)
        each = whole.run * (self.times or 1)
        return Step(tuple(i for i in each for _ in range(self.uses[i] if self.uses else 1)), whole.learn, self.share)


@dataclass(frozen=True)
class VirtualDepth:
    """Apollo's sampler (AAAI 2024): a depth drawn per step, low ones more often, made of the model's layers by sharing.

    Of N layers, place i of a depth of d runs layer i * N // d; d lies between N and ``layers``. The draw is the
    released code's, but equal on all ranks. share: as of `Shared`; plain autograd, as there, gives the "sum".
    """

    layers: int
    share: str = "sum"
    kind: str = field(default="virtual-depth", init=False)

    def __post_init__(self) -> None:
        in_range("program.layers", self.layers, 1)
        require(self.share in SHARES, "program.share", self.share, "'mean' or 'sum'")

    def check(self, layers: int) -> None:
        if not layers:
            raise InvalidConfig("the model has no layers to share; expected at least one, or the program 'full'")
        if self.layers < layers:
            raise InvalidConfig(f"layers is {self.layers}; expected at least the {layers} layers of the model")

    def step(self, draw: Draw) -> Step:
        whole, own, least, end = full(draw.parts), len(draw.parts), 1e-6, 0.6
        begin = self.layers / own + 0.4
        n = (begin * least - end) / (end - begin)
        x = least + (1 - least) * draw.uniform("virtual depth")
        depth = min(max(int(end * (n + 1) / (x + n) * own), own), self.layers)
        return Step(tuple(i * own // depth for i in range(depth)), whole.learn, self.share)


@dataclass(frozen=True)
class Frozen:
    """Every layer runs; parts that match a pattern rest, all others learn.

    parts: patterns as of a shell, of "embeddings", "layer.0", ..., "head": ("embeddings", "layer.[0-3]").
    """

    parts: tuple[str, ...]
    kind: str = field(default="frozen", init=False)

    def check(self, layers: int) -> None: ...

    def step(self, draw: Draw) -> Step:
        whole = full(draw.parts)
        for i, pattern in enumerate(self.parts):
            if not any(fnmatchcase(part, pattern) for part in whole.learn):
                layers = (
                    f" or a layer, {draw.parts[0]!r} to {draw.parts[-1]!r}"
                    if draw.parts
                    else " of a model without layers"
                )
                raise InvalidConfig(f"parts.{i} is {pattern!r}; expected a pattern of 'embeddings', 'head'{layers}")
        return Step(whole.run, frozenset(p for p in whole.learn if not any(fnmatchcase(p, x) for x in self.parts)))


PROGRAMS = (Full, SubModels, Top, Fresh, Shared, VirtualDepth, Frozen)
"""Those of this project."""

FOREIGN: dict[str, type] = {}
"""Those that recipe files define, by kind: known as soon as a phase has one."""

AnyProgram = Annotated[Full | SubModels | Top | Fresh | Shared | VirtualDepth | Frozen, FOREIGN]


def admit(program: Any) -> None:
    """Let a phase have a program that a recipe file defines. Raises InvalidConfig for what is none."""
    foreign.admit("phase.program", program, PROGRAMS, FOREIGN, ("check", "step"))


def evaluated(program: Program, parts: Sequence[str]) -> Step:
    """What runs in an evaluation: all layers once, unless the program has a method of this name. parts: of the model's
    layers, in order."""
    own = getattr(program, "evaluated", None)
    return full(parts) if own is None else own(parts)


def check(program: Program, parts: Sequence[str], stacks: int, where: str) -> None:
    """Raise InvalidConfig where a program does not fit a model, found by its `check` and by its first steps.

    parts: of the model's layers, in order. stacks: how many lists of layers they are in. where: the dotted name.
    """
    parts = tuple(parts)
    try:
        program.check(len(parts))
        for number in range(_TRIED):
            step = program.step(Draw(number, number, 0, parts, frozenset(parts)))
            require(isinstance(step, Step), "what `step` returns", step, "a bert2bert.recipe.Step")
            step.check(parts)
            if stacks > 1 and step.run != tuple(range(len(parts))):
                raise InvalidConfig(
                    f"it runs the layers {step.run}, but the first layer of each of the model's {stacks} stacks has "
                    "the position biases of all; use a program that runs all layers once, in order"
                )
    except InvalidConfig as error:
        raise InvalidConfig(f"{where} ({program.kind!r}): {error}") from error
    except Exception as error:  # a recipe file's own code: any failure in it is its author's to read
        raise InvalidConfig(f"{where} ({program.kind!r}) fails with {type(error).__name__}: {error}") from error
