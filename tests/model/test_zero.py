"""The models inside real DeepSpeed engines: ZeRO 1, 2 and 3 on two ranks give what plain torch gives."""

from __future__ import annotations

import pytest
import torch

from bert2bert.model.batch import Batch
from bert2bert.model.core import LanguageModel
from bert2bert.model.registry import build
from tests import tiny
from tests.distributed import run_ranks
from tests.model import sample
from tests.model.test_cores import flat
from tests.rounding import ROUNDING, gap
from tests.steps import some

SUB = some((0, 1), (1,), False)


def model(name: str, tied: bool) -> LanguageModel:
    """A scrambled model of three layers in float32."""
    if name == "bert":
        return sample.model(torch.float32, tie_word_embeddings=tied)
    return sample.scramble(build(tiny.config_of(name, tie_word_embeddings=tied))).eval()


def batch(name: str, seed: int) -> Batch:
    return sample.batch(seed=seed) if name == "bert" else flat(seed=seed)


def learning_parameters(core: LanguageModel) -> list[torch.nn.Parameter]:
    """All but the pooler and the next-sentence head, which this objective does not train."""
    for name, parameter in core.named_parameters():
        parameter.requires_grad_(core.known[name].part != "unused")
    return [p for p in core.parameters() if p.requires_grad]


def engine_losses(stage: int, name: str, tied: bool) -> tuple[list[float], list[str]]:
    """Three full steps, then the loss of a sub-model and the parameters that its backward reaches."""
    import deepspeed

    core = model(name, tied)
    optimizer = torch.optim.AdamW(learning_parameters(core), lr=1e-2)
    settings = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    engine, *_ = deepspeed.initialize(model=core, optimizer=optimizer, config=settings)
    losses = []
    for seed in range(3):
        loss = engine(batch(name, seed)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    seen: list[str] = []
    for path, parameter in core.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, path=path: seen.append(path))
    loss = engine(batch(name, 3), SUB).loss
    engine.backward(loss)
    return [*losses, loss.item()], sorted(set(seen))


def torch_losses(name: str, tied: bool) -> tuple[list[float], list[str]]:
    core = model(name, tied)
    optimizer = torch.optim.AdamW(learning_parameters(core), lr=1e-2)
    losses = []
    for seed in range(3):
        loss = core(batch(name, seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loss = core(batch(name, 3), SUB).loss
    loss.backward()
    return [*losses, loss.item()], sorted(path for path, p in core.named_parameters() if p.grad is not None)


CASES = [
    (1, "bert", True), (2, "bert", True), (3, "bert", True), (3, "bert", False), (3, "roberta", False),
    (3, "modernbert", True), (2, "modernbert", False),
]  # fmt: skip


@pytest.mark.parametrize("stage, name, tied", CASES)
def test_engine_equals_torch(stage: int, name: str, tied: bool) -> None:
    expected, reached = torch_losses(name, tied)
    assert expected[0] != pytest.approx(expected[2], rel=1e-2)
    for losses, seen in run_ranks(engine_losses, 2, stage, name, tied):
        assert gap(losses, expected) <= ROUNDING
        assert seen == reached
