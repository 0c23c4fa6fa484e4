"""Tiny bins and whole runs of the training loop on real ranks, for tests."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from bert2bert.data.prepare import prepare
from bert2bert.recipe import AdamW, Data, Full, Phase, Recipe, Schedule, SubModels
from tests.train import tiny

TEXT = "the whale sea ship captain white water said man hand eyes long old night day sail boat deck wind crew"
TIMES = ("seconds", "tokens_per_s")


def make_bins(folder: Path, seed: int = 0) -> Path:
    """Bins of a few thousand random words with a tokenizer of 64 tokens."""
    draw = random.Random(seed)
    text = folder / f"words{seed}.txt"
    lines = (" ".join(draw.choices(TEXT.split(), k=draw.randint(3, 40))) for _ in range(200))
    text.write_text("\n".join(lines) + "\n", encoding="utf-8")
    bins = folder / f"bins{seed}"
    prepare([text], None, None, None, None, None, 64, [], 0.2, "line", bins, seed, progress=False)
    return bins


def recipe(bins: Path, **other: Any) -> Recipe:
    """Two phases of 4 steps, sub-models then all layers, dropout on."""
    given: dict[str, Any] = {
        "name": "tiny", "model": tiny.model_config(0.1), "data": Data(bins=str(bins), seq_len=16, eval_rows=8),
        "global_batch_size": 8, "optimizer": AdamW(lr=5e-3, weight_decay=0.1), "gradient_clipping": 1.0, "seed": 3,
        "eval_every": 4, "checkpoint_every": 3, "keep_checkpoints": 2, "log_every": 1,
        "phases": (
            Phase("sub-models", 4, SubModels(1), Schedule("linear", warmup_steps=2)),
            Phase("full", 4, Full(), Schedule("cosine", peak=3e-3)),
        ),
    }  # fmt: skip
    return Recipe(**(given | other))


def run(
    plan: Recipe,
    config: dict[str, Any],
    output: Path,
    resume: Path | None = None,
    stop_at: int | None = None,
    stop_by: signal.Signals = signal.SIGTERM,
    **how: Any,
) -> dict[str, Any]:
    """`train` in this rank; ``stop_at``: the last rank gets the signal ``stop_by`` in that 0-based step."""
    from bert2bert.train import loop
    from bert2bert.train.run import train

    original = loop.Draw

    def draw(step: int, *rest: Any) -> Any:
        if step == stop_at and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), stop_by)
        return original(step, *rest)

    loop.Draw = draw  # type: ignore[assignment, misc]
    try:
        return train(plan, config, output, resume, **how)
    finally:
        loop.Draw = original  # type: ignore[misc]


def load(engine: Any, path: Path, plan: Recipe, data: dict[str, Any]) -> Any:
    """Open a checkpoint and load it into an engine; what was found, with the notes of both."""
    from bert2bert.train import resume

    found = resume.find(path, plan, data, own=False).of(engine.names)
    found.notes.extend(resume.load(engine, found, plan.at(found.position.phase), found.position))
    return found


def records(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the clock."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def manifest(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / f"global_step{step}" / "bert2bert.json").read_text(encoding="utf-8"))
    return found
