"""Metrics: what is written where, by which rank, and what a resumed run drops."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bert2bert.train.metrics import MetricsWriter, keep_until


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(step: int, loss: float = 5.0) -> dict:
    return {"kind": "train", "step": step, "phase": "full", "phase_step": step, "loss": loss, "lr": 1e-3, "mfu": None}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_records_reach_the_file_at_once_and_tensorboard_in_the_end(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, steps=2, show=False) as writer:
        writer.write(train(1))
        assert lines(tmp_path) == [train(1)]
        writer.write(train(2, loss=4.0))
        writer.write({"kind": "eval", "step": 2, "phase": "full", "loss": 4.5, "accuracy": 0.25})
        writer.advance("full")
    writer.close()
    assert [record["kind"] for record in lines(tmp_path)] == ["train", "train", "eval"]
    assert scalars(tmp_path, "train/loss") == [(1, 5.0), (2, 4.0)]
    assert scalars(tmp_path, "eval/accuracy") == [(2, 0.25)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with MetricsWriter(folder, 1, steps=2) as writer:
        writer.write(train(1))
        writer.advance("full")
    assert not folder.exists()


def test_a_resumed_run_drops_what_lies_past_its_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, show=False) as writer:
        for step in range(1, 7):
            writer.write(train(step, loss=step))
        writer.write({"kind": "eval", "step": 6, "phase": "full", "loss": 6.0})
    with MetricsWriter(tmp_path, 0, step=4, show=False) as writer:
        assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4]
        writer.write(train(5, loss=50.0))
    assert [record["loss"] for record in lines(tmp_path)] == [1, 2, 3, 4, 50.0]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0)]


def test_a_run_that_starts_again_starts_an_empty_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "eval", "step": 0}) + "\n")
    keep_until(tmp_path / "metrics.jsonl", 0)
    assert lines(tmp_path) == []


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(train(1)) + "\n" + json.dumps(train(2))[:20])
    keep_until(path, 5)
    assert lines(tmp_path) == [train(1)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_number_that_json_has_no_word_for_is_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, 0, show=False) as writer:
        writer.write(train(1, loss=math.nan) | {"lr": math.inf})
    assert lines(tmp_path)[0]["loss"] is None and lines(tmp_path)[0]["lr"] is None


@pytest.mark.parametrize("record", [{"kind": "test", "step": 1}, {"kind": "train"}, {"kind": "train", "step": 1.0}])
def test_a_record_without_kind_and_step_is_an_error(tmp_path: Path, record: dict) -> None:
    with MetricsWriter(tmp_path, 0, show=False) as writer, pytest.raises(ValueError, match="kind"):
        writer.write(record)
    assert lines(tmp_path) == []


def written(folder: Path) -> None:
    with MetricsWriter(folder, 0, step=3, steps=4) as writer:
        writer.write(train(4, loss=1.25) | {"grad_norm": 0.5, "tokens_per_s": 12345.6})
        writer.write({"kind": "eval", "step": 4, "loss": 2.5, "accuracy": 0.25})
        writer.advance("sub-models")


def test_on_a_terminal_a_bar_shows_phase_loss_and_held_out_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = pty.openpty()
    os.set_blocking(near, False)
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    with open(far, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        written(tmp_path)
        monkeypatch.undo()
        content = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                content += os.read(near, 1 << 16)
        shown = content.decode()
    os.close(near)
    assert "sub-models" in shown and "4/4" in shown and "loss=1.250" in shown and "held-out loss=2.500" in shown
    assert "\r" in shown and "step 4" not in shown


def test_in_a_file_every_record_is_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    shown = capfd.readouterr().err
    assert shown == (
        "step 4/4  full  loss 1.250  lr 1.0e-03  grad norm 0.50  tokens/s 12,346  left 00:00\n"
        "step 4/4  held-out loss 2.500  accuracy 0.250\n"
    )


def test_nothing_is_shown_where_that_was_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with MetricsWriter(tmp_path, 0, steps=4, show=False) as writer:
        writer.write(train(1))
        writer.advance("full")
    assert capfd.readouterr() == ("", "") and len(lines(tmp_path)) == 1
