"""Every recipe whose model grows, at its tiny size and shorter still: it runs, grows where it says, stops and goes on.

A covering set over ZeRO stages and precisions; in one process group, since forking one a recipe would take longer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bert2bert.commands import phase_growth
from bert2bert.commands.plan_recipe import plan_recipe
from bert2bert.recipe import Agreement, Recipe, RunSteps, Schedule, load_recipe
from tests.distributed import run_ranks
from tests.train import runs, tiny
from tests.train.test_architectures import counting

ROOT = Path(__file__).parents[2]
ROWS = 8  # of an optimizer step


@dataclass(frozen=True)
class Case:
    """A recipe's file, which of its sizes, and how its engine computes. layers: of the model in each phase."""

    name: str
    stage: int
    precision: str
    layers: tuple[int, ...]
    size: str = "tiny"


CASES = (
    Case("bert_stack", 0, "fp32", (1, 2, 4)),
    Case("bert_mslt", 1, "fp32", (1, 2, 3, 4, 4)),
    Case("bert_share_unshare", 2, "fp32", (1, 4)),
    Case("bert_share_unshare", 3, "fp32", (1, 4), "adaptive_tiny"),
    Case("bert_share_unshare", 2, "bf16", (1, 2, 4), "multi_tiny"),
    Case("bert_vcycle", 1, "bf16", (4, 2, 4)),
    Case("bert_vcycle", 3, "bf16", (4, 2, 1, 2, 4), "two_levels_tiny"),
    Case("bert_apollo", 0, "bf16", (1, 2, 4)),
    Case("gpt2_bert2bert", 3, "fp32", (2, 2, 2)),
    Case("gpt2_staged", 2, "fp16", (1, 1, 2)),
    Case("gpt2_one_layer", 1, "fp16", (1, 2)),
    Case("gpt2_one_layer", 2, "fp32", (0, 2), "zero_tiny"),
    Case("gpt2_midas", 3, "fp16", (1, 2, 3)),
    Case("gpt2_lauga", 0, "fp16", (4, 2, 4)),
    Case("llama_gstack", 2, "fp32", (1, 4)),
    Case("mixtral_upcycled", 2, "fp32", (2, 2)),
    Case("gpt2_untie", 3, "fp32", (2, 2)),
    Case("bert_base_bert2bert", 1, "fp32", (2, 4, 4)),
)
FROM_FOLDER = (Case("llama_pro", 2, "fp32", (3, 3)), Case("llama_hyperclone", 3, "fp32", (2,)))
IDS = [f"{case.name}-{case.size}" for case in CASES]


def path_of(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.py"


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tiny"])
def test_a_recipe_plans_and_its_ds_config_holds_in_every_phase(case: Case, whole: bool) -> None:
    """At the number of GPUs that its header names; sizes and operators fit from phase to phase."""
    size = case.size.removesuffix("_tiny").replace("tiny", "recipe") if whole else case.size
    size = "one_job" if whole and case.name == "bert_base_bert2bert" else size
    found = load_recipe(path_of(case.name), [] if size == "recipe" else [f"size={size}"])
    ranks, file = (8, "ds_configs/zero2_bf16.json") if whole else (2, "ds_configs/zero2_cpu.json")
    plan = plan_recipe(found, ROOT / file, ranks)
    assert [phase.name for phase in plan.phases] == [phase.name for phase in found.phases]
    assert all(phase.memory and phase.flops_a_token for phase in plan.phases)
    if not whole:
        tables = [phase.model.split(", ")[1].split(" layers")[0] for phase in plan.phases]
        assert tuple(map(int, tables)) == case.layers


def short(case: Case, bins: Path, steps: int) -> Recipe:
    """The recipe's phases, programs and growths, for a few steps of a few rows each."""
    found = load_recipe(path_of(case.name), [f"size={case.size}"])
    phases = []
    for phase in found.phases:
        until = phase.until
        if isinstance(until, Agreement):
            until = replace(until, every=1, patience=1, threshold=0.99)
        if isinstance(until, RunSteps):
            until = RunSteps(2 * steps)
        most = None if phase.steps is None else min(phase.steps, steps)
        phases.append(replace(phase, steps=most, schedule=Schedule("constant", peak=1e-3), until=until))
    return replace(
        found, phases=tuple(phases), data=replace(found.data, bins=str(bins), seq_len=16, eval_rows=8),
        global_batch_size=ROWS, eval_every=1000, checkpoint_every=1000, keep_checkpoints=1, log_every=1,
    )  # fmt: skip


def settings(case: Case, world: int = 2) -> dict[str, Any]:
    found = tiny.ds_config(case.stage, case.precision, world=world, accumulation=1, rows=ROWS)
    return {key: value for key, value in found.items() if not key.endswith("batch_size")}


def train_all(cases: tuple[Case, ...], bins: Path, root: Path, source: Path | None) -> list[str]:
    """Each recipe without a stop, then stopped in its last phase but two steps and gone on; what went wrong."""
    tiny.allow_fp16()
    wrong = []
    for case in cases:
        plan, folder = short(case, bins, 2), root / f"{case.name}-{case.size}"
        steps = plan.steps or 4
        runs.run(plan, settings(case), folder / "whole", source, grow=phase_growth.grow)
        first = runs.run(
            plan, settings(case), folder / "run", source, grow=phase_growth.grow, stop_at=max(steps - 2, 0)
        )
        last = runs.run(plan, settings(case), folder / "run", "auto", grow=phase_growth.grow, start=source)
        if (first["stopped"], last["stopped"]) != ("SIGTERM", None):
            wrong.append(f"{folder.name}: stopped {first['stopped']}, then {last['stopped']}")
    return wrong


def check(case: Case, root: Path, growths: int) -> None:
    folder = root / f"{case.name}-{case.size}"
    whole, again = runs.records(folder / "whole"), runs.records(folder / "run")
    assert whole == again, case
    assert whole[-1]["growths"] == growths and all(r["loss"] is not None and r["loss"] < 20 for r in whole), case
    manifest = runs.manifest(folder / "run", whole[-1]["step"])
    sizes = manifest["model"]
    assert case.layers[-1] == sizes.get("num_hidden_layers", sizes.get("n_layer")), case


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return counting(tmp_path_factory.mktemp("data") / "bins")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("third", [0, 1, 2])
def test_every_recipe_grows_stops_and_goes_on(bins: Path, tmp_path: Path, third: int) -> None:
    cases = CASES[third::3]
    assert run_ranks(train_all, 2, cases, bins, tmp_path, None, timeout=390) == [[], []]
    for case in cases:
        phases = load_recipe(path_of(case.name), [f"size={case.size}"]).phases
        check(case, tmp_path, sum(phase.grow is not None for phase in phases))


@pytest.mark.timeout(200)
def test_recipes_that_grow_anybodys_model(bins: Path, tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert run_ranks(train_all, 2, FROM_FOLDER, bins, tmp_path, tmp_path / "llama", timeout=190) == [[], []]
    for case in FROM_FOLDER:
        check(case, tmp_path, 1)


def other_world(case: Case, bins: Path, root: Path, part: int) -> None:
    """Stopped in its second step on two ranks, and from there on one."""
    plan, world = short(case, bins, 2), int(os.environ["WORLD_SIZE"])
    how: dict[str, Any] = {"grow": phase_growth.grow}
    runs.run(plan, settings(case, world), root / "run", "auto", stop_at=1 if part == 0 else None, **how)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("case", [CASES[2], CASES[8]], ids=[IDS[2], IDS[8]])
def test_a_growth_on_another_number_of_ranks(bins: Path, tmp_path: Path, case: Case) -> None:
    run_ranks(other_world, 2, case, bins, tmp_path, 0)
    run_ranks(other_world, 1, case, bins, tmp_path, 1)
    assert runs.records(tmp_path / "run")[-1]["growths"] == 1
