r"""The demo's subject: BERT(4, 128) grown from BERT(2, 64) and pre-trained in bert2BERT's two stages.

Command:   bert2bert grow runs/demo_small runs/demo_grown --config recipes/configs/demo_base.json \
               --width aki --depth stack --break-symmetry noise
           deepspeed --num_gpus 2 launch/pretrain.py --ds_config ds_configs/zero2_cpu.json \
               --recipe recipes/demo_bert2bert.py --bins bins/demo --resume runs/demo_grown \
               --output runs/demo_bert2bert                                                  (part of `make demo`)
Machine:   2 CPU cores.
Expected:  held-out loss 4.74 nats at the start, between its source's 3.90 and a random start's 7.04, for neither AKI
           nor stacking keeps the function; 3.54 at the end (2026-11-29). The final loss of demo_scratch.py is reached
           with 73 % fewer FLOPs, 56 % with the source counted. 1,600 steps end at 3.33, where the scratch run's end at
           3.34: with the source counted, the head start is used up by then.

The share of sub-model steps, one eighth, is the paper's 5 epochs of 40; stages of 2 of 4 layers where it has 3 of
12. The rate needs no long warm-up, as the optimizer's moments were grown with the weights.
"""

from bert2bert.recipe import AdamW, Data, Full, Masked, Phase, Recipe, Schedule, SubModels

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

STEPS, SUB_MODEL_STEPS, WARMUP = 800, 100, 10

# One linear schedule from the peak down to a tenth of it over both stages, cut in two.
PEAK, FINAL = 2e-3, 0.1
LEFT = FINAL + (1 - FINAL) * (STEPS - SUB_MODEL_STEPS) / (STEPS - WARMUP)

recipe = Recipe(
    name="demo-bert2bert",
    model=MODEL,
    data=Data(bins="bins/demo", seq_len=8, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=256,
    phases=(
        Phase(
            "sub-models",
            steps=SUB_MODEL_STEPS,
            program=SubModels(layers_per_stage=2),
            schedule=Schedule("linear", warmup_steps=WARMUP, peak=PEAK, final=LEFT),
        ),
        Phase(
            "full",
            steps=STEPS - SUB_MODEL_STEPS,
            program=Full(),
            schedule=Schedule("linear", peak=PEAK * LEFT, final=FINAL / LEFT),
        ),
    ),
    optimizer=AdamW(lr=PEAK, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=40,
    checkpoint_every=800,
    keep_checkpoints=1,
    log_every=10,
)
