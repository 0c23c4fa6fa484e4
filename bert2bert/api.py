"""The Python API: open a checkpoint, plan its growth, carry it out; or grow a model of transformers in memory.

    from bert2bert import grow, open_checkpoint, plan

    large = grow(small, "larger.json", width="hyperclone", depth="insert_identity")          # both in memory
    plan("runs/small", "larger.json", width="aki").write("runs/grown", format="zero", stage=2, world_size=8)

Operators and options are those of the command line, by the same names; numbers and messages are, too. The operators as
values (steps that compose) are in `bert2bert.growths`.

Every error that the input causes is a `bert2bert.errors.UserError`: InvalidCheckpoint, InvalidConfig, InvalidData,
UnsupportedGrowth, LossyGrowth. Refuses to write the growth of a model in memory as a checkpoint, whose source no file
holds (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from bert2bert.checkpoints.factors import Factors
from bert2bert.checkpoints.live import LiveSource
from bert2bert.checkpoints.source import STATES
from bert2bert.checkpoints.target import Target, file_bytes
from bert2bert.commands.grow import write_growth
from bert2bert.commands.plan import Description, describe
from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.growth import live, opened
from bert2bert.growth.choices import Choices
from bert2bert.growth.exactness import reasons
from bert2bert.growth.factors import of_growth
from bert2bert.growth.source_model import CheckpointModel, open_model
from bert2bert.measure.cost import Cost, cost

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

    Given = str | PathLike[str] | CheckpointModel | PreTrainedModel
    """A checkpoint by its path, one that is open, or a model in memory."""


class Options(TypedDict, total=False):
    """How a model grows: operators as ``NAME[:key=value,…]``, with the command line's defaults."""

    width: str
    depth: str
    vocab: str
    positions: str
    experts: str
    breaker: str
    """--break-symmetry."""
    moments: str
    seed: int
    embeddings: str


@dataclass(frozen=True, eq=False)
class PlannedGrowth:
    """A growth that is planned and not carried out yet. Tensors go by the names of the grown model's class."""

    opened: opened.Growth
    lossy: bool
    """Whether a width that misses its promise of exactness is accepted."""
    _like: PreTrainedModel | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config of the grown model."""
        return self.opened.plan.config

    @property
    def digest(self) -> str:
        """Of the plan: equal for equal growths, as the manifest records it."""
        return self.opened.plan.digest()

    @property
    def exactness(self) -> dict[str, list[str]]:
        """``function`` and ``moments`` -> why it is not kept; empty lists: it is."""
        return {promise: list(why) for promise, why in reasons(self.opened.plan.exactness).items()}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to think of before training goes on."""
        return self.opened.plan.warnings

    @property
    def factors(self) -> dict[str, Factors]:
        """Name -> what learning rate, weight decay and epsilon are to be multiplied by, so that AdamW follows the
        source's run; parameters that no one number holds for are left out."""
        found = of_growth(self.opened)
        return {name: rates for name, own in live.names(self.opened).items() if (rates := found.of(own)) is not None}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor; tied copies are left out."""
        return {name: self.opened.plan.tensors[own].shape for name, own in live.names(self.opened).items()}

    def describe(self) -> Description:
        """What the growth will do: ``summary()`` is the text that ``bert2bert plan`` prints, ``as_json()`` its JSON."""
        return describe(self.opened)

    def cost(self, ranks: int = 1, disk: tuple[float, float] = (1.0, 1.0)) -> Cost:
        """What carrying it out on disk takes. disk: GB/s that one rank reads and writes. Raises InvalidConfig."""
        return cost(self.opened, ranks, disk)

    def tensor(self, name: str, state: str = "fp32") -> Tensor:
        """A whole grown tensor, on the CPU: state ``fp32`` in the dtype of what it is made of, ``exp_avg`` or
        ``exp_avg_sq`` in float32 (float64 for a parameter of that). Raises InvalidConfig, LossyGrowth."""
        self.opened.accept(self.lossy)
        known, have = live.names(self.opened), self.opened.model.source.states
        if name not in known:
            raise InvalidConfig(f"the grown model has no tensor {name!r}; {did_you_mean(name, known)}")
        if state not in have:
            raise InvalidConfig(
                f"the source has no state {state!r}; {did_you_mean(state, have)}"
                + (" (it holds weights only)" if state in STATES else "")
            )
        return live.tensor(self.opened, known[name], state)

    def tensors(self, state: str = "fp32") -> Iterator[tuple[str, Tensor]]:
        """Name and values of every tensor, one at a time: no more than one is in memory. Raises as `tensor` does."""
        for name in live.names(self.opened):
            yield name, self.tensor(name, state)

    def model(self) -> PreTrainedModel:
        """The grown model in memory. Grown of one in memory, it has the same class (the target's, where a dense model
        becomes a mixture), dtypes, training mode, device, generation config, frozen parameters, and kernels of
        attention; grown of a checkpoint, it is in eval mode. Raises LossyGrowth, UnsupportedGrowth."""
        self.opened.accept(self.lossy)
        return live.grown_model(self.opened, self._like)

    def fill_optimizer(self, optimizer: Optimizer, grown: PreTrainedModel) -> None:
        """Give an Adam or AdamW of torch over the parameters of ``grown``, which `model` made, the grown moments and
        step counts.

        Raises InvalidConfig where the growth was planned without an optimizer that has taken steps, and for parameters
        of another model; UnsupportedGrowth for another optimizer.
        """
        live.fill_optimizer(self.opened, optimizer, grown)

    def write(
        self,
        folder: str | PathLike[str],
        *,
        measure: bool = True,
        bins: str | PathLike[str] | None = None,
        report: Callable[[str], None] | None = None,
        **target: Any,
    ) -> Path:
        """Write the grown checkpoint as ``bert2bert grow`` does; the folder written, ``folder`` or a tag in it.

        measure, bins: whether, and on which token bins, the change of the function is measured. report: is given what
        the command prints. target: the options of `Target` (format, stage, world_size, precision, groups, …).
        Raises UserError of all kinds.
        """
        if isinstance(self.opened.model.source, LiveSource):
            raise InvalidConfig(
                f"{self.opened.model.source.path}: a checkpoint records the files of its source, and a model in memory "
                "has none. Save what grow() returns with save_pretrained(), or plan the growth of a checkpoint on disk."
            )
        known = [entry.name for entry in fields(Target)]
        for option in target.keys() - set(known):
            raise InvalidConfig(f"a target has no option {option!r}; {did_you_mean(option, known)}")
        if isinstance(size := target.get("shard_size"), str):
            target["shard_size"] = file_bytes(size)
        return write_growth(
            lambda: self.opened, Path(folder), Target(**target), lossy=self.lossy, measure=measure,
            bins=None if bins is None else Path(bins), say=report or (lambda text: None), bar=False,
        )  # fmt: skip


def open_checkpoint(
    path: str | PathLike[str], *, config: str | PathLike[str] | None = None, tag: str | None = None
) -> CheckpointModel:
    """Open a checkpoint of any format (a DeepSpeed run or one tag of it, universal, a Hugging Face folder) as a model:
    its ``config``, its ``parameters`` by name, and any rows of them (``read(name, state, start, stop)``).

    config: the config.json of a checkpoint that holds none. tag: default, the one that ``latest`` names.
    Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth.
    """
    return open_model(Path(path), None if config is None else Path(config), tag)


def plan(
    source: Given,
    config: Any,
    *,
    optimizer: Optimizer | None = None,
    other: Given | None = None,
    alpha: float | None = None,
    lossy: bool = False,
    **how: Unpack[Options],
) -> PlannedGrowth:
    """Plan the growth of a checkpoint, or of a model in memory, into the model of a config; reads no tensor.

    config: of the larger model: the path of a config.json, a dict, or a config of transformers. optimizer: torch's Adam
    or AdamW of a model in memory, whose moments grow, too. other, alpha: a model of the target's size, of which
    1 - alpha is taken, and alpha of the grown one. lossy: accept a width that cannot keep the function.
    Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth.
    """
    for option in how.keys() - Options.__annotations__.keys():
        raise InvalidConfig(f"a growth has no option {option!r}; {did_you_mean(option, Options.__annotations__)}")
    choices, target = Choices.parse(**how), live.config_of(config)
    model = _opened(source, optimizer)
    second = None if other is None else partial(_opened, other)
    like = None if isinstance(source, str | PathLike | CheckpointModel) else source
    return PlannedGrowth(opened.planned(model, target, choices, second, alpha), lossy, like)


def grow(
    model: PreTrainedModel,
    config: Any,
    *,
    other: Given | None = None,
    alpha: float | None = None,
    lossy: bool = False,
    **how: Unpack[Options],
) -> PreTrainedModel:
    """The model that a transformers model in memory grows into; the arguments are those of `plan`.

    The tensors are, bit for bit, those that ``bert2bert grow --format hub`` makes of the saved model (of float64
    parameters, which that rounds, float64 ones). Nothing is written, and the source is left as it is; `PlannedGrowth.
    model` lists what the grown model keeps of it. Hooks, gradients and wrappers are not carried.
    Raises InvalidCheckpoint, InvalidConfig, UnsupportedGrowth, LossyGrowth.
    """
    if isinstance(model, str | PathLike | CheckpointModel):
        raise InvalidConfig(
            f"grow() takes a model of transformers in memory, not a {type(model).__name__}; of a checkpoint, use "
            "plan(…).write(folder), or plan(…).model()"
        )
    return plan(model, config, other=other, alpha=alpha, lossy=lossy, **how).model()


def _opened(source: Given, optimizer: Optimizer | None = None) -> CheckpointModel:
    if not isinstance(source, str | PathLike | CheckpointModel):
        return live.open_live(source, optimizer)
    if optimizer is not None:
        raise InvalidConfig(
            "an optimizer belongs to a model in memory; a checkpoint's moments are in its files. Leave it out"
        )
    return source if isinstance(source, CheckpointModel) else open_model(Path(source))
