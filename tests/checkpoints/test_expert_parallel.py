"""Expert-parallel checkpoints of real engines, AutoEP's and deepspeed.moe's: read, written, resumed, bit for bit.

The truth is what DeepSpeed's own functions say on the live engines, of each rank's experts; whole tensors are put
together here, by concatenation. Engines run on 2 and 4 ranks, gloo.

Files are opened with weights_only=False, for the tests themselves made them.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert2bert.algebra.realise import values
from bert2bert.checkpoints.expert_parallel.layout import blocks, cut, local_counts, parts, whole_shapes
from bert2bert.checkpoints.groups import by_name, param_groups
from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.open import open_source
from bert2bert.checkpoints.source import Source
from bert2bert.commands.cli import main
from bert2bert.errors import InvalidCheckpoint, InvalidConfig, UnsupportedGrowth
from bert2bert.growth.opened import open_growth
from tests import tiny
from tests.checkpoints.engines import STATES, Case, hf_model, release, save_cases
from tests.checkpoints.test_readers_universal import convert
from tests.distributed import run_ranks
from tests.doors import grow, reshard

Whole = dict[str, dict[str, torch.Tensor]]
"""[name][state]"""
LLAMA = tiny.config_of("llama")
_OF_LLAMA = {key: LLAMA[key] for key in ("rms_norm_eps", "rope_parameters")}
MIXTRAL = tiny.config_of("mixtral", num_local_experts=4, **_OF_LLAMA)
QWEN2 = tiny.config_of("qwen2_moe", num_experts=4, num_hidden_layers=2)
QWEN3 = tiny.config_of("qwen3_moe", num_local_experts=4, num_hidden_layers=2)
WIDE = tiny.config_of("mixtral", num_local_experts=4, **_OF_LLAMA, hidden_size=24)
for _config in (LLAMA, MIXTRAL, QWEN2, QWEN3):
    getattr(transformers, _config["architectures"][0])  # imported before the fork, not by every rank


@dataclass(frozen=True)
class Ep:
    """An engine. size: ranks that share the experts; None: it does not split them. config: None is deepspeed.moe's."""

    name: str
    size: int | None
    config: dict[str, Any] | None = field(hash=False)
    stage: int = 2
    precision: str = "fp32"
    lists: bool = False  # decaying and other parameters, in lists; else all of them, as model.parameters()
    steps: int = 2
    data_first: bool = False
    frozen: str = ""
    most: int | None = None  # elements in a group of deepspeed.moe's experts
    more: dict[str, Any] = field(default_factory=dict, hash=False)  # of the ds_config


def recorders() -> None:
    """Give transformers' registry of output recorders the method that DeepSpeed 0.19.8 calls (see the defects)."""
    from transformers.utils import output_capturing

    def get(self: Any, model: Any, default: Any = None) -> Any:
        return dict.get(self, model if isinstance(model, str) else str(model.__class__)) or default or {}

    output_capturing._CanRecordRegistry.get = get


class Classic(torch.nn.Module):
    """Two layers with experts, of a user's own model."""

    def __init__(self, size: int) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        mlp = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.GELU(), torch.nn.Linear(10, 6))
        self.blocks = torch.nn.ModuleList(
            MoE(6, mlp, num_experts=n, ep_size=size, k=1, min_capacity=8, use_rts=False) for n in (4, 8)
        )
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)[0]
        return self.last(x)


def classic(case: Ep) -> tuple[torch.nn.Module, Any]:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    torch.manual_seed(torch.distributed.get_rank())  # else all experts start alike
    model = Classic(case.size or 1)
    decaying = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": decaying, "weight_decay": 0.1, "name": "a"},
        {"params": others, "weight_decay": 0.0, "name": "b"},
    ]
    return model, torch.optim.AdamW(split(groups, case.most) if case.most else split(groups), lr=1e-3)


def build(case: Ep) -> Any:
    import deepspeed

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": case.stage},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 3e-3}},
        **case.more,
    }  # fmt: skip
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.data_first:
        config["use_data_before_expert_parallelism"] = True
    if case.config is None:
        model, optimizer = classic(case)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    recorders()
    if case.size:
        config["expert_parallel"] = {"enabled": True, "autoep_size": case.size, "use_grouped_mm": False}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "weight_decay": 0.1}}
    model = hf_model(case.config)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(not case.frozen or case.frozen not in name)
    parameters: Any = (p for p in model.parameters() if p.requires_grad)
    if case.lists:
        groups = param_groups(by_name({n: p.shape for n, p in named.items() if p.requires_grad}), "decay")
        parameters = [
            {"params": [named[n] for n in g.names], "weight_decay": 0.1 * g.decay, "name": str(g.decay)} for g in groups
        ]
    if not case.size:  # as a script without AutoEP
        groups = parameters if case.lists else [{"params": list(parameters)}]
        del config["optimizer"]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, case: Ep, steps: int) -> list[float]:
    import deepspeed.comm as dist

    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        if case.config is None:
            loss = engine(torch.randn(2, 5, 6, generator=generator)).square().mean()
        else:
            ids = torch.randint(2, 23, (2, 8), generator=generator)
            loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def truth(engine: Any) -> dict[str, Any]:
    """What this rank holds, by DeepSpeed's functions: its own experts, and all else whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    held: Whole = {}
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            held[name] = {"fp32": p.detach().float()}
            continue
        held[name] = {"fp32": safe_get_full_fp32_param(p).detach().clone()}
        held[name] |= {s: safe_get_full_optimizer_state(p, s).detach().clone() for s in STATES[1:]}
    groups = engine.optimizer.optimizer.param_groups
    return {
        "held": held,
        "low": {name: p.detach().float().clone() for name, p in engine.module.named_parameters()},
        "step": [int(next(iter(engine.optimizer.optimizer.state[g["params"][0]].values()))) for g in groups],
        "hyper": [{k: g.get(k) for k in ("lr", "weight_decay", "betas", "eps", "moe")} for g in groups],
        "counters": [engine.global_steps, engine.global_samples, engine.lr_scheduler.state_dict()],
    }


def on_ranks(cases: list[tuple[Ep, str, str | None]], out: str) -> None:
    """Of each case: train and save it in a folder; or load it from another one, say what it holds, and go on."""
    import deepspeed.comm as dist

    found = []
    for case, folder, source in cases:
        engine = build(case)
        if source is None:
            train(engine, case, case.steps)
            engine.save_checkpoint(f"{folder}/{case.name}", client_state={"mine": 7})
            found.append(truth(engine))
        else:
            path, _ = engine.load_checkpoint(source)
            assert path is not None
            state = truth(engine)
            found.append({**state, "losses": train(engine, case, 1)})
        release(engine)
    torch.save(found, f"{out}/{dist.get_rank()}.pt")  # hundreds of tensors: too many for a queue


def run(world: int, cases: list[tuple[Ep, str, str | None]]) -> list[list[dict[str, Any]]]:
    """[case][rank]: as `truth`, with its losses if it was loaded."""
    with tempfile.TemporaryDirectory() as out:
        run_ranks(on_ranks, world, cases, out, timeout=200)
        found = [torch.load(f"{out}/{rank}.pt", weights_only=False) for rank in range(world)]
    return [[rank[i] for rank in found] for i in range(len(cases))]


def wholes(ranks: list[dict[str, Any]], case: Ep, what: str = "held") -> Whole:
    """Whole tensors by the model's names, of what the ranks hold of an engine."""
    size = case.size or 1
    each = len(ranks) // size
    teams = [ranks[e * each if case.data_first else e][what] for e in range(size)]
    found: Whole = {}

    def states(name: str, join: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        return {s: join(s) for s in teams[0][name]} if what == "held" else {"fp32": join(None)}

    def of(team: dict[str, Any], name: str, state: str | None) -> torch.Tensor:
        return team[name] if state is None else team[name][state]

    for name in teams[0]:
        if ".deepspeed_experts." in name:
            before, rest = name.split(".deepspeed_experts.")
            local, after = rest.split(".", 1)
            held = len(
                {n.split(".deepspeed_experts.")[1].split(".")[0] for n in teams[0] if n.startswith(before + ".deep")}
            )
            for e, team in enumerate(teams):
                new = f"{before}.deepspeed_experts.{e * held + int(local)}.{after}"
                found[new] = states(name, lambda s, team=team, name=name: of(team, name, s))
        elif name.endswith("experts.w1"):
            found[name[:-2] + "gate_up_proj"] = states(name, lambda s, name=name: torch.cat(
                [torch.cat([of(t, name, s), of(t, name[:-1] + "3", s)], 1) for t in teams]))  # fmt: skip
        elif name.endswith("experts.w2"):
            found[name[:-2] + "down_proj"] = states(
                name, lambda s, name=name: torch.cat([of(t, name, s) for t in teams])
            )
        elif not name.endswith("experts.w3"):
            new = name.replace(".router.gate.", ".gate.").replace(".shared_experts", ".shared_expert")
            found[new] = states(name, lambda s, name=name: of(teams[0], name, s))
    return found


def same(source: Source, wanted: Whole) -> list[str]:
    """Where a bit of a checkpoint differs, read in blocks of rows."""
    wrong = [f"names {set(source.tensors) ^ set(wanted)}"] * (set(source.tensors) != set(wanted))
    for name, states in wanted.items():
        for state, tensor in states.items():
            rows = range(0, len(tensor), 3)
            found = torch.cat([source.read(name, state, r, min(r + 3, len(tensor))) for r in rows]).float()
            if found.shape != tensor.shape or not torch.equal(found, tensor):
                wrong.append(f"{state} of {name}")
    return wrong


def differing(one: Whole, other: Whole) -> list[str]:
    return [n for n in {**one, **other} if n not in one or n not in other] + [
        f"{s} of {n}" for n, states in one.items() for s, t in states.items() if not torch.equal(t, other[n][s])
    ]


SAVED = {
    2: [
        Ep("mixtral-2", 2, MIXTRAL),
        Ep("qwen3-2", 2, QWEN3, stage=1, precision="bf16", lists=True),
        Ep("frozen-2", 2, MIXTRAL, frozen="layers.1.mlp.experts", steps=1),
        Ep("frozen-all-2", 2, MIXTRAL, stage=1, frozen="embed_tokens", steps=1),
        Ep("classic-2", 2, None, stage=1),
        Ep("chunks-2", 2, None, most=130, steps=1),
    ],
    4: [
        Ep("mixtral-4", 2, MIXTRAL, stage=1, precision="bf16", lists=True),
        Ep("qwen2-4", 4, QWEN2),
        Ep("classic-4", 2, None),
        Ep("optimizer-4", 2, MIXTRAL, stage=1, precision="bf16", more={"data_types": {"grad_accum_dtype": "fp32"}}),
        Ep("classic-first-4", 2, None, data_first=True, steps=1),
    ],
}
CASES = {case.name: (case, world) for world, cases in SAVED.items() for case in cases}


@dataclass
class Home:
    path: Path
    whole: dict[str, Whole]
    ranks: dict[str, list[dict[str, Any]]]

    def __getitem__(self, name: str) -> Path:
        return self.path / name


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Every engine's run folder, with its model's config beside it, and what it held."""
    home = Home(tmp_path_factory.mktemp("experts"), {}, {})
    for world, cases in SAVED.items():
        found = []
        for alike in (False, True):  # a process keeps the groups of ranks that it once made for a size
            chosen: list[tuple[Ep, str, str | None]] = [
                (c, str(home.path), None) for c in cases if c.data_first == alike
            ]
            found += run(world, chosen) if chosen else []
        for case, ranks in zip(sorted(cases, key=lambda case: case.data_first), found, strict=True):
            home.whole[case.name], home.ranks[case.name] = wholes(ranks, case), ranks
            if case.config:
                (home[case.name] / "config.json").write_text(json.dumps(case.config))
    save_cases(home.path, 2, [Case("llama", steps=2, hf=LLAMA)])
    (home["llama"] / "config.json").write_text(json.dumps(LLAMA))
    (home.path / "wide.json").write_text(json.dumps(WIDE))
    (home.path / "mixtral.json").write_text(json.dumps(MIXTRAL))
    return home


# ----------------------------------------------------------------------------------------------------- reading


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_what_is_read_is_what_the_engine_held(home: Home, name: str) -> None:
    case, world = CASES[name]
    source = open_source(home[name])
    assert not same(source, home.whole[name])
    assert any(t.abs().max() > 0 for n, s in home.whole[name].items() if "experts" in n for t in s.values())
    assert (source.stage, source.world_size, source.precision) == (case.stage, world, case.precision)
    assert source.expert_parallel and source.expert_parallel.size == case.size
    assert {source.step(n) for n, m in source.tensors.items() if m.trainable} == {case.steps}
    assert source.client_state == {"mine": 7} and not source.aliases and not source.unread
    assert {n for n, m in source.tensors.items() if not m.trainable} == {
        n for n in home.whole[name] if case.frozen and case.frozen in n
    }
    assert inspect(home[name]).expert_parallel == case.size


def test_groups_are_those_that_the_script_gave(home: Home) -> None:
    """DeepSpeed takes experts out of them; put back, they are the script's own."""
    shapes = {name: open_source(home["mixtral-4"]).tensors[name].shape for name in home.whole["mixtral-4"]}
    lasts = {name: found.last for name in CASES if (found := open_source(home[name]).expert_parallel)}
    assert {n for n, last in lasts.items() if last} == {n for n, (case, _) in CASES.items() if case.lists}
    assert [n for n, last in lasts.items() if last is None] == ["chunks-2"]
    for name in ("mixtral-4", "classic-4"):
        source = open_source(home[name])
        assert [g["weight_decay"] for g in source.groups] == [0.1, 0.0]
        assert sorted(n for g in source.groups for n in g["names"]) == sorted(source.tensors)
        assert all("moe" not in g for g in source.groups)
    assert [g["names"] for g in open_source(home["mixtral-4"]).groups] == [
        list(g.names) for g in param_groups(by_name(shapes), "decay")
    ]
    assert [sorted(g["names"]) for g in open_source(home["classic-4"]).groups] == [
        sorted(n for n in home.whole["classic-4"] if n.endswith(end)) for end in ("weight", "bias")
    ]


def expert(layer: int, number: int, mp: int = 0) -> str:
    return f"layer_{layer}_expert_{number}_mp_rank_{mp:02}_model_states.pt"


MODEL, MODEL3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
EXPP = "expp_rank_0_mp_rank_00_optim_states.pt"
BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "lost expert": ("mixtral-2", lambda f: (f / expert(1, 3)).unlink(), "files are missing"),
    "lost layer": ("mixtral-2", lambda f: [p.unlink() for p in f.glob("layer_1_*")], "hold 0 elements of 'model.lay"),
    "twice": ("mixtral-2", lambda f: shutil.copy(f / expert(0, 1), f / expert(0, 2)), "or of different checkpoints"),
    "lost frozen expert": (
        "frozen-2",
        lambda f: (f / expert(1, 3)).unlink(),
        "3 experts of.*model",
    ),
    "other weights": ("mixtral-2", lambda f: other_weights(f / expert(0, 1)), "are not the master weights"),
    "stage 0": ("classic-2", lambda f: torch.save({}, f / EXPP), "of ZeRO stage 0"),
    "tensor-parallel": ("classic-2", lambda f: torch.save({}, f / expert(0, 0, 1)), "tensor-parallel expert"),
    "stage 3": ("mixtral-2", lambda f: (f / MODEL).rename(f / MODEL3), "ZeRO stage 3"),
    "other split": ("mixtral-2", lambda f: renamed_group(f, "ep_size_1"), "a shard of a run of 1 ranks"),
    "no split": ("mixtral-2", lambda f: renamed_group(f, "experts"), "expected 'ep_size_N'"),
}


def other_weights(file: Path) -> None:
    found = torch.load(file)
    torch.save({key: value + 1 for key, value in found.items()}, file)


def renamed_group(folder: Path, name: str) -> None:
    for file in folder.glob("*_optim_states.pt"):
        found = torch.load(file, weights_only=False)
        found["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]["name"] = name
        torch.save(found, file)


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_by_name(home: Home, tmp_path: Path, what: str) -> None:
    name, damage, message = BAD[what]
    shutil.copytree(home[name], tmp_path / "run")
    damage(next((tmp_path / "run").glob("global_step*")))
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tmp_path / "run")


def test_experts_that_zero_3_partitions_are_refused_by_name(tmp_path: Path) -> None:
    """A live AutoEP engine of stage 3 writes no file of an expert; its layers say the format and its version."""

    def save() -> None:
        case = Ep("run", 2, MIXTRAL, stage=3)
        engine = build(case)
        train(engine, case, 1)
        engine.save_checkpoint(str(tmp_path / "run"))
        release(engine)

    run_ranks(save, 2, timeout=120)
    tag = tmp_path / "run/global_step1"
    assert not list(tag.glob("layer_*")) and len(list(tag.glob("*_model_states.pt"))) == 2
    layer = torch.load(tag / MODEL3, weights_only=False)["ds_autoep_layers"][0]
    assert (layer["checkpoint_format"], layer["checkpoint_format_version"]) == ("zero3_partitioned", 1)
    message = r"AutoEP with ZeRO-3-partitioned experts \(checkpoint format 1\).*Expected AutoEP of ZeRO stage 1 or 2"
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tmp_path / "run")
    convert(tag, tmp_path / "uni")
    with pytest.raises(InvalidCheckpoint, match=message):
        open_source(tmp_path / "uni")


def test_a_universal_checkpoint_of_an_autoep_run_is_refused(home: Home, tmp_path: Path) -> None:
    """DeepSpeed's converter writes whole experts under AutoEP's names, and keeps the shapes of one rank's."""
    convert(next(home["mixtral-2"].glob("global_step*")), tmp_path / "uni")
    whole = torch.load(tmp_path / "uni/zero/model.layers.0.mlp.experts.w1/fp32.pt")["param"]
    shapes = torch.load(tmp_path / "uni" / MODEL, weights_only=False)["param_shapes"]
    (local,) = {tuple(group[n]) for group in shapes for n in group if n == "model.layers.0.mlp.experts.w1"}
    assert whole.shape[0] == 2 * local[0]
    with pytest.raises(InvalidCheckpoint, match=r"converted from a run of AutoEP.*Use the native checkpoint"):
        open_source(tmp_path / "uni")


# ----------------------------------------------------------------------------------------------------- writing


def apart(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two torch files differ, types apart."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [at]
    if isinstance(one, dict):
        odd = [f"{at}.{key}" for key in {**one, **other} if (key in one) != (key in other)]
        return odd + [d for key in one if key in other for d in apart(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [at]
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in apart(a, b, f"{at}.{i}")]
    if hasattr(one, "__dict__") and not isinstance(one, int):
        return apart(vars(one), vars(other), at)
    return [] if one == other else [f"{at}: {one!r} {other!r}"]


@pytest.mark.parametrize(
    "name", [n for n in CASES if n not in ("frozen-2", "chunks-2", "optimizer-4", "classic-first-4")]
)
def test_what_is_written_is_what_deepspeed_writes(home: Home, tmp_path: Path, name: str) -> None:
    """File by file and entry by entry, except those that are left out or added on purpose."""
    case, world = CASES[name]
    reshard(
        home[name], tmp_path / "t", format="zero", stage=case.stage, world_size=world, expert_parallel=case.size,
        say=lambda _: None,
    )  # fmt: skip
    mine, theirs = (next(folder.glob("global_step*")) for folder in (tmp_path / "t", home[name]))
    files = sorted(file.name for file in theirs.iterdir())
    assert sorted(file.name for file in mine.glob("*.pt")) == files
    odd = [d for f in files for d in apart(*(torch.load(at / f, weights_only=False) for at in (theirs, mine)))]
    expected = ("ds_config", "clip_grad", "bias_correction")
    assert not [d for d in odd if not any(key in d for key in expected)]


# Source, target's engine and ranks. Every engine loads with DeepSpeed's own load.
WAYS: list[tuple[str, Ep, int]] = [
    ("mixtral-2", Ep("wider", 2, MIXTRAL, stage=1), 4),
    ("mixtral-2", Ep("all", 4, MIXTRAL), 4),
    ("mixtral-4", Ep("narrower", 2, MIXTRAL, precision="bf16", lists=True), 2),
    ("mixtral-4", Ep("each", 1, MIXTRAL, precision="bf16", lists=True), 2),
    ("qwen3-2", Ep("plain", None, QWEN3, precision="bf16", lists=True), 2),
    ("qwen2-4", Ep("plain-single", None, QWEN2, stage=1), 2),
    ("plain3", Ep("from-plain", 2, QWEN3, precision="bf16", lists=True), 2),
    ("universal", Ep("from-universal", 2, QWEN2), 4),
    ("classic-2", Ep("classic-wider", 4, None), 4),
    ("classic-4", Ep("classic-narrower", 1, None, stage=1), 2),
    ("upcycled", Ep("upcycled", 2, MIXTRAL, lists=True), 4),
    ("grown", Ep("grown", 2, WIDE, stage=1), 2),
    ("mixtral-2", Ep("own", 2, MIXTRAL), 2),
]  # fmt: skip


def test_engines_resume_what_was_written(home: Home, tmp_path: Path) -> None:
    """Weights, master weights, moments, steps, hyper-parameters, counters and scheduler of a live engine, after its own
    load of what growing and resharding wrote; and it trains on."""
    quiet = {"say": lambda _: None}
    reshard(home["qwen3-2"], tmp_path / "plain3", format="zero", stage=3, world_size=3, **quiet)  # type: ignore[arg-type]
    reshard(home["qwen2-4"], tmp_path / "universal", **quiet)  # type: ignore[arg-type]
    runs: dict[int, list[tuple[Ep, str, str | None]]] = {2: [], 4: []}
    wanted: dict[str, tuple[Whole, Path]] = {}
    for source, case, world in WAYS:
        target, place = tmp_path / case.name, home[source] if home[source].exists() else tmp_path / source
        how: dict[str, Any] = {
            "format": "zero", "stage": case.stage, "world_size": world, "expert_parallel": case.size, **quiet,
        }  # fmt: skip
        if source in ("upcycled", "grown"):
            small, config, ways = {
                "upcycled": ("llama", "mixtral", {"experts": "upcycle"}),
                "grown": ("mixtral-2", "wide", {"seed": 3}),
            }[source]
            grow(home[small], target, home.path / f"{config}.json", lossy=True, measure=False, **how, **ways)
            growth = open_growth(home[small], home.path / f"{config}.json", **ways)
            rows, plan = values(growth.plan, growth.reads), growth.plan.tensors
            whole = {n: {s: rows(n, s, 0, t.shape[0]) for s in STATES} for n, t in plan.items()}
        else:
            reshard(place, target, **how)
            opened = open_source(place)
            whole = {n: {s: opened.read(n, s, 0, m.shape[0]) for s in STATES} for n, m in opened.tensors.items()}
        assert not same(open_source(target), whole), case.name
        wanted[case.name] = whole, target
        runs[world].append((case, "", str(target)))
    runs[2].append((WAYS[-1][1], "", str(home["mixtral-2"])))  # the same engine from DeepSpeed's own files
    found = {case.name: ranks for world in runs for (case, _, source), ranks in zip(
        runs[world], run(world, runs[world]), strict=True) if source != str(home["mixtral-2"])}  # fmt: skip
    own = run(2, [(WAYS[-1][1], "", str(home["mixtral-2"]))])[0]
    for (_, case, _), (whole, target) in zip(WAYS, wanted.values(), strict=True):
        ranks, source = found[case.name], open_source(target)
        assert not differing(wholes(ranks, case), whole), case.name
        low = {
            n: {"fp32": s["fp32"].to(torch.bfloat16).float() if case.precision == "bf16" else s["fp32"]}
            for n, s in whole.items()
        }
        assert not differing(wholes(ranks, case, "low"), low), case.name
        assert {step for rank in ranks for step in rank["step"]} == {source.step(n) for n in whole}, case.name
        decays = sorted({h["weight_decay"] for h in ranks[0]["hyper"]})
        assert decays == sorted({g["weight_decay"] for g in source.groups})
        assert any(h["moe"] for h in ranks[0]["hyper"]) == (case.size is not None)
        assert ranks[0]["counters"] == [*list(source.counters.values())[:2], source.lr_scheduler]
        assert all(torch.tensor(rank["losses"]).isfinite().all() for rank in ranks)
    assert [r["losses"] for r in own] == [r["losses"] for r in found["own"]]  # to the last bit


@pytest.mark.parametrize("name,size", [("mixtral-2", 2), ("qwen3-2", None), ("llama", None)])
def test_from_a_hugging_face_folder(home: Home, tmp_path: Path, name: str, size: int | None) -> None:
    """Its files hold tensors by name, not in the model's order, by which native shards are addressed."""
    reshard(home[name], tmp_path / "hub", format="hub", precision="fp32", say=lambda _: None)
    (tmp_path / "hub/bert2bert.json").unlink()
    where: dict[str, Any] = {"format": "zero", "stage": 2, "world_size": 2, "groups": "single", "say": lambda _: None}
    reshard(tmp_path / "hub", tmp_path / "t", expert_parallel=size, **where)
    reshard(home[name], tmp_path / "wanted", expert_parallel=size, **where)
    assert [*open_source(tmp_path / "hub").tensors] != [*open_source(home[name]).tensors]
    states = [torch.load(next((tmp_path / t).glob("*/mp_rank*")), weights_only=False) for t in ("t", "wanted")]
    assert [list(group.items()) for group in states[0]["param_shapes"]] == [
        list(group.items()) for group in states[1]["param_shapes"]
    ]
    wanted = open_source(home[name])
    whole = {n: {"fp32": wanted.read(n, "fp32", 0, m.shape[0])} for n, m in wanted.tensors.items()}
    assert not same(open_source(tmp_path / "t"), whole)
    (tmp_path / "hub/config.json").unlink()
    with pytest.raises(UnsupportedGrowth, match=r"(?s)in which order.*--format universal"):
        reshard(tmp_path / "hub", tmp_path / "other", expert_parallel=size, **where)


def test_a_command_writes_and_verifies(home: Home, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    where = ["--format", "zero", "--stage", "2", "--world-size", "4", "--expert-parallel", "2"]
    assert not main(["reshard", str(home["mixtral-2"]), str(tmp_path / "new"), *where])
    assert not main(["verify", str(home["mixtral-2"]), str(tmp_path / "new")])
    assert not main(["inspect", "--check", str(tmp_path / "new")])
    assert not main(["inspect", str(tmp_path / "new")])
    out = capfd.readouterr().out
    assert "2 ranks share the experts" in out and "model.parameters() as it is, not a list" in out
    grown = ["grow", str(home["llama"]), str(tmp_path / "up"), "--config", str(home.path / "mixtral.json")]
    assert not main([*grown, "--experts", "upcycle", "--workers", "2", "--no-measure", *where])
    assert "lists of parameters" in capfd.readouterr().out
    assert not main(["verify", str(home["llama"]), str(tmp_path / "up"), "--no-logits"])
    assert json.loads((tmp_path / "up/global_step2/bert2bert.json").read_text())["expert_parallel"] == 2


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "world": ("mixtral-2", {"stage": 2, "world_size": 4, "expert_parallel": 3}, "--world-size 4.*1, 2, 4"),
    "experts": ("mixtral-2", {"stage": 2, "world_size": 8, "expert_parallel": 8}, "the 4 experts.*1, 2, 4"),
    "stage 3": ("mixtral-2", {"stage": 3, "world_size": 2, "expert_parallel": 2}, "--stage 1 or 2"),
    "stage 0": ("mixtral-2", {"stage": 0, "world_size": 2, "expert_parallel": 2}, "--stage 1 or 2"),
    "universal": ("mixtral-2", {"format": "universal", "expert_parallel": 2}, "--format zero --stage 1 or 2"),
    "dense": ("llama", {"stage": 2, "world_size": 2, "expert_parallel": 2}, "no experts that DeepSpeed splits"),
    "classic": ("classic-2", {"stage": 2, "world_size": 2}, "--expert-parallel N"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_sizes_that_do_not_fit_are_refused_by_name(home: Home, tmp_path: Path, what: str) -> None:
    name, how, message = REFUSED[what]
    with pytest.raises(InvalidConfig, match=message):
        reshard(home[name], tmp_path / "t", **{"format": "zero", "say": lambda _: None, **how})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("name,size", [("mixtral-2", 2), ("classic-4", 2), ("classic-2", 4)])
def test_experts_in_several_groups(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    """As in models whose experts are too large for one group of DeepSpeed's."""
    monkeypatch.setattr("bert2bert.checkpoints.expert_parallel.writer.cut", lambda *given: cut(*given, most=300))
    reshard(home[name], tmp_path / "t", format="zero", stage=1, world_size=4, expert_parallel=size, say=lambda _: None)
    states = torch.load(next((tmp_path / "t").glob("*/zero_pp_rank_3*")), weights_only=False)
    assert sum(bool(g.get("moe")) for g in states["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]) > 2
    assert not same(open_source(tmp_path / "t"), home.whole[name])


def test_models_and_orders_that_are_not_known_are_refused(home: Home, tmp_path: Path) -> None:
    shutil.copytree(home["mixtral-2"], tmp_path / "bare")
    (tmp_path / "bare/config.json").unlink()
    reshard(tmp_path / "bare", tmp_path / "two", format="zero", stage=2, world_size=2, expert_parallel=1, say=print)
    with pytest.raises(UnsupportedGrowth, match=r"(?s)before or after its experts.*--source-config"):
        reshard(tmp_path / "bare", tmp_path / "t", format="zero", stage=2, world_size=2, say=print)
    with pytest.raises(UnsupportedGrowth, match=r"(?s)groups do not hold experts and routers in the order.*--groups"):
        reshard(home["chunks-2"], tmp_path / "t", format="zero", stage=2, world_size=2, expert_parallel=2, say=print)
    first = {"format": "zero", "stage": 2, "world_size": 4, "say": print}
    with pytest.raises(UnsupportedGrowth, match=r"(?s)use_data_before_expert_parallelism.*--expert-parallel 4 or 1"):
        reshard(home["classic-first-4"], tmp_path / "t", expert_parallel=2, **first)  # type: ignore[arg-type]
    reshard(home["classic-first-4"], tmp_path / "all", expert_parallel=4, **first)  # type: ignore[arg-type]
    assert not same(open_source(tmp_path / "all"), home.whole["classic-first-4"])
    reshard(tmp_path / "bare", tmp_path / "universal", say=print)
    with pytest.raises(UnsupportedGrowth, match="how an AutoEP engine names the routers of a model without a config"):
        reshard(
            tmp_path / "universal", tmp_path / "t", format="zero", stage=2, world_size=2, expert_parallel=1, say=print
        )


def test_a_classic_model_does_not_grow(home: Home, tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match="--source-config"):
        open_growth(home["classic-2"], home.path / "mixtral.json")
    with pytest.raises(InvalidCheckpoint, match="no tensor is named"):
        open_growth(home["classic-2"], home.path / "mixtral.json", source_config=home.path / "mixtral.json")


# ----------------------------------------------------------------------------------------------------- arithmetic


def test_every_element_of_an_expert_has_one_place() -> None:
    shapes = {"l.experts.gate_up_proj": (6, 10, 3), "l.experts.down_proj": (6, 3, 5)}
    for size in (1, 2, 3, 6):
        (found,) = cut([list(shapes)], shapes, size, False)
        assert found.experts and not local_counts(list(found.shapes))
        seen = {name: torch.zeros(6 * 30 if "gate" in name else 6 * 15) for name in shapes}
        for name, shape in found.shapes.items():
            assert whole_shapes(name, shape, size, {}).items() <= shapes.items()
            for rank in range(size):
                for part in parts(name, shape, rank, {}):
                    seen[part.name][part.start : part.start + part.numel] += 1
        assert all((count == 1).all() for count in seen.values())


def test_groups_are_cut_as_deepspeed_cuts_them() -> None:
    """On random models, with experts that are too many for a group or too large; its engine leaves empty groups out."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    def parameter(label: str, shape: tuple[int, ...], size: int) -> torch.nn.Parameter:
        made: Any = torch.nn.Parameter(torch.zeros(shape))
        made.label = label
        if ".experts." in label:
            made.allreduce, made.group_name = False, f"ep_size_{size}"
        return made  # type: ignore[no-any-return]

    draw = random.Random(0)
    for _ in range(20):
        size, most = draw.choice([1, 2]), draw.choice([10**9, 3, 40, 100])
        shapes: dict[str, tuple[int, ...]] = {}
        groups: list[list[str]] = [[], []]
        theirs: list[list[torch.nn.Parameter]] = [[], []]
        for i in range(draw.randint(1, 4)):
            rows, which = draw.randint(1, 3), draw.choice([0, 1])
            layer = {f"{i}.a": (3,), f"{i}.gate.weight": (2, 2), f"{i}.b": (1, 3)}
            experts = {f"{i}.experts.gate_up_proj": (2, 2 * rows, 2), f"{i}.experts.down_proj": (2, 2, rows)}
            local = {"w1": (2 // size, rows, 2), "w2": (2 // size, 2, rows), "w3": (2 // size, rows, 2)}
            shapes |= layer | experts
            for group in (0, 1):
                kept = [name for name in layer if (name[-1] == "b") == bool(group)]
                groups[group] += kept
                theirs[group] += [parameter(n.replace("gate", "router.gate"), shapes[n], size) for n in kept]
            groups[which] += experts
            theirs[which] += [parameter(f"{i}.experts.{kind}", shape, size) for kind, shape in local.items()]
        wanted = split([{"params": params, "name": str(i)} for i, params in enumerate(theirs)], most)
        found = [list(each.shapes.items()) for each in cut(groups, shapes, size, False, most)]
        assert found == [[(p.label, tuple(p.shape)) for p in group["params"]] for group in wanted if group["params"]]
        assert [block.experts for block in blocks(shapes)] == [2] * len(blocks(shapes)) != []


# ----------------------------------------------------------------------------------------------------- DeepSpeed


def test_defect_autoep_does_not_convert_models_of_this_transformers() -> None:
    """DeepSpeed 0.19.8 asks the registry of output recorders with a default, which transformers 5.23 does not take."""
    from deepspeed.module_inject.auto_ep_presets.base import _install_instance_transformers_output_recorders as install
    from transformers.utils import output_capturing

    with pytest.raises(TypeError, match="positional arguments"):
        install(torch.nn.Linear(1, 1), {"a": {}}, output_capturing, lambda model: 0)


def test_defect_an_optimizer_of_the_script_is_refused_with_autoep(home: Home) -> None:
    """Its groups are not cut, so the engine does not start: AutoEP needs an optimizer of the ds_config."""

    def start() -> str:
        import deepspeed

        recorders()
        model = hf_model(MIXTRAL)
        config = {
            "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 2}, "expert_parallel": {"enabled": True, "autoep_size": 2},
        }  # fmt: skip
        try:
            deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
        except AssertionError as error:
            return str(error)
        return "started"

    assert all("None of the param groups are marked as MoE" in found for found in run_ranks(start, 2))
