"""Fresh weights under ZeRO-3: each parameter is partitioned as soon as it has its first value, so no rank ever holds
more of a new model than one module.

Every rank draws the same float32 numbers as at the other stages, one module after the other; they are rounded to the
engine's precision and cut into the ranks' pieces. The float32 master weights begin as what the pieces hold, at every
stage: in 16 bits, as rounded draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.runtime.zero.partition_parameters import Init
from torch import Tensor, nn

from bert2bert.model.core import Opened
from bert2bert.ranks.distributed import RANKS
from bert2bert.train import ds_config as configs

if TYPE_CHECKING:
    from bert2bert.recipe import Recipe


def opened(recipe: Recipe, ds_config: Mapping[str, Any]) -> Opened | None:
    """How `registry.build` fills a model that no rank shall hold whole: at ZeRO-3; None at the other stages.

    ``ds_config``: as for `engine.build`; the process group must be there (`engine.start`). Raises InvalidConfig for an
    option that is refused.
    """
    settings = configs.resolve(dict(ds_config), recipe, RANKS.size)
    if configs.stage(settings) < 3:
        return None
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[configs.precision(settings)]
    init = Init(module=nn.Module(), config_dict_or_path=settings, dtype=dtype)

    @contextmanager
    def filled(parameters: Sequence[Tensor]) -> Iterator[None]:
        for parameter in parameters:
            whole = nn.Parameter(torch.empty(parameter.shape), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, whole)  # the same object, for all of its owners
        yield
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        init._convert_to_zero_parameters(parameters)

    return filled
