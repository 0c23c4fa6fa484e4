r"""MSLT: BERT-base grown by three layers at its top, which learn alone, again and again (Yang et al., 2020).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_mslt.py --bins bins/wiki_books --output runs/mslt
Machine:   8 x H100; `bert2bert plan --recipe recipes/bert_mslt.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper (arXiv 2011.13635) claims more than 110 % faster training without a
           significant loss. bert2BERT's re-run of it saved 10.7 % of the FLOPs, with another optimizer than the
           published one, as its authors say, so that this is no figure of MSLT's; LiGO's re-run saved 34.9 %.

The settings:
  known from the abstract            layers are added on top, and each stage trains only those; all learn at the end
  from memory of bert2BERT's re-run  four stages of 8 epochs, of 3, 6, 9 and 12 layers, then 20 epochs of all; new
                                     layers are copies of the top ones
  assumed                            all of bert_base_scratch.py's settings, one linear schedule over all phases; the
                                     head learns in every phase, the embeddings in the first and the last
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Full, Grow, Phase, Recipe, Schedule, Top, load_recipe

_scratch = Path(__file__).with_name("bert_base_scratch.py")


def _made(base: Recipe, name: str, stage: int, last: int, warmup: int, peak: float) -> Recipe:
    """stage, last: steps of a stage, and of the last phase."""
    model = base.model or {}
    k = model["num_hidden_layers"] // 4
    line = Schedule("linear", warmup, peak, of="run")
    added = (
        Phase(f"top {k} of {n}", stage, Top(k), line, grow=Grow({"num_hidden_layers": n}, depth="top"))
        for n in (2 * k, 3 * k, 4 * k)
    )
    phases = (Phase(f"{k} layer{'s' * (k > 1)}", stage, Full(), line), *added, Phase("all", last, Full(), line))
    return replace(base, name=name, model={**model, "num_hidden_layers": k}, phases=phases)


recipe = _made(load_recipe(_scratch), "bert-mslt", 8 * 12_500, 20 * 12_500, 10_000, 1e-4)
tiny = _made(load_recipe(_scratch, ["size=tiny"]), "bert-mslt-tiny", 12, 24, 6, 2e-3)  # a minute on a CPU
