"""A Hugging Face config as transformers itself completes and checks it, and the keys that its model type has.

For every architecture but BERT, whose config this project reads itself (`config.BertConfig`). transformers imports
torch with its config classes, so this happens only when it is asked for.

Refuses (`InvalidConfig`): a model type that the installed transformers does not know, keys that are almost one of its
config's, dropout rates that are none, and whatever its own checks refuse. Other keys are carried along and not read, as
transformers does: files have many.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.tables import TABLES
from bert2bert.tables.rope import OLD_KEYS

_OF_FILES = (
    "_name_or_path", "torch_dtype", "torchscript", "use_bfloat16", "num_labels", "n_ctx", "head_dim",
    "gradient_checkpointing", "position_embedding_type", "layer_norm_eps", "reference_compile",
    "repad_logits_with_grad",
)  # fmt: skip
"""Other keys of config.json files, old and new, that say nothing about the function (or the table refuses it)."""


def keys_of(model_type: str) -> dict[str, Any]:
    """The keys of a model type's config and the types that transformers declares for them, as it writes them."""
    from transformers import GenerationConfig  # whose keys older config.json files hold

    cls = _class(model_type)
    declared = {f.name: f.type for f in fields(cls)}
    # the key of a period is read by transformers, and written again
    every = TABLES[model_type].compatible.every[0] if model_type in TABLES else ""
    other = (*cls().to_dict(), *cls.attribute_map, *GenerationConfig().to_dict(), *_OF_FILES, *OLD_KEYS, every)
    return {**declared, **{key: Any for key in other if key not in declared}}


def settings_of(config: Mapping[str, Any]) -> Any:
    """transformers' config object of a Hugging Face config. Raises InvalidConfig."""
    kind = str(config.get("model_type"))
    absent = keys_of(kind).keys() - config.keys()
    for key in config.keys() - keys_of(kind).keys():
        if misspelt := get_close_matches(key, absent, n=1, cutoff=0.92):
            raise InvalidConfig(f"model config: unknown key {key!r} of a {kind}; did you mean {misspelt[0]!r}?")
    for key, value in config.items():
        if "drop" in key and isinstance(value, int | float) and not 0 <= value < 1:
            raise InvalidConfig(f"model config: {key} is {value!r}, expected a number from 0 to below 1")
    try:
        found = _class(kind).from_dict(copy.deepcopy(dict(config)))
    except Exception as error:  # its validators raise what they like
        raise InvalidConfig(f"model config: transformers refuses it as a {kind}: {error}") from error
    found._attn_implementation = "sdpa"
    return found


def _class(model_type: str) -> Any:
    import transformers

    try:
        return transformers.CONFIG_MAPPING[model_type]
    except KeyError:
        raise InvalidConfig(
            f"model config: transformers {transformers.__version__} knows no model_type {model_type!r}; "
            + did_you_mean(model_type, list(transformers.CONFIG_MAPPING))
        ) from None
