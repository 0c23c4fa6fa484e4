r"""A GPT-2 of one layer, expanded once, late, under WSD (Bu, ICML 2026, arXiv 2511.04981).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_one_layer.py --bins bins/web_gpt2 --output runs/one_layer
           (--set size=zero: no layer at all at first; then every layer is fresh)
Machine:   8 x H100; `bert2bert plan --recipe recipes/gpt2_one_layer.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper reports about 80 % fewer FLOPs at a loss that is less than 0.5 % (124M)
           and 0.2 % (7B) above that of training at full depth.

The settings:
  known from notes on the paper      zero or one layer up to 80 % of the steps, one expansion by copies (or fresh
                                     layers), WSD with 2 % of warm-up and 10 % of decay
  differs                            the paper trains with Muon and muP; here AdamW at the rate of
                                     gpt2_small_scratch.py, whose other settings this recipe takes
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("gpt2_small_scratch.py")


def _made(base: Recipe, name: str, layers: int, steps: int, peak: float) -> Recipe:
    """layers: of the small model."""
    model, early = base.model or {}, round(0.8 * steps)
    wsd = Schedule("wsd", max(steps // 50, 1), peak, decay_steps=max(steps // 10, 1), of="run", steps=steps)
    grow = Grow({"n_layer": model["n_layer"]}, depth="stack" if layers else "random", moments="carried")
    phases = (
        Phase(f"{layers} layer{'s' * (layers != 1)}", early, schedule=wsd),
        Phase("expanded", steps - early, schedule=wsd, grow=grow),
    )
    return replace(base, name=name, model={**model, "n_layer": layers}, phases=phases)


recipe = _made(load_recipe(_scratch), "gpt2-one-layer", 1, 19_000, 6e-4)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "gpt2-one-layer-tiny", 1, 60, 2e-3)

zero = _made(load_recipe(_scratch), "gpt2-zero-layers", 0, 19_000, 6e-4)
zero_tiny = _made(load_recipe(_scratch, ["size=tiny"]), "gpt2-zero-layers-tiny", 0, 60, 2e-3)
