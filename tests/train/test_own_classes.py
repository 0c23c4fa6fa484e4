"""A program and a trigger of a recipe file's own: those of the how-to pages, word for word, in a run."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from bert2bert.commands.plan_recipe import plan_recipe
from bert2bert.errors import InvalidConfig
from bert2bert.recipe import Phase, Stretch, Tokens, from_dict, load_recipe
from tests.distributed import run_ranks
from tests.train import runs

ROOT = Path(__file__).resolve().parents[2]
REST = """
from bert2bert.recipe import AdamW, Data, Phase, Recipe
from tests.train.tiny import model_config

recipe = Recipe(
    "own", model_config(), Data({bins!r}, seq_len=16, eval_rows=8), 8,
    (Phase("deep", 20, StochasticDepth(0.9), until=LossBelow(4.11)), Phase("full", 2)), AdamW(lr=5e-3),
    eval_every=2, checkpoint_every=100, log_every=1,
)
"""


def code_of(page: str) -> str:
    """The Python of a how-to page."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/how-to" / page).read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    path = folder / "own.py"
    rest = REST.format(bins=str(runs.make_bins(folder)))
    path.write_text(code_of("add-a-program.md") + code_of("add-a-trigger.md") + rest, encoding="utf-8")
    return path


def test_the_class_of_the_page_is_short() -> None:
    body = code_of("add-a-program.md").partition("class StochasticDepth:\n")[2]
    assert len([line for line in body.splitlines() if line]) <= 10


@pytest.mark.timeout(120)
def test_a_stopped_run_goes_on_bit_for_bit(file: Path, tmp_path: Path) -> None:
    """Under ZeRO-2; other commands read its checkpoint without the file."""
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    for output, resume, stop_at in (("whole", None, None), ("parts", None, 3), ("parts", tmp_path / "parts", None)):
        run_ranks(runs.run, 2, load_recipe(file), config, tmp_path / output, resume, stop_at)
    whole, parts = runs.records(tmp_path / "whole"), runs.records(tmp_path / "parts")
    assert whole == parts
    deep = [r["layers_run"] for r in whole if r["kind"] == "train" and r["phase"] == "deep"]
    assert 4 < len(deep) < 20 and len(set(deep)) > 1  # ended by its trigger, after the stop
    losses = [r["loss"] for r in whole if r["kind"] == "eval"]
    last = len(deep) // 2
    assert losses[last] < 4.11 <= min(losses[:last]) and len(deep) % 2 == 0
    ends = [runs.manifest(tmp_path / run, len(deep) + 2) for run in ("whole", "parts")]
    assert all(ends[0][key] == ends[1][key] for key in ("tensors", "groups", "counters"))
    recorded = ends[0]["training"]["recipe"]["phases"][0]
    assert recorded["program"] == {"drop": 0.9, "kind": "stochastic-depth"}
    assert recorded["until"] == {"nats": 4.11, "kind": "loss-below"}
    command = [sys.executable, "-m", "bert2bert", "inspect", str(tmp_path / "parts")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    with pytest.raises(InvalidConfig, match=r"phases\.0\.program\.kind is 'stochastic'"):
        from_dict({**ends[0]["training"]["recipe"], "phases": [{"name": "deep", "program": {"kind": "stochastic"}}]})


def test_their_fields_are_checked_set_and_planned(file: Path) -> None:
    changed = load_recipe(file, ["phases.0.program.drop=0.5", "phases.0.until.nats=2", "phases.1.steps=3"])
    phase: Any = changed.phases[0]
    assert (phase.program.drop, phase.until.nats, changed.phases[1].steps) == (0.5, 2.0, 3)
    planned = plan_recipe(changed, None, 1).phases[0]
    assert planned.program == "stochastic-depth" and planned.until == "until loss-below" and planned.layers_run < 3
    with pytest.raises(InvalidConfig, match=r"phases.0.program \('stochastic-depth'\): drop is 1.5; expected a prob"):
        load_recipe(file, ["phases.0.program.drop=1.5"])
    with pytest.raises(InvalidConfig, match=r"phases\.0\.until\.nats is 'few'"):
        load_recipe(file, ["phases.0.until.nats=few"])


@dataclass(frozen=True)
class Steps:
    """Counts, and says so; or is wrong."""

    steps: int
    share: Any = None
    kind: str = field(default="so-many-steps", init=False)
    counted: ClassVar[bool] = True

    def done(self, phase: Stretch) -> float:
        found: float = phase.steps / self.steps if self.share is None else self.share
        return found


@dataclass(frozen=True)
class Taken:
    kind: str = field(default="tokens", init=False)


@dataclass(frozen=True)
class Silent:
    kind: str = field(default="silent", init=False)

    def done(self, phase: Stretch) -> float:
        return 0.0


def test_what_is_no_trigger_is_refused(file: Path) -> None:
    made = replace(load_recipe(file), phases=(Phase("a", until=Steps(3)),))
    assert made.steps is None and from_dict(made.to_dict()) == made
    wrong: list[tuple[Any, str]] = [
        ("tokens", "phase.until is 'tokens'; expected one of Tokens, Flops, .* or an instance of a frozen dataclass"),
        (Tokens, "expected one of Tokens"),
        (Stretch(1, 1, 1, 1.0, 1.0), "its field kind is None; expected kind: str = field"),
        (Taken(), "its kind is 'tokens'; expected another kind than that of Tokens"),
        (Silent(), "its counted is None; expected counted: ClassVar"),
        (Steps(3, "half"), "its done after one step is 'half'; expected the share of the phase that is done, a number"),
    ]
    for value, message in wrong:
        with pytest.raises(InvalidConfig, match=message):
            Phase("a", 3, until=value)
