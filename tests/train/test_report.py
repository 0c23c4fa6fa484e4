"""The report on synthetic runs whose crossings and savings are known by hand."""

from __future__ import annotations

import json
import math
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from bert2bert.errors import InvalidData
from bert2bert.report.compare import render, report
from bert2bert.report.curves import Boundary, Place, crossing, read_run
from bert2bert.report.result import Report, RunEntry, Saving

DATA = {"digest": "aa", "tokenizer_digest": "bb", "heldout_unigram_entropy": 6.0}


def write_run(
    folder: Path,
    evals: list[tuple[float, ...]],
    *,
    phases: list[str] | None = None,
    source: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    seq_len: int = 64,
    width: int = 64,
    finished: bool = True,
    world_size: int = 2,
    growths: list[int] | None = None,
) -> Path:
    """A run folder with one evaluation per (step, flops, seconds, loss) and a train line before each but the first."""
    folder.mkdir(parents=True)
    about = {
        "name": folder.name,
        "recipe": {"data": {"seq_len": seq_len, "mlm_probability": 0.15, "eval_rows": 256}},
        "world_size": world_size,
        "model": {"num_hidden_layers": 4, "hidden_size": width},
        "data": data or DATA,
        "source": source,
        "finished": "2025-01-01T00:00:00" if finished else None,
    }
    (folder / "run.json").write_text(json.dumps(about))
    lines = []
    for i, (step, flops, seconds, loss) in enumerate(evals):
        common = {"step": step, "phase": phases[i] if phases else "full", "flops": flops, "seconds": seconds}
        if growths:
            common["growths"] = growths[i]
        if i:
            lines.append({"kind": "train", "loss": loss + 0.1, "lr": 1e-3, "tokens": step * 100, **common})
        finite = loss if math.isfinite(loss) else None  # as train/metrics.py writes it
        lines.append({"kind": "eval", "loss": finite, "accuracy": 0.1 * i, "tokens": step * 100, **common})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Scratch, a source, and a run grown from the source at its step 200.

    Scratch ends at 5.0 after 1000 FLOPs and 100 s. The grown run passes 5.0 half-way between (200 FLOPs, 10 s, 5.2) and
    (400 FLOPs, 30 s, 4.8), so at 300 FLOPs and 20 s. The source had cost 100 FLOPs and 30 s.
    """
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7), (100, 500, 50, 5.5), (200, 1000, 100, 5.0)], width=128)
    small = write_run(tmp_path / "small", [(0, 0, 0, 7), (200, 100, 30, 5.3), (400, 200, 60, 5.1)])
    source = {
        "path": "grown",
        "growth": {"operator": "aki", "source": {"path": str(small), "tag": "global_step200"}},
        "spent": {"flops": 100, "seconds": 30, "tokens": 20000, "steps": 200},
    }
    base = write_run(
        tmp_path / "base",
        [(0, 0, 0, 5.4), (50, 200, 10, 5.2), (100, 400, 30, 4.8), (200, 900, 90, 4.6)],
        phases=["sub-models", "sub-models", "full", "full"],
        source=source,
        width=128,
    )
    return scratch, base, small


def entry(result: Report, name: str) -> RunEntry:
    return next(e for e in result.runs if e.name == name)


def test_savings_without_and_with_the_source(three: tuple[Path, Path, Path]) -> None:
    scratch, base, small = three
    result = report([scratch, base, small])
    grown = entry(result, "base")
    assert result.mark == 5.0
    assert [e.role for e in result.runs] == ["reference", "grown", "source"]
    assert astuple(grown.reaches) == pytest.approx((75, 300, 20))
    assert astuple(grown.saving) == pytest.approx((0.7, 0.8))
    assert astuple(grown.saving_with_source) == pytest.approx((0.6, 0.5))
    assert grown.initial_loss == 5.4
    assert grown.source.loss == 5.3  # at the step it was grown at, not at its end
    assert entry(result, "small").saving is None


def test_rendered_table(three: tuple[Path, Path, Path]) -> None:
    text = render(report(list(three)))
    row = next(line for line in text.splitlines() if "300 FLOPs" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "base", "300 FLOPs, 20.0 s", "70.0%", "80.0%", "60.0%", "50.0%",
    ]  # fmt: skip
    assert "base starts at 5.400; its source small was at 5.300 when it was grown." in text
    assert "Unigram entropy of the held-out text: 6.000 nats" in text
    assert "4 × 128 |" in text


def test_a_run_that_grew_between_two_phases_is_its_own_source(tmp_path: Path) -> None:
    """The phase "small" cost 100 FLOPs and 30 s, and the mark lies half-way between the last two evaluations; that it
    was passed before the growth already, and what the loss was on both of its sides, is seen too."""
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7), (200, 1000, 100, 5.0)], width=128)
    evals = [(0, 0, 0, 7), (80, 80, 20, 4.9), (100, 100, 30, 5.3), (100, 100, 30, 5.6), (150, 300, 50, 5.2)]
    run = write_run(
        tmp_path / "run",
        [*evals, (200, 500, 70, 4.8)],
        phases=["small"] * 3 + ["grown"] * 3,
        growths=[0, 0, 0, 1, 1, 1],
    )
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"model": {"n_layer": 4, "n_embd": 128}}))
    result = report([scratch, run], tmp_path / "report")
    grown = entry(result, "run")
    assert (grown.role, grown.model) == ("grown", "4 × 128")
    assert astuple(grown.reaches) == pytest.approx((175, 400, 60))
    assert astuple(grown.saving) == pytest.approx((0.7, 0.7))
    assert astuple(grown.saving_with_source) == pytest.approx((0.6, 0.4))
    assert "run starts at 5.600; its phase 'small' was at 5.300 when it was grown." in render(result)


def test_source_is_found_through_the_manifest(three: tuple[Path, Path, Path]) -> None:
    scratch, base, small = three
    assert entry(report([scratch, base]), "small").role == "source"
    about = json.loads((small / "run.json").read_text())
    about["data"] = {**DATA, "digest": "other"}
    (small / "run.json").write_text(json.dumps(about))
    result = report([scratch, base])
    assert [e.name for e in result.runs] == ["scratch", "base"]
    assert any("data digest" in note for note in result.notes)
    assert entry(result, "base").saving_with_source is not None  # its cost is known from run.json all the same


def test_mark_not_reached_says_by_how_much(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7), (10, 10, 1, 5.0)])
    other = write_run(tmp_path / "other", [(0, 0, 0, 7), (10, 10, 1, 5.25), (20, 20, 2, 5.5)])
    result = report([scratch, other])
    assert entry(result, "other").reaches is None
    assert entry(result, "other").gap == pytest.approx(0.25)
    assert "not reached: 0.250 nats above at its best" in render(result)


def test_run_without_source_and_source_without_cost(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7), (10, 10, 1, 5.0)])
    plain = write_run(tmp_path / "plain", [(0, 0, 0, 7), (10, 8, 1, 4.9)])
    hub = write_run(
        tmp_path / "hub", [(0, 0, 0, 6), (10, 8, 1, 4.9)], source={"path": "g", "growth": {}, "spent": None}
    )
    result = report([scratch, plain, hub])
    text = render(result)
    assert entry(result, "plain").saving_with_source is None
    assert entry(result, "hub").saving_with_source == Saving(None, None)
    assert "no source" in text and "unknown" in text
    assert any("What the source of hub cost is not recorded" in note for note in result.notes)


def test_notes_on_unfinished_plateau_ranks_and_noise(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7), (10, 10, 1, 5.0), (20, 20, 2, 4.8), (30, 30, 3, 5.0)])
    other = write_run(tmp_path / "other", [(5, 5, 1, 6.5), (10, 10, 1, 6.1)], finished=False, world_size=4)
    notes = "\n".join(report([scratch, other]).notes)
    for part in (
        "other has not finished",
        "other has no evaluation before its first step",
        "other ends at or above the unigram entropy",
        "different numbers of ranks",
        "after 33% of its FLOPs: savings below 67%",
    ):
        assert part in notes


def test_crossing_at_the_start_at_a_point_and_past_a_divergence(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [(0, 0, 0, 7), (10, 10, 1, math.nan), (20, 20, 3, 5), (30, 30, 9, 4)]))
    assert crossing(run.points, 7.5) == Place(0, 0, 0)
    assert crossing(run.points, 5.0) == Place(20, 20, 3)
    assert crossing(run.points, 4.5) == Place(25, 25, 6)
    assert crossing(run.points, 3.9) is None


def test_an_evaluation_repeated_after_a_resume_counts_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", [(0, 0, 0, 7), (10, 10, 1, 6), (10, 10, 1, 5.9)]))
    assert [p.loss for p in run.points] == [7, 5.9]


def test_phase_boundaries(three: tuple[Path, Path, Path]) -> None:
    assert read_run(three[1]).boundaries == (Boundary(50, 200, 10, "full"),)
    assert read_run(three[0]).boundaries == ()


def test_files_written(three: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from matplotlib.image import imread

    result = report(list(three), tmp_path / "new" / "report")
    folder = tmp_path / "new" / "report"
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    assert (folder / "report.md").read_text().startswith(render(result))
    assert json.loads((folder / "report.json").read_text())["mark"] == 5.0
    picture = imread(folder / "report.png")
    assert picture.shape[1] > 1200
    assert len({tuple(pixel) for pixel in picture[::3, ::3, :3].reshape(-1, 3).tolist()}) > 20  # not an empty canvas


def test_picture_shows_every_curve_in_both_panels(three: tuple[Path, Path, Path]) -> None:
    from bert2bert.report.plot import figure_of

    result = report(list(three))
    curve = entry(result, "base").curve
    for axes, column, cost, unit in zip(figure_of(result).axes, (1, 2), (100, 30), (1000, 1), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert {"scratch (reference)", "base (grown)", "small (source)", "base, source counted"} <= set(lines)
        grown, counted = lines["base (grown)"].get_xdata(), lines["base, source counted"].get_xdata()
        assert list(grown) == pytest.approx([row[column] / unit for row in curve])
        assert list(counted) == pytest.approx([(row[column] + cost) / unit for row in curve])
        assert [text.get_text() for text in axes.texts] == ["full", "final loss of scratch", "unigram entropy"]


def test_equal_folder_names_are_told_apart(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a" / "run", [(0, 0, 0, 7), (10, 10, 1, 5.0)])
    b = write_run(tmp_path / "b" / "run", [(0, 0, 0, 7), (10, 10, 1, 5.0)])
    assert [e.name for e in report([a, b]).runs] == [str(a), str(b)]


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no run given"):
        report([])
    with pytest.raises(InvalidData, match=r"nowhere: this is not a training run's folder: there is no run\.json"):
        report([tmp_path / "nowhere"])
    run = write_run(tmp_path / "run", [(0, 0, 0, 7)])
    with pytest.raises(InvalidData, match="given twice"):
        report([run, tmp_path / "." / "run"])
    (run / "run.json").write_text("{")
    with pytest.raises(InvalidData, match=r"run\.json: cannot be read as JSON"):
        report([run])
    (run / "metrics.jsonl").unlink()
    with pytest.raises(InvalidData, match=r"there is no metrics\.jsonl"):
        report([run])


def test_refuses_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    scratch = write_run(tmp_path / "scratch", [(0, 0, 0, 7)])
    other = write_run(tmp_path / "other", [(0, 0, 0, 7)], data={**DATA, "digest": "cc"})
    with pytest.raises(
        InvalidData, match=r"other: .* cannot be compared .*\n  data digest is 'cc' here and 'aa' there"
    ):
        report([scratch, other])
    longer = write_run(tmp_path / "longer", [(0, 0, 0, 7)], seq_len=128)
    with pytest.raises(InvalidData, match="seq_len is 128 here and 64 there"):
        report([scratch, longer])
    diverged = write_run(tmp_path / "diverged", [(0, 0, 0, 7), (1, 1, 1, math.nan)])
    with pytest.raises(InvalidData, match="ended with a held-out loss of nan"):
        report([diverged, scratch])
    assert entry(report([scratch, diverged]), "diverged").reaches is not None  # it began at the mark


def test_refuses_a_run_without_evaluations_and_damaged_metrics(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [(0, 0, 0, 7), (10, 10, 1, 6)])
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "eval", "st')  # killed in mid-line
    assert len(read_run(run).points) == 2
    metrics.write_text('{"kind": "eval", "st\n' + whole)
    with pytest.raises(InvalidData, match=r"line 1: not JSON"):
        read_run(run)
    metrics.write_text(whole + "[]\n")
    with pytest.raises(InvalidData, match=r"line 4: expected a JSON object"):
        read_run(run)
    metrics.write_text(whole.replace('"loss": 7, ', ""))
    with pytest.raises(InvalidData, match=r"line 1: KeyError 'loss'"):
        read_run(run)
    metrics.write_text("".join(line + "\n" for line in whole.splitlines() if '"train"' in line))
    with pytest.raises(InvalidData, match="no evaluation on held-out text yet"):
        read_run(run)


def test_refuses_an_output_that_is_a_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [(0, 0, 0, 7), (10, 10, 1, 6)])
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(InvalidData, match="taken: the report cannot be written"):
        report([run], tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
