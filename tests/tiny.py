"""The smallest config of each family, with scrambled parameters (fresh biases of 0 and gains of 1 hide mistakes).

Models run in float64 throughout: transformers casts to float32 inside norms, softmaxes and rotary angles, which would
hide errors below 1e-7, so every such cast is lifted while a model of `build` runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
import transformers

from bert2bert.measure.transformers_models import Double
from bert2bert.tables import TABLES, table_for

Made = TypeVar("Made")

TOKENS = range(2, 23)  # below every vocabulary, so that a grown or shrunk model reads the same ids; 0 and 1 may pad


@dataclass(frozen=True)
class Variant:
    """name: in test ids; cls: the transformers class; base: the smallest config, `model_type` included."""

    name: str
    cls: str
    base: dict[str, Any]


_BERT = {
    "model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 3,
    "vocab_size": 29, "max_position_embeddings": 10, "type_vocab_size": 2,
}  # fmt: skip
_ROBERTA = _BERT | {"model_type": "roberta", "max_position_embeddings": 12}
_GPT2 = {
    "model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_inner": 12, "n_layer": 3, "vocab_size": 29, "n_positions": 10,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
    "intermediate_size": 10, "num_hidden_layers": 3, "vocab_size": 29, "max_position_embeddings": 16,
}  # fmt: skip
_T5 = {
    "model_type": "t5", "d_model": 8, "num_heads": 2, "d_kv": 3, "d_ff": 12, "num_layers": 3, "num_decoder_layers": 2,
    "vocab_size": 29, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 7,
}  # fmt: skip
_GATED = _T5 | {"feed_forward_proj": "gated-gelu"}
_MODERNBERT = {
    "model_type": "modernbert", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 10, "vocab_size": 29,
    "num_hidden_layers": 3, "max_position_embeddings": 16, "local_attention": 4, "global_attn_every_n_layers": 2,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None,
}  # fmt: skip
_BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
_MIXTRAL = _LLAMA | {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2}
_QWEN3_MOE = _MIXTRAL | {"model_type": "qwen3_moe", "moe_intermediate_size": 9, "norm_topk_prob": True}
_QWEN2_MOE = _LLAMA | {
    "model_type": "qwen2_moe", "moe_intermediate_size": 9, "shared_expert_intermediate_size": 7, "num_experts": 5,
    "num_experts_per_tok": 2,
}  # fmt: skip

VARIANTS = {
    v.name: v
    for v in (
        Variant("bert", "BertForPreTraining", _BERT),
        Variant("bert-untied", "BertForPreTraining", _BERT | {"tie_word_embeddings": False}),
        Variant("roberta", "RobertaForMaskedLM", _ROBERTA),
        Variant("gpt2", "GPT2LMHeadModel", _GPT2),
        Variant("gpt2-untied", "GPT2LMHeadModel", _GPT2 | {"tie_word_embeddings": False}),
        Variant("llama", "LlamaForCausalLM", _LLAMA),
        Variant("llama-mha", "LlamaForCausalLM", _LLAMA | {"num_key_value_heads": 6}),
        Variant("llama-mqa", "LlamaForCausalLM", _LLAMA | {"num_key_value_heads": 1}),
        Variant("llama-tied", "LlamaForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
        Variant("mistral", "MistralForCausalLM", _LLAMA | {"model_type": "mistral"}),
        Variant("qwen2", "Qwen2ForCausalLM", _LLAMA | {"model_type": "qwen2"}),
        Variant("qwen3", "Qwen3ForCausalLM", _LLAMA | {"model_type": "qwen3"}),
        Variant("t5", "T5ForConditionalGeneration", _T5),
        Variant("t5-gated", "T5ForConditionalGeneration", _GATED | {"scale_decoder_outputs": False}),
        Variant("t5-untied", "T5ForConditionalGeneration", _GATED | {"tie_word_embeddings": False}),
        Variant("modernbert", "ModernBertForMaskedLM", _MODERNBERT),
        Variant("modernbert-untied", "ModernBertForMaskedLM", _MODERNBERT | _BIASES | {"tie_word_embeddings": False}),
        Variant("mixtral", "MixtralForCausalLM", _MIXTRAL),
        Variant("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE),
        Variant("qwen2_moe", "Qwen2MoeForCausalLM", _QWEN2_MOE),
    )
}


def _others() -> dict[str, Variant]:
    """Every class of every table that has no language-model head, named by it: bare models whose config says that word
    embeddings are tied, and models with a fine-tuned head."""
    bases: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS.values():
        bases.setdefault(variant.base["model_type"], variant.base)
    found = {}
    for kind, table in TABLES.items():
        for cls, heads in table.names.classes.items():
            labels = {"num_labels": 3} if cls.endswith(("SequenceClassification", "TokenClassification")) else {}
            pads = {} if kind in ("roberta", "t5", "bert") else {"pad_token_id": 0}
            starts = {"decoder_start_token_id": 0} if kind == "t5" else {}
            if "lm" not in heads:
                more = {"tie_word_embeddings": True, **labels, **pads, **starts}
                found[cls] = Variant(cls, cls, bases[kind] | more)
    return found


OTHERS = _others()


def remembered(function: Callable[..., Made]) -> Callable[..., Made]:
    """Keep a function's last results, by its arguments as text: dicts may be among them. Nobody may change a result."""
    kept: dict[str, Made] = {}

    @wraps(function)
    def call(*args: Any, **more: Any) -> Made:
        key = repr((args, more))
        if key not in kept:
            kept[key] = function(*args, **more)
            if len(kept) > 64:
                del kept[next(iter(kept))]
        return kept[key]

    return call


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The full Hugging Face config of a variant without dropout; changes by config key."""
    return copy.deepcopy(_config_of(name, **changes))


@remembered
def _config_of(name: str, **changes: Any) -> dict[str, Any]:
    variant = VARIANTS.get(name) or OTHERS[name]
    asked = variant.base | {"architectures": [variant.cls]} | changes
    config = transformers.AutoConfig.for_model(**asked).to_dict()
    if "tie_word_embeddings" in asked:
        config["tie_word_embeddings"] = asked["tie_word_embeddings"]  # a T5 says True whatever it was given
    return {key: 0.0 if "drop" in key and isinstance(value, float) else value for key, value in config.items()}


@lru_cache
def _doubled(cls: type) -> Any:
    @wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Double():
            return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


@remembered
def _settings(config: dict[str, Any]) -> transformers.PreTrainedConfig:
    return transformers.AutoConfig.for_model(**config)


def build(config: dict[str, Any]) -> transformers.PreTrainedModel:
    """The transformers model of a config, float64, eval mode, eager attention."""
    cls = _doubled(getattr(transformers, config["architectures"][0]))
    model = cls._from_config(
        copy.deepcopy(_settings(config)), attn_implementation="eager", experts_implementation="eager"
    )
    untie(model, config)
    return model.double().eval()


def untie(model: transformers.PreTrainedModel, config: dict[str, Any]) -> None:
    """Give a T5 that shall have a head of its own one, as it has when it is loaded from a checkpoint with one."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    if not config["tie_word_embeddings"] and head is not None and head.weight is words.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int = 0) -> None:
    """Random values everywhere, biases and norm gains included."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=p.dtype)
        p.copy_(1 + 0.3 * noise if p.ndim == 1 and name.endswith("weight") else 0.4 * noise)


def _ids(g: torch.Generator, rows: int, length: int) -> torch.Tensor:
    return torch.randint(TOKENS.start, TOKENS.stop, (rows, length), generator=g)


def inputs(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """What a family's forward takes: ids, labels (-100 at padding), a padding mask, token types where there are two."""
    g = torch.Generator().manual_seed(seed)
    ids = _ids(g, 3, 7)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    ids[mask == 0] = config.get("pad_token_id") or 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, _ids(g, 3, 7), -100)}
    if config.get("is_encoder_decoder"):
        given |= {"decoder_input_ids": _ids(g, 3, 6), "labels": _ids(g, 3, 6)}
    if config.get("type_vocab_size", 0) > 1:
        given["token_type_ids"] = ids % 2
    return given


def _forward(model: torch.nn.Module, config: dict[str, Any], seed: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    given = inputs(config, seed)
    labels = given.pop("labels")
    output = model(**given)
    scores = output.prediction_logits if "prediction_logits" in output else output.logits
    real = labels != -100
    return scores[real], labels[real], output


def outputs(model: torch.nn.Module, config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Everything that a model without a language-model head says: logits of classes, hidden states."""
    (cls,) = config["architectures"]
    given = inputs(config, seed)
    del given["labels"]
    if cls != "T5Model":  # the others make the decoder's input themselves
        given.pop("decoder_input_ids", None)
    if cls == "T5ForSequenceClassification":  # which reads the state at the end of the text
        given["input_ids"][:, 4] = config["eos_token_id"]
    if cls.endswith("MultipleChoice"):
        given = {key: value[None] for key, value in given.items()}
    found = model(**given)
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def logits(model: torch.nn.Module, config: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """What the language-model head says at every real position: [positions, vocab]."""
    return _forward(model, config, seed)[0]


def loss(model: torch.nn.Module, config: dict[str, Any], seed: int = 0) -> torch.Tensor:
    """Mean cross entropy with random labels, the next-sentence head's added where there is one."""
    scores, labels, output = _forward(model, config, seed)
    total = torch.nn.functional.cross_entropy(scores, labels)
    if "seq_relationship_logits" in output:
        pairs = output.seq_relationship_logits
        total = total + torch.nn.functional.cross_entropy(pairs, torch.arange(len(pairs)) % 2)
    return total


def canonical(config: dict[str, Any]) -> dict[str, str]:
    """Name in the config's class, and in the full model, of every parameter and tied copy."""
    table, cls = table_for(config), config["architectures"][0]
    names = (*table.parameters(config, table.names.classes[cls]), *table.aliases(config, table.names.classes[cls]))
    return {table.in_class(name, cls): name for name in names}


def parameters(model: torch.nn.Module, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters by the names that they have in the full model; ties once."""
    names = canonical(config)
    return {names[name]: p for name, p in model.named_parameters()}


def load(config: dict[str, Any], state: dict[str, torch.Tensor]) -> transformers.PreTrainedModel:
    """A model with this state, which must be all of its parameters, ties apart, and nothing else."""
    model = build(config)
    names = {full: own for own, full in canonical(config).items()}
    found = parameters(model, config).keys()
    assert set(state) == found, f"missing {found - set(state)}, unexpected {set(state) - found}"
    model.load_state_dict({names[name]: value for name, value in state.items()}, strict=False)
    return model


def bert_config(
    hidden: int = 8, heads: int = 2, ffn: int = 12, layers: int = 3, cls: str = "BertForPreTraining", **more: Any
) -> dict[str, Any]:
    """A BERT's config by its sizes."""
    return config_of("bert", hidden_size=hidden, num_attention_heads=heads, intermediate_size=ffn,
                     num_hidden_layers=layers, architectures=[cls], **more)  # fmt: skip


hf_bert = build


def batch(seed: int = 0, rows: int = 3, length: int = 7, vocab: int = 29) -> dict[str, torch.Tensor]:
    """Token ids, types, a padding mask and labels at some places."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = torch.where((torch.rand(ids.shape, generator=g) < 0.4) & (mask == 1), ids, -100)
    labels[1, 0] = ids[1, 0]
    return {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask, "labels": labels}
