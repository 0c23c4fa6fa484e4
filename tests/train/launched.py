"""A run small enough to be started by every true launcher: six steps of two phases, where to read its losses, and a
rank of it in a forked process."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import random
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path

from bert2bert.data.prepare import prepare

ROOT = Path(__file__).parents[2]
Hook = Callable[[int], None]
"""Called in a rank's process before anything else there, with its number."""

RECIPE = '''"""Six steps, for the tests of the launchers."""
from bert2bert.recipe import AdamW, Data, Phase, Recipe, SubModels

recipe = Recipe(
    name="launched",
    model={{
        "vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 32,
    }},
    data=Data(bins={bins!r}, seq_len=32, eval_rows=16),
    global_batch_size=128,
    phases=(Phase("sub-models", 3, SubModels(1)), Phase("full", 3)),
    optimizer=AdamW(lr=1e-3),
    eval_every=3,
    checkpoint_every=3,
    log_every=1,
)
'''


def write_inputs(folder: Path) -> Path:
    """Bins of made-up text and a recipe of six steps over them; the recipe's path."""
    words = ["the", "whale", "ship", "sea", "captain", "lady", "house", "letter", "and", "of", "to", "in"]
    draw = random.Random(0)
    text = folder / "text.txt"
    text.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(400)))
    prepare(
        text=[text], dataset=None, dataset_config=None, dataset_split=None, text_column=None, tokenizer=None,
        vocab_size=256, heldout_text=[], heldout_fraction=0.1, document="blank-line", output=folder / "bins", seed=0,
        progress=False,
    )  # fmt: skip
    path = folder / "launched.py"
    path.write_text(RECIPE.format(bins=str(folder / "bins")))
    return path


def losses(run: Path) -> list[tuple[str, int, float]]:
    """(kind, step, loss) of every record of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records]


def write_configs(folder: Path, micro: int = 32) -> None:
    """ds_configs of each stage beside the recipe."""
    for stage in (1, 2, 3):
        config = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}}
        (folder / f"zero{stage}.json").write_text(json.dumps(config))


def entry(name: str) -> types.ModuleType:
    """A program of launch/, as a module."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rank_of_a_job(words: list[str], environ: dict[str, str], log: Path, hook: Hook | None) -> None:
    """Be one rank of launch/pretrain.py, in a process that was just forked, and leave it; in the network namespace that
    NETNS names, if it does."""
    with log.open("w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        os.environ.update(environ)
        os.dup2(file.fileno(), 2)
        code = 1
        try:
            if namespace := environ.get("NETNS"):
                with open(f"/run/netns/{namespace}", "rb") as there:
                    if ctypes.CDLL(None, use_errno=True).setns(there.fileno(), 0x40000000):  # CLONE_NEWNET
                        raise OSError(ctypes.get_errno(), "setns")
            if hook is not None:
                hook(int(environ["RANK"]))
            code = entry("pretrain").main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        file.flush()
        os._exit(code)
