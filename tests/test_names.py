"""Names as files have them: every family's oldest and newest layout on the hub, wrappers anywhere, ties by either name.

The truth is what transformers makes of the same folder, bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils.prune import l1_unstructured

from bert2bert.checkpoints.hub.names import WRAPPERS
from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.inspect_text import render
from bert2bert.checkpoints.job import TargetGroup
from bert2bert.checkpoints.open import open_source
from bert2bert.commands.plan import source_notes
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth
from bert2bert.growth.source_model import open_model, read_config
from tests import tiny
from tests.checkpoints.engines import hf_model
from tests.checkpoints.targets import make_spec, reader
from tests.doors import grow, reshard, write_checkpoint

Tensors = dict[str, torch.Tensor]
FAMILIES = ("bert", "roberta", "gpt2", "llama", "mistral", "qwen2", "qwen3", "t5", "modernbert", "mixtral", "qwen3_moe",
            "qwen2_moe")  # fmt: skip


def silent(_: str) -> None: ...


def old_bert(t: Tensors) -> Tensors:
    """bert-base-uncased: norms in the words of TensorFlow, positions, a copy of the tied decoder."""
    t = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
         for n, v in t.items()}  # fmt: skip
    copy = {"cls.predictions.decoder.weight": t["bert.embeddings.word_embeddings.weight"].clone()}
    return t | copy | {"bert.embeddings.position_ids": torch.arange(10)[None]}


def old_roberta(t: Tensors) -> Tensors:
    copies = {"lm_head.decoder.weight": t["roberta.embeddings.word_embeddings.weight"].clone(),
              "lm_head.decoder.bias": t["lm_head.bias"].clone()}  # fmt: skip
    return t | copies | {"roberta.embeddings.position_ids": torch.arange(12)[None]}


def old_gpt2(t: Tensors) -> Tensors:
    """gpt2: of the base model alone, with masks as bytes and as floats."""
    t = {n.removeprefix("transformer."): v for n, v in t.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 10, 10).to(torch.uint8 if i else torch.float32) for i in range(3)}
    return t | masks | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}


def old_llama(t: Tensors) -> Tensors:
    return t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(3)}


def old_t5(t: Tensors) -> Tensors:
    """t5-small: a relative bias in the cross-attention, the tied embedding under all its names."""
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return t | {name: t["shared.weight"].clone() for name in names} | {bias: torch.randn(6, 2)}


OLD: dict[str, Callable[[Tensors], Tensors]] = {
    "bert": old_bert, "roberta": old_roberta, "gpt2": old_gpt2, "t5": old_t5,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "qwen2_moe"), old_llama),
}  # fmt: skip


def save(folder: Path, name: str, change: Callable[[Tensors], Tensors] = dict, **config: Any) -> Any:
    """A variant's folder with other tensors in its file; transformers' own model of the unchanged one."""
    model = hf_model(tiny.config_of(name, **config))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return model


def loaded(folder: Path, cls: str) -> Tensors:
    """What transformers makes of a folder, which must leave it nothing to ask for."""
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return dict(model.named_parameters())


def read(folder: Path, config: Path | None = None) -> Tensors:
    """Every parameter of a folder as this project reads it, by transformers' names."""
    model = open_model(folder, config)
    return {n: model.read(n, "fp32", 0, p.shape[0]) for n, p in model.parameters.items()}


def same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def deeper(folder: Path, file: Path) -> Path:
    """The folder's config with one layer more."""
    config = json.loads((folder / "config.json").read_text())
    key = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config)
    if config.get("layer_types"):
        config["layer_types"] = [*config["layer_types"], config["layer_types"][-1]]
    file.write_text(json.dumps(config | {key: config[key] + 1}))
    return file


@pytest.mark.parametrize("name,age", [*((name, "newest") for name in FAMILIES), *((name, "oldest") for name in OLD)])
def test_layouts_of_the_hub_read_as_transformers_reads_them(name: str, age: str, tmp_path: Path) -> None:
    save(tmp_path / "s", name, OLD[name] if age == "oldest" else dict)
    cls = tiny.VARIANTS[name].cls
    same(read(tmp_path / "s"), loaded(tmp_path / "s", cls))
    # grown by a layer, and written again into shards, the names are those of transformers
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "g.json"), depth="stack", format="hub",
         measure=False, say=silent)  # fmt: skip
    grown = loaded(tmp_path / "g", cls)
    lines: list[str] = []
    reshard(tmp_path / "s", tmp_path / "z", format="zero", stage=2, world_size=2, say=lines.append)
    assert set(open_source(tmp_path / "z").tensors) == set(loaded(tmp_path / "s", cls))
    assert verify(tmp_path / "s", tmp_path / "z").ok and verify(tmp_path / "s", tmp_path / "g", logits=False).ok
    assert len(grown) > len(open_model(tmp_path / "s").parameters)
    # what no model has is left with a word
    model = open_model(tmp_path / "s")
    assert not open_source(tmp_path / "z").buffers
    for left in model.left[:3]:
        assert any(left in line for line in source_notes(model)) and any(left in line for line in lines), left


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("place", ["front", "layers", "inside", "base"])
def test_wrappers_anywhere_in_a_name(wrapper: str, place: str, tmp_path: Path) -> None:
    at = {
        "front": lambda n: f"{wrapper}.{n}",
        "layers": lambda n: n.replace(".layers.", f".layers.{wrapper}.") if wrapper == "module" else
        ".".join(p if not p.isdigit() else f"{p}.{wrapper}" for p in n.split(".")),
        "inside": lambda n: n.replace(".self_attn.", f".self_attn.{wrapper}._orig_mod."),
        "base": lambda n: n.replace("model.", f"model.{wrapper}.", 1),
    }[place]  # fmt: skip
    model = save(tmp_path / "s", "llama", lambda t: {at(n): v for n, v in t.items()})
    want = dict(model.named_parameters())
    same(read(tmp_path / "s"), want)
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "g.json"), depth="stack", format="hub",
         measure=False, say=silent)  # fmt: skip
    grown = loaded(tmp_path / "g", "LlamaForCausalLM")
    assert all(torch.equal(value, grown[name]) for name, value in want.items() if "norm.weight" not in name)


def test_new_layers_are_wrapped_as_the_old_ones(tmp_path: Path) -> None:
    """A run's own names stay: those of a grown model's new layers, too."""
    checkpointed = {"model.layers.2": "model.layers.2._checkpoint_wrapped_module"}

    def wrap(t: Tensors) -> Tensors:
        return {"net." + next((n.replace(a, b) for a, b in checkpointed.items() if n.startswith(a)), n): v
                for n, v in t.items()}  # fmt: skip

    save(tmp_path / "s", "llama", wrap)
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "g.json"), depth="stack", measure=False,
         say=silent)  # fmt: skip
    names = open_source(tmp_path / "g").tensors
    assert "net.model.layers.0.mlp.up_proj.weight" in names and "net.lm_head.weight" in names
    assert "net.model.layers.2._checkpoint_wrapped_module.mlp.up_proj.weight" in names
    assert "net.model.layers.3._checkpoint_wrapped_module.mlp.up_proj.weight" in names


def test_merged_adapters_are_read_and_others_lead_to_merging(tmp_path: Path) -> None:
    model = save(tmp_path / "merged", "llama", lambda t: {f"base_model.model.{n}": v for n, v in t.items()})
    same(read(tmp_path / "merged"), dict(model.named_parameters()))

    def lora(t: Tensors) -> Tensors:
        t = {f"base_model.model.{n}": v for n, v in t.items()}
        key = "base_model.model.model.layers.0.self_attn.q_proj."
        t[key + "base_layer.weight"] = t.pop(key + "weight")
        return t | {
            key + "lora_A.default.weight": torch.zeros(2, 12),
            key + "lora_B.default.weight": torch.zeros(24, 2),
        }

    def ia3(t: Tensors) -> Tensors:
        return {f"base_model.model.{n}": v for n, v in t.items()} | {
            "base_model.model.model.layers.0.self_attn.k_proj.ia3_l.default": torch.ones(24, 1)
        }

    for name, change in (("lora", lora), ("ia3", ia3)):
        save(tmp_path / name, "llama", change)
        with pytest.raises(InvalidCheckpoint, match=r"merge_and_unload\(\) and\s+save_pretrained"):
            open_model(tmp_path / name)
    key = "model.layers.0.self_attn.q_proj.lora_right_weight"  # of DeepSpeed-Chat, which has no such method
    save(tmp_path / "chat", "llama", lambda t: t | {key: torch.zeros(12, 2)})
    with pytest.raises(InvalidCheckpoint, match=rf"{key} is of a LoRA layer of DeepSpeed's that is not merged"):
        open_model(tmp_path / "chat")


@pytest.mark.parametrize("how", [
    parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm, spectral_norm,
    partial(l1_unstructured, name="weight", amount=0.5),
])  # fmt: skip
def test_weights_that_a_module_computes_are_named_as_such(how: Callable[..., Any], tmp_path: Path) -> None:
    """By torch's own names of what a weight is computed of."""
    key = "model.layers.1.mlp.up_proj."

    def computed(t: Tensors) -> Tensors:
        weight = t.pop(key + "weight")
        module = torch.nn.Linear(*weight.shape[::-1], bias=False)
        how(module)
        return t | {key + name: value.contiguous() for name, value in module.state_dict().items()}

    save(tmp_path / "s", "llama", computed)
    with pytest.raises(InvalidCheckpoint, match=rf"{key}weight is missing[\s\S]*computes it of others, first {key}"):
        open_model(tmp_path / "s")


@pytest.mark.parametrize(
    "name,kept,held",
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("llama-tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
        ("t5", "shared.weight", "encoder.embed_tokens.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ],
)
def test_a_tied_tensor_under_its_other_name(name: str, kept: str, held: str, tmp_path: Path) -> None:
    """Which name of a shared tensor a file holds is chance."""
    save(tmp_path / "s", name, lambda t: {held if n == kept else n: v for n, v in t.items()})
    same(read(tmp_path / "s"), loaded(tmp_path / "s", tiny.VARIANTS[name].cls))


def test_an_encoder_of_a_whole_t5(tmp_path: Path) -> None:
    """transformers' encoder class leaves a decoder unread; so does a growth, and says it."""
    save(tmp_path / "s", "t5", architectures=["T5EncoderModel"])
    save(tmp_path / "whole", "t5")
    (tmp_path / "s" / "model.safetensors").write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    theirs = loaded(tmp_path / "s", "T5EncoderModel")
    same(read(tmp_path / "s"), theirs)
    left = open_model(tmp_path / "s").left
    assert left and all(name.startswith("decoder.") for name in left)


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    def twice(t: Tensors) -> Tensors:
        name = "bert.encoder.layer.1.output.LayerNorm."
        return t | {name + "gamma": t[name + "weight"] + 1}

    save(tmp_path / "s", "bert", twice)
    with pytest.raises(InvalidCheckpoint, match=r"LayerNorm\.\w+ and \S+LayerNorm\.\w+ are both bert\.encoder"):
        open_model(tmp_path / "s")


def test_unknown_integers_are_refused_and_not_lost(tmp_path: Path) -> None:
    save(tmp_path / "s", "llama", lambda t: t | {"model.layers.0.mlp.table": torch.arange(5)})
    with pytest.raises(
        InvalidCheckpoint, match=r"1 tensors are not part of a llama.* first model\.layers\.0\.mlp\.tab"
    ):
        open_model(tmp_path / "s")
    # written again as a folder, all is kept bit for bit
    reshard(tmp_path / "s", tmp_path / "again", format="hub", say=silent)
    one, other = (load_file(tmp_path / d / "model.safetensors") for d in ("s", "again"))
    same(one, other)
    assert verify(tmp_path / "s", tmp_path / "again").ok


def test_a_config_from_before_model_type(tmp_path: Path) -> None:
    """The message tells what the tensors look like, whichever config lacks the key."""
    save(tmp_path / "s", "roberta")
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    del config["model_type"]
    file.write_text(json.dumps(config))
    with pytest.raises(InvalidConfig, match=r"no 'model_type'.* those of roberta\.\nAdd a line such as \"model_type\""):
        open_model(tmp_path / "s")
    with pytest.raises(InvalidConfig, match=r"no 'model_type'.*; known: bert"):
        read_config(tmp_path / "s")


@pytest.mark.parametrize("wrong", [{"architectures": [{}]}, {"architectures": [["BertModel"]]},
                                   {"num_hidden_layers": 10**12}, {"hidden_size": None}])  # fmt: skip
def test_a_wrong_config_does_not_keep_a_folder_from_being_written_again(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Tensors go by name there, so what a config says of them need not be right, and is not followed."""
    save(tmp_path / "s", "bert")
    file = tmp_path / "s" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    with pytest.raises((InvalidCheckpoint, InvalidConfig), match=next(iter(wrong))):
        open_model(tmp_path / "s")
    with pytest.raises(UnsupportedGrowth, match="--format universal"):
        reshard(tmp_path / "s", tmp_path / "z", format="zero", stage=1, world_size=1, say=silent)
    reshard(tmp_path / "s", tmp_path / "u", say=silent)
    again = open_source(tmp_path / "u")
    same({n: again.read(n, "fp32", 0, m.shape[0]) for n, m in again.tensors.items()},
         load_file(tmp_path / "s" / "model.safetensors"))  # fmt: skip
    assert "vocabulary 29" in render(inspect(tmp_path / "s"))


@pytest.mark.parametrize("cls", ["BertForPreTraining", "BertForMaskedLM", "BertModel"])
def test_a_folder_that_names_no_class(cls: str, tmp_path: Path) -> None:
    """As the smallest BERTs of the hub: native shards of it load into the class that has its tensors."""
    model = save(tmp_path / "s", "bert", old_bert if cls != "BertModel" else dict, architectures=[cls])
    file = tmp_path / "s" / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    assert type(model).__name__ == cls
    reshard(tmp_path / "s", tmp_path / "z", format="zero", stage=1, world_size=1, say=silent)
    assert list(open_source(tmp_path / "z").tensors) == [name for name, _ in model.named_parameters()]


def test_tensors_beyond_the_class_are_kept_and_reported(tmp_path: Path) -> None:
    """bert-base-uncased names BertForMaskedLM, and has the other head, too."""
    model = save(tmp_path / "s", "bert", old_bert)
    file = tmp_path / "s" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["BertForMaskedLM"]}))
    _, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "s", output_loading_info=True)
    beyond = {name for name in info["unexpected_keys"] if "position_ids" not in name}
    lines: list[str] = []
    reshard(tmp_path / "s", tmp_path / "z", format="zero", stage=1, world_size=1, say=lines.append)
    assert beyond <= open_source(tmp_path / "z").tensors.keys()
    assert f"BertForMaskedLM, which the config names, lacks {len(beyond)} tensors" in "\n".join(lines)
    assert set(open_source(tmp_path / "z").tensors) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize(
    "place", [r"(\.mlp|\.block_sparse_moe)\.", r"(\.experts)\.", r"(\.experts\.\d+)\.", r"(\.w1|_proj)\."]
)
def test_wrappers_among_experts(name: str, place: str, tmp_path: Path) -> None:
    def wrap(t: Tensors) -> Tensors:
        return {re.sub(place, r"\1._fsdp_wrapped_module._orig_mod.", n): v for n, v in t.items()}

    model = save(tmp_path / "s", name, wrap)
    assert any("_orig_mod" in n for n in load_file(tmp_path / "s" / "model.safetensors"))
    same(read(tmp_path / "s"), dict(model.named_parameters()))
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "c.json"), format="hub", measure=False,
         say=silent)  # fmt: skip
    assert not any("_orig_mod" in n for n in load_file(tmp_path / "g" / "model.safetensors"))


def test_fused_experts_in_the_block_of_before(tmp_path: Path) -> None:
    """transformers renames the block of a Mixtral whatever its experts look like."""
    model = hf_model(tiny.config_of("mixtral"))
    model.save_pretrained(tmp_path)
    state = {n.replace(".mlp.", ".block_sparse_moe."): p.detach().clone() for n, p in model.named_parameters()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    same(read(tmp_path), loaded(tmp_path, "MixtralForCausalLM"))
    found, fused = open_model(tmp_path), "model.layers.1.mlp.experts.down_proj"
    rows = [found.read(fused, "fp32", i, i + 1) for i in range(found.parameters[fused].shape[0])]
    assert torch.cat(rows).equal(state[fused.replace(".mlp.", ".block_sparse_moe.")])


def test_experts_one_by_one_of_a_run(tmp_path: Path) -> None:
    """A Mixtral of transformers 4 in a run's files: a folder made of them is verified, and loads."""
    model = save(tmp_path / "s", "mixtral")
    config = tmp_path / "s" / "config.json"
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    groups = (TargetGroup("all", False, tuple(shapes), {"lr": 1e-3}, 7),)
    spec = make_spec(shapes=shapes, aliases={}, config={}, groups=groups, group_layout="single")
    states = {name: dict.fromkeys(spec.states, tensor) for name, tensor in tensors.items()}
    write_checkpoint(tmp_path / "z", spec, reader(states), format="universal", manifest_growth=None)
    same(read(tmp_path / "z", config), dict(model.named_parameters()))
    reshard(tmp_path / "z", tmp_path / "h", format="hub", source_config=config, say=silent)
    assert verify(tmp_path / "z", tmp_path / "h").ok
    same(loaded(tmp_path / "h", "MixtralForCausalLM"), dict(model.named_parameters()))
    same(read(tmp_path / "h"), dict(model.named_parameters()))


def test_decoder_that_the_class_ignores(tmp_path: Path) -> None:
    """A whole T5 whose config names the encoder's class: what is left is named, with the true reason."""
    save(tmp_path / "s", "t5")
    file = tmp_path / "s" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["T5EncoderModel"]}))
    same(read(tmp_path / "s"), loaded(tmp_path / "s", "T5EncoderModel"))
    lines: list[str] = []
    reshard(tmp_path / "s", tmp_path / "u", format="universal", say=lines.append)
    assert "left out, for transformers does not read them: decoder.block.0" in "\n".join(lines)
