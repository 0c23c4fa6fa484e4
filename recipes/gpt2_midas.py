r"""MIDAS: a GPT-2 that grows block by block in its middle (Saunshi et al., NeurIPS 2024, arXiv 2409.19044).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_midas.py --bins bins/web_gpt2 --output runs/midas
Machine:   8 x H100; `bert2bert plan --recipe recipes/gpt2_midas.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper reports up to 40 % faster training at 1B to 8B parameters, and better
           reasoning at the same perplexity.

The settings:
  known from digests of the paper    stages that each duplicate the middle block; stage i takes a share of the steps in
                                     proportion to i (alpha = 1)
  assumed                            four stages of 3, 6, 9 and 12 layers in blocks of 3, all else as
                                     gpt2_small_scratch.py, one schedule over all stages
Variant:   --set phases.1.grow.depth=middle:block=3,centre=layer phases.2.grow.depth=middle:block=3,centre=layer \
               phases.3.grow.depth=middle:block=3,centre=layer           around the middle layer, as LIDAS
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("gpt2_small_scratch.py")


def _made(base: Recipe, name: str, block: int, stages: int, steps: int, warmup: int, peak: float) -> Recipe:
    """block: layers of one; stages: how many there are."""
    model, wave = base.model or {}, Schedule("cosine", warmup, peak, of="run")
    parts = stages * (stages + 1) // 2
    phases = [
        Phase(
            f"{block * i} layer{'s' * (block * i > 1)}", steps * i // parts, schedule=wave,
            grow=Grow({"n_layer": block * i}, depth=f"middle:block={block}") if i > 1 else None,
        )
        for i in range(1, stages + 1)
    ]  # fmt: skip
    return replace(base, name=name, model={**model, "n_layer": block}, phases=tuple(phases))


recipe = _made(load_recipe(_scratch), "gpt2-midas", 3, 4, 19_000, 700, 6e-4)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "gpt2-midas-tiny", 1, 3, 60, 4, 2e-3)
