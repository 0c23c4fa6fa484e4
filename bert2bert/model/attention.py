"""Self-attention over flat, packed tokens, full, causal or within a window: one dispatcher, two ways to compute it.

* The variable-length flash kernel of torch (`torch.nn.attention.varlen`): CUDA of compute capability 8.0 or newer, bf16
  or fp16, head size a multiple of 8 up to 256, no dropout on the attention probabilities (the kernel has none).
* Padded `scaled_dot_product_attention`: everywhere else, and the reference. Sequences of similar length are spread to
  [sequences, longest of them], masked and gathered back; sequences of one common length need neither.

Dropout on the attention probabilities in training therefore costs the fast kernel on a GPU; this is warned about once.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_GROUPS = 8  # of sequences that are padded alike
_KERNEL_ARGUMENTS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")


Span = tuple[int, int]
"""Which tokens of its sequence a token sees: so many before and so many after it, beside itself; -1: all of them."""

FULL: Span = (-1, -1)
CAUSAL: Span = (-1, 0)


class Group(NamedTuple):
    """Sequences of about one length: `rows` of `length` slots. mask: bool, broadcasts to [rows, 1, length, length],
    True where a query (third dim) sees a key; None where all see all, and for `CAUSAL`, which lets no token see the
    padding behind it."""

    length: int
    rows: int
    mask: Tensor | None


class Padding(NamedTuple):
    """How flat tokens spread to the slots of groups, one group behind the other. slots: int64 [T], the slot of each
    token; None where every token is in its slot already."""

    groups: tuple[Group, ...]
    slots: Tensor | None


class Kernel(NamedTuple):
    """The variable-length kernel, and the keyword arguments by which it keeps to a span."""

    call: Callable[..., Tensor]
    options: dict[str, Any]


Plan = Padding | Kernel
"""How attention is computed: made once a forward (`plan_for`), used by every layer of a span."""


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """torch's varlen_attn, to be called with its seven positional arguments, or None where torch has no such kernel.

    Those seven have been the same since torch 2.10; what follows them changes between releases (`is_causal` gave way to
    `window_size`, `enable_gqa` came), but full attention is the default in all of them.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = list(inspect.signature(varlen_attn).parameters.values())
    rest = parameters[len(_KERNEL_ARGUMENTS) :]
    if tuple(p.name for p in parameters[: len(_KERNEL_ARGUMENTS)]) == _KERNEL_ARGUMENTS and all(
        p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in rest
    ):
        return varlen_attn
    warnings.warn(
        f"torch {torch.__version__} changed varlen_attn to {inspect.signature(varlen_attn)}, which this version of "
        "bert2bert does not know: using padded attention, which is slower",
        stacklevel=2,
    )
    return None


@functools.cache
def _warn_dropout() -> None:
    warnings.warn(
        "attention dropout > 0 in training: the variable-length kernel has no dropout, using padded attention, which "
        "is slower; set it to 0 in the model's config for the fast kernel",
        stacklevel=3,
    )


@functools.cache
def _flash_device(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def _names() -> tuple[str, ...]:
    """The kernel's arguments; none where there is no kernel."""
    kernel = _kernel()
    return () if kernel is None else tuple(inspect.signature(kernel).parameters)


def uses_kernel(
    device: torch.device, dtype: torch.dtype, head_size: int, dropout_p: float, training: bool, span: Span = FULL
) -> bool:
    """Whether `attend` takes the variable-length kernel for such queries, else padded attention."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_size > 256 or head_size % 8:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if not _flash_device(index) or _kernel() is None:
        return False
    if span != FULL and "window_size" not in _names() and (span != CAUSAL or "is_causal" not in _names()):
        return False
    if training and dropout_p > 0:
        _warn_dropout()
        return False
    return True


def plan_padding(
    cu_seqlens: Tensor, max_seqlen: int, tokens: int, span: Span = FULL, *, one_group: bool = False
) -> Padding:
    """The padding of `tokens` flat tokens; computed once per forward and used by every layer of that span.

    Sequences of similar length share a group, so that a short one is not padded to the longest; one_group: all are
    padded alike, which keeps the structure that compiled code sees. Empty sequences (the repeated tail of cu_seqlens)
    take no row. Reads the lengths from the device unless the counts alone show that all sequences are of equal length.
    Raises ValueError when cu_seqlens does not describe the tokens.
    """
    device = cu_seqlens.device
    if device.type != "cpu" and (cu_seqlens.numel() - 1) * max_seqlen == tokens:
        # S sequences of at most max_seqlen make up S * max_seqlen tokens; on the CPU reading and checking costs nothing
        return Padding((Group(max_seqlen, cu_seqlens.numel() - 1, _within(max_seqlen, span, device)),), None)
    lengths = cu_seqlens.long().diff()
    lengths = lengths[lengths != 0]
    sizes = lengths.tolist()
    if not sizes or sum(sizes) != tokens or min(sizes) < 0 or max(sizes) > max_seqlen:
        raise ValueError(
            f"cu_seqlens describes {len(sizes)} sequences of lengths {sizes[:8]}{'…' * (len(sizes) > 8)}, {sum(sizes)} "
            f"tokens in all; expected {tokens} tokens in sequences of at most max_seqlen {max_seqlen}"
        )
    if min(sizes) == max(sizes):
        return Padding((Group(sizes[0], len(sizes), _within(sizes[0], span, device)),), None)
    begins, groups, base = [0] * len(sizes), [], 0
    for members in [list(range(len(sizes)))] if one_group else _similar(sizes):
        length = max(sizes[i] for i in members)
        for row, i in enumerate(members):
            begins[i] = base + row * length
        base += len(members) * length
        mask = _mask(lengths[torch.tensor(members, device=device)], length, span)
        groups.append(Group(length, len(members), mask))
    within = torch.arange(tokens, device=device) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    first = torch.tensor(begins, device=device)
    return Padding(tuple(groups), torch.repeat_interleave(first, lengths, output_size=tokens) + within)


def _similar(sizes: list[int]) -> list[list[int]]:
    """Sequence numbers by length, longest first: the shortest of a group has more than 3/4 of the longest's length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and (4 * sizes[i] > 3 * sizes[groups[-1][0]] or len(groups) == _GROUPS):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _mask(lengths: Tensor, length: int, span: Span) -> Tensor | None:
    """Who sees whom in rows of `length` slots that hold sequences of these lengths."""
    near = _within(length, span, lengths.device)
    if not span[1] or bool((lengths == length).all()):  # where none looks ahead, padding, which comes last, is unseen
        return near
    mask = (torch.arange(length, device=lengths.device) < lengths[:, None])[:, None, None, :]
    if near is None:
        return mask
    # a slot of padding that saw no token at all would make gradients that are not numbers
    return near & (mask | torch.eye(length, dtype=torch.bool, device=lengths.device))


def _within(length: int, span: Span, device: torch.device) -> Tensor | None:
    """bool [length, length]: True where a query (row) sees a key; None where a mask is not needed."""
    before, after = (length if side < 0 else side for side in span)
    if before >= length - 1 and (after >= length - 1 or after == 0):
        return None
    place = torch.arange(length, device=device)
    ahead = place - place[:, None]
    return (ahead <= after) & (ahead >= -before)


def plan_for(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_size: int,
    dropout_p: float,
    training: bool,
    span: Span = FULL,
    *,
    one_group: bool = False,
) -> Plan:
    """What the layers of one forward share.

    x: [T, hidden], what enters the layers; under autocast its dtype is not that of the queries. Planned outside of the
    layers, so that compiled ones hold no data-dependent shape and ask nothing of the device.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    kernel = _kernel()
    if kernel is not None and uses_kernel(x.device, dtype, head_size, dropout_p, training, span):
        return Kernel(kernel, _options(span))
    return plan_padding(cu_seqlens, max_seqlen, x.shape[0], span, one_group=one_group)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    training: bool = False,
    plan: Plan | None = None,
    span: Span = FULL,
) -> Tensor:
    """softmax(q kᵀ / √d) v inside each sequence; a token sees those tokens of its own sequence that `span` says.

    q: [T, heads, d], k, v: [T, key-value heads, d], flat tokens; query head i reads key-value head i // (heads /
    key-value heads). cu_seqlens: int32 [S + 1], offsets from 0 to T, the tail may repeat T. max_seqlen: no sequence is
    longer. dropout_p: on the attention probabilities, in training only. plan: what `plan_for` or `plan_padding` gives
    for the same span, where the caller has it.
    Returns [T, heads, d]. Raises ValueError when cu_seqlens does not describe the tokens.
    """
    if plan is None:
        plan = plan_for(q, cu_seqlens, max_seqlen, q.shape[-1], dropout_p, training, span)
    if isinstance(plan, Padding):
        return _padded(q, k, v, plan, dropout_p if training else 0.0, span)
    if (group := q.shape[1] // k.shape[1]) > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return plan.call(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **plan.options)


def _options(span: Span) -> dict[str, Any]:
    """The keyword arguments by which the kernel of the installed torch keeps to a span."""
    if span == FULL:
        return {}
    return {"window_size": span} if "window_size" in _names() else {"is_causal": True}


def _padded(q: Tensor, k: Tensor, v: Tensor, padding: Padding, dropout_p: float, span: Span) -> Tensor:
    groups, slots = padding
    total = sum(group.length * group.rows for group in groups)

    def spread(x: Tensor) -> tuple[Tensor, ...]:
        if slots is not None:
            x = x.new_zeros(total, *x.shape[1:]).index_copy(0, slots, x)
        return x.split([group.length * group.rows for group in groups])

    def within(group: Group, *inputs: Tensor) -> Tensor:
        queries, keys, values = (x.reshape(-1, group.length, *x.shape[1:]).transpose(1, 2) for x in inputs)
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, dropout_p=dropout_p,
            is_causal=group.mask is None and not span[1], enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.transpose(1, 2).reshape(-1, *q.shape[1:])

    parts = [within(group, *inputs) for group, *inputs in zip(groups, spread(q), spread(k), spread(v), strict=True)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out if slots is None else out.index_select(0, slots)
