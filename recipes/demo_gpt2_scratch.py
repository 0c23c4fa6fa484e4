r"""The demo's causal comparison: GPT-2(4, 128) from scratch, with the data, seed and rate of demo_gpt2.py.

Command:   deepspeed --num_gpus 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \
               --recipe recipes/demo_gpt2_scratch.py --bins bins/demo_gpt2 --output runs/demo_gpt2_scratch
           (part of `make demo`)
Machine:   2 CPU cores.
Expected:  held-out loss 4.01 nats where the unigram entropy is 5.90 (2026-11-29).
"""

from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 1024,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 32,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,  # too few steps to over-fit
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

recipe = Recipe(
    name="demo-gpt2-scratch",
    model=MODEL,
    data=Data(bins="bins/demo_gpt2", seq_len=32, eval_rows=1024),
    global_batch_size=128,
    phases=(Phase("full", steps=300, schedule=Schedule("linear", warmup_steps=30, final=0.1)),),
    optimizer=AdamW(lr=3e-3, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1),
    gradient_clipping=1.0,
    seed=0,
    eval_every=30,
    checkpoint_every=1000,
    keep_checkpoints=1,
    log_every=10,
)
