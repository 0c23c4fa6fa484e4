"""A target is checked once, when it is made, and every option of the command line reaches it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

import pytest

from bert2bert.checkpoints.target import Target
from bert2bert.commands import cli
from bert2bert.commands import reshard as resharding
from bert2bert.errors import InvalidConfig

WHOLE = {
    "format": "zero", "stage": 2, "world_size": 4, "expert_parallel": 2, "precision": "bf16", "groups": "decay",
    "tag": "x",
}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"format": "Universal"}, "no checkpoint format 'Universal'; did you mean 'universal'"),
        ({"format": "zero", "world_size": 2}, "--format zero needs --stage"),
        ({"format": "zero", "stage": 1}, "except for stage 0, --world-size N"),
        ({"format": "zero", "stage": 5, "world_size": 2}, "--stage is 5; expected a ZeRO stage"),
        ({"format": "zero", "stage": 0, "world_size": 0}, "--world-size is 0; expected at least 1"),
        ({"stage": 2}, "--stage and --world-size belong to --format zero, not to --format universal"),
        ({"format": "hub", "world_size": 2}, "not to --format hub"),
        (
            {"expert_parallel": 2},
            "--format zero --stage 1 or 2, not to --format universal: DeepSpeed",
        ),
        ({**WHOLE, "stage": 3}, "not to --format zero --stage 3: DeepSpeed splits"),
        ({"format": "hub", "groups": "decay"}, "--groups: a Hugging Face folder holds no optimizer groups"),
        ({"shard_size": 1000}, "--shard-size belongs to --format hub, not to --format universal"),
        ({"format": "hub", "tag": "x"}, "--target-tag: a Hugging Face folder has no tags"),
        ({"tag": "a/b"}, "--target-tag is 'a/b'; expected the name of a folder"),
    ],
)
def test_what_no_format_has_is_refused_by_the_options_name(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        Target(**how)
    assert message in str(refused.value)


def test_a_target_does_not_change() -> None:
    target = Target(**WHOLE)  # type: ignore[arg-type]
    assert asdict(target) == WHOLE | {"shard_size": None} and target == Target(**WHOLE)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        target.stage = 1  # type: ignore[misc]
    assert Target("zero", 0).ranks == 1 and Target("zero", 0, 8).ranks == 8 and Target().ranks is None


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ([], Target()),
        ([f"--{'target-tag' if key == 'tag' else key.replace('_', '-')}={value}" for key, value in WHOLE.items()],
         Target(**WHOLE)),  # type: ignore[arg-type]
        (["--format=hub", "--shard-size=2MB"], Target("hub", shard_size=2_000_000)),
    ],
    ids=["none", "native", "folder"],
)  # fmt: skip
def test_every_option_reaches_the_target(
    options: list[str], target: Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[Target] = []

    def reshard(source: Path, folder: Path, target: Target, **more: Any) -> Path:
        found.append(target)
        return folder

    monkeypatch.setattr(resharding, "reshard", reshard)
    assert cli.main(["reshard", str(tmp_path), str(tmp_path / "t"), *options]) == 0
    assert found == [target]
    assert {field.name for field in fields(Target)} == {*WHOLE, "shard_size"}
