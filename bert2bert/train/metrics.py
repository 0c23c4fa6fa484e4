"""What a run measured: metrics.jsonl, TensorBoard and a progress bar, all on rank 0; the other ranks write nothing.

metrics.jsonl is the record (one JSON object a line, flushed at once); TensorBoard shows the same numbers. A resumed run
drops what a killed one had written past the checkpoint, so that no step is ever reported twice. Not-finite numbers are
written as null, since JSON has none. TensorBoard (and with it torch) is imported only when a writer opens on rank 0.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

KINDS = ("train", "eval")
_NOT_PLOTTED = ("kind", "step", "phase", "phase_step")
_SHOWN = {"loss": "{:.3f}", "accuracy": "{:.3f}", "lr": "{:.1e}", "tokens_per_s": "{:,.0f}"}


def keep_until(path: Path, step: int) -> None:
    """Drop the records of metrics.jsonl past ``step``, and a last line that a kill cut short; atomically.

    Step 0 drops everything: a run that starts again measures its starting point again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # cut short: nothing after it can be older
            break
        if step > 0 and record["step"] <= step:
            kept.append(line + "\n")
    fresh = path.with_name(path.name + ".partial")
    fresh.write_text("".join(kept), encoding="utf-8")
    os.replace(fresh, path)


class MetricsWriter:
    """Rank 0's record of a run in ``folder``; on any other rank every call does nothing. Also a context manager.

    ``step``: the optimizer step the run starts from (0, or the resumed checkpoint's); ``steps``: the run's last.
    """

    def __init__(self, folder: Path, rank: int, *, step: int = 0, steps: int | None = None, bar: bool = True) -> None:
        self.active = rank == 0
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        keep_until(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        # In a log file, a line now and then; on a terminal, smooth.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(initial=step, total=steps, unit="step", mininterval=interval, disable=not bar)
        self._shown: dict[str, str] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Append one record with "kind" 'train' or 'eval' and the "step" over the whole run; ValueError otherwise."""
        if not self.active:
            return
        if record.get("kind") not in KINDS or not isinstance(record.get("step"), int):
            raise ValueError(f"a metrics record needs a kind of {KINDS} and an integer step: {record}")
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        kind = record["kind"]
        for key, value in record.items():
            if key not in _NOT_PLOTTED and isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{key}", value, record["step"])
        for key, form in _SHOWN.items():
            if (value := record.get(key)) is not None:
                self._shown[key if kind == "train" else f"held-out {key}"] = form.format(value)
        self._bar.set_postfix(self._shown, refresh=False)

    def advance(self, phase: str, steps: int = 1) -> None:
        """Move the progress bar by ``steps`` optimizer steps of the named phase."""
        if self.active:
            self._bar.set_description(phase, refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        """Flush and close the files and the bar; closing twice does no harm."""
        if self.active:
            self._bar.close()
            self._board.close()
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
