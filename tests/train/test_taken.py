"""What ``--resume`` takes, for every core: a Hugging Face folder, and a resharded run of somebody's plain DeepSpeed
script, at another stage, precision and number of ranks than it was saved with.

The grown checkpoint and the run of this project are in test_architectures. Weights, moments and steps are compared bit
for bit with what the folder and the script's engine hold, and the loss with that of transformers' own model.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bert2bert.commands import cli
from bert2bert.model import registry
from bert2bert.recipe import Data, model_keys
from tests import tiny as models
from tests.checkpoints.engines import STATES, Case, hf_model, load_truth, save_cases
from tests.distributed import run_ranks
from tests.model.test_cores import asked, flat, padded, theirs
from tests.train import runs, tiny

KINDS = tuple(registry.CORES)
# What each is saved with and resumed at, on 2 ranks and then on 1 or 2; every pair of neighbours is another one
SAVED = dict(zip(KINDS, cycle(((2, "fp32"), (3, "fp32"), (1, "fp32"), (3, "bf16"), (2, "bf16"))), strict=False))
ON = dict(zip(KINDS, cycle(((3, "bf16"), (1, "fp32"), (0, "fp16"), (2, "fp32"), (3, "fp32"), (1, "fp16"), (0, "fp32"))),
              strict=False))  # fmt: skip
WORLDS = dict(zip(KINDS, cycle((1, 2)), strict=False))


def config_of(kind: str) -> dict[str, Any]:
    return models.config_of(kind, **({"architectures": ["BertForMaskedLM"]} if kind == "bert" else {}))


def case(kind: str) -> Case:
    stage, precision = SAVED[kind]
    return Case(kind, stage, precision, layout="trainer", hf=config_of(kind), steps=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every core: KIND-hub, a Hugging Face folder, and KIND-run, a script's run on 2 ranks, resharded."""
    folder = tmp_path_factory.mktemp("taken")
    save_cases(folder, 2, [case(kind) for kind in KINDS])
    for kind in KINDS:
        model = hf_model(config_of(kind), seed=5)
        model.save_pretrained(folder / f"{kind}-hub")
        model.config.save_pretrained(folder / kind)
        assert cli.main(["reshard", str(folder / kind), str(folder / f"{kind}-run")]) == 0
    return folder


def batch(kind: str) -> Any:
    return asked(kind) if registry.objective_of(config_of(kind)) == "seq2seq" else flat()


@torch.no_grad()
def expected(kind: str, truth: dict[str, Any] | None) -> float:
    """The loss of transformers' model: the folder's, or with the weights that the script's engine held."""
    model = hf_model(config_of(kind), seed=5).eval()
    if truth is not None:
        for name, parameter in model.named_parameters():
            parameter.copy_(truth["tensors"][name]["fp32"])
    found = batch(kind)
    if found.decoder is not None:
        return float(model(**padded(found)).loss)
    return float(F.cross_entropy(theirs(model, found), found.labels))


def wrong(engine: Any, weights: dict[str, torch.Tensor], truth: dict[str, Any] | None) -> list[str]:
    """What this rank holds otherwise than it should."""
    from bert2bert.train import partitions

    found = []
    for fragment in partitions.fragments(engine):
        for state in STATES if truth is not None else STATES[:1]:
            whole = weights[fragment.name] if truth is None else truth["tensors"][fragment.name][state]
            mine = partitions.read(engine, fragment, state)
            if mine is None or not torch.equal(mine, whole.flatten()[fragment.start : fragment.stop]):
                found.append(f"{fragment.name} {state}")
    steps = {0} if truth is None else set(truth["step"].values())
    return found if set(partitions.steps(engine)) == steps else [*found, "steps"]


def resumed(home: Path, kinds: list[str], world: int) -> dict[str, list[Any]]:
    """Of every kind and source: what is wrong, the loss without dropout, and that of a step."""
    from bert2bert.train import engine as engines
    from bert2bert.train import sharded

    tiny.allow_fp16()
    found = {}
    for kind in kinds:
        hf = config_of(kind)
        model_of = {key: value for key, value in hf.items() if key in model_keys(hf)}
        plan = tiny.recipe(model=model_of, data=Data(bins="bins", seq_len=8, eval_rows=8))
        for source in ("hub", "run"):
            ds_config = tiny.ds_config(*ON[kind], world, accumulation=1)
            engines.start()
            model = registry.build(plan.model or {}, opened=sharded.opened(plan, ds_config))
            engine = engines.build(plan, ds_config, model)
            path = home / f"{kind}-{source}"
            kept = runs.load(engine, path, plan, {"digest": "0", "tokenizer_digest": "0"}).kind
            truth = load_truth(home, case(kind)) if source == "run" else None
            weights = dict(hf_model(hf, seed=5).named_parameters())
            bad = wrong(engine, weights, truth)
            engine.training(False)
            with torch.no_grad():
                loss, *_ = engine.forward(batch(kind))
            engine.training(True)
            engine.set_lr(1e-3)
            first, *_ = engine.forward(batch(kind))
            engine.backward(first)
            found[f"{kind}-{source}"] = [kept, bad, float(loss), float(first)]
            engine.destroy()
    return found


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2])
def test_every_core_takes_what_bert_takes(world: int, home: Path) -> None:
    kinds = [kind for kind in KINDS if WORLDS[kind] == world]
    for rank in run_ranks(resumed, world, home, kinds, world, timeout=200):
        for name, (kept, bad, loss, first) in rank.items():
            kind, source = name.rsplit("-", 1)
            assert bad == [] and kept == {"hub": "weights", "run": "growth"}[source], name
            truth = load_truth(home, case(kind)) if source == "run" else None
            near = 1e-5 if ON[kind][1] == "fp32" else 0.05
            assert loss == pytest.approx(expected(kind, truth), rel=near), name
            assert first == pytest.approx(loss, rel=0.2), name  # a mixture's has its router's loss
