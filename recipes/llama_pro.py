r"""LLaMA Pro: new blocks, copies of their neighbours that do nothing at first, learn alone (Wu et al., ACL 2024).

Command:   bert2bert prepare --text code/*.txt math/*.txt --tokenizer llama-2-7b --output bins/domain
           deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero3_bf16.json \
               --recipe recipes/llama_pro.py --bins bins/domain --resume llama-2-7b --output runs/llama_pro
Machine:   16 x H800 for about seven days in the paper (80 billion tokens).
Expected:  not yet run at this size. The function is that of the source, bit for bit, before the first step.

The settings:
  known from paper and code          a new block after every fourth: 32 to 40; the maps that write the residual stream
                                     are zero in it; the new blocks alone learn, on text of the domain
  from memory of the paper           80 billion tokens of code and mathematics
  assumed                            rows of 4,096 tokens, 1,024 rows a step, peak rate 2e-4 with a cosine to a tenth,
                                     3 % of warm-up; betas, decay and clipping of Llama
The model is the checkpoint's (model=None): any Llama, Mistral or Qwen grows by a quarter.
Variant:   --set phases.1.steps=2000      all parameters for some more steps
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import Data, Fresh, Full, Grow, Phase, Schedule, load_recipe

_continue = Path(__file__).with_name("llama_continue.py")
_blocks = Grow({"num_hidden_layers": "1.25x"}, depth="insert_identity")

recipe = replace(
    load_recipe(_continue),
    name="llama-pro",
    data=Data(bins="bins/domain", seq_len=4096, eval_rows=512),
    global_batch_size=1024,
    phases=(
        Phase("new blocks", 19_000, Fresh(), Schedule("cosine", 570, peak=2e-4, final=0.1), grow=_blocks),
        Phase("all", 0, Full(), Schedule("cosine", 60, peak=2e-5, final=0.1)),
    ),
)

tiny = replace(  # a minute on a CPU, from a tiny checkpoint of 2 layers
    load_recipe(_continue, ["size=tiny"]),
    name="llama-pro-tiny",
    phases=(
        Phase(
            "new blocks", 30, Fresh(), Schedule("cosine", 3, peak=1e-3, final=0.1),
            grow=replace(_blocks, model={"num_hidden_layers": "1.5x"}),
        ),
        Phase("all", 10, Full(), Schedule("cosine", 2, peak=5e-4, final=0.1)),
    ),
    eval_every=10,
    checkpoint_every=20,
)  # fmt: skip
