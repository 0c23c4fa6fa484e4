"""A layer that rests keeps weights and moments bit for bit, and the others learn as in plain torch, on real ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert2bert.model.batch import Batch
from bert2bert.model.core import LanguageModel
from bert2bert.model.program import Step
from bert2bert.model.registry import build
from bert2bert.train import partitions
from tests import tiny as models
from tests.distributed import run_ranks
from tests.model.test_cores import flat
from tests.rounding import ROUNDING, gap, unit
from tests.steps import some, whole
from tests.train import tiny

CLIP, LR, DECAY = 0.5, 1e-3, 0.1
PROGRAMS = [
    whole(tiny.LAYERS),  # momentum first: a frozen layer must not coast
    whole(tiny.LAYERS),
    some(run=(0, 1, 2), learn=(2,), embeddings_learn=False),
    some(run=(0, 1), learn=(1,), embeddings_learn=False),
    some(run=(0,), learn=(0,), embeddings_learn=False),
    whole(tiny.LAYERS),
    some(run=(0, 1, 2), learn=(1, 2), embeddings_learn=False),
    Step((0, 1, 2), frozenset({"layer.1"})),  # head and layer 2 rest above it, and pass gradients on
    some(run=(0, 1, 2), learn=(2,), embeddings_learn=True),  # through layers that rest
    Step((0, 1, 0, 1, 1, 2), whole(tiny.LAYERS).learn, "mean"),
    Step((0, 1, 2, 1), frozenset({"layer.1", "head"}), "sum"),
]


CASES = [("bert", "fp32", 1), ("bert", "bf16", 2), ("bert", "fp16", 2), ("gpt2", "fp32", 2), ("mixtral", "fp32", 2)]
"""Architecture, precision, micro-batches a step; those that are no BERT's keep only what enters their blocks."""


def model_of(name: str) -> LanguageModel:
    torch.manual_seed(1)
    if name == "bert":
        return tiny.model()
    routed = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1}
    model = build(models.config_of(name, **(routed if name == "mixtral" else {})))
    model.initialise()
    model.recompute = True
    return model


def batch_of(name: str, seed: int) -> Batch:
    return tiny.batch(seed) if name == "bert" else flat(seed=seed)


def snapshot(engine: Any) -> dict[str, torch.Tensor]:
    """Clones of every fragment's states on this rank and of the live weights."""
    out: dict[str, torch.Tensor] = {}
    for f in partitions.fragments(engine):
        for state in partitions.STATES:
            held = partitions.read(engine, f, state)
            out[f"{f.name} {state} {f.start}"] = torch.zeros(f.stop - f.start) if held is None else held.clone()
    for name, parameter in engine.parameters.items():
        held = parameter.detach()
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's slice, without the padding that nothing ever sets
            held = parameter.ds_tensor.detach()
            held = held[: max(0, parameter.ds_numel - engine.rank * held.numel())]
        out[f"{name} live"] = held.clone()
    return out


def train(stage: int, architecture: str, precision: str, accumulation: int) -> dict[str, Any]:
    """What rested and changed (must be nothing), what learned and did not change, the norms, the final fp32 weights."""
    from bert2bert.train import engine as engines

    tiny.allow_fp16()
    model = model_of(architecture)
    engine = engines.build(tiny.recipe(clip=CLIP), tiny.ds_config(stage, precision, accumulation=accumulation), model)
    if engine.precision == "fp16" and stage == 0:
        assert engine.loss_scale == 2.0**8
    engine.set_lr(LR)
    coasted, idle, norms, skipped, of = [], [], [], 0, model.known
    for step, program in enumerate(PROGRAMS):
        before = snapshot(engine)
        engine.apply(program)
        for micro in range(accumulation):
            loss, *_ = engine.forward(batch_of(architecture, 1000 * step + 10 * micro + engine.rank), program)
            engine.backward(loss)
        skipped += engine.step_skipped
        norms.append(engine.grad_norm)
        after = snapshot(engine)
        for key, value in after.items():
            about = of[key.split()[0]]
            moved = not torch.equal(value, before[key])
            if moved and about.part not in program.learn:
                coasted.append((step, key))
            # a slice of the embeddings may hold rows that no token used; a 16-bit live weight may round the change away
            if not moved and about.part in program.learn and about.layer is not None and "live" not in key:
                idle.append((step, key))
    steps = dict(zip([(g.part, g.decay) for g in engine.groups], partitions.steps(engine), strict=True))
    pieces = [
        (f.name, f.start, partitions.read(engine, f, "fp32").clone().numpy()) for f in partitions.fragments(engine)
    ]
    engine.destroy()
    return {"coasted": coasted, "idle": idle, "norms": norms, "steps": steps, "pieces": pieces, "skipped": skipped}


def train_all(stages: tuple[int, ...], *case: Any) -> dict[int, dict[str, Any]]:
    return {stage: train(stage, *case) for stage in stages}


def reference(architecture: str, accumulation: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """One process, plain torch.optim.AdamW; what rests has grad None, what runs n times its sum or an n-th of it."""
    model = model_of(architecture)
    named, of = dict(model.named_parameters()), model.known
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": DECAY if of[n].decay else 0.0} for n, p in named.items()], lr=LR, eps=1e-8
    )
    norms = []
    for step, program in enumerate(PROGRAMS):
        optimizer.zero_grad(set_to_none=True)
        for micro in range(accumulation):
            for rank in range(2):
                output = model(batch_of(architecture, 1000 * step + 10 * micro + rank), program)
                (output.loss / (2 * accumulation)).backward()
        for name, parameter in named.items():
            if of[name].part not in program.learn:
                parameter.grad = None
            elif parameter.grad is not None and program.share == "mean":
                parameter.grad /= program.uses(model.parts)[of[name].part] or 1
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return {n: p.detach() for n, p in named.items()}, norms


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("architecture", "precision", "accumulation"), CASES)
def test_resting_layers_are_untouched_and_the_others_learn_as_in_torch(
    architecture: str, precision: str, accumulation: int
) -> None:
    expected, norms = reference(architecture, accumulation)
    assert max(norms) > CLIP  # or clipping would not be tested
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ranks = run_ranks(train_all, 2, (0, 1, 2, 3), architecture, precision, accumulation, timeout=100)
    for stage in (0, 1, 2, 3):
        for result in (rank[stage] for rank in ranks):
            assert result["coasted"] == []
            assert result["idle"] == []
            assert result["skipped"] == 0
            assert gap(result["norms"], norms, 64 * unit(dtype) * max(norms)) <= ROUNDING
            for (part, decay), count in result["steps"].items():
                assert count == sum(part in program.learn for program in PROGRAMS), (part, decay)
            for name, start, values in result["pieces"]:
                wanted = expected[name].flatten()[start : start + len(values)]
                away = (torch.from_numpy(values) - wanted).abs()
                # Adam divides a step by its gradient's size, so nearness is measured in steps. 16 bit: an element moves
                # by a whole one where rounding turns a gradient's sign, and a key bias has no other gradient
                if precision == "fp32":
                    assert gap(away, 0 * away, 4e-3 * LR) <= ROUNDING, (name, stage)
                else:
                    limit = LR * (len(PROGRAMS) if "key.bias" in name else 2)
                    assert gap(away.mean(), 0.0, limit) <= ROUNDING, (name, stage)
