"""A config with other sizes, and how many parameters its model has. Imports no torch.

Refuses (`InvalidConfig`) sizes that the architecture cannot have.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from bert2bert.tables import table_for


def count(config: Mapping[str, Any], heads: frozenset[str]) -> int:
    """How many parameters the model of a config has."""
    return sum(prod(p.shape) for p in table_for(config).parameters(config, heads).values())


def with_sizes(config: Mapping[str, Any], changes: Mapping[str, int]) -> dict[str, Any]:
    """The config with other sizes of some axes; a list of layers' kinds goes on as it repeats. Keys that it does not
    need stay as they are. Raises InvalidConfig."""
    table = table_for(config)
    made = table.resize(config, changes)
    key = table.compatible.kinds
    kinds = made.get(key) if key else None
    if isinstance(kinds, list) and kinds and len(kinds) != (layers := table.axis_sizes(made)[table.sizes.depth[0]]):
        made[key] = [_periodic(kinds, i) for i in range(layers)]
    sizes = table.axis_sizes(made)
    for unset in [key for key in made if config.get(key) is None]:
        plain = {k: v for k, v in made.items() if k != unset} | ({unset: None} if unset in config else {})
        if table.axis_sizes(plain) == sizes:
            made = plain
    return made


def _periodic(kinds: list[Any], index: int) -> Any:
    """The entry at an index of a list that is continued with its shortest period."""
    period = next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))
    return kinds[index % period]
