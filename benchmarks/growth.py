"""How fast a checkpoint is grown, and in how much memory, against the disk and against DeepSpeed's own tools.

    python benchmarks/growth.py [--folder DIR] [--rounds 2] [--stages 2 3] [--no-memory] [--json FILE]
    python benchmarks/growth.py --dry-run [--json FILE]

Timed: BERT 110M -> 335M, master weights and both moments, from native shards of ZeRO-2 and ZeRO-3 for two ranks (random
values, written by the package itself), into a universal checkpoint and into native shards of the same stage:

* the I/O floor: every source byte read once, and as many bytes as the target has written once and synced, in one file,
  in files of 64 MiB or past the page cache, whichever this disk takes fastest in the same run;
* `grow`, digested, synced and committed; alone and with --workers 2; weights alone, too;
* DeepSpeed's ds_to_universal, and an expansion of its folder, tensor by tensor with index_select and torch.save;
* DeepSpeed's zero_to_fp32, and such an expansion of what it gives (the moments are lost). Neither rival syncs anything;
  what it takes to sync its output afterwards is reported separately, for its pages may be in memory alone until then.

Every contestant runs in a process of its own and is timed after its imports. The source's pages are synced and dropped
from the page cache (posix_fadvise) before each, so all read from the disk; the cache of a virtual disk's host is out of
reach, and as warm for all. As many bytes as the target has are written to a file and removed before each, for a virtual
machine's host lends memory slowly. The best of the rounds counts, for the floor too.

Memory: the peak of RssAnon (sampled every 5 ms) above what it is after the imports, for 110M -> 335M and 335M -> 1.3B.

--dry-run plans and lays out Llama 8B -> 70B over sparse files (sparse.py). --toy: tiny models, for the test-suite; the
speeds then mean nothing. Refuses to begin without room on the disk. Everything is written below --folder and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from math import prod
from pathlib import Path
from typing import Any

import contestants
from contestants import files_of

from bert2bert.terminal.arguments import Parser

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
    return sum(prod(p.shape) for p in table.parameters(config, table.names.classes["BertForMaskedLM"]).values())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder))


def child(name: str, *arguments: Any) -> dict[str, Any]:
    """Run one of `contestants.CONTESTANTS` in a process of its own."""
    command = [sys.executable, str(Path(contestants.__file__).resolve()), name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Bench:
    """One run of the benchmark: where, at which sizes, and what was found."""

    def __init__(self, folder: Path, toy: bool, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds
        self.configs = {name: bert(size, toy) for name, size in (TOY if toy else FULL).items()}
        self.numel = {name: numel(config) for name, config in self.configs.items()}
        for name, config in self.configs.items():
            (folder / f"{name}.json").write_text(json.dumps(config))
        self.rows: list[dict[str, Any]] = []
        self.cleared = 0

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

    def grow(self, source: Path, to: str, how: dict[str, Any], workers: int = 1) -> Any:
        """Time one growth; its target's size is added, and the target removed."""
        target = self.folder / "target"
        count = 12 * self.numel[to]
        found = child("grow", str(source), str(target), str(self.folder / f"{to}.json"), count, how, workers)
        found["target"] = size_of(target)
        self.clear(target)
        return found

    def clear(self, folder: Path) -> None:
        """Give a folder's room back, but keep its empty files to the end: ext4 looks through all that were removed in
        the last minutes before it makes another, which would cost the next contestant a millisecond a file."""
        for path in files_of(folder):
            os.truncate(path, 0)
        self.cleared += 1
        folder.rename(self.folder / f"cleared.{self.cleared}")

    def timed(self, stage: int) -> float:
        """110M -> 335M from shards of a stage; the peak memory of the universal growth."""
        source, case = self.source("110M", stage), f"110M -> 335M, ZeRO-{stage}"
        size, model = size_of(source), 12 * self.numel["335M"]
        forms = {"universal": {"format": "universal"}, "zero": {"format": "zero", "stage": stage, "world_size": 2}}
        weights, rivals = {"format": "hub"}, ("ds_to_universal", "zero_to_fp32")
        reads, writes = [], []
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*forms, "workers", "weights", *rivals)}
        for _ in range(self.rounds):
            scratch = self.folder / "scratch"
            floor = child("floor", str(source), str(scratch), model)
            reads.append(floor["read_seconds"])
            writes.append(floor["write_seconds"])
            for name, how in forms.items():
                runs[name].append(self.grow(source, "335M", how))
            runs["workers"].append(self.grow(source, "335M", forms["universal"], 2))
            runs["weights"].append(self.grow(source, "335M", weights))
            for rival in rivals:
                out = self.folder / "rival"
                out.mkdir()
                arguments = (str(source), str(out), str(self.folder / "335M.json"), model)
                runs[rival].append(child("rival", rival, *arguments))
                self.clear(out)
        best = {n: min(found, key=lambda f: f["seconds"]) for n, found in runs.items() if n not in rivals}
        alone = best.pop("weights")["seconds"]
        self.row(f"{case} to safetensors", "seconds", alone)
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
        for rival in rivals:
            seconds, synced = (min(f[key] for f in runs[rival]) for key in ("seconds", "synced_seconds"))
            self.row(case, f"{rival}, s", seconds)
            self.row(case, f"{rival}, memory, MB", max(f["memory"] for f in runs[rival]) / 1e6)
            self.row(case, f"{rival} / grow", seconds / best["universal"]["seconds"])
            self.row(case, f"{rival}, synced, s", synced)
            self.row(case, f"{rival}, synced / grow", synced / best["universal"]["seconds"])
            if rival == "zero_to_fp32":
                self.row(case, f"{rival} / grow, weights", seconds / alone)
                self.row(case, f"{rival}, synced / grow, weights", synced / alone)
        shutil.rmtree(source)
        return float(max(f["memory"] for f in runs["universal"]))

    def memory(self, small: float, stage: int) -> None:
        """335M -> 1.3B, and how memory rises with the model's bytes from 110M -> 335M on."""
        source, case = self.source("335M", stage), f"335M -> 1.3B, ZeRO-{stage} to universal"
        found = self.grow(source, "1.3B", {"format": "universal"})
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
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2, 3), default=[2, 3])
    parser.add_argument("--no-memory", action="store_true", help="leave 335M -> 1.3B out")
    parser.add_argument(
        "--dry-run", action="store_true", help="lay out Llama 8B -> 70B over sparse files, and nothing else"
    )
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
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
            bench = Bench(folder, args.toy, args.rounds)
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
