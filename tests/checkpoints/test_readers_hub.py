# ruff: noqa: RUF043
"""The Hugging Face reader against transformers' own files, single and sharded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bert2bert.checkpoints.open import open_source
from bert2bert.errors import InvalidCheckpoint
from tests.checkpoints.engines import tiny_bert
from tests.checkpoints.test_readers_zero import equal


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_bert("mlm")


@pytest.fixture(scope="module")
def folders(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    model.save_pretrained(root / "single")
    model.save_pretrained(root / "sharded", max_shard_size="20KB")
    return {"single": root / "single", "sharded": root / "sharded"}


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_equals_the_model(folders: dict[str, Path], model: torch.nn.Module, kind: str) -> None:
    source = open_source(folders[kind])
    assert len(list(folders[kind].glob("*.safetensors"))) > (kind == "sharded")
    assert (source.format, source.tag, source.states, source.precision) == ("hub", None, ("fp32",), "fp32")
    assert source.config is not None and source.config["hidden_size"] == 32
    want = dict(model.named_parameters())
    assert set(source.tensors) == set(want)
    for name, value in want.items():
        assert source.tensors[name].shape == value.shape and source.tensors[name].dtype == "float32"
        assert equal(source.read(name, "fp32", 0, len(value)), value.detach())
        assert equal(source.read(name, "fp32", 1, len(value) - 1), value.detach()[1:-1])
        assert source.step(name) == 0
    with pytest.raises(InvalidCheckpoint, match="holds no 'exp_avg' of 'cls.predictions.bias', only fp32"):
        source.read("cls.predictions.bias", "exp_avg", 0, 1)
    assert source.identity()["sha256"] == open_source(folders[kind]).identity()["sha256"]


def test_dtypes_scalars_and_integer_tensors(tmp_path: Path) -> None:
    tensors = {
        "w": torch.randn(4, 3).bfloat16(), "s": torch.tensor(2.5), "h": torch.randn(2).half(),
        "bert.embeddings.position_ids": torch.arange(5),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    source = open_source(tmp_path)
    assert {n: m.dtype for n, m in source.tensors.items()} == {"w": "bfloat16", "s": "float32", "h": "float16"}
    assert equal(source.read("w", "fp32", 1, 3), tensors["w"][1:3]) and equal(
        source.read("s", "fp32", 0, 1), tensors["s"]
    )
    assert list(source.buffers) == ["bert.embeddings.position_ids"] and source.config is None


def test_bad_folders_each_get_one_clear_message(folders: dict[str, Path], tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return shutil.copytree(folders["sharded"], tmp_path / name)

    index = "model.safetensors.index.json"
    lost = copy("lost")
    first = sorted(lost.glob("*.safetensors"))[0]
    first.unlink()
    cut = copy("cut")
    shard = cut / first.name
    shard.write_bytes(shard.read_bytes()[:-5])
    text = copy("text")
    (text / first.name).write_text("hello, I am not a checkpoint")
    liar = copy("liar")
    content = json.loads((liar / index).read_text())
    content["weight_map"]["ghost.weight"] = first.name
    (liar / index).write_text(json.dumps(content))
    unindexed = copy("unindexed")
    (unindexed / index).unlink()
    empty = copy("empty")
    (empty / index).write_text('{"metadata": {}, "weight_map": {}}')
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    integers = tmp_path / "integers"
    integers.mkdir()
    save_file({"x": torch.arange(3)}, integers / "model.safetensors")
    for folder, message in {
        lost: f"{first.name}: no such file, though {index} names it",
        cut: "not readable as safetensors",
        text: "not readable as safetensors",
        liar: f"says that {first.name} holds 'ghost.weight', which it does not",
        unindexed: f"safetensors files without {index}",
        empty: "has no 'weight_map'",
        pickled: r"its weights are pickled \(pytorch_model.bin\). Convert them",
        integers: "hold no floating-point tensor",
    }.items():
        with pytest.raises(InvalidCheckpoint, match=message):
            open_source(folder)
