"""Growth operators: importing this package registers all of them in `registry.OPERATORS`."""

from bert2bert.operators import (
    depth,
    depth_unshare,
    embeddings,
    experts,
    shrinking,
    vocab,
    width_bert2bert,
    width_copies,
    width_ligo,
    width_padding,
    width_scaled,
)

__all__ = [
    "depth",
    "depth_unshare",
    "embeddings",
    "experts",
    "shrinking",
    "vocab",
    "width_bert2bert",
    "width_copies",
    "width_ligo",
    "width_padding",
    "width_scaled",
]
