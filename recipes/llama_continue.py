r"""Any decoder, trained on from a checkpoint: a grown one, a Hugging Face folder, a resharded run of anybody.

Command:   bert2bert prepare --text corpus/*.txt --tokenizer llama-125m --output bins/corpus
           bert2bert config llama-125m --width 2x --output llama-large
           bert2bert grow llama-125m runs/grown --config llama-large --width hyperclone --break-symmetry noise
           deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/llama_continue.py --resume runs/grown --output runs/llama
Machine:   any; the plan's FLOPs are 6 x the parameters a token and a little for attention. 10 billion tokens here.
Expected:  not yet run.

The model is the checkpoint's (model=None). The rate is a third of what such sizes are usually trained at from scratch
(3e-4, Touvron et al. 2023), warmed up again and brought down to a tenth of the peak, as continued pre-training is
commonly run (Ibrahim et al. 2024); batch, betas, decay and clipping are Llama's (Touvron et al. 2023, section 2.3).
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule

recipe = Recipe(
    name="llama-continue",
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
    name="llama-continue-tiny",
    data=Data(bins="bins/corpus", seq_len=64, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=60, schedule=Schedule("cosine", warmup_steps=6, peak=1e-3, final=0.1)),),
    eval_every=30,
    checkpoint_every=60,
    log_every=5,
)
