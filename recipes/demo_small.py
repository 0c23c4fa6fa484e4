r"""The demo's source: BERT(2, 64), vocabulary 1,024, on the embedded novels.

Command:   deepspeed --num_gpus 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \
               --recipe recipes/demo_small.py --bins bins/demo --output runs/demo_small      (part of `make demo`)
Machine:   2 CPU cores.
Expected:  held-out loss 3.90 nats where the unigram entropy is 5.92 (2026-11-29, two cores with other work, too).
           A masked model first learns the unigram frequencies and falls below them only after a plateau; short rows
           shorten it, as a wide initialisation does. The source must be trained past it, or growth hands over little.
"""

from bert2bert.recipe import AdamW, Data, Masked, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 1024,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # heads of 32, as in the target
    "intermediate_size": 256,
    "max_position_embeddings": 8,
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
    name="demo-small",
    model=MODEL,
    data=Data(bins="bins/demo", seq_len=8, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=256,
    phases=(Phase("full", steps=1000, schedule=Schedule("linear", warmup_steps=100, final=0.1)),),
    optimizer=AdamW(lr=4e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=100,
    checkpoint_every=1000,
    keep_checkpoints=1,
    log_every=10,
)
