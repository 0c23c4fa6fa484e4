"""Fine-tuned heads and bare models as Hugging Face folders and as DeepSpeed files, against transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bert2bert.checkpoints.open import open_source
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, UnsupportedGrowth
from bert2bert.growth.source_model import open_model
from bert2bert.tables import table_for
from tests import tiny
from tests.doors import grow
from tests.planning import plan_growth
from tests.rounding import ROUNDING, SPARE, gap, largest, unit

CLASSES = (
    "BertForSequenceClassification", "BertForMultipleChoice", "BertModel", "RobertaForSequenceClassification",
    "RobertaForTokenClassification", "RobertaForQuestionAnswering", "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification", "GPT2Model", "LlamaForSequenceClassification", "LlamaForTokenClassification",
    "LlamaForQuestionAnswering", "MistralForQuestionAnswering", "Qwen3ForQuestionAnswering", "Qwen2Model",
    "T5ForSequenceClassification", "T5ForTokenClassification", "T5ForQuestionAnswering", "T5EncoderModel",
    "ModernBertForSequenceClassification", "ModernBertForMultipleChoice", "MixtralForTokenClassification",
)  # fmt: skip


def save(folder: Path, cls: str) -> dict[str, Any]:
    """A scrambled model of the class as transformers saves it; its config."""
    config = tiny.config_of(cls)
    model = getattr(transformers, cls)._from_config(transformers.AutoConfig.for_model(**config))
    tiny.scramble(model)
    model.save_pretrained(folder)
    return config


def goal(path: Path, config: dict[str, Any]) -> Path:
    """The config file of a model twice as wide."""
    table = table_for(config)
    path.write_text(json.dumps(table.resize(config, {"embed": 2 * table.axis_sizes(config)["embed"]})))
    return path


def quiet(_: str) -> None:
    """For growths whose words do not matter."""


def answers(folder: Path, cls: str) -> dict[str, torch.Tensor]:
    model, info = getattr(transformers, cls).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return tiny.outputs(model.eval(), tiny.config_of(cls))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_folder_grows_and_says_the_same(cls: str, tmp_path: Path) -> None:
    config = save(tmp_path / "small", cls)
    model = open_model(tmp_path / "small")
    assert model.heads == model.table.names.classes[cls] and not model.left and not model.naming.renamed
    target = goal(tmp_path / "big.json", config)
    grow(tmp_path / "small", tmp_path / "big", target, format="hub", width="fpi:choice=left", say=quiet)
    assert json.loads((tmp_path / "big" / "config.json").read_text())["architectures"] == [cls]
    old, new = answers(tmp_path / "small", cls), answers(tmp_path / "big", cls)
    assert old.keys() == new.keys()
    for name, before in old.items():
        wider = new[name].shape[-1] // before.shape[-1]
        wanted = before if "logits" in name else before.repeat(*[1] * (before.dim() - 1), wider)
        # a whole model in float32: more than a few operations
        assert gap(new[name], wanted, SPARE * unit(torch.float32) * largest(before)) <= ROUNDING, name
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and "no language-model head" in report.text()


@pytest.mark.parametrize("prefix", ["", "module.", "net._orig_mod."])
@pytest.mark.parametrize("cls", ["T5ForSequenceClassification", "Qwen2ForQuestionAnswering"])
def test_classes_with_an_outer_name_of_their_own(cls: str, prefix: str, tmp_path: Path) -> None:
    """Native shards keep the script's names, a Hugging Face folder those of the class."""
    config = save(tmp_path / "small", cls)
    file = tmp_path / "small" / "model.safetensors"
    plain = load_file(file)
    assert any(name.startswith("transformer.") for name in plain)
    save_file({prefix + name: value for name, value in plain.items()}, file)
    target = goal(tmp_path / "big.json", config)
    grow(tmp_path / "small", tmp_path / "big", target, format="hub", say=quiet)
    assert load_file(tmp_path / "big" / "model.safetensors").keys() == plain.keys()
    grow(tmp_path / "small", tmp_path / "run", target, format="zero", stage=2, world_size=1, say=quiet)
    run = open_source(tmp_path / "run")
    assert set(run.tensors) - {prefix + name for name in plain} == set()
    assert open_model(tmp_path / "run").heads == table_for(config).names.classes[cls]


def test_heads_that_are_not_known_are_refused_by_those_that_are(tmp_path: Path) -> None:
    config = tiny.config_of("gpt2", architectures=["GPT2DoubleHeadsModel"])
    transformers.GPT2DoubleHeadsModel(transformers.GPT2Config(**config)).save_pretrained(tmp_path / "two")
    with pytest.raises(InvalidCheckpoint, match=r"multiple_choice_head.*\n.*GPT2ForSequenceClassification"):
        open_model(tmp_path / "two")
    save(tmp_path / "deep", "BertForTokenClassification")
    file = tmp_path / "deep" / "model.safetensors"
    tensors = load_file(file)
    tensors["classifier.1.weight"] = tensors.pop("classifier.weight")
    save_file(tensors, file)
    with pytest.raises(InvalidCheckpoint, match="classifier"):
        open_model(tmp_path / "deep")


def test_labels_are_those_of_the_source(tmp_path: Path) -> None:
    config = save(tmp_path / "small", "LlamaForSequenceClassification")
    other = {k: v for k, v in config.items() if k not in ("id2label", "label2id", "num_labels")}
    with pytest.raises(UnsupportedGrowth, match="the target's id2label makes 2 labels, the source's 3"):
        grow(tmp_path / "small", tmp_path / "big", goal(tmp_path / "big.json", other), format="hub", say=quiet)
    moe = tiny.config_of("mixtral", tie_word_embeddings=True, rms_norm_eps=1e-6, architectures=None)
    with pytest.raises(UnsupportedGrowth, match="the target's id2label makes 2 labels, the source's 3"):
        plan_growth(config, moe, experts="upcycle", heads=frozenset({"score"}))
    # of a model without such a head they say nothing
    lm = tiny.config_of("llama", num_labels=3)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**lm)).save_pretrained(tmp_path / "lm")
    without = {k: v for k, v in lm.items() if k not in ("id2label", "label2id", "num_labels")}
    grow(
        tmp_path / "lm", tmp_path / "lm-big", goal(tmp_path / "lm.json", without), format="hub", measure=False,
        say=quiet,
    )  # fmt: skip


@pytest.mark.parametrize("cls", ["RobertaForSequenceClassification", "BertForTokenClassification"])
def test_a_pooler_beside_the_head_grows_too(cls: str, tmp_path: Path) -> None:
    """Older versions saved one that the class does not have."""
    config, file = save(tmp_path / "small", cls), tmp_path / "small" / "model.safetensors"
    outer = table_for(config).names.prefix
    pooler = {f"{outer}pooler.dense.weight": torch.randn(8, 8), f"{outer}pooler.dense.bias": torch.randn(8)}
    save_file({**load_file(file), **pooler}, file, {"format": "pt"})
    target = goal(tmp_path / "big.json", {**config, "architectures": None})
    grow(tmp_path / "small", tmp_path / "big", target, format="hub", say=quiet)
    assert json.loads((tmp_path / "big" / "config.json").read_text())["architectures"] == [cls]
    grown = load_file(tmp_path / "big" / "model.safetensors")
    assert {name: grown[name].shape[0] for name in pooler} == dict.fromkeys(pooler, 16)
    big = getattr(transformers, cls).from_pretrained(tmp_path / "big").eval()
    small = getattr(transformers, cls).from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        old, new = (tiny.outputs(model, config)["logits"] for model in (small, big))
    assert torch.allclose(old, new, rtol=1e-3, atol=1e-3 * old.abs().max().item())


def test_which_of_two_heads_of_the_same_names(tmp_path: Path) -> None:
    """A choice's classifier has one row, by the config's class alone distinguished from a classifier of one label."""
    save(tmp_path, "BertForMultipleChoice")
    assert open_model(tmp_path).heads == {"pooler", "choice"}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": None}))
    with pytest.raises(InvalidCheckpoint, match=r"classifier.weight has 1 rows.*\n.*num_labels to 1"):
        open_model(tmp_path)


def test_what_pools_must_agree_where_something_is_pooled(tmp_path: Path) -> None:
    config = save(tmp_path / "small", "ModernBertForSequenceClassification")
    target = goal(tmp_path / "big.json", config | {"classifier_pooling": "mean"})
    with pytest.raises(UnsupportedGrowth, match="classifier_pooling is 'cls' in the source and 'mean'"):
        grow(tmp_path / "small", tmp_path / "big", target, format="hub", say=quiet)
    save(tmp_path / "bare", "ModernBertModel")
    grow(tmp_path / "bare", tmp_path / "bare-big", target, format="hub", say=quiet)


def logits(folder: Path, cls: str) -> torch.Tensor:
    """Of transformers' class of the folder, in float64; all its tensors are there."""
    model, info = getattr(transformers, cls).from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not info["missing_keys"], info
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(1, 7)[None]).logits
    return found


def name_class(folder: Path, cls: str | None) -> dict[str, Any]:
    """The folder's config, which from now on names another class."""
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) | {"architectures": [cls] if cls else None}
    file.write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "head,words",
    [
        ("Qwen2ForSequenceClassification", "Qwen2ForCausalLM"),
        ("Qwen3ForTokenClassification", "Qwen3ForCausalLM"),
        ("LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("MixtralForTokenClassification", "MixtralForCausalLM"),
        ("GPT2ForSequenceClassification", "GPT2LMHeadModel"),
        ("GPT2ForTokenClassification", "GPT2LMHeadModel"),
        ("ModernBertForSequenceClassification", "ModernBertForMaskedLM"),
    ],
)
def test_a_tied_head_of_words_beside_another_is_kept(head: str, words: str, named: bool, tmp_path: Path) -> None:
    """transformers' class of words misses nothing in such a folder: its head is the word embedding."""
    config = tiny.config_of(
        head, tie_word_embeddings=True, pad_token_id=0, **({"decoder_bias": False} if "Modern" in head else {})
    )
    model = getattr(transformers, head)._from_config(transformers.AutoConfig.for_model(**config))
    tiny.scramble(model)
    model.save_pretrained(tmp_path / "small")
    config = name_class(tmp_path / "small", words if named else None)
    grow(tmp_path / "small", tmp_path / "big", goal(tmp_path / "big.json", config), format="hub",
         width="fpi:choice=left", measure=False, say=quiet)  # fmt: skip
    for cls in (words, head):
        old, new = logits(tmp_path / "small", cls), logits(tmp_path / "big", cls)
        # the files are float32: the tensors are rounded, what is computed of them is not
        assert gap(new, old, SPARE * unit(torch.float32) * largest(old)) <= ROUNDING, cls


def test_a_tied_head_of_words_that_cannot_grow_beside_another_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "t5", "T5ForQuestionAnswering")
    assert open_model(tmp_path / "t5").heads == {"decoder", "qa"}
    name_class(tmp_path / "t5", "T5ForConditionalGeneration")
    with pytest.raises(InvalidCheckpoint, match=r"names T5ForCond.*qa_outputs.*\n.*T5ForQuestionAnswering"):
        open_model(tmp_path / "t5")
    save(tmp_path / "modern", "ModernBertForSequenceClassification")
    name_class(tmp_path / "modern", "ModernBertForMaskedLM")
    with pytest.raises(InvalidCheckpoint, match=r"classifier.*lacks only decoder.bias.*\n.*store decoder.bias"):
        open_model(tmp_path / "modern")


@pytest.mark.parametrize(
    "cls,words",
    [("BertForSequenceClassification", "BertForMaskedLM"), ("LlamaForSequenceClassification", "LlamaForCausalLM"),
     ("RobertaForQuestionAnswering", "RobertaForMaskedLM"), ("ModernBertForMultipleChoice", "ModernBertForMaskedLM")],
)  # fmt: skip
def test_the_words_that_a_classifier_was_trained_with_are_measured(cls: str, words: str, tmp_path: Path) -> None:
    """transformers' class leaves the head of words unread; it grows, and drift and verify are its logits'."""
    config = save(tmp_path / "small", cls)
    table, file = table_for(config), tmp_path / "small" / "model.safetensors"
    if words == "LlamaForCausalLM":
        config["tie_word_embeddings"] = False
        (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"architectures": [cls]}))
    stored, known = load_file(file), table.parameters(config, table.names.classes[words])
    more = {name: torch.randn(p.shape) for name, p in known.items() if name not in stored}
    save_file({**stored, **more}, file, {"format": "pt"})
    assert open_model(tmp_path / "small").heads == table.names.classes[cls] | {"lm"}
    lines: list[str] = []
    grow(tmp_path / "small", tmp_path / "big", goal(tmp_path / "big.json", config), format="hub", say=lines.append)
    assert "drift    logits differ by" in "\n".join(lines)
    report = verify(tmp_path / "small", tmp_path / "big")
    assert report.ok and "of the largest entry" in report.text(), report.text()


def test_the_number_of_labels_that_does_not_fit_is_named(tmp_path: Path) -> None:
    config = tiny.config_of("llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.randn(1, config["hidden_size"])}, file, {"format": "pt"})
    with pytest.raises(InvalidCheckpoint, match=r"num_labels=2, the default.*score.weight has 1 rows.*\n.*to 1"):
        open_model(tmp_path)
