"""Compiled blocks: one compilation for each kind of block and autograd setting, whatever the depth and the packing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from bert2bert.model import attention, registry
from bert2bert.model.batch import Batch
from tests import tiny
from tests.model.test_cores import flat
from tests.steps import some

DEEP = {"modernbert": {"num_hidden_layers": 7}, "gpt2": {"n_layer": 5, "n_positions": 24}}
KINDS = {"modernbert": 3}  # without a norm before its attention, global, local


class Graphs:
    """A backend that runs what it is given as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@contextmanager
def dynamo() -> Iterator[Any]:
    """torch's counters of this compilation alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:  # fmt: skip
    """What torch's variable-length kernel computes, in the shapes that it is given."""
    place = torch.arange(len(query))
    owner = torch.bucketize(place, cu_seq_q[1:], right=True)
    ahead = place - place[:, None]
    before, after = (max_q if side < 0 else side for side in window_size)
    seen = (owner[:, None] == owner) & (ahead <= after) & (ahead >= -before)
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


def row(*lengths: int) -> Batch:
    """24 tokens in documents of these lengths, in the static shapes that the loader makes."""
    batch = flat(lengths)
    offsets = torch.full((9,), 24, dtype=torch.int32)
    offsets[: len(lengths) + 1] = batch.cu_seqlens
    return replace(batch, cu_seqlens=offsets, max_seqlen=24, lengths=np.array(lengths))


@pytest.mark.parametrize("name", ["roberta", "modernbert", "gpt2", "qwen3", "mistral"])
def test_each_kind_of_block_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the kernel, as on a GPU: no graph break, and nothing is compiled again when packing or depth varies."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    monkeypatch.setattr(attention, "uses_kernel", lambda *_, **__: True)
    attention._kernel.cache_clear()
    config = tiny.config_of(name, **DEEP.get(name, {"num_hidden_layers": 5, "max_position_embeddings": 26}))
    torch.manual_seed(3)
    core = registry.build(config)
    plain = registry.build(config)
    plain.load_weights(core.state_dict())
    graphs, kinds = Graphs(), KINDS.get(name, 1)
    depth = len(core.layers)
    top = some(run=tuple(range(depth)), learn=(depth - 2, depth - 1), embeddings_learn=False)
    with dynamo() as counters:
        core.compile_layers(graphs)
        core(row(24)).loss.backward()
        first = graphs.count
        for batch in (row(7, 1, 9, 7), row(12, 12), row(1, 23), row(*[3] * 8)):
            assert torch.equal(core(batch).loss, plain(batch).loss)
            core(batch).loss.backward()
        assert graphs.count == first
        core(row(24), top).loss.backward()
        settled = graphs.count
        for batch in (row(2, 22), row(8, 8, 8)):
            core(batch, top).loss.backward()
            core(batch).loss.backward()
        assert graphs.count == settled
        assert not counters["graph_break"], dict(counters["graph_break"])
    others = first - kinds  # the loss, and what compiles beside the blocks
    assert 0 <= others <= 1 and settled - first <= 2 * kinds
    attention._kernel.cache_clear()


@pytest.mark.parametrize("name", ["modernbert", "qwen3"])
def test_torchs_own_kernel_is_traced_whole(name: str) -> None:
    """With the plan of a GPU, the real kernel stands in the one graph of a block. It cannot run here."""
    call = attention._kernel()
    if call is None:
        pytest.skip("this torch has no variable-length kernel")
    core, found = registry.build(tiny.config_of(name)), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(graph)
        raise RuntimeError("seen")

    batch = row(7, 1, 9, 7)
    layer, x = core.layers[1], core.embed(batch)
    span = getattr(layer, "attn", getattr(layer, "self_attn", None)).span
    plan = attention.Kernel(call, attention._options(span))
    shared = core.shared(x, batch)._replace(plan=plan, local_plan=plan)
    with dynamo(), pytest.raises(Exception, match="seen"):
        torch.compile(layer, backend=backend, fullgraph=True)(x, shared)
    (graph,) = found
    assert sum("varlen_attn" in str(node.target) for node in graph.graph.nodes) == 1
