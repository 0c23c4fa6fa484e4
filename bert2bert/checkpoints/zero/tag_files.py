"""Which files a tag's folder has, by DeepSpeed's names for them.

Refuses, as InvalidCheckpoint: files of tensor or pipeline parallel runs, of split experts at stage 0, shards of two
runs in one tag, and missing ranks.
"""

from __future__ import annotations

import re
from pathlib import Path

from bert2bert.errors import InvalidCheckpoint, some

MODEL = "mp_rank_00_model_states.pt"
_OPTIM = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_\d+_expert_\d+_mp_rank_(\d+)_model_states\.pt")
_EXPERTS_STAGE0 = re.compile(r"expp_rank_\d+_mp_rank_\d+_optim_states\.pt")


def find_files(folder: Path) -> tuple[list[Path], list[Path], bool]:
    """Model-states files and optimizer files in rank order, and whether the optimizer files are named as bf16's."""
    names = sorted(p.name for p in folder.iterdir() if p.name.endswith("_states.pt"))
    if whole := [n for n in names if _EXPERTS_STAGE0.fullmatch(n)]:
        raise InvalidCheckpoint(
            f"{folder}: {whole[0]} is of an expert-parallel run of ZeRO stage 0, whose optimizer state has no names, "
            "which this program does not read. Save it from a run with ZeRO stage 1 or 2."
        )
    known = [m for n in names if (m := _OPTIM.fullmatch(n) or _MODEL3.fullmatch(n) or _EXPERT.fullmatch(n))]
    strange = sorted({*names} - {m[0] for m in known} - {MODEL})
    parallel = [m[0] for m in known if int(m[m.lastindex or 0])]
    if strange or parallel:
        first = (strange or parallel)[0]
        kind = "tensor-parallel expert" if _EXPERT.fullmatch(first) else "tensor or pipeline parallel"
        raise InvalidCheckpoint(
            f"{folder}: {first} is a file of a {kind} run, which this program does not read. "
            "Merge the model first (DeepSpeed's zero_to_fp32.py, then save_pretrained)."
        )
    optim = [m for n in names if (m := _OPTIM.fullmatch(n))]
    model3 = [m for n in names if (m := _MODEL3.fullmatch(n))]
    if len({m[1] for m in optim}) > 1 or (model3 and MODEL in names):
        mixed = "bf16 and other" if not (model3 and MODEL in names) else "ZeRO-3 and other"
        raise InvalidCheckpoint(f"{folder}: {mixed} shards are mixed in one tag. Remove those of the other run.")
    models = sorted((int(m[1]), folder / m[0]) for m in model3) or [(0, folder / MODEL)] * (MODEL in names)
    shards = sorted((int(m[2]), folder / m[0]) for m in optim)
    if not models:
        raise InvalidCheckpoint(f"{folder}: no *_model_states.pt; a shard file is missing or the copy is incomplete")
    for kind, found in (("model-states", models), ("optimizer", shards)):
        absent = sorted(set(range(found[-1][0] + 1)) - {r for r, _ in found}) if found else []
        if absent:
            raise InvalidCheckpoint(
                f"{folder}: the {kind} files of ranks {some(absent, 8)} are missing. Copy all ranks."
            )
    return [p for _, p in models], [p for _, p in shards], any(m[1] for m in optim)


def expert_files(folder: Path) -> list[Path]:
    """The files of single experts that an expert-parallel run wrote, if it is one."""
    return sorted(path for path in folder.iterdir() if _EXPERT.fullmatch(path.name))
