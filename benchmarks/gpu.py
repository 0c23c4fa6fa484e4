"""Parity (parity.py) and speed of pre-training on one GPU, in one run of a few minutes.

    python benchmarks/gpu.py [--toy] [--json FILE] [--commit NAME] [--budget SECONDS]

Speed: whole steps (loader, forward, backward, clipping, fused AdamW) of BERT-base and BERT-large on packed rows of 512,
on random tokens in documents of article-like lengths: the DeepSpeed engine, ZeRO-2 in bf16, with every layer and with
the sub-models of the first stage; a bare loop with the same compiled model and fp32 master weights; transformers'
BertForMaskedLM as its Trainer runs it (sdpa, bf16 autocast, the head at every position) on the same rows, where it
attends across the documents of a row. Rounds of all of them alternate and medians are compared, so the ratios are from
one run. No dropout on attention probabilities, for the variable-length kernel has none; 0.1 elsewhere, in all of them.

--toy (the default without a GPU): tiny sizes on the CPU, compiled without code generation. It shows that the script
works; its speeds mean nothing. Exit status 1: a parity check failed or something could not be run; the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from loader import synthetic_bins
from parity import (
    ROOT,
    SIZES,
    Bare,
    Checks,
    backend,
    engine_parity,
    kernel_parity,
    make_engine,
    model_dict,
    model_parity,
    sub_model,
)

from bert2bert.data.bins import TokenBins
from bert2bert.data.loader import Loader
from bert2bert.data.objective import Masked
from bert2bert.model.batch import IGNORE, Batch
from bert2bert.model.core import Core
from bert2bert.model.program import full
from bert2bert.model.registry import build
from bert2bert.ranks.launcher import set_up
from bert2bert.recipe import AdamW
from bert2bert.tables.flops import Flops
from bert2bert.terminal.arguments import Parser
from bert2bert.train.compute import peak_flops, step_flops


def compiler_counts() -> tuple[int, int]:
    """(graph breaks, graphs compiled) so far."""
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]


class Case:
    """A way to train: `run` does one whole step on what `batches` gives and returns its FLOPs."""

    def __init__(self, run: Callable[[Batch], float], batches: Iterable[Batch], sync: Callable[[], None]) -> None:
        self.run, self.batches, self.sync = run, iter(batches), sync
        self.rounds: list[tuple[float, float, float, float]] = []  # seconds, of them waiting, tokens, FLOPs
        self.breaks = self.graphs = self.recompiles = 0

    def round(self, steps: int, warm: bool) -> None:
        before = compiler_counts()
        self.sync()
        start, wait, tokens, flops = time.perf_counter(), 0.0, 0, 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            batch = next(self.batches)
            wait += time.perf_counter() - asked
            flops += self.run(batch)
            tokens += batch.real_tokens
        self.sync()
        took = time.perf_counter() - start
        breaks, graphs = (b - a for a, b in zip(before, compiler_counts(), strict=True))
        self.breaks += breaks
        self.graphs += graphs
        if warm:
            self.recompiles += graphs
            self.rounds.append((took, wait, tokens, flops))

    def result(self, steps: int) -> dict[str, float]:
        seconds = statistics.median(r[0] for r in self.rounds) / steps
        wait, tokens, flops = (statistics.median(r[i] / r[0] for r in self.rounds) for i in (1, 2, 3))
        return {
            "step_seconds": seconds, "tokens_per_s": tokens, "flops_per_s": flops, "loader_share": wait,
            "graph_breaks": self.breaks, "graphs": self.graphs, "recompiles_after_step_3": self.recompiles,
        }  # fmt: skip


def ours(engine: Any, program: Any, flops: Flops, lr: float) -> Callable[[Batch], float]:
    """What bert2bert.train.loop.Loop does in a step, the sums over ranks included."""

    def run(batch: Batch) -> float:
        engine.apply(program)
        engine.set_lr(lr)
        loss, _, _ = engine.forward(batch.to(engine.device, non_blocking=True), program)
        engine.backward(loss)
        spent = step_flops(flops, batch, program)
        engine.sum([float(loss.detach()), batch.real_tokens, spent])
        return spent

    return run


def bare(model: Core, optimizer: Bare, flops: Flops, device: torch.device) -> Callable[[Batch], float]:
    whole = full(model.parts)

    def run(batch: Batch) -> float:
        loss = model(batch.to(device, non_blocking=True)).loss
        loss.backward()
        optimizer.step()
        float(loss.detach())  # a loop logs it
        return step_flops(flops, batch, whole)

    return run


def hugging_face(model: Any, optimizer: Any, device: torch.device, rows: int) -> Callable[[Batch], float]:
    def run(batch: Batch) -> float:
        labels, kept = torch.full_like(batch.tokens, IGNORE), batch.labels != IGNORE
        labels[batch.targets[kept]] = batch.labels[kept]
        ids, labels = (x.view(rows, -1).to(device, non_blocking=True) for x in (batch.tokens, labels))
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return 0.0

    return run


def speeds(
    size: str, seq_len: int, bins: TokenBins, device: torch.device, sync: Callable[[], None], compile_theirs: bool
) -> dict[str, dict[str, float]]:
    """Every case's figures."""
    from transformers import BertConfig as TheirConfig
    from transformers import BertForMaskedLM

    _, layers, _, stage, rows, steps = SIZES[size]
    config, adam = model_dict(size, seq_len, dropout=0.1), AdamW(lr=1e-4)
    torch._dynamo.reset()  # else sizes that differ from the last model's would be compiled as dynamic ones

    def model() -> Core:
        built = build(config).to(device)
        built.compile_layers(backend(device))
        return built

    engine = make_engine(config, model(), bins, seq_len, rows, adam)
    engine.training(True)
    plain = model()
    theirs = BertForMaskedLM._from_config(TheirConfig(**config), attn_implementation="sdpa").to(device).train()
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=adam.lr, weight_decay=0.01, fused=True)
    programs = {"engine": full(plain.parts)} | {
        f"engine, {depth} layers": sub_model(depth, stage) for depth in range(stage, layers + 1, stage)
    }
    flops = Flops(plain.hf_config, plain.heads)
    runs = {name: ours(engine, p, flops, adam.lr) for name, p in programs.items()}
    runs["bare"] = bare(plain, Bare(plain, adam, clip=1.0), flops, device)
    runs["transformers"] = hugging_face(theirs, their_optimizer, device, rows)
    if compile_theirs:
        compiled = torch.compile(theirs, backend=backend(device))
        runs["transformers, compiled"] = hugging_face(compiled, their_optimizer, device, rows)
    try:
        cases = {}
        for name, run in runs.items():
            cases[name] = Case(run, Loader(bins, "train", Masked(), seq_len, rows, 0, 1, seed=0), sync)
            cases[name].round(3, warm=False)
        for _ in range(5 if device.type == "cuda" else 2):
            for case in cases.values():
                case.round(steps, warm=True)
    finally:
        engine.destroy()
    return {name: case.result(steps) for name, case in cases.items()}


def matmul_flops(device: torch.device, sync: Callable[[], None], n: int) -> float:
    """FLOP/s of an n x n x n bf16 product of random matrices."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(6):
        sync()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        sync()
        times.append((time.perf_counter() - start) / 10)
    return 2 * n**3 / statistics.median(times[1:])


def figures(size: str, cases: dict[str, dict[str, float]], product: float, peak: float | None) -> list[tuple[str, ...]]:
    """Rows of the table: measure, value, goal."""
    large = size == "BERT-large"
    engine, subs = cases["engine"], [case for name, case in cases.items() if name.startswith("engine, ")]
    sub_seconds = statistics.mean(case["step_seconds"] for case in subs)
    sub_flops = statistics.mean(case["flops_per_s"] * case["step_seconds"] for case in subs) / sub_seconds
    mfu = "peak not known" if peak is None else f"{engine['flops_per_s'] / peak:.3f}"
    rows = [
        ("tokens/s, engine", f"{engine['tokens_per_s']:,.0f}", ""),
        ("MFU of the nominal bf16 peak", mfu, "≥ 0.43" if large else "≥ 0.38"),
        ("MFU of the product measured here", f"{engine['flops_per_s'] / product:.3f}", ""),
        ("engine's step / bare loop's", f"{engine['step_seconds'] / cases['bare']['step_seconds']:.3f}", "≤ 1.05"),
        ("sub-model step, mean over depths / full step", f"{sub_seconds / engine['step_seconds']:.3f}", "≤ 0.47"),
        ("sub-models' FLOP/s / full step's", f"{sub_flops / engine['flops_per_s']:.3f}", "≥ 0.80"),
    ]
    for name, goal in (("transformers", "≥ 2.0"), ("transformers, compiled", "≥ 1.4")):
        if name in cases:
            rows.append((f"tokens/s / {name}", f"{engine['tokens_per_s'] / cases[name]['tokens_per_s']:.2f}", goal))
        else:
            rows.append((f"tokens/s / {name}", "not run: no time left", goal))
    mine = [case for name, case in cases.items() if not name.startswith("transformers")]
    for key, text in (("graph_breaks", "graph breaks"), ("recompiles_after_step_3", "graphs compiled after step 3")):
        rows.append((text, str(int(sum(case[key] for case in mine))), "0"))
    rows.append(("wait for the loader, share of the step", f"{engine['loader_share']:.2%}", "≤ 1 %"))
    return [(size, measure, value, goal if size != "toy BERT" else "") for measure, value, goal in rows]


def git_commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown commit"


def main() -> int:
    begun = time.monotonic()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--commit", help="what the table names as commit (default: asked of git)")
    parser.add_argument("--budget", type=float, default=520, help="leave out what might end later")
    args = parser.parse_args()
    toy = args.toy or not torch.cuda.is_available()
    if toy:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # nothing is compiled with nvcc
    set_up()
    from bert2bert.train import engine as engines

    device, seq_len = engines.start(), 32 if toy else 512
    sync: Callable[[], None] = (lambda: None) if toy else torch.cuda.synchronize
    card = "CPU, toy sizes (speeds mean nothing)" if toy else torch.cuda.get_device_name()
    peak = None if toy else peak_flops(card, "bf16")
    checks: list[dict[str, Any]] = []
    measured: dict[str, dict[str, dict[str, float]]] = {}
    table: list[tuple[str, ...]] = []
    broken = []

    def tell(text: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {text}", file=sys.stderr, flush=True)

    def check(found: Checks) -> None:
        for name, off, allowed in found:
            checks.append({"check": name, "distance": off, "allowed": allowed, "ok": off <= allowed})
            tell(f"{name}: {off:.2e} of {allowed:.2e}")

    def speed(size: str, compile_theirs: bool) -> None:
        measured[size] = speeds(size, seq_len, bins, device, sync, compile_theirs)
        table.extend(figures(size, measured[size], product, peak))
        tell(json.dumps({size: measured[size]}))

    def attempt(what: str, part: Callable[[], None]) -> float:
        """Run a part, survive whatever it does (a GPU's time is dear), and say how long it took."""
        start = time.monotonic()
        try:
            part()
        except Exception:
            traceback.print_exc()
            broken.append(what)
        gc.collect()
        torch.cuda.empty_cache()
        return time.monotonic() - start

    product = matmul_flops(device, sync, 256 if toy else 8192)
    tell(f"bf16 product {product / 1e12:.3g} TFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        bins = synthetic_bins(Path(folder), 300 if toy else 20_000)
        parity_size = "toy BERT" if toy else "BERT-base"
        if not toy:
            attempt("parity of the kernel", lambda: check(kernel_parity(device, heads=12, head_size=64)))
        attempt("parity of the model", lambda: check(model_parity(parity_size, seq_len, bins, device)))
        attempt("parity of a step", lambda: check(engine_parity(parity_size, seq_len, bins, device)))
        took = attempt(parity_size, lambda: speed(parity_size, compile_theirs=True))
        if not toy and time.monotonic() - begun + took < args.budget:
            attempt("BERT-large", lambda: speed("BERT-large", compile_theirs=False))
        elif not toy:
            table.append(("BERT-large", "everything", "not run: no time left", ""))

    head = f"{datetime.now(timezone.utc):%Y-%m-%d}, {card}, torch {torch.__version__}, {args.commit or git_commit()}"
    print(f"\n{head}\n\n| check | distance | allowed | |\n|---|---|---|---|")
    for c in checks:
        print(f"| {c['check']} | {c['distance']:.1e} | {c['allowed']:.1e} | {'ok' if c['ok'] else 'FAILED'} |")
    if toy:
        print("| variable-length kernel against padded attention | | | skipped: it has no CPU version |")
    print("\n| model | measure | value | goal on an H100 |\n|---|---|---|---|")
    print("\n".join("| " + " | ".join(row) + " |" for row in table))
    print("\n".join(f"FAILED to run: {what}" for what in broken))
    if args.json:
        found = {"run": head, "product_flops_per_s": product, "checks": checks, "cases": measured, "broken": broken}
        args.json.write_text(json.dumps(found, indent=1))
    return int(bool(broken) or not all(c["ok"] for c in checks))


if __name__ == "__main__":
    sys.exit(main())
