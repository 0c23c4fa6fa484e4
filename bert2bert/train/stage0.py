"""Read a training checkpoint of ZeRO stage 0, where DeepSpeed keeps whole tensors and names none of their moments.

The torch optimizer's state is found by position: group by group, in the order of the manifest. So only checkpoints of
this project's trainer can be read; a foreign one says nothing about its order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bert2bert.errors import InvalidCheckpoint
from bert2bert.shards import torchfile
from bert2bert.shards.source import STATES, Source, TensorMeta

MODEL = "mp_rank_00_model_states.pt"


class Stage0Source(Source):
    """A stage-0 checkpoint with its manifest. Raises InvalidCheckpoint for contents that do not fit the manifest."""

    form = "zero"

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        super().__init__(folder, folder, manifest)
        self.tag, self.stage, self.world_size = folder.name, 0, int(manifest["world_size"])
        self.precision, self.config, self.aliases = manifest["precision"], manifest["model"], dict(manifest["aliases"])
        self.states, self.files = STATES, [folder / MODEL]
        file = torchfile.load(folder / MODEL)
        try:
            module, optimizer = file["module"], file["optimizer"]
            inner = optimizer.get("optimizer_state_dict", optimizer)
            masters = optimizer.get("fp32_groups")
            self.loss_scaler = {
                k: v for k, v in optimizer.items() if k in ("cur_scale", "cur_iter", "last_overflow_iter")
            }
            self.counters = {k: int(file[k]) for k in ("global_steps", "global_samples", "skipped_steps")}
            self._values: dict[str, dict[str, torch.Tensor]] = {}
            live = zip(manifest["groups"], inner["param_groups"], strict=True)
            for g, (said, group) in enumerate(live):
                for i, (name, index) in enumerate(zip(said["names"], group["params"], strict=True)):
                    state = inner["state"].get(index, {})
                    fp32 = module[name] if masters is None else masters[g][i]
                    self._values[name] = {"fp32": fp32} | {s: state[s] for s in STATES[1:] if s in state}
                    self._steps[name] = int(state.get("step", 0))
                    self.tensors[name] = TensorMeta(name, tuple(fp32.shape), "float32", g, True)
                self.groups.append({k: v for k, v in group.items() if k != "params"} | {"names": list(said["names"])})
            self.buffers = {name: module[name] for name in file.get("buffer_names") or ()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InvalidCheckpoint(
                f"{folder / MODEL}: its contents do not fit the manifest beside it ({type(error).__name__} {error}): "
                "they are of two checkpoints. Restore the file or use another tag."
            ) from None

    def _rows(self, meta: TensorMeta, state: str, start: int, stop: int) -> torch.Tensor:
        values = self._values[meta.name]
        if state not in values:
            return torch.zeros(stop - start, *meta.shape[1:])  # never stepped
        return values[state][start:stop]
