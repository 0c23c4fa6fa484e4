"""The dispatcher: padded attention against the formula, its fast path, its refusals, and when the kernel is taken."""

from __future__ import annotations

import types
import warnings

import pytest
import torch

from bert2bert.model import attention
from bert2bert.model.attention import CAUSAL, FULL, attend, plan_padding, uses_kernel
from tests.rounding import ROUNDING, allowed, gap


def flat(lengths: list[int], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    return q, k, v, torch.tensor([0, *lengths]).cumsum(0).int()


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, span: tuple[int, int] = FULL
) -> torch.Tensor:
    rows = []
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        a, b, c = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        b, c = (x.repeat_interleave(a.shape[0] // x.shape[0], dim=0) for x in (b, c))
        ahead = torch.arange(stop - start) - torch.arange(stop - start)[:, None]
        before, after = (stop if side < 0 else side for side in span)
        seen = (ahead <= after) & (ahead >= -before)
        scores = (a @ b.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        rows.append((torch.softmax(scores, -1) @ c).transpose(0, 1))
    return torch.cat(rows)


SPANS = [FULL, CAUSAL, (2, 0), (20, 0), (2, 2), (1, 3), (30, 30)]


@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("lengths", [[5, 1, 9, 8, 20, 3, 2], [7, 7], [3, 6, 0, 0]])
@pytest.mark.parametrize("one_group", [False, True])
def test_spans_and_grouped_heads(span: tuple[int, int], lengths: list[int], one_group: bool) -> None:
    """Causal and windowed attention with 4 query heads on 2, sequences padded by groups or all alike; gradients too."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, 8, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    padding = plan_padding(cu, max(lengths), len(q), span, one_group=one_group)
    assert len(padding.groups) == 1 or not one_group
    found, expected = attend(q, k, v, cu, max(lengths), plan=padding, span=span), formula(q, k, v, cu, span)
    assert gap(found, expected, allowed(lambda: formula(q, k, v, cu, span))) <= ROUNDING
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((formula(q, k, v, cu, span) * weight).sum(), (q, k, v))

    assert all(gap(*parts) <= ROUNDING for parts in zip(ours, slopes(), allowed(slopes), strict=True))


def test_short_sequences_are_not_padded_to_long_ones() -> None:
    cu = torch.tensor([0, 100, 104, 107, 110, 186]).int()
    groups = plan_padding(cu, 128, 186).groups
    assert [(group.length, group.rows) for group in groups] == [(100, 2), (4, 1), (3, 2)]
    many = torch.tensor([0, *(2**i for i in range(12))]).cumsum(0).int()
    assert len(plan_padding(many, 2048, int(many[-1])).groups) == 8


@pytest.mark.parametrize("lengths", [[5, 1, 9], [4, 4, 4], [7], [3, 6, 0, 0], [4, 4, 0]])
@pytest.mark.parametrize("slack", [0, 5])
def test_padded_is_the_formula(lengths: list[int], slack: int) -> None:
    """Unequal and equal lengths, empty sequences at the end, max_seqlen exact or only an upper bound."""
    q, k, v, cu = flat(lengths)
    found, expected = attend(q, k, v, cu, max(lengths) + slack), formula(q, k, v, cu)
    assert gap(found, expected, allowed(lambda: formula(q, k, v, cu))) <= ROUNDING
    weight = torch.randn_like(found)
    ours = torch.autograd.grad((found * weight).sum(), (q, k, v))

    def slopes() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((formula(q, k, v, cu) * weight).sum(), (q, k, v))

    assert all(gap(*parts) <= ROUNDING for parts in zip(ours, slopes(), allowed(slopes), strict=True))


def test_equal_lengths_take_the_fast_path_and_agree_with_the_masked_one() -> None:
    q, k, v, cu = flat([6, 6, 6])
    fast = plan_padding(cu, 6, 18)
    assert fast == (((6, 3, None),), None)
    assert plan_padding(torch.tensor([0, 6, 12, 18, 18, 18]).int(), 9, 18) == fast
    group = attention.Group(8, 3, (torch.arange(8) < 6).expand(3, 1, 1, 8))
    masked = attention.Padding((group,), torch.arange(18) + 2 * (torch.arange(18) // 6))
    a, b = (attend(q, k, v, cu, 6, plan=padding) for padding in (fast, masked))
    assert gap(a, b, allowed(lambda: formula(q, k, v, cu))) <= ROUNDING


def test_a_sequence_sees_only_itself() -> None:
    q, k, v, cu = flat([5, 8])
    before = attend(q, k, v, cu, 8)
    with torch.no_grad():
        k[5:] += 1
        v[5:] -= 1
    after = attend(q, k, v, cu, 8)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


@pytest.mark.parametrize("cu, longest", [([0, 5, 9], 5), ([0, 5, 10], 4), ([0, 7, 5, 10], 9), ([0, 0], 5)])
def test_offsets_that_do_not_describe_the_tokens_are_refused(cu: list[int], longest: int) -> None:
    with pytest.raises(ValueError, match="expected 10 tokens in sequences of at most"):
        plan_padding(torch.tensor(cu).int(), longest, 10)


def test_dropout_only_in_training() -> None:
    q, k, v, cu = flat([5, 8])
    plain = attend(q, k, v, cu, 8)
    assert torch.equal(plain, attend(q, k, v, cu, 8, dropout_p=0.5, training=False))
    assert not torch.equal(plain, attend(q, k, v, cu, 8, dropout_p=0.5, training=True))


def test_the_kernel_is_not_for_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert not uses_kernel(cpu, torch.bfloat16, 64, 0.0, True)
    q, k, v, cu = flat([5, 8], torch.bfloat16)
    found = attend(q, k, v, cu, 8)
    assert found.dtype == torch.bfloat16
    q, k, v = (x.detach().double() for x in (q, k, v))
    limit = allowed(lambda: formula(q, k, v, cu), torch.bfloat16, spare=32)
    assert gap(found, formula(q, k, v, cu), limit) <= ROUNDING


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that the dispatcher takes for a GPU with the kernel, none being here."""
    monkeypatch.setattr(attention, "_flash_device", lambda index: True)
    attention._warn_dropout.cache_clear()
    return torch.device("cuda", 0)


def test_when_the_kernel_is_taken(ampere: torch.device) -> None:
    assert uses_kernel(ampere, torch.bfloat16, 64, 0.1, training=False)
    assert uses_kernel(ampere, torch.float16, 64, 0.0, training=True)
    assert not uses_kernel(ampere, torch.float32, 64, 0.0, training=True)
    assert not uses_kernel(ampere, torch.bfloat16, 20, 0.0, training=True)
    assert not uses_kernel(ampere, torch.bfloat16, 512, 0.0, training=True)


def test_dropout_falls_back_and_says_so_once(ampere: torch.device) -> None:
    with pytest.warns(UserWarning, match="has no dropout, using padded attention"):
        assert not uses_kernel(ampere, torch.bfloat16, 64, 0.1, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not uses_kernel(ampere, torch.bfloat16, 64, 0.1, training=True)


def fake_torch(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = function  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "torch.nn.attention.varlen", module)
    attention._kernel.cache_clear()
    monkeypatch.setattr(attention, "_flash_device", lambda index: True)


def test_kernel_signatures_of_other_torch_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth argument is_causal (2.10) and keyword-only arguments (2.12): called with the first seven alike."""
    calls = []

    def causal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        calls.append(("causal", is_causal, max_q, max_k))
        return query

    def windowed(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, window_size=(-1, -1)):
        calls.append(("windowed", window_size, max_q, max_k))
        return query

    def foreign(query, key, value, layout, max_q):
        raise AssertionError("must not be called")

    device = torch.device("cuda", 0)
    q, k, v, cu = flat([5, 8])
    try:
        for function in (causal, windowed):
            fake_torch(monkeypatch, function)
            monkeypatch.setattr(attention, "uses_kernel", lambda *_: True)
            attend(q, k, v, cu, 8)
        assert calls == [("causal", False, 8, 8), ("windowed", (-1, -1), 8, 8)]
        monkeypatch.undo()
        fake_torch(monkeypatch, foreign)
        with pytest.warns(UserWarning, match="changed varlen_attn"):
            assert not uses_kernel(device, torch.bfloat16, 64, 0.0, training=False)
    finally:
        attention._kernel.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with the variable-length kernel")
def test_kernel_against_padded_on_gpu() -> None:
    lengths = [5, 130, 64, 1, 0, 0]
    q, k, v = (torch.randn(sum(lengths), 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert uses_kernel(q.device, q.dtype, 64, 0.0, True)
    found = attend(*inputs, cu, 130)
    expected = attend(*(x.double() for x in inputs), cu, 130)
    weight = torch.randn_like(found)
    ours = found, *torch.autograd.grad((found * weight).sum(), inputs)
    theirs = expected, *torch.autograd.grad((expected * weight).sum(), inputs)
    exact = [x.detach().double().cpu().requires_grad_() for x in inputs]

    def results() -> tuple[torch.Tensor, ...]:
        out = formula(*exact, cu.cpu())
        return out, *torch.autograd.grad((out * weight.double().cpu()).sum(), exact)

    limits = allowed(results, torch.bfloat16, spare=32)
    assert all(gap(*parts) <= ROUNDING for parts in zip(ours, theirs, limits, strict=True))
