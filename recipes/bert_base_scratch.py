r"""BERT(12, 768) from scratch: what bert2BERT is compared with (Chen et al., ACL 2022, table 2).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_base_scratch.py --bins bins/wiki_books --output runs/scratch
Machine:   8 x H100; 7.7e19 FLOPs (0.588 GFLOP a token x 1.31e11 tokens; the paper counts 7.3e19), about 6.8 hours if
           40 % of the bf16 peak is reached (an estimate).
Expected:  not yet run.

Data, seed, batch, optimizer and schedule are those of bert_base_bert2bert.py, which says what is known of the paper's
settings and what is assumed.
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Masked, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,  # as BERT; with 0.0 a GPU uses the variable-length attention kernel
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}

STEPS_PER_EPOCH = 12_500  # 3.28e9 tokens of data / (512 rows x 512 tokens)

recipe = Recipe(
    name="bert-base-scratch",
    model=MODEL,
    data=Data(bins="bins/wiki_books", seq_len=512, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=512,
    phases=(Phase("full", steps=40 * STEPS_PER_EPOCH, schedule=Schedule("linear", warmup_steps=10_000)),),
    optimizer=AdamW(lr=1e-4, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=5_000,
    checkpoint_every=5_000,
    keep_checkpoints=2,
    log_every=50,
)

tiny = replace(  # half a minute on a CPU, on bins of 1,024 tokens
    recipe,
    name="bert-tiny-scratch",
    model={
        **MODEL, "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 256, "max_position_embeddings": 64,
    },
    data=Data(bins="bins/demo", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=60, schedule=Schedule("linear", warmup_steps=6, peak=2e-3)),),
    eval_every=20,
    checkpoint_every=30,
    log_every=5,
)  # fmt: skip
