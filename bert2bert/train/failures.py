"""What a step can die of that the user can mend, said with its remedy. Anything else passes through as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bert2bert.errors import UserError


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """Turn what DeepSpeed, Triton and the device give up on into what the user can do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(
            f"the GPU is out of memory {where}. Lower train_micro_batch_size_per_gpu in the ds_config, use a higher "
            "ZeRO stage, or more ranks"
        ) from error
    except Exception as error:
        if "loss scale already at minimum" in str(error):
            raise UserError(
                f"fp16 gradients overflow at the smallest loss scale {where}: training diverged. Lower the learning "
                "rate, lengthen the warm-up, or use bf16"
            ) from error
        if "Failed to find C compiler" in str(error):
            raise UserError(
                "the layers are compiled for the GPU, and for that Triton needs a C compiler, of which there is none. "
                "Install gcc (or name one in CC), or run without compiling: TORCHDYNAMO_DISABLE=1"
            ) from error
        raise
