"""What a batch costs in FLOPs, and what a GPU could do. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bert2bert.model.program import Step
from bert2bert.tables.flops import Flops, Work

if TYPE_CHECKING:
    from bert2bert.model.batch import Batch


def step_flops(flops: Flops, batch: Batch, step: Step) -> int:
    """Forward and backward FLOPs of a batch under a step; flops: of the model."""
    written = () if batch.decoder is None else batch.decoder.lengths
    work = Work(batch.lengths, int((batch.labels >= 0).sum()), written)
    return flops.step(work, step.run, step.learn)


# Dense 16-bit tensor-core peaks (no sparsity), TFLOP/s, from NVIDIA's data sheets, and whether the GPU has bf16. The
# first name found in the device's name counts, so the more special one comes first.
_PEAKS: tuple[tuple[str, float, bool], ...] = (
    ("B200", 2250, True),
    ("H200 NVL", 835, True),
    ("GH200", 989, True),
    ("H200", 989, True),
    ("H100 PCIe", 756, True),
    ("H100 NVL", 835, True),
    ("H100", 989, True),
    ("A100", 312, True),
    ("A30", 165, True),
    ("L40S", 362, True),
    ("V100-PCIE", 112, False),
    ("V100", 125, False),
    ("T4", 65, False),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Nominal dense peak in FLOP/s of a GPU (torch.cuda.get_device_name) in "bf16" or "fp16"; None where not known.

    "fp32" is not known (it depends on whether TF32 is on), nor is a slice of a GPU (MIG).
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for name, tera, has_bf16 in _PEAKS:
        key = name.replace("-", " ").split()
        if any(words[i : i + len(key)] == key for i in range(len(words))):
            return tera * 1e12 if dtype == "fp16" or (dtype == "bf16" and has_bf16) else None
    return None
