"""A thousand damaged checkpoints: each is refused in words, or read right; quickly, in little memory, and no code runs.

Every form is damaged with seeded changes: bytes flipped or cut anywhere in any file; and files written again, checksums
and all, with keys renamed or gone, other shapes, dtypes, strides and offsets, absurd sizes, values of other types,
structures that contain themselves or unfold without end, foreign classes.

What cannot be noticed, and is left out here: (1) in a checkpoint without digests, a changed byte inside a tensor's own
data; with digests (growths, this project's runs) `inspect --check` or `reshard` must find it; (2) a file that was
written again, with true checksums, and contradicts nothing: another number in place of a learning rate, a step, a
counter, a name of a tensor that no manifest lists, a tensor moved inside its own storage.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import signal
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bert2bert.checkpoints.inspect import check, inspect
from bert2bert.checkpoints.inspect_text import render
from bert2bert.checkpoints.manifest import MANIFEST
from bert2bert.checkpoints.open import open_source
from bert2bert.errors import UserError
from bert2bert.growth.source_model import open_model
from tests.checkpoints.targets import make_tensors, plain_spec, reader
from tests.doors import reshard, write_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "zero0": {"format": "zero", "stage": 0}, "zero2": {"format": "zero", "stage": 2, "world_size": 2},
    "zero3": {"format": "zero", "stage": 3, "world_size": 3}, "universal": {"format": "universal"},
    "hub": {"format": "hub"},
}  # fmt: skip
SECONDS, BYTES = 5.0, 1 << 30
EACH = 200


class Bomb:
    """Runs when a careless reader opens it."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


def write(folder: Path, how: dict[str, Any]) -> Path:
    spec = plain_spec()
    return write_checkpoint(folder, spec, reader(make_tensors(spec)), manifest_growth={"operators": {}}, **how)


def files_of(folder: Path, manifest: bool) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and (manifest or p.name != MANIFEST))


# ------------------------------------------------------------------------------------------------ what is done to files


def flip(draw: random.Random, path: Path) -> bool:
    """Change one to eight bytes; whether tensors' data changed."""
    data = bytearray(path.read_bytes())
    places = [draw.randrange(len(data)) for _ in range(draw.choice((1, 1, 1, 2, 8)))]
    for at in places:
        data[at] ^= draw.randrange(1, 256)
    inside = data_ranges(path)
    path.write_bytes(data)
    return any(low <= at < high for low, high in inside for at in places)


def data_ranges(path: Path) -> list[tuple[int, int]]:
    """Where the bytes of tensors lie in a file."""
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        return [(start, path.stat().st_size)]
    if path.suffix != ".pt":
        return []
    found = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                head = path.read_bytes()[info.header_offset : info.header_offset + 30]
                names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
                start = info.header_offset + 30 + names
                found.append((start, start + info.file_size))
    return found


def cut(draw: random.Random, path: Path) -> bool:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))] + b"\0" * draw.choice((0, 0, 5)))
    return False


def odd(draw: random.Random, old: Any, binary: bool) -> Any:
    """A value that does not belong where ``old`` is. binary: of a torch file, which can hold more than JSON."""
    endless: list[Any] = []
    endless.append(endless)
    laughs: Any = [1, 2]
    for _ in range(60):
        laughs = [laughs, laughs]
    deep: Any = 0
    for _ in range(400):
        deep = [deep]
    choices = [None, -1, 0, 10**18, "x", "../../x", [], {}, [None], {"a": -5}, 1e308, float("nan"), endless, deep, True]
    choices += [laughs, b"\0"] if binary else []
    if isinstance(old, int) and not isinstance(old, bool):
        choices += [old + 1, -old - 1, old << 60]
    if isinstance(old, torch.Tensor):
        flat = old.reshape(-1)
        choices += [old.to(torch.int64), old.double(), old[:0], torch.cat([flat, flat]), old.reshape(1, *old.shape)]
        if old.numel() > 1:
            choices += [flat[:-1].clone(), flat[:1].expand(flat.shape), old.to_sparse(), flat.as_strided((2,), (0,))]
    if isinstance(old, tuple):
        choices += [tuple(-x for x in old if isinstance(x, int)), (10**12, *old), (*old, 3), (2**70,)]
    if isinstance(old, str):
        choices += [old + "x", "/" + old, old[:-1], "../" + old, old + "\0"]
    return draw.choice(choices)


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value in nested containers."""
    found = [at] if at else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*at, key))
    return found


def tamper(draw: random.Random, tree: Any, binary: bool = False) -> None:
    """Change, remove or rename one entry of nested containers, in place."""
    path = draw.choice(places(tree))
    home = tree
    for key in path[:-1]:
        home = home[key]
    key, how = path[-1], draw.random()
    if how < 0.15:
        del home[key]
    elif how < 0.3 and isinstance(home, dict):
        home[str(key) + draw.choice(("x", "/../..", ".weight"))] = home.pop(key)
    else:
        home[key] = odd(draw, home[key], binary)


def rewrite(draw: random.Random, path: Path) -> bool:
    """Write a file again with one entry changed; whether that may go unnoticed (the second exception above)."""
    if path.suffix == ".json":
        tree = json.loads(path.read_text())
        tamper(draw, tree)
        try:
            path.write_text(json.dumps(tree, default=str))
        except (ValueError, RecursionError):
            path.write_text("[" * 100_000)
        return True
    if path.suffix == ".pt":
        tree = torch.load(path, weights_only=False)  # a test's own file
        if not isinstance(tree, dict):
            tree = draw.choice([{"step": tree}, [tree], "x", torch.ones(3), torch.tensor(float("nan"))])
        elif draw.random() < 0.1:
            tree["extra"] = Bomb(str(path.parents[-2] / "tmp" / "bert2bert_fuzz_bomb"))
        else:
            tamper(draw, tree, binary=True)
        torch.save(tree, path)
        return True
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        tamper(draw, header)
        try:
            text = json.dumps(header, default=str).encode()
        except (ValueError, RecursionError):
            text = b"{" * 100_000
        length = draw.choice((len(text), len(text), len(text), 2**62))
        path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
        return True
    path.write_text(draw.choice(["", "../..", "/etc", "nothing", "\0", "x" * 5000]))
    return True


# ------------------------------------------------------------------------------------------------ what must hold


def look(target: Path) -> dict[str, Any]:
    """All that a checkpoint is asked for, by name and state."""
    source = open_source(target)
    source.identity()
    render(inspect(target), tensors=True)
    if source.config is not None:
        with contextlib.suppress(UserError):
            open_model(target)
    return {
        f"{name} {state}": source.read(name, state, 0, meta.shape[0] if meta.shape else 1).clone()
        for name, meta in source.tensors.items()
        for state in source.states
    }


def damaged(target: Path, form: str, manifest: bool) -> bool:
    """Whether the digests show it."""
    if not manifest:
        return False
    try:
        if check(target).bad:
            return True
        shutil.rmtree(target.parent / "again", ignore_errors=True)
        reshard(target, target.parent / "again", format="hub" if form == "hub" else "universal", say=lambda _: None)
    except UserError:
        return True
    return False


def one(draw: random.Random, base: Path, work: Path, form: str, wanted: dict[str, Any]) -> str | None:
    """Damage a copy once and look at it: what is wrong with what came of it, if anything."""
    target = work / "c"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(base, target)
    manifest = draw.random() < 0.5
    if not manifest:
        for path in target.rglob(MANIFEST):
            path.unlink()
    path = draw.choice(files_of(target, manifest))
    how: Callable[[random.Random, Path], bool] = draw.choice((flip, flip, cut, rewrite, rewrite, rewrite))
    excused = how(draw, path)
    what = f"{how.__name__} of {path.relative_to(target)}, {'with' if manifest else 'without'} manifest"
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = look(target)
    except UserError as error:
        return None if str(error) and len(str(error)) < 5000 else f"{what}: no words"
    except BaseException:
        return f"{what} ({time.monotonic() - start:.1f} s):\n{traceback.format_exc()[-1500:]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    right = all(key in found and torch.equal(found[key], tensor) for key, tensor in wanted.items())
    if right or (excused and not manifest) or damaged(target, form, manifest):
        return None
    if how is flip and path.suffix == ".safetensors" and not manifest:
        return None  # a name in a header without checksum: the second exception
    return f"{what}: read as something else in silence"


def many(form: str, base: str, work: str, seed: int, out: Any) -> None:
    """In a process of its own, whose memory is limited: what a defect could bring down."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("took too long")))
    draw, wanted = random.Random(f"{form} {seed}"), look(Path(base))
    found = []
    for i in range(EACH):
        if wrong := one(draw, Path(base), Path(work), form, wanted):
            found.append(f"{i}: {wrong}")
    out.put(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("form", FORMS)
def test_damaged_checkpoints(form: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base, FORMS[form])
    (tmp_path / "work").mkdir()
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    process = context.Process(target=many, args=(form, str(base), str(tmp_path / "work"), 0, out), daemon=True)
    process.start()
    try:
        while process.is_alive() and out.empty():
            time.sleep(0.05)
        assert not out.empty(), f"the process died with status {process.exitcode}"
        found = out.get(timeout=10)
    finally:
        process.kill()
        process.join()
    assert not found, f"{len(found)} of {EACH}:\n" + "\n".join(found[:6])
    assert not Path("/tmp/bert2bert_fuzz_bomb").exists()
