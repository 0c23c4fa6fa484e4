"""DeepSpeed's defects in loading and saving (docs/deepspeed-defects.md), each as it is in the version supported.

A test that fails here says that DeepSpeed has changed: then look whether what goes round the defect is still right, or
can go. Those of training are in tests/train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.open import open_source
from tests.checkpoints.engines import Case, build, release, train, truth
from tests.checkpoints.targets import BETAS, DECAY, LR, make_tensors, reader
from tests.checkpoints.test_readers_universal import convert
from tests.checkpoints.test_readers_zero import edit
from tests.checkpoints.test_stage0 import spec_of
from tests.distributed import run_ranks
from tests.doors import write_checkpoint

UNIVERSAL = {"checkpoint": {"load_universal": True}}
NAME = "bert.pooler.dense.weight"


def write(folder: Path, case: Case, world: int = 1, **over: Any) -> Path:
    """What this project writes for a case: native shards, or a universal folder."""
    spec = replace(spec_of(case), **over)
    how: dict[str, Any] = {"format": "zero", "stage": case.stage, "world_size": world}
    if case.config == UNIVERSAL:
        how = {"format": "universal"}
    return write_checkpoint(folder, spec, reader(make_tensors(spec)), manifest_growth=None, **how)


def each_optim(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    for file in folder.glob("*optim_states.pt"):
        edit(file, lambda content: change(content["optimizer_state_dict"]))


def load_on_rank(folder: str, case: Case) -> None:
    build(case).load_checkpoint(folder)


def loaded(folder: str, case: Case) -> dict[str, Any]:
    """Every rank loads; what it says, and what the engine holds."""
    engine = build(case)
    try:
        path, _ = engine.load_checkpoint(folder)
    except Exception as error:
        release(engine)
        return {"error": f"{type(error).__name__}: {error}"}
    if path is None:
        release(engine)
        return {"path": None}
    inner = engine.optimizer.optimizer
    steps = [state["step"] for state in inner.state.values() if torch.is_tensor(state.get("step"))]
    found = {
        "path": path,
        "clip": getattr(engine.optimizer, "clip_grad", None),
        "groups": [(g["lr"], g["weight_decay"], tuple(g["betas"])) for g in inner.param_groups],
        "shared": len({id(step) for step in steps}) < len(steps),
        "tensors": {n: {s: t.numpy() for s, t in v.items()} for n, v in truth(engine, case)["tensors"].items()},
        "buffers": {n: b.float().numpy() for n, b in engine.module.named_buffers() if n.endswith("tally")},
    }
    release(engine)
    return found


def first(folder: Path, case: Case, world: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(loaded, world, str(folder), case, timeout=60)[0]
    return found


def fresh_on_rank(case: Case) -> dict[str, Any]:
    engine = build(case)
    values = {n: p.detach().float().numpy() for n, p in engine.module.named_parameters()}
    release(engine)
    return values


@pytest.mark.parametrize("stage", [2, 3])
def test_native_loads_take_hyper_parameters_and_check_no_order(tmp_path: Path, stage: int) -> None:
    """The file's lr beats the config's, at stages 1 and 2 its clipping too; two tensors swapped go unnoticed."""
    case = Case("run", stage, layout="single")
    folder = write(tmp_path / "run", case)

    def change(states: dict[str, Any]) -> None:
        base = states["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
        base["param_groups"][0]["lr"] = 123.0
        if stage == 2:
            states["clip_grad"] = 77.0
        flat = states["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"][0]
        states["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"][0] = flat.flip(0)

    each_optim(folder, change)
    found = first(tmp_path / "run", case)
    assert found["groups"][0][0] == 123.0
    assert stage == 3 or found["clip"] == 77.0
    assert (found["tensors"][NAME]["fp32"] != make_tensors(spec_of(case))[NAME]["fp32"].numpy()).any()


def test_stages_1_and_2_take_a_group_that_is_too_short(tmp_path: Path) -> None:
    """The rest is silently filled with zeros."""
    case = Case("run", 2, layout="single")
    folder = write(tmp_path / "run", case)
    each_optim(folder, lambda states: states.update(
        single_partition_of_fp32_groups=[states["single_partition_of_fp32_groups"][0][:-32]]
    ))  # fmt: skip
    found = first(tmp_path / "run", case)
    last = list(found["tensors"])[-1]
    assert "error" not in found and not found["tensors"][last]["fp32"].reshape(-1)[-2:].any()


def test_universal_into_zero_3_writes_the_first_groups_hyper_parameters_into_all(tmp_path: Path) -> None:
    case = Case("run", 3, config=UNIVERSAL)
    folder = write(tmp_path / "run", case)
    assert [g[1] for g in first(tmp_path / "run", case)["groups"]] == [DECAY, 0.0]  # as this project writes it

    def whole(content: dict[str, Any]) -> None:  # as DeepSpeed's converter does
        group = content["optimizer_state_dict"]["param_groups"][0]
        group.update(lr=LR, weight_decay=DECAY, betas=BETAS)

    edit(folder / "zero" / "optimizer_state.pt", whole)
    found = first(tmp_path / "run", case)
    assert [g[1] for g in found["groups"]] == [DECAY, DECAY] and found["shared"]


def test_universal_into_zero_3_takes_tensors_of_a_wrong_size(tmp_path: Path) -> None:
    case = Case("run", 3, config=UNIVERSAL)
    folder = write(tmp_path / "run", case)
    torch.save({"param": torch.full((900,), 7.0), "cat_dim": 0}, folder / "zero" / NAME / "fp32.pt")  # it has 1024
    assert "error" not in first(tmp_path / "run", case)


@pytest.mark.parametrize("stage", [2, 3])
def test_universal_loads_restore_neither_frozen_parameters_nor_buffers(tmp_path: Path, stage: int) -> None:
    case = Case("run", stage, frozen=("layer.0.",), buffer=True, config=UNIVERSAL, seed=5)
    write(tmp_path / "run", case, buffers={"bert.tally": torch.full((3,), 9.0)})
    found, fresh = first(tmp_path / "run", case), run_ranks(fresh_on_rank, 1, replace(case, stage=2, config={}))[0]
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (found["tensors"][name]["fp32"] == fresh[name]).all()
    assert found["buffers"]["bert.tally"].tolist() == [5.0, 6.0, 7.0]  # the engine's own: arange + seed
    assert (found["tensors"][NAME]["fp32"] == make_tensors(spec_of(case))[NAME]["fp32"].numpy()).all()


def test_universal_into_zero_2_fails_where_a_rank_has_nothing_of_a_group(tmp_path: Path) -> None:
    frozen = ("dense.bias", "query.bias", "key.bias", "value.bias", "LayerNorm", "predictions.bias")
    case = Case("run", 2, frozen=frozen, config=UNIVERSAL)  # leaves two elements that do not decay
    write(tmp_path / "run", case)
    with pytest.raises(RuntimeError, match=r"rank 1 of load_on_rank failed[^$]*IndexError: list index out of range"):
        run_ranks(load_on_rank, 2, str(tmp_path / "run"), case, timeout=60)


def test_zero_1_with_fp32_accumulation_writes_files_that_deepspeeds_tool_refuses(tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    case = Case("run", 1, "bf16", steps=1, config={"data_types": {"grad_accum_dtype": "fp32"}})
    run_ranks(save_on_rank, 1, str(tmp_path), case)
    with pytest.raises(ValueError, match="is not a zero checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "run"))


def save_on_rank(folder: str, case: Case) -> dict[str, Any]:
    """Train and save; whether the moments of the last group can be had before and after linking again."""
    from deepspeed.utils import safe_get_full_optimizer_state

    engine = build(case)
    train(engine, case)
    engine.save_checkpoint(f"{folder}/{case.name}")
    found = {}
    if case.stage == 2:
        release(engine)
        engine = build(case)
        engine.load_checkpoint(f"{folder}/{case.name}")
        for when in ("before", "after"):
            if when == "after":
                engine.optimizer._hp_optimizer_states_linked = False
                engine.optimizer._lazy_init_hp_params_optimizer_state()
            parameter = dict(engine.module.named_parameters())[engine.group_names[-1][0]]
            try:
                found[when] = safe_get_full_optimizer_state(parameter, "exp_avg") is not None
            except (ValueError, TypeError) as error:
                found[when] = str(error)
    release(engine)
    return found


def test_moments_of_later_groups_are_not_linked_until_asked(tmp_path: Path) -> None:
    found = run_ranks(save_on_rank, 1, str(tmp_path), Case("run", 2, steps=1))[0]
    assert found["after"] is True and found["before"] is not True, found


def test_an_elastic_checkpoint_does_not_load(tmp_path: Path) -> None:
    case = Case("run", 1, steps=1, zero={"elastic_checkpoint": True})
    run_ranks(save_on_rank, 1, str(tmp_path), case)
    assert "error" in first(tmp_path / "run", case)


def test_another_world_size_does_not_load(tmp_path: Path) -> None:
    case = Case("run", 2)
    write(tmp_path / "run", case, world=2)
    assert "world size" in first(tmp_path / "run", case)["error"]


def test_a_missing_latest_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert first(tmp_path / "empty", Case("run", 2))["path"] is None


CONVERTED: dict[str, tuple[Case, type[BaseException] | None, str]] = {
    "stage 1": (Case("1", 1, steps=1, skip=(1,)), KeyError, "exp_avg"),
    "stage 2": (Case("2", 2, steps=1, skip=(1,)), KeyError, "exp_avg"),
    "stage 3": (Case("3", 3, steps=1, skip=(1,)), KeyError, "1"),
    "stage 2, saved before the first step": (Case("2new", 2, steps=0), None, ""),
    "stage 3, saved before the first step": (Case("3new", 3, steps=0), KeyError, "0"),
    "stage 0": (Case("0", 0, steps=1), FileNotFoundError, "optim_states"),
}


@pytest.fixture(scope="module")
def hardly_stepped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stepped")
    run_ranks(save_all_on_rank, 2, str(folder), [case for case, *_ in CONVERTED.values()], timeout=120)
    return folder


def save_all_on_rank(folder: str, cases: list[Case]) -> None:
    for case in cases:
        engine = build(case)
        train(engine, case)
        engine.save_checkpoint(f"{folder}/{case.name}")
        release(engine)


@pytest.mark.parametrize("what", CONVERTED)
def test_the_converter_takes_no_group_that_was_never_stepped(hardly_stepped: Path, tmp_path: Path, what: str) -> None:
    """Nor stage 0. From before the first step, stages 1 and 2 convert and stage 3 does not. This project reads all of
    them: step 0 where nothing was stepped, and zeros if other groups have moments."""
    case, error, message = CONVERTED[what]
    tag = next((hardly_stepped / case.name).glob("global_step*"))
    if error is None:
        convert(tag, tmp_path / "uni")
    else:
        with pytest.raises(error, match=message):
            convert(tag, tmp_path / "uni")
    source = open_source(hardly_stepped / case.name)
    for name, meta in source.tensors.items():
        stepped = case.steps and meta.group not in case.skip
        assert source.step(name) == (1 if stepped else 0)
        assert stepped or not any(source.read(name, state, 0, meta.shape[0]).any() for state in source.states[1:])


def test_latest_is_written_before_the_last_rank_has_finished() -> None:
    """In the order of the code: no test of files can hold a rank back reliably."""
    import inspect

    from deepspeed.runtime.engine import DeepSpeedEngine

    code = inspect.getsource(DeepSpeedEngine.save_checkpoint)
    assert code.index("'latest'") < code.rindex("dist.barrier()"), "the last barrier now comes first: look again"


def test_shared_modules_are_not_in_shared_params(tmp_path: Path) -> None:
    found = run_ranks(shared_on_rank, 1, str(tmp_path))[0]
    assert found == {"shared": [], "module": ["0.weight", "1.weight"]}


def shared_on_rank(folder: str) -> dict[str, Any]:
    import deepspeed

    layer = torch.nn.Linear(4, 4, bias=False)
    model = torch.nn.Sequential(layer, layer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    engine.save_checkpoint(folder, tag="t")
    states = torch.load(f"{folder}/t/mp_rank_00_model_states.pt", weights_only=False)  # a test's own file
    release(engine)
    return {"shared": list(states["shared_params"]), "module": list(states["module"])}


def through_the_writer(folder: str) -> tuple[str, str]:
    """What DeepSpeed's decoupled writer does with a ZeRO-2 shard on its way to its process, and with a file to load."""
    from deepspeed.runtime.checkpoint_engine.decoupled_checkpoint_engine import DecoupledCheckpointEngine

    engine = build(Case("run", 2, layout="single"))
    with pytest.raises(RuntimeError) as sent:
        ForkingPickler.dumps(engine.optimizer.state_dict())  # as its queue does
    engine.save_checkpoint(folder, tag="tag")
    file = next(Path(folder, "tag").glob("*optim_states.pt"))
    with pytest.raises(UnpicklingError) as read:
        DecoupledCheckpointEngine.load(None, str(file))
    release(engine)
    return str(sent.value), str(read.value)


def test_the_decoupled_writer_neither_sends_a_shard_nor_loads_one(tmp_path: Path) -> None:
    (found,) = run_ranks(through_the_writer, 1, str(tmp_path), timeout=60)
    assert "refusing to serialize non-leaf tensor" in found[0] and "Weights only load failed" in found[1]
