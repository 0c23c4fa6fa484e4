r"""A GPT-2 whose output matrix becomes its own after two thirds of the steps (record 53 of modded-nanogpt).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_untie.py --bins bins/web_gpt2 --output runs/untied
Machine:   8 x H100; 7e18 FLOPs, those of gpt2_small_scratch.py.
Expected:  not yet run at this size. The record reports 2.037 to 1.988 minutes, together with multi-token prediction.

The tied matrix is copied, its moments with it, so that the function stays what it was. Two thirds are the record's; all
else is gpt2_small_scratch.py's.
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("gpt2_small_scratch.py")


def _made(base: Recipe, name: str, steps: int, warmup: int, peak: float) -> Recipe:
    wave = Schedule("cosine", warmup, peak, of="run")
    grow = Grow({"tie_word_embeddings": False}, embeddings="untie")
    phases = (Phase("tied", 2 * steps // 3, schedule=wave), Phase("untied", steps // 3, schedule=wave, grow=grow))
    return replace(base, name=name, phases=phases)


recipe = _made(load_recipe(_scratch), "gpt2-untie", 18_999, 700, 6e-4)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "gpt2-untie-tiny", 30, 3, 2e-3)
