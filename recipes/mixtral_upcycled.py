r"""Sparse upcycling in one job: a dense Llama, then a mixture of eight copies of its feed-forward layers (ICLR 2023).

Command:   deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/mixtral_upcycled.py --bins bins/corpus --output runs/mixtral
           (a dense checkpoint that is there already: --set phases.0.steps=0, with --resume CHECKPOINT)
Machine:   8 x H100; `bert2bert plan --recipe recipes/mixtral_upcycled.py` says the FLOPs of every phase.
Expected:  not yet run at this size. The paper (Komatsuzaki et al., arXiv 2212.05055) beats going on with the dense T5
           by 1.5 to 2 points of SuperGLUE for about half the dense run's compute more.

The settings:
  known from the paper's text        every expert a copy of the dense layer, a fresh router, top-2 in decoders; no
                                     noise; the optimizer state may be kept (no benefit for language)
  assumed                            eight experts in every layer (the paper: 32 in every second), as Mixtral; the
                                     router's auxiliary loss at 0.01; a rate a third of the dense one, warmed up again
"""

import json
from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Grow, Phase, Recipe, Schedule, load_recipe

_here = Path(__file__).parent
_continue = _here / "llama_continue.py"
_mixture = json.loads((_here / "configs" / "mixtral_8x125m.json").read_text())
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip


def _made(base: Recipe, name: str, mixture: dict, dense: int, sparse: int, warmup: int, peak: float) -> Recipe:
    """dense, sparse: steps before and after."""
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    model |= {key: mixture[key] for key in _SHARED if key in mixture}
    wave = Schedule("cosine", warmup, peak, final=0.1)
    phases = (
        Phase("dense", dense, schedule=wave),
        Phase("mixture", sparse, schedule=replace(wave, peak=peak / 3), grow=Grow(mixture, experts="upcycle")),
    )
    return replace(base, name=name, model=model, phases=phases)


recipe = _made(load_recipe(_continue), "mixtral-upcycled", _mixture, 10_000, 5_000, 200, 3e-4)

_small = {**_mixture, "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64}  # fmt: skip
tiny = replace(  # a minute on a CPU, with bins of 1,024 tokens
    _made(load_recipe(_continue, ["size=tiny"]), "mixtral-upcycled-tiny", _small, 20, 20, 4, 2e-3),
    data=Data(bins="bins/corpus", seq_len=32, eval_rows=128),
    eval_every=20,
)
