"""What has been measured for each operator, and by whom. What is not here has no evidence ("none").

"Paper" is the operator's own paper. Percentages are FLOPs saved until the loss of training from scratch is reached,
unless something else is stated; most papers leave out what training the source cost. "Measured here" is this project.
That an operator keeps what it promises is a law of the test-suite for every operator, and is not repeated here.
"""

from __future__ import annotations

EVIDENCE: dict[tuple[str, str], str] = {
    ("width", "fpi"): (
        "Paper: 30.4 % on BERT (12, 512) -> (12, 768). Measured here, the error of indivisible widths for "
        "balanced, random and left copies (3 seeds): 0.038, 0.049, 0.036 on AntiBERTy 512 -> 768; 0.021, 0.030, "
        "0.019 on rxnfp 256 -> 384; perplexity of SmolLM2-135M -> 768 raised by 14, 9.5 and 19 %."
    ),
    ("width", "aki"): (
        "Paper: 38.4 % on BERT (12, 512) -> (12, 768), 45.2 % with the two training stages, 47 % on GPT; "
        "source=below is worse. LiGO measured 29.0 % for bert2BERT from half the depth. Measured here: the demo "
        "(docs/benchmarks.md)."
    ),
    ("width", "direct"): ("Paper (of fpi): 12.2 % in fpi's setting."),
    ("width", "decoalesce"): (
        "Paper, the small model's cost included, FLOPs / wall-clock time saved by the V-cycle: BERT-Base 19.0 / "
        "10.8 %, GPT-Base 24.1 / 16.5 %, BERT-Large in two levels 37.4 / 32.9 %, in three 51.6 / 41.9 %; a third "
        "level did not help BERT-Base."
    ),
    ("width", "net2net"): ("Paper: on Inception only; for transformers see fpi and hyperclone."),
    ("width", "hyperclone"): (
        "Paper: 2.2x to 4x faster to the final accuracy of random initialisation (OPT 350M -> 1.3B, Pythia 410M -> "
        "1.4B, OLMo 1B -> 2.9B; the source's cost not counted); symmetric and noisy symmetric alike, then noisy "
        "diagonal, diagonal, random; a dip right after growth was seen."
    ),
    ("width", "staged"): (
        "Paper: up to 22 % of compute saved with the authors' schedule. HyperCloning finds the diagonal form worse "
        "than even copies."
    ),
    ("width", "ligo"): (
        "Paper: BERT-small (6, 512) -> base 44.7 % (StackBERT 34.1, bert2BERT 29.0 in the same setting), base -> "
        "large 45.2 %, RoBERTa 47.2 %, GPT-2 base -> medium 22.5 %; 100, 500, 1,000 and 10,000 steps of the fit "
        "give 44.7, 44.5, 44.2 and 38.9 %. Measured here on a toy GPT-2 (2 layers, 32 wide, 512 tokens, held-out "
        "loss 4.356 on a novel): -> (4, 64) 4.957 at the start of the fit, 4.359 after 100 steps (difference 0.597 "
        "± 0.013); -> (3, 48) 4.475 -> 4.350 (0.125 ± 0.006); one seed, default settings. What training afterwards "
        "gains was not measured."
    ),
    ("width", "lemon"): (
        "Paper: 56.7 % of compute saved on ViT, 33.2 % on BERT, with fresh optimizers, the same peak rate and a "
        "faster decay."
    ),
    ("width", "sparkling"): (
        "Paper (OLMoE 0.5B/2.5B at 100B of 200B tokens): 20 % (inner 2x), 25 % (hidden 2x), 35 % (both); loss "
        "2.3153 against 2.3096 from scratch, downstream 60.30 against 59.64."
    ),
    ("width", "msg"): ("Paper, with the masks that are not in a checkpoint: 1.8x faster BERT-base, 2.2x BERT-large."),
    ("depth", "stack"): (
        "24.3 % on its own as bert2BERT measured it, 34.1 % as LiGO did, about 25 % of the time by its authors "
        "(StackBERT). Measured here: the demo (docs/benchmarks.md)."
    ),
    ("depth", "gstack"): (
        "Paper: 7B 54.6 % at 300B tokens, 3B 48.6 % at 180B, 410M 53.1 % at 400B and 31.0 % at 700B (savings "
        "shrink with over-training); best g 2 to 4; one growth beats gradual stacking by 2.4 accuracy points; "
        "stacking an untrained model gains nothing. Not exact, which that paper finds not to matter."
    ),
    ("depth", "gopher"): (
        'Paper (ModernBERT, with --width centre): "greatly accelerates initial training", without a percentage.'
    ),
    ("depth", "upscale"): ("Paper: the loss jumps at the seam and recovers fast (no published token count)."),
    ("depth", "top"): ("10.7 % as bert2BERT measured it, 34.9 % as LiGO did; the paper claims 110 % faster training."),
    ("depth", "middle"): (
        "Paper: up to 40 % faster at 1B, 2B and 8B parameters, and better at reasoning than training from scratch to "
        "the same perplexity. Kapl et al. (SmolLM, 360M and 1.7B): 1.29x faster; the layer-wise middle is at least as "
        "good at reasoning."
    ),
    ("depth", "insert_identity"): (
        "LLaMA Pro trains the new blocks alone on 80B tokens of code and mathematics; LEMON claims 33.2 % of "
        "compute saved on BERT."
    ),
    ("depth", "random"): (
        "G_stack's baseline: 25.7 % slower than from scratch. Bu (2025) finds it as good as copies when a model of "
        "no or one layer grows once, at about 80 % of the steps."
    ),
    ("depth", "unshare"): (
        "Paper (BERT-large): 500k steps reach MNLI 86.6 against 86.4 at 1M without sharing; unshare at 10 % of the "
        "steps, share at least 4 times. Saves steps, not FLOPs a step."
    ),
    ("vocab", "mean"): (
        "transformers' resize_token_embeddings draws around the same mean (tested against it). A mean row's logit "
        "is at most the log-mean-exp of the others' (Hewitt 2021)."
    ),
    ("positions", "tile"): ("Longformer starts 4096 positions from RoBERTa's 512 this way."),
    ("experts", "upcycle"): (
        "Papers: T5 +1.5 to 2 SuperGLUE points over continued dense training at 46 to 55 % more compute; from "
        "scratch a mixture needs about 120 % of the dense budget to catch up. Nemotron-4 15B, 1T tokens: MMLU 65.3 "
        "dense, 66.2 E8G8T8, 67.6 E8G1T2; weight scaling gave 1.5 % better loss; the learning rate goes back to "
        "the peak, with batches of at least 4M tokens. Measured here, ties between router rows: 1 of 30,720 "
        "choices of a real model in float32; none of 81,920 of a random one of width 64 in float32, 97 in "
        "bfloat16."
    ),
    ("experts", "duplicate"): ("Paper: 7B -> 13B matches the 64-expert baseline with 32 % fewer GPU-hours."),
    ("embeddings", "untie"): (
        "modded-nanogpt: 2.037 to 1.988 minutes to the target loss, untied after two thirds of the steps, together "
        "with multi-token prediction. On its own: not measured."
    ),
    ("breaker", "noise"): ("Paper (HyperCloning): noisy and plain symmetric copies do about equally well."),
    ("width", "tile"): ("That of fpi:choice=left and of hyperclone, which are the same copies."),
}
EVIDENCE["depth", "decoalesce"] = (
    EVIDENCE["width", "decoalesce"] + " In depth alone, with scale=step (Lauga et al.; 12 layers, 256 wide, plain "
    "SGD): the loss of training at one level after 16k steps with 44 % fewer FLOPs; what momentum does there was left "
    "open."
)
EVIDENCE["width", "coalesce"] = EVIDENCE["depth", "coalesce"] = "That of decoalesce: the V-cycle begins with it."
