"""A BERT's configuration, read from and written as Hugging Face's config dict. Torch-free.

Sizes must be given: a missing or misspelt size is an error, never a silent BERT-base. What this model core does not
compute is refused by name: decoders and cross-attention, relative positions, other activations. Keys that say nothing
about the function (id2label, use_cache, …) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from bert2bert.errors import InvalidConfig, did_you_mean

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

HEADS = {"BertForPreTraining": ("lm", "nsp"), "BertForMaskedLM": ("lm",)}
"""Hugging Face's class names of the models that can be built, and the heads that each has."""

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings",
)  # fmt: skip
_ONLY: dict[str, Any] = {
    "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False,
    "position_embedding_type": "absolute",
}  # fmt: skip
_TIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_FOREIGN = {  # a key that no BERT's config has: whose it is
    **dict.fromkeys(("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"),
                    "the Llama family"),
    **dict.fromkeys(("n_embd", "n_layer", "n_head", "n_positions", "n_ctx"), "GPT-2"),
    **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets"), "T5"),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok"), "a mixture of experts"),
    **dict.fromkeys(("global_attn_every_n_layers", "local_attention", "norm_eps"), "ModernBERT"),
}  # fmt: skip
_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass(frozen=True)
class BertConfig:
    """The fields carry Hugging Face's names and defaults. heads: ("lm", "nsp") or ("lm",)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    heads: tuple[str, ...] = ("lm",)

    @property
    def head_size(self) -> int:
        """Features of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def aliases(self) -> dict[str, str]:
        """Absent parameter name -> the name it is tied to; nothing in an untied model (as transformers 5 does)."""
        return dict(_TIES) if self.tie_word_embeddings else {}

    def with_heads(self, heads: tuple[str, ...]) -> BertConfig:
        """The same config with other heads. Raises InvalidConfig for heads that cannot be built."""
        return replace(self, heads=tuple(heads))

    def __post_init__(self) -> None:
        for name in (*_SIZES, "type_vocab_size"):
            value = getattr(self, name)
            least = 0 if name == "num_hidden_layers" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidConfig(f"model config: {name} is {value!r}, expected a whole number of at least {least}")
        if self.hidden_size % self.num_attention_heads:
            raise InvalidConfig(
                f"model config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; expected whole heads of equal size"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise InvalidConfig(
                f"model config: hidden_act is {self.hidden_act!r}, which this model core does not compute; "
                + did_you_mean(str(self.hidden_act), ACTIVATIONS)
            )
        for name in _RATES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise InvalidConfig(f"model config: {name} is {value!r}, expected a number from 0 to below 1")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise InvalidConfig(f"model config: {name} is {value!r}, expected a number of at least 0")
        pad = self.pad_token_id
        if pad is not None and (isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < self.vocab_size):
            raise InvalidConfig(
                f"model config: pad_token_id is {pad!r}, expected null or a token id below vocab_size {self.vocab_size}"
            )
        if not isinstance(self.tie_word_embeddings, bool):
            raise InvalidConfig(
                f"model config: tie_word_embeddings is {self.tie_word_embeddings!r}, expected true or false"
            )
        if self.heads not in HEADS.values():
            known = " or ".join(str(heads) for heads in HEADS.values())
            raise InvalidConfig(f"model heads are {self.heads!r}, expected {known}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> BertConfig:
        """Read a Hugging Face config dict (the content of config.json).

        Heads follow `architectures`: BertForPreTraining has lm and nsp, BertForMaskedLM and no entry at all lm.
        Raises InvalidConfig for a missing size, a wrong value, or something this model core does not compute.
        """
        check_architecture(config)
        for name in _SIZES:
            if name not in config:
                raise InvalidConfig(
                    f"model config: {name} is missing; expected every size of {', '.join(_SIZES)} in the config"
                )
        for name, only in _ONLY.items():
            if (value := config.get(name, only)) not in (only, None):
                raise InvalidConfig(
                    f"model config: {name} is {value!r}, expected {only!r}; "
                    "only encoders with absolute positions are built here"
                )
        names = [name for name in cls.__dataclass_fields__ if name != "heads"]
        return cls(**{name: config[name] for name in names if name in config}, heads=_heads(config))

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face config dict that describes this model; from_hf reads it back unchanged."""
        values = asdict(self)
        del values["heads"]
        architecture = next(name for name, heads in HEADS.items() if heads == self.heads)
        return {"architectures": [architecture], "model_type": "bert", **values}


def check_architecture(config: Mapping[str, Any], trained: Sequence[str] = ("bert",)) -> None:
    """Refuse (InvalidConfig) an architecture that no core trains, by whatever in the config says so, before its keys
    are read. A config without a model_type is a BERT's. trained: the model types that have a core."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    found = None
    if kind is not None:
        found = None if kind in trained else f"model_type is {kind!r}"
    elif classes and not any(str(name).startswith("Bert") for name in classes):
        found = f"there is no model_type, and architectures is {classes!r}"
    elif foreign := [key for key in config if key in _FOREIGN]:
        found = f"there is no model_type, and {foreign[0]!r} is a key of {_FOREIGN[foreign[0]]}"
    if found:
        raise InvalidConfig(
            f"model config: {found}; this trainer trains models of model_type {', '.join(trained)}. Checkpoints of "
            "other architectures are resharded here (bert2bert reshard), and trained by their own DeepSpeed scripts"
        )


def _heads(config: Mapping[str, Any]) -> tuple[str, ...]:
    architectures = config.get("architectures") or ["BertForMaskedLM"]
    for name in architectures:
        if name in HEADS:
            return HEADS[name]
    raise InvalidConfig(
        f"model config: architectures is {architectures!r}, expected one of {', '.join(HEADS)}; "
        "for another BERT (a bare encoder, a classifier) set the one whose heads should be pre-trained"
    )
