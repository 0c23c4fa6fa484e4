"""What programs put into client state and state dicts: read without running it, written back as it was.

Files are opened with weights_only=False, for the tests themselves made them, and what is in them has to come to life.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import operator
import os
import pathlib
import random
import shutil
import subprocess
import sys
import uuid
import zoneinfo
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from bert2bert.checkpoints.inspect import inspect
from bert2bert.checkpoints.inspect_text import render
from bert2bert.checkpoints.open import open_source
from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader, torch_writer
from bert2bert.files.pickled_names import Name, Unsafe, checked
from bert2bert.growth.source_model import match
from tests.checkpoints.engines import Case, hf_config, release, save_cases
from tests.distributed import run_ranks
from tests.doors import grow, reshard

QUIET: dict[str, Any] = {"say": lambda _: None}
RAN: list[str] = []


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Flags(enum.Flag):
    A = enum.auto()
    B = enum.auto()


@dataclasses.dataclass
class Settings:
    lr: float
    names: list[str]
    parent: Any = None


class Slots:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slots) and (self.a, self.b) == (other.a, other.b)

    __hash__ = None  # type: ignore[assignment]


class Table(dict[str, int]):
    """A dict of one's own, with an attribute (as Lightning's and OmegaConf's are)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.note = "x"


class Trainer:
    class Mode(enum.Enum):
        TRAIN = "train"

    class Parts(enum.Flag):
        A = 1
        B = 2

    @dataclasses.dataclass
    class Args:
        lr: float = 1e-3

        class code:
            class Inner(NamedTuple):
                step: int

    class Table(dict[str, int]):
        pass

    @classmethod
    def make(cls, lr: float) -> Trainer.Args:
        return cls.Args(lr)

    @staticmethod
    def count(text: str) -> MadeBy:
        return MadeBy(Trainer.count, text)


class code:
    """In lower case, by the name of a module of programs."""

    class Step(NamedTuple):
        number: int

    class Unit(enum.Enum):
        SECOND = "s"


class MadeBy:
    """An object that pickles as a call of a function: of a class's, or of one with some arguments given."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MadeBy) and self.args == other.args

    __hash__ = None  # type: ignore[assignment]


class Keyword:
    """Made by keyword only, which protocol 2 writes as a call of what a call gave."""

    def __new__(cls, *, a: int) -> Keyword:
        made = super().__new__(cls)
        made.a = a  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"a": self.a}  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyword) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class ByAttribute:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enumeration, with a state to show that it is kept."""

    word = "a"

    def __reduce__(self) -> Any:
        return getattr, (ByAttribute, "one"), {"word": self.word}

    one: Any = None


ByAttribute.one = ByAttribute()


class Loud:
    """Runs when it is made and when it is given its state."""

    def __init__(self, word: str = "a") -> None:
        self.word = word

    def __new__(cls, *args: Any) -> Loud:
        RAN.append("new")
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        RAN.append("state")
        self.__dict__.update(state)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loud) and self.word == other.word

    __hash__ = None  # type: ignore[assignment]


def hello(word: str) -> str:
    RAN.append(word)
    return word


class Calls:
    def __reduce__(self) -> Any:
        return hello, ("called",)


def cyclic() -> Settings:
    one = Settings(0.1, ["a"])
    one.parent = {"child": one}
    return one


VALUES: dict[str, Any] = {
    "nested": [
        Trainer.Mode.TRAIN, Trainer.Parts.A | Trainer.Parts.B, Trainer.Args(), Trainer.Args.code.Inner(1),
        Trainer.Table(a=1), [Trainer.Args(0.5), Trainer.Args], Trainer.Args.code, code, code.Step(2), code.Unit,
        code.Unit.SECOND,
    ],
    "calls": [
        Trainer.make, Trainer.count, MadeBy(Trainer.count, "x"), MadeBy(functools.partial(Trainer.count), "y"),
        Keyword(a=2), zoneinfo.ZoneInfo("UTC"), ByAttribute.one,
    ],
    "enumeration": [Colour.RED, Level.HIGH, Flags.A | Flags.B],
    "times": [datetime.datetime(2024, 5, 6, 7, tzinfo=datetime.timezone.utc), datetime.timedelta(1), datetime.date.min],
    "containers": [
        collections.defaultdict(list, a=[1]), collections.deque([1, 2], 5), collections.Counter("aab"),
        collections.OrderedDict(a=1), {1, 2}, frozenset("ab"), Table({"a": 1}),
    ],
    "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 2 + 3j, np.float64(0.5), np.int32(4), 2**90],
    "arrays": [
        np.arange(6).reshape(2, 3), np.array(["a", "bc"]), np.array([{"a": 1}], dtype=object),
        np.array([(1, 2.0)], dtype=[("i", "<i4"), ("x", "<f8")]), np.array(["2024-05-06"], dtype="datetime64[D]"),
        np.ones(2, dtype=np.complex64), np.float16(2),
    ],
    "own": [
        Settings(0.1, ["a"]), Slots(), Loud("b"), argparse.Namespace(lr=1), pathlib.PurePosixPath("/a"),
        uuid.UUID(int=7),
    ],
    "classes": [
        Settings, hello, len, dict, torch.nn.Linear, functools.partial(hello, "later"), slice(1, 2), range(3),
    ],
    "bytes": [b"\0a", bytearray(b"b"), io.BytesIO(b"c").getvalue()],
    "random": [
        random.getstate(), np.random.RandomState(3).get_state(), torch.get_rng_state(), np.random.default_rng(1),
    ],
    "torch": [torch.Size([2]), torch.device("cpu"), torch.bfloat16, torch.uint16],
}  # fmt: skip
TENSORS: dict[str, Any] = {
    "complex": torch.tensor([1 + 2j]), "conjugate": torch.tensor([1 + 2j]).conj(), "half": torch.ones(2).half(),
    "unsigned": torch.ones(2, dtype=torch.uint16), "eight": torch.ones(4).to(torch.float8_e5m2),
    "sparse": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr(), "expanded": torch.ones(1, 3).expand(2, 3),
    "quantised": torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.quint8), "strided": torch.ones(4, 4)[::2, 1],
    "parameter": nn.Parameter(torch.ones(2)), "scalar": torch.tensor(3), "none": torch.empty(0, 4, dtype=torch.int16),
    "learns": torch.ones(2, requires_grad=True),
}  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.layout != other.layout or one.is_quantized != other.is_quantized:
            return False
        return torch.equal(*(t.dequantize() if t.is_quantized else t.float() if t.element_size() == 1 else
                             t.to_dense() if t.layout != torch.strided else t for t in (one, other)))  # fmt: skip
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.random.Generator):
        return bool(one.bit_generator.state == other.bit_generator.state)
    if isinstance(one, functools.partial):
        return (one.func, one.args) == (other.func, other.args)
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("key", [*VALUES, *TENSORS])
def test_what_is_not_opened_is_written_back(tmp_path: Path, key: str, protocol: int) -> None:
    value = VALUES.get(key, TENSORS.get(key))
    torch.save({"state": value, "module": {}}, tmp_path / "a.pt", pickle_protocol=protocol)
    RAN.clear()
    found = torch_reader.load(tmp_path / "a.pt", plain=("module",))
    with (tmp_path / "b.pt").open("wb") as file:
        torch_writer.save(file, found)
    assert not RAN
    back = torch.load(tmp_path / "b.pt", weights_only=False)["state"]
    assert same(value, back) and getattr(back, "requires_grad", None) == getattr(value, "requires_grad", None), back
    assert torch_writer.equal(found, torch_reader.load(tmp_path / "b.pt", plain=("module",)))


def test_objects_that_hold_themselves_and_what_is_shared(tmp_path: Path) -> None:
    inner = [1]
    torch.save({"a": cyclic(), "b": [inner, inner], "module": {}}, tmp_path / "a.pt")
    found = torch_reader.load(tmp_path / "a.pt", plain=("module",))
    with (tmp_path / "b.pt").open("wb") as file:
        torch_writer.save(file, found)
    back = torch.load(tmp_path / "b.pt", weights_only=False)
    assert back["a"].parent["child"] is back["a"] and back["b"][0] is back["b"][1]


def test_a_whole_module(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 3), "module": {}}, tmp_path / "a.pt")
    found = torch_reader.load(tmp_path / "a.pt", plain=("module",))
    with (tmp_path / "b.pt").open("wb") as file:
        torch_writer.save(file, found)
    back = torch.load(tmp_path / "b.pt", weights_only=False)["model"]
    wanted = torch.load(tmp_path / "a.pt", weights_only=False)["model"]
    assert dict(back.named_parameters()).keys() == {"weight", "bias"}
    assert torch.equal(back(torch.ones(2)), wanted(torch.ones(2)))


def test_values_nested_too_deep_are_refused_before_a_byte_is_written(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "z2", tmp_path / "run")
    file = tmp_path / "run" / "global_step1" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    deep: Any = Settings(0.1, [])
    for _ in range(280):
        deep = [deep]
    torch.save({**content, "deep": deep}, file)
    with pytest.raises(InvalidCheckpoint, match="client state holds values nested hundreds deep"):
        reshard(tmp_path / "run", tmp_path / "t", **QUIET)
    assert not (tmp_path / "t").exists()


STATE = {key: VALUES[key] for key in ("enumeration", "times", "containers", "own", "arrays", "nested", "calls")} | {
    "call": Calls(), "cycle": cyclic(), 7: "a key that is not a text", "tensors": TENSORS,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("state")
    save_cases(root, 1, [Case(f"z{s}", s, steps=1, client_state=STATE) for s in (0, 2, 3)])
    return root


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_with_classes_in_its_client_state(run: Path, tmp_path: Path, stage: int) -> None:
    RAN.clear()
    messages: list[str] = []
    found = inspect(run / f"z{stage}")
    text = render(found)
    assert "not opened" in text and f"{__name__}.Colour" in found.unopened
    for name, how in {"z": {"format": "zero", "stage": (stage + 2) % 4, "world_size": 2}, "u": {}}.items():
        reshard(run / f"z{stage}", tmp_path / name, say=messages.append, **how)  # type: ignore[arg-type]
        assert "carried as it is, unopened" in messages[0]
        assert not [line for line in verified(run / f"z{stage}", tmp_path / name) if "FAILED" in line]
        file = next((tmp_path / name / "global_step1").glob("*model_states.pt"))
        assert not RAN
        back = torch.load(file, weights_only=False)
        assert RAN == ["called", "new", "state"] or sorted(RAN) == ["called", "new", "state"]
        RAN.clear()
        for key in STATE.keys() - {"call", "cycle", "tensors"}:
            assert same(STATE[key], back[key]), key
        for key, tensor in TENSORS.items():
            assert same(tensor, back["tensors"][key]) and type(back["tensors"][key]) is type(tensor), key


def test_a_grown_run_has_them_too(run: Path, tmp_path: Path) -> None:
    for name, config in {"own": hf_config(), "grown": hf_config() | {"num_hidden_layers": 3}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"model_type": "bert", **config}))
    RAN.clear()
    grow(run / "z2", tmp_path / "t", tmp_path / "grown.json", source_config=tmp_path / "own.json", **QUIET)
    assert not RAN
    back = torch.load(tmp_path / "t" / "global_step1" / "mp_rank_00_model_states.pt", weights_only=False)
    assert all(same(STATE[key], back[key]) for key in STATE.keys() - {"call", "cycle", "tensors"})


def verified(source: Path, target: Path) -> list[str]:
    from bert2bert.measure.resharded import compare

    lines: list[str] = []
    compare(
        open_source(source), open_source(target), lambda what, ok, text: lines.append(f"{what} {ok or 'FAILED'} {text}")
    )
    assert len(lines) > 5
    return lines


@pytest.mark.parametrize("key", ["optimizer", "param_shapes"])
def test_classes_are_refused_where_the_checkpoint_itself_is_described(run: Path, tmp_path: Path, key: str) -> None:
    content = torch.load(run / "z2" / "global_step1" / "mp_rank_00_model_states.pt", weights_only=False)
    torch.save({**content, key: [Loud()]}, tmp_path / "a.pt")
    RAN.clear()
    with pytest.raises(InvalidCheckpoint, match=rf"refused, it names '{__name__}.Loud'"):
        torch_reader.load(tmp_path / "a.pt", plain=(key,))
    assert not RAN


@pytest.mark.parametrize("what", ["eval", "exec", "__import__", "open", "posix.system", "subprocess.Popen", "io.open"])
def test_what_runs_programs_by_its_name_is_refused_anywhere(tmp_path: Path, what: str) -> None:
    module, _, name = f"builtins.{what}".rpartition(".") if "." not in what else what.rpartition(".")
    class_of = torch_writer.Name(module, name)
    with (tmp_path / "a.pt").open("wb") as file:
        torch_writer.save(file, {"state": {"x": torch_writer.Object(class_of, ("touch /tmp/never",))}, "module": {}})
    with pytest.raises(InvalidCheckpoint, match=rf"refused, it names '{what}'"):
        torch_reader.load(tmp_path / "a.pt", plain=("module",))


class Reduced:
    """Pickles as a call of anything."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __call__(self) -> None:
        raise NotImplementedError

    def __reduce__(self) -> Any:
        return self.parts


class Outer:
    """A class with a module in it, by which a file can get at what runs programs."""

    os = os


def fetched(of: Any, *names: str) -> Any:
    for name in names:
        of = Reduced(getattr, (of, name))
    return of


GATES: dict[str, tuple[Any, str]] = {
    "globals": (fetched(hello, "__globals__"), r".*hello\.__globals__"),
    "subclasses": (fetched(Outer(), "__subclasses__"), r"\.__subclasses__"),
    "of an object": (Reduced(fetched(Outer(), "os", "abort"), ()), "getattr"),
    "by operator": (Reduced(operator.attrgetter("os.abort"), (Outer,)), "operator.attrgetter"),
    "of a call": (
        Reduced(Reduced(Reduced(functools.partial, (functools.partial, hello)), ()), ()),
        "functools.partial",
    ),
    "partial": (Reduced(functools.partial(fetched(Outer(), "os", "abort")), ()), "getattr"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("key", GATES)
def test_calls_of_what_was_fetched_from_an_object_are_refused(tmp_path: Path, key: str, protocol: int) -> None:
    value, name = GATES[key]
    torch.save({"state": value, "module": {}}, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(InvalidCheckpoint, match=f"refused, it names '{name}'"):
        torch_reader.load(tmp_path / "a.pt", plain=("module",))


@pytest.mark.parametrize(
    ("module", "name", "ok"),
    [
        ("torch", "os.system", False), ("torch", "utils.data.os.system", False), ("torch", "builtins.eval", False),
        ("builtins", "eval.__call__", False), ("posix", "system", False), ("code.x", "Y", False),
        ("run", "Trainer.code.X", True), ("run", "_Trainer.sys.X", True), ("run", "code", True),
        ("run", "code.Step", True), ("run", "code.Step.os", True), ("run", "a.pdb.Step", True),
        ("run", "multiprocessing.util.Step", True), ("run", "os.Step", False), ("run", "ctypes.WinDLL", False),
        ("run", "code.step", False), ("run", "importlib.util", False), ("run", "a.shutil.os.Step", False),
        ("run", "code.InteractiveConsole", False), ("run", "a.subprocess.Popen", False),
        ("run", "code.sys.Step", False), ("run", "pip.Step", False), ("run", "nt.Step", False),
        ("run", "multiprocessing.util.Finalize", False), ("run", "io.open.x", False),
        ("run.os", "Y", True), ("run", "Trainer.eval", True), ("run", "timeit", True), ("run", "eval", True),
    ],
)  # fmt: skip
def test_a_name_is_of_programs_where_a_module_of_them_leads_to_it(module: str, name: str, ok: bool) -> None:
    with contextlib.nullcontext() if ok else pytest.raises(Unsafe):
        assert checked(Name(module, name)) == Name(module, name)


# ------------------------------------------------------------------------------------------------ state dicts


class Keeper(nn.Linear):
    """Keeps something beside its parameters, as Transformer Engine does."""

    kept: Any = None

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


BUFFERS = {f"a_{key}": TENSORS[key] for key in ("complex", "half", "eight", "sparse", "scalar")} | {
    "mask": torch.ones(4, dtype=torch.bool), "codes": torch.ones(4, dtype=torch.int8),
}  # fmt: skip
EXTRAS = {"tensor": torch.arange(8, dtype=torch.uint8), "dict": {"recipe": Colour.RED, "history": torch.ones(3)},
          "none": torch.empty(0, dtype=torch.uint8), "bytes": io.BytesIO(b"state").getvalue()}  # fmt: skip


def keeper_engine(stage: int, fill: bool) -> Any:
    import deepspeed

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.heads = nn.ModuleDict({key: Keeper(5, 3) for key in EXTRAS})
            for key, head in self.heads.items():
                head.kept = EXTRAS[key] if fill else None
            for key, value in BUFFERS.items():
                self.register_buffer(key, value if fill or key == "a_sparse" else torch.zeros_like(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(head(self.frozen(x)).square().mean() for head in self.heads.values())

    torch.manual_seed(0)
    net = Net()
    ours = [p for p in net.parameters() if p.requires_grad]
    return deepspeed.initialize(
        model=net, model_parameters=ours, optimizer=torch.optim.AdamW(ours, lr=1e-2),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage}, "steps_per_print": 10**9},
    )[0]  # fmt: skip


def step(engine: Any, seed: int) -> float:
    loss = engine(torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)))
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def save_keepers(root: str) -> None:
    for stage in (1, 2, 3):
        for without in (False, True):
            engine = keeper_engine(stage, fill=True)
            step(engine, 0)
            engine.save_checkpoint(f"{root}/{stage}{without}", exclude_frozen_parameters=without)
            release(engine)


def load_keepers(root: str) -> None:
    for stage in (1, 2, 3):
        for source in (1, 2, 3):
            for without in (False, True):
                engine = keeper_engine(stage, fill=False)
                folder = f"{root}/{source}{without}-{stage}"
                path, _ = engine.load_checkpoint(folder, load_module_strict=not without)
                assert path is not None, folder
                for key, value in BUFFERS.items():
                    assert same(value, getattr(engine.module, key)), (folder, key)
                for key, head in engine.module.heads.items():
                    kept = EXTRAS[key]
                    if isinstance(kept, dict):
                        assert head.kept["recipe"] is Colour.RED and same(kept["history"], head.kept["history"])
                    else:
                        assert same(kept, head.kept), (folder, key)
                step(engine, 1)
                release(engine)


def test_state_dicts_of_any_kind_between_all_stages(tmp_path: Path) -> None:
    """Buffers of odd dtypes, extra states of any type, and frozen parameters with and without
    exclude_frozen_parameters, loaded strictly by engines."""
    run_ranks(save_keepers, 1, str(tmp_path))
    for source in (1, 2, 3):
        for without in (False, True):
            home = tmp_path / f"{source}{without}"
            found = open_source(home)
            assert len(found.extras) == len(EXTRAS) and found.buffers.keys() == BUFFERS.keys()
            for stage in (1, 2, 3):
                target = Path(f"{home}-{stage}")
                reshard(home, target, format="zero", stage=stage, world_size=1, **QUIET)
                assert not [line for line in verified(home, target) if "FAILED" in line]
    run_ranks(load_keepers, 1, str(tmp_path))


@pytest.mark.parametrize("without", [False, True])
def test_a_peft_run_leads_to_merging(run: Path, without: bool) -> None:
    """With its base model and (as the Trainer saves it) without."""
    base = {"bert.encoder.layer.0.attention.self.query.base_layer.weight": torch.zeros(32, 32)}
    names = [f"bert.encoder.layer.0.attention.self.query.lora_{half}.default.weight" for half in "AB"]
    source = open_source(run / "z2")
    source.tensors = dict.fromkeys((*names, *(() if without else base)), source.tensors["cls.predictions.bias"])
    with pytest.raises(InvalidCheckpoint, match=r"call merge_and_unload\(\) and save_pretrained\(\), then grow"):
        match(source, {"model_type": "bert", **hf_config()})


def test_sets_are_written_alike_in_every_process() -> None:
    """The order of a set of strings changes from process to process; a growth that is run again must know its own."""
    code = "import hashlib; from bert2bert.files import torch_writer; print(hashlib.sha256(torch_writer.saved({'seen': "
    code += "{'a', 'b', 'c', 'd'}, 'more': [frozenset('xyzuv'), {3, 1, 2}, {('k', 1), ('j', 2)}]})).hexdigest()); "
    code += "print([*{'a', 'b', 'c', 'd'}], [*frozenset('xyzuv')])"
    found = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True, capture_output=True,
            cwd=Path(__file__).parents[2], check=True,
        ).stdout.splitlines()
        for seed in ("1", "2")
    ]  # fmt: skip
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]  # the bytes, and the order that Python has
    one, other = {"a", "b", *map(str, range(50))}, {*map(str, reversed(range(50))), "b", "a"}
    assert torch_writer.equal({"s": one}, {"s": other}) and not torch_writer.equal({"s": one}, {"s": other - {"a"}})
