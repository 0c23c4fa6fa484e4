"""The FLOP counter against torch's own, the figures of the literature, and the table of peaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bert2bert.model.config import BertConfig
from bert2bert.model.flops import forward_flops, peak_flops, step_flops
from bert2bert.model.program import LayerProgram
from tests.model.sample import batch, hf_dict, model

PROGRAMS = {
    "full": None,
    "bottom 2, top 1 learns": LayerProgram((0, 1), (1,), False),
    "all run, top 2 learn": LayerProgram((0, 1, 2), (1, 2), False),
    "one layer and embeddings": LayerProgram((0,), (0,), True),
    "head only": LayerProgram((0, 1), (), False),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_against_torch(name: str) -> None:
    """Equal lengths, for padding is work that torch counts and the mathematics does not; the math backend, because
    torch has no formula for its fused CPU kernel."""
    program = PROGRAMS[name]
    bert = model(torch.float32, architectures=["BertForMaskedLM"])
    flat = batch((10, 10, 10))
    predicted = len(flat.targets)  # the two spare places are computed as well
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = bert(flat, program).loss
        forward = counter.get_total_flops()
        loss.backward()
    arguments = (bert.config, flat.real_tokens, flat.attended, predicted, program)
    assert forward_flops(*arguments) == pytest.approx(forward, rel=0.01)
    assert step_flops(*arguments) == pytest.approx(counter.get_total_flops(), rel=0.01)


def base(**changes: int) -> BertConfig:
    return BertConfig(30522, 768, 12, 12, 3072, 512, **changes)


@pytest.mark.parametrize("length, giga", [(128, 0.545), (512, 0.588)])
def test_bert_base_per_token(length: int, giga: float) -> None:
    """The figures of the reference formula: 3 [24 L H² + 4 L s H + 0.15 · 2 (H² + V H)]."""
    tokens = 100 * length
    count = step_flops(base(), tokens, 100 * length**2, int(0.15 * tokens))
    assert count / tokens / 1e9 == pytest.approx(giga, rel=2e-3)
    assert count == 3 * forward_flops(base(), tokens, 100 * length**2, int(0.15 * tokens))


def test_bert2bert_first_stage_costs_about_three_eighths() -> None:
    """Depths 3, 6, 9, 12, top three learn: 13.5 of 36 layer units when head and stopped gradients are left out."""
    programs = [LayerProgram(tuple(range(d)), tuple(range(d - 3, d)), False) for d in (3, 6, 9, 12)]
    mean = sum(step_flops(base(), 1024, 1024 * 128, 0, p) for p in programs) / 4
    assert mean / step_flops(base(), 1024, 1024 * 128, 0) == pytest.approx(0.375, abs=0.01)


@pytest.mark.parametrize(
    "device, dtype, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA H200", "fp16", 989),
        ("NVIDIA GH200 480GB", "bf16", 989), ("NVIDIA A100-SXM4-40GB", "bf16", 312),
        ("Tesla V100-SXM2-16GB", "fp16", 125), ("Tesla V100-SXM2-16GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None), ("Tesla T4", "fp16", 65),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None), ("cpu", "bf16", None), ("NVIDIA T400", "fp16", None),
    ],
)  # fmt: skip
def test_peaks(device: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(device, dtype) == (None if tera is None else tera * 1e12)


def test_config_program_and_flops_import_no_torch() -> None:
    code = "import bert2bert.model.flops, bert2bert.model.program, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_unused_sizes_do_not_count() -> None:
    small = BertConfig.from_hf(hf_dict())
    longer = BertConfig.from_hf(hf_dict(max_position_embeddings=512, type_vocab_size=9))
    assert step_flops(small, 100, 1000, 15) == step_flops(longer, 100, 1000, 15)
