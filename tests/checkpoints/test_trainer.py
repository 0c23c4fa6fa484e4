"""The Trainer of transformers with DeepSpeed: its checkpoint grown, and gone on with by the Trainer itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints.engines import VOCAB, hf_config, hf_model, release
from tests.distributed import run_ranks
from tests.doors import grow

pytest.importorskip("accelerate")

CONFIG = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "tie_word_embeddings": True, **hf_config()}
Log = list[tuple[int, float, float]]  # of every step: its number, loss and learning rate
WIDER = {**CONFIG, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 88}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def train(
    out: str, stage: int, config: dict[str, Any], steps: int, resume: str | None
) -> list[tuple[int, float, float]]:
    """Of every step: its number, loss and learning rate."""
    from transformers import Trainer, TrainingArguments

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    zero = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
    }
    more = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    more |= {"checkpoint": {"load_universal": True}} if resume and resume.endswith("universal") else {}
    arguments = TrainingArguments(
        out, per_device_train_batch_size=2, max_steps=steps, save_steps=2, logging_steps=1, learning_rate=1e-3,
        deepspeed={**zero, **more}, report_to=[], disable_tqdm=True, lr_scheduler_type="linear", warmup_steps=1,
        weight_decay=0.1,
    )  # fmt: skip
    trainer = Trainer(hf_model(config), arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    release(trainer.deepspeed)
    return [(e["step"], e["loss"], e["learning_rate"]) for e in trainer.state.log_history if "loss" in e]


def test_the_trainer_goes_on_from_the_growth_of_its_checkpoint(tmp_path: Path) -> None:
    """As from its own: the width grows exactly, so that the next step has the same loss, learning rate and data."""
    out, stage = tmp_path / "out", 2
    truth = run_ranks(train, 2, str(out), stage, CONFIG, 4, None)[0]
    (tmp_path / "wider.json").write_text(json.dumps(WIDER))
    native = {"format": "zero", "stage": stage, "world_size": 2}
    for name, how in {"native": native, "universal": {}}.items():
        target = tmp_path / name
        grow(out / "checkpoint-2", target, tmp_path / "wider.json", measure=False, say=lambda _: None, **how)  # type: ignore[arg-type]
        found = run_ranks(train, 2, f"{target}.out", stage, WIDER, 4, str(target))[0]
        assert [step for step, *_ in found] == [1, 2, 3, 4] and found[:2] == truth[:2]
        assert found[2] == pytest.approx(truth[2], rel=1e-5)
        assert found[3][2] == truth[3][2] and 0 < found[3][1] < 2 * truth[3][1]
