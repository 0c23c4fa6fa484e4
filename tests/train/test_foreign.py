"""Somebody's DeepSpeed run of a transformers BERT: refused with a remedy that, taken word by word, lets it go on."""

from __future__ import annotations

import importlib.util
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bert2bert.checkpoints.open import open_source
from bert2bert.commands import cli
from bert2bert.model.registry import build
from tests.checkpoints import engines
from tests.checkpoints.engines import STATES, Case, hf_config, save_cases
from tests.distributed import run_ranks
from tests.train import runs, tiny

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": tiny.VOCAB, "max_position_embeddings": 32}
CASE = Case("plain", stage=2, model="mlm", layout="decay", sizes=SIZES)
CONFIG = {"model_type": "bert", "architectures": ["BertForMaskedLM"], **hf_config(**SIZES)}
RECIPE = '''"""Two steps, from somebody else's checkpoint."""
from bert2bert.recipe import AdamW, Data, Phase, Recipe

recipe = Recipe(
    name="foreign", model={model!r}, data=Data(bins={bins!r}, seq_len=16, eval_rows=8), global_batch_size=8,
    phases=(Phase("full", 2),), optimizer=AdamW(lr=1e-3), log_every=1,
)
'''


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    save_cases(folder, 2, [CASE])
    return folder


def pretrain(words: list[str]) -> int:
    """launch/pretrain.py in a rank that a launcher started."""
    spec = importlib.util.spec_from_file_location("launch_pretrain", ROOT / "launch" / "pretrain.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.launcher.GRACE_SECONDS = 0.0
    return int(module.main(words))


def held(bins: Path, path: Path, truth: Path, prefix: str = "") -> list[str]:
    """What this rank's engine holds otherwise than the engine that saved the checkpoint, after a load. prefix: before
    the names of that engine's parameters."""
    from bert2bert.train import engine as trained
    from bert2bert.train import partitions

    plan = runs.recipe(bins, model=CONFIG)
    engine = trained.build(plan, tiny.ds_config(2), build(CONFIG))
    found = runs.load(engine, path, plan, {"digest": "", "tokenizer_digest": ""})
    expected = torch.load(truth)
    wrong = [] if (found.kind, found.position.step) == ("growth", 0) else [found.kind]
    for fragment in partitions.fragments(engine):
        for state in STATES:
            whole = expected["tensors"][prefix + fragment.name][state]
            mine = partitions.read(engine, fragment, state)
            if mine is None or not torch.equal(mine, whole.flatten()[fragment.start : fragment.stop]):
                wrong.append(f"{fragment.name} {state}")
    steps = {expected["step"][prefix + name] for name in engine.names}
    return wrong + ["steps"] * (set(partitions.steps(engine)) != steps)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("beside", [False, True], ids=["no config", "config.json beside it"])
def test_the_remedy_of_the_refusal_works(
    bins: Path, home: Path, tmp_path: Path, beside: bool, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CONFIG.json").write_text(json.dumps(CONFIG))
    if beside:
        (home / "plain" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "recipe.py").write_text(RECIPE.format(model=CONFIG, bins=str(bins)))
    (tmp_path / "ds.json").write_text(json.dumps(tiny.ds_config(2)))
    words = ["--recipe", "recipe.py", "--ds_config", "ds.json", "--output", "run", "--resume"]
    assert run_ranks(pretrain, 2, [*words, str(home / "plain")], timeout=60) == [2, 2]
    err = capfd.readouterr().err
    assert err.count("\nerror: ") + err.startswith("error: ") == 1 and "it has no manifest" in err
    remedy = next(line for line in err.splitlines() if line.startswith("  bert2bert reshard "))
    assert ("--source-config" in remedy) == (not beside)
    assert cli.main(shlex.split(remedy)[1:]) == 0
    wrong = run_ranks(held, 2, bins, tmp_path / "TARGET", home / "plain.truth.pt", timeout=60)
    assert wrong == [[], []]
    assert run_ranks(pretrain, 2, [*words, "TARGET"], timeout=60) == [0, 0]
    manifest = runs.manifest(tmp_path / "run", 2)
    assert {group["step"] for group in manifest["groups"]} == {CASE.steps + 2}
    assert [r["step"] for r in runs.records(tmp_path / "run") if r["kind"] == "train"] == [1, 2]


class Wrapped(nn.Module):
    """A script's own module around the model: every name starts with "model."."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)


def save_wrapped(folder: Path) -> None:
    plain = engines.tiny_bert
    engines.tiny_bert = lambda *args, **more: Wrapped(plain(*args, **more))
    engines.save_on_rank(str(folder), [replace(CASE, stage=3)])


@pytest.mark.timeout(90)
def test_a_wrapper_around_the_model_is_seen_through(bins: Path, tmp_path: Path) -> None:
    run_ranks(save_wrapped, 2, tmp_path, timeout=60)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(CONFIG))
    for cut in ([], ["--format", "zero", "--stage", "2", "--world-size", "2", "--groups", "layers"]):
        target = tmp_path / f"target{len(cut)}"
        assert cli.main(["reshard", str(tmp_path / "plain"), str(target), *cut]) == 0
        assert "model.cls.predictions.bias" in open_source(target).tensors
        assert run_ranks(held, 2, bins, target, tmp_path / "plain.truth.pt", "model.", timeout=60) == [[], []]


def test_a_wrappers_prefix_is_taken_off_in_a_view_of_the_source(tmp_path: Path) -> None:
    from bert2bert.checkpoints.source import Source, TensorMeta
    from bert2bert.train.resume import _unwrapped

    source = Source(tmp_path, tmp_path, None)
    names = ["model.a", "model.b"]
    source.tensors = {name: TensorMeta(name, (2,), "float32", 0, True) for name in names}
    source.groups = [{"lr": 1.0, "names": names}]
    source.aliases = {"model.c": "model.a"}
    seen = _unwrapped(("a", "b"), source)
    assert list(seen.tensors) == ["a", "b"] and seen.meta("c").name == "model.a"
    assert seen.groups == [{"lr": 1.0, "names": ["a", "b"]}] and seen.aliases == {"c": "a"}
    assert list(source.tensors) == source.groups[0]["names"] == names and source.aliases == {"model.c": "model.a"}
    assert _unwrapped(("model.a",), source) is source
