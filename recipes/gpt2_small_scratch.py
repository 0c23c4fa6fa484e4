r"""GPT-2 small (124M) from scratch: the source or the baseline of a growth of decoders (Radford et al. 2019).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/gpt2_small_scratch.py --bins bins/web_gpt2 --output runs/gpt2_small
           (bins: bert2bert prepare --text … --tokenizer FOLDER_OF_GPT2 --output bins/web_gpt2)
Machine:   8 x H100; 8.6e18 FLOPs (0.860 GFLOP a token x 1.0e10 tokens), about 45 minutes if 40 % of the bf16 peak is
           reached (an estimate).
Expected:  not yet run.

Batch of 0.5 M tokens, peak rate 6e-4 with a cosine to zero, betas (0.9, 0.95), weight decay 0.1, no dropout: what the
public reproductions of GPT-2 small use (nanoGPT, llm.c). 10 billion tokens are those of llm.c; GPT-2's own number of
tokens is not published.
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

recipe = Recipe(
    name="gpt2-small-scratch",
    model=MODEL,
    data=Data(bins="bins/web_gpt2", seq_len=1024, eval_rows=1024),
    global_batch_size=512,
    phases=(Phase("full", steps=19_000, schedule=Schedule("cosine", warmup_steps=700)),),
    optimizer=AdamW(lr=6e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1),
    gradient_clipping=1.0,
    seed=0,
    eval_every=500,
    checkpoint_every=1_000,
    keep_checkpoints=2,
    log_every=10,
)

tiny = replace(  # a few minutes on two CPU cores, with bins of any causal tokenizer
    recipe,
    name="gpt2-tiny",
    model={**MODEL, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    data=Data(bins="bins/web_gpt2", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=30, schedule=Schedule("cosine", warmup_steps=3, peak=2e-3)),),
    eval_every=15,
    checkpoint_every=30,
    log_every=5,
)
