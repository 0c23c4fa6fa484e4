r"""bert_base_scratch.py without dropout on attention probabilities, so that a GPU keeps its variable-length kernel.

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_base_fast.py --bins bins/wiki_books --output runs/fast
Machine:   8 x H100; 7.7e19 FLOPs, as bert_base_scratch.py; that recipe's dropout of 0.1 takes padded attention instead.
Expected:  not yet run. MosaicBERT, NeoBERT and ModernBERT pre-train without it, too.
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Recipe, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")


def _made(base: Recipe) -> Recipe:
    name = base.name.replace("scratch", "fast")
    return replace(base, name=name, model={**(base.model or {}), "attention_probs_dropout_prob": 0.0})


recipe = _made(load_recipe(_scratch))
tiny = _made(load_recipe(_scratch, ["size=tiny"]))  # half a minute on a CPU
