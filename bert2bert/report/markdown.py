"""A report as text: Markdown tables that also read well in a terminal. Pure formatting; nothing is computed here."""

from __future__ import annotations

from bert2bert.report.result import Report, RunEntry

_RUNS = ["run", "layers × width", "initial loss", "final loss", "accuracy", "steps", "tokens", "FLOPs", "training time"]
_SAVINGS = [
    "run", "reaches it after", "FLOPs saved", "time saved", "FLOPs saved, source counted", "time saved, source counted",
]  # fmt: skip


def render(result: Report) -> str:
    """The report as Markdown that also reads well in a terminal."""
    entropy = result.heldout.unigram_entropy
    lines = ["# Training runs compared", ""]
    if entropy is not None:
        lines += [
            f"Unigram entropy of the held-out text: {entropy:.3f} nats. A model below it has learnt from context.",
            "",
        ]
    lines += _table(_RUNS, [_run_row(run) for run in result.runs])
    for run in result.runs:
        source = run.source
        if run.role == "source" or source is None or None in (source.loss, source.loss_after):
            continue
        name = source.name if source.within else f"its source {source.name}"
        lines += [
            "",
            f"{run.name} starts at {source.loss_after:.3f}; {name} was at {source.loss:.3f} when it was grown.",
        ]
    if compared := [run for run in result.runs if run.role in ("grown", "run")]:
        lines += ["", f"Final held-out loss of the reference {result.reference}: {result.mark:.3f}.", ""]
        lines += _table(_SAVINGS, [_savings_row(run) for run in compared])
    if result.notes:
        lines += ["", *(f"* {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _run_row(run: RunEntry) -> list[str]:
    return [
        f"{run.name} ({run.role})" if run.role != "run" else run.name,
        run.model,
        _number(run.initial_loss),
        _number(run.final_loss),
        f"{run.final_accuracy:.1%}",
        f"{run.steps:,}",
        _count(run.tokens),
        _count(run.flops),
        _time(run.seconds),
    ]


def _savings_row(run: RunEntry) -> list[str]:
    if run.reaches is None or run.saving is None:
        return [run.name, f"not reached: {run.gap:.3f} nats above at its best", "–", "–", "–", "–"]
    at = f"{_count(run.reaches.flops)} FLOPs, {_time(run.reaches.seconds)}"
    counted = run.saving_with_source
    with_source = [_share(counted.flops), _share(counted.seconds)] if counted else ["no source", "no source"]
    return [run.name, at, _share(run.saving.flops), _share(run.saving.seconds), *with_source]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    ruler = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return [line(head), line(ruler), *(line(row) for row in rows)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _count(value: float) -> str:
    """Three significant digits: 412,000 as 412k, FLOPs as 3.21e14."""
    if value >= 1e12:
        return f"{value:.2e}".replace("e+", "e")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{seconds / 3600:.1f} h"
