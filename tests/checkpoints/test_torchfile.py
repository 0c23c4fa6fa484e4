"""Opening torch files: what is allowed becomes plain, everything else is refused and does not run."""

import argparse
import os
import pathlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleProfile
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from bert2bert.errors import InvalidCheckpoint
from bert2bert.files import torch_reader


class Evil:
    """Its pickle calls a function of the given module when it is opened."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def test_deepspeed_classes_become_plain_values(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(256.0, 2, 1, 2, False)
    scaler.cur_iter = 7
    path = save(
        tmp_path / "a.pt",
        {
            "stage": ZeroStageEnum.gradients,
            "scaler": scaler,
            "piece": fragment_address(numel=5, start=3),
            "size": torch.Size([2, 3]),
            "weight": torch.nn.Parameter(torch.arange(6.0)),
        },
    )
    found = torch_reader.load(path)
    assert found["stage"] == 2 and type(found["stage"]) is int
    assert found["scaler"] == {"class": "DynamicLossScaler", **vars(scaler)}
    assert found["piece"] == {"class": "fragment_address", "numel": 5, "start": 3}
    assert found["size"] == (2, 3) and type(found["size"]) is tuple
    assert torch.equal(found["weight"], torch.arange(6.0)) and not found["weight"].requires_grad


def test_files_of_the_same_content_are_opened_once(tmp_path: Path) -> None:
    tree = {"names": ["a", "b"], "x": torch.arange(3.0), "empty": torch.empty(0)}
    same = [save(tmp_path / f"{name}.pt", tree) for name in ("one", "other", "third")]
    differ = [
        save(tmp_path / "value.pt", {**tree, "x": torch.tensor([0.0, 1.0, 5.0])}),
        save(tmp_path / "name.pt", {**tree, "names": ["a", "c"]}),
    ]
    torch.serialization.set_crc32_options(False)
    try:
        silent = [save(tmp_path / f"silent{n}.pt", {**tree, "x": torch.full((3,), float(n))}) for n in (1, 2)]
    finally:
        torch.serialization.set_crc32_options(True)
    found = torch_reader.load_all([*same, *differ, *silent])
    assert found[0] is found[1] is found[2]
    assert len({id(each) for each in found}) == 5
    for each, path in zip(found, [*same, *differ, *silent], strict=True):
        alone = torch_reader.load(path)
        assert each["names"] == alone["names"] and each["x"].equal(alone["x"]), path


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""

    def __init__(self, kind: type, name: str) -> None:
        self.call = (kind, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return getattr, self.call


def test_enumerations_by_name(tmp_path: Path) -> None:
    named = {"stage": ByName(ZeroStageEnum, "weights"), "profile": ByName(LossScaleProfile, "FUSED")}
    found = torch_reader.load(save(tmp_path / "a.pt", named))
    assert found == {"stage": 3, "profile": "fused"} and type(found["stage"]) is int and type(found["profile"]) is str
    for kind, name in ((ZeroStageEnum, "__class__"), (argparse.Namespace, "__init__"), (LossScaleProfile, "weights")):
        with pytest.raises(InvalidCheckpoint, match=f"attribute '{name}' of what is not an enumeration"):
            torch_reader.load(save(tmp_path / "b.pt", ByName(kind, name)))


def test_client_state_of_a_usual_script(tmp_path: Path) -> None:
    state = {
        "rng": np.random.RandomState(3).get_state(),
        "best": np.float64(0.25),
        "count": np.int64(4),
        "matrix": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "flag": np.bool_(True),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("/a/b")),
        "torch_rng": torch.get_rng_state(),
        "nested": [{"x": (1, "y", None, 2**80, b"z")}, {3, 4}],
    }
    found = torch_reader.load(save(tmp_path / "a.pt", state))
    assert found["rng"][0] == "MT19937" and np.array_equal(found["rng"][1], state["rng"][1])
    assert (found["best"], found["count"], found["flag"]) == (0.25, 4, True)
    assert np.array_equal(found["matrix"], state["matrix"])
    assert found["args"] == {"class": "Namespace", "lr": 0.1, "out": "/a/b"}
    assert torch.equal(found["torch_rng"], state["torch_rng"])
    assert found["nested"] == state["nested"]


def test_tensors_are_mapped_not_read_and_files_stay_untouched(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"x": torch.zeros(1 << 20)})
    before = path.read_bytes()
    found = torch_reader.load(path)["x"]
    assert str(path) in Path("/proc/self/maps").read_text()
    found[5] = 1.0
    assert path.read_bytes() == before


@pytest.mark.parametrize("where", ["value", "key", "nested", "state"])
@pytest.mark.parametrize("call", ["system", "eval", "exec", "copy", "import"])
def test_foreign_code_is_refused_and_does_not_run(tmp_path: Path, where: str, call: str) -> None:
    marker = tmp_path / "it_ran"
    evil = {
        "system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w').close()"),
        "copy": Evil(shutil.copyfile, __file__, str(marker)),
        "import": Evil(__import__, "antigravity"),
    }[call]
    scaler = DynamicLossScaler(256.0, 2, 1, 2, False)
    scaler.hook = evil  # hidden inside an object of an allowed class
    value = {"value": evil, "key": {evil: 1}, "nested": {"module": [{"x": (1, evil)}]}, "state": scaler}[where]
    path = save(tmp_path / "evil.pt", value)
    name = {"system": "posix.system", "copy": "shutil.copyfile", "import": "__import__"}.get(call, call)
    with pytest.raises(InvalidCheckpoint, match=rf"evil\.pt: refused, it names '{name}'"):
        torch_reader.load(path)
    assert not marker.exists()
    if call != "import":  # the same file does run its code when it is opened carelessly: this test can fail
        torch.load(path, weights_only=False)
        assert marker.exists()


def test_numpy_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", {"x": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(InvalidCheckpoint, match="'O8' is not a plain number"):
        torch_reader.load(path)


def test_bad_files_each_get_their_own_message(tmp_path: Path) -> None:
    good = save(tmp_path / "good.pt", {"x": torch.randn(1000)}).read_bytes()
    cases = {
        "cut.pt": (good[: len(good) // 2], "truncated, its [0-9,]+ bytes have a beginning but no end"),
        "empty.pt": (b"", "empty, 0 bytes"),
        "text.pt": (b"hello, I am a text file", "not a torch file: text, which begins b'hello, I am"),
        "hole.pt": (good.replace(b"data.pkl", b"data.xkl"), "not readable as a torch file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidCheckpoint, match=message) as caught:
            torch_reader.load(tmp_path / name)
        assert name in str(caught.value)
    torch.save({"x": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InvalidCheckpoint, match=r"old\.pt: not a torch file"):
        torch_reader.load(tmp_path / "old.pt")
    with pytest.raises(InvalidCheckpoint, match="no such file"):
        torch_reader.load(tmp_path / "absent.pt")
    with pytest.raises(InvalidCheckpoint, match="cannot be opened"):
        torch_reader.load(tmp_path)
