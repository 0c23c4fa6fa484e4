r"""T5 1.1 small (77M) from scratch on span corruption (Raffel et al. 2020; Shazeer 2020 for the gated units).

Command:   deepspeed --num_gpus 4 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/t5_scratch.py --bins bins/web_t5 --output runs/t5_small
           (bins: bert2bert prepare --text … --tokenizer FOLDER_OF_T5 --output bins/web_t5)
Machine:   4 x H100; `bert2bert plan` says the FLOPs of the model. 4e10 tokens of text: 524,288 steps of 128 rows, as
           the paper's baseline. The forward pass is transformers' own, which is slower than the cores of this project.
Expected:  not yet run. The tiny size starts at 34 nats, not at the logarithm of the vocabulary: fresh weights are drawn
           as transformers draws them, an untied head with a standard deviation of 1.

Rows of 568 tokens of text become 512 read and 114 written at 15 % noise in spans of 3 (Raffel et al. 2020, section
3.1.4). No dropout in pre-training (T5 1.1). The paper's Adafactor, at 0.01 and then 1/sqrt(step), is AdamW here, whose
state can be grown: a peak of 1e-3 with a linear decay is an assumption.
"""

from dataclasses import replace

from bert2bert.recipe import AdamW, Data, Phase, Recipe, Schedule, SpanCorruption

MODEL = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "layer_norm_epsilon": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}

recipe = Recipe(
    name="t5-scratch",
    model=MODEL,
    data=Data(bins="bins/web_t5", seq_len=568, eval_rows=1024),
    objective=SpanCorruption(noise_density=0.15, mean_span_length=3.0),
    global_batch_size=128,
    phases=(Phase("full", steps=524_288, schedule=Schedule("linear", warmup_steps=10_000)),),
    optimizer=AdamW(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    gradient_clipping=1.0,
    seed=0,
    eval_every=5_000,
    checkpoint_every=5_000,
    keep_checkpoints=2,
    log_every=50,
)

tiny = replace(  # a minute on a CPU, with bins of any tokenizer that has sentinels
    recipe,
    name="t5-tiny",
    model={**MODEL, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
    data=Data(bins="bins/web_t5", seq_len=32, eval_rows=128),
    global_batch_size=128,
    phases=(Phase("full", steps=40, schedule=Schedule("linear", warmup_steps=4, peak=2e-3)),),
    eval_every=20,
    checkpoint_every=40,
    log_every=5,
)
