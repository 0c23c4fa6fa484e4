"""Failures of a run that the user can remedy, explained with the remedy. Any other error passes through as it is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import torch
import torch.distributed

from bert2bert.errors import UserError
from bert2bert.ranks import heartbeat

# gloo raises plain RuntimeErrors; NCCL's and the store's have classes of their own
_LOST = re.compile(r"gloo/|Connection (closed|reset) by peer|Socket closed|Broken pipe|NCCL error|Timed out waiting")
_SLOW = re.compile(r"[Tt]imed? ?out")


@contextlib.contextmanager
def explained(where: str, newest: Callable[[], str] = str) -> Iterator[None]:
    """Raise UserError with a remedy for errors of DeepSpeed, Triton, the device and the network.

    ``newest``: gives a sentence on the newest checkpoint and how to continue from it.
    """
    try:
        yield
    except UserError:
        raise
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
        lost = isinstance(error, RuntimeError) and _LOST.search(str(error))
        if lost or isinstance(error, torch.distributed.DistError):
            first = re.sub(r"^\[\S+:\d+\] |\. This is typically caused by .*", "", str(error).strip().splitlines()[0])
            slow = bool(_SLOW.search(first))
            what = "lost the connection to another rank"
            if slow:
                what = "waited for another rank for longer than --timeout allows"
            known = heartbeat.lost(slow) or (
                "that rank was killed, failed or hangs: its own last words, or its host's log, say why"
            )
            raise UserError(
                f"rank {os.environ.get('RANK', '0')} {what} {where} ({first}): {known}. {newest()}"
            ) from error
        raise
