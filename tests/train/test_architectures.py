"""Every architecture's whole way on real ranks: train, stop, resume, grow, train on, reshard, load elsewhere.

The row of each in the README's table is checked against what is seen here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bert2bert.commands import cli
from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import eval_batches
from bert2bert.data.objective import Objective, default
from bert2bert.model import registry
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule, model_keys
from bert2bert.tables import TABLES, table_for
from bert2bert.train.evaluate import EVALUATION_SEED
from tests import tiny as models
from tests.checkpoints.engines import Case, build
from tests.data.fixtures import write_bins
from tests.distributed import run_ranks
from tests.train import runs, tiny

README = Path(__file__).parents[2] / "README.md"
VOCAB, ROW = 48, 16
ARCHITECTURES = tuple(TABLES)
# ZeRO stage and precision of the first run, and of those that go on from it, each two steps further. Where an
# architecture has a core of its own, they are all stages and precisions; those that share one have them together.
STAGES = {
    "bert": ((0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "bf16")),
    "roberta": ((1, "fp32"), (3, "fp16"), (0, "bf16"), (2, "fp32")),
    "modernbert": ((3, "fp32"), (2, "bf16"), (0, "fp16"), (1, "fp16")),
    "gpt2": ((2, "fp32"), (0, "bf16"), (1, "fp16"), (3, "bf16")),
    "llama": ((3, "fp32"), (2, "bf16")), "mistral": ((0, "fp32"), (1, "fp16")),
    "qwen2": ((1, "fp32"), (3, "bf16")), "qwen3": ((2, "fp32"), (0, "bf16")),
    "t5": ((3, "fp32"), (1, "bf16"), (0, "fp16"), (2, "bf16")), "mixtral": ((2, "fp32"), (3, "bf16")),
    "qwen3_moe": ((1, "fp32"), (0, "bf16")), "qwen2_moe": ((0, "fp32"), (2, "fp16")),
}  # fmt: skip


def model_of(kind: str) -> dict[str, Any]:
    config = models.config_of(kind)
    sizes = {"max_position_embeddings": 32} if "max_position_embeddings" in config else {}
    sizes |= {"n_positions": 32} if kind == "gpt2" else {}
    config = {**config, "vocab_size": VOCAB, **sizes}
    config["architectures"] = ["BertForMaskedLM"] if kind == "bert" else config["architectures"]
    return {key: value for key, value in config.items() if key in model_keys(config)}


def recipe_of(bins: Path, model: dict[str, Any] | None, steps: int = 4, **other: Any) -> Recipe:
    """``steps`` steps, the first four of which are always the same."""
    return Recipe(
        name="tiny", model=model, data=Data(bins=str(bins), seq_len=ROW, eval_rows=8), global_batch_size=8,
        phases=(Phase("all", steps, schedule=Schedule("constant")),), optimizer=AdamW(lr=1e-2, weight_decay=0.1),
        eval_every=4, checkpoint_every=100, log_every=1, **other,
    )  # fmt: skip


def counting(folder: Path) -> Path:
    """Bins of documents that count in steps of seven, modulo 11: a text that any model begins to learn at once."""
    write_bins(folder, [5, 40, 11, 16, 9, 23] * 20, VOCAB, heldout=(40, 13, 8) * 5, sentinels=8)
    for split in ("train", "heldout"):
        path = folder / f"{split}.bin"
        ids = np.fromfile(path, dtype=np.uint16)
        (5 + np.arange(len(ids)) * 7 % 11).astype(np.uint16).tofile(path)
    return folder


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counting(tmp_path_factory.mktemp("data") / "bins")


def config(stage: int, precision: str, world: int = 2) -> dict[str, Any]:
    return tiny.ds_config(stage, precision, world)


def trained(bins: Path, root: Path, model: dict[str, Any]) -> None:
    """A straight run of four steps, one that is stopped after two and resumed, and one that goes on in another way."""
    tiny.allow_fp16()
    first, *others = STAGES[model["model_type"]]
    plan = recipe_of(bins, model)
    runs.run(plan, config(*first), root / "straight")
    stopped = runs.run(plan, config(*first), root / "stopped", stop_at=1)
    assert stopped["stopped"] == "SIGTERM" and stopped["step"] == 2
    runs.run(plan, config(*first), root / "stopped", resume=root / "stopped")
    at = root / "straight"
    for i, other in enumerate(others, 1):
        runs.run(recipe_of(bins, None, steps=4 + 2 * i), config(*other), root / f"on{i}", resume=at)
        at = root / f"on{i}"


def grown_on(bins: Path, root: Path, stage: int) -> None:
    """Two steps from the grown checkpoint, whose config the run takes, on another number of ranks."""
    runs.run(recipe_of(bins, None, steps=2), config(stage, "fp32", world=1), root / "grown_on", resume=root / "grown")


def held_out(bins: Path, objective: Objective) -> list[Batch]:
    return eval_batches(TokenBins.open(bins), "heldout", objective, ROW, 2, 8, 0, 1, EVALUATION_SEED)


def padded(values: torch.Tensor, lengths: list[int], filler: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(lengths)), batch_first=True, padding_value=filler)


def their_loss(model: torch.nn.Module, batches: list[Batch]) -> float:
    """The mean loss of transformers' model over predicted tokens, one padded row a sequence, filler among them."""
    total, count = 0.0, 0
    for batch in batches:
        flat = batch.decoder or batch
        lengths = [n for n in batch.cu_seqlens.diff().tolist() if n]
        given = {"input_ids": padded(batch.tokens, lengths)}
        given["attention_mask"] = padded(torch.ones_like(batch.tokens), lengths)
        if batch.decoder is not None:
            lengths = [n for n in flat.cu_seqlens.diff().tolist() if n]
            given["decoder_input_ids"] = padded(flat.tokens, lengths)
        labels = batch.labels
        if batch.targets is not None:
            labels = torch.full_like(flat.tokens, IGNORE)
            kept = batch.labels != IGNORE
            labels[batch.targets[kept]] = batch.labels[kept]
        labels = padded(labels, lengths, IGNORE)
        logits = model(**given).logits
        total += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORE).sum())
    return total / count


@torch.no_grad()
def loaded_elsewhere(bins: Path, path: Path, model: dict[str, Any], objective: Objective) -> tuple[float, int]:
    """The held-out loss of transformers' own model in a plain script's engine that loads native shards, and the Adam
    step that it goes on from."""
    engine = build(Case("plain", 2, layout="trainer", hf=model))
    engine.load_checkpoint(str(path), load_lr_scheduler_states=False)
    engine.eval()
    state = next(iter(engine.optimizer.optimizer.state.values()))
    return their_loss(engine.module, held_out(bins, objective)), int(state["step"])


def larger(root: Path, model: dict[str, Any]) -> Path:
    """The config with one layer more in every stack."""
    table = table_for(model)
    sizes = {table.key(axis): table.axis_sizes(model)[axis] + 1 for axis in table.sizes.depth}
    path = root / "larger.json"
    path.write_text(json.dumps({k: v for k, v in model.items() if k != "layer_types"} | sizes))
    return path


def row_of(kind: str) -> str:
    """The architecture's row of the README's table, once all of this has been seen."""
    core = registry.CORES[kind].partition(".")[0]
    how = "transformers' forward pass" if core == "hosted" else f"`model/{core}.py`"
    return f"| {kind} | yes | {how} | {registry.objective_of({'model_type': kind})} | yes | yes | yes |"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_whole_way(kind: str, bins: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = model_of(kind)
    objective = default(registry.objective_of(model))
    run_ranks(trained, 2, bins, tmp_path, model, timeout=170)
    straight = runs.records(tmp_path / "straight")
    assert straight == runs.records(tmp_path / "stopped")
    assert runs.manifest(tmp_path / "straight", 4)["tensors"] == runs.manifest(tmp_path / "stopped", 4)["tensors"]
    held = [r["loss"] for r in straight if r["kind"] == "eval"]
    assert held[-1] < held[0] < 2 * math.log(VOCAB)
    last = len(STAGES[kind]) - 1
    on = [r["loss"] for r in runs.records(tmp_path / f"on{last}") if r["kind"] == "eval"]
    assert on[-1] < held[-1]

    grown = ["grow", str(tmp_path / f"on{last}"), str(tmp_path / "grown"), "--config", str(larger(tmp_path, model))]
    assert cli.main([*grown, "--depth", "stack", "--lossy", "--no-measure"]) == 0
    run_ranks(grown_on, 1, bins, tmp_path, STAGES[kind][0][0], timeout=60)
    after = [r["loss"] for r in runs.records(tmp_path / "grown_on") if r["kind"] == "eval"]
    assert len(after) == 2 and after[-1] < held[0]

    native = ["reshard", str(tmp_path / "straight"), str(tmp_path / "native"), "--format", "zero"]
    assert cli.main([*native, "--stage", "2", "--world-size", "2", "--groups", "decay"]) == 0
    for loss, step in run_ranks(loaded_elsewhere, 2, bins, tmp_path / "native", model, objective, timeout=60):
        assert step == 4 and loss == pytest.approx(held[-1], rel=1e-5)
    assert f"\n{row_of(kind)}" in README.read_text(encoding="utf-8")
