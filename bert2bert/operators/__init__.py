"""Growth operators: importing this package registers all of them in `registry.OPERATORS`."""

from bert2bert.operators import depth, learned, width

__all__ = ["depth", "learned", "width"]
