"""The model inside real DeepSpeed engines: ZeRO 1, 2 and 3 on two ranks give what plain torch gives."""

from __future__ import annotations

import pytest
import torch

from bert2bert.model.bert import Bert
from bert2bert.model.program import LayerProgram
from tests.distributed import run_ranks
from tests.model.sample import batch, model
from tests.rounding import ROUNDING, gap

SUB = LayerProgram((0, 1), (1,), False)


def learning_parameters(bert: Bert) -> list[torch.nn.Parameter]:
    """All but the pooler and the next-sentence head, which this objective does not train."""
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_("pooler" not in name and "seq_relationship" not in name)
    return [p for p in bert.parameters() if p.requires_grad]


def engine_losses(stage: int, tied: bool) -> tuple[list[float], list[str]]:
    """Three full steps, then the loss of a sub-model and the parameters that its backward reaches."""
    import deepspeed

    bert = model(torch.float32, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(learning_parameters(bert), lr=1e-2)
    settings = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
    }
    engine, *_ = deepspeed.initialize(model=bert, optimizer=optimizer, config=settings)
    losses = []
    for seed in range(3):
        loss = engine(batch(seed=seed)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    seen: list[str] = []
    for name, parameter in bert.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: seen.append(name))
    loss = engine(batch(seed=3), SUB).loss
    engine.backward(loss)
    return [*losses, loss.item()], sorted(set(seen))


def torch_losses(tied: bool) -> tuple[list[float], list[str]]:
    bert = model(torch.float32, tie_word_embeddings=tied)
    optimizer = torch.optim.AdamW(learning_parameters(bert), lr=1e-2)
    losses = []
    for seed in range(3):
        loss = bert(batch(seed=seed)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    loss = bert(batch(seed=3), SUB).loss
    loss.backward()
    return [*losses, loss.item()], sorted(name for name, p in bert.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("stage, tied", [(1, True), (2, True), (3, True), (3, False)])
def test_engine_equals_torch(stage: int, tied: bool) -> None:
    expected, reached = torch_losses(tied)
    assert expected[0] != pytest.approx(expected[2], rel=1e-2)
    for losses, seen in run_ranks(engine_losses, 2, stage, tied):
        assert gap(losses, expected) <= ROUNDING
        assert seen == reached
