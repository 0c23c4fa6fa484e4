r"""StackBERT: BERT-base of 3, then 6, then 12 layers, each stack put on top of itself (Gong et al., ICML 2019).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_stack.py --bins bins/wiki_books --output runs/stack
Machine:   8 x H100; `bert2bert plan --recipe recipes/bert_stack.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper reports about 25 % less training time at the same quality; others
           measured 24.3 % fewer FLOPs (bert2BERT) and 34.1 % (LiGO).

The settings:
  known from the released code       3 layers for 50,000 updates, the rate warmed up for 10,000 to 8e-4, then linear to
                                     5.5e-4; 6 layers for 70,000, down to 3e-4; 12 layers on the line that reaches 0 at
                                     update 800,000, of which the paper reports the model at 400,000 (50,000 + 70,000 +
                                     280,000 here); the optimizer starts afresh at every growth; Adam (0.9, 0.999),
                                     epsilon 1e-6, decay 0.01, no clipping
  assumed                            rows of 512 tokens and batches of 256 rows in place of fairseq's dynamic batches of
                                     at most 25,600 tokens a GPU; dropout 0.1, masks of 15 %
Variant:   --set phases.1.grow.moments=carried phases.2.grow.moments=carried   moments copied with their layers
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")


def _made(base: Recipe, name: str, steps: tuple[int, int, int], warmup: int, peak: float, zero: int) -> Recipe:
    """steps: of the three phases; zero: the step at which the last one's line reaches 0."""
    model = base.model or {}
    layers = model["num_hidden_layers"]
    doubled = [Grow({"num_hidden_layers": n}, depth="stack", moments="reset") for n in (layers // 2, layers)]
    middle, late = 5.5 / 8, 3 / 8  # of the peak: 5.5e-4 and 3e-4
    lines = (
        Schedule("linear", warmup, peak, final=middle),
        Schedule("linear", peak=peak * middle, final=late / middle),
        Schedule("linear", peak=peak * late, steps=zero - steps[0] - steps[1]),
    )
    return replace(
        base,
        name=name,
        model={**model, "num_hidden_layers": layers // 4},
        gradient_clipping=0.0,
        phases=(
            Phase("quarter depth", steps[0], schedule=lines[0]),
            Phase("half depth", steps[1], schedule=lines[1], grow=doubled[0]),
            Phase("full depth", steps[2], schedule=lines[2], grow=doubled[1]),
        ),
        optimizer=replace(base.optimizer, lr=peak),
    )


recipe = replace(
    _made(load_recipe(_scratch), "bert-stack", (50_000, 70_000, 280_000), 10_000, 8e-4, 800_000), global_batch_size=256
)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "bert-stack-tiny", (20, 20, 40), 5, 2e-3, 120)  # a minute on a CPU
