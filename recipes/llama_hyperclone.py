r"""HyperCloning: a language model twice as wide that computes what the small one computes (Samragh et al., 2024).

Command:   bert2bert prepare --text corpus/*.txt --tokenizer llama-125m --output bins/corpus
           deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/llama_hyperclone.py --resume llama-125m --output runs/cloned
Machine:   any; `bert2bert plan SOURCE --recipe recipes/llama_hyperclone.py` says the FLOPs.
Expected:  not yet run at this size. The paper (arXiv 2409.12903) reaches the final accuracy of training from scratch
           2.2 to 4 times faster (OPT 350M to 1.3B, Pythia 410M to 1.4B, OLMo 1B to 2.9B), the cost of the source not
           counted.

The settings:
  known from the paper's text        twice the width, symmetric copies, with noise that cancels or without; AdamW,
                                     decay 0.05, betas (0.9, 0.999), 25,000 steps of warm-up, down to a tenth
  assumed                            a cosine over 100,000 steps of 1 million tokens, 2,500 of warm-up, peak rate 1e-4
The model is the checkpoint's (model=None).
Variants:  --set phases.0.grow.width=lemon phases.0.grow.break_symmetry=none
                                                                 LEMON's uneven split; any width of a pre-norm model
                                                                 (that paper claims 33.2 % of BERT's compute)
           --set phases.0.grow.width=staged                      staged training's block-diagonal form
           --set phases.0.schedule.follow=source                 rates by which AdamW would follow the small run
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Grow, Phase, Schedule, load_recipe

_continue = Path(__file__).with_name("llama_continue.py")
_wider = Grow(
    {"hidden_size": "2x", "intermediate_size": "2x", "num_attention_heads": "2x", "num_key_value_heads": "2x"},
    width="hyperclone",
    break_symmetry="noise",
)

_base = load_recipe(_continue)
recipe = replace(
    _base,
    name="llama-hyperclone",
    phases=(Phase("cloned", 100_000, schedule=Schedule("cosine", 2_500, final=0.1), grow=_wider),),
    optimizer=replace(_base.optimizer, betas=(0.9, 0.999), weight_decay=0.05),
)

tiny = replace(  # a minute on a CPU, from a tiny checkpoint
    load_recipe(_continue, ["size=tiny"]),
    name="llama-hyperclone-tiny",
    phases=(Phase("cloned", 40, schedule=Schedule("cosine", 4, peak=1e-3, final=0.1), grow=_wider),),
    eval_every=20,
    checkpoint_every=20,
)
