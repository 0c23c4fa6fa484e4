"""Grow what real DeepSpeed engines saved and load it into real, unmodified ones: every value, and the next loss."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.algebra.realise import realise
from bert2bert.checkpoints.manifest import Grown, Manifest, Trained
from bert2bert.commands import cli
from bert2bert.commands.grow import _tokenizer_digest
from bert2bert.commands.verify import verify
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, LossyGrowth, UnsupportedGrowth
from bert2bert.growth.opened import open_growth
from bert2bert.growth.source_model import open_model
from tests.checkpoints.engines import STATES, Case, build, hf_config, release, save_cases, tiny_bert, train, truth
from tests.distributed import run_ranks
from tests.doors import grow
from tests.rounding import ROUNDING, SINGLE, gap, unit

BIG = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 131}
SOURCES = [
    Case("z1", 1, client_state={"note": "kept"}),
    Case("z2", 2),
    Case("z3", 3),
    Case("z2one", 2, layout="single", model="mlm"),
    Case("z2layers", 2, layout="layers", model="mlm"),
    Case("bf16", 2, "bf16"),
    Case("fp16", 2, "fp16"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources trained at world size 2, and the configs that a plain DeepSpeed run does not save."""
    path = tmp_path_factory.mktemp("growth")
    save_cases(path, 2, SOURCES)
    for name, sizes in (("small", {}), ("big", BIG), ("odd", {**BIG, "hidden_size": 48, "num_attention_heads": 3})):
        (path / f"{name}.json").write_text(json.dumps({"model_type": "bert", **hf_config(**sizes)}))
    return path


def options(folder: Path, config: str = "big") -> dict[str, Any]:
    return {
        "config": folder / f"{config}.json",
        "source_config": folder / "small.json",
        "seed": 3,
        "say": lambda _: None,
    }


def expected_tensors(folder: Path, source: str, **how: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every state of the grown model by the plan, from the truth that the source engine recorded."""
    recorded = torch.load(folder / f"{source}.truth.pt")["tensors"]
    plan = open_growth(folder / source, folder / "big.json", source_config=folder / "small.json", seed=3, **how).plan
    return {
        name: {s: realise(t, s, lambda n, state, a, b: recorded[n][state][a:b]) for s in STATES}
        for name, t in plan.tensors.items()
    }


def resume_and_compare(folder: str, source: str, loads: list[tuple[str, Case]], **how: Any) -> list[float]:
    """On every rank: unmodified load, comparison of all values, one more step; the first loss of each load."""
    expected = expected_tensors(Path(folder), source, **how)
    recorded = torch.load(Path(folder) / f"{source}.truth.pt")
    losses = []
    for path, case in loads:
        engine = build(case)
        loaded, client = engine.load_checkpoint(path)
        assert loaded is not None
        if source == "z1":
            assert client["note"] == "kept"
        if "checkpoint" in case.config and case.stage == 3:  # DeepSpeed shares one step tensor among sub-groups
            for state in engine.optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()
        found = truth(engine, case)
        assert found["tensors"].keys() == expected.keys()
        for name, states in found["tensors"].items():
            for state in STATES:
                assert torch.equal(states[state], expected[name][state]), (path, name, state)
        for mine, theirs in zip(found["groups"], recorded["groups"], strict=False):
            assert {k: mine[k] for k in ("weight_decay", "eps", "lr")} == {
                k: theirs[k] for k in ("weight_decay", "eps", "lr")
            }, path
        assert found["counters"] == recorded["counters"]
        assert found["lr_scheduler"] == recorded["lr_scheduler"]
        if case.precision == "fp16":
            assert found["loss_scaler"]["cur_scale"] == recorded["loss_scaler"]["cur_scale"] != 2.0**8
        step = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        assert step == set(map(float, recorded["step"].values())) == {3.0 - recorded["counters"]["skipped_steps"]}
        first, *rest = train(engine, case, 3, start=3)
        assert all(torch.isfinite(torch.tensor(rest))), path
        losses.append(first)
        release(engine)
    return losses


def next_loss(folder: str, case: Case) -> float:
    """The loss of the source's own next step, on every rank."""
    engine = build(case)
    engine.load_checkpoint(f"{folder}/{case.name}")
    (loss,) = train(engine, case, 1, start=3)
    release(engine)
    return loss


@pytest.mark.parametrize("source,worlds", [("z2", (1, 2, 3)), ("z1", (2,)), ("z3", (3,))])
def test_native_shards_of_every_stage_and_world_size(
    folder: Path, source: str, worlds: tuple[int, ...], tmp_path: Path
) -> None:
    case = next(c for c in SOURCES if c.name == source)
    reference = run_ranks(next_loss, 2, str(folder), case) if 2 in worlds else []
    for world in worlds:
        loads = []
        for stage in (1, 2, 3):
            target = tmp_path / f"s{stage}w{world}"
            grow(folder / source, target, format="zero", stage=stage, world_size=world, **options(folder))
            loads.append((str(target), replace(case, stage=stage, sizes=BIG, seed=9)))
        losses = run_ranks(resume_and_compare, world, str(folder), source, loads)
        if world == 2:  # the same batches as the source's: the growth is exact, so is the loss
            for mine, theirs in zip(losses, reference, strict=True):
                assert gap(mine, [theirs] * 3) <= ROUNDING


@pytest.mark.parametrize("source,worlds", [("z3", (1, 2, 3)), ("z1", (2,))])
def test_universal_into_every_stage_and_world_size(
    folder: Path, source: str, worlds: tuple[int, ...], tmp_path: Path
) -> None:
    case = next(c for c in SOURCES if c.name == source)
    reference = run_ranks(next_loss, 2, str(folder), case)
    grow(folder / source, tmp_path / "uni", **options(folder))
    universal = {"checkpoint": {"load_universal": True}}
    for world in worlds:
        loads = [
            (str(tmp_path / "uni"), replace(case, stage=s, sizes=BIG, config=universal, seed=9)) for s in (1, 2, 3)
        ]
        losses = run_ranks(resume_and_compare, world, str(folder), source, loads)
        if world == 2:
            for mine, theirs in zip(losses, reference, strict=True):
                assert gap(mine, [theirs] * 3) <= ROUNDING


@pytest.mark.parametrize("source", ["z2one", "z2layers", "bf16", "fp16"])
def test_group_layouts_and_precisions_are_those_of_the_source(folder: Path, source: str, tmp_path: Path) -> None:
    case = next(c for c in SOURCES if c.name == source)
    loads = []
    for stage in (2, 3):
        grow(folder / source, tmp_path / f"s{stage}", format="zero", stage=stage, world_size=2, **options(folder))
        loads.append((str(tmp_path / f"s{stage}"), replace(case, stage=stage, sizes=BIG, seed=9)))
    reference = run_ranks(next_loss, 2, str(folder), case)
    losses = run_ranks(resume_and_compare, 2, str(folder), source, loads)
    for mine, theirs in zip(losses, reference, strict=True):
        limit = {"fp32": None, "bf16": 64 * unit(torch.bfloat16), "fp16": 64 * unit(torch.float16)}[case.precision]
        assert gap(mine, [theirs] * 2, limit and limit * theirs) <= ROUNDING


def test_verify_and_hub(folder: Path, tmp_path: Path) -> None:
    how = options(folder)
    grow(folder / "z2", tmp_path / "uni", **how)
    grow(folder / "z2", tmp_path / "hub", format="hub", **how)
    for grown, states in (("uni", 3), ("hub", 1)):
        found = verify(folder / "z2", tmp_path / grown, source_config=folder / "small.json")
        assert found.ok, found
        assert sum(c.name in ("weights", "exp_avg", "exp_avg_sq") for c in found.checks) == states
        assert gap(found.drift.logits_relative, 0.0, SINGLE) <= ROUNDING
    # another source, then one flipped mantissa bit: each is found
    found = verify(folder / "bf16", tmp_path / "uni", source_config=folder / "small.json")
    assert not found.ok and {c.name for c in found.checks if not c.ok} >= {"source", "weights"}
    file = next((tmp_path / "uni").glob("*/zero/bert.encoder.layer.1.output.dense.weight/exp_avg.pt"))
    content = bytearray(file.read_bytes())
    at = content.find(torch.load(file)["param"].numpy().tobytes()[:64])
    content[at + 1] ^= 1
    file.write_bytes(content)
    found = verify(folder / "z2", tmp_path / "uni", source_config=folder / "small.json")
    assert [c.name for c in found.checks if not c.ok] == ["exp_avg"]
    assert "layer.1.output.dense.weight" in next(c.detail for c in found.checks if not c.ok)
    # the hub folder is a transformers model with the source's logits
    from transformers import BertForPreTraining

    model, info = BertForPreTraining.from_pretrained(tmp_path / "hub", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    source = tiny_bert()
    recorded = torch.load(folder / "z2.truth.pt")["tensors"]
    source.load_state_dict({n: s["fp32"] for n, s in recorded.items()}, strict=False)
    ids = torch.randint(0, 61, (2, 9))
    a, b = (m.eval()(ids) for m in (source, model))
    assert gap(a.prediction_logits, b.prediction_logits) <= ROUNDING
    assert gap(a.seq_relationship_logits, b.seq_relationship_logits) <= ROUNDING
    # and it grows on: hub to universal, with moments at zero
    (tmp_path / "bigger.json").write_text(json.dumps({"model_type": "bert", **hf_config(**BIG, num_hidden_layers=4)}))
    grow(tmp_path / "hub", tmp_path / "more", tmp_path / "bigger.json", width="aki", say=lambda _: None)
    again = open_model(tmp_path / "more").source
    assert again.step("bert.pooler.dense.bias") == 0
    assert not again.read("bert.pooler.dense.bias", "exp_avg", 0, 64).any()


def test_random_width_starts_a_fresh_optimizer(folder: Path, tmp_path: Path) -> None:
    grow(folder / "z2", tmp_path / "t", width="random", **options(folder))
    grown = open_model(tmp_path / "t").source
    assert {grown.step(name) for name in grown.tensors} == {0}
    assert not any(grown.read(n, "exp_avg_sq", 0, m.shape[0]).any() for n, m in grown.tensors.items())
    assert verify(folder / "z2", tmp_path / "t", source_config=folder / "small.json").ok


def test_wrapped_names_are_found_and_kept(folder: Path, tmp_path: Path) -> None:
    model = tiny_bert()
    from safetensors.torch import save_file

    for prefix, strip in (("module.model.", ""), ("model.", "bert."), ("", "bert.")):
        source = tmp_path / f"src{len(prefix)}{len(strip)}"
        source.mkdir()
        state = {n: p.detach().clone() for n, p in model.named_parameters() if not strip or n.startswith("bert.")}
        save_file({prefix + n.removeprefix(strip): t for n, t in state.items()}, source / "model.safetensors")
        opened = open_model(source, folder / "small.json")
        assert opened.naming.prefix == prefix and bool(opened.naming.lacks) == bool(strip)
        lines: list[str] = []
        grow(source, source / "grown", **{**options(folder), "say": lines.append})
        assert not prefix or any(repr(prefix) in line for line in lines)
        grown = open_model(source / "grown")
        assert set(grown.source.tensors) == set(opened.source.tensors)
        assert verify(source, source / "grown", source_config=folder / "small.json").ok


def test_lossy_width_has_to_be_accepted_and_is_measured(folder: Path, tmp_path: Path) -> None:
    how = options(folder, "odd")
    with pytest.raises(LossyGrowth, match=r"1 to 2 copies.*\n.*--lossy"):
        grow(folder / "z2", tmp_path / "t", **how)
    assert not (tmp_path / "t").exists()
    lines: list[str] = []
    grow(folder / "z2", tmp_path / "t", lossy=True, **{**how, "say": lines.append})
    manifest = open_model(tmp_path / "t").source.manifest
    assert manifest and manifest.growth and manifest.growth.drift
    assert manifest.growth.drift["logits_relative"] > 1e-4
    assert manifest.growth.exactness["function"]
    assert any("logits differ by" in line for line in lines)
    assert verify(folder / "z2", tmp_path / "t", source_config=folder / "small.json").ok


def test_a_config_that_contradicts_the_checkpoints_own_is_refused(folder: Path, tmp_path: Path) -> None:
    """The number of heads does not show in any shape."""
    grow(folder / "z2", tmp_path / "own", **{**options(folder), "config": folder / "small.json"})
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"model_type": "bert", **hf_config(num_attention_heads=4)}))
    with pytest.raises(InvalidCheckpoint, match=r"num_attention_heads is 4, the config that .* itself holds says 2"):
        grow(tmp_path / "own", tmp_path / "t", **{**options(folder), "source_config": wrong})
    assert not (tmp_path / "t").exists()


def test_the_sources_tokenizer_is_known_through_a_chain_of_growths() -> None:
    trained = Manifest(training=Trained(data={"tokenizer_digest": "t", "digest": "d"}))
    assert _tokenizer_digest(trained) == "t"
    assert _tokenizer_digest(Manifest(growth=Grown(tokenizer_digest="t"))) == "t"
    assert _tokenizer_digest(None) is None


def test_refusals_write_nothing(folder: Path, tmp_path: Path) -> None:
    how = options(folder)
    with pytest.raises(InvalidCheckpoint, match="--source-config"):
        grow(folder / "z2", tmp_path / "t", folder / "big.json", say=lambda _: None)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"model_type": "bert", **hf_config(intermediate_size=45)}))
    with pytest.raises(InvalidCheckpoint, match=r"axis 'ffn': 44 features, expected 45 from intermediate_size=45"):
        grow(folder / "z2", tmp_path / "t", **{**how, "source_config": wrong})
    wrong.write_text(json.dumps({"model_type": "bert", **hf_config(num_hidden_layers=1)}))
    with pytest.raises(InvalidCheckpoint, match=r"16 tensors are not part of a bert"):
        grow(folder / "z2", tmp_path / "t", **{**how, "source_config": wrong})
    wrong.write_text(json.dumps({"model_type": "bert", **hf_config(num_hidden_layers=3)}))
    with pytest.raises(InvalidCheckpoint, match=r"layer\.2\.attention.* is missing"):
        grow(folder / "z2", tmp_path / "t", **{**how, "source_config": wrong})
    with pytest.raises(InvalidConfig, match="no such file"):
        grow(folder / "z2", tmp_path / "t", **{**how, "config": tmp_path / "none.json"})
    with pytest.raises(InvalidConfig, match="except for stage 0, --world-size N"):
        grow(folder / "z2", tmp_path / "t", format="zero", **how)
    with pytest.raises(InvalidConfig, match="belong to --format zero"):
        grow(folder / "z2", tmp_path / "t", stage=2, **how)
    with pytest.raises(UnsupportedGrowth, match="did you mean 'aki'"):
        grow(folder / "z2", tmp_path / "t", width="akii", **how)
    assert not (tmp_path / "t").exists() and not list(tmp_path.glob("*.partial"))
    shutil.copytree(folder / "z1", tmp_path / "t")
    with pytest.raises(InvalidConfig, match="already holds a checkpoint"):
        grow(folder / "z2", tmp_path / "t", **how)


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--config", str(folder / "big.json"), "--source-config", str(folder / "small.json")]
    source, target = str(folder / "z2"), str(tmp_path / "t")
    assert cli.main(["plan", source, *common, "--width", "aki"]) == 0
    out = capsys.readouterr().out
    assert "function not exact: aki" in out and "embed 32 -> 64" in out and "fresh units from above" in out
    assert cli.main(["plan", source, *common, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["exactness"]["function"] == [] and len(plan["tensors"]) == 46
    assert cli.main(["grow", source, target, *common]) == 0
    assert "written" in capsys.readouterr().out
    assert cli.main(["inspect", target]) == 0
    assert "universal" in capsys.readouterr().out
    assert cli.main(["verify", source, target, "--source-config", str(folder / "small.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    assert cli.main(["verify", str(folder / "bf16"), target, "--source-config", str(folder / "small.json")]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["grow", source, target, *common]) == 0  # again: nothing is left to do
    assert "is this growth already" in capsys.readouterr().out
    assert cli.main(["grow", source, target, *common, "--seed", "1", "--width", "aki"]) == 2
    assert "already holds a checkpoint" in capsys.readouterr().err
