r"""BERT-base by a V-cycle: large for a while, coalesced to half its size, small, and back (Zou et al., ICLR 2024).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_vcycle.py --bins bins/wiki_books --output runs/vcycle
           (--set size=two_levels: halved twice, and back in two steps; the paper's three levels, which paid for its
           BERT-large)
Machine:   8 x H100; `bert2bert plan --recipe recipes/bert_vcycle.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper (arXiv 2404.07999) reports, the small model's cost included, 19.0 %
           fewer FLOPs and 10.8 % less time for BERT-base; a third level did not help it.

The settings:
  known from the paper's text        half the width and depth; the small model trains for half as many steps as the
                                     large (150,000 of 300,000); the large model goes on from alpha = 0.5 of the
                                     de-coalesced weights and 0.5 of its own; rows of 128 tokens; the optimizer starts
                                     afresh
  assumed                            the large model trains for 10,000 steps before it is coalesced; a linear schedule
                                     with 10,000 steps of warm-up in every phase; all else as bert_base_scratch.py
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Grow, Phase, Recipe, Schedule, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _made(base: Recipe, name: str, levels: int, before: int, small: int, after: int, warmup: int) -> Recipe:
    """levels: how often the sizes are halved; before, small, after: steps of large, smaller and again large models."""
    model, line = base.model or {}, Schedule("linear", warmup)
    sizes = [{key: model[key] // 2**level for key in _SIZES} for level in range(levels + 1)]
    down = [Grow(one, width="coalesce", depth="coalesce", moments="reset") for one in sizes[1:]]
    names = ["large", *(f"1/{2**level}" for level in range(1, levels + 1))]
    phases = [Phase(names[0], before, schedule=line)]
    for level, grow in enumerate(down, 1):
        last = level == levels
        phases.append(Phase(names[level], small if last else before, schedule=line, grow=grow))
    for level in reversed(range(levels)):
        grow = Grow(
            sizes[level],
            width="decoalesce",
            depth="decoalesce",
            moments="reset",
            mix_with=names[level],
            alpha=0.5,
            lossy=True,
        )
        phases.append(Phase(f"{names[level]} again", after if level == 0 else small, schedule=line, grow=grow))
    return replace(base, name=name, phases=tuple(phases))


_base = replace(load_recipe(_scratch), data=Data(bins="bins/wiki_books", seq_len=128, eval_rows=2048))
_tiny = load_recipe(_scratch, ["size=tiny", "model.num_attention_heads=4"])

recipe = _made(_base, "bert-vcycle", 1, 10_000, 150_000, 290_000, 10_000)
two_levels = _made(_base, "bert-vcycle-two-levels", 2, 10_000, 150_000, 290_000, 10_000)

tiny = _made(_tiny, "bert-vcycle-tiny", 1, 10, 20, 30, 4)  # half a minute on a CPU
two_levels_tiny = _made(_tiny, "bert-vcycle-two-levels-tiny", 2, 8, 12, 20, 4)
