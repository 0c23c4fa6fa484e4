"""Compare training runs: what growing saved against training from scratch, in FLOPs and in wall clock.

The first run is the reference. Its final held-out loss is the mark; every other run is asked where its held-out curve
first reaches it. ``saving = 1 - spent there / spent by the reference in all``, once for the run alone (as the
bert2BERT paper counts) and once with what its source model had cost added. Where a run grew between two of its phases,
its source is what it was itself before its first growth, and the run alone is what came after. For a run that does not
reach the mark, the gap is given. A run that another was grown from is a source: shown, not compared.

Refuses runs whose held-out losses are not comparable (other data, tokenizer, sequence length, objective or evaluation
size), the same run twice, and a reference that diverged. Light: matplotlib is imported only to write the picture.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from bert2bert.errors import InvalidData
from bert2bert.report.curves import Run, crossing, read_run
from bert2bert.report.markdown import render
from bert2bert.report.result import CurvePoint, Heldout, Report, RunEntry, Saving, SourceCost

__all__ = ["render", "report"]

_LAYERS, _WIDTH = ("num_hidden_layers", "n_layer", "num_layers"), ("hidden_size", "n_embd", "d_model")


def report(runs: list[Path], output: Path | None = None) -> Report:
    """Compare run folders, the first being the reference; see `render` for the table.

    With `output` (a folder, made if need be) writes report.md, report.png and report.json into it. A grown run's source
    is looked up at the path its manifest names and shown too when that is a run on the same held-out text. Raises
    InvalidData (see the module's text).
    """
    if not runs:
        raise InvalidData("report: no run given. Name at least the reference run's folder.")
    given = [read_run(Path(path)) for path in runs]
    _check_comparable(given)
    notes: list[str] = []
    found = [run for run in (_lookup_source(run, given, notes) for run in list(given)) if run is not None]
    shown = _labelled(given + list({run.path: run for run in found}.values()))
    reference = shown[0]
    mark = reference.final.loss
    if not math.isfinite(mark):
        raise InvalidData(
            f"{reference.path}: the reference run ended with a held-out loss of {mark}, so nothing can be measured "
            "against it.\n  The first run given is the reference; give one that did not diverge."
        )
    entries = tuple(_entry(run, role, shown) for run, role in zip(shown, _roles(shown), strict=True))
    heldout = Heldout(reference.data.get("digest"), reference.data.get("heldout_unigram_entropy"))
    notes += _notes(reference, entries)
    result = Report(mark, reference.label, heldout, entries, tuple(notes), files={})
    return result if output is None else _write(result, Path(output))


def _check_comparable(runs: list[Run]) -> None:
    first = runs[0]
    seen: dict[Path, Run] = {}
    for run in runs:
        if (real := run.path.resolve()) in seen:
            raise InvalidData(f"{run.path}: given twice. Every run is compared once, with the first one.")
        seen[real] = run
        if (difference := _difference(run, first)) is not None:
            what, here, there = difference
            raise InvalidData(
                f"{run.path}: its held-out losses cannot be compared with those of {first.path}:\n"
                f"  {what} is {here!r} here and {there!r} there.\n"
                "  Compare runs that were evaluated alike, on the same prepared data."
            )


def _difference(run: Run, other: Run) -> tuple[str, Any, Any] | None:
    """The first thing in which two runs' evaluations differ."""
    ours, theirs = run.evaluation(), other.evaluation()
    return next(((key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]), None)


def _source_path(run: Run) -> tuple[Path, str | None] | None:
    """The folder a run's source checkpoint came from, and its tag, as recorded in the growth manifest."""
    identity = ((run.source or {}).get("growth") or {}).get("source") or {}
    if not isinstance(identity, dict) or not identity.get("path"):
        return None
    return Path(identity["path"]), identity.get("tag")


def _source_among(run: Run, runs: list[Run]) -> Run | None:
    if (named := _source_path(run)) is None:
        return None
    folders = {named[0].resolve(), named[0].resolve().parent}  # a tag's own folder may have been named
    return next((other for other in runs if other is not run and other.path.resolve() in folders), None)


def _lookup_source(run: Run, given: list[Run], notes: list[str]) -> Run | None:
    """A grown run's source run, when it was not given but still lies where the manifest says."""
    if (named := _source_path(run)) is None or _source_among(run, given) is not None:
        return None
    for folder in (named[0], named[0].parent):
        if not (folder / "run.json").is_file():
            continue
        try:
            source = read_run(folder)
        except InvalidData as error:
            notes.append(f"The source of {run.path.name} is not shown: {str(error).splitlines()[0]}")
            return None
        if (difference := _difference(source, run)) is not None:
            notes.append(
                f"The source of {run.path.name}, {folder}, is not shown: it was evaluated with another {difference[0]}."
            )
            return None
        return source
    return None


def _labelled(runs: list[Run]) -> list[Run]:
    """Folder names as labels, whole paths where two names are equal."""
    names = [run.label for run in runs]
    return [
        run
        if names.count(run.label) == 1
        else Run(run.path, os.fspath(run.path), run.about, run.points, run.boundaries)
        for run in runs
    ]


def _roles(runs: list[Run]) -> list[str]:
    """The role of each run (see `RunEntry`)."""
    sources = {id(source) for run in runs if (source := _source_among(run, runs)) is not None}
    return [
        "reference"
        if run is runs[0]
        else "source"
        if id(run) in sources
        else "grown"
        if run.source or run.before_growth
        else "run"
        for run in runs
    ]


def _entry(run: Run, role: str, runs: list[Run]) -> RunEntry:
    entropy = run.data.get("heldout_unigram_entropy")
    found = RunEntry(
        name=run.label,
        path=os.fspath(run.path),
        role=role,
        model=_model(run),
        finished=bool(run.about.get("finished")),
        world_size=run.about.get("world_size"),
        initial_loss=run.initial.loss if run.initial else None,
        final_loss=run.final.loss,
        final_accuracy=run.final.accuracy,
        below_unigram=None if entropy is None else run.final.loss < entropy,
        steps=run.final.step,
        tokens=run.final.tokens,
        flops=run.final.flops,
        seconds=run.final.seconds,
        reaches=None,
        gap=None,
        saving=None,
        saving_with_source=None,
        curve=tuple(CurvePoint(p.step, p.flops, p.seconds, p.loss, p.accuracy) for p in run.points),
        boundaries=run.boundaries,
        source=_source_cost(run, runs),
    )
    return _compared(run, found, runs[0]) if role in ("grown", "run") else found


def _model(run: Run) -> str:
    config = run.about.get("model") or {}
    layers, width = (next((config[key] for key in keys if key in config), "?") for keys in (_LAYERS, _WIDTH))
    return f"{layers} × {width}"


def _source_cost(run: Run, runs: list[Run]) -> SourceCost | None:
    """What the run was grown from: its cost, and its held-out loss at the step where it was grown, where known."""
    if run.source is None:
        if (small := run.before_growth) is None:
            return None
        grown = next(point.loss for point in run.points if point.growths)
        return SourceCost(f"its phase {small.phase!r}", small.loss, grown, small.flops, small.seconds, within=True)
    spent = run.source.get("spent") or {}
    source, named = _source_among(run, runs), _source_path(run)
    loss = None
    if source is not None and named is not None:
        digits = (named[1] or "").removeprefix("global_step")
        point = source.at(int(digits)) if digits.isdigit() else source.final
        loss = point.loss if point else None
    name = source.label if source else (os.fspath(named[0]) if named else None)
    after = run.initial.loss if run.initial else None
    return SourceCost(name, loss, after, spent.get("flops"), spent.get("seconds"))


def _compared(run: Run, entry: RunEntry, reference: Run) -> RunEntry:
    """The entry with what was saved, or the gap that was left."""
    whole, cost = reference.final, entry.source
    within = cost is not None and cost.within
    reached = crossing(tuple(p for p in run.points if p.growths or not within), whole.loss)
    if reached is None:
        best = min((p.loss for p in run.points if math.isfinite(p.loss)), default=math.inf)
        return replace(entry, gap=best - whole.loss)
    as_run = Saving(_saved(reached.flops, 0, whole.flops), _saved(reached.seconds, 0, whole.seconds))
    if cost is None:
        return replace(entry, reaches=reached, saving=as_run)
    sign = -1 if within else 1  # what the run itself had spent before it grew is taken off; a source's cost is added
    flops, seconds = (None if x is None else sign * x for x in (cost.flops, cost.seconds))
    other = Saving(_saved(reached.flops, flops, whole.flops), _saved(reached.seconds, seconds, whole.seconds))
    alone, counted = (other, as_run) if within else (as_run, other)
    return replace(entry, reaches=reached, saving=alone, saving_with_source=counted)


def _saved(spent: float, source: float | None, whole: float) -> float | None:
    """source: what is counted beside `spent`, None where that is not known."""
    return None if source is None or whole <= 0 else 1 - (spent + source) / whole


def _notes(reference: Run, entries: tuple[RunEntry, ...]) -> list[str]:
    notes = []
    for entry in entries:
        if not entry.finished:
            notes.append(f"{entry.name} has not finished: its last evaluation is the one at step {entry.steps}.")
        if entry.initial_loss is None:
            notes.append(f"{entry.name} has no evaluation before its first step, so its initial loss is not known.")
        if entry.below_unigram is False:
            notes.append(
                f"{entry.name} ends at or above the unigram entropy: it has learnt how often tokens occur, "
                "and nothing from context."
            )
        cost = entry.source
        if entry.role == "grown" and entry.reaches and cost and None in (cost.flops, cost.seconds):
            notes.append(f"What the source of {entry.name} cost is not recorded, so it cannot be counted in full.")
    compared = [entry for entry in entries if entry.role != "source"]
    if len({entry.world_size for entry in compared}) > 1:
        shown = ", ".join(f"{entry.name} on {entry.world_size}" for entry in compared)
        notes.append(f"The runs used different numbers of ranks ({shown}): their wall clocks are not comparable.")
    own = crossing(reference.points, reference.final.loss)
    if own is not None and own.flops < 0.98 * reference.final.flops:
        share = own.flops / reference.final.flops
        notes.append(
            f"The reference {reference.label} itself first reached its final loss after {share:.0%} of its FLOPs: "
            f"savings below {1 - share:.0%} are within its own fluctuation."
        )
    return notes


def _write(result: Report, folder: Path) -> Report:
    """Write the report into a folder; it then names the files. Raises InvalidData."""
    from bert2bert.report.plot import draw  # keeps matplotlib out of reports that draw nothing

    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {kind: folder / f"report.{kind}" for kind in ("md", "png", "json")}
        result = replace(result, files={kind: os.fspath(file) for kind, file in files.items()})
        draw(result, files["png"])
        files["md"].write_text(render(result) + "\n![Held-out loss](report.png)\n", encoding="utf-8")
        strict = json.loads(json.dumps(result.as_json()), parse_constant=lambda _: None)  # NaN and infinity are no JSON
        files["json"].write_text(json.dumps(strict, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidData(
            f"{folder}: the report cannot be written ({error.strerror or error}).\n"
            "  Expected a folder that can be made or written to; name another with --output."
        ) from error
    return result
