r"""Staged training: a GPT-2 of half the width and depth grows, schedule and all, once its loss flattens (ICML 2022).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_staged.py --bins bins/web_gpt2 --output runs/staged
Machine:   8 x H100; `bert2bert plan --recipe recipes/gpt2_staged.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper (Shen et al., arXiv 2203.06211) claims up to 22 % of the compute
           saved.

The settings:
  known from the released code       width by block-diagonal doubling, moments halved and quartered with it; depth by
                                     doubling; 512 rows of 1,024 tokens, 3,000 steps of warm-up, a linear schedule of
                                     250,000 steps, peak rate 2.1e-3; after a growth the rate goes back to an earlier
                                     place of the schedule (grown in width at step 6,499, it goes on at 3,319; in depth
                                     at 6,249, at 4,449), warmed up over 150 to 200 steps; slopes at which to grow:
                                     0.0475 in width, 0.0575 in depth
  assumed                            first the width, then the depth; layers are copied, each beside its original;
                                     20,000 steps for the last phase
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Plateau, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("gpt2_small_scratch.py")


def _made(
    base: Recipe, name: str, most: tuple[int, int, int], total: int, warmup: int, peak: float, every: int
) -> Recipe:
    """most: steps of the phases at most; total: of the schedule; every: steps between evaluations."""
    model = base.model or {}
    sizes = {key: model[key] for key in ("n_embd", "n_head", "n_layer")}
    line = Schedule("linear", warmup, peak, steps=total)
    back = [round(most[0] * 3_319 / 6_499), round(most[1] * 4_449 / 6_249)]
    rewarm = max(warmup // 15, 1)
    wide = {"n_embd": sizes["n_embd"], "n_head": sizes["n_head"]}
    return replace(
        base,
        name=name,
        model={**model, **{key: value // 2 for key, value in sizes.items()}},
        eval_every=every,
        phases=(
            Phase("small", most[0], schedule=line, until=Plateau(0.0475)),
            Phase(
                "wider", most[1], schedule=replace(line, start=back[0], rewarm_steps=rewarm), until=Plateau(0.0575),
                grow=Grow(wide, width="staged"),
            ),
            Phase(
                "deeper", most[2], schedule=replace(line, start=back[1], rewarm_steps=rewarm),
                grow=Grow({"n_layer": sizes["n_layer"]}, depth="interleave"),
            ),
        ),
    )  # fmt: skip


recipe = _made(load_recipe(_scratch), "gpt2-staged", (6_499, 6_249, 20_000), 250_000, 3_000, 2.1e-3, 100)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "gpt2-staged-tiny", (16, 12, 12), 80, 4, 2e-3, 4)
