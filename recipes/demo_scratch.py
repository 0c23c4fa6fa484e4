r"""The demo's comparison: BERT(4, 128) from scratch, with the data, seed and steps of demo_bert2bert.py.

Command:   deepspeed --num_gpus 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \
               --recipe recipes/demo_scratch.py --bins bins/demo --output runs/demo_scratch  (part of `make demo`)
Machine:   2 CPU cores, two minutes.
Expected:  held-out loss 5.35 nats (2026-11-29, 59 s of training on two shared cores): a random start of this size
           has just begun to leave the plateau.
"""

from bert2bert.recipe import AdamW, Data, Masked, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,  # too few steps to over-fit
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.05,  # 0.02 keeps so narrow a model on the unigram plateau for longer
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}

recipe = Recipe(
    name="demo-scratch",
    model=MODEL,
    data=Data(bins="bins/demo", seq_len=16, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=128,
    phases=(Phase("full", steps=600, schedule=Schedule("linear", warmup_steps=100, final=0.1)),),
    optimizer=AdamW(lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=40,
    checkpoint_every=600,
    keep_checkpoints=1,
    log_every=10,
)
