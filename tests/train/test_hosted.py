"""T5 and the mixtures on real ranks: they learn as in plain torch, are saved, and go on at any stage and world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.model import registry
from bert2bert.model.batch import Batch
from bert2bert.model.program import LayerProgram, full
from bert2bert.recipe import Recipe
from bert2bert.train import partitions
from bert2bert.train.position import Progress
from tests import tiny as models
from tests.distributed import run_ranks
from tests.model.test_cores import asked
from tests.rounding import ROUNDING, gap
from tests.train import tiny

LR, DECAY, CLIP = 1e-2, 0.1, 1.0
DATA = {"digest": "0", "tokenizer_digest": "0"}
_BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": models.config_of("t5"),
    "t5-untied": models.config_of("t5-untied"),
    "mixtral": models.config_of("mixtral", **_BALANCED),
    "qwen2_moe": models.config_of("qwen2_moe", **_BALANCED),
    "qwen3_moe": models.config_of("qwen3_moe", hidden_size=16, moe_intermediate_size=8, **_BALANCED),
}


def recipe(name: str) -> Recipe:
    return tiny.recipe(model=CONFIGS[name], clip=CLIP)


def batch(name: str, step: int, rank: int) -> Batch:
    """The second rank reads one token over and over: most of its experts get none."""
    found = asked(name, seed=step % 2)
    if rank:
        found.tokens = torch.full_like(found.tokens, 3)
        found.labels = torch.where(found.labels == -100, found.labels, 3)
    return found


def program(name: str, step: int, layers: int) -> LayerProgram:
    """All layers; in one step of a mixture two of them, the lower one at rest."""
    return LayerProgram((0, 1), (1,), False) if step == 5 and not name.startswith("t5") else full(layers)


def model(name: str) -> Any:
    torch.manual_seed(1)
    return registry.build(CONFIGS[name])


def steps(engine: Any, name: str, first: int, last: int) -> list[float]:
    """Mean losses of optimizer steps on both batches of each, one a rank or both of one rank."""
    losses = []
    engine.set_lr(LR)
    for step in range(first, last):
        found, run = 0.0, program(name, step, len(engine.model.layers))
        engine.apply(run)
        for micro in range(engine.accumulation):
            loss, *_ = engine.forward(batch(name, step, engine.rank + micro), run)
            engine.backward(loss)
            found += float(loss.detach())
        losses.append(sum(engine.sum([found])) / 2)
    return losses


def held(engine: Any) -> dict[str, Any]:
    return {
        f"{f.name} {state} {f.start}": partitions.read(engine, f, state).clone().numpy()
        for f in partitions.fragments(engine)
        for state in partitions.STATES
    }


def write(engine: Any, folder: Path, name: str, step: int) -> None:
    from bert2bert.train.save import save

    save(
        engine, folder, Progress(step, 0, step, 8 * step, {}), model=engine.model.hf_config,
        aliases=engine.model.aliases, recipe=recipe(name).to_dict(), data=DATA, growth=None, keep=2,
        check=lambda: None,
    )  # fmt: skip


def train(cases: list[tuple[str, int, str]], root: Path) -> list[dict[str, Any]]:
    """Of each (model, stage, precision): losses, weights; and once more from a checkpoint in the middle."""
    from bert2bert.train import engine as engines
    from bert2bert.train.resume import load

    found = []
    for name, stage, precision in cases:
        folder = root / f"{name}-{stage}-{precision}"
        config = tiny.ds_config(stage, precision, world=2, accumulation=1)
        engine = engines.build(recipe(name), config, model(name))
        losses = steps(engine, name, 0, 3)
        write(engine, folder, name, 3)
        losses += steps(engine, name, 3, 8)
        whole = held(engine)
        engine.destroy()
        other = engines.build(recipe(name), config, model(name))
        load(other, folder, recipe(name), DATA)
        again = steps(other, name, 3, 8)
        same = all((value == whole[key]).all() for key, value in held(other).items())
        found.append({"losses": losses, "again": again, "same": same, "held": whole})
        other.destroy()
    return found


def resume(name: str, folder: Path, stage: int, precision: str) -> list[float]:
    from bert2bert.train import engine as engines
    from bert2bert.train.resume import load

    config = tiny.ds_config(stage, precision, world=1, accumulation=2)
    engine = engines.build(recipe(name), config, model(name))
    load(engine, folder, recipe(name), DATA)
    return steps(engine, name, 3, 8)


def reference(name: str) -> list[float]:
    """Plain torch in one process."""
    core = model(name)
    named = dict(core.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": DECAY if core.known[n].decay else 0.0} for n, p in named.items()], lr=LR
    )
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        run = program(name, step, len(core.layers))
        loss = (core(batch(name, step, 0), run).loss + core(batch(name, step, 1), run).loss) / 2
        loss.backward()
        learning = {"head", "embeddings" if run.embeddings_learn else "", *(core.parts[i] for i in run.learn)}
        assert {core.known[n].part for n, p in named.items() if p.grad is not None} <= learning
        torch.nn.utils.clip_grad_norm_(core.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


CASES = [
    *[("mixtral", stage, "fp32") for stage in range(4)],
    *[("t5", stage, "fp32") for stage in (1, 3)],
    ("t5-untied", 2, "fp32"),
    ("qwen2_moe", 3, "fp32"),
    *[(name, stage, "bf16") for name, stage in (("t5", 1), ("qwen3_moe", 2), ("mixtral", 3))],
]
Runs = tuple[Path, dict[Any, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("hosted")
    ranks = run_ranks(train, 2, CASES, root, timeout=200)
    return root, {case: [rank[i] for rank in ranks] for i, case in enumerate(CASES)}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_it_learns_as_in_torch_and_resumes(case: tuple[str, int, str], runs: Runs) -> None:
    """Experts that get no token of a rank neither stop it nor change anything."""
    name, _, precision = case
    expected = reference(name)
    assert expected[-1] < 0.9 * expected[0]
    for rank in runs[1][case]:
        if precision == "fp32":
            assert gap(rank["losses"], expected) <= ROUNDING
            assert rank["again"] == rank["losses"][3:] and rank["same"]
        else:
            assert rank["losses"] == pytest.approx(expected, rel=2e-2)
            assert rank["again"] == pytest.approx(rank["losses"][3:], rel=2e-2)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name, saved, stage", [("mixtral", 3, 1), ("t5", 1, 3), ("qwen2_moe", 3, 0)])
def test_it_goes_on_at_another_stage_and_world_size(name: str, saved: int, stage: int, runs: Runs) -> None:
    root, found = runs
    (losses,) = run_ranks(resume, 1, name, root / f"{name}-{saved}-fp32", stage, "fp32")
    assert gap(losses, found[(name, saved, "fp32")][0]["losses"][3:]) <= ROUNDING
