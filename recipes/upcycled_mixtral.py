r"""A mixture of experts upcycled from a dense Llama, trained on (Komatsuzaki et al. 2023, arXiv 2212.05055).

Command:   bert2bert grow llama-125m runs/mixture --config recipes/configs/mixtral_8x125m.json --experts upcycle
           deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/upcycled_mixtral.py --bins bins/corpus --resume runs/mixture --output runs/mixtral
           (to share the experts among 4 ranks: the growth with --format zero --stage 2 --world-size 8 --groups layers
           --expert-parallel 4 or as it is, and "expert_parallel": {"enabled": true, "autoep_size": 4} in the ds_config)
Machine:   any; `bert2bert plan` says the FLOPs of a growth's target, of which two experts a token count.
Expected:  not yet run.

The model is the checkpoint's (model=None). The router's auxiliary loss counts where the config turns it on
(output_router_logits), with its router_aux_loss_coef. A peak rate a third of a dense run's, with a fresh warm-up, is an
assumption: the paper goes on with the dense run's schedule of a T5, which is not a cosine.
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Phase, Schedule, load_recipe

_continue = Path(__file__).with_name("llama_continue.py")

recipe = replace(load_recipe(_continue), name="upcycled-mixtral")

tiny = replace(  # experts take longer on a CPU
    load_recipe(_continue, ["size=tiny"]),
    name="upcycled-mixtral-tiny",
    data=Data(bins="bins/corpus", seq_len=32, eval_rows=128),
    phases=(Phase("full", steps=40, schedule=Schedule("cosine", warmup_steps=4, peak=1e-3, final=0.1)),),
    eval_every=20,
    checkpoint_every=40,
)
