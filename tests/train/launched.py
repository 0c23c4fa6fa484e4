"""A run small enough to be started by every true launcher: six steps of two phases, and where to read its losses."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bert2bert.data.prepare import prepare

ROOT = Path(__file__).parents[2]

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
