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

from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule

recipe = Recipe(
    name="upcycled-mixtral",
    model=None,
    data=Data(bins="bins/corpus", seq_len=2048, eval_rows=512),
    global_batch_size=512,
    phases=(Phase("full", steps=10_000, schedule=Schedule("cosine", warmup_steps=200, final=0.1)),),
    optimizer=AdamW(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    gradient_clipping=1.0,
    seed=0,
    eval_every=500,
    checkpoint_every=500,
    keep_checkpoints=2,
    log_every=10,
)

tiny = replace(  # a minute on a CPU, from a tiny checkpoint
    recipe,
    name="upcycled-mixtral-tiny",
    data=Data(bins="bins/corpus", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=40, schedule=Schedule("cosine", warmup_steps=4, peak=1e-3, final=0.1)),),
    eval_every=20,
    checkpoint_every=40,
    log_every=5,
)
