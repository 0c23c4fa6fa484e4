"""What training programs keep beside the folder of DeepSpeed's engine, and look for when they go on from it.

Known are the Trainer of transformers, Accelerate and Lightning, by what they leave there. Their small files go along as
they are, none is opened; weights of the model before its growth, and other checkpoints, stay behind.

Refuses (InvalidCheckpoint) files that cannot be read or are git-lfs pointers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from bert2bert.checkpoints.hub.beside import TOKENIZER, content_of

if TYPE_CHECKING:
    from bert2bert.checkpoints.source import Source
    from bert2bert.checkpoints.target import Target

_RANK_STATES = ("rng_state*.pth", "random_states_*.pkl")
_CARRIED = (
    "trainer_state.json", "scheduler*.pt", "scheduler*.bin", "training_args.bin", "scaler.pt", "sampler*.bin",
    "dl_state_dict*.bin", "custom_checkpoint_*.pkl", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "zero_to_fp32.py", "zero_to_torch.py", *_RANK_STATES, *TOKENIZER,
)  # fmt: skip


@dataclass(frozen=True)
class Client:
    """``call``: how it goes on from a folder; ``tag``: what it calls the engine's folder, as a pattern."""

    name: str
    call: str
    tag: str
    marks: tuple[str, ...]


_CLIENTS = (
    Client("the Trainer of transformers", 'trainer.train(resume_from_checkpoint="{target}")', "global_step*",
           ("trainer_state.json",)),
    Client("Accelerate", 'accelerator.load_state("{target}")', "pytorch_model*",
           ("random_states_*.pkl", "scheduler*.bin")),
    Client("Lightning", 'trainer.fit(model, ckpt_path="{target}")', "checkpoint", ()),
)  # fmt: skip


def client_of(source: Source) -> Client | None:
    """Whose run a checkpoint is of, as far as its folder's name and the files beside it show it."""
    folder = source.folder
    for client in _CLIENTS if source.format != "hub" else ():
        marked = any(any(folder.parent.glob(mark)) for mark in client.marks) or not client.marks
        if marked and fnmatchcase(folder.name, client.tag):
            return client
    return None


def beside(source: Source) -> dict[str, bytes]:
    """Name -> content of what a known client keeps beside a tag's folder and needs to go on."""
    if client_of(source) is None:
        return {}
    found = {}
    for path in sorted(source.folder.parent.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, pattern) for pattern in _CARRIED):
            found[path.name] = content_of(path)
    return found


def notes(source: Source, carried: Iterable[str], folder: Path, target: Target) -> list[str]:
    """Sentences for the user: what was carried and left, who continues from the target in ``folder`` and how, and what
    starts again."""
    client, home, was, world = client_of(source), source.folder.parent, source.world_size, target.world_size
    carried = [name for name in carried if name != "config.json"]  # which is the target's
    if client is None or target.format == "hub":
        return []
    keep = {*carried, "config.json", "latest", "latest_universal"}
    rest = [path.name + "/" * path.is_dir() for path in sorted(home.iterdir()) if path.name not in keep]
    rest = [name for name in rest if name.rstrip("/") != source.folder.name]
    found = [f"carried for {client.name}, as they are: {', '.join(carried)}"] if carried else []
    found += [f"left behind in {home}: {', '.join(rest)}"] if rest else []
    how = client.call.format(target=folder) + " and a model of the target's config"
    how += ', with "checkpoint": {"load_universal": true} in its ds_config' if target.format == "universal" else ""
    found.append(f"{client.name} goes on with {how}")
    states = [name for name in carried if any(fnmatchcase(name, pattern) for pattern in _RANK_STATES)]
    if states and world is not None and was is not None and world != was:
        found.append(
            f"the random states are those of {was} ranks, {world} will go on: dropout and shuffling draw again, and "
            "the place in the data, counted in batches, holds if batch size x ranks stays the same"
        )
    return found
