r"""BERT(12, 512), the 54M-parameter source model of bert2BERT (Chen et al., ACL 2022, table 2).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_small.py --bins bins/wiki_books --output runs/small
Machine:   8 x H100; 3.6e19 FLOPs, about 3.5 hours if a third of the bf16 peak is reached (an estimate).
Expected:  not yet run. The paper's source reaches a masked-LM loss of 1.67 on its own data.

The data are English Wikipedia and BookCorpus with a vocabulary of 30,522 (lower-cased BERT wordpieces):
`bert2bert prepare` makes the bins, see the README.

What is known of the paper's settings and what is assumed here is listed in bert_base_bert2bert.py; the
paper says only that the source is trained, so all of it is assumed to be the same as the target's.
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Masked, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,  # heads of 64, as in the target: growth adds whole heads
    "intermediate_size": 2048,
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
    name="bert-small",
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
    name="bert-small-tiny",
    model={
        **MODEL, "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 1,
        "intermediate_size": 128, "max_position_embeddings": 64,
    },
    data=Data(bins="bins/demo", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=60, schedule=Schedule("linear", warmup_steps=6, peak=2e-3)),),
    eval_every=20,
    checkpoint_every=30,
    log_every=5,
)  # fmt: skip
