r"""A GPT-2 between two depths: half its layers with doubled steps, and back (Lauga et al. 2025, arXiv 2504.18590).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_lauga.py --bins bins/web_gpt2 --output runs/lauga
Machine:   one GPU; the paper's model has 12 blocks of width 256.
Expected:  not yet run at this size. The paper reports the loss of 16,000 steps at one level with 44 % fewer FLOPs,
           under plain SGD.

The settings:
  known from the paper's text        12 blocks, width 256, 8 heads, GPT-2's vocabulary; the coarse model has every
                                     second block, whose residual step is doubled on the way down and halved on the way
                                     up
  differs                            AdamW in place of SGD; its moments go along by the rule of the weights (what is
                                     multiplied by s has m / s and v / s squared), which the paper leaves open
  assumed                            2,000 steps at full depth, 6,000 at half, 8,000 at full; all else as
                                     gpt2_small_scratch.py
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("gpt2_small_scratch.py")


def _made(base: Recipe, name: str, fine: int, coarse: int, again: int, warmup: int, peak: float) -> Recipe:
    """fine, coarse, again: steps at full depth, at half, and at full depth again."""
    layers, wave = (base.model or {})["n_layer"], Schedule("cosine", warmup, peak, of="run")
    down = Grow({"n_layer": layers // 2}, depth="coalesce:scale=step,restriction=injection")
    up = Grow({"n_layer": layers}, depth="decoalesce:scale=step")
    phases = (
        Phase("fine", fine, schedule=wave),
        Phase("coarse", coarse, schedule=wave, grow=down),
        Phase("fine again", again, schedule=wave, grow=up),
    )
    return replace(base, name=name, phases=phases)


_base = load_recipe(_scratch, ["model.n_embd=256", "model.n_head=8"])
recipe = _made(_base, "gpt2-lauga", 2_000, 6_000, 8_000, 700, 6e-4)
tiny = _made(load_recipe(_scratch, ["size=tiny", "model.n_layer=4"]), "gpt2-lauga-tiny", 10, 20, 20, 4, 2e-3)
