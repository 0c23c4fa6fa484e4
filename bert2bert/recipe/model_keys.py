"""The keys that the config of a recipe's model may have, and their types: BERT's own, or transformers' of a model type.

Refuses (`InvalidConfig`) the config of an architecture that no core trains. Imports torch only for another model type
than BERT's, with transformers' config classes.
"""

from __future__ import annotations

from typing import Any, get_args

from bert2bert.model import registry

MODEL_KEYS: dict[str, Any] = {
    "model_type": str,
    "architectures": list[str],
    "vocab_size": int,
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "type_vocab_size": int,
    "hidden_act": str,
    "hidden_dropout_prob": float,
    "attention_probs_dropout_prob": float,
    "layer_norm_eps": float,
    "initializer_range": float,
    "tie_word_embeddings": bool,
    "pad_token_id": int | None,
}


def model_keys(model: Any) -> dict[str, Any]:
    """The keys that the config of a recipe's model may have, by its model_type, and their types."""
    if not isinstance(model, dict):
        return {}
    registry.check_architecture(model)  # or the keys of another would be taken for misspelt ones
    if (kind := registry.typed(model)["model_type"]) == "bert":
        return MODEL_KEYS
    from bert2bert.model.settings import keys_of  # imports transformers, and with it torch: only for what needs them

    return {key: _plain_type(tp) for key, tp in keys_of(kind).items()}


def _plain_type(tp: Any) -> Any:
    """A type that transformers declares for a config's key, as far as `settings.build` knows it; else Any."""
    options = set(get_args(tp) or (tp,)) - {type(None)}
    plain = float if options == {int, float} else options.pop() if len(options) == 1 else Any
    if plain not in (int, float, str, bool):
        return Any
    return plain | None if type(None) in get_args(tp) else plain
