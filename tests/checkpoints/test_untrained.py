"""Parameters that a run trains in no optimizer group and does not freeze, and averages of weights among its buffers.

DeepSpeed lists such parameters nowhere: its stages 0 to 2 save and restore them with the module, its stage 3 saves and
restores none of their values. Its own strict loads are the judge, on two ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bert2bert.checkpoints.open import open_source
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, UnsupportedGrowth
from tests import tiny
from tests.checkpoints.engines import release
from tests.distributed import run_ranks
from tests.doors import grow, reshard

CONFIG = tiny.config_of("gpt2")
DEEPER = CONFIG | {"n_layer": 2 * CONFIG["n_layer"]}
OUT = ("wpe", "ln_1.bias", "probe", "tau", "teacher")  # parts of the names of what no group has
LEFT = ["transformer.wpe.weight", *(f"transformer.h.{i}.ln_1.bias" for i in range(CONFIG["n_layer"]))]

Values = dict[str, list[Any]]


class Script(nn.Module):
    """A GPT-2 with what scripts put beside it."""

    def __init__(self, config: dict[str, Any], beside: str) -> None:
        super().__init__()
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        if beside == "teacher":
            self.teacher = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        if beside == "probe":
            self.probe = nn.Linear(3, 5)
        if beside == "tau":
            self.tau = nn.Parameter(torch.ones(3))
        if beside == "table":
            self.register_buffer("dropped", torch.zeros(config["n_layer"]))
        if beside == "empty":
            self.empty, self.none = nn.Linear(0, 5), nn.Linear(3, 0)
        for name, parameter in self.model.named_parameters() if beside == "average" else ():
            self.register_buffer(f"average{name.replace('.', '')}", parameter.detach().clone())

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.model(**batch)


def build(config: dict[str, Any], stage: int, seed: int, beside: str = "", freeze: tuple[str, ...] = ()) -> Any:
    import deepspeed

    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    model = Script(config, beside) if beside else model
    tiny.scramble(model, seed)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in freeze))
    trained = [
        p for n, p in model.named_parameters() if p.requires_grad and not any(o in n for o in OUT[2 * bool(beside) :])
    ]
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def step(engine: Any) -> None:
    ids = torch.arange(2, 10)[None]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def whole(engine: Any) -> Values:
    import deepspeed

    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = parameter.tolist()
    return found


def saved(
    folder: str, config: dict[str, Any], stage: int, beside: str, freeze: tuple[str, ...], exclude: bool
) -> Values:
    engine = build(config, stage, 0, beside, freeze)
    step(engine)
    engine.save_checkpoint(folder, exclude_frozen_parameters=exclude)
    found = whole(engine)
    release(engine)
    return found


def loaded(
    folder: str, config: dict[str, Any], stage: int, beside: str, freeze: tuple[str, ...], strict: bool
) -> Values:
    engine = build(config, stage, 1, beside, freeze)
    path, _ = engine.load_checkpoint(folder, load_module_strict=strict)
    assert path is not None
    found = whole(engine)
    step(engine)
    release(engine)
    return found


def run(folder: Path, stage: int, beside: str = "", freeze: tuple[str, ...] = (), exclude: bool = False) -> Values:
    truth = run_ranks(saved, 2, str(folder), CONFIG, stage, beside, freeze, exclude)[0]
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return truth


def load(
    folder: Path, stage: int, config: dict[str, Any] = CONFIG, beside: str = "", freeze: tuple[str, ...] = (),
    strict: bool = True,
) -> Values:  # fmt: skip
    return run_ranks(loaded, 2, str(folder), config, stage, beside, freeze, strict)[0]


def differing(found: Values, truth: Values) -> list[str]:
    return [name for name in truth if found[name] != truth[name]]


def resharded(source: Path, target: Path, stage: int) -> str:
    lines: list[str] = []
    reshard(source, target, format="zero", stage=stage, world_size=2, say=lines.append)
    assert verify(source, target).ok
    return "\n".join(lines)


@pytest.mark.parametrize("stage", [1, 2])
def test_they_are_restored_wherever_deepspeed_restores_them(stage: int, tmp_path: Path) -> None:
    truth = run(tmp_path / "run", stage)
    source = open_source(tmp_path / "run")
    assert [n for n, m in source.tensors.items() if not m.trainable] == LEFT == list(source.untrained)
    for to in (0, 1, 2, 3):
        said = resharded(tmp_path / "run", tmp_path / f"{to}", to)
        assert ("4 parameters, first transformer.wpe.weight. DeepSpeed's stage 3 restores" in said) == (to > 1)
        # Stage 3 restores them into frozen parameters only, as it does from its own files.
        assert differing(load(tmp_path / f"{to}", to), truth) == (LEFT if to == 3 else [])
    assert not differing(load(tmp_path / "3", 3, freeze=OUT), truth)
    reshard(tmp_path / "run", tmp_path / "hub", format="hub", say=lambda _: None)
    assert open_source(tmp_path / "hub").tensors.keys() == truth.keys()


def test_they_grow_as_frozen_ones(tmp_path: Path) -> None:
    truth = run(tmp_path / "run", 2)
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    for to in (2, 3):
        lines: list[str] = []
        grow(
            tmp_path / "run", tmp_path / f"{to}", tmp_path / "deeper.json", depth="stack", format="zero", stage=to,
            world_size=2, say=lines.append, measure=False,
        )  # fmt: skip
        assert "7 parameters, first transformer.wpe.weight" in "\n".join(lines)
        found = load(tmp_path / f"{to}", to, DEEPER, freeze=OUT if to == 3 else ())
        layers = {i + CONFIG["n_layer"]: i for i in range(CONFIG["n_layer"])}
        for name, tensor in found.items():
            origin = name
            for layer, of in layers.items():
                origin = origin.replace(f"h.{layer}.", f"h.{of}.")
            assert tensor == truth[origin], name


def test_stage_3_does_not_save_them(tmp_path: Path) -> None:
    truth = run(tmp_path / "run", 3)
    assert list(open_source(tmp_path / "run").unread) == LEFT
    resharded(tmp_path / "run", tmp_path / "3", 3)
    assert differing(load(tmp_path / "run", 3), truth) == differing(load(tmp_path / "3", 3), truth) == LEFT
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    with pytest.raises(InvalidCheckpoint, match=r"wpe.weight is missing[\s\S]*its name and no value"):
        grow(tmp_path / "run", tmp_path / "g", tmp_path / "deeper.json", depth="stack", say=lambda _: None)


def test_beside_frozen_ones_that_were_left_out(tmp_path: Path) -> None:
    """A list of them would make an engine look there for all that is frozen."""
    truth = run(tmp_path / "run", 2, freeze=("ln_f",), exclude=True)
    for to in (2, 3):
        said = resharded(tmp_path / "run", tmp_path / f"{to}", to)
        assert ("left out: 4 tensors, first transformer.wpe.weight" in said) == (to == 3)
        found = load(tmp_path / f"{to}", to, freeze=("ln_f",), strict=False)
        excluded = ["transformer.ln_f.weight", "transformer.ln_f.bias"]
        assert differing(found, truth) == [*(LEFT if to == 3 else []), *excluded]


@pytest.mark.parametrize("beside", ["probe", "teacher"])
def test_modules_beside_the_model(beside: str, tmp_path: Path) -> None:
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    words = {
        "probe": "not part of a gpt2",
        "teacher": "model.transformer.wte.weight and teacher.transformer.wte",
    }
    for stage in (2, 3):
        source = tmp_path / f"run{stage}"
        truth = run(source, stage, beside)
        for to in (1, 3) if stage == 2 else (3,):
            resharded(source, tmp_path / f"{stage}{to}", to)
            found = load(tmp_path / f"{stage}{to}", to, beside=beside)
            assert all(name.startswith(beside) and to == 3 for name in differing(found, truth))
    with pytest.raises(InvalidCheckpoint, match=words[beside]):
        grow(tmp_path / "run2", tmp_path / "g", tmp_path / "deeper.json", depth="stack", say=lambda _: None)
    lines: list[str] = []  # of stage 3 there are no values to grow
    grow(
        tmp_path / "run3", tmp_path / "g3", tmp_path / "deeper.json", depth="stack", format="zero", stage=3,
        world_size=2, say=lines.append, measure=False,
    )  # fmt: skip
    assert f"not in the source, so not in the target: {beside}." in "\n".join(lines)
    load(tmp_path / "g3", 3, DEEPER, beside, strict=beside == "probe")


def test_what_may_be_a_parameter_or_not_is_reported(tmp_path: Path) -> None:
    truth = run(tmp_path / "run", 2, "tau")
    assert "first tau, which the source's files list neither" in resharded(tmp_path / "run", tmp_path / "3", 3)
    assert "neither" not in resharded(tmp_path / "run", tmp_path / "2", 2)
    assert not differing(load(tmp_path / "2", 2, beside="tau"), truth)


def test_parameters_without_elements(tmp_path: Path) -> None:
    """DeepSpeed lists them as frozen ones, and at stages 1 and 2 two of them as one."""
    for stage in (0, 2, 3):
        source = tmp_path / f"run{stage}"
        truth = run(source, stage, "empty")
        assert open_source(source).tensors.keys() == truth.keys()
        for to in range(4):
            if stage and not to:
                with pytest.raises(UnsupportedGrowth, match=r"empty.weight has no elements, so its optimizer group"):
                    resharded(source, tmp_path / "0", to)
                continue
            target = tmp_path / f"{stage}{to}"
            assert "not frozen" not in resharded(source, target, to)
            assert not differing(load(target, to, beside="empty"), truth)


def test_averages_of_a_layers_weights_are_refused_where_layers_are_added(tmp_path: Path) -> None:
    run(tmp_path / "run", 2, "average")
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    (tmp_path / "longer.json").write_text(json.dumps(CONFIG | {"n_inner": 2 * 12}))
    with pytest.raises(UnsupportedGrowth, match=r"'averagetransformerh0.*one for each of 3 layers.* has 6"):
        grow(tmp_path / "run", tmp_path / "g", tmp_path / "deeper.json", depth="stack", say=lambda _: None)
    with pytest.raises(UnsupportedGrowth, match=r"'averagetransformerh0mlpc_fcweight'.*its size 12 is one that grows"):
        grow(tmp_path / "run", tmp_path / "g", tmp_path / "longer.json", width="fpi", say=lambda _: None)


def test_a_table_of_layers_is_refused_where_layers_are_added(tmp_path: Path) -> None:
    run(tmp_path / "run", 2, "table")
    (tmp_path / "deeper.json").write_text(json.dumps(DEEPER))
    (tmp_path / "wider.json").write_text(json.dumps(CONFIG | {"n_inner": 24}))
    with pytest.raises(UnsupportedGrowth, match=r"'dropped'.*it has 3 rows, as many as there are layers"):
        grow(tmp_path / "run", tmp_path / "g", tmp_path / "deeper.json", depth="stack", say=lambda _: None)
    form: dict[str, Any] = {"format": "zero", "stage": 2, "world_size": 2}
    grow(tmp_path / "run", tmp_path / "w", tmp_path / "wider.json", measure=False, say=lambda _: None, **form)
    load(tmp_path / "w", 2, CONFIG | {"n_inner": 24}, beside="table")
