"""What a run measured: metrics.jsonl, its `reporters` and a progress bar, all on rank 0; other ranks write nothing.

metrics.jsonl is the record (one JSON object a line, flushed at once); reporters show the same numbers. The bar is
for a terminal; where standard error is a file, each record is a line there. A resumed run drops what a killed one had
written past the checkpoint, so that no step is ever reported twice. Not-finite numbers are written as null, since JSON
has none. What reporters need is imported only when a writer opens on rank 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bert2bert.files.disk import replace
from bert2bert.train.reporters import About, Reporter, numbers, opened

KINDS = ("train", "eval")
_SHOWN = {"loss": "{:.3f}", "accuracy": "{:.3f}", "lr": "{:.1e}", "grad_norm": "{:.2f}", "tokens_per_s": "{:,.0f}"}
_ON_BAR = ("loss", "accuracy", "lr", "tokens_per_s")  # there is less room


class Interval:
    """Speed since the last record. spent: the run's totals so far: "flops", "seconds", "tokens"."""

    def __init__(self, spent: Mapping[str, float]) -> None:
        self.start = dict(spent)

    def rates(self, spent: Mapping[str, float], world: int, peak: float | None) -> dict[str, float | None]:
        """tokens_per_s over all ranks; mfu, the share of the devices' peak FLOP/s (None where that is not known)."""
        tokens, flops, seconds = (spent[key] - self.start[key] for key in ("tokens", "flops", "seconds"))
        seconds = max(seconds, 1e-9)
        return {"tokens_per_s": tokens / seconds, "mfu": None if peak is None else flops / seconds / (peak * world)}


def keep_until(path: Path, step: int, growths: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drop the records of metrics.jsonl past ``step``, or after more ``growths``, and a last line that a kill cut
    short; atomically. What was kept, and what was dropped.

    Step 0 drops everything: a run that starts again measures its starting point again. A link becomes a file.
    """
    kept: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    if not os.path.lexists(path):
        return kept, dropped
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            at, grown = record["step"], record.get("growths", 0)
        except (ValueError, TypeError, KeyError):  # cut short: nothing after it can be older
            break
        keep = 0 < step >= at and grown <= growths
        (kept if keep else dropped).append(record)
        lines += [line + "\n"] if keep else []
    replace(path, "".join(lines))
    return kept, dropped


class MetricsWriter:
    """Rank 0's record of a run in ``folder``; on any other rank every call does nothing. Also a context manager.

    ``step``: the optimizer step the run starts from (0, or the resumed checkpoint's); ``growths``: those that the model
    has behind it in this run; ``steps``: the run's last, None where that is not known;
    ``show``: whether anything is printed; ``report``: names of `reporters`; ``name`` and ``config``: what they show of
    the run. Raises InvalidConfig where one of them does not begin.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        *,
        step: int = 0,
        growths: int = 0,
        steps: int | None = None,
        show: bool = True,
        report: Sequence[str] = ("tensorboard",),
        name: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.active = rank == 0
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept, dropped = keep_until(path, step, growths)
        self._file = path.open("a", encoding="utf-8")
        last = {record["kind"]: record["step"] for record in (*kept, *dropped)}
        here = [record for record in kept if record["step"] == step]
        self._reporters: list[Reporter] = opened(report, About(folder, name, config or {}, step, here, last))
        terminal = sys.stderr.isatty()
        self._bar = tqdm(initial=step, total=steps, unit="step", mininterval=0.5, disable=not (show and terminal))
        self._shown: dict[str, str] = {}
        self._lines = show and not terminal
        self._steps, self._began = steps, (step, time.monotonic())

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
        measured = numbers(record)
        for reporter in self._reporters:
            reporter.write(kind, record["step"], measured)
        shown = {key: form.format(record[key]) for key, form in _SHOWN.items() if record.get(key) is not None}
        if self._lines:
            print(self._line(record, shown), file=sys.stderr, flush=True)
        held = "" if kind == "train" else "held-out "
        self._shown |= {held + key: shown[key] for key in _ON_BAR if key in shown}
        self._bar.set_postfix(self._shown, refresh=False)

    def _line(self, record: dict[str, Any], shown: dict[str, str]) -> str:
        """A record as a line of a log: where the run is, what was measured, and how long the rest will take."""
        step, steps = record["step"], self._steps
        where = f"step {step:,}" + (f"/{steps:,}" if steps else "")
        if record["kind"] == "eval":
            return f"{where}  held-out " + "  ".join(f"{key} {text}" for key, text in shown.items())
        words = [where, record.get("phase", ""), *(f"{key.replace('_', ' ')} {text}" for key, text in shown.items())]
        done, (first, began) = step, self._began
        if steps and done > first:
            left = (time.monotonic() - began) / (done - first) * (steps - done)
            words.append(f"left {tqdm.format_interval(left)}")
        return "  ".join(word for word in words if word).replace("tokens per s", "tokens/s")

    def advance(self, phase: str, steps: int = 1) -> None:
        """Move the progress bar by ``steps`` optimizer steps of the named phase."""
        if self.active:
            self._bar.set_description(phase, refresh=False)
            self._bar.update(steps)

    def close(self) -> None:
        """Flush and close the files and the bar; closing twice does no harm."""
        if self.active:
            self._bar.close()
            try:
                for reporter in self._reporters:
                    reporter.close()
            finally:
                self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        with contextlib.suppress(*([OSError] if kind else [])):  # one error is enough
            self.close()
