"""Held-out loss and accuracy of the whole model: fixed rows and positions, the work shared by all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bert2bert.model.batch import Batch
from bert2bert.model.program import Step
from bert2bert.train.engine import Engine

EVALUATION_SEED = 0
"""Evaluations do not follow the recipe's seed: runs of different seeds are compared on the same rows and positions."""


@torch.no_grad()
def evaluate(engine: Engine, batches: Sequence[Batch], step: Step | None = None) -> dict[str, float]:
    """{"loss": nats a predicted token, "accuracy": share of them guessed right, "perplexity": e to the loss} over every
    rank's batches. Collective. step: which layers run (default: all, once).

    Every rank must have equally many batches (under ZeRO-3 a forward pass gathers weights from all).
    """
    loss = torch.zeros((), dtype=torch.float64, device=engine.device)
    correct = torch.zeros((), dtype=torch.float64, device=engine.device)
    predicted = torch.zeros((), dtype=torch.float64, device=engine.device)
    engine.training(False)
    try:
        for batch in batches:
            mean, right, count = engine.forward(batch.to(engine.device, non_blocking=True), step)
            loss += mean.double() * count
            correct += right
            predicted += count
    finally:
        engine.training(True)
    total, right_sum, count_sum = engine.sum([float(loss), float(correct), float(predicted)])
    nats = total / max(count_sum, 1.0)
    perplexity = math.inf if nats > 700 else math.exp(nats)
    return {"loss": nats, "accuracy": right_sum / max(count_sum, 1.0), "perplexity": perplexity}
