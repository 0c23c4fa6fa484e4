# ruff: noqa: E501, RUF043 (a table of cases reads best one a line; its messages are patterns)
"""The native reader against live DeepSpeed engines, bit for bit, and every kind of bad input it must refuse."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.checkpoints.manifest import Manifest
from bert2bert.checkpoints.open import open_source, tags
from bert2bert.checkpoints.source import STATES, Source
from bert2bert.checkpoints.zero.layout import zero12_layout
from bert2bert.errors import InvalidCheckpoint
from tests.checkpoints.engines import Case, load_truth, save_cases
from tests.checkpoints.test_torchfile import Evil
from tests.rounding import ROUNDING, WRONG, elementary, gap

FROZEN = ("layer.0.", "LayerNorm.bias")
GRID = [Case(f"z{s}{p}", stage=s, precision=p) for s in (1, 2, 3) for p in ("fp32", "bf16", "fp16")]
SHORT = [replace(case, steps=2) for case in GRID]
BF16_OPTIMIZER = Case("bf16opt", 1, "bf16", config={"data_types": {"grad_accum_dtype": "fp32"}})
ALIGNED = [
    Case("aligned16", 2, "bf16", zero={"parameter_alignment": True}),
    Case("aligned32", 1, zero={"parameter_alignment": True}),
]
SUB_GROUPS = Case("subgroups", 3, zero={"sub_group_size": 1500}, layout="layers")
FREEZE = [
    Case("frozen1", 1, "bf16", frozen=FROZEN, buffer=True),
    Case("frozen2", 2, frozen=FROZEN, buffer=True),
    Case("frozen3", 3, "bf16", frozen=FROZEN, buffer=True),
]
SKIP = [Case("skip2", 2, skip=(1, 2), layout="layers"), Case("skip3", 3, skip=(2, 5), layout="layers")]
CLIENT = Case("client", 2, model="mlm", layout="single", client_state={"epoch": 3, "best": np.float64(0.5), "args": {"a": [1]}})  # fmt: skip
REFUSED = [
    Case("elastic", 1, steps=1, zero={"elastic_checkpoint": True}),
    Case("older2", 2, steps=2),
    Case("older3", 3, steps=2),
]
CPU = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD = [
    Case(f"offload{s}", s, p, zero=CPU, config={"zero_force_ds_cpu_optimizer": False}, layout="layers")
    for s, p in ((1, "fp32"), (2, "bf16"), (3, "fp32"))
]
ROBIN = [
    Case("robin1", 1, zero={"round_robin_gradients": True}),
    Case("robin2", 2, zero={"round_robin_gradients": True, "parameter_alignment": True}),
]
CASES = {
    1: [*SHORT, ALIGNED[0]],
    2: [*GRID, BF16_OPTIMIZER, *SKIP, FREEZE[0], CLIENT, *OFFLOAD, *ROBIN, *REFUSED],
    3: [*SHORT, *ALIGNED, SUB_GROUPS, *FREEZE[1:]],
}
READ = [(world, case) for world, cases in CASES.items() for case in cases if case not in REFUSED + ROBIN]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder with all cases of a world size, trained once."""
    folders: dict[int, Path] = {}

    def get(world: int) -> Path:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"world{world}")
            save_cases(folders[world], world, CASES[world], timeout=280)
        return folders[world]

    return get


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize(("world", "case"), READ, ids=[f"{c.name}-w{w}" for w, c in READ])
def test_everything_equals_the_live_engine(saved: Callable[[int], Path], world: int, case: Case) -> None:
    folder = saved(world)
    live = load_truth(folder, case)
    source = open_source(folder / case.name)
    assert (source.format, source.tag) == ("zero", f"global_step{case.steps}")
    assert (source.stage, source.world_size, source.precision) == (case.stage, world, case.precision)
    assert source.states == STATES and not source.other_states and not source.unread
    assert list(source.tensors) == list(live["tensors"])  # named_parameters() order, tied once
    rows = random.Random(0)
    for name, states in live["tensors"].items():
        meta = source.tensors[name]
        assert meta.shape == states["fp32"].shape and meta.trainable == (name in live["step"])
        assert source.step(name) == live["step"].get(name, 0)
        for state, want in states.items():
            assert equal(source.read(name, state, 0, len(want)), want), (name, state)
            start, stop = sorted((rows.randint(0, len(want)), rows.randint(0, len(want))))
            assert equal(source.read(name, state, start, stop), want[start:stop]), (name, state, start, stop)
        if not meta.trainable:
            assert not source.read(name, "exp_avg", 0, meta.shape[0]).any()
    for found, want in zip(source.groups, live["groups"], strict=True):
        assert {key: found[key] for key in want} == want
    assert all(source.tensors[n].group == i for i, g in enumerate(live["groups"]) for n in g["names"])
    assert source.counters == live["counters"] and source.lr_scheduler == live["lr_scheduler"]
    assert source.loss_scaler == live["loss_scaler"]
    assert source.buffers.keys() == live["buffers"].keys()
    assert all(equal(source.buffers[name], want) for name, want in live["buffers"].items())
    assert source.aliases == {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }


@pytest.mark.parametrize("case", ROBIN, ids=lambda case: case.name)
def test_round_robin_gradients_are_undone(saved: Callable[[int], Path], case: Case) -> None:
    """DeepSpeed's own functions mistake the order; a run without the option has the same values except for rounding."""
    folder = saved(2)
    live, source = load_truth(folder, GRID[0]), open_source(folder / case.name)
    assert source.states == STATES and list(source.tensors) == list(live["tensors"])
    wrong = load_truth(folder, case)["tensors"]
    # a key bias has a gradient of rounding alone: the measure is the largest entry of any tensor
    limits = {state: elementary(*(s[state] for s in live["tensors"].values() if state in s)) for state in STATES}
    for name, states in live["tensors"].items():
        for state, want in states.items():
            found = source.read(name, state, 0, len(want))
            assert gap(found, want, limits[state]) <= ROUNDING, (name, state)
    moments = {n: s["exp_avg"] for n, s in live["tensors"].items() if "exp_avg" in s}
    assert any(gap(wrong[n]["exp_avg"], m, limits["exp_avg"]) > WRONG for n, m in moments.items())
    assert [g["names"] for g in source.groups] == [g["names"] for g in live["groups"]]


@pytest.mark.parametrize("factor", [1, 4, 16])
def test_the_start_alignment_of_other_deepspeeds(tmp_path: Path, factor: int) -> None:
    """Files as DeepSpeed would write them with another nccl_start_alignment_factor."""
    shapes = {"a": (7, 3), "b": (5,), "c": (1,)}
    values = {n: {s: torch.rand(shape) for s in STATES} for n, shape in shapes.items()}
    layout = zero12_layout([21, 5, 1], 2, nccl_start_alignment=factor)
    flat = {s: torch.cat([v[s].flatten() for v in values.values()] + [torch.zeros(layout.padded - 27)]) for s in STATES}
    model = {
        "module": {n: v["fp32"] for n, v in values.items()}, "param_shapes": [{n: torch.Size(s) for n, s in shapes.items()}],
        "dp_world_size": 2, "ds_version": "0.19.8",
    }  # fmt: skip
    torch.save(model, tmp_path / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        at = rank * layout.partition
        cut = {s: t[at : at + layout.partition].clone() for s, t in flat.items()}
        base = {
            "state": {0: {"step": 3, "exp_avg": cut["exp_avg"], "exp_avg_sq": cut["exp_avg_sq"]}},
            "param_groups": [{"params": [0]}],
        }
        states = {
            "zero_stage": 2, "partition_count": [2], "base_optimizer_state": base, "group_paddings": [layout.paddings[rank]],
            "single_partition_of_fp32_groups": [cut["fp32"][: layout.partition - layout.paddings[rank]]],
        }  # fmt: skip
        torch.save({"optimizer_state_dict": states, "ds_version": "0.19.8"}, tmp_path / zero2(str(rank)))
    source = open_source(tmp_path)
    for name, states in values.items():
        assert all(equal(source.read(name, s, 0, len(t)), t) for s, t in states.items())


def test_client_state_and_scaler(saved: Callable[[int], Path]) -> None:
    source = open_source(saved(2) / "client")
    assert {**source.client_state, "best": None} == {"epoch": 3, "best": None, "args": {"a": [1]}}
    assert source.unopened() == []  # a number of numpy's, which everybody knows
    scaler = open_source(saved(2) / "z3fp16").loss_scaler
    assert scaler is not None and scaler["dynamic"] and scaler["cur_scale"] == 512.0 and scaler["cur_iter"] == 3
    json.dumps(scaler)


def test_reads_are_views_unless_a_border_cuts_the_rows(saved: Callable[[int], Path]) -> None:
    name = "bert.embeddings.word_embeddings.weight"  # 61 rows of 32
    for case in ("z1fp32", "z3fp32"):
        whole = open_source(saved(1) / case)
        assert whole.read(name, "exp_avg", 2, 9).data_ptr() == whole.read(name, "exp_avg", 0, 61)[2:].data_ptr()
    cut = open_source(saved(3) / "z3fp32")  # 651 elements a rank: borders in rows 20 and 40
    assert cut.read(name, "fp32", 21, 40).data_ptr() == cut.read(name, "fp32", 21, 30).data_ptr()
    assert cut.read(name, "fp32", 20, 21).data_ptr() != cut.read(name, "fp32", 20, 21).data_ptr()


def test_tied_names_unknown_names_states_and_rows(saved: Callable[[int], Path]) -> None:
    source = open_source(saved(2) / "z2fp32")
    tied = source.read("cls.predictions.decoder.weight", "fp32", 0, 4)
    assert equal(tied, source.read("bert.embeddings.word_embeddings.weight", "fp32", 0, 4))
    with pytest.raises(InvalidCheckpoint, match=r"no tensor 'bert.pooler.dense.wieght'.*did you mean 'bert.pooler.dense.weight'"):  # fmt: skip
        source.read("bert.pooler.dense.wieght", "fp32", 0, 1)
    with pytest.raises(IndexError, match=r"rows \[0, 62\)"):
        source.read("cls.predictions.decoder.weight", "fp32", 0, 62)
    with pytest.raises(ValueError, match="unknown state"):
        source.read("cls.predictions.decoder.weight", "momentum", 0, 1)


def test_a_tag_its_folder_and_latest_lead_to_the_same(saved: Callable[[int], Path], tmp_path: Path) -> None:
    run = shutil.copytree(saved(2) / "z2fp32", tmp_path / "run")
    by = [open_source(run), open_source(run, "global_step3"), open_source(run / "global_step3")]
    assert {s.identity()["sha256"] for s in by} == {open_source(saved(2) / "z2fp32").identity()["sha256"]}
    assert open_source(saved(2) / "z2bf16").identity()["sha256"] != by[0].identity()["sha256"]
    (run / "latest").unlink()
    assert tags(run) == ["global_step3"]
    with pytest.raises(InvalidCheckpoint, match="no file 'latest' says which tag.*Tags there: global_step3"):
        open_source(run)
    with pytest.raises(InvalidCheckpoint, match="no checkpoint with tag 'global_step9'. Tags there: global_step3"):
        open_source(run, "global_step9")
    (run / "config.json").write_text('{"model_type": "bert"}')
    assert open_source(run, "global_step3").config == {"model_type": "bert"}


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(path, weights_only=False)  # a test's own file
    change(content)
    torch.save(content, path)


@pytest.mark.parametrize("stage", [2, 3])
def test_steps_of_other_optimizers(saved: Callable[[int], Path], tmp_path: Path, stage: int) -> None:
    """Plain integers (DeepSpeed's Adams), in the group (older ones), and states that are not Adam's."""
    tag = shutil.copytree(saved(2) / f"z{stage}fp32" / "global_step3", tmp_path / "tag")

    def change(to: Callable[[dict[str, Any], dict[str, Any]], None]) -> Source:
        def inner(content: Any) -> None:
            base = content["optimizer_state_dict"]
            base = base["optimizer_state_dict"] if stage == 3 else base["base_optimizer_state"]
            for index, state in base["state"].items():
                to(state, base["param_groups"][index])

        for file in tag.glob("*optim_states.pt"):
            edit(file, inner)
        return open_source(tag)

    name = "bert.pooler.dense.weight"
    assert change(lambda state, group: state.update(step=7)).step(name) == 7
    assert change(lambda state, group: group.update(step=state.pop("step") + 1)).step(name) == 8
    other = change(lambda state, group: state.update(momentum_buffer=state.pop("exp_avg_sq")))
    assert other.states == ("fp32",) and other.other_states == ("exp_avg", "momentum_buffer")
    with pytest.raises(InvalidCheckpoint, match="holds no 'exp_avg' of 'bert.pooler.dense.weight', only fp32"):
        other.read(name, "exp_avg", 0, 1)


# --- what must be refused ------------------------------------------------------------------------------------------


def zero2(name: str) -> str:
    return f"zero_pp_rank_{name}_mp_rank_00_optim_states.pt"


def zero3(name: str) -> str:
    return f"zero_pp_rank_{name}_mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("elastic", "saved with zero_optimization.elastic_checkpoint"),
    ],
)
def test_checkpoints_of_refused_kinds(saved: Callable[[int], Path], case: str, message: str) -> None:
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(saved(2) / case)


FILES: dict[str, tuple[str, list[tuple[Any, ...]], str]] = {
    # what was done: (case, steps on its tag folder, message)
    "rank-lost": ("z2fp32", [("rm", zero2("1"))], "1 optimizer file, but it was saved by 2 ranks: missing: rank 1"),
    "first-rank-lost": ("z2fp32", [("rm", zero2("0"))], "optimizer files of ranks 0 are missing"),
    "all-shards-lost": ("z2bf16", [("rm", "bf16_" + zero2("0")), ("rm", "bf16_" + zero2("1"))], "no .*optim_states.pt beside .* shards of all 2 ranks are missing"),
    "model-states-lost": ("z2fp32", [("rm", "mp_rank_00_model_states.pt")], "no .*model_states.pt"),
    "model-states-3-lost": ("z3fp32", [("rm", zero3("1"))], "1 model-states file, but it was saved by 2 ranks"),
    "truncated": ("z2fp32", [("cut", zero2("1"))], r"zero_pp_rank_1_mp_rank_00_optim_states.pt: truncated"),
    "text": ("z3fp32", [("text", zero2("0"))], r"zero_pp_rank_0_mp_rank_00_optim_states.pt: not a torch file"),
    "foreign": ("z2fp32", [("tensor", zero2("0"))], "no ZeRO optimizer file"),
    "foreign-model": ("z2fp32", [("tensor", "mp_rank_00_model_states.pt")], "no DeepSpeed model-states file"),
    "other-step-2": ("z2fp32", [("from", 2, "older2/global_step2", zero2("1"))], "mixed: .*(lr|step).* in zero_pp_rank_0.* in zero_pp_rank_1"),
    "other-step-3": ("z3fp32", [("from", 2, "older3/global_step2", zero2("1"))], "mixed: .*(lr|step).*"),
    "other-model-3": ("z3fp32", [("from", 2, "older3/global_step2", zero3("1"))], "mixed: global_steps is 3 in zero_pp_rank_0.* and 2 in zero_pp_rank_1"),
    "other-model-2": ("z2fp32", [("from", 2, "older2/global_step2", "mp_rank_00_model_states.pt")], "mixed: the weights of '.*' in mp_rank_00.* are not the master weights in zero_pp_rank_0"),
    "other-world": ("z2fp32", [("from", 3, "z2fp32/global_step2", zero2("1"))], "a shard of a run of 3 ranks, mp_rank_00_model_states.pt is of a run of 2"),
    "other-world-3": ("z3fp32", [("from", 3, "z3fp32/global_step2", zero2("1"))], "a shard of a run of 3 ranks"),
    "extra-rank": ("z2fp32", [("from", 3, "z2fp32/global_step2", zero2("2"))], "3 optimizer files, but it was saved by 2 ranks: too many"),
    "other-stage": ("z2fp32", [("from", 2, "z1fp32/global_step3", zero2("1"))], "mixed: ZeRO stage is 2 .* and 1 in"),
    "other-stage-3": ("z2fp32", [("from", 2, "z3fp32/global_step3", zero2("0")), ("from", 2, "z3fp32/global_step3", zero2("1"))], "optimizer files of ZeRO stage 3 beside mp_rank_00_model_states.pt"),
    "both-stages": ("z2fp32", [("from", 2, "z3fp32/global_step3", zero3("0"))], "ZeRO-3 and other shards are mixed"),
    "both-precisions": ("z2fp32", [("from", 2, "z2bf16/global_step3", "bf16_" + zero2("0"))], "bf16 and other shards are mixed"),
    "other-groups": ("z2fp32", [("from", 2, "client/global_step3", zero2("1"))], "number of optimizer groups is 2 in .* and 1 in"),
    "tensor-parallel": ("z2fp32", [("as", "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt")], "mp_rank_01_model_states.pt is a file of a tensor or pipeline parallel run"),
    "tensor-parallel-3": ("z3fp32", [("as", zero3("0"), "zero_pp_rank_0_mp_rank_01_model_states.pt")], "zero_pp_rank_0_mp_rank_01.* tensor or pipeline parallel"),
    "pipeline": ("z2fp32", [("as", "mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt")], "layer_00-model_00-model_states.pt is a file of a tensor or pipeline"),
    "experts": ("z2fp32", [("as", "mp_rank_00_model_states.pt", "layer_0_expert_0_mp_rank_00_model_states.pt")], "its entry 'module' is not a tensor of an expert"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_bad_files_each_get_one_clear_message(saved: Callable[[int], Path], tmp_path: Path, kind: str) -> None:
    case, steps, message = FILES[kind]
    run = shutil.copytree(saved(2) / case, tmp_path / "run")
    tag = run / "global_step3"
    open_source(run)
    for step in steps:
        match step:
            case ("rm", name):
                (tag / name).unlink()
            case ("cut", name):
                content = (tag / name).read_bytes()
                (tag / name).write_bytes(content[: len(content) * 2 // 3])
            case ("text", name):
                (tag / name).write_text("not a checkpoint\n")
            case ("tensor", name):
                torch.save({"weight": torch.zeros(3)}, tag / name)
            case ("from", world, place, name):
                shutil.copy(saved(world) / place / name, tag / name)
            case ("as", name, other):
                shutil.copy(tag / name, tag / other)
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(run)


CONTENT: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "version": ("optim", lambda c: c.update(ds_version="0.12.1"), "written by DeepSpeed 0.12.1, mp_rank_00"),
    "short-master": ("optim", lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(5)), "flat group 0 holds 5 elements of fp32, the parameters .* need 9[0-9]+ on each of 2 ranks"),
    "short-moment": ("optim", lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"][1].update(exp_avg=torch.zeros(3)), "flat group 1 holds 3 elements of exp_avg"),
    "lost-group": ("optim", lambda c: c["optimizer_state_dict"]["single_partition_of_fp32_groups"].pop(), "number of flat groups is 2 in .* and 1 in"),
    "swapped-order": ("model", lambda c: c.update(param_shapes=[dict(reversed(g.items())) for g in c["param_shapes"]]), "lies at .* files of different checkpoints are mixed"),
    "more-groups": ("model", lambda c: c["param_shapes"].append({"x": torch.Size([2])}), "own the flat groups .0, 1., but the model-states file describes 3"),
    "split-model": ("model", lambda c: c.update(mp_world_size=2), "of a model split 2 ways by tensor or pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONTENT)
def test_contradicting_content_is_refused(saved: Callable[[int], Path], tmp_path: Path, kind: str) -> None:
    which, change, message = CONTENT[kind]
    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")
    edit(tag / (zero2("1") if which == "optim" else "mp_rank_00_model_states.pt"), change)
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tag)


def test_code_hidden_in_a_shard_is_refused_and_does_not_run(saved: Callable[[int], Path], tmp_path: Path) -> None:
    import os

    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")
    marker = tmp_path / "it_ran"
    edit(tag / zero2("1"), lambda c: c["optimizer_state_dict"].update(loss_scaler=Evil(os.system, f"touch {marker}")))
    with pytest.raises(InvalidCheckpoint, match=r"rank_1_mp_rank_00_optim_states.pt: refused, it names 'posix.system'"):
        open_source(tag)
    assert not marker.exists()


def test_places_without_a_checkpoint(saved: Callable[[int], Path], tmp_path: Path) -> None:
    run = shutil.copytree(saved(2) / "z2fp32", tmp_path / "run")
    (run / "latest").write_text("global_step99")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.partial").mkdir()
    for path, message in {
        run: "latest: names the tag 'global_step99', which is missing. Tags there: global_step3",
        tmp_path / "absent": "no checkpoint there, the folder does not exist",
        tmp_path / "empty": "no checkpoint there. Expected a DeepSpeed run folder",
        run / "latest": "a file; give the folder",
        tmp_path / "x.partial": "output of an unfinished run",
    }.items():
        with pytest.raises(InvalidCheckpoint, match=message) as caught:
            open_source(path)
        assert str(path) in str(caught.value)


def test_the_manifest_finds_lost_truncated_and_exchanged_files(saved: Callable[[int], Path], tmp_path: Path) -> None:
    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")
    plain = open_source(tag)
    manifest = {
        "format_version": 1, "format": "zero", "stage": 2, "world_size": 2, "precision": "fp32",
        "model": {"model_type": "bert"}, "aliases": {"extra.tied": "cls.predictions.bias"},
        "files": {p.name: p.stat().st_size for p in tag.iterdir()},
        "tensors": {n: {"shape": list(m.shape)} for n, m in reversed(plain.tensors.items())},
    }  # fmt: skip

    def attempt(**change: Any) -> Source:
        (tag / "bert2bert.json").write_text(json.dumps({**manifest, **change}))
        return open_source(tag)

    source = attempt()
    assert source.config == {"model_type": "bert"} and source.manifest == Manifest.from_json(manifest)
    assert source.aliases == {**plain.aliases, "extra.tied": "cls.predictions.bias"}
    assert list(source.tensors) == list(reversed(plain.tensors))
    for change, message in [
        ({"format_version": 9}, "format version 9, this program reads 1"),
        ({"stage": 3}, "the files have stage 2, the manifest says 3"),
        ({"files": {**manifest["files"], "gone.pt": 7}}, "gone.pt: missing, the manifest says 7 bytes"),
        ({"tensors": {**manifest["tensors"], "x": {"shape": [1]}}}, "tensor 'x' has shape none .absent. in the files"),
    ]:
        with pytest.raises(InvalidCheckpoint, match=message):
            attempt(**change)
    (tag / "bert2bert.json").write_text("{")
    with pytest.raises(InvalidCheckpoint, match="bert2bert.json: not readable as JSON"):
        open_source(tag)
    attempt()
    file = tag / zero2("0")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{file}: {file.stat().st_size:,} bytes long, the manifest")):
        open_source(tag)


def test_names_that_share_memory_are_tied_though_the_file_does_not_say_so(tmp_path: Path) -> None:
    """Shared module objects: DeepSpeed leaves their copies out of shared_params (stages 1 and 2)."""
    weight, frozen = torch.randn(4, 3), torch.randn(2)
    state = {"step": 5, "exp_avg": torch.randn(12), "exp_avg_sq": torch.rand(12)}
    torch.save(
        {
            "module": {"a.weight": weight, "b.weight": weight, "c.bias": frozen, "d.bias": frozen.clone()},
            "param_shapes": [{"a.weight": weight.shape}],
            "dp_world_size": 1, "ds_version": "0.19.8",
        },
        tmp_path / "mp_rank_00_model_states.pt",
    )  # fmt: skip
    group = {"params": [0], "lr": torch.tensor(0.25)}
    states = {
        "zero_stage": 2, "partition_count": [1], "single_partition_of_fp32_groups": [weight.flatten()],
        "base_optimizer_state": {"state": {0: state}, "param_groups": [group]},
    }  # fmt: skip
    torch.save({"optimizer_state_dict": states, "ds_version": "0.19.8"}, tmp_path / zero2("0"))
    source = open_source(tmp_path)
    assert source.aliases == {"b.weight": "a.weight"}
    assert {n: m.trainable for n, m in source.tensors.items()} == {"a.weight": True, "c.bias": False, "d.bias": False}
    assert equal(source.read("b.weight", "exp_avg", 1, 3), state["exp_avg"].view(4, 3)[1:3])
    assert source.groups == [{"lr": 0.25, "names": ["a.weight"]}] and source.step("b.weight") == 5


@pytest.mark.parametrize(("ds_config", "precision"), [
    ({"bf16": {"enabled": True}}, "bf16"), ({"bf16": {"enabled": "true"}}, "bf16"), ({"fp16": {"enabled": 1}}, "fp16"),
    ({"bf16": {"enabled": False}, "fp16": {}}, "fp32"), ({"zero_optimization": {"stage": 3}}, "fp32"), ({}, "fp32"),
])  # fmt: skip
def test_the_runs_precision_is_what_its_ds_config_says(
    saved: Callable[[int], Path], tmp_path: Path, ds_config: dict[str, Any], precision: str
) -> None:
    """Not what the first tensor of its state dict has, which may be any: a buffer's, an extra state's."""
    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")

    def change(content: Any) -> None:
        content["ds_config"] = ds_config
        content["module"] = {"odd": torch.ones(2, dtype=torch.float16), **content["module"]}
        content["buffer_names"].append("odd")

    edit(tag / "mp_rank_00_model_states.pt", change)
    assert open_source(tag).precision == precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_without_a_ds_config_it_is_that_of_the_trained_weights(
    saved: Callable[[int], Path], tmp_path: Path, dtype: str
) -> None:
    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")

    def change(content: Any) -> None:
        del content["ds_config"]
        content["module"] = {name: value.to(getattr(torch, dtype)) for name, value in content["module"].items()}

    edit(tag / "mp_rank_00_model_states.pt", change)
    assert open_source(tag).precision == {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]


def test_the_name_of_the_files_counts_as_well(saved: Callable[[int], Path], tmp_path: Path) -> None:
    tag = shutil.copytree(saved(2) / "z2fp32" / "global_step3", tmp_path / "tag")
    for file in list(tag.glob("zero_pp*")):
        file.rename(file.with_name(f"bf16_{file.name}"))
    assert open_source(tag).precision == "bf16"
