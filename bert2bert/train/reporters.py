"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, as --report-to names them.

Rank 0 alone imports a package, and only when it is asked for. A run that goes on continues what it began there: the
run's number is kept in its folder, and no step is reported twice, since a resumed run makes the same numbers again. A
service that fails during training is left out from then on, with a note; metrics.jsonl has everything.

Refuses (InvalidConfig) a name that is not known, a package that is not installed, and a service that does not begin.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bert2bert.errors import InvalidConfig, did_you_mean
from bert2bert.files.disk import replace

PROJECT = "bert2bert"
"""Project, or experiment, where WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names no other."""
PATIENCE = 20.0
"""Seconds in which a service may send what is left at the end of a run."""
_NOT_SHOWN = ("kind", "step", "phase", "phase_step", "growths")  # keys of a record that are no measurements
STATE = "reported.json"
"""In a run's folder: of each service, the run's number there and the last steps of each kind that were reported."""


@dataclass(frozen=True)
class About:
    """A run, to those that report on it. config: anything that JSON takes; step: where the run begins or goes on;
    kept: the records of that step, the last ones of before; reported: the last step of each kind before this start."""

    folder: Path
    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    kept: Sequence[Mapping[str, Any]] = ()
    reported: Mapping[str, int] = field(default_factory=dict)


class Reporter(Protocol):
    """One place that numbers go to."""

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Report on a step: numbers by their names, "train/loss" and so on."""

    def close(self) -> None:
        """Send what is left."""


def names(words: Sequence[str]) -> tuple[str, ...]:
    """What --report-to asks for: names separated by commas or spaces, or none. InvalidConfig for what cannot be had."""
    found = [name for word in words for name in word.replace(",", " ").split()]
    if found == ["none"]:
        return ()
    if "none" in found:
        raise InvalidConfig(f"--report-to {' '.join(found)}: none stands alone")
    for name in found:
        if name not in REPORTERS:
            raise InvalidConfig(f"--report-to {name}: " + did_you_mean(name, (*REPORTERS, "none")))
        if importlib.util.find_spec(name) is None:
            raise InvalidConfig(
                f"--report-to {name}: the package is not installed; pip install {name}, or leave {name} out"
            )
    return tuple(dict.fromkeys(found))


def opened(asked: Sequence[str], about: About) -> list[Reporter]:
    """The reporters of these names. Raises InvalidConfig where a service does not begin."""
    return [REPORTERS[name](about) for name in asked]


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, by the names under which they are shown."""
    return {
        f"{record['kind']}/{key}": value
        for key, value in record.items()
        if key not in _NOT_SHOWN and isinstance(value, int | float)
    }


class TensorBoard:
    """Event files in the run's folder. What a killed run wrote past its checkpoint is not shown any more."""

    def __init__(self, about: About) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if (folder := about.folder / "tensorboard").is_symlink():
            folder.unlink()
        self._hook = threading.excepthook
        threading.excepthook = self._failed
        fresh = not folder.is_dir()
        self._board = SummaryWriter(str(folder), purge_step=None if fresh else about.step)
        for record in () if fresh else about.kept:  # those of this step that were before the checkpoint
            self.write(record["kind"], record["step"], numbers(record))

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self._board.add_scalar(key, value, step)

    def _failed(self, args: Any) -> None:
        """A disk that TensorBoard's thread cannot write to is an error of the next call, and so no news here."""
        if not isinstance(args.exc_value, OSError) or "_AsyncWriter" not in type(args.thread).__name__:
            self._hook(args)

    def close(self) -> None:
        try:
            self._board.close()
        finally:
            threading.excepthook = self._hook


def _states(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict) or not all(isinstance(state, dict) for state in found.values()):
            raise ValueError("not the object that a run writes")
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"{path} is damaged ({error}); delete it, and services begin a run anew") from None
    return found


class Service:
    """A service with a run of its own that is continued by its number. Subclasses: how to begin, to report, to end."""

    name: str

    def __init__(self, about: About) -> None:
        path = about.folder / STATE
        states = _states(path)
        before = states.get(self.name, {}) if about.step else {}  # a run that starts again is another one
        until = before.get("until", {})
        last = about.reported if before else {}  # else nothing was reported here yet
        self._until = {kind: max(until.get(kind, -1), last.get(kind, -1)) for kind in until.keys() | last.keys()}
        try:
            number = self.begin(about, before.get("number"))
        except Exception as error:
            raise InvalidConfig(f"--report-to {self.name}: {type(error).__name__}: {error}") from error
        replace(path, json.dumps({**states, self.name: {"number": number, "until": self._until}}, indent=1) + "\n")
        self._works = True

    def begin(self, about: About, number: str | None) -> str:
        """Begin a run, or continue the one of that number; its number."""
        raise NotImplementedError

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report."""
        raise NotImplementedError

    def end(self) -> None:
        """Send what is left."""
        raise NotImplementedError

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        if step > self._until.get(kind, -1):
            self._try(lambda: self.send(step, numbers))

    def close(self) -> None:
        self._try(self.end)

    def _try(self, act: Any) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:  # whatever a service does, training goes on
            self._works = False
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"note: {self.name} gets no more records ({what}); metrics.jsonl has them", file=sys.stderr)


class Wandb(Service):
    """Weights & Biases; its environment variables hold, WANDB_MODE=offline among them."""

    name = "wandb"

    def begin(self, about: About, number: str | None) -> str:
        import wandb  # optional, and only where it was asked for

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", about.name),
            dir=str(about.folder), id=number or uuid.uuid4().hex[:8], resume="allow", config=dict(about.config),
            settings=wandb.Settings(console="off"), allow_val_change=True,
        )  # fmt: skip
        return str(self._run.id)

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def end(self) -> None:
        end = threading.Thread(target=self._run.finish, daemon=True)
        end.start()
        end.join(PATIENCE)
        if end.is_alive():  # without a network it goes on trying, while a batch system counts the seconds
            raise TimeoutError(f"not all was sent within {PATIENCE:g} s; wandb sync sends the rest")


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """What nested dicts hold, under names with dots."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", str(value)[:500]


class Mlflow(Service):
    """MLflow; its environment variables hold, MLFLOW_TRACKING_URI among them (else a file in the run's folder)."""

    name = "mlflow"

    def begin(self, about: About, number: str | None) -> str:
        import mlflow  # as above

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(about.folder / 'mlflow.db').absolute()}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        run = mlflow.start_run(run_id=number, run_name=None if number else about.name)
        if number is None:
            said = list(_flat(about.config))
            for at in range(0, len(said), 100):  # it takes no more at a time
                mlflow.log_params(dict(said[at : at + 100]))
        return str(run.info.run_id)

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        import mlflow  # as above

        mlflow.log_metrics(dict(numbers), step=step)

    def end(self) -> None:
        import mlflow  # as above

        mlflow.end_run()


REPORTERS: Mapping[str, type[TensorBoard | Wandb | Mlflow]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
"""By the name that --report-to takes, which is the package's, too."""
