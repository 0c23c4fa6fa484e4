"""Real DeepSpeed engines on forked ranks: train tiny models, save checkpoints, and say what the live engine holds.

`save_cases(folder, world, cases)` runs many cases in one process group. Each leaves ``folder/<case>/`` (a DeepSpeed run
folder: tag, `latest`) and ``folder/<case>.truth.pt`` (see `truth`). `build`, `train` and `truth` are for functions
that run inside `tests.distributed.run_ranks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bert2bert.checkpoints.groups import Group, by_name, param_groups
from tests import tiny
from tests.distributed import run_ranks

STATES = ("fp32", "exp_avg", "exp_avg_sq")
VOCAB, SEQ = 61, 8


@dataclass(frozen=True)
class Case:
    """One engine: what it trains and how."""

    name: str
    stage: int = 2
    precision: str = "fp32"
    model: str = "pretraining"  # or "mlm"
    layout: str = "decay"  # of bert2bert.checkpoints.groups, or "trainer": what transformers' Trainer makes
    steps: int = 3
    zero: dict[str, Any] = field(default_factory=dict)  # more of ds_config["zero_optimization"]
    config: dict[str, Any] = field(default_factory=dict)  # more of ds_config
    frozen: tuple[str, ...] = ()  # parts of names
    exclude_frozen: bool = False  # from what is saved
    skip: tuple[int, ...] = ()  # optimizer groups that no step touches
    buffer: bool = False  # one persistent buffer
    stored_buffers: bool = False  # all buffers are persistent, as older versions of transformers had many of them
    seed: int = 0
    client_state: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)  # more of the model's config
    hf: dict[str, Any] = field(default_factory=dict)  # a whole config of any family, in place of ``model``


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves groups marked ``skipped`` alone: their state stays empty, as after a partial training."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.param_groups
        self.param_groups = [g for g in kept if not g.get("skipped", False)]
        try:
            return super().step(*args, **kwargs) if any(g["params"] for g in self.param_groups) else None
        finally:
            self.param_groups = kept


def hf_config(**over: Any) -> dict[str, Any]:
    """Sizes that no world size divides: rows are cut by partition borders."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 44,
        "max_position_embeddings": 17,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return {**sizes, **over}


def tiny_bert(kind: str = "pretraining", seed: int = 0, **over: Any) -> torch.nn.Module:
    """A transformers BERT with every parameter scrambled (biases 0 and norms 1 hide mistakes)."""
    from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

    torch.manual_seed(seed)
    model = {"pretraining": BertForPreTraining, "mlm": BertForMaskedLM}[kind](BertConfig(**hf_config(**over)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def hf_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The transformers model of a config, in float32, with random values everywhere."""
    import transformers

    model = getattr(transformers, config["architectures"][0])._from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager", experts_implementation="eager"
    )
    tiny.untie(model, config)
    tiny.scramble(model, seed)
    return model


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 3e-3}},
        "steps_per_print": 10**9,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    return {**config, **case.config}


def build(case: Case) -> Any:
    """A fresh engine of the case; its ``group_names`` lists the parameter names of each optimizer group."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU; DeepSpeed asks for AVX512-FP16
    model = hf_model(case.hf, case.seed) if case.hf else tiny_bert(case.model, case.seed, **case.sizes)
    for module in model.modules() if case.stored_buffers else ():
        module._non_persistent_buffers_set.clear()
    if case.buffer:
        model.bert.register_buffer("tally", torch.arange(3.0) + case.seed)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(not any(part in name for part in case.frozen))
    trainable = {name: parameter.shape for name, parameter in parameters.items() if parameter.requires_grad}
    trainers = case.layout == "trainer"
    groups = trainer_groups(model) if trainers else param_groups(by_name(trainable, aliases(model)), case.layout)
    optimizer = SkippingAdamW(
        [
            {
                "params": [parameters[n] for n in g.names],
                "weight_decay": 0.1 if g.decay else 0.0,
                "skipped": i in case.skip,
            }
            for i, g in enumerate(groups)
        ],
        lr=1e-3,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case))
    engine.group_names = [g.names for g in groups]
    return engine


def trainer_groups(model: torch.nn.Module) -> list[Group]:
    """The optimizer groups of transformers' Trainer, by its own code."""
    import transformers

    trainer = object.__new__(transformers.Trainer)  # its __init__ needs accelerate, its groups do not
    trainer.model, trainer.optimizer, trainer.args = model, None, SimpleNamespace(weight_decay=0.1)
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {})
    names = {id(p): name for name, p in model.named_parameters()}
    made = trainer.create_optimizer().param_groups
    return [Group("all", g["weight_decay"] > 0, tuple(names[id(p)] for p in g["params"])) for g in made]


def aliases(model: torch.nn.Module) -> dict[str, str]:
    """Absent tied name -> the name under which the model lists the parameter."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept for name, p in every if (kept := first.setdefault(id(p), name)) != name}


def batch(step: int, rank: int, kind: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(0, VOCAB, (2, SEQ), generator=generator)
    inputs = {"input_ids": tokens, "labels": tokens.roll(1, 0)}
    if kind == "pretraining":
        inputs["next_sentence_label"] = torch.tensor([0, 1])
    return inputs


def train(engine: Any, case: Case, steps: int | None = None, start: int = 0) -> list[float]:
    """``steps`` optimizer steps from data position ``start``; the losses of this rank."""
    import deepspeed.comm as dist

    losses = []
    for step in range(start, start + (case.steps if steps is None else steps)):
        if case.hf:
            loss = tiny.loss(engine, case.hf, seed=10 * step + dist.get_rank())
        else:
            loss = engine(**batch(step, dist.get_rank(), case.model)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def truth(engine: Any, case: Case) -> dict[str, Any]:
    """What the live engine holds, by DeepSpeed's own functions; every rank must call it.

    ``tensors[name][state]`` (full, fp32; zeros for what was never stepped; frozen ones only ``fp32``, in the model's
    precision), ``step[name]``, ``groups``, ``counters``, ``lr_scheduler``, ``loss_scaler``, ``buffers``.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):  # else only the first group's states are linked
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    group_of = {name: i for i, names in enumerate(engine.group_names) for name in names}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
                tensors[name] = {"fp32": parameter.detach().clone()}
            continue
        full = safe_get_full_fp32_param(parameter).detach().clone()
        tensors[name] = {"fp32": full}
        for state in STATES[1:]:
            stepped = group_of[name] not in case.skip
            moment = safe_get_full_optimizer_state(parameter, state) if stepped else torch.zeros_like(full)
            tensors[name][state] = moment.detach().clone().reshape(full.shape)
    scaler = getattr(optimizer, "loss_scaler", None)
    inner = optimizer.optimizer.param_groups
    return {
        "tensors": tensors,
        "step": {n: 0 if g in case.skip else case.steps - engine.skipped_steps for n, g in group_of.items()},
        "groups": [
            {"names": list(names), **{k: inner[i][k] for k in ("lr", "weight_decay", "betas", "eps")}}
            for i, names in enumerate(engine.group_names)
        ],
        "counters": {k: getattr(engine, k) for k in ("global_steps", "global_samples", "skipped_steps")},
        "lr_scheduler": engine.lr_scheduler.state_dict(),
        "loss_scaler": None if scaler is None else {k: v for k, v in vars(scaler).items() if k != "dtype"},
        "buffers": {n: b.clone() for n, b in engine.module.named_buffers() if n.endswith("tally")},
    }


def save(engine: Any, case: Case, folder: Path) -> None:
    """The case's checkpoint and, by rank 0, its truth file."""
    import deepspeed.comm as dist

    engine.save_checkpoint(
        str(folder / case.name), client_state=dict(case.client_state), exclude_frozen_parameters=case.exclude_frozen
    )
    if case.stage == 0:
        return  # no partitions for DeepSpeed's functions to gather
    found = truth(engine, case)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"{case.name}.truth.pt")


def release(engine: Any) -> None:
    """Undo what an engine did to the process (ZeRO-3 replaces F.linear for good)."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as patched

    engine.destroy()
    F.linear = getattr(patched, "linear_bk", F.linear)


def save_on_rank(folder: str, cases: Iterable[Case]) -> None:
    for case in cases:
        engine = build(case)
        train(engine, case)
        save(engine, case, Path(folder))
        release(engine)


def save_cases(folder: Path, world: int, cases: Iterable[Case], timeout: float = 120) -> None:
    """Train and save every case at one world size, in one process group."""
    run_ranks(save_on_rank, world, str(folder), list(cases), timeout=timeout)


def load_truth(folder: Path, case: Case) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{case.name}.truth.pt")
    return found
