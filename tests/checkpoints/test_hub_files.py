"""Which files of a Hugging Face folder are its model, as transformers decides it, and what is not a plain model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.open import open_source
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint
from bert2bert.growth.source_model import open_model, read_config
from tests import tiny
from tests.checkpoints.engines import hf_model
from tests.doors import grow, reshard

INDEX = "model.safetensors.index.json"


def silent(_: str) -> None: ...


def save(folder: Path, name: str = "bert", seed: int = 0, **how: Any) -> transformers.PreTrainedModel:
    model = hf_model(tiny.config_of(name), seed)
    model.save_pretrained(folder, **how)
    return model


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """By transformers, from the class that the config names."""
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    return dict(cls.from_pretrained(folder).named_parameters())


def same_as_transformers(folder: Path) -> None:
    source, theirs = open_source(folder), loaded(folder)
    assert set(source.tensors) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(source.read(name, "fp32", 0, value.shape[0]), value), name


# ------------------------------------------------------------------------------------------ which file is the model


def test_two_sets_of_weights_that_differ_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "run", max_shard_size="3KB")
    save(tmp_path / "new", seed=1)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "run")
    with pytest.raises(InvalidCheckpoint, match=rf"model\.safetensors and the files of {INDEX} hold different weights"):
        open_source(tmp_path / "run")
    # what transformers would load is left when the other is removed
    (tmp_path / "run" / INDEX).unlink()
    same_as_transformers(tmp_path / "run")


@pytest.mark.parametrize("change", ["fewer", "more", "dtype", "shape"])
def test_sets_of_other_tensors_differ(change: str, tmp_path: Path) -> None:
    save(tmp_path / "run", max_shard_size="3KB")
    save(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    name = "bert.pooler.dense.bias"
    if change == "fewer":
        del tensors[name]
    else:
        tensors |= {
            "more": {"x": torch.zeros(1)}, "dtype": {name: tensors[name].double()},
            "shape": {name: tensors[name][None]},
        }[change]  # fmt: skip
    save_file(tensors, tmp_path / "run" / "model.safetensors")
    with pytest.raises(InvalidCheckpoint, match="hold different weights"):
        open_source(tmp_path / "run")


def test_what_lies_beside_the_model_and_is_none(tmp_path: Path) -> None:
    """An index of the same weights, or of files that are gone; pickled weights; another precision; a subfolder's."""
    save(tmp_path / "run", max_shard_size="3KB")
    save(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / "run")
    same_as_transformers(tmp_path / "run")
    assert "hold the same weights" in open_source(tmp_path / "run").notes[0]
    for shard in (tmp_path / "run").glob("model-*"):
        shard.unlink()
    same_as_transformers(tmp_path / "run")
    assert "which is not there; model.safetensors is read" in open_source(tmp_path / "run").notes[0]
    (tmp_path / "run" / INDEX).unlink()
    (tmp_path / "run" / "pytorch_model.bin").write_bytes(b"old")
    save_file({"x": torch.zeros(1)}, tmp_path / "run" / "consolidated.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "run" / "model.fp16.safetensors")
    same_as_transformers(tmp_path / "run")
    assert not open_source(tmp_path / "run").notes


def test_the_file_that_the_config_names(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.safetensors"}))
    same_as_transformers(tmp_path)
    # a folder made of it has a file of another name
    before = loaded(tmp_path)
    reshard(tmp_path, tmp_path / "again", format="hub", say=silent)
    assert loaded(tmp_path / "again").keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded(tmp_path / "again").items())
    assert verify(tmp_path, tmp_path / "again").ok
    (tmp_path / "other.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"other\.safetensors: no such file, though config\.json names it"):
        open_source(tmp_path)


def test_pickled_weights_come_before_files_of_other_names(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "old.safetensors")
    same = open_source(tmp_path)  # it is the only one
    torch.save({name: value + 1 for name, value in load_file(same.files[0]).items()}, tmp_path / "pytorch_model.bin")
    assert not torch.equal(loaded(tmp_path)["cls.predictions.bias"], same.read("cls.predictions.bias", "fp32", 0, 29))
    with pytest.raises(
        InvalidCheckpoint, match=r"loads pytorch_model\.bin, and not old\.safetensors.* name it model\."
    ):
        open_source(tmp_path)


def cached(home: Path, **how: Any) -> Path:
    """A folder of the hub's cache as the client lays it out: snapshots of links to blobs."""
    save(home / "plain", **how)
    repo = home / "models--org--name"
    for folder in ("blobs", "refs", "snapshots/abc123"):
        (repo / folder).mkdir(parents=True)
    for i, file in enumerate(sorted((home / "plain").iterdir())):
        shutil.move(file, repo / "blobs" / str(i))
        (repo / "snapshots" / "abc123" / file.name).symlink_to(Path("../../blobs") / str(i))
    (repo / "refs" / "main").write_text("abc123")
    return repo


@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_the_hubs_cache(shard: str, tmp_path: Path) -> None:
    repo = cached(tmp_path, max_shard_size=shard)
    snapshot = repo / "snapshots" / "abc123"
    same_as_transformers(snapshot)
    assert open_source(repo).folder == snapshot
    assert read_config(repo) == read_config(snapshot) == open_source(repo).config
    # a model in a subfolder of a snapshot, whose links lead further up
    (snapshot / "encoder").mkdir()
    for file in list(snapshot.iterdir()):
        if file.is_symlink():
            (snapshot / "encoder" / file.name).symlink_to(Path("..") / ".." / ".." / "blobs" / file.readlink().name)
    same_as_transformers(snapshot / "encoder")
    # without a name of the main branch, the only snapshot; of several, the choice is the user's
    (repo / "refs" / "main").unlink()
    assert open_source(repo).folder == snapshot
    (repo / "snapshots" / "def456").mkdir()
    with pytest.raises(InvalidCheckpoint, match=r"cache with 2 snapshots\. Give one of them: \S+abc123, \S+def456"):
        open_source(repo)


def test_links_to_large_files_elsewhere(tmp_path: Path) -> None:
    save(tmp_path / "disk", max_shard_size="3KB")
    (tmp_path / "here").mkdir()
    for file in (tmp_path / "disk").iterdir():
        (tmp_path / "here" / file.name).symlink_to(file)
    same_as_transformers(tmp_path / "here")


@pytest.mark.parametrize("lost", ["model.safetensors", "config.json", "vocab.txt", INDEX, "last shard"])
def test_links_to_nothing(lost: str, tmp_path: Path) -> None:
    """A download that did not finish leaves links to files that are not there."""
    how = {"max_shard_size": "3KB"} if lost in (INDEX, "last shard") else {}
    repo = cached(tmp_path, **how)
    snapshot = repo / "snapshots" / "abc123"
    (repo / "blobs" / "vocab").write_text("[PAD]\n")
    (snapshot / "vocab.txt").symlink_to("../../blobs/vocab")
    (tmp_path / "big.json").write_text((snapshot / "config.json").read_text())
    file = sorted(snapshot.glob("*.safetensors"))[-1] if lost == "last shard" else snapshot / lost
    file.resolve().rename(repo / "blobs" / "x.incomplete")
    with pytest.raises(InvalidCheckpoint, match=rf"{file.name}: a link to \.\./\.\./blobs/\w+, which is not there"):
        grow(repo, tmp_path / "g", tmp_path / "big.json", format="hub", measure=False, say=silent)
    assert not (tmp_path / "g").exists()


# ------------------------------------------------------------------------------------------------- no plain model


def bitsandbytes(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    return t | {name: torch.zeros(32, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(1)}


QUANTISED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "fp8": (lambda t: {n: v.to(torch.float8_e4m3fn) for n, v in t.items()}, {}, "is F8_E4M3"),
    "int8": (lambda t: {n: v.to(torch.int8) if n.endswith("query.weight") else v for n, v in t.items()}, {}, "is I8"),
    "gptq": (lambda t: t | {"bert.x.qweight": torch.zeros(2, 2, dtype=torch.int32)}, {}, "qweight is of a packed"),
    "bitsandbytes": (bitsandbytes, {}, "absmax is of a packed weight.* is U8"),
    "fp8-scales": (lambda t: t | {"bert.x.weight_scale_inv": torch.ones(1)}, {}, "weight_scale_inv is of a packed"),
    "quanto": (lambda t: t | {"bert.x.weight._data": torch.zeros(2, 2, dtype=torch.int8)}, {}, "_data is of a packed"),
    "torchao": (lambda t: t | {"bert.x._weight_qdata": torch.zeros(2, dtype=torch.int8)}, {}, "_weight_qdata is of"),
    "aqlm": (
        lambda t: t | {"bert.x.codebooks": torch.ones(1, 4), "bert.x.codes": torch.zeros(3).char()},
        {},
        "codebooks is of a packed weight",
    ),
    "vptq": (
        lambda t: t | {"bert.x.centroids.weight": torch.ones(1), "bert.x.indices": torch.zeros(3).int()},
        {},
        "centroids.weight is of a packed",
    ),
    "mxfp4": (lambda t: t | {"bert.x.up_proj_blocks": torch.zeros(2, dtype=torch.uint8)}, {}, "up_proj_blocks is of"),
    "exl2": (lambda t: t | {"bert.x.q_weight": torch.zeros(2, 2, dtype=torch.int32)}, {}, "q_weight is of a packed"),
    "exl3": (lambda t: t | {"bert.x.trellis": torch.zeros(1, 1, 2, dtype=torch.int16)}, {}, "trellis is of a packed"),
    "sparse": (lambda t: t | {"bert.x.bitmask": torch.zeros(2, 2, dtype=torch.uint8)}, {}, "bitmask is of a packed"),
    "one-bit": (lambda t: {n: v > 0 if n.endswith("query.weight") else v for n, v in t.items()}, {}, "is BOOL"),
    "experts": (
        lambda t: t | {"m.mlp.experts.down_proj": torch.ones(2, 2, 2, dtype=torch.int8)},
        {},
        "down_proj is I8",
    ),
    "config": (dict, {"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantization_config \(awq\)"),
    "modelopt": (dict, {"quantization_config": {"quant_algo": "FP8"}}, r"quantization_config \(FP8\)"),
    "mlx": (dict, {"quantization": {"group_size": 64, "bits": 4}}, r"quantization \(4\)"),
    "unnamed": (dict, {"compression_config": {"sparsity": 0.5}}, r"compression_config \(sparsity\)"),
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_weights_are_refused_by_name(scheme: str, tmp_path: Path) -> None:
    change, config, message = QUANTISED[scheme]
    save(tmp_path / "s")
    file = tmp_path / "s" / "model.safetensors"
    save_file(change(load_file(file)), file)
    stored = json.loads((tmp_path / "s" / "config.json").read_text())
    (tmp_path / "s" / "config.json").write_text(json.dumps(stored | config))
    for command in (open_source, inspect, lambda p: reshard(p, tmp_path / "t", format="hub", say=silent)):
        with pytest.raises(InvalidCheckpoint, match=f"its weights are quantised: .*{message}"):
            command(tmp_path / "s")
    assert not (tmp_path / "t").exists()


def test_what_stands_in_place_of_a_missing_weight_is_named(tmp_path: Path) -> None:
    """A scheme that nothing here knows by its names (Marlin's `B` and `s`)."""
    save(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    tensors, module = load_file(file), "model.layers.0.self_attn.q_proj"
    del tensors[f"{module}.weight"]
    tensors |= {f"{module}.B": torch.zeros(2, 2, dtype=torch.int32), f"{module}.s": torch.ones(1, 2)}
    save_file(tensors, file)
    message = rf"{module}\.weight is missing, [^\n]+\nIn its place is {module}\.B \(int32\): .* quantised"
    with pytest.raises(InvalidCheckpoint, match=message):
        open_model(tmp_path)


def test_a_quantisation_that_is_none(tmp_path: Path) -> None:
    save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": None}))
    same_as_transformers(tmp_path)
    # an empty one stops transformers; a folder made of it is as without
    theirs = loaded(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": {}}))
    with pytest.raises(ValueError, match="quant_method"):
        loaded(tmp_path)
    grow(tmp_path, tmp_path / "g", tmp_path, format="hub", measure=False, say=silent)
    reshard(tmp_path, tmp_path / "r", format="hub", say=silent)
    for made in ("g", "r"):
        assert all(torch.equal(value, theirs[name]) for name, value in loaded(tmp_path / made).items())
    assert verify(tmp_path, tmp_path / "g").ok
    # bitsandbytes with both of its kinds off: transformers goes on without it; 8 bits are told by the tensors
    off = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False, "llm_int8_threshold": 6.0}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": off}))
    same_as_transformers(tmp_path)
    grow(tmp_path, tmp_path / "off", tmp_path, format="hub", measure=False, say=silent)
    assert "quantization_config" not in json.loads((tmp_path / "off" / "config.json").read_text())
    on = off | {"load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(stored | {"quantization_config": on}))
    with pytest.raises(InvalidCheckpoint, match="quantised"):
        open_source(tmp_path)


def test_shards_in_a_folder_of_their_own(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="3KB")
    (tmp_path / "weights").mkdir()
    for shard in sorted(tmp_path.glob("*.safetensors")):
        shard.rename(tmp_path / "weights" / shard.name)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
    (tmp_path / INDEX).write_text(json.dumps(index))
    same_as_transformers(tmp_path)


@pytest.mark.parametrize("shard", ["3KB", "1GB"])
def test_variants_are_not_the_model(shard: str, tmp_path: Path) -> None:
    model = save(tmp_path / "both")
    for variant in ("fp16", "bf16"):
        model.save_pretrained(tmp_path / "both", variant=variant, max_shard_size=shard)
        model.save_pretrained(tmp_path / "alone", variant=variant, max_shard_size=shard)
    same_as_transformers(tmp_path / "both")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        loaded(tmp_path / "alone")
    with pytest.raises(InvalidCheckpoint) as refused:
        open_source(tmp_path / "alone")
    if shard == "3KB":
        assert "a variant alone (model.safetensors.index.bf16.json)" in str(refused.value)
        assert 'from_pretrained(..., variant="bf16")' in str(refused.value)
    else:
        assert "2 safetensors files, none of them model.safetensors (model.bf16.safetensors, " in str(refused.value)


@pytest.mark.parametrize("beside", [None, "base", "pickled"])
def test_an_adapter_is_no_model(beside: str | None, tmp_path: Path) -> None:
    if beside == "base":
        save(tmp_path)
    if beside == "pickled":
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InvalidCheckpoint, match=r"holds an adapter .*merge_and_unload"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "kind,merged", [("IA3", True), ("ADALORA", True), ("PROMPT_TUNING", False), ("P_TUNING", False)]
)
def test_an_adapter_that_cannot_be_merged_leads_to_its_base(kind: str, merged: bool, tmp_path: Path) -> None:
    """PeftModel has merge_and_unload for tuners that change weights; prompts and prefixes change none."""
    save_file({"prompt_embeddings": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": "small"}))
    with pytest.raises(InvalidCheckpoint, match=kind) as refused:
        open_source(tmp_path)
    assert ("merge_and_unload" in str(refused.value)) == merged
    assert ("Grow its base model (small)" in str(refused.value)) != merged


def test_tensors_without_elements(tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)
    with pytest.raises(InvalidCheckpoint, match=r"tensors are empty .* ZeRO-3 without gathering"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4404\n", "git lfs pull"),
        ("model.safetensors", b"<!DOCTYPE html><html>", "a web page"),
        ("model.safetensors", b"", "empty, 0 bytes"),
        ("model.safetensors", b"PK\x03\x04" + bytes(600), "a zip archive"),
        ("model-q4.gguf", b"GGUF", r"in llama.cpp's format \(model-q4.gguf\)"),
        ("tf_model.h5", b"\x89HDF\r\n\x1a\n", r"of TensorFlow \(tf_model.h5\)"),
        ("flax_model.msgpack", b"x", r"of Flax \(flax_model.msgpack\)"),
        ("bert_model.ckpt.index", b"x", None),
        ("pytorch_model-00001-of-00002.bin", b"x", "are pickled"),
        ("__0_0.distcp", b"x", r"of torch\.distributed \(__0_0\.distcp\), as FSDP saves it"),
        ("pytorch_model_fsdp_0/__0_0.distcp", b"x", r"of torch\.distributed \(__0_0\.distcp\), as FSDP saves it"),
        (INDEX, b'{"weight_map": {"x": "model-1.safetensors"}}', "model-1.safetensors: no such file.* Copy all shards"),
    ],
)
def test_other_files_in_the_place_of_weights(name: str, content: bytes, message: str | None, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidCheckpoint, match=message or "no checkpoint there"):
        open_source(tmp_path)


def test_a_config_that_is_a_pointer(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(InvalidCheckpoint, match=r"config\.json: not readable as JSON: it is a git-lfs pointer"):
        open_source(tmp_path)


# ---------------------------------------------------------------------------------------------- precision by tensor


def half(folder: Path, name: str, wide: str, low: torch.dtype) -> dict[str, torch.Tensor]:
    """A folder in a 16-bit dtype, in which some tensors stay in float32, as transformers itself keeps T5's ``wo``."""
    save(folder, name)
    file = folder / "model.safetensors"
    tensors = {n: v if wide in n else v.to(low) for n, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    declare(folder, str(low).removeprefix("torch."))
    return tensors


def declare(folder: Path, dtype: str | None, key: str = "dtype") -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | ({key: dtype} if dtype else {})))


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name,wide,key", [("t5", ".wo.", "num_layers"), ("llama", "norm", "num_hidden_layers"),
                                           ("qwen3_moe", "gate.weight", "num_hidden_layers")])  # fmt: skip
def test_each_tensor_keeps_its_precision(name: str, wide: str, key: str, low: torch.dtype, tmp_path: Path) -> None:
    tensors = half(tmp_path / "s", name, wide, low)
    assert {v.dtype for v in tensors.values()} == {low, torch.float32}
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    deep = {key: config[key] + 1}
    if config.get("layer_types"):
        deep["layer_types"] = [*config["layer_types"], config["layer_types"][-1]]
    (tmp_path / "c.json").write_text(json.dumps(config | deep))
    lines: list[str] = []
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "c.json", depth="stack", format="hub", measure=False,
         say=lines.append)  # fmt: skip
    grown = load_file(tmp_path / "g" / "model.safetensors")
    assert all(value.dtype == (torch.float32 if wide in n else low) for n, value in grown.items())
    for n, value in tensors.items():  # stacked: the old layers are bit for bit those of the source
        assert torch.equal(value, grown[n]), n
    assert not any("rounded" in line for line in lines)
    assert json.loads((tmp_path / "g" / "config.json").read_text())["dtype"] == str(low).removeprefix("torch.")
    reshard(tmp_path / "s", tmp_path / "r", format="hub", shard_size="2KB", say=silent)
    again = {n: v for f in (tmp_path / "r").glob("*.safetensors") for n, v in load_file(f).items()}
    assert again.keys() == tensors.keys() and all(torch.equal(again[n], v) and again[n].dtype == v.dtype
                                                  for n, v in tensors.items())  # fmt: skip


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "declared,key", [("float32", "dtype"), ("float32", "torch_dtype"), (None, "dtype"), ("low", "dtype")]
)
def test_a_folder_is_loaded_in_the_dtype_of_its_source(
    declared: str | None, key: str, low: torch.dtype, tmp_path: Path
) -> None:
    """from_pretrained goes by the config, whose word keeps wide tensors among narrow ones from being rounded."""
    half(tmp_path / "s", "llama", "norm", low)
    declare(tmp_path / "s", str(low).removeprefix("torch.") if declared == "low" else declared, key)
    reshard(tmp_path / "s", tmp_path / "r", format="hub", say=silent)
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "s", format="hub", measure=False, say=silent)
    file = load_file(tmp_path / "s" / "model.safetensors")
    theirs = loaded(tmp_path / "s") if declared else {name: value.float() for name, value in file.items()}
    for made in ("r", "g"):
        ours = loaded(tmp_path / made)
        assert ours.keys() == theirs.keys()
        assert all(ours[n].dtype == v.dtype and torch.equal(ours[n], v) for n, v in theirs.items())


@pytest.mark.parametrize("narrow", [".experts.0.", ".w1."])
def test_experts_of_several_precisions_are_rounded_to_none(narrow: str, tmp_path: Path) -> None:
    """transformers fuses them into one tensor, in the dtype that the config says."""
    save(tmp_path / "s", "mixtral")
    file = tmp_path / "s" / "model.safetensors"
    save_file({n: v.bfloat16() if narrow in n else v for n, v in load_file(file).items()}, file, {"format": "pt"})
    theirs = loaded(tmp_path / "s")
    reshard(tmp_path / "s", tmp_path / "r", format="hub", say=silent)
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "s", format="hub", measure=False, say=silent)
    for made in ("r", "g"):
        assert all(torch.equal(value, theirs[name]) for name, value in loaded(tmp_path / made).items())


def test_what_is_rounded_is_reported(tmp_path: Path) -> None:
    tensors = half(tmp_path / "s", "llama", "norm", torch.bfloat16)
    lines: list[str] = []
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "s", format="hub", precision="bf16", measure=False,
         say=lines.append)  # fmt: skip
    wide = sum("norm" in name for name in tensors)
    assert f"rounded to bfloat16: {wide} tensors that are wider in the source" in "\n".join(lines)
    lines.clear()
    reshard(tmp_path / "s", tmp_path / "r", format="hub", precision="bf16", say=lines.append)
    assert f"rounded to bfloat16: {wide} tensors" in "\n".join(lines)
    # float64 is held by no checkpoint that is written
    save_file({n: v.double() for n, v in tensors.items()}, tmp_path / "s" / "model.safetensors")
    lines.clear()
    grow(tmp_path / "s", tmp_path / "d", tmp_path / "s", format="hub", measure=False, say=lines.append)
    assert f"rounded to float32: {len(tensors)} tensors" in "\n".join(lines)


# ----------------------------------------------------------------------------------------------- what lies beside


def test_a_folder_with_its_own_code_written_again_still_loads(tmp_path: Path) -> None:
    save(tmp_path / "s", "llama")
    (tmp_path / "s" / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "s" / "config.json").write_text(json.dumps(config | own))
    kept = ("README.md", "words.tiktoken", "1_Pooling/config.json")
    for name in (*kept, "logs/events.out.tfevents.1", "onnx/model.onnx"):
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_text(f"{name} of the source")
    lines: list[str] = []
    reshard(tmp_path / "s", tmp_path / "r", format="hub", say=lines.append)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "r", trust_remote_code=True)).__name__ == "OwnConfig"
    for name in (*kept, "configuration_own.py"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "s" / name).read_bytes()
    assert f"left behind in {tmp_path / 's'}: logs/, onnx/" in "\n".join(lines)
    assert verify(tmp_path / "s", tmp_path / "r").ok


def test_a_growth_names_what_it_leaves_behind(tmp_path: Path) -> None:
    save(tmp_path / "s", "llama")
    for name in ("README.md", "tokenizer.json", "modeling_own.py", "preprocessor_config.json"):
        (tmp_path / "s" / name).write_text("{}")
    lines: list[str] = []
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "s", format="hub", measure=False, say=lines.append)
    assert (tmp_path / "g" / "tokenizer.json").read_text() == "{}"
    assert "README.md, modeling_own.py, preprocessor_config.json" in "\n".join(lines)
    (tmp_path / "s" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(InvalidCheckpoint, match=r"tokenizer\.json: a git-lfs pointer"):
        grow(tmp_path / "s", tmp_path / "h", tmp_path / "s", format="hub", measure=False, say=silent)


@pytest.mark.parametrize("form", ["universal", "zero"])
def test_what_a_run_does_not_get_of_a_folder_is_reported(form: str, tmp_path: Path) -> None:
    model = save(tmp_path / "s", "t5")
    save_file({n: v.clone() for n, v in model.state_dict().items()}, tmp_path / "s" / "model.safetensors")
    copies = sorted(model.state_dict().keys() - dict(model.named_parameters()).keys())
    assert copies == ["decoder.embed_tokens.weight", "encoder.embed_tokens.weight", "lm_head.weight"]
    save_file({"ema": torch.ones(1)}, tmp_path / "s" / "ema.safetensors")
    how: dict[str, Any] = {"format": form, "stage": 2, "world_size": 1} if form == "zero" else {"format": form}
    lines: list[str] = []
    reshard(tmp_path / "s", tmp_path / "r", **how, say=lines.append)
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "s" / "config.json", **how, measure=False, say=lines.append)
    printed = "\n".join(lines)
    for name in copies:
        assert printed.count(f"{name} = shared.weight") == 2
    assert printed.count(f"left behind in {tmp_path / 's'}: ema.safetensors") == 2
    for target in ("r", "g"):
        report = verify(tmp_path / "s", tmp_path / target, logits=False)
        (counted,) = [check for check in report.checks if check.name == "tensors"]
        assert report.ok and all(name in counted.detail for name in copies)


def test_names_of_packed_weights_in_a_model_of_floats(tmp_path: Path) -> None:
    """A parameter W_q or codebooks is not a quantised weight where its layer has floating-point numbers alone."""
    names = ("attn.W_q", "vq.codebooks", "vq.centroids.weight", "gate.bitmask")
    tensors = {name: torch.rand(2, 3) for name in names} | {"step": torch.tensor(1)}
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "own"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reshard(folder, tmp_path / "t", format="hub", say=lambda _: None)
    found = load_file(tmp_path / "t" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(found[name].equal(tensors[name]) for name in tensors)
