"""Rotary positions as a config gives them: transformers 5's ``rope_parameters``, or what older versions wrote.

Refuses settings that are not objects (`InvalidConfig`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bert2bert.errors import InvalidConfig

OLD_KEYS = ("rope_scaling", "rope_theta", "global_rope_theta", "local_rope_theta", "partial_rotary_factor")
_NESTED = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
_FROM_CONTEXT = ("llama3", "yarn", "longrope")  # types that start from the length of pre-training


def rotary(config: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` as transformers would complete them. default: the architecture's own, by kind of layer where
    kinds differ. Raises InvalidConfig."""
    scaling, written = _object("rope_scaling", config), _object("rope_parameters", config)
    if not default.keys() <= _NESTED.keys():
        return _complete(config, scaling or written, config.get("rope_theta") or default["rope_theta"])
    return {
        kind: _complete(
            config, {**_object(kind, written), **scaling}, config.get(_NESTED[kind]) or default[kind]["rope_theta"]
        )
        for kind in default
    }


def _complete(config: Mapping[str, Any], written: Mapping[str, Any], theta: float) -> dict[str, Any]:
    found = {"rope_theta": theta, **written}
    old = found.pop("type", "default")
    found.setdefault("rope_type", old)
    if config.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if found["rope_type"] in _FROM_CONTEXT:
        found.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return found


def _object(key: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise InvalidConfig(f"model config: {key} is {found!r}; an object with rope_type and rope_theta is expected")
    return found
