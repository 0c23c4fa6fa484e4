"""A folder whose tensors are not those of the class that its config names: others, fewer, or tied ones that differ.

The truth is what transformers' class makes of the folder: what it draws at random, leaves, or unties.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert.errors import InvalidCheckpoint, UnsupportedGrowth
from bert2bert.growth.source_model import open_model
from tests import tiny
from tests.checkpoints.engines import hf_model
from tests.doors import grow, reshard
from tests.rounding import ROUNDING, gap, largest, unit
from tests.test_names import FAMILIES, Tensors, deeper, read, save, silent

TIED = {
    "bert": ("cls.predictions", "bert.embeddings.word_embeddings.weight"),
    "roberta": ("lm_head", "roberta.embeddings.word_embeddings.weight"),
}


def _base(folder: Path, name: str) -> str:
    """A folder of the base model alone, with the config of the full class, whose name is given."""
    model = hf_model(tiny.config_of(name))
    inner = transformers.T5EncoderModel(model.config) if name == "t5" else model.base_model
    inner.save_pretrained(folder)
    cls = tiny.VARIANTS[name].cls
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [cls]}))
    return cls


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_that_the_class_would_draw_are_reported(name: str, tmp_path: Path) -> None:
    cls = _base(tmp_path / "s", name)
    model, info = getattr(transformers, cls).from_pretrained(tmp_path / "s", output_loading_info=True)
    drawn = {n for n, _ in model.named_parameters()} & info["missing_keys"]  # a tied one is there by its other name
    lines: list[str] = []
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "g.json"), format="hub", measure=False,
         say=lines.append)  # fmt: skip
    reshard(tmp_path / "s", tmp_path / "z", format="zero", stage=1, world_size=1, say=lines.append)
    printed = [line for text in lines for line in text.splitlines() if "that the source lacks" in line]
    if not drawn:  # GPT-2's head is the word embedding, which the base model has
        assert not printed
        return
    assert len(printed) == 2  # by the growth, and by the shards
    for line in printed:
        assert f"{cls}, which the config names, has {len(drawn)} tensors that the source lacks" in line
        assert any(f"first {name}: " in line for name in drawn)


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("part,other", [("weight", "bias"), ("bias", "weight")])
def test_one_of_two_tied_tensors_that_differs_is_named(name: str, part: str, other: str, tmp_path: Path) -> None:
    """transformers unties the one and keeps the other tied; with both stored it is a model without tied tensors."""
    head, words = TIED[name]
    kept = {"weight": words, "bias": f"{head}.bias"}

    def change(t: Tensors) -> Tensors:
        return t | {f"{head}.decoder.{part}": t[kept[part]] + 1}

    save(tmp_path / "s", name, change)
    with pytest.raises(InvalidCheckpoint) as error:
        open_model(tmp_path / "s")
    text = str(error.value)
    assert f"{head}.decoder.{part} differs from {kept[part]}" in text
    assert f"store {head}.decoder.{other} too, as a copy of {kept[other]}" in text and "False" not in text
    save(tmp_path / "both", name, lambda t: change(t) | {f"{head}.decoder.{other}": t[kept[other]].clone()})
    theirs = getattr(transformers, tiny.VARIANTS[name].cls).from_pretrained(tmp_path / "both").state_dict()
    ours = read(tmp_path / "both")
    assert {f"{head}.decoder.weight", f"{head}.decoder.bias"} <= ours.keys()
    assert all(torch.equal(value, theirs[n]) for n, value in ours.items())
    target = deeper(tmp_path / "both", tmp_path / "g.json")
    with pytest.raises(UnsupportedGrowth, match=rf"{head}\.decoder\.{part} differs from (.|\n)*if not, remove "):
        grow(tmp_path / "both", tmp_path / "g", target, format="hub", measure=False, say=silent)
    target.write_text(json.dumps(json.loads(target.read_text()) | {"tie_word_embeddings": False}))
    lines: list[str] = []
    grow(tmp_path / "both", tmp_path / "g", target, format="hub", measure=False, say=lines.append)
    assert f"not tied, whatever the config says: {head}.decoder.{part} differs from {kept[part]}" in "\n".join(lines)


def test_a_tie_that_no_config_undoes_is_named_with_what_to_remove(tmp_path: Path) -> None:
    copy = "encoder.embed_tokens.weight"
    save(tmp_path / "s", "t5", lambda t: t | {copy: t["shared.weight"] + 1})
    with pytest.raises(InvalidCheckpoint, match=rf"{copy} differs from shared.weight(.|\n)*remove {copy}"):
        open_model(tmp_path / "s")


@pytest.mark.parametrize("count", [1, 2])
def test_a_classifier_beside_the_head_of_words_is_of_its_own_shape(count: int, tmp_path: Path) -> None:
    """Classes and choices are called alike; a choice has one score."""

    def change(t: Tensors) -> Tensors:
        return t | {"classifier.weight": torch.randn(count, width), "classifier.bias": torch.randn(count)}

    config: dict[str, Any] = tiny.config_of("bert")
    width = config["hidden_size"]
    save(tmp_path / "s", "bert", change, num_labels=2)
    ours = read(tmp_path / "s")
    assert ours["classifier.weight"].shape == (count, width)
    grow(tmp_path / "s", tmp_path / "g", deeper(tmp_path / "s", tmp_path / "g.json"), format="hub", measure=False,
         say=silent)  # fmt: skip
    grown = read(tmp_path / "g")
    assert torch.equal(grown["classifier.weight"], ours["classifier.weight"])


CLASSIFIERS = {
    "gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification", "qwen3": "Qwen3ForSequenceClassification",
}  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_tied_head_without_tensors_counts_beside_a_classifier(name: str, named: bool, tmp_path: Path) -> None:
    """Both classes read the folder: the language model's head is the word embedding. Both functions are kept."""
    tied = {"tie_word_embeddings": True, "num_labels": 3, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(**tiny.config_of(name) | tied)
    model = getattr(transformers, CLASSIFIERS[name])(config)
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "s")
    lm, file = CLASSIFIERS[name].replace("SequenceClassification", "CausalLM"), tmp_path / "s" / "config.json"
    lm = lm.replace("GPT2ForCausalLM", "GPT2LMHeadModel")
    plain = {key: value for key, value in json.loads(file.read_text()).items() if key != "architectures"}
    file.write_text(json.dumps(plain | ({"architectures": [lm]} if named else {})))
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "n_embd", "n_head")
    (tmp_path / "big.json").write_text(json.dumps(plain | {key: 2 * plain[key] for key in keys if key in plain}))
    grow(tmp_path / "s", tmp_path / "g", tmp_path / "big.json", format="hub", width="fpi", say=silent)
    ids = torch.tensor([[3, 7, 4, 11, 5]])
    for cls in (lm, CLASSIFIERS[name]):
        small, big = (
            getattr(transformers, cls).from_pretrained(tmp_path / folder, torch_dtype=torch.float64).eval()(ids).logits
            for folder in ("s", "g")
        )
        assert gap(big, small, 64 * unit(torch.float32) * largest(small)) <= ROUNDING  # norms compute in float32
