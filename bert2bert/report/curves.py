"""Read a training run's folder: what it was, what it spent, and its held-out loss over steps, FLOPs and wall clock.

Needs only `run.json` and `metrics.jsonl`, no torch. Refuses a folder that is not a run, a damaged metrics file and a
run without an evaluation. A last line that was cut off by a kill is left out; any other damage is an error.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidData


@dataclass(frozen=True)
class Point:
    """One evaluation on the held-out text. `flops` and `seconds` are what the run had spent by then, its own alone."""

    step: int
    phase: str
    loss: float  # nats a predicted token
    accuracy: float
    tokens: float
    flops: float
    seconds: float
    growths: int = 0  # that the model had behind it in this run


@dataclass(frozen=True)
class Place:
    """A place on a run's curve, which may lie between two evaluations."""

    step: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Boundary:
    """Where a phase gave way to the next, ``to``."""

    step: int
    flops: float
    seconds: float
    to: str


@dataclass(frozen=True)
class Run:
    """A training run, as its folder describes it."""

    path: Path
    label: str
    """What the report calls it."""
    about: dict[str, Any]
    """The content of run.json."""
    points: tuple[Point, ...]
    """Evaluations, ascending by step; two at the step of a growth in the run, before and after it."""
    boundaries: tuple[Boundary, ...]

    @property
    def final(self) -> Point:
        return self.points[-1]

    @property
    def initial(self) -> Point | None:
        """The evaluation before anything was trained, if the run began with one."""
        return self.points[0] if self.points[0].flops == 0 else None

    @property
    def data(self) -> dict[str, Any]:
        return self.about.get("data") or {}

    @property
    def source(self) -> dict[str, Any] | None:
        """What the run was grown from, as run.json has it; None for a run from random weights."""
        return self.about.get("source")

    @property
    def before_growth(self) -> Point | None:
        """The last evaluation before the first growth in the run; None for a run that begins with it, or has none."""
        small = [point for point in self.points if not point.growths]
        return small[-1] if small and len(small) < len(self.points) else None

    def evaluation(self) -> dict[str, Any]:
        """All that two held-out losses must have in common to be comparable."""
        recipe = self.about.get("recipe") or {}
        rows = recipe.get("data") or {}
        found = {"data digest": self.data.get("digest"), "tokenizer digest": self.data.get("tokenizer_digest")}
        older = {"kind": "masked", "mlm_probability": rows.get("mlm_probability", rows.get("mask_share"))}
        found |= {f"objective.{key}": value for key, value in (recipe.get("objective") or older).items()}
        return found | {key: rows.get(key) for key in ("seq_len", "eval_rows")}

    def at(self, step: int) -> Point | None:
        """The last evaluation at or before a step."""
        return next((p for p in reversed(self.points) if p.step <= step), None)


def crossing(points: tuple[Point, ...], loss: float) -> Place | None:
    """Where a held-out curve first falls to `loss`, linear between evaluations; None where it does not.

    A curve that starts at or below `loss` reaches it at its first evaluation. Evaluations that are not finite (a run
    that diverged) end no interval.
    """
    before: Point | None = None
    for point in (p for p in points if math.isfinite(p.loss)):
        if point.loss <= loss:
            if before is None:
                return Place(float(point.step), point.flops, point.seconds)
            share = (before.loss - loss) / (before.loss - point.loss)
            return Place(
                before.step + share * (point.step - before.step),
                before.flops + share * (point.flops - before.flops),
                before.seconds + share * (point.seconds - before.seconds),
            )
        before = point
    return None


def read_run(path: Path) -> Run:
    """Read a run folder. Raises InvalidData when it is none, is damaged, or holds no evaluation."""
    about_file, metrics_file = path / "run.json", path / "metrics.jsonl"
    for file in (about_file, metrics_file):
        if not file.is_file():
            raise InvalidData(
                f"{path}: this is not a training run's folder: there is no {file.name} in it.\n"
                "  Expected the --output folder of launch/pretrain.py."
            )
    try:
        about = json.loads(about_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{about_file}: cannot be read as JSON ({error}). Is the run's folder complete?") from error
    if not isinstance(about, dict):
        raise InvalidData(f"{about_file}: found a {type(about).__name__}, expected an object that describes the run.")
    points, boundaries = _read_metrics(metrics_file)
    if not points:
        raise InvalidData(
            f"{path}: the run has no evaluation on held-out text yet, so there is nothing to compare.\n"
            "  Expected lines of kind 'eval' in metrics.jsonl: one is written before the first step, one every "
            "eval_every steps and one at the end."
        )
    ordered = tuple(points[at] for at in sorted(points))
    return Run(path, path.resolve().name, about, ordered, tuple(boundaries))


def _read_metrics(file: Path) -> tuple[dict[tuple[int, int], Point], list[Boundary]]:
    """((step, growths) -> evaluation, the boundaries of phases) of metrics.jsonl. Raises InvalidData."""
    points: dict[tuple[int, int], Point] = {}
    boundaries: list[Boundary] = []
    last: Boundary | None = None
    for number, entry in _entries(file):
        try:
            step, phase = int(entry["step"]), str(entry["phase"])
            flops, seconds = float(entry["flops"]), float(entry["seconds"])
            if entry["kind"] == "eval":
                loss, accuracy, tokens = _real(entry["loss"]), _real(entry["accuracy"]), float(entry["tokens"])
                growths = int(entry.get("growths", 0))
                points[step, growths] = Point(step, phase, loss, accuracy, tokens, flops, seconds, growths)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidData(
                f"{file}, line {number}: {type(error).__name__} {error}.\n"
                "  Expected an entry of kind 'train' or 'eval' with step, phase, loss, tokens, flops and seconds."
            ) from error
        if last is not None and phase != last.to:
            # The last entry of the old phase is its end; the first of the new one already lies a log interval later.
            boundaries.append(replace(last, to=phase))
        last = Boundary(step, flops, seconds, to=phase)
    return points, boundaries


def _real(value: float | None) -> float:
    """A measured number; the metrics writer writes what is not finite as null."""
    return math.nan if value is None else float(value)


def _entries(file: Path) -> list[tuple[int, dict[str, Any]]]:
    entries: list[tuple[int, dict[str, Any]]] = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                if not line.endswith("\n"):
                    break  # the writer was killed in mid-line
                raise InvalidData(f"{file}, line {number}: not JSON ({error}). The file is damaged.") from error
            if not isinstance(entry, dict):
                raise InvalidData(f"{file}, line {number}: expected a JSON object, found {line.strip()[:60]!r}.")
            entries.append((number, entry))
    return entries
