r"""BERT(12, 768) grown from BERT(12, 512) and pre-trained in bert2BERT's two stages (Chen et al., ACL 2022, table 2).

Command:   bert2bert grow runs/small runs/grown --config recipes/configs/bert_base.json \
               --width aki --depth stack --lossy
           deepspeed --num_gpus 8 launch/pretrain.py --ds_config ds_configs/zero2_bf16.json \
               --recipe recipes/bert_base_bert2bert.py --bins bins/wiki_books --resume runs/grown --output runs/base
           (--lossy: 768 is no multiple of 512, so the copies of some features are more than of others and no
           post-norm BERT keeps its function exactly; the drift is measured and stored)
           (source, growth and both stages in one job: --set size=one_job, without --resume; from a source that is there
           already: --set size=one_job phases.0.steps=0 --resume runs/small)
Machine:   8 x H100; 7.1e19 FLOPs over all steps: 92 % of bert_base_scratch.py, since a sub-model step costs 39 % of a
           full one; about 6.3 hours if 40 % of the bf16 peak is reached (an estimate).
Expected:  not yet run. The paper reports that the loss of the scratch run is reached with 45.2 % fewer FLOPs (the cost
           of the source not counted), and with 38.4 % fewer without the sub-models.

The settings, as far as they could be confirmed:
  known from digests of the paper    AKI width, sub-models of 3, 6, 9, 12 layers, one drawn per step, the top 3 of them
                                     and the head learn; 5 epochs of them before the whole model
  from memory of the paper           40 epochs in all, 512 rows a step, peak rate 1e-4, 10,000 steps of warm-up, English
                                     Wikipedia + BookCorpus, masked LM only, the embeddings do not learn in stage one
  assumed                            rows of 512 tokens, linear decay, one schedule over both stages, Adam betas
                                     and eps, weight decay 0.01, clipping at 1, dropout 0.1, mask share 0.15;
                                     moments grown with the weights (the paper starts them afresh, from memory)
"""

from dataclasses import replace
from pathlib import Path

from bert2bert.recipe import AdamW, Data, Full, Grow, Masked, Phase, Recipe, Schedule, SubModels, load_recipe

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

# Epochs as steps. BERT's 1,000,000 steps x 256 rows x 512 tokens = 1.31e11 tokens are "approximately 40 epochs" of
# Wikipedia + BookCorpus (Devlin et al. 2019), so an epoch is 3.28e9 tokens; 3.28e9 / (512 rows x 512 tokens) = 12,500.
# Check: 40 x 12,500 x 262,144 tokens x 0.588 GFLOP = 7.7e19; the paper's scratch run is 7.3e19.
STEPS_PER_EPOCH = 12_500
SUB_MODEL_STEPS = 5 * STEPS_PER_EPOCH  # 62,500
FULL_STEPS = 35 * STEPS_PER_EPOCH  # 437,500: 40 epochs in all

# One linear schedule over both stages, cut in two: where it stands when stage one ends, stage two goes on.
PEAK, WARMUP = 1e-4, 10_000
LEFT = FULL_STEPS / (SUB_MODEL_STEPS + FULL_STEPS - WARMUP)  # 0.893 of the peak

recipe = Recipe(
    name="bert-base-bert2bert",
    model=MODEL,
    data=Data(bins="bins/wiki_books", seq_len=512, eval_rows=2048),
    objective=Masked(mlm_probability=0.15),
    global_batch_size=512,
    phases=(
        Phase(
            "sub-models",
            steps=SUB_MODEL_STEPS,
            program=SubModels(layers_per_stage=3),
            schedule=Schedule("linear", warmup_steps=WARMUP, peak=PEAK, final=LEFT),
        ),
        Phase("full", steps=FULL_STEPS, program=Full(), schedule=Schedule("linear", peak=PEAK * LEFT)),
    ),
    optimizer=AdamW(lr=PEAK, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01),
    gradient_clipping=1.0,
    seed=0,
    eval_every=5_000,
    checkpoint_every=5_000,
    keep_checkpoints=2,
    log_every=50,
)


def _one_job(small: Recipe, whole: Recipe) -> Recipe:
    """The source's phase, the growth, and the phases of the target."""
    sizes = {key: value for key, value in (whole.model or {}).items() if (small.model or {}).get(key) != value}
    first, *others = whole.phases
    grown = replace(first, grow=Grow(sizes, width="aki", depth="stack", lossy=True))
    source = replace(small.phases[0], name="source")
    return replace(whole, name=whole.name + "-one-job", model=small.model, phases=(source, grown, *others))


one_job = _one_job(load_recipe(Path(__file__).with_name("bert_small.py")), recipe)

_tiny = load_recipe(Path(__file__).with_name("bert_base_scratch.py"), ["size=tiny"])
_stages = (
    Phase("sub-models", 8, SubModels(2), Schedule("linear", 2, 2e-3, steps=40)),
    Phase("full", 32, Full(), Schedule("linear", 2, 2e-3, steps=40, start=8)),
)
_narrow = {"hidden_size": 32, "num_attention_heads": 1, "intermediate_size": 128, "num_hidden_layers": 2}
tiny = _one_job(  # a minute on a CPU, on bins of 1,024 tokens
    replace(_tiny, model={**(_tiny.model or {}), **_narrow}),
    replace(_tiny, name="bert-tiny-bert2bert", phases=_stages),
)
