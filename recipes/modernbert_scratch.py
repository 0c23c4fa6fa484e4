r"""ModernBERT-base (149M) from scratch, in two phases (Warner et al. 2024, arXiv 2412.13663).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/modernbert_scratch.py --bins bins/web_modernbert --output runs/modernbert
Machine:   8 x H100; `bert2bert plan` says the FLOPs of the model. 50 billion tokens here, the paper's are 1.7e12.
Expected:  not yet run.

The settings, as far as they could be confirmed:
  of the paper, from memory   22 layers, 30 % of the tokens predicted, rows of 1,024 before the context is extended,
                              peak rate 8e-4, betas (0.9, 0.98), weight decay 1e-5, a constant rate that decays at the
                              end (here the last tenth, linearly; the paper: 1 - sqrt), no dropout on attention
                              probabilities, so that a GPU keeps the variable-length kernel
  otherwise                   AdamW with clipping at 1 where the paper has StableAdamW, which clips updates; a constant
                              batch of 2,048 rows where the paper's grows to 4,608
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Masked, Phase, Recipe, Schedule

MODEL = {
    "architectures": ["ModernBertForMaskedLM"],
    "model_type": "modernbert",
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "pad_token_id": 50283,
    "bos_token_id": 50281,
    "eos_token_id": 50282,
    "cls_token_id": 50281,
    "sep_token_id": 50282,
}

STEPS = 24_000  # of 2,048 rows x 1,024 tokens
DECAY = STEPS // 10

recipe = Recipe(
    name="modernbert-scratch",
    model=MODEL,
    data=Data(bins="bins/web_modernbert", seq_len=1024, eval_rows=2048),
    objective=Masked(0.3),
    global_batch_size=2048,
    phases=(
        Phase("stable", steps=STEPS - DECAY, schedule=Schedule("constant", warmup_steps=1_500)),
        Phase("decay", steps=DECAY, schedule=Schedule("linear")),
    ),
    optimizer=AdamW(lr=8e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-5),
    gradient_clipping=1.0,
    seed=0,
    eval_every=1_000,
    checkpoint_every=1_000,
    keep_checkpoints=2,
    log_every=20,
)

tiny = replace(  # a minute on a CPU, with bins of any tokenizer that has a mask token
    recipe,
    name="modernbert-tiny",
    model={
        **MODEL, "vocab_size": 8192, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 96, "max_position_embeddings": 128, "local_attention": 32, "pad_token_id": 0,
        "bos_token_id": None, "eos_token_id": None, "cls_token_id": None, "sep_token_id": None,
    },
    data=Data(bins="bins/web_modernbert", seq_len=64, eval_rows=128),
    global_batch_size=128,
    phases=(
        Phase("stable", steps=50, schedule=Schedule("constant", warmup_steps=6, peak=2e-3)),
        Phase("decay", steps=10, schedule=Schedule("linear", peak=2e-3)),
    ),
    eval_every=30,
    checkpoint_every=60,
    log_every=5,
)  # fmt: skip
