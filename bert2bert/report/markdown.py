"""A report as text: Markdown tables that also read well in a terminal. Pure formatting; nothing is computed here."""

from __future__ import annotations

from typing import Any


def render(result: dict[str, Any]) -> str:
    """The report as Markdown that also reads well in a terminal."""
    entropy = result["heldout"]["unigram_entropy"]
    lines = ["# Training runs compared", ""]
    if entropy is not None:
        lines += [
            f"Unigram entropy of the held-out text: {entropy:.3f} nats. A model below it has learnt from context.",
            "",
        ]
    lines += _table(
        [
            "run",
            "layers × width",
            "initial loss",
            "final loss",
            "accuracy",
            "steps",
            "tokens",
            "FLOPs",
            "training time",
        ],
        [
            [
                f"{e['name']} ({e['role']})" if e["role"] != "run" else e["name"],
                e["model"],
                _number(e["initial_loss"]),
                _number(e["final_loss"]),
                f"{e['final_accuracy']:.1%}",
                f"{e['steps']:,}",
                _count(e["tokens"]),
                _count(e["flops"]),
                _time(e["seconds"]),
            ]
            for e in result["runs"]
        ],
    )
    for e in result["runs"]:
        source = e["source"]
        if e["role"] != "source" and source and source["loss"] is not None and e["initial_loss"] is not None:
            lines += [
                "",
                f"{e['name']} starts at {e['initial_loss']:.3f}; "
                f"its source {source['name']} was at {source['loss']:.3f} when it was grown.",
            ]
    compared = [e for e in result["runs"] if e["role"] in ("grown", "run")]
    if compared:
        lines += ["", f"Final held-out loss of the reference {result['reference']}: {result['mark']:.3f}.", ""]
        lines += _table(
            [
                "run",
                "reaches it after",
                "FLOPs saved",
                "time saved",
                "FLOPs saved, source counted",
                "time saved, source counted",
            ],
            [_savings_row(e) for e in compared],
        )
    if result["notes"]:
        lines += ["", *(f"* {note}" for note in result["notes"])]
    return "\n".join(lines) + "\n"


def _savings_row(e: dict[str, Any]) -> list[str]:
    if e["reaches"] is None:
        return [e["name"], f"not reached: {e['gap']:.3f} nats above at its best", "–", "–", "–", "–"]
    at = f"{_count(e['reaches']['flops'])} FLOPs, {_time(e['reaches']['seconds'])}"
    alone, counted = e["saving"], e["saving_with_source"]
    if counted is None:
        return [e["name"], at, *(_share(alone[axis]) for axis in ("flops", "seconds")), "no source", "no source"]
    return [
        e["name"],
        at,
        *(_share(alone[axis]) for axis in ("flops", "seconds")),
        *(_share(counted[axis]) for axis in ("flops", "seconds")),
    ]


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
