"""How fast a checkpoint is grown, and in how much memory, against the disk and against DeepSpeed's own tools.

    python benchmarks/growth.py [--folder DIR] [--rounds 2] [--stages 2 3] [--no-memory] [--json FILE]
    python benchmarks/growth.py --dry-run [--json FILE]

Timed: BERT 110M -> 335M, master weights and both moments, from native shards of ZeRO-2 and ZeRO-3 for two ranks (random
values, written by the package itself), into a universal checkpoint and into native shards of the same stage:

* the I/O floor: every source byte read once, and as many bytes as the target has written once and synced, in files of
  16 MiB blocks, at the speed that this disk shows in the same run;
* `grow`, synced, read back for its content digests, and committed; alone and with --workers 2;
* DeepSpeed's ds_to_universal, and an expansion of its folder, tensor by tensor with index_select and torch.save;
* DeepSpeed's zero_to_fp32, and such an expansion of what it gives (the moments are lost). Neither rival syncs anything;
  what it takes to sync its output afterwards is told apart, for its pages may be in memory alone until then.

Every contestant runs in a process of its own and is timed after its imports. The source's pages are synced and dropped
from the page cache (posix_fadvise) before each, so all read from the disk; the cache of a virtual disk's host is out of
reach, and as warm for all. The best of the rounds counts, for the floor too.

Memory: the peak of RssAnon (sampled every 5 ms) above what it is after the imports, for 110M -> 335M and 335M -> 1.3B.

--dry-run plans and lays out Llama 8B -> 70B over sparse files (sparse.py). --toy: tiny models, for the test-suite; the
speeds then mean nothing. Refuses to begin without room on the disk. Everything is written below --folder and removed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

BLOCK = 1 << 24  # bytes
STATES = ("fp32", "exp_avg", "exp_avg_sq")
FULL = {"110M": (12, 768, 64), "335M": (24, 1024, 64), "1.3B": (24, 2048, 64)}  # layers, width, head size
TOY = {"110M": (2, 64, 16), "335M": (4, 128, 16), "1.3B": (4, 256, 16)}
GOALS = {
    "grow / floor": "<= 1.5", "written / target": "<= 1.05", "ds_to_universal / grow": ">= 3",
    "zero_to_fp32 / grow": ">= 3", "memory, MB": "<= 500", "memory / model bytes": "<= 0.05",
}  # fmt: skip


def bert(size: tuple[int, int, int], toy: bool) -> dict[str, Any]:
    layers, width, head = size
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": width // head, "intermediate_size": 4 * width, "hidden_act": "gelu",
        "vocab_size": 512 if toy else 30522, "max_position_embeddings": 64 if toy else 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "pad_token_id": 0, "initializer_range": 0.02, "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }  # fmt: skip


def numel(config: dict[str, Any]) -> int:
    from bert2bert.tables import table_for

    table = table_for(config)
    return sum(prod(p.shape) for p in table.parameters(config, table.classes["BertForMaskedLM"]).values())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def drop(folder: Path) -> None:
    """Sync a folder's files and drop their pages from the cache."""
    for path in files_of(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# ------------------------------------------------------------------------------------------------ in a child


def _anonymous() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))


@contextlib.contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Seconds, and the peak of anonymous memory above the present, of the body."""
    base, peak, done = _anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    try:
        yield
    finally:
        found["seconds"] = time.perf_counter() - start
        done.set()
        sampler.join()
        found["memory"] = max(peak[0], _anonymous()) - base


def child_make(folder: str, config: dict[str, Any], stage: int) -> dict[str, Any]:
    """A source of random values, for two ranks."""
    import torch
    from sparse import fresh_spec

    from bert2bert.shards.transfer import write_checkpoint

    spec = fresh_spec(config)
    pool = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)) * 0.02
    squares = pool.square() * 1e-3

    def values(name: str, state: str, start: int, stop: int) -> Any:
        shape = (stop - start, *spec.shapes[name][1:]) if spec.shapes[name] else ()
        numbers = squares if state == "exp_avg_sq" else pool  # over and over, from a place of the tensor's own
        first = (zlib.crc32(f"{name} {state}".encode()) + start * prod(shape[1:])) % len(pool)
        parts, count = [numbers[first : first + prod(shape)]], prod(shape)
        while (left := count - sum(map(len, parts))) > 0:
            parts.append(numbers[:left])
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(shape)

    write_checkpoint(Path(folder), spec, values, form="zero", stage=stage, world_size=2, manifest_growth=None)
    return {}


def child_floor(source: str, scratch: str, count: int) -> dict[str, Any]:
    """Seconds to read every byte of the source, and to write and sync ``count`` bytes."""
    buffer = bytearray(os.urandom(BLOCK))
    view, start = memoryview(buffer), time.perf_counter()
    for path in files_of(Path(source)):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(view):
                pass
    read, start = time.perf_counter() - start, time.perf_counter()
    buffer[:] = os.urandom(BLOCK)
    start = time.perf_counter()
    with open(scratch, "wb", buffering=0) as file:
        for at in range(0, count, BLOCK):
            file.write(view[: min(BLOCK, count - at)])
        os.fsync(file.fileno())
    return {"read_seconds": read, "write_seconds": time.perf_counter() - start}


def child_grow(source: str, target: str, config: str, how: dict[str, Any], workers: int, profile: str | None) -> Any:
    """`grow`, alone or by forked workers, the change of the function not measured."""
    for module in ("drift", "realise", "shards.stage0", "shards.transfer", "shards.universal", "shards.zero"):
        importlib.import_module(f"bert2bert.{module}")
    from bert2bert.growth import grow
    from bert2bert.shards import workers as processes

    def run(comm: Any = None) -> int:
        grow(
            Path(source), Path(target), Path(config), width="fpi", depth="stack", lossy=True, measure=False,
            comm=comm, say=lambda text: None, **how,
        )  # fmt: skip
        return 0

    found: dict[str, Any] = {}
    before = _written()
    with measured(found), profiled(profile):
        if workers == 1:
            run()
        elif processes.run(workers, run):
            raise SystemExit("a worker failed")
    found["written"] = _written() - before
    return found


@contextlib.contextmanager
def profiled(file: str | None) -> Iterator[None]:
    if file is None:
        yield
        return
    import cProfile
    import pstats

    profile = cProfile.Profile()
    profile.enable()
    try:
        yield
    finally:
        profile.disable()
        with open(file, "w") as out:
            pstats.Stats(profile, stream=out).sort_stats("tottime").print_stats(25)


def _written() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar:"))


def _expanded(plan: Any, state: str, load: Callable[[str, str], Any]) -> Any:
    """A grown tensor, whole, in the plainest way: index every dim of the source tensor, multiply."""
    import torch

    (term,) = plan.terms
    x = load(term.source, state)
    for d, dim in enumerate(term.dims):
        x = x.index_select(d, torch.from_numpy(dim.index))
        factor = dim.param if state == "fp32" else dim.grad
        if factor is not None:
            power = torch.from_numpy(factor**2 if state == "exp_avg_sq" else factor).float()
            x = x * power.view([-1 if i == d else 1 for i in range(x.ndim)])
    return x


def child_rival(kind: str, source: str, target: str, config: str) -> dict[str, Any]:
    """DeepSpeed's tool, then a naive expansion of what it gives."""
    import torch
    from deepspeed.checkpoint.ds_to_universal import main as ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from bert2bert.planning import open_growth

    growth = open_growth(Path(source), Path(config), width="fpi", depth="stack")
    plan, shapes = growth.plan, {name: p.shape for name, p in growth.model.parameters.items()}
    found: dict[str, Any] = {}
    out = Path(target)
    with measured(found), contextlib.redirect_stdout(sys.stderr):
        if kind == "ds_to_universal":
            middle = out / "universal"
            tag = next(path for path in Path(source).iterdir() if path.is_dir())
            ds_to_universal(
                argparse.Namespace(
                    input_folder=str(tag), output_folder=str(middle), num_extract_workers=2, num_merge_workers=2,
                    keep_temp_folder=False, strict=True, inject_missing_state=True,
                )
            )  # fmt: skip

            def load(name: str, state: str) -> Any:
                stored = torch.load(middle / "zero" / name / f"{state}.pt", weights_only=False)
                flat = (stored["param"] if isinstance(stored, dict) else stored).reshape(-1)  # of ZeRO-3: bare, flat
                return flat[: prod(shapes[name])].view(shapes[name])

            for name, tensor in plan.tensors.items():
                folder = out / "grown" / "zero" / name
                folder.mkdir(parents=True)
                for state in STATES:
                    torch.save({"param": _expanded(tensor, state, load)}, folder / f"{state}.pt")
        else:
            weights = get_fp32_state_dict_from_zero_checkpoint(source)
            grown = {n: _expanded(t, "fp32", lambda name, _: weights[name]) for n, t in plan.tensors.items()}
            torch.save(grown, out / "pytorch_model.bin")
    start = time.perf_counter()
    drop(out)
    found["synced_seconds"] = found["seconds"] + time.perf_counter() - start
    return found


def child_dry_run(folder: str, pair: str) -> dict[str, Any]:
    from sparse import dry_run

    for module in ("hub", "stage0", "universal", "zero"):  # readers are imported when they are needed
        importlib.import_module(f"bert2bert.shards.{module}")
    found: dict[str, Any] = {}
    with measured(found):
        found |= dry_run(Path(folder), pair)
    return found


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "make": child_make, "floor": child_floor, "grow": child_grow, "rival": child_rival, "dry_run": child_dry_run,
}  # fmt: skip


def child(name: str, *arguments: Any) -> dict[str, Any]:
    """Run one of CHILDREN in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------ the cases


class Bench:
    """One run of the benchmark: where, at which sizes, and what was found."""

    def __init__(self, folder: Path, toy: bool, rounds: int, profile: Path | None) -> None:
        self.folder, self.rounds, self.profile = folder, rounds, profile
        self.configs = {name: bert(size, toy) for name, size in (TOY if toy else FULL).items()}
        self.numel = {name: numel(config) for name, config in self.configs.items()}
        for name, config in self.configs.items():
            (folder / f"{name}.json").write_text(json.dumps(config))
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def row(self, case: str, what: str, value: float, goal: str | None = None) -> None:
        """A measure; its goal decides whether it was reached."""
        goal = GOALS.get(what) if goal is None else goal
        met = None
        if goal:
            sign, bound = goal.split()
            met = value <= float(bound) if sign == "<=" else value >= float(bound)
        self.rows.append({"case": case, "measure": what, "value": value, "goal": goal, "met": met})
        shown = "" if met is None else f", goal {goal}" + ("" if met else ": MISSED")
        self.say(f"{case:34} {what:26} {value:10.4g}{shown}")

    def source(self, name: str, stage: int) -> Path:
        folder = self.folder / f"source.{name}.{stage}"
        child("make", str(folder), self.configs[name], stage)
        return folder

    def grow(self, source: Path, to: str, how: dict[str, Any], workers: int = 1, profile: bool = False) -> Any:
        """Time one growth; its target's size is added, and the target removed."""
        drop(source)
        target = self.folder / "target"
        file = str(self.profile) if profile else None
        found = child("grow", str(source), str(target), str(self.folder / f"{to}.json"), how, workers, file)
        found["target"] = size_of(target)
        shutil.rmtree(target)
        return found

    def timed(self, stage: int) -> float:
        """110M -> 335M from shards of a stage; the peak memory of the universal growth."""
        source, case = self.source("110M", stage), f"110M -> 335M, ZeRO-{stage}"
        size, model = size_of(source), 12 * self.numel["335M"]
        forms = {"universal": {"form": "universal"}, "zero": {"form": "zero", "stage": stage, "world_size": 2}}
        reads, writes = [], []
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*forms, "workers")}
        for _ in range(self.rounds):
            drop(source)
            scratch = self.folder / "scratch"
            floor = child("floor", str(source), str(scratch), model)
            scratch.unlink()
            reads.append(floor["read_seconds"])
            writes.append(floor["write_seconds"])
            for name, how in forms.items():
                runs[name].append(self.grow(source, "335M", how))
            runs["workers"].append(self.grow(source, "335M", forms["universal"], 2))
        best = {name: min(found, key=lambda f: f["seconds"]) for name, found in runs.items()}
        self.row(case, "read, GB/s", size / min(reads) / 1e9)
        self.row(case, "written and synced, GB/s", model / min(writes) / 1e9)
        for name, found in best.items():
            floor_seconds = min(reads) + min(writes) * found["target"] / model
            kind = f"{case} to " + ("universal, 2 workers" if name == "workers" else name)
            self.row(kind, "seconds", found["seconds"])
            self.row(kind, "floor, s", floor_seconds)
            self.row(kind, "grow / floor", found["seconds"] / floor_seconds)
            if name != "workers":  # of forked ranks, the kernel counts neither here
                self.row(kind, "written / target", found["written"] / found["target"])
                self.row(kind, "memory, MB", max(f["memory"] for f in runs[name]) / 1e6)
        for rival in ("ds_to_universal", "zero_to_fp32"):
            drop(source)
            out = self.folder / "rival"
            out.mkdir()
            found = child("rival", rival, str(source), str(out), str(self.folder / "335M.json"))
            self.row(case, f"{rival}, s", found["seconds"])
            self.row(case, f"{rival}, memory, MB", found["memory"] / 1e6)
            self.row(case, f"{rival} / grow", found["seconds"] / best["universal"]["seconds"])
            self.row(case, f"{rival}, synced, s", found["synced_seconds"])
            self.row(case, f"{rival}, synced / grow", found["synced_seconds"] / best["universal"]["seconds"])
            shutil.rmtree(out)
        if self.profile:
            self.grow(source, "335M", forms["universal"], profile=True)
        shutil.rmtree(source)
        return float(max(f["memory"] for f in runs["universal"]))

    def memory(self, small: float, stage: int) -> None:
        """335M -> 1.3B, and how memory rises with the model's bytes from 110M -> 335M on."""
        source, case = self.source("335M", stage), f"335M -> 1.3B, ZeRO-{stage} to universal"
        found = self.grow(source, "1.3B", {"form": "universal"})
        shutil.rmtree(source)
        self.row(case, "seconds", found["seconds"])
        self.row(case, "GB written a second", found["target"] / found["seconds"] / 1e9)
        self.row(case, "written / target", found["written"] / found["target"])
        self.row(case, "memory, MB", found["memory"] / 1e6)
        more = 12 * (self.numel["1.3B"] - self.numel["335M"])
        self.row(case, "memory / model bytes", (found["memory"] - small) / more)


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        sys.exit(
            f"{folder}: {free / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB needed; choose another --folder, or "
            "leave the largest case out with --no-memory"
        )


def about() -> dict[str, Any]:
    root = Path(__file__).resolve().parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "date": str(date.today()), "commit": done.stdout.strip() or None, "machine": platform.machine(),
        "cores": os.cpu_count(), "load": os.getloadavg()[0],
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | measure | found | goal |", "|---|---|---|---|"]
    for r in rows:
        goal = "" if r["goal"] is None else r["goal"] + ("" if r["met"] else ", missed")
        lines.append(f"| {r['case']} | {r['measure']} | {r['value']:.3g} | {goal} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[2, 3])
    parser.add_argument("--no-memory", action="store_true", help="leave 335M -> 1.3B out")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="profile one more growth, untimed, into FILE")
    parser.add_argument(
        "--dry-run", action="store_true", help="lay out Llama 8B -> 70B over sparse files, and nothing else"
    )
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = CHILDREN[args.child[0]](*json.loads(args.child[1]))
        print("\n" + json.dumps(found))
        return
    if args.rounds < 1:
        parser.error("--rounds: at least 1")

    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = Path(made)
        result: dict[str, Any] = about()
        if args.dry_run:
            check_room(folder, 1 << 28)
            result["dry_run"] = child("dry_run", str(folder), "toy" if args.toy else "70B")
            for key, value in result["dry_run"].items():
                print(value if key == "summary" else f"{key:22} {value}")
        else:
            bench = Bench(folder, args.toy, args.rounds, args.profile)
            n = bench.numel
            peak = 12 * (3 * n["110M"] + 2 * n["335M"])  # source, universal, its temporary slices, expansion
            check_room(folder, max(peak, 0 if args.no_memory else 12 * (n["1.3B"] + 2 * n["335M"])) + (1 << 28))
            peaks = {stage: bench.timed(stage) for stage in args.stages}
            if not args.no_memory:
                bench.memory(peaks[args.stages[0]], args.stages[0])
            result["rows"] = bench.rows
            print(table(bench.rows))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
