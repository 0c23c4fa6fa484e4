r"""The demo's comparison: BERT(4, 128) from scratch, with the data, seed and steps of demo_bert2bert.py.

Command:   deepspeed --num_gpus 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \
               --recipe recipes/demo_scratch.py --bins bins/demo --output runs/demo_scratch  (part of `make demo`)
Machine:   2 CPU cores.
Expected:  held-out loss 3.90 nats where the unigram entropy is 5.92 (2026-11-29): the plateau is left after 160 to 240
           steps (5.69, 5.30). Of the peak rates 1.4e-3, 2e-3 and 3e-3 (600 steps, one process) 2e-3 ended lowest;
           rows of 16 tokens kept the run on the plateau for much longer than rows of 8. 1,600 steps end at 3.34.
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
    name="demo-scratch",
    model=MODEL,
    data=Data(bins="bins/demo", seq_len=8, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=256,
    phases=(Phase("full", steps=800, schedule=Schedule("linear", warmup_steps=100, final=0.1)),),
    optimizer=AdamW(lr=2e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=40,
    checkpoint_every=800,
    keep_checkpoints=1,
    log_every=10,
)
