"""Growth operators: importing this package registers all of them in `registry.OPERATORS`."""

from bert2bert.operators import copying, depth, experts, learned, levels, padding, published, sharing, vocab, width

__all__ = ["copying", "depth", "experts", "learned", "levels", "padding", "published", "sharing", "vocab", "width"]
