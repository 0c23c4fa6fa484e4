"""Which core computes which architecture, and what each is trained to predict. Imports no torch until one is built.

Refuses (`InvalidConfig`): an architecture without a core, a class without a language-model head, and what the core of
an architecture does not compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

from bert2bert.errors import InvalidConfig
from bert2bert.model import config as config_module
from bert2bert.model.config import BertConfig
from bert2bert.tables import table_for

if TYPE_CHECKING:
    import torch

    from bert2bert.model.core import LanguageModel, Opened

HOSTED = "hosted.Hosted"
CORES = {
    "bert": "bert.Bert",
    "roberta": "roberta.Roberta",
    "modernbert": "modernbert.ModernBert",
    "gpt2": "gpt2.GPT2",
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "llama.Llama"),
    **dict.fromkeys(("t5", "mixtral", "qwen2_moe", "qwen3_moe"), HOSTED),
}
"""model_type -> module of this room and class."""


def typed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its model_type: one that names none is a BERT's."""
    return {"model_type": "bert", **config}


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise InvalidConfig for a Hugging Face config of an architecture that no core trains."""
    config_module.check_architecture(config, tuple(CORES))


def check(config: Mapping[str, Any]) -> None:
    """Raise InvalidConfig or UnsupportedGrowth for a Hugging Face config that no core can be built from."""
    check_architecture(config)
    if typed(config)["model_type"] == "bert":
        BertConfig.from_hf(config)
        return
    table_for(config).axis_sizes(config)
    named = {**config, "architectures": [class_of(config)]}
    import torch

    with torch.device("meta"):  # whatever the core refuses, it refuses while it is built
        _core(CORES[str(config["model_type"])]).from_hf(named)


def _core(path: str) -> type[LanguageModel]:
    module, name = path.split(".")
    found: type[LanguageModel] = getattr(import_module(f"bert2bert.model.{module}"), name)
    return found


def class_of(config: Mapping[str, Any]) -> str:
    """transformers' class of a Hugging Face config that is trained: the one that it names, or the plainest one with a
    language-model head. Raises InvalidConfig for a class without such a head, UnsupportedGrowth without a table."""
    table = table_for(typed(config))
    trained = [name for name, heads in table.names.classes.items() if "lm" in heads]
    named = config.get("architectures") or [min(trained, key=lambda name: len(table.names.classes[name]))]
    if found := [name for name in named if name in trained]:
        return found[0]
    raise InvalidConfig(
        f"model config: architectures is {named!r}, expected one of {', '.join(trained)}; for another class (a bare "
        "model, a classifier) set the one whose head should be pre-trained"
    )


def objective_of(config: Mapping[str, Any]) -> str:
    """What the language-model head of a config's architecture predicts: "masked", tokens hidden from an encoder;
    "causal", the next token; "seq2seq", what an encoder-decoder writes. Raises UnsupportedGrowth without a table."""
    classes = table_for(typed(config)).names.classes
    if any("decoder" in heads for heads in classes.values() if "lm" in heads):
        return "seq2seq"
    return "masked" if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in classes) else "causal"


def outline(config: Mapping[str, Any]) -> LanguageModel:
    """The model of a Hugging Face config that names its class, without values: its parameters are on the meta device,
    its buffers are real. transformers' own forward pass computes what the architecture's core does not. Raises
    InvalidConfig."""
    from bert2bert.model.modules import Unallocated, unfilled  # not at the top: it imports torch

    with Unallocated(), unfilled():
        try:
            return _core(CORES[str(config["model_type"])]).from_hf(config)
        except InvalidConfig:
            return _core(HOSTED).from_hf(config)


def build(
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    *,
    compile_layers: bool = False,
    opened: Opened | None = None,
) -> LanguageModel:
    """A freshly initialised model from a Hugging Face config, in ``dtype`` (default float32).

    The language-model head is that of ``architectures``, or of the architecture's usual class. The weights follow from
    torch's random state alone. compile_layers: compile one Transformer block with torch.compile and reuse it for all
    layers and every layer program; meant for a GPU. opened: the model is made on the meta device, and its parameters
    are opened for their first values, those of one module at a time: no moment needs the whole model (ZeRO-3).
    Raises InvalidConfig.
    """
    import torch

    from bert2bert.model.modules import unfilled  # not at the top: it imports torch

    check_architecture(config)  # what else is wrong, the core refuses while it is built
    core = _core(CORES[str(typed(config)["model_type"])])
    state = torch.get_rng_state()
    with nullcontext() if opened is None else unfilled():
        model = core.from_hf({**config, "architectures": [class_of(config)]})
    torch.set_rng_state(state)  # torch's modules draw while they are made, unless on the meta device
    model.initialise(opened)
    if compile_layers:
        model.compile_layers()
    return model if dtype is None else model.to(dtype)
