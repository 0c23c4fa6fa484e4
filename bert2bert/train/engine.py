"""The DeepSpeed engine behind a small interface: build, forward, step, freeze. Only it and `sharded` import deepspeed.

A layer that does not learn in a step keeps weights and moments bit for bit, at ZeRO stages 0 to 3: its parameters do
not require gradients in that step (no backward, no share in the gradient norm) *and* its optimizer groups are skipped
(no momentum, no decay, no step count). Either alone fails: the first still moves weights by momentum and decay, the
second still lets gradients into the norm; ZeRO-3 moreover re-applies the last gradient of a parameter that gets none.

A step whose loss or gradient norm is not finite, or whose norm is above a limit, is not applied: the optimizer inside
DeepSpeed's asks once a step, when DeepSpeed has the norm over all ranks, and changes nothing on no. DeepSpeed's own
check covers some stages and precisions only, and no limit.

Where ranks share a mixture's experts (AutoEP), DeepSpeed puts parameters of its own in the place of a block's, which
inherit the groups; experts get groups of their own. `Engine.cuts` says how these come from the model's.

Refused: a ds_config that bert2bert.train.ds_config refuses, and a precision that the device lacks.
Longer than other modules: no other may import deepspeed.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import deepspeed.comm as dist
import deepspeed.ops
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from pydantic import ValidationError

from bert2bert.checkpoints.expert_parallel.layout import cuts_of
from bert2bert.checkpoints.factors import Factors
from bert2bert.checkpoints.groups import Group, param_groups
from bert2bert.errors import InvalidConfig
from bert2bert.model.batch import Batch
from bert2bert.model.core import LanguageModel
from bert2bert.model.program import Step
from bert2bert.ranks.distributed import RANKS, total
from bert2bert.ranks.launcher import device_number
from bert2bert.ranks.rendezvous import INIT, meet
from bert2bert.ranks.stopping import Stop
from bert2bert.recipe.schedules import Rates, Schedule, followed, group_rates
from bert2bert.train.ds_config import expert_ranks, resolve
from bert2bert.train.optimizer import FreezableAdamW

if TYPE_CHECKING:
    from bert2bert.recipe import Recipe

TIMEOUT = 600.0
"""Seconds that a rank waits for another, if nothing else is asked for."""

GROUP_LAYOUT = "layers"
"""Parameter groups of every run of this project (`checkpoints.groups`): one pair a layer, so that a layer can rest, or
more where they are split by the factors of a growth."""


def start(timeout: float = TIMEOUT, stop: Stop | None = None) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; this rank's device.

    ``timeout``: seconds after which a rank that never came, or a collective that one never joined, is an error. Does
    nothing but return the device when the group exists already. Raises what `rendezvous.meet` raises.
    """
    # Else DeepSpeed compiles a shared-memory all-reduce with g++ (23 s) that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by their older names: nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(device_number(accelerator.device_count()))
    if not dist.is_initialized():
        meet(timeout, stop)
        # DeepSpeed makes more groups, all with torch's default
        c10d = torch.distributed.distributed_c10d
        c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timedelta(seconds=timeout)
        deepspeed.init_distributed(
            dist_backend=accelerator.communication_backend_name() if accelerator.device_name() != "cpu" else "gloo",
            init_method=INIT,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout),
        )
    return torch.device(accelerator.current_device_name())


class Engine:
    """One model under DeepSpeed. Built by `build`; every rank makes the same calls in the same order.

    ``ds``: the DeepSpeed engine; ``names``: every parameter in model order (tied ones once); ``groups``: of these;
    ``cuts``: what DeepSpeed's optimizer made of the groups, index by index, by the names of ``parameters`` (the same
    except for `experts`, the number of ranks that share them, None: each has all); ``stage``: ZeRO stage 0 to 3;
    ``precision``: fp32, bf16 or fp16; ``micro_rows``: rows of one micro-batch of one rank; ``accumulation``:
    micro-batches a step; ``grad_norm``: 2-norm of the last step's gradient over all ranks before clipping, infinite
    where it is not a number (None: no step yet); ``max_grad_norm``: a step of a greater one is not applied; ``fresh``:
    parts that the last growth inserted; ``followed``: to which share the factors of the groups were last obeyed.
    """

    def __init__(
        self,
        ds: Any,
        model: LanguageModel,
        names: Sequence[str],
        groups: list[Group],
        experts: int | None,
        device: torch.device,
        fresh: Collection[str] = (),
    ) -> None:
        self.ds = ds
        self.model = model
        self.groups = groups
        self.device = device
        self.parameters = dict(model.named_parameters())
        self.names = tuple(names)
        self.experts = experts
        self.cuts = cuts_of([group.names for group in groups], {n: self.shape(n) for n in names}, experts)
        self.stage = int(ds.zero_optimization_stage())
        self.precision = "bf16" if ds.bfloat16_enabled() else "fp16" if ds.fp16_enabled() else "fp32"
        self.rank, self.world = RANKS.rank, RANKS.size
        self.micro_rows = int(ds.train_micro_batch_size_per_gpu())
        self.accumulation = int(ds.gradient_accumulation_steps())
        self.grad_norm: float | None = None
        self.max_grad_norm = math.inf
        self.fresh = frozenset(fresh)
        self.followed = 0.0
        self._plain = [Rates(live["lr"], live["weight_decay"], live["eps"]) for live in self.optimizer.param_groups]
        self._accepted: bool | None = None  # the step under way; None: not asked yet
        self._norm_of_step = 0.0, 1.0  # of fp32 stage 0, and the loss scale before the step
        self.optimizer.accepts = self._accepts
        self._shares: list[Any] = []
        self._scales_loss = self.precision != "fp16" or hasattr(ds.optimizer, "scale_if_loss")

    @property
    def optimizer(self) -> FreezableAdamW:
        """The torch optimizer inside DeepSpeed's."""
        outer = self.ds.optimizer
        return outer if isinstance(outer, FreezableAdamW) else outer.optimizer

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole parameter's shape, partitioned or not."""
        return self.model.known[name].shape

    @property
    def numel(self) -> int:
        """Numbers that the model's parameters have in all, partitioned or not."""
        return sum(math.prod(self.shape(name)) for name in self.names)

    @property
    def hyper(self) -> list[dict[str, Any]]:
        """A live group of every one of ``groups``: its hyper-parameters."""
        live = zip(self.cuts, self.optimizer.param_groups, strict=True)
        found = {each.group: group for each, group in reversed(list(live))}
        return [found[i] for i in range(len(self.groups))]

    def apply(self, step: Step) -> None:
        """Let exactly the parts of ``step.learn`` learn from here on, each by its share of a layer's uses.

        The pooler and the next-sentence head ('unused') never learn: no objective here reaches them.
        Raises InvalidConfig for a step that names what the model lacks.
        """
        parts = self.model.parts
        uses = step.check(parts).uses(parts)
        self._share_alike()
        for each, live in zip(self.cuts, self.optimizer.param_groups, strict=True):
            part = self.groups[each.group].part
            learns = part in step.learn
            live["frozen"] = not learns
            for name in each.shapes:
                parameter = self.parameters[name].requires_grad_(learns)
                if learns and uses[part] > 1 and step.share == "mean":
                    # Called once a backward pass, with the sum over all uses, before DeepSpeed reduces it
                    self._shares.append(parameter.register_hook(partial(_divided, uses[part])))

    def _share_alike(self) -> None:
        """Take the hooks off that divide the gradients of layers which run more than once."""
        while self._shares:
            self._shares.pop().remove()

    def thaw(self) -> None:
        """Let everything learn, without factors: the state in which checkpoints are written (frozen parameters are
        filed elsewhere, and the recipe's rates hold wherever the checkpoint is taken)."""
        self._share_alike()
        for plain, live in zip(self._plain, self.optimizer.param_groups, strict=True):
            live.update(plain._asdict(), frozen=False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def set_rates(self, schedule: Schedule, lr: float, phase_step: int) -> None:
        """What every group is stepped with at the 0-based step of the phase. ``lr``: as of `schedules.lr_at`."""
        self.set_lr(lr)
        self.followed = followed(schedule, phase_step)
        for each, plain, live in zip(self.cuts, self._plain, self.optimizer.param_groups, strict=True):
            group = self.groups[each.group]
            factors = group.factors.lr, group.factors.decay, group.factors.eps
            live.update(group_rates(schedule, plain, phase_step, factors, group.part in self.fresh)._asdict())

    def set_lr(self, lr: float) -> None:
        """The learning rate of every group from the next optimizer step on."""
        self._plain = [plain._replace(lr=lr) for plain in self._plain]
        for live in self.optimizer.param_groups:
            live["lr"] = lr

    def forward(self, batch: Batch, step: Step | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(mean loss over the predicted positions, correct predictions, predictions) of one micro-batch."""
        output = self.ds(batch, step)
        return output.loss, output.correct, output.predicted

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's loss (divided by ``accumulation``; scaled in fp16)."""
        # times 1, or not a number: a loss that is not finite on any rank then has a gradient norm that all ranks see
        loss = loss * (1 + 0 * loss.detach())
        if not self._scales_loss:
            # Stage 0: DeepSpeed 0.19.8 divides gradients by a loss scale that it never multiplied the loss with.
            loss = loss.float() * (self.loss_scale or 1.0)
        self.ds.backward(loss)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # bookkeeping only
            return
        found = [p.grad for p in self.parameters.values() if p.grad is not None]
        # DeepSpeed clips by this norm but does not report it.
        plain = torch.nn.utils.get_total_norm(found) if self.stage == 0 and self.precision == "fp32" else 0.0
        self._norm_of_step, self._accepted = (float(plain), self.loss_scale or 1.0), None
        self.ds.step()
        self.grad_norm = self._norm()
        self.ds.skipped_steps += self._accepted is False

    def _norm(self) -> float:
        """`grad_norm`, of the step under way or just done."""
        norm, scale = self._norm_of_step
        if self.stage or self.precision != "fp32":
            norm = float(self.ds.optimizer._global_grad_norm)
        if self.precision == "fp16":
            # Stage 0 reports the scaled norm, stage 3 divides by the scale of the next step.
            norm *= {0: 1.0, 3: self.loss_scale or 1.0}.get(self.stage, scale) / scale
        return norm if norm >= 0 else math.inf  # DeepSpeed reports -1 for what is not finite

    def _accepts(self) -> bool:
        if self._accepted is None:
            norm = self._norm()
            self._accepted = math.isfinite(norm) and norm <= self.max_grad_norm
        return self._accepted

    @property
    def step_skipped(self) -> bool:
        """Whether the last optimizer step was not applied, by DeepSpeed or by this engine."""
        return bool(getattr(self.ds.optimizer, "overflow", False)) or self._accepted is False

    @property
    def diverged(self) -> bool:
        """Whether it was not applied for a reason other than an overflow of fp16 that a dynamic loss scale mends."""
        mended = self.precision == "fp16" and self._scales_itself and self._accepted is not False
        return self.step_skipped and not mended

    @property
    def _scales_itself(self) -> bool:
        live = self._scaler
        return bool(getattr(live, "dynamic", False) or getattr(live, "dynamic_loss_scale", False))

    @property
    def loss_scale(self) -> float | None:
        """The current fp16 loss scale; None in other precisions."""
        if self.precision != "fp16":
            return None
        return float(self._scaler.cur_scale)

    @property
    def _scaler(self) -> Any:
        outer = self.ds.optimizer
        return outer.loss_scale_config if self.stage == 0 else outer.loss_scaler

    def training(self, on: bool) -> None:
        """Switch dropout on (training) or off (evaluation)."""
        self.ds.train(on)

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers, by name (DeepSpeed does not partition them)."""
        return {name: buffer for name, buffer in self.model.named_buffers() if name in self.model.state_dict()}

    def restore_loss_scale(self, state: Mapping[str, Any]) -> None:
        """Go on with a saved dynamic fp16 loss scale and its counts; a static one stays as the ds_config says."""
        live = self._scaler
        if self._scales_itself:
            for name, value in state.items():
                if hasattr(live, name):
                    setattr(live, name, value)

    def save(self, root: Path, tag: str, write: Callable[[Any, Path], None]) -> None:
        """Hand what goes into DeepSpeed's own checkpoint files in ``root/tag`` to ``write``, with each file's path.

        Returns when every rank has handed over its own.
        """
        writer = self.ds.checkpoint_engine
        writer.save = lambda state_dict, path: write(state_dict, Path(path))
        try:
            self.ds.save_checkpoint(str(root), tag=tag, client_state={}, save_latest=False)
        finally:
            del writer.save  # the class's own again

    @property
    def counters(self) -> dict[str, int]:
        """DeepSpeed's counts of steps, rows, and steps that were not applied."""
        ds = self.ds
        return {
            "global_steps": int(ds.global_steps),
            "global_samples": int(ds.global_samples),
            "skipped_steps": int(ds.skipped_steps),
        }

    @counters.setter
    def counters(self, values: Mapping[str, int]) -> None:
        for name in self.counters:
            setattr(self.ds, name, int(values.get(name, 0)))

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over the ranks, exact for counts below 2**53."""
        return total(values, self.device)

    def sum_ints(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of int64 tensors over the ranks, modulo 2**64."""
        summed = values.to(self.device)
        dist.all_reduce(summed)
        return summed.cpu()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def destroy(self) -> None:
        """Take DeepSpeed's hooks off the process, the replaced ``torch.nn.functional.linear`` of ZeRO-3 included."""
        self.optimizer.accepts = None  # or the two would keep each other
        self.ds.destroy()
        restore_linear()


def _divided(n: int, gradient: torch.Tensor) -> torch.Tensor:
    return gradient / n


def restore_linear() -> None:
    """Put torch's own ``linear`` back: ZeRO-3 replaces it for the rest of the process, which changes low bits later."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    original = getattr(InsertPostInitMethodToModuleSubClasses, "linear_bk", None)
    if original is not None:
        torch.nn.functional.linear = original


def build(
    recipe: Recipe,
    ds_config: Mapping[str, Any],
    model: LanguageModel,
    factors: Mapping[str, Factors] | None = None,
    fresh: Collection[str] = (),
) -> Engine:
    """The engine that trains ``model`` (in fp32 on any device, or partitioned by `sharded.opened`) as the recipe says.

    ``ds_config``: DeepSpeed's own, see bert2bert.train.ds_config.resolve. ``factors``: by parameter, as the growth
    found them, where a schedule may obey them: each group then holds equal ones only. ``fresh``: parts that the last
    growth inserted. Joins the process group by `start` if that was not done. Raises InvalidConfig for an option that is
    refused.
    """
    device = start()
    settings = resolve(dict(ds_config), recipe, dist.get_world_size())
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)  # DeepSpeed leaves them behind where the parameters are partitioned
    parameters = dict(model.named_parameters())
    groups = param_groups({name: model.known[name] for name in parameters}, GROUP_LAYOUT, factors)
    experts = expert_ranks(settings)
    _adjust(settings, experts, device)
    level = deepspeed.utils.logger.level
    deepspeed.utils.logger.setLevel(logging.ERROR)  # it would warn that a subclass of AdamW is untested
    try:
        ds, *_ = deepspeed.initialize(
            model=model, optimizer=partial(_optimizer, recipe, experts is not None),
            model_parameters=_live(recipe, groups, parameters), config=settings, dist_init_required=False,
        )  # fmt: skip
    except ValidationError as error:  # DeepSpeed's own check of what lies inside a section
        what = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InvalidConfig(f"ds_config: {what} (DeepSpeed's {error.title}); correct or remove it") from None
    except ValueError as error:  # and of the precision
        if "not supported on your device" not in str(error):
            raise
        raise InvalidConfig(
            f"ds_config: {error} ({device.type}); enable another precision, or none for fp32"
        ) from error
    finally:
        deepspeed.utils.logger.setLevel(level)
    engine = Engine(ds, model, tuple(parameters), groups, experts, device, fresh)
    engine.optimizer.state.clear()  # 16-bit stage 0: the count of that step at start
    engine.max_grad_norm = recipe.safety.max_grad_norm or math.inf
    return engine


def _adjust(settings: dict[str, Any], experts: int | None, device: torch.device) -> None:
    """Set what the engine needs otherwise than DeepSpeed's defaults have it. experts: see `Engine`."""
    if experts is not None:
        settings["expert_parallel"].setdefault("use_grouped_mm", device.type != "cpu")
    if (settings.get("zero_optimization") or {}).get("stage") == 3:
        # To DeepSpeed a mixture's block is a leaf, because of experts that get no token. Those here are one parameter
        # together; and a leaf's gradients are reduced as often as it runs, the first time before they are complete.
        settings["zero_optimization"].setdefault("leaf_module", {"classes": []})
    settings |= {
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,  # offloaded partitions, too, are stepped by the optimizer that can rest
    }


def _live(recipe: Recipe, groups: Sequence[Group], parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The groups as DeepSpeed takes them: it may put other parameters in the place of some."""
    decay = recipe.optimizer.weight_decay
    return [
        {"params": [parameters[n] for n in g.names], "weight_decay": decay if g.decay else 0.0, "frozen": False}
        for g in groups
    ]


def _optimizer(recipe: Recipe, split: bool, groups: list[dict[str, Any]]) -> FreezableAdamW:
    """The optimizer of live groups. split: experts get groups of their own, cut among the ranks that hold them."""
    if split:
        named = [{**group, "name": str(i)} for i, group in enumerate(groups)]  # by which DeepSpeed tells them apart
        groups = split_params_into_different_moe_groups_for_optimizer(named)
    # no learning rate: DeepSpeed steps once at its own start (16-bit stage 0), when nothing may move
    return FreezableAdamW(groups, lr=0.0, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps, fused=True)
