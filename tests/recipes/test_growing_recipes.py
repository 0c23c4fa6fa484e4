"""Every recipe whose model grows, at its tiny size and shorter still: it runs, grows where it says, is killed behind
the growth, goes on, and goes on once more on another number of ranks. A cover of ZeRO stages and precisions."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from bert2bert.commands import phase_growth
from bert2bert.commands.plan_recipe import plan_recipe
from bert2bert.recipe import Agreement, Recipe, RunSteps, Schedule, load_recipe
from tests.distributed import run_ranks
from tests.train import runs, tiny
from tests.train.test_architectures import VOCAB, counting
from tests.train.test_writing import slowly

ROOT = Path(__file__).parents[2]
ROWS = 6  # of an optimizer step, each a micro-batch of its own: shared out among 1, 2 or 3 ranks, losses stay the same
NEAR = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-4}
"""How far, relatively, losses on another number of ranks are at most from those of the run that kept its number: about
ten times what was measured (9.4e-8, 1.4e-4 and 1.4e-5)."""


@dataclass(frozen=True)
class Case:
    """A recipe's file, which of its sizes, and how its engine computes. layers: of the model in each phase; then: the
    number of ranks on which a run of two ends."""

    name: str
    stage: int
    precision: str
    layers: tuple[int, ...]
    size: str = "tiny"
    then: int = 1


CASES = (
    Case("bert_stack", 0, "fp32", (1, 2, 4)),
    Case("bert_mslt", 1, "fp32", (1, 2, 3, 4, 4), then=3),
    Case("bert_share_unshare", 2, "fp32", (1, 4)),
    Case("bert_share_unshare", 3, "fp32", (1, 4), "adaptive_tiny", then=3),
    Case("bert_share_unshare", 2, "bf16", (1, 2, 4), "multi_tiny"),
    Case("bert_vcycle", 1, "bf16", (4, 2, 4), then=3),
    Case("bert_vcycle", 3, "bf16", (4, 2, 1, 2, 4), "two_levels_tiny"),
    Case("bert_apollo", 0, "bf16", (1, 2, 4), then=3),
    Case("gpt2_bert2bert", 3, "fp32", (2, 2, 2)),
    Case("gpt2_staged", 2, "fp16", (1, 1, 2), then=3),
    Case("gpt2_one_layer", 1, "fp16", (1, 2)),
    Case("gpt2_one_layer", 2, "fp32", (0, 2), "zero_tiny", then=3),
    Case("gpt2_midas", 3, "fp16", (1, 2, 3)),
    Case("gpt2_lauga", 0, "fp16", (4, 2, 4), then=3),
    Case("llama_gstack", 2, "fp32", (1, 4)),
    Case("mixtral_upcycled", 2, "fp32", (2, 2), then=3),
    Case("gpt2_untie", 3, "fp32", (2, 2)),
    Case("bert_base_bert2bert", 1, "fp32", (2, 4, 4), then=3),
    Case("llama_pro", 2, "fp32", (3, 3)),
    Case("llama_hyperclone", 3, "fp32", (2,), then=3),
)
LLAMA_7B = {
    "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096,
}  # fmt: skip
SOURCE = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64,
}  # fmt: skip
"""Of the checkpoint from which recipes without a model of their own start."""
IDS = [f"{case.name}-{case.size}" for case in CASES]


def path_of(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tiny"])
def test_a_recipe_plans_and_its_ds_config_holds_in_every_phase(case: Case, whole: bool) -> None:
    """On eight GPUs, or two ranks of a CPU; sizes and operators fit from phase to phase."""
    size = case.size.removesuffix("_tiny").replace("tiny", "recipe") if whole else case.size
    size = "one_job" if whole and case.name == "bert_base_bert2bert" else size
    found = load_recipe(path_of(case.name), [] if size == "recipe" else [f"size={size}"])
    if found.model is None:
        found = replace(found, model=LLAMA_7B if whole else SOURCE)
    ranks, machine = (8, "bf16") if whole else (2, "cpu")
    plan = plan_recipe(found, ROOT / f"ds_configs/zero{case.stage or 1}_{machine}.json", ranks)
    assert [phase.name for phase in plan.phases] == [phase.name for phase in found.phases]
    assert all(phase.memory and phase.flops_a_token for phase in plan.phases)
    if not whole:
        tables = [phase.model.split(", ")[1].split(" layers")[0] for phase in plan.phases]
        assert tuple(map(int, tables)) == case.layers


def short(case: Case, bins: Path) -> Recipe:
    """The recipe's phases, programs and growths, for a few steps of a few rows each, without dropout, whose draws are
    each rank's own, and with the few tokens of the bins."""
    found = load_recipe(path_of(case.name), [f"size={case.size}"])
    phases = []
    for i, phase in enumerate(found.phases):
        until, grow = phase.until, phase.grow
        if isinstance(until, Agreement):
            until = replace(until, every=1, patience=2, threshold=0.99)
        if isinstance(until, RunSteps):
            until = RunSteps(4)
        if grow is not None and "vocab_size" in grow.model:
            grow = replace(grow, model={**grow.model, "vocab_size": VOCAB})
        most = None if phase.steps is None else min(phase.steps, 2 if i < 3 else 1)
        phases.append(replace(phase, steps=most, schedule=Schedule("constant", peak=1e-3), until=until, grow=grow))
    model = None if found.model is None else {**found.model, "vocab_size": VOCAB}
    model = model and {key: 0.0 if key.endswith(("dropout_prob", "pdrop")) else value for key, value in model.items()}
    return replace(
        found, model=model, phases=tuple(phases), data=replace(found.data, bins=str(bins), seq_len=16, eval_rows=6),
        global_batch_size=ROWS, eval_every=1000, checkpoint_every=1000, keep_checkpoints=1, log_every=1,
    )  # fmt: skip


def settings(case: Case) -> dict[str, Any]:
    found = tiny.ds_config(case.stage, case.precision)
    batch = {key for key in found if "batch" in key or key.startswith("gradient")}
    return {key: value for key, value in found.items() if key not in batch} | {"train_micro_batch_size_per_gpu": 1}


def go(case: Case, plan: Recipe, output: Path, source: Path | None, *stop: Any) -> str | None:
    """The signal that stopped the run, if one did. stop: the 0-based step and the signal."""
    tiny.allow_fp16()
    how: dict[str, Any] = {"grow": phase_growth.grow, "start": source, "quiet": True}
    stopped: str | None = runs.run(plan, settings(case), output, "auto", *stop, **how)["stopped"]
    return stopped


def behind(case: Case, plan: Recipe, root: Path) -> None:
    """The run as it is, and with every step saved behind the next, which slow disks do not finish before a growth."""
    go(case, plan, root / "once", None)
    slowly(lambda path, value: None)
    go(case, replace(plan, checkpoint_every=1, checkpoint_async=True), root / "behind", None)


@pytest.mark.timeout(90)
def test_a_growth_waits_for_a_save_behind_training(tmp_path: Path) -> None:
    plan = short(CASES[0], counting(tmp_path / "bins"))
    run_ranks(behind, 2, CASES[0], plan, tmp_path)
    assert runs.records(tmp_path / "behind") == runs.records(tmp_path / "once")
    last = runs.records(tmp_path / "once")[-1]["step"]
    assert runs.manifest(tmp_path / "behind", last)["tensors"] == runs.manifest(tmp_path / "once", last)["tensors"]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_recipe_grows_is_killed_and_goes_on(case: Case, tmp_path: Path) -> None:
    """Killed in the second step after its first growth, of which nothing is saved yet, it goes on on two ranks, bit for
    bit, and is stopped before the next growth or the last step; others take it from there to its end."""
    plan = short(case, counting(tmp_path / "bins"))
    source = tmp_path / "source" if plan.model is None else None
    if source is not None:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SOURCE)).save_pretrained(source)
    run_ranks(go, 2, case, plan, tmp_path / "whole", source)
    whole, run = runs.records(tmp_path / "whole"), tmp_path / "run"
    steps = [r["growths"] for r in whole if r["kind"] == "train"]
    killed = steps.index(1) + 1
    stopped = steps.index(2) - 1 if 2 in steps else len(steps) - 2
    with pytest.raises(RuntimeError, match=r"rank 1 died with exit code -9|Connection closed|failed"):
        run_ranks(go, 2, case, plan, run, source, killed, signal.SIGKILL)
    written = len([r for r in runs.records(run) if r["kind"] == "train"])
    assert written in (killed - 1, killed)  # the one before was not yet, if layers were being compared
    assert run_ranks(go, 2, case, plan, run, source, stopped) == ["SIGTERM"] * 2
    first = runs.records(run)
    assert first == whole[: len(first)] and first[-1]["step"] == stopped + 1
    assert run_ranks(go, case.then, case, plan, run, source) == [None] * case.then
    check(case, plan, whole, run)


def check(case: Case, plan: Recipe, whole: list[dict[str, Any]], run: Path) -> None:
    """The run that was disturbed has the records of the whole one, with its losses, and the last phase's model."""
    found = runs.records(run)
    assert [(r["kind"], r["step"], r["growths"]) for r in found] == [
        (r["kind"], r["step"], r["growths"]) for r in whole
    ]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in whole], rel=NEAR[case.precision], abs=0)
    assert whole[-1]["growths"] == sum(phase.grow is not None for phase in plan.phases)
    assert all(r["loss"] < 20 for r in whole)
    sizes = runs.manifest(run, whole[-1]["step"])["model"]
    assert case.layers[-1] == sizes.get("num_hidden_layers", sizes.get("n_layer"))
