"""What `inspect` says of a real checkpoint of each format, as data and as text."""

import json
import resource
from pathlib import Path

import pytest
import torch

from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.inspect_text import render
from tests.checkpoints.engines import Case, hf_config, save_cases, tiny_bert

CASE = Case("run", 3, "fp16", layout="layers", skip=(2,), frozen=("pooler",), buffer=True, client_state={"epoch": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    save_cases(folder, 1, [CASE])
    (folder / "run" / "config.json").write_text(json.dumps({"model_type": "bert", **hf_config()}))
    return folder / "run"


def test_a_zero_checkpoint_as_data(run: Path) -> None:
    found = inspect(run).to_json()
    assert json.loads(json.dumps(found)) == found
    tag = run / "global_step3"
    assert (found["format"], found["stage"], found["world_size"], found["precision"]) == ("zero", 3, 1, "fp16")
    assert found["bytes"] == sum(f.stat().st_size for f in tag.iterdir()) and found["files"] == 2
    model = tiny_bert()
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["tensor_count"] == len(list(model.parameters())) == len(found["tensors"])
    assert found["architecture"] == {
        "type": "bert", "classes": None, "layers": 2, "hidden": 32, "heads": 2, "intermediate": 44, "vocabulary": 61,
        "positions": 17,
    }  # fmt: skip
    assert found["states"] == ["fp32", "exp_avg", "exp_avg_sq"] and found["step"] == [0, 3]
    assert [g["step"] for g in found["groups"]][:4] == [[3], [3], [0], [3]]
    assert found["groups"][0]["weight_decay"] == 0.1 and found["groups"][1]["betas"] == [0.9, 0.98]
    trained = found["parameters"] - sum(p.numel() for n, p in model.named_parameters() if "pooler" in n)
    assert sum(g["parameters"] for g in found["groups"]) == trained
    assert found["frozen"] == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert (found["buffers"], found["client_state"]) == (["bert.tally"], ["epoch"])
    assert found["loss_scale"] == 512.0 and found["counters"]["global_steps"] == 3


def test_a_zero_checkpoint_as_text(run: Path) -> None:
    found = inspect(run, "global_step3")
    text = render(found)
    for line in [
        "format        native DeepSpeed ZeRO stage 3, 1 rank\n",
        "precision     fp16\n",
        "architecture  bert: layers 2, hidden 32, heads 2, intermediate 44, vocabulary 61, positions 17\n",
        f"tensors       46, {found.parameters:,} parameters\n",
        "optimizer     exp_avg and exp_avg_sq, step 0, 3\n",
        "counters      steps 3, samples 6, skipped steps 0\n",
        "loss scale    512\n",
        "frozen        bert.pooler.dense.weight, bert.pooler.dense.bias\n",
    ]:
        assert line in text
    assert "\ngroup  tensors  parameters  step  lr " in text and "bert.pooler.dense.weight  " not in text
    table = render(found, tensors=True).split("\ntensor ")[1].splitlines()
    assert len(table) == 1 + 46
    row = next(line for line in table if line.startswith("bert.pooler.dense.weight ")).split()
    assert row[1:] == ["32x32", "float16", "frozen", "0"]


def test_a_hub_folder_and_a_grown_one(tmp_path: Path) -> None:
    tiny_bert("mlm").save_pretrained(tmp_path)
    found = inspect(tmp_path).to_json()
    assert (found["format"], found["states"], found["groups"], found["growth"]) == ("hub", ["fp32"], [], None)
    text = render(inspect(tmp_path))
    assert "format        Hugging Face\n" in text and "optimizer     no Adam state" in text
    assert "architecture  BertForMaskedLM: layers 2" in text and "grown from" not in text
    growth = {
        "operators": {"width": "aki", "depth": "stack", "seed": 3},
        "plan_digest": "0123456789abcdef0123",
        "source": {"path": "runs/small", "format": "zero", "tag": "global_step400"},
        "exactness": {"function": ["embed 32 -> 48 is uneven"], "moments": []},
    }
    manifest = {
        "format_version": 1, "kind": "growth", "format": "hub", "files": {}, "growth": growth,
        "training": {"spent": {"flops": 1.5e12, "steps": 12000}}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip
    (tmp_path / "bert2bert.json").write_text(json.dumps(manifest))
    text = render(inspect(tmp_path))
    assert "grown from    runs/small (zero, tag global_step400)\n" in text
    assert "grown by      width aki, depth stack, seed 3; plan 0123456789abcdef\n" in text
    assert "  function    not exact: embed 32 -> 48 is uneven\n" in text and "  moments     exact\n" in text
    assert "trained       flops 1.5e+12, steps 12,000\n" in text and "written by    torch 2.13.0" in text


def test_a_large_checkpoint_is_not_read(tmp_path: Path) -> None:
    """3 GiB of sparse shard: only its metadata is touched, neither by reading nor by mapping it."""
    numel = 1 << 28
    with torch.serialization.skip_data():
        flat = torch.empty(numel)
        state = {"step": 1, "exp_avg": torch.empty(numel), "exp_avg_sq": torch.empty(numel)}
        states = {
            "zero_stage": 2, "partition_count": [1], "single_partition_of_fp32_groups": [flat],
            "base_optimizer_state": {"state": {0: state}, "param_groups": [{"params": [0], "lr": 0.1}]},
        }  # fmt: skip
        torch.save({"optimizer_state_dict": states}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(
        {"module": {}, "param_shapes": [{"w": torch.Size([1 << 14, 1 << 14])}], "dp_world_size": 1},
        tmp_path / "mp_rank_00_model_states.pt",
    )

    def touched() -> int:
        """Bytes that this process has read, and those of the pages that it was given."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        read = int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])
        return read + (used.ru_minflt + used.ru_majflt) * resource.getpagesize()

    before = touched()
    found = inspect(tmp_path)
    assert found.parameters == numel and found.bytes > 3 << 30
    assert touched() - before < found.bytes / 100
