"""Runs that grow between their phases: in the job, as separate jobs, stopped and killed on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.target import Target
from bert2bert.commands import phase_growth
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidConfig
from bert2bert.files.digest import file_digest
from bert2bert.ranks.distributed import RANKS
from bert2bert.recipe import AdamW, Data, Grow, Phase, Recipe, Schedule, SubModels, Tokens
from bert2bert.train.growing import grown, layout
from bert2bert.train.position import Position
from tests.data.fixtures import write_bins
from tests.distributed import run_ranks
from tests.train import runs, tiny


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def recipe(bins: Path, **other: Any) -> Recipe:
    """Small, then twice as wide and deep under sub-models, then all of it; the second with longer rows."""
    large = Grow({"hidden_size": "2x", "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64})
    given: dict[str, Any] = {
        "name": "grows", "model": tiny.model_config(0.1), "data": Data(bins=str(bins), seq_len=16, eval_rows=8),
        "global_batch_size": 8, "optimizer": AdamW(lr=5e-3, weight_decay=0.1), "seed": 3,
        "eval_every": 4, "checkpoint_every": 3, "keep_checkpoints": 2, "log_every": 1,
        "phases": (
            Phase("small", 4, schedule=Schedule("linear", warmup_steps=2)),
            Phase("sub-models", 3, SubModels(2), grow=large, seq_len=32, global_batch_size=4),
            Phase("full", 4, schedule=Schedule("cosine", peak=3e-3)),
        ),
    }  # fmt: skip
    return Recipe(**(given | other))


def growing(plan: Recipe, stage: int, output: Path, resume: Path | None = None, **how: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}}
    return runs.run(plan, config, output, resume, grow=phase_growth.grow, **how)


def both(plan: Recipe, stage: int, root: Path) -> None:
    growing(plan, stage, root / "whole")
    growing(plan, stage, root / "first", until=plan.phases[0].name)
    source = root / "first" / "global_step4"
    target = layout({"zero_optimization": {"stage": stage}})
    phase_growth.grow(plan, 1, source, root / "grown", target, RANKS, other=None)
    growing(plan, stage, root / "second", root / "grown")


@pytest.mark.parametrize("stage", [0, 3])
def test_a_growth_in_the_job_is_the_chain_of_jobs(bins: Path, tmp_path: Path, stage: int) -> None:
    """The same losses, weights, moments, steps and random states, bit for bit."""
    run_ranks(both, 2, recipe(bins), stage, tmp_path)
    whole, second = runs.records(tmp_path / "whole"), runs.records(tmp_path / "second")
    assert [r["growths"] for r in whole if r["kind"] == "eval"] == [0, 0, 1, 1, 1]
    assert [r for r in whole if r["growths"]] == second
    assert [(r["phase"], r["step"]) for r in whole if r["kind"] == "train"][3:5] == [("small", 4), ("sub-models", 5)]
    last = [runs.manifest(tmp_path / run, 11) for run in ("whole", "second")]
    assert all(last[0][key] == last[1][key] for key in ("tensors", "groups", "counters", "model"))
    states = [sorted((tmp_path / run / "global_step11").glob("bert2bert_rng*")) for run in ("whole", "second")]
    assert [file_digest(a) for a in states[0]] == [file_digest(b) for b in states[1]]
    training = runs.manifest(tmp_path / "whole", 11)["training"]
    assert (training["growths"], training["ended"], training["phase"]) == (1, [4, 7], 2)
    assert not (tmp_path / "whole" / "growths").exists()


def die(plan: Recipe, output: Path, victim: int, moment: str) -> None:
    """Run until the victim is killed: in front of the growth, in its midst, behind it, or in the first save after."""
    from bert2bert.checkpoints.commit import journal
    from bert2bert.train import save

    def kill(where: str) -> None:
        if where == moment and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    def grow(*given: Any, **named: Any) -> Path:
        kill("before")
        found = phase_growth.grow(*given, **named)
        kill("after")
        return found

    finish, digests = journal.Finisher.add, save.partitions.digests

    def put(*given: Any, **named: Any) -> Any:
        kill("in")
        return finish(*given, **named)

    def digested(engine: Any, *more: Any) -> Any:
        if engine.model.width == 32 and engine.counters["global_steps"] > 4:  # and not when the growth is loaded
            kill("save")
        return digests(engine, *more)

    journal.Finisher.add, save.partitions.digests = put, digested  # type: ignore[method-assign]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    runs.run(plan, config, output, grow=grow)


def steady(bins: Path) -> Recipe:
    """Without dropout, so that the number of ranks changes nothing but rounding."""
    return recipe(bins, model=tiny.model_config(0.0))


@pytest.fixture(scope="module")
def undisturbed(bins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run_ranks(growing, 2, steady(bins), 2, output)
    return output


@pytest.mark.timeout(150)
@pytest.mark.parametrize(("victim", "moment"), [(0, "before"), (1, "in"), (0, "after"), (1, "save")])
def test_killed_around_a_growth_the_same_command_goes_on(
    bins: Path, undisturbed: Path, tmp_path: Path, victim: int, moment: str
) -> None:
    """On another number of ranks, too."""
    output = tmp_path / "run"
    with pytest.raises(RuntimeError, match=rf"rank {victim} died with exit code -9|Connection closed|failed"):
        run_ranks(die, 2, steady(bins), output, victim, moment, timeout=60)
    assert (output / "latest").read_text() == "global_step4"
    for summary in run_ranks(growing, 1, steady(bins), 1, output, output, timeout=60):
        assert summary["step"] == 11 and summary["stopped"] is None
    found, wanted = runs.records(output), runs.records(undisturbed)
    assert [(r["kind"], r["step"], r["phase"]) for r in found] == [(r["kind"], r["step"], r["phase"]) for r in wanted]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in wanted], rel=1e-5)
    assert [g["phase"] for g in json.loads((output / "run.json").read_text())["growths"]] == ["sub-models"]


def interrupted(plan: Recipe, output: Path, at: Sequence[int]) -> list[str | None]:
    """Stopped in each of the 0-based steps, then to the end."""
    found = []
    for stop_at in (*at, None):
        found.append(growing(plan, 2, output, output, stop_at=stop_at)["stopped"])
    return found


@pytest.mark.timeout(150)
def test_stopped_in_every_phase_the_run_is_the_same_bit_for_bit(bins: Path, tmp_path: Path) -> None:
    """With dropout, in fp32: at the last step before a growth, in the middle, and at a phase's first step."""
    run_ranks(growing, 2, recipe(bins), 2, tmp_path / "whole")
    assert run_ranks(interrupted, 2, recipe(bins), tmp_path / "run", [1, 3, 4, 7])[0] == [*["SIGTERM"] * 4, None]
    assert runs.records(tmp_path / "run") == runs.records(tmp_path / "whole")
    last = [runs.manifest(tmp_path / run, 11) for run in ("run", "whole")]
    assert all(last[0][key] == last[1][key] for key in ("tensors", "groups", "counters"))
    for training in (found["training"] for found in last):
        del training["spent"]["seconds"]
    assert last[0]["training"] == last[1]["training"]


def cycle(bins: Path, **other: Any) -> Recipe:
    """Large, coalesced, small, de-coalesced and mixed with the large one of before."""
    small = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 16, "num_hidden_layers": 2}
    large = tiny.model_config(num_hidden_layers=4)
    back = Grow(
        {key: large[key] for key in small}, width="decoalesce", depth="decoalesce", mix_with="large", alpha=0.5,
        lossy=True,
    )  # fmt: skip
    phases = (
        Phase("large", until=Tokens(400)),
        Phase("small", 3, grow=Grow(small, width="coalesce", depth="coalesce")),
        Phase("again", 4, grow=back),
    )
    return recipe(bins, model=large, phases=phases, checkpoint_every=2, keep_checkpoints=1, **other)


def test_a_cycle_mixes_in_what_the_large_model_was(bins: Path, tmp_path: Path) -> None:
    """The weights at the start of the last phase, by transformers' names, against the two checkpoints by hand."""
    run_ranks(growing, 2, cycle(bins), 2, tmp_path / "run", timeout=60)
    records = runs.records(tmp_path / "run")
    ended = runs.manifest(tmp_path / "run", records[-1]["step"])["training"]["ended"]
    tokens = [r["tokens"] for r in records if r["kind"] == "train"]
    assert tokens[ended[0] - 2] < 400 <= tokens[ended[0] - 1] and ended[1] == ended[0] + 3
    assert {p.name for p in (tmp_path / "run").glob("global_step*")} == {f"global_step{ended[1] + 4}"}


def from_folder(bins: Path, folder: Path, output: Path) -> list[str | None]:
    """Grown by a half from anybody's folder, whose model the recipe takes; stopped behind the growth, and gone on."""
    grow = Grow({"num_hidden_layers": "1.5x"}, depth="stack")
    plan = recipe(bins, model=None, phases=(Phase("more", 4, grow=grow), Phase("longer", 2)))
    found = [growing(plan, 2, output, folder, stop_at=2)["stopped"]]
    return [*found, growing(plan, 2, output, output)["stopped"]]


def test_a_recipe_without_a_model_grows_that_of_a_folder_once(
    bins: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the folder, which has no optimizer, no note says with which rates it was trained."""
    import transformers

    config = {key: value for key, value in tiny.model_config(num_hidden_layers=2).items() if key != "model_type"}
    transformers.BertForMaskedLM(transformers.BertConfig(**config)).save_pretrained(tmp_path / "hub")
    assert run_ranks(from_folder, 2, bins, tmp_path / "hub", tmp_path / "run", timeout=60)[0] == ["SIGTERM", None]
    shown = capfd.readouterr().err
    assert "growing before phase 'more'" in shown and "in the checkpoint; the recipe's" not in shown
    manifest = runs.manifest(tmp_path / "run", 6)
    assert manifest["model"]["num_hidden_layers"] == 3 and manifest["training"]["growths"] == 1
    assert manifest["training"]["recipe"]["model"]["num_hidden_layers"] == 2


def test_why_a_model_cannot_grow_is_reported(bins: Path, tmp_path: Path) -> None:
    """The run's own folder holds no checkpoint of a recipe that begins with a growth; or nothing can grow one."""
    plan = recipe(bins, phases=(Phase("more", 4, grow=Grow({"num_hidden_layers": 6})),))
    target = Target("zero", 2, 1)
    with pytest.raises(InvalidConfig, match=r"growth before phase 'more', and .*/run holds no checkpoint yet; give"):
        grown(plan, Position(), phase_growth.grow, tmp_path / "run", None, target)
    with pytest.raises(InvalidConfig, match="this entrance has no operators"):
        grown(plan, Position(), None, tmp_path / "run", tmp_path, target)


def causal(folder: Path, phases: tuple[Phase, ...], layers: int) -> Recipe:
    """A tiny GPT-2's, with bins of its own."""
    model = {
        "model_type": "gpt2", "vocab_size": 48, "n_embd": 16, "n_layer": layers, "n_head": 2, "n_positions": 32,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    write_bins(folder / "bins", [5, 40, 11, 16, 9, 23] * 20, 48, heldout=(40, 13, 8) * 5, sentinels=8)
    return recipe(folder / "bins", model=model, phases=phases, checkpoint_every=4)


def test_a_tied_model_trains_grows_untied_and_trains_on(tmp_path: Path) -> None:
    """The checkpoint with its moments, in native shards, is what `verify` plans again from its manifest."""
    grow = Grow({"tie_word_embeddings": False}, embeddings="untie")
    plan = causal(tmp_path, (Phase("tied", 4), Phase("untied", 4, grow=grow)), 1)
    run_ranks(both, 2, plan, 2, tmp_path)
    before, after = runs.manifest(tmp_path / "first", 4), runs.manifest(tmp_path / "whole", 8)
    assert set(after["tensors"]) - set(before["tensors"]) == {"lm_head.weight"}
    assert after["model"]["tie_word_embeddings"] is False
    whole = runs.records(tmp_path / "whole")
    assert [r for r in whole if r["growths"]] == runs.records(tmp_path / "second")
    tied, untied, last = [r["loss"] for r in whole if r["kind"] == "eval"][-3:]
    assert untied == pytest.approx(tied, rel=1e-5) and last < untied
    grown = next((tmp_path / "grown").glob("global_step*"))
    assert verify(tmp_path / "first" / "global_step4", grown).ok


def test_a_model_without_layers_trains_and_grows_some(tmp_path: Path) -> None:
    """A GPT-2 of embeddings and head; what it gets writes nothing at first."""
    grow = Grow({"n_layer": 2}, depth="random:residual=zero")
    plan = causal(tmp_path, (Phase("none", 4), Phase("two", 4, grow=grow)), 0)
    run_ranks(growing, 2, plan, 2, tmp_path / "run")
    found = runs.records(tmp_path / "run")
    assert [r["layers_run"] for r in found if r["kind"] == "train"] == [0] * 4 + [2] * 4
    losses = [r["loss"] for r in found if r["kind"] == "eval"]
    assert len(losses) >= 2 and losses[-1] < losses[0]
    growths = json.loads((tmp_path / "run" / "run.json").read_text())["growths"]
    assert [growth["phase"] for growth in growths] == ["two"]
    assert runs.manifest(tmp_path / "run", 8)["model"]["n_layer"] == 2
