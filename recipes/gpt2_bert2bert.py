r"""GPT-2 small grown from a GPT-2 of width 512 in the same job, trained in bert2BERT's stages (Chen et al., ACL 2022).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_bert2bert.py --bins bins/web_gpt2 --output runs/gpt2
           (bins: bert2bert prepare --text … --tokenizer FOLDER_OF_GPT2 --output bins/web_gpt2)
Machine:   8 x H100; `bert2bert plan --recipe recipes/gpt2_bert2bert.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper reports 47 % fewer FLOPs than from scratch for AKI without sub-models,
           the cost of the source not counted (table 5; one run).

The settings:
  known from digests of the paper    from (12, 512) to (12, 768) by AKI; the paper's GPT is trained without sub-models
  assumed                            all of gpt2_small_scratch.py's settings; the source is trained for as many steps as
                                     the target, an eighth of whose steps are of sub-models, as the paper's BERT's
Variants:  --set phases.1.steps=0 phases.2.steps=19000 phases.2.schedule.start=0     AKI without stage one
           --set phases.1.grow.width=fpi                                             function-preserving copies
           --set phases.1.grow.width=direct phases.1.grow.break_symmetry=none        DirectCopy
           --set phases.0.steps=0, with --resume SOURCE                              a source that is there already
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Grow, Phase, Schedule, SubModels, load_recipe

_scratch = load_recipe(Path(__file__).with_name("gpt2_small_scratch.py"))
_model = _scratch.model or {}


def _phases(steps: int, warmup: int, peak: float, width: int, heads: int, stage: int) -> tuple[Phase, ...]:
    """Source, sub-models, whole model; steps: of the source, and of the other two together; stage: layers of one."""
    first = steps // 8
    grow = Grow({"n_embd": width, "n_head": heads}, width="aki", depth="stack", break_symmetry="noise", lossy=True)
    one = Schedule("cosine", warmup, peak, steps=steps)  # over both stages
    return (
        Phase("source", steps, schedule=Schedule("cosine", warmup, peak)),
        Phase("sub-models", first, SubModels(stage), schedule=one, grow=grow),
        Phase("full", steps - first, schedule=replace(one, start=first)),
    )


recipe = replace(
    _scratch,
    name="gpt2-bert2bert",
    model={**_model, "n_embd": 512, "n_head": 8},
    phases=_phases(19_000, 700, 6e-4, 768, 12, 3),
)

tiny = replace(  # a few minutes on two CPU cores, with bins of any causal tokenizer
    recipe,
    name="gpt2-bert2bert-tiny",
    model={**_model, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    data=Data(bins="bins/web_gpt2", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=_phases(24, 3, 2e-3, 64, 4, 1),
    eval_every=12,
    checkpoint_every=24,
    log_every=4,
)
