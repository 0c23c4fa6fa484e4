"""Somebody's DeepSpeed run of a transformers BERT: refused with a remedy that, taken word by word, lets it go on."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
import torch

from bert2bert import cli
from bert2bert.model.bert import Bert
from bert2bert.model.config import BertConfig
from tests.distributed import run_ranks
from tests.shards.engines import STATES, Case, hf_config, save_cases
from tests.train import runs, tiny

ROOT = Path(__file__).parents[2]
SIZES = {"vocab_size": tiny.VOCAB, "max_position_embeddings": 32}
CASE = Case("plain", stage=2, model="mlm", layout="decay", sizes=SIZES)
CONFIG = {"model_type": "bert", "architectures": ["BertForMaskedLM"], **hf_config(**SIZES)}
RECIPE = '''"""Two steps, from somebody else's checkpoint."""
from bert2bert.recipe import AdamW, Data, Phase, Recipe

recipe = Recipe(
    name="foreign", model={model!r}, data=Data(bins={bins!r}, seq_len=16, eval_rows=8), batch_rows=8,
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
    module.GRACE_SECONDS = 0.0
    return int(module.main(words))


def held(bins: Path, path: Path, truth: Path) -> list[str]:
    """What this rank's engine holds otherwise than the engine that saved the checkpoint, after a load."""
    from bert2bert.train import engine as engines
    from bert2bert.train import loading, partitions

    plan = runs.recipe(bins, model=CONFIG)
    engine = engines.build(plan, tiny.ds_config(2), Bert(BertConfig.from_hf(CONFIG)))
    found = loading.resume(engine, path, plan, {"digest": "", "tokenizer_digest": ""})
    expected = torch.load(truth)
    wrong = [] if (found.kind, found.progress.step) == ("growth", 0) else [found.kind]
    for fragment in partitions.fragments(engine):
        for state in STATES:
            whole = expected["tensors"][fragment.name][state]
            mine = partitions.read(engine, fragment, state)
            if mine is None or not torch.equal(mine, whole.flatten()[fragment.start : fragment.stop]):
                wrong.append(f"{fragment.name} {state}")
    steps = {expected["step"][name] for name in engine.names}
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
    said = capfd.readouterr().err
    assert said.count("\nerror: ") + said.startswith("error: ") == 1 and "it has no manifest" in said
    remedy = next(line for line in said.splitlines() if line.startswith("  bert2bert reshard "))
    assert ("--source-config" in remedy) == (not beside)
    assert cli.main(shlex.split(remedy)[1:]) == 0
    wrong = run_ranks(held, 2, bins, tmp_path / "TARGET", home / "plain.truth.pt", timeout=60)
    assert wrong == [[], []]
    assert run_ranks(pretrain, 2, [*words, "TARGET"], timeout=60) == [0, 0]
    manifest = runs.manifest(tmp_path / "run", 2)
    assert {group["step"] for group in manifest["groups"]} == {CASE.steps + 2}
    assert [r["step"] for r in runs.records(tmp_path / "run") if r["kind"] == "train"] == [1, 2]
