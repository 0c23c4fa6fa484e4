"""The target of a growth or a resharding: what the options of the command line ask for, checked when it is made.

Refuses, as InvalidConfig, options that the format lacks or cannot use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.errors import InvalidConfig, did_you_mean

FORMATS = ("universal", "zero", "hub")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Target:
    """The options of a target, each by the name of its option (``tag``: --target-tag). Raises InvalidConfig."""

    format: str = "universal"
    """One of `FORMATS`."""
    stage: int | None = None
    """ZeRO stage of native shards, 0 to 3."""
    world_size: int | None = None
    """Data-parallel ranks of native shards; stage 0 fits any number."""
    expert_parallel: int | None = None
    """Ranks that share a mixture's experts, in native shards of stages 1 and 2; None: experts are not split."""
    precision: str | None = None
    """fp32, bf16 or fp16; None: the source's."""
    groups: str | None = None
    """Optimizer groups: one of `groups.LAYOUTS`, or source; None: as the source's are known to be."""
    shard_size: int | None = None
    """Largest weights file of a Hugging Face folder, in bytes; None: 5 GB."""
    tag: str | None = None
    """Name of the checkpoint's folder; None: the source's."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InvalidConfig(f"there is no checkpoint format {self.format!r}; {did_you_mean(self.format, FORMATS)}")
        if self.format == "zero":
            self._check_ranks()
        elif self.stage is not None or self.world_size is not None:
            raise InvalidConfig(
                f"--stage and --world-size belong to --format zero, not to --format {self.format}; leave them out"
            )
        if self.expert_parallel is not None and self.stage not in (1, 2):
            raise InvalidConfig(
                f"--expert-parallel belongs to --format zero --stage 1 or 2, not to --format {self.format}"
                f"{'' if self.stage is None else f' --stage {self.stage}'}: DeepSpeed splits experts in other ways "
                "there, which are not written. Choose one of these stages, or leave it out."
            )
        if self.format == "hub" and self.groups is not None:
            raise InvalidConfig("--groups: a Hugging Face folder holds no optimizer groups; leave it out")
        if self.format != "hub" and self.shard_size is not None:
            raise InvalidConfig(f"--shard-size belongs to --format hub, not to --format {self.format}; leave it out")
        if self.tag is not None:
            self._check_tag(self.tag)

    def _check_ranks(self) -> None:
        if self.stage is None or (self.world_size is None and self.stage):
            raise InvalidConfig(
                "--format zero needs --stage 0|1|2|3 and, except for stage 0, --world-size N: native shards are "
                "written for one stage and one number of data-parallel ranks.\nThe default --format universal fits any."
            )
        if self.stage not in (0, 1, 2, 3):
            raise InvalidConfig(f"--stage is {self.stage}; expected a ZeRO stage: 0, 1, 2 or 3")
        if self.world_size is not None and self.world_size < 1:
            raise InvalidConfig(
                f"--world-size is {self.world_size}; expected at least 1, the number of data-parallel ranks"
            )

    def _check_tag(self, tag: str) -> None:
        if self.format == "hub":
            raise InvalidConfig("--target-tag: a Hugging Face folder has no tags; leave it out")
        taken = (".", "..", "latest", "latest_universal", MANIFEST)
        if not tag.strip() or "/" in tag or "\0" in tag or tag in taken or tag.endswith(".partial"):
            raise InvalidConfig(f"--target-tag is {tag!r}; expected the name of a folder, such as global_step100")

    @property
    def ranks(self) -> int | None:
        """Data-parallel ranks that the files are written for: those of stage 0 say one where no number was given."""
        return 1 if self.stage == 0 and self.world_size is None else self.world_size


def file_bytes(text: str) -> int:
    """A size such as 5GB, 200MB or 1000000 in bytes. Raises InvalidConfig."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 1)) if match else 0
    if size < 1:
        raise InvalidConfig(f"--shard-size is {text!r}; expected a size such as 5GB, 200MB or 1000000 (bytes)")
    return size
