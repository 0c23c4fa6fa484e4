"""Where numbers go besides metrics.jsonl: names, refusals, and runs that go on there without a step twice."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bert2bert.errors import InvalidConfig
from bert2bert.train import reporters
from bert2bert.train.metrics import MetricsWriter
from tests.train.test_metrics import scalars, train


def test_names_are_separated_by_commas_or_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert reporters.names(["tensorboard,wandb", "mlflow", "wandb"]) == ("tensorboard", "wandb", "mlflow")
    assert reporters.names(["none"]) == ()
    for words, why in ((["wandbb"], "wandbb: did you mean 'wandb'"), (["none", "wandb"], "none wandb: none stands")):
        with pytest.raises(InvalidConfig, match=f"--report-to {why}"):
            reporters.names(words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidConfig, match="--report-to mlflow: the package is not installed; pip install mlflow"):
        reporters.names(["mlflow"])


class Fake:
    """What `reporters.Wandb` calls of the package."""

    Settings = SimpleNamespace

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.sent: list[tuple[str, int, float]] = []
        self.broken_at = -1
        self.lasts = 0.0

    def init(self, **how: Any) -> Any:
        if "refused" in how["name"]:
            raise RuntimeError("no key is known")
        self.begun.append(how)
        return SimpleNamespace(id=how["id"], log=self.log, finish=lambda: time.sleep(self.lasts))

    def log(self, values: dict[str, float], step: int) -> None:
        if step == self.broken_at:
            raise OSError("the network is gone")
        self.sent.extend((key, step, value) for key, value in values.items() if key.endswith("loss"))


def start(folder: Path, step: int, until: int, *report: str, name: str = "tiny") -> None:
    """A start of a run that makes the steps after ``step``."""
    config = {"recipe": {"seed": 3}}
    with MetricsWriter(folder, 0, step=step, show=False, report=report, name=name, config=config) as writer:
        for at in range(step + 1, until + 1):
            writer.write(train(at, loss=10.0 * at + step))


def test_a_run_goes_on_at_a_service_without_a_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for step, until in ((0, 6), (4, 5), (4, 8)):
        start(tmp_path, step, until, "wandb")
    assert fake.sent == [("train/loss", at, 10.0 * at + (4 if at > 6 else 0)) for at in range(1, 9)]
    assert len({how["id"] for how in fake.begun}) == 1 and all(how["resume"] == "allow" for how in fake.begun)
    assert fake.begun[0]["config"] == {"recipe": {"seed": 3}} and fake.begun[0]["name"] == "tiny"
    start(tmp_path, 0, 1, "wandb")  # a run that starts again is another one
    assert fake.begun[-1]["id"] != fake.begun[0]["id"] and fake.sent[-1] == ("train/loss", 1, 10.0)
    (tmp_path / "reported.json").unlink()
    start(tmp_path / "late", 0, 6)
    start(tmp_path / "late", 4, 6, "wandb")  # it was not told before
    assert [step for _, step, _ in fake.sent[-2:]] == [5, 6]


def test_a_service_that_fails_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.broken_at = 2
    start(tmp_path, 0, 4, "wandb")
    assert [step for _, step, _ in fake.sent] == [1]
    assert "wandb gets no more records (OSError: the network is gone)" in capsys.readouterr().err
    fake.broken_at, fake.lasts = -1, 5.0
    monkeypatch.setattr(reporters, "PATIENCE", 0.05)
    start(tmp_path / "slow", 0, 1, "wandb")
    assert "TimeoutError: not all was sent within 0.05 s" in capsys.readouterr().err
    with pytest.raises(InvalidConfig, match="--report-to wandb: RuntimeError: no key is known"):
        start(tmp_path / "other", 0, 1, "wandb", name="refused")
    (tmp_path / "reported.json").write_text("[")
    with pytest.raises(InvalidConfig, match=r"reported.json is damaged"):
        start(tmp_path, 0, 1, "wandb")


def test_tensorboard_shows_no_step_twice(tmp_path: Path) -> None:
    """A run that starts again; one that goes on from the step of an evaluation before a growth, and grows again."""
    for _ in range(2):
        start(tmp_path, 0, 3, "tensorboard")
    assert scalars(tmp_path, "train/loss") == [(1, 10.0), (2, 20.0), (3, 30.0)]
    for begin, growths in ((0, (0, 1)), (3, (1,))):
        with MetricsWriter(tmp_path, 0, step=3, show=False) as writer:
            for grown in growths:
                writer.write({"kind": "eval", "step": 3, "loss": 5.0 + grown, "growths": grown})
            writer.write(train(4, loss=1.0 + begin) | {"growths": 1})
    assert scalars(tmp_path, "eval/loss") == [(3, 5.0), (3, 6.0)]
    assert scalars(tmp_path, "train/loss") == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 4.0)]


def test_weights_and_biases_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step, until in ((0, 6), (4, 8)):
        start(tmp_path, step, until, *reporters.names(["wandb"]))
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1
    assert all(b"train/loss" in file.read_bytes() for file in files)


def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")  # which a client for servers alone comes without
    monkeypatch.chdir(tmp_path)
    for step, until in ((0, 6), (4, 5), (4, 8)):
        start(tmp_path / "run", step, until, *reporters.names(["mlflow"]))
    assert os.listdir(tmp_path) == ["run"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    ids = [found.experiment_id for found in client.search_experiments()]
    (run,) = client.search_runs(ids)
    assert run.data.params == {"recipe.seed": "3"} and run.info.status == "FINISHED"
    found = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "train/loss")]
    assert found == [(at, 10.0 * at + (4 if at > 6 else 0)) for at in range(1, 9)]
