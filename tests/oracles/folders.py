"""Hugging Face folders of tiny scrambled models, grown by the command line as a user would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from bert2bert.commands.cli import main
from tests import tiny
from tests.checkpoints.engines import hf_model


def saved(folder: Path, name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Save a variant of tests.tiny in float32; its config."""
    config = tiny.config_of(name, **changes)
    hf_model(config, seed).save_pretrained(folder)
    return config


def grown(source: Path, target: Path, config: dict[str, Any], *options: str) -> dict[str, torch.Tensor]:
    """What the command makes of a folder, loaded by transformers: name -> value."""
    file = target.with_suffix(".json")
    file.write_text(json.dumps(config))
    assert main(["grow", str(source), str(target), "--config", str(file), "--format", "hub", *options]) == 0
    return loaded(target)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The state of a folder's model, and that nothing was missing or left over in its files."""
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return dict(model.state_dict())
