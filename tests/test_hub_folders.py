"""Hugging Face folders, in and out: complete, silent to load, in the dtype of the source, in transformers' names."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import bert2bert
from bert2bert.checkpoints.hub.beside import TOKENIZER
from bert2bert.checkpoints.target import file_bytes
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, InvalidConfig
from bert2bert.growth.source_model import open_model
from tests import tiny
from tests.doors import grow, reshard
from tests.rounding import ROUNDING, SINGLE, allowed, gap
from tests.test_verify_families import GROWN, save, silent, target

FILES = [name.replace("*", "x") for name in TOKENIZER]


@pytest.fixture
def words() -> Iterator[list[str]]:
    """What transformers logs as a warning or worse."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def load(folder: Path, cls: str, words: list[str]) -> transformers.PreTrainedModel:
    """from_pretrained, which must have nothing to say."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert words == []
    return model.eval()


def logits(model: torch.nn.Module, config: dict[str, Any]) -> torch.Tensor:
    model.config._experts_implementation = "eager"  # others want strides of 16 bytes
    with torch.no_grad():
        return tiny.logits(model, config)


@pytest.mark.parametrize("name", GROWN)
@pytest.mark.parametrize("shard", [None, "3KB"])
def test_from_pretrained_has_nothing_to_say(name: str, shard: str | None, tmp_path: Path, words: list[str]) -> None:
    small = save(tmp_path / "small", name)
    goal = target(tmp_path / "big.json", name)
    grow(tmp_path / "small", tmp_path / "big", goal, format="hub", shard_size=shard, measure=False, say=silent)
    files = sorted(p.name for p in (tmp_path / "big").iterdir())
    assert ("model.safetensors.index.json" in files) == (shard is not None) == ("model.safetensors" not in files)
    words.clear()
    big = load(tmp_path / "big", tiny.VARIANTS[name].cls, words)
    assert big.dtype == torch.float32
    config = tiny.config_of(name)
    exact = tiny.load(big.config.to_dict(), {n: p.detach().double() for n, p in tiny.parameters(big, config).items()})
    limit = allowed(lambda: logits(exact, config), torch.float32, spare=128)
    assert gap(logits(big, config), logits(small, config), limit) <= ROUNDING
    # what transformers itself would have written: the same files' names, tensors, shapes
    big.save_pretrained(tmp_path / "theirs", max_shard_size=shard or "5GB")
    ours = {n: t.shape for f in (tmp_path / "big").glob("*.safetensors") for n, t in load_file(f).items()}
    theirs = {n: t.shape for f in (tmp_path / "theirs").glob("*.safetensors") for n, t in load_file(f).items()}
    assert ours == theirs
    assert {"config.json", "generation_config.json"} & {p.name for p in (tmp_path / "theirs").iterdir()} <= set(files)


@pytest.mark.parametrize("cls,name", [("BertModel", "bert"), ("GPT2Model", "gpt2"), ("LlamaModel", "llama")])
def test_base_models_have_no_outer_name(cls: str, name: str, tmp_path: Path, words: list[str]) -> None:
    config = tiny.config_of(name, architectures=[cls])
    model = getattr(transformers, cls)._from_config(transformers.AutoConfig.for_model(**config))
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "small")
    opened = open_model(tmp_path / "small")
    assert opened.naming.lacks and opened.table.names.classes[cls] == opened.heads
    goal = target(tmp_path / "big.json", name)
    grow(tmp_path / "small", tmp_path / "big", goal, format="hub", say=silent)
    words.clear()
    load(tmp_path / "big", cls, words)
    assert json.loads((tmp_path / "big" / "config.json").read_text())["architectures"] == [cls]
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and "no language-model head" in report.text()


def test_a_tied_head_is_known_by_the_class_or_the_outer_name(tmp_path: Path) -> None:
    save(tmp_path / "full", "gpt2")
    tensors, file = load_file(tmp_path / "full" / "model.safetensors"), tmp_path / "full" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"architectures": None}))
    assert open_model(tmp_path / "full").heads == {"lm"}
    # the first GPT-2's own files: no outer name, masks beside the parameters, and a copy of the tied tensor
    old = tmp_path / "old"
    old.mkdir()
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    short |= {"h.0.attn.bias": torch.ones(1, 1, 10, 10), "lm_head.weight": short["wte.weight"].clone()}
    save_file(short, old / "model.safetensors")
    (old / "config.json").write_text(json.dumps(config))
    assert open_model(old).heads == {"lm"} and open_model(old).naming.lacks
    (old / "config.json").write_text(json.dumps(config | {"architectures": None}))
    assert open_model(old).heads == {"lm"}  # by the copy
    save_file({n: t for n, t in short.items() if n != "lm_head.weight"}, old / "model.safetensors")
    assert open_model(old).heads == frozenset()
    # a head that is not a copy is a head of its own
    short["lm_head.weight"][2, 3] += 1
    save_file(short, old / "model.safetensors")
    untied = open_model(old)
    assert untied.heads == {"lm"} and untied.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in untied.parameters


@pytest.mark.parametrize(
    "cls,heads",
    [("T5ForConditionalGeneration", {"decoder", "lm"}), ("T5Model", {"decoder"}), (None, {"decoder", "lm"})],
)
def test_t5s_classes_have_the_same_tensors(cls: str | None, heads: set[str], tmp_path: Path) -> None:
    save(tmp_path, "t5")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": cls and [cls]}))
    assert open_model(tmp_path).heads == heads


def test_an_untied_t5(tmp_path: Path, words: list[str]) -> None:
    """T5 1.1: transformers' config says tied whatever the file says; a stored head of its own counts."""
    save(tmp_path / "small", "t5-untied")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.randn(29, 8)
    save_file(tensors, file, {"format": "pt"})
    sizes = {"d_model": 16, "num_heads": 4, "d_ff": 24}
    goal = tmp_path / "big.json"
    goal.write_text(json.dumps(tiny.config_of("t5-untied", **sizes)))
    grow(tmp_path / "small", tmp_path / "big", goal, format="hub", say=silent)
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and gap(report.drift.logits_relative, 0.0, SINGLE) <= ROUNDING, report.text()
    assert "of the largest entry" in report.text()
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "big")
    grown = load_file(tmp_path / "big" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, grown["lm_head.weight"])
    assert torch.equal(model.shared.weight, grown["shared.weight"])


@pytest.mark.parametrize("stored", ["equal", "none"])
def test_a_t5_whose_config_says_untied_and_whose_file_does_not(stored: str, tmp_path: Path, words: list[str]) -> None:
    """transformers ties a T5 until the file has another head, and takes the config's word for how the head reads."""
    small, run = tmp_path / "small", tmp_path / "run"
    save(small, "t5-gated")
    config = json.loads((small / "config.json").read_text())
    config.pop("scale_decoder_outputs")
    (small / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(small / "model.safetensors")
    if stored == "equal":  # a copy
        save_file(tensors | {"lm_head.weight": tensors["shared.weight"].clone()}, small / "model.safetensors")
    goal = tmp_path / "big.json"
    goal.write_text(json.dumps({**config, "tie_word_embeddings": False, "d_model": 16, "num_heads": 4, "d_ff": 24}))
    said: list[str] = []
    grow(small, tmp_path / "big", goal, format="hub", say=said.append)
    assert "initialises them randomly" not in "".join(said)
    report = verify(small, tmp_path / "big")
    assert report.ok and "of the largest entry" in report.text(), report.text()
    models = [transformers.T5ForConditionalGeneration.from_pretrained(f).double() for f in (small, tmp_path / "big")]
    assert all(m.lm_head.weight is m.shared.weight and not m.config.scale_decoder_outputs for m in models)
    one, other = (logits(m, config) for m in models)
    assert gap(other, one, SINGLE) <= ROUNDING
    reshard(small, run, say=silent)
    assert open_model(run).heads == {"decoder", "lm"} and open_model(run).config["tie_word_embeddings"]
    grow(run, tmp_path / "grown", goal, format="hub", measure=False, say=silent)
    big, grown = (load_file(tmp_path / folder / "model.safetensors") for folder in ("big", "grown"))
    assert grown.keys() == big.keys() and all(torch.equal(grown[name], big[name]) for name in big)


def test_an_untied_t5_saved_again_by_transformers(tmp_path: Path, words: list[str]) -> None:
    """Its config then says tied, and a target's made of that does: the file has the head."""
    save(tmp_path / "old", "t5-untied")
    file = tmp_path / "old" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.randn(29, 8)}, file, {"format": "pt"})
    transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "old").save_pretrained(tmp_path / "small")
    goal = transformers.T5Config.from_pretrained(tmp_path / "small", d_model=16, num_heads=4, d_ff=24)
    assert goal.tie_word_embeddings and not goal.scale_decoder_outputs
    goal.save_pretrained(tmp_path / "goal")
    grow(tmp_path / "small", tmp_path / "big", tmp_path / "goal", format="hub", say=silent)
    one, other = (
        transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / f).double() for f in ("small", "big")
    )
    assert other.lm_head.weight is not other.shared.weight
    assert gap(logits(other, goal.to_dict()), logits(one, goal.to_dict()), SINGLE) <= ROUNDING
    grown = bert2bert.grow(one, goal)
    assert grown.lm_head.weight is not grown.shared.weight


def test_what_lies_beside_the_weights_is_kept(tmp_path: Path) -> None:
    save(tmp_path / "small", "llama", torch.bfloat16)
    (tmp_path / "small" / "additional_chat_templates").mkdir()
    for name in FILES:
        (tmp_path / "small" / name).write_bytes(f"{name} of the source\n".encode())
    goal = target(tmp_path / "big.json", "llama")
    grow(tmp_path / "small", tmp_path / "big", goal, format="hub", measure=False, say=silent)
    for name in (*FILES, "generation_config.json"):
        assert (tmp_path / "big" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "torch_dtype" not in config
    assert {t.dtype for t in load_file(tmp_path / "big" / "model.safetensors").values()} == {torch.bfloat16}
    # without a generation config, one of the config's tokens; asked for, another dtype
    (tmp_path / "small" / "generation_config.json").unlink()
    grow(tmp_path / "small", tmp_path / "b", goal, format="hub", precision="fp32", measure=False, say=silent)
    made = transformers.GenerationConfig.from_pretrained(tmp_path / "b")
    asked = transformers.AutoConfig.for_model(**tiny.config_of("llama"))
    assert (made.bos_token_id, made.eos_token_id) == (asked.bos_token_id, asked.eos_token_id) != (None, None)
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float32}
    # an encoder does not generate
    save(tmp_path / "bert", "bert")
    (tmp_path / "bert" / "generation_config.json").write_text("{}")
    goal = target(tmp_path / "bert.json", "bert")
    grow(tmp_path / "bert", tmp_path / "bert-big", goal, format="hub", measure=False, say=silent)
    assert not (tmp_path / "bert-big" / "generation_config.json").exists()


def test_names_in_a_wrapper_become_transformers_own(tmp_path: Path, words: list[str]) -> None:
    save(tmp_path / "small", "gpt2")
    file = tmp_path / "small" / "model.safetensors"
    save_file({f"module.net.{name}": value for name, value in load_file(file).items()}, file)
    goal = target(tmp_path / "big.json", "gpt2")
    grow(tmp_path / "small", tmp_path / "big", goal, format="hub", say=silent)
    words.clear()
    load(tmp_path / "big", "GPT2LMHeadModel", words)
    assert verify(tmp_path / "small", tmp_path / "big").ok


def test_experts_that_are_not_all_there(tmp_path: Path) -> None:
    save(tmp_path, "mixtral")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    block = "model.layers.1.block_sparse_moe.experts"
    odd = {**tensors, f"{block}.2.w1.weight": torch.zeros(9, 12)}
    save_file(odd, file)
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\.mlp\.experts\.gate_up_proj: its experts have the shapes"):
        open_model(tmp_path)
    del tensors[f"{block}.3.w2.weight"]
    save_file(tensors, file)
    with pytest.raises(InvalidCheckpoint, match=r"layers\.1\.mlp\.experts\.down_proj: expert 3 of 5 is not all in"):
        open_model(tmp_path)


def test_sizes_of_files() -> None:
    assert [file_bytes(t) for t in ("5GB", "1.5 mb", "2KiB", "77")] == [5 * 10**9, 1_500_000, 2048, 77]
    for text in ("", "0", "GB", "5 TB", "-1"):
        with pytest.raises(InvalidConfig, match="a size such as 5GB"):
            file_bytes(text)


def test_shard_size_belongs_to_hugging_face_folders(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="--shard-size belongs to --format hub"):
        grow(tmp_path, tmp_path / "t", tmp_path / "c.json", shard_size="1GB", say=silent)
