"""Whether a step of a layer program costs what its FLOPs say, on the CPU, against a full step of the same engine.

    python benchmarks/programs.py [--rounds 9] [--tokens 2048] [--toy] [--json]

A BERT of 8 layers of 256 with a small vocabulary, so that the blocks dominate; whole optimizer steps of the DeepSpeed
engine (ZeRO-0, float32, one thread, eager), the same batch for all. Processor time is measured, rounds alternate
between programs, and the median of the rounds' ratios to the full step is compared with the ratio of the FLOPs. Goal:
within 15 %. The optimizer's own time is no FLOP, and is in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import numpy as np
import torch
from cores import batch_of, lengths_of

from bert2bert.model.batch import Batch
from bert2bert.model.program import Step
from bert2bert.model.registry import build
from bert2bert.ranks.launcher import set_up
from bert2bert.recipe import AdamW, Data, Draw, Fresh, Frozen, Full, Phase, Program, Recipe, Shared, Top
from bert2bert.tables.flops import Flops
from bert2bert.terminal.arguments import Parser
from bert2bert.train import engine as engines
from bert2bert.train.compute import step_flops

ROW, GOAL = 512, 0.15


def programs(layers: int) -> dict[str, Program | Step]:
    """What is compared, the full step first; sub-models as steps, for their program draws them."""
    parts = [f"layer.{i}" for i in range(layers)]
    quarter, half = layers // 4, layers // 2
    return {
        "full": Full(),
        **{
            f"sub-model of {depth} layers, of which the top {quarter} learn": Step(
                tuple(range(depth)), frozenset({"head", *parts[depth - quarter : depth]})
            )
            for depth in (quarter, half, layers)
        },
        f"top {half} layers learn": Top(half),
        f"{half} fresh layers, every second": Fresh(),
        "embeddings and the lower half rest": Frozen(("embeddings", f"layer.[0-{half - 1}]")),
        f"shared, all {layers} layers twice": Shared(times=2),
        "shared, every second layer three times": Shared(uses=(1, 3) * half),
    }


def seconds(engine: engines.Engine, batch: Batch, step: Step) -> float:
    """Processor time of an optimizer step."""
    start = time.process_time()
    engine.apply(step)
    loss, *_ = engine.forward(batch, step)
    engine.backward(loss)
    return time.process_time() - start


def compare(layers: int, hidden: int, tokens: int, rounds: int, row: int) -> dict[str, dict[str, float]]:
    """{program: {"flops", "time": ratios to the full step, "off": how far time is from FLOPs, "seconds"}}."""
    config = {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 512, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 4 * hidden,
        "max_position_embeddings": row, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    rows = max(1, tokens // row)
    recipe = Recipe("programs", config, Data("bins", seq_len=row), rows, (Phase("full", 1),), AdamW(lr=1e-4))
    torch.manual_seed(0)
    model = build(config)
    model.initialise()
    engine = engines.build(recipe, {"train_micro_batch_size_per_gpu": rows, "zero_optimization": {"stage": 0}}, model)
    engine.set_lr(1e-4)
    rng = np.random.default_rng(0)
    batch = batch_of(lengths_of("packed", row, rows, rng), row, True, config["vocab_size"], rng)
    draw = Draw(0, 0, 0, model.parts, frozenset(model.parts[1::2]))
    steps = {name: p if isinstance(p, Step) else p.step(draw) for name, p in programs(layers).items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            taken[name].append(seconds(engine, batch, step))
    engine.destroy()
    counter = Flops(model.hf_config, model.heads)
    flops = {name: step_flops(counter, batch, step) for name, step in steps.items()}
    found = {}
    for name in list(steps)[1:]:
        ratios = [a / full for a, full in zip(taken[name][1:], taken["full"][1:], strict=True)]  # the first warms up
        ratio, expected = statistics.median(ratios), flops[name] / flops["full"]
        found[name] = {
            "flops": expected, "time": ratio, "off": ratio / expected - 1,
            "seconds": statistics.median(taken[name][1:]),
        }  # fmt: skip
    return found


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="rounds of which the median counts")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="token slots of a batch")
    parser.add_argument("--toy", action="store_true", help="one round of a tiny model: it shows that all runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    set_up()
    engines.start()
    size = (4, 16, 32, 1, 32) if options.toy else (8, 256, options.tokens, options.rounds, ROW)
    found = compare(*size)
    if options.json:
        print(json.dumps(found))
        return
    print("| program | FLOPs / full step's | time / full step's | off |\n|---|---|---|---|")
    for name, row in found.items():
        missed = "" if abs(row["off"]) <= GOAL else ", **missed**"
        print(f"| {name} | {row['flops']:.3f} | {row['time']:.3f} | {row['off']:+.1%}{missed} |")


if __name__ == "__main__":
    main()
