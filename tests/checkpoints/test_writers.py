"""Files as they are written: loadable by torch, transformers and the standard library, and streamed.

Files are opened with weights_only=False, for the tests themselves made them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints import job
from bert2bert.checkpoints.job import STATES, TargetGroup, TargetSpec, flat_values
from bert2bert.checkpoints.manifest import Grown
from bert2bert.errors import InvalidConfig
from bert2bert.files import torch_reader, torch_writer, zip_writer
from bert2bert.files.digest import digest, file_digest, hex16
from bert2bert.files.sink import Sink
from bert2bert.files.torch_writer import Blank, Foreign
from tests.checkpoints.targets import make_spec, make_tensors, reader
from tests.doors import write_checkpoint


def parts(tensor: torch.Tensor, size: int = 7) -> Iterator[torch.Tensor]:
    yield from tensor.reshape(-1).split(size)


def save(path: Path, tree: Any) -> int:
    with Sink(path) as file:
        found = torch_writer.save(file, tree)
    assert (file.size, file.digest()) == (path.stat().st_size, file_digest(path))
    return found


@pytest.mark.parametrize("wide", [False, True])
def test_a_streamed_file_is_what_torch_save_would_load_as(
    tmp_path: Path, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:  # the records of files over 2 GiB
        monkeypatch.setattr(zip_writer, "_ZIP64", 0)
    a, b = torch.randn(5, 9), torch.randn(33)
    blank = Blank((5, 9), torch.float32, partial(parts, a))
    tree = OrderedDict(
        a=blank, tied=blank, b=[Blank((33,), torch.bfloat16, partial(parts, b))],
        none=Blank((0,), torch.float16, tuple),
        step=torch.tensor(3.0), mask=torch.tensor([True, False]), size=torch.Size((2, 3)), n={1: (2, None)},
    )  # fmt: skip
    assert save(tmp_path / "f.pt", tree) == 5 * 9 * 4 + 33 * 2
    for options in [{"weights_only": w, "mmap": m} for w in (True, False) for m in (True, False)]:
        found = torch.load(tmp_path / "f.pt", **options)
        assert list(found) == list(tree) and found["tied"] is found["a"]
        assert torch.equal(found["a"], a) and torch.equal(found["b"][0], b.to(torch.bfloat16))
        assert found["none"].shape == (0,) and found["none"].dtype == torch.float16
        assert found["step"].shape == () and found["step"] == 3 and found["mask"].tolist() == [True, False]
        assert found["size"] == (2, 3) and found["n"] == {1: (2, None)}
        assert all(found[k].data_ptr() % 64 == 0 for k in ("a", "step"))
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        assert archive.testzip() is None  # the checksums are true


def test_foreign_objects_load_as_the_real_class_and_need_it_not_to_be_written(tmp_path: Path) -> None:
    state = {"numel": 3, "start": 5}
    save(tmp_path / "f.pt", [Foreign("deepspeed.utils.tensor_fragment", "fragment_address", state)] * 2)
    save(tmp_path / "g.pt", Foreign("nowhere.to.be.found", "Thing", {}))
    from deepspeed.utils.tensor_fragment import fragment_address

    assert torch.load(tmp_path / "f.pt", weights_only=False) == [fragment_address(3, 5)] * 2
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "g.pt", weights_only=False)


@pytest.mark.parametrize("count", [44, 46])
def test_a_stream_of_the_wrong_length_is_a_defect(tmp_path: Path, count: int) -> None:
    with pytest.raises(RuntimeError, match="4 bytes off"):
        save(tmp_path / "f.pt", Blank((45,), torch.float32, partial(parts, torch.zeros(count))))


DTYPES = {*torch.storage._dtype_to_storage_type_map(), *torch.storage._new_dtypes()}  # all that torch.save knows


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize(
    "dtype", [d for d in sorted(DTYPES, key=str) if not re.match(r"torch\.(q|bits)", str(d))], ids=str
)
def test_every_dtype_is_written_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    content = torch.randint(0, 2, (48,), dtype=torch.uint8).view(dtype).reshape(-1, 1)
    save(tmp_path / "f.pt", {"x": content, "scalar": content[0, 0]})
    for how in ({"mmap": True}, {"weights_only": False}):
        found = torch.load(tmp_path / "f.pt", **how)
        assert found["x"].dtype == found["scalar"].dtype == dtype and found["x"].shape == content.shape
        assert torch.equal(found["x"].view(torch.uint8), content.view(torch.uint8))
    torch.save({"x": content}, tmp_path / "g.pt")
    for file in "fg":
        mine = torch_reader.load(tmp_path / f"{file}.pt")["x"]
        assert mine.dtype == dtype and torch.equal(mine.view(torch.uint8), content.view(torch.uint8))


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def most_memory(folder: Path, rows: int) -> int:
    """The most that writing a tensor of so many rows of 4 kB takes, looked at each time that rows are asked for."""
    seen: list[int] = []

    def values(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        found = torch.full((stop - start, 1000), float(start))
        seen.append(anonymous_memory())
        return found

    write_checkpoint(folder / str(rows), tiny_spec({"w": (rows, 1000)}), values, format="hub", manifest_growth=None)
    assert len(seen) > 30
    return max(seen)


def test_memory_stays_flat_however_large_the_tensor(tmp_path: Path) -> None:
    """A tensor of 180 MB fills the blocks; one of 960 MB then takes no more. In a process with one arena, for how much
    an allocator keeps for each thread is its own affair."""
    code = "import sys, pathlib; from tests.checkpoints.test_writers import most_memory as m; "
    code += "p = pathlib.Path(sys.argv[1]); "
    code += "first = m(p, 45_000); print(m(p, 240_000) - first)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "MALLOC_ARENA_MAX": "1"}, text=True,
        capture_output=True, cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    assert int(done.stdout.split()[-1]) < 780e6 / 2  # of what it is larger by


def tiny_spec(shapes: dict[str, tuple[int, ...]], **over: Any) -> TargetSpec:
    given: dict[str, Any] = {
        "shapes": shapes,
        "aliases": {},
        "config": {},
        "groups": (TargetGroup("all", True, tuple(shapes), {"lr": 1e-3}, 1),),
        "group_layout": "single",
        "precision": "fp32",
        "states": STATES,
        "counters": {"global_steps": 1},
    }
    return TargetSpec(**{**given, **over})


def test_flat_values_asks_for_whole_rows_in_bounded_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BLOCK", 12)
    tensors = {"w": {"fp32": torch.randn(11, 5)}, "s": {"fp32": torch.randn(())}, "b": {"fp32": torch.randn(40)}}
    spec = tiny_spec({name: tuple(states["fp32"].shape) for name, states in tensors.items()})
    asked = []

    def values(name: str, state: str, start: int, stop: int) -> torch.Tensor:
        asked.append((name, start, stop))
        return reader(tensors)(name, state, start, stop)

    for name, states in tensors.items():
        flat = states["fp32"].reshape(-1)
        for start in range(flat.numel() + 1):
            for stop in range(start, flat.numel() + 1):
                found = list(flat_values(values, spec, name, "fp32", start, stop))
                assert torch.equal(torch.cat(found) if found else flat[:0], flat[start:stop])
    assert max((stop - start) * (5 if name == "w" else 1) for name, start, stop in asked) == 12


def test_values_of_a_wrong_shape_or_dtype_are_a_defect() -> None:
    spec = tiny_spec({"w": (4, 5)})
    for wrong in (torch.zeros(3, 5), torch.zeros(4, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="w fp32: got"):
            list(flat_values(lambda *_, wrong=wrong: wrong, spec, "w", "fp32", 0, 20))


def test_a_spec_that_contradicts_itself_is_a_defect() -> None:
    group = TargetGroup("all", True, ("a",), {}, 0)
    for over in ({"groups": (group, group)}, {"groups": ()}, {"precision": "fp8"}, {"states": ("fp32", "exp_avg")}):
        with pytest.raises(ValueError):
            tiny_spec({"a": (2,)}, **over)
    with pytest.raises(ValueError, match="aliases"):
        tiny_spec({"a": (2,)}, aliases={"b": "c"})


def test_client_state_may_not_replace_deepspeeds_entries(tmp_path: Path) -> None:
    spec = make_spec(client_state={"global_steps": 9})
    with pytest.raises(ValueError, match="global_steps"):
        write_checkpoint(tmp_path / "d", spec, reader(make_tensors(spec)), format="universal", manifest_growth=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"format": "zero"}, "needs --stage"),
        ({"format": "zero", "stage": 4, "world_size": 2}, "--stage is 4"),
        ({"format": "zero", "stage": 2}, "needs --stage"),
        ({"format": "zero", "stage": 2, "world_size": 0}, "--world-size is 0"),
        ({"format": "universal", "stage": 2}, "leave them out"),
        ({"format": "hubb"}, "did you mean 'hub'"),
    ],
)
def test_impossible_formats_are_refused_with_nothing_written(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    spec = make_spec()
    with pytest.raises(InvalidConfig, match=message):
        write_checkpoint(tmp_path / "d", spec, reader(make_tensors(spec)), manifest_growth=None, **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("limit", [10**9, 9_000])
def test_transformers_loads_the_hub_folder_silently(
    tmp_path: Path, precision: str, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BertForPreTraining

    spec = make_spec(precision, states=("fp32",), extra_files={"tokenizer.json": b"{}\n"})
    tensors = make_tensors(spec)
    folder = write_checkpoint(
        tmp_path / "hub", spec, reader(tensors), format="hub", manifest_growth={"operator": "x"}, shard_size=limit
    )
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (limit > 9_000) and (len(files) == 1 or len(files) > 3)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model, info = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert model.dtype == spec.dtype and (folder / "tokenizer.json").read_bytes() == b"{}\n"
    found = dict(model.named_parameters())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]["fp32"].to(spec.dtype)) for name in tensors)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    manifest = json.loads((folder / "bert2bert.json").read_text())
    for name, entry in manifest["tensors"].items():  # of the elements as stored
        assert entry["digest"] == {"fp32": hex16(digest(tensors[name]["fp32"].to(spec.dtype)))}


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    spec = make_spec(layout="layers")
    tensors = make_tensors(spec)
    growth = {"operator": "aki", "seed": 3}
    folder = write_checkpoint(
        tmp_path / "d", spec, reader(tensors), format="zero", stage=2, world_size=3, manifest_growth=growth
    )
    manifest = json.loads((folder / "bert2bert.json").read_text())
    assert folder == tmp_path / "d" / "global_step7" and (tmp_path / "d" / "latest").read_text() == "global_step7"
    head = {"kind": "growth", "tag": "global_step7", "format": "zero", "stage": 2, "world_size": 3, "precision": "fp32"}
    assert (
        head.items() <= manifest.items()
        and Grown.from_json(manifest["growth"]) == Grown.from_json(growth)
        and manifest["training"] is None
    )
    assert manifest["model"] == spec.config and manifest["aliases"] == spec.aliases
    assert [tuple(g["names"]) for g in manifest["groups"]] == [g.names for g in spec.groups]
    assert [g["step"] for g in manifest["groups"]] == [g.step for g in spec.groups]
    assert list(manifest["tensors"]) == list(spec.shapes)
    for name, entry in manifest["tensors"].items():
        assert entry["shape"] == list(spec.shapes[name])
        assert entry["digest"] == {state: hex16(digest(tensors[name][state])) for state in STATES}
    assert manifest["files"] == {
        p.relative_to(folder).as_posix(): p.stat().st_size
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "bert2bert.json"
    }
    assert json.loads((folder / "config.json").read_text()) == spec.config


def test_stage_three_files_hold_no_garbage(tmp_path: Path) -> None:
    """DeepSpeed leaves the padding of the last rank's slices uninitialised."""
    spec = tiny_spec({"a": (5,), "b": (3,)})
    tensors = {name: {state: torch.ones(shape) for state in STATES} for name, shape in spec.shapes.items()}
    folder = write_checkpoint(
        tmp_path / "d", spec, reader(tensors), format="zero", stage=3, world_size=4, manifest_growth=None
    )
    last = torch.load(folder / "zero_pp_rank_3_mp_rank_00_optim_states.pt", weights_only=False)
    assert last["optimizer_state_dict"]["fp32_flat_groups"][0].tolist() == [0, 0, 0]
    third = torch.load(folder / "zero_pp_rank_2_mp_rank_00_optim_states.pt", weights_only=False)
    assert third["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg"].tolist() == [1, 0, 1]


def test_param_groups_have_every_key_that_torch_adamw_has(tmp_path: Path) -> None:
    spec = make_spec()
    folder = write_checkpoint(
        tmp_path / "d", spec, reader(make_tensors(spec)), format="zero", stage=1, world_size=1, manifest_growth=None
    )
    saved = torch.load(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)["optimizer_state_dict"]
    groups = saved["base_optimizer_state"]["param_groups"]
    assert torch.optim.AdamW([torch.zeros(1)]).param_groups[0].keys() <= groups[0].keys()
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0] and "clip_grad" not in saved


def test_another_precision_drops_the_sources_loss_scale(tmp_path: Path) -> None:
    spec = replace(make_spec("bf16"), loss_scaler={"cur_scale": 4096.0, "dynamic": True})
    folder = write_checkpoint(
        tmp_path / "d", spec, reader(make_tensors(spec)), format="zero", stage=2, world_size=1, manifest_growth=None
    )
    saved = torch.load(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    assert saved["optimizer_state_dict"]["loss_scaler"].cur_scale == 1.0
    assert saved["optimizer_state_dict"]["dynamic_loss_scale"] is False
    module = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert {t.dtype for t in module.values()} == {torch.bfloat16}
    assert sum(math.prod(t.shape) for t in module.values()) > sum(math.prod(s) for s in spec.shapes.values())
