r"""G_stack: a Llama of few layers, put on top of itself four times early on (Du et al., NeurIPS 2024).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/llama_gstack.py --bins bins/slimpajama --output runs/gstack
Machine:   8 x H100; `bert2bert plan --recipe recipes/llama_gstack.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper (arXiv 2405.15319) reports 49.1 % more speed to the loss of 100 billion
           tokens from scratch for 400M to 1.1B, the FLOPs of the small model counted, and 53 to 55 % for 3B and 7B.

The settings:
  known from the paper's text        one growth by a factor of 4 (best of 2 to 4); the small model sees 10 billion
                                     tokens and the large one 97.5 billion; stacking is not function-preserving
  assumed                            TinyLlama's sizes (22 layers, 2048 wide; here 24, to be divided by 4), rows of
                                     2,048 tokens, 1,024 rows a step, peak rate 3e-4 with a cosine to a tenth, warmed
                                     up again after the growth; a fresh optimizer after it
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Grow, Phase, Recipe, Schedule, load_recipe

_continue = Path(__file__).with_name("llama_continue.py")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _made(base: Recipe, name: str, model: dict, small: int, large: int, warmup: int, peak: float) -> Recipe:
    """small, large: steps before and after the growth."""
    layers = model["num_hidden_layers"]
    grow = Grow({"num_hidden_layers": layers}, depth="gstack", moments="reset")
    wave = Schedule("cosine", warmup, peak, final=0.1)
    phases = (Phase("small", small, schedule=wave), Phase("stacked", large, schedule=wave, grow=grow))
    return replace(base, name=name, model={**model, "num_hidden_layers": layers // 4}, phases=phases)


recipe = replace(
    _made(load_recipe(_continue), "llama-gstack", MODEL, 4_768, 46_500, 2_000, 3e-4),
    data=Data(bins="bins/slimpajama", seq_len=2048, eval_rows=512),
    global_batch_size=1024,
)

_tiny = {**MODEL, "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 160, "max_position_embeddings": 64}  # fmt: skip
tiny = replace(  # a minute on a CPU, with bins of 1,024 tokens
    _made(load_recipe(_continue, ["size=tiny"]), "llama-gstack-tiny", _tiny, 20, 40, 4, 2e-3),
    data=Data(bins="bins/corpus", seq_len=32, eval_rows=128),
    eval_every=20,
)
