"""The table of what GPUs could do."""

from __future__ import annotations

import pytest

from bert2bert.train.compute import peak_flops


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
