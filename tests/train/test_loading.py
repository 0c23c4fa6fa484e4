"""What a load refuses, each proved by corrupting a real checkpoint, and what it takes from the recipe instead."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from bert2bert.checkpoints.manifest import MANIFEST, Manifest, write_manifest
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UserError
from bert2bert.recipe import AdamW, Phase, Recipe
from tests.distributed import run_ranks
from tests.train import runs, tiny

STAGE = 2
OPTIM = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_bins(tmp_path_factory.mktemp("data"))


def plan_for(bins: Path) -> Recipe:
    return runs.recipe(bins, phases=(Phase("all", 3),), eval_every=100, checkpoint_every=100)


@pytest.fixture(scope="module")
def saved(bins: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    run_ranks(runs.run, 2, plan_for(bins), tiny.ds_config(STAGE), output, timeout=60)
    return output


# --- corruptions: each changes a copy of the checkpoint's folder --------------------------------------------------


def in_manifest(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return act


def in_shard(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change a shard file and let the manifest agree about its size: a careful hand, or a bad disk."""

    def act(folder: Path) -> None:
        shard = torch.load(folder / name, weights_only=False)  # a test's own file
        change(shard)
        torch.save(shard, folder / name)
        in_manifest(lambda m: m["files"].update({name: (folder / name).stat().st_size}))(folder)

    return act


def noted(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A change that the manifest agrees with in every digest: the checkpoint of some other program, say."""

    def act(folder: Path) -> None:
        change(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["digests"]["files"]
        files.update({name: xxhash.xxh3_128((folder / name).read_bytes()).hexdigest() for name in files})
        write_manifest(folder, Manifest.from_json(manifest))

    return act


def flip(name: str, at: float) -> Callable[[Path], None]:
    """Change one bit of a file, ``at`` of the way through its largest record: a bad disk."""

    def act(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        with zipfile.ZipFile(folder / name) as archive:
            record = max(archive.infolist(), key=lambda found: found.file_size)
            held = archive.read(record)
        content[content.index(held) + int(at * len(held))] ^= 1
        (folder / name).write_bytes(content)

    return act


def change_counter(shard: dict[str, Any]) -> None:
    shard["global_samples"] += 8


def state_of(shard: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = shard["optimizer_state_dict"]
    return found


def change_weight(shard: dict[str, Any]) -> None:
    state_of(shard)["single_partition_of_fp32_groups"][2].data[3] += 1e-3


def change_moment(shard: dict[str, Any]) -> None:
    state_of(shard)["base_optimizer_state"]["state"][2]["exp_avg"][3] += 1e-3


def change_step(shard: dict[str, Any]) -> None:
    for state in state_of(shard)["base_optimizer_state"]["state"].values():
        if "step" in state:
            state["step"] += 1


def change_both_steps(folder: Path) -> None:
    for name in (OPTIM, OPTIM.replace("rank_1_mp", "rank_0_mp")):
        in_shard(name, change_step)(folder)


def change_hyper(key: str, value: Any) -> Callable[[Path], None]:
    def act(shard: dict[str, Any]) -> None:
        for group in state_of(shard)["base_optimizer_state"]["param_groups"]:
            group[key] = value

    def both(folder: Path) -> None:
        for name in (OPTIM, OPTIM.replace("rank_1_mp", "rank_0_mp")):
            in_shard(name, act)(folder)

    return both


def rename(shard: dict[str, Any]) -> None:
    for shapes in shard["param_shapes"]:
        for name in list(shapes):
            shapes[name.replace("query", "inquiry")] = shapes.pop(name)


def reorder_manifest(manifest: dict[str, Any]) -> None:
    names = next(g["names"] for g in manifest["groups"] if QUERY in g["names"])
    i, j = names.index(QUERY), names.index(KEY)
    names[i], names[j] = names[j], names[i]


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {Path(os.environ['EVIL']).as_posix()}",)


def plant(shard: dict[str, Any]) -> None:
    shard["evil"] = Evil()


def drop_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut(folder: Path) -> None:
    data = (folder / OPTIM).read_bytes()
    (folder / OPTIM).write_bytes(data[: len(data) // 2])


def digest_of(state: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"][QUERY]["digest"].update({state: "0" * 16})


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a digest in the manifest": (in_manifest(digest_of("exp_avg_sq")), f"exp_avg_sq of {QUERY} has digest"),
    "a weight": (in_shard(OPTIM, change_weight), "fp32 of bert.encoder.layer.0"),
    "a moment": (in_shard(OPTIM, change_moment), "exp_avg of bert.encoder.layer.0"),
    "the Adam steps": (change_both_steps, "has Adam step 4 in the files, 3 in the manifest"),
    "decay in the files": (change_hyper("weight_decay", 123.0), "weight_decay 123.0 in the shard files"),
    "betas in the files": (change_hyper("betas", (0.5, 0.5)), "betas (0.5, 0.5) in the shard files"),
    "a tensor's name": (in_shard(MODEL, rename), "inquiry"),
    "the order in a group": (in_manifest(reorder_manifest), "the first difference is at"),
    "the world size": (in_manifest(lambda m: m.update(world_size=3)), "the manifest says 3"),
    "the stage": (in_manifest(lambda m: m.update(stage=3)), "the manifest says 3"),
    "a shard cut short": (cut, "bytes long, the manifest says"),
    "a missing shard": (lambda folder: (folder / OPTIM).unlink(), "missing"),
    "no manifest": (drop_manifest, "bert2bert reshard "),
    "a random state": (flip("bert2bert_rng_rank_00001.pt", 0.4), "bert2bert_rng_rank_00001.pt: its content does not"),
    "a counter": (in_shard(MODEL, change_counter), f"{MODEL}: its content does not"),
    "lr in one copy": (change_hyper("lr", 123.0), "optim_states.pt: its content does not"),
    "the position": (in_manifest(lambda m: m["training"]["data"].update(rows=8)), f"{MANIFEST}: its content does not"),
    "the time spent": (in_manifest(lambda m: m["training"]["spent"].update(tokens=1)), f"{MANIFEST}: its content"),
    "code in a pickle": (in_shard(OPTIM, plant), "which is not a class of a ZeRO checkpoint"),
}


def recipes(plan: Recipe) -> dict[str, tuple[Recipe, type[UserError], tuple[str, ...]]]:
    """Recipes that must not continue the run, and what the message must name."""
    wide = {**plan.model, "hidden_size": 32}
    return {
        "model": (replace(plan, model=wide), InvalidConfig, ("hidden_size is 32 in the recipe, 16 in",)),
        "seed": (replace(plan, seed=9), InvalidConfig, ("seed is 9", "had 3", "--set seed=3")),
        "rows": (replace(plan, data=replace(plan.data, seq_len=8)), InvalidConfig, ("data.seq_len is 8", "had 16")),
        "phases": (replace(plan, phases=(Phase("all", 2),)), InvalidConfig, ("step 3 of phase 'all'",)),
        "names": (replace(plan, phases=(Phase("other", 9),)), InvalidConfig, ("'other'",)),
    }


def attempt(engine: Any, path: Path, plan: Recipe, data: dict[str, str]) -> tuple[str, str]:

    try:
        found = runs.load(engine, path, plan, data)
    except UserError as error:
        return type(error).__name__, str(error)
    return "", "\n".join(found.notes)


def load_all(bins: Path, saved: Path, copies: dict[str, Path]) -> dict[str, Any]:
    """Every attempt in one engine; the last one is sound, and says what the live engine then holds."""
    from bert2bert.train import engine as engines

    plan = plan_for(bins)
    config = tiny.ds_config(STAGE)
    engine = engines.build(plan, config, tiny.model(nsp=False))
    data = json.loads((saved / "run.json").read_text())["data"]
    out: dict[str, Any] = {name: attempt(engine, copy, plan, data) for name, copy in copies.items()}
    for name, (other, _, _) in recipes(plan).items():
        out[f"recipe: {name}"] = attempt(engine, saved, other, data)
    for key in ("digest", "tokenizer_digest"):
        out[key] = attempt(engine, saved, plan, {**data, key: "feed"})
    out["lr"] = attempt(engine, copies["lr in the files"], plan, data)
    engine.set_lr(0.25)
    out["clip"] = attempt(engine, copies["clip in the files"], plan, data)
    out["live"] = {
        "lr": [g["lr"] for g in engine.optimizer.param_groups],
        "decay": [g["weight_decay"] for g in engine.optimizer.param_groups],
        "clip": engine.ds.optimizer.clip_grad,
    }
    from deepspeed.utils import safe_get_full_optimizer_state

    norms = {n: float(safe_get_full_optimizer_state(p, "exp_avg").norm()) for n, p in engine.parameters.items()}
    out["live"]["moments"] = sum(norm > 0 for norm in norms.values()) / len(norms)
    other = replace(plan, optimizer=AdamW(lr=1e-3, weight_decay=0.5), phases=(Phase("all", 30), Phase("more", 5)))
    out["another recipe"] = attempt(engine, saved, other, data)
    return out


@pytest.mark.timeout(120)
def test_every_corruption_is_named_and_nothing_foreign_runs(
    bins: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))

    def no_clip(shard: dict[str, Any]) -> None:
        state_of(shard)["clip_grad"] = 0.0

    def clip_off(folder: Path) -> None:
        for name in (OPTIM, OPTIM.replace("rank_1_mp", "rank_0_mp")):
            in_shard(name, no_clip)(folder)

    corruptions = {name: act for name, (act, _) in REFUSED.items()}
    corruptions |= {"lr in the files": noted(change_hyper("lr", 123.0)), "clip in the files": noted(clip_off)}
    copies = {}
    for i, (name, act) in enumerate(corruptions.items()):
        copies[name] = tmp_path / f"copy{i}"
        shutil.copytree(saved, copies[name])
        act(copies[name] / "global_step3")
    ranks = run_ranks(load_all, 2, bins, saved, copies, timeout=100)
    for found in ranks:
        for name, (_, words) in REFUSED.items():
            kind, text = found[name]
            assert kind == InvalidCheckpoint.__name__, (name, text)
            assert words in text, (name, text)
        for name, (_, error, words) in recipes(plan_for(bins)).items():
            kind, text = found[f"recipe: {name}"]
            assert kind == error.__name__ and all(word in text for word in words), (name, text)
        for key, what in (("digest", "data"), ("tokenizer_digest", "tokenizer")):
            kind, text = found[key]
            assert kind == InvalidConfig.__name__ and f"the {what} differs" in text and "digest feed" in text
        assert found["lr"] == ("", "") and found["clip"] == ("", "")
        live = found["live"]
        assert set(live["lr"]) == {0.25}  # neither 123 nor the file's own
        assert set(live["decay"]) == {0.0, 0.1} and live["clip"] == 1.0
        assert live["moments"] > 0.9  # DeepSpeed's own readers see what was loaded, of every group
        kind, text = found["another recipe"]
        assert kind == "" and "optimizer.lr: 0.005 → 0.001" in text
    assert not (tmp_path / "evil").exists()


def elsewhere(bins: Path, saved: Path, root: Path, cases: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Load into other stages at this world size: steps apart, everything equal (resume compares all digests)."""
    from bert2bert.train import engine as engines
    from bert2bert.train import partitions

    world = int(os.environ["WORLD_SIZE"])
    rows = 12 if world == 3 else 8
    plan, out = replace(plan_for(bins), global_batch_size=rows), []
    data = json.loads((saved / "run.json").read_text())["data"]
    for stage, precision in cases:
        engine = engines.build(plan, tiny.ds_config(stage, precision, world, rows=rows), tiny.model(nsp=False))
        found = runs.load(engine, saved, plan, data)
        steps = [engine.optimizer.state[m]["step"] for _, m in partitions.masters(engine)]
        out.append(
            {
                "notes": found.notes,
                "step": found.position.step,
                "steps": [float(s) for s in steps],
                "own": len({s.data_ptr() for s in steps}) == len(steps),
                "digests": partitions.digests(engine),
            }
        )
        engine.destroy()
    return out


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_stage_and_world_size_loads_the_same_values(bins: Path, saved: Path, tmp_path: Path, world: int) -> None:
    cases = [(1, "fp32"), (3, "bf16")] if world != 3 else [(0, "fp32"), (2, "fp32"), (3, "fp32")]
    recorded = {n: e["digest"] for n, e in runs.manifest(saved, 3)["tensors"].items()}
    for found in run_ranks(elsewhere, world, bins, saved, tmp_path, cases, timeout=90):
        for result, (_, precision) in zip(found, cases, strict=True):
            assert result["digests"] == recorded and result["step"] == 3
            assert set(result["steps"]) == {3.0} and result["own"]
            notes = "\n".join(result["notes"])
            assert ("continued in bf16" in notes) == (precision == "bf16")
            assert (f"continued on {world}: the data go on in order" in notes) == (world != 2)
