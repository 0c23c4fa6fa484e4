"""Memory: under ZeRO-3 no rank ever holds a whole model, and recomputed blocks keep their input alone."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bert2bert.errors import InvalidConfig
from bert2bert.model import registry
from bert2bert.model.program import full
from bert2bert.train.ds_config import resolve
from bert2bert.train.position import Position
from tests import tiny as models
from tests.distributed import run_ranks
from tests.model.test_cores import asked, flat
from tests.steps import some, whole
from tests.train import runs, tiny
from tests.train.test_foreign import RECIPE, pretrain

DATA = {"digest": "0", "tokenizer_digest": "0"}
VARIANTS = (*registry.CORES, "bert-untied", "llama-tied", "t5-untied", "modernbert-untied")
LAYERS = 12
DEEP = tiny.model_config(num_hidden_layers=LAYERS, hidden_size=32, intermediate_size=64)
SMALL = {
    "reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 4096, "stage3_max_live_parameters": 4096,
    "stage3_max_reuse_distance": 4096, "stage3_param_persistence_threshold": 0,
}  # fmt: skip


def config(stage: int, precision: str = "fp32", world: int = 2) -> dict[str, Any]:
    found = tiny.ds_config(stage, precision, world, accumulation=1)
    found["zero_optimization"] |= SMALL if stage == 3 else {}
    return found


def built(hf: dict[str, Any], ds_config: dict[str, Any], seed: int = 1) -> Any:
    """The model as `train` builds it."""
    from bert2bert.train import engine as engines
    from bert2bert.train import sharded

    engines.start()
    torch.manual_seed(seed)
    return registry.build(hf, opened=sharded.opened(tiny.recipe(), ds_config))


# --- fresh weights -------------------------------------------------------------------------------------------------


def drawn(precision: str, names: tuple[str, ...], world: int) -> list[str]:
    """The variants whose fresh weights, ties or buffers differ from those of a model that was built whole."""
    import deepspeed

    tiny.allow_fp16()
    wrong = []
    for name in names:
        hf = models.config_of(name)
        pieces = built(hf, config(3, precision, world))
        torch.manual_seed(1)
        whole = registry.build(hf, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
        theirs = dict(whole.named_parameters(remove_duplicate=False))
        ours = dict(pieces.named_parameters(remove_duplicate=False))
        ties = [{n: next(k for k in of if of[k] is p) for n, p in of.items()} for of in (ours, theirs)]
        assert all(p.ds_tensor.numel() == -(-p.ds_numel // world) and p.numel() == 0 for p in ours.values())
        with deepspeed.zero.GatheredParameters(list(pieces.parameters())):
            same = all(torch.equal(p, theirs[n]) and p.dtype == theirs[n].dtype for n, p in ours.items())
        buffers = dict(whole.named_buffers())
        same &= all(b.device.type == "cpu" for _, b in pieces.named_buffers())
        same &= all(torch.equal(b.to(buffers[n].dtype), buffers[n]) for n, b in pieces.named_buffers())
        if not same or ties[0] != ties[1] or list(ours) != list(theirs):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("precision, world", [("fp32", 1), ("fp32", 2), ("bf16", 2), ("fp16", 4)])
def test_partitioned_fresh_weights_are_those_of_a_whole_model(precision: str, world: int) -> None:
    names = VARIANTS if world == 2 else ("bert", "llama", "t5")
    assert run_ranks(drawn, world, precision, names, world) == [[]] * world


def masters(precision: str) -> list[Any]:
    """Digests of the master weights that engines of each stage begin with; the last keeps its shares in host memory."""
    from bert2bert.train import engine as engines
    from bert2bert.train import partitions

    tiny.allow_fp16()
    found = []
    for stage, offloaded in [*((stage, False) for stage in range(4)), (3, True)]:
        ds_config = config(stage, precision)
        for key in ("offload_param", "offload_optimizer") if offloaded else ():
            ds_config["zero_optimization"][key] = {"device": "cpu"}
        engine = engines.build(tiny.recipe(), ds_config, built(tiny.model_config(), ds_config))
        found.append(partitions.digests(engine))
        engine.set_lr(1e-2)
        engine.apply(whole(tiny.LAYERS))
        loss, *_ = engine.forward(tiny.batch(engine.rank), whole(tiny.LAYERS))
        engine.backward(loss)
        found[-1]["loss"] = float(loss.detach())
        engine.destroy()
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_master_weights_begin_alike_at_every_stage(precision: str) -> None:
    for rank in run_ranks(masters, 2, precision):
        assert len(rank) == 5 and all(found == rank[0] for found in rank)


# --- bytes ---------------------------------------------------------------------------------------------------------


class Meter(TorchDispatchMode):
    """Bytes of tensors that are alive, and the most that were at once since `mark`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in given and "set_" not in func.name():  # else a view, or a mapped file
                    self.count(storage)
        return found

    def count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self.gone(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def gone(self, key: int, size: int) -> None:
        del self.seen[key]
        self.live -= size

    def excess(self, act: Any) -> tuple[Any, int]:
        """What ``act`` returns, and the bytes that it held beside what lived before or lives after."""
        before, self.peak = self.live, self.live
        found = act()
        return found, self.peak - max(before, self.live)


def a_run(folder: Path) -> tuple[int, int, dict[str, int]]:
    """Bytes of the whole model; those that fresh weights take; those that are held beside a rank's share, by phase."""
    import deepspeed

    from bert2bert.train import engine as engines
    from bert2bert.train.save import save

    plan = tiny.recipe(model=DEEP)
    ds_config = config(3)
    found: dict[str, int] = {}

    def step(engine: Any) -> None:
        loss, *_ = engine.forward(tiny.batch(engine.rank, rows=1, length=4), whole(LAYERS))
        engine.backward(loss)

    def write(engine: Any) -> None:
        save(
            engine, folder, Position(3, 0, 3, 24), model=engine.model.hf_config, aliases=engine.model.aliases,
            recipe=plan.to_dict(), data=DATA, growth=None, keep=2, check=lambda: None,
        )  # fmt: skip

    def gather(engine: Any) -> None:
        with deepspeed.zero.GatheredParameters(list(engine.parameters.values())):
            pass

    with Meter() as meter:
        model, found["fresh weights"] = meter.excess(lambda: built(DEEP, ds_config))
        fresh = meter.live
        model.recompute = True  # else activations are as large as weights here
        engine, found["engine"] = meter.excess(lambda: engines.build(plan, ds_config, model))
        engine.set_lr(1e-3)
        engine.apply(whole(LAYERS))
        for i in range(3):
            _, found[f"step {i}"] = meter.excess(lambda: step(engine))
        _, found["save"] = meter.excess(lambda: write(engine))
        other = engines.build(plan, ds_config, built(DEEP, ds_config, seed=2))
        _, found["resume"] = meter.excess(lambda: runs.load(other, folder, plan, DATA))
        _, found["gathered"] = meter.excess(lambda: gather(other))
        numel = sum(torch.Size(other.shape(name)).numel() for name in other.names)
    return 4 * numel, fresh, found


def test_no_rank_holds_a_whole_model(tmp_path: Path) -> None:
    for size, fresh, found in run_ranks(a_run, 2, tmp_path):
        assert found.pop("gathered") > 0.9 * size  # so the meter would see it
        assert fresh < 0.55 * size
        assert {phase: held for phase, held in found.items() if held > size / 4} == {}


# --- recomputation -------------------------------------------------------------------------------------------------


def dropping(name: str) -> dict[str, Any]:
    hf = models.config_of(name)
    return {key: 0.1 if "drop" in key and isinstance(value, float) else value for key, value in hf.items()}


def batch(name: str, seed: int) -> Any:
    return asked(name, seed=seed) if registry.objective_of(models.config_of(name)) == "seq2seq" else flat(seed=seed)


@contextmanager
def counted(model: Any, runs: list[int]) -> Iterator[None]:
    """Count how often each block runs."""

    def count(i: int) -> None:
        runs[i] += 1

    handles = [layer.register_forward_pre_hook(lambda *_, i=i: count(i)) for i, layer in enumerate(model.layers)]
    yield
    for handle in handles:
        handle.remove()


def three_steps(cases: list[tuple[str, int]]) -> list[list[Any]]:
    """Losses, digests of weights and moments, and how often each block ran, of every case without and with it."""
    from bert2bert.train import engine as engines
    from bert2bert.train import partitions

    found = []
    for name, stage in cases:
        pair: list[Any] = []
        for recompute in (False, True):
            ds_config = config(stage)
            model = built(dropping(name), ds_config)
            model.recompute = recompute
            engine = engines.build(tiny.recipe(), ds_config, model)
            engine.set_lr(1e-2)
            torch.manual_seed(engine.rank)
            count = len(model.layers)
            programs = [full(model.parts), some((0, 1, 2), (2,), False), full(model.parts)]
            losses: list[float] = []
            runs = [0] * count
            for step, program in enumerate(programs if not name.startswith("t5") else [full(model.parts)] * 3):
                engine.apply(program)
                with counted(model, runs) if step == 1 else nullcontext():
                    loss, *_ = engine.forward(batch(name, 2 * step + engine.rank), program)
                    engine.backward(loss)
                losses.append(float(loss.detach()))
            pair.append((losses, partitions.digests(engine), runs))
            engine.destroy()
        found.append(pair)
    return found


RECOMPUTED = [*[("bert", stage) for stage in range(4)], *[(n, 3) for n in ("modernbert", "gpt2", "t5", "mixtral")]]


def test_recomputed_blocks_change_nothing_at_any_stage() -> None:
    """With dropout, bit for bit; a block that does not learn runs once."""
    for rank in run_ranks(three_steps, 2, RECOMPUTED):
        for (name, stage), (plain, again) in zip(RECOMPUTED, rank, strict=True):
            assert plain[:2] == again[:2], (name, stage)
            assert len(set(plain[0])) == 3
            learning = [True] * len(plain[2]) if name == "t5" else [False, False, True]
            assert plain[2] == [1] * len(learning)
            assert again[2] == [2 if learns else 1 for learns in learning], (name, stage)


@pytest.mark.parametrize("name", registry.CORES)
def test_recomputed_blocks_keep_less(name: str) -> None:
    """Losses and gradients are the same, with dropout; the tensors kept for the backward pass fall."""
    torch.manual_seed(1)
    core = registry.build(dropping(name)).train()
    weights = {p.untyped_storage().data_ptr() for p in core.parameters()}
    found = []
    for core.recompute in (False, True):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        core.zero_grad()
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = core(batch(name, 0)).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in core.parameters()], sum(kept.values())))
    (loss, grads, before), (again, others, after) = found
    assert torch.equal(loss, again) and after < 0.6 * before
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, others, strict=True))


def launched(words: list[str]) -> tuple[int, int]:
    """The exit status of launch/pretrain.py in this rank, and how many blocks kept their input alone."""
    from bert2bert.model import core

    original, calls = core.checkpoint, 0

    def count(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **more)

    core.checkpoint = count  # type: ignore[assignment]
    return pretrain(words), calls


@pytest.mark.timeout(120)
def test_the_option_of_a_run(tmp_path: Path) -> None:
    """The same records, dropout included; the FLOPs of what is computed again do not count."""
    bins = runs.make_bins(tmp_path)
    recipe = RECIPE.format(model=tiny.model_config(0.1), bins=str(bins))
    (tmp_path / "recipe.py").write_text(recipe)
    (tmp_path / "ds.json").write_text(json.dumps(config(3)))
    words = ["--recipe", str(tmp_path / "recipe.py"), "--ds_config", str(tmp_path / "ds.json"), "--output"]
    plain = run_ranks(launched, 2, [*words, str(tmp_path / "plain")])
    again = run_ranks(launched, 2, [*words, str(tmp_path / "again"), "--activation_checkpointing"])
    assert plain == [(0, 0)] * 2 and again == [(0, 2 * tiny.LAYERS)] * 2  # of two steps
    records = runs.records(tmp_path / "plain")
    assert records == runs.records(tmp_path / "again") and any(r["kind"] == "train" for r in records)


def test_deepspeeds_section_is_refused_with_the_option() -> None:
    with pytest.raises(InvalidConfig, match="run with --activation_checkpointing"):
        resolve({**config(2), "activation_checkpointing": {"partition_activations": True}}, tiny.recipe(), 2)
